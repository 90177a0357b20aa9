"""Two versions on one page: the verdict, what the gate looked at, and the curves."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from registry.client import VersionInfo
from registry.gate import Decision
from registry.page import checks_table, figures_table, page, svg, verdict
from routellm.evaluation.evaluate import Evaluation
from routellm.evaluation.plots import plot_curves


def compare_page(
    standing: VersionInfo,
    candidate: VersionInfo,
    of_standing: Mapping[str, Evaluation],
    of_candidate: Mapping[str, Evaluation],
    decision: Decision,
) -> str:
    """Return the page (see `registry.page`)."""
    names = [f"{v.kind} v{v.version}" for v in (standing, candidate)]
    both = dict(zip(names, (of_standing, of_candidate), strict=True))
    parts = [
        verdict(decision),
        "<h2>What the gate looked at</h2>",
        checks_table(decision.checks),
        "<h2>Quality and cost</h2>",
        figures_table(both),
    ]
    for benchmark in (n for n in of_candidate if n in of_standing):
        on_it = {name: found[benchmark] for name, found in both.items()}
        parts += [f"<h2>{escape(benchmark)}</h2>", svg(plot_curves(on_it))]
    simulated = standing.simulated or candidate.simulated
    return page(f"{names[1]} against {names[0]}", parts, simulated=simulated)
