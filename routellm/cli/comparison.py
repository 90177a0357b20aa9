"""What ``retrain`` prints of its trials: what labels bring, and what chance does."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from routellm.augmentation.effect import AUGMENTATIONS
from routellm.evaluation.evaluate import Evaluation
from routellm.evaluation.published import Published, best_published, published
from routellm.routers.base import Pair

if TYPE_CHECKING:
    from flows.retrain import Retraining

Row = tuple[str, str, dict[str, Evaluation]]  # kind, labels, evaluations


def augmentation_rows(result: Retraining) -> list[Row]:
    """Return routers by the labels of the pair that they had, the registered ones among them."""
    tried = {(t.kind, t.augmentation): t.evaluations for t in result.trials if t.evaluations}
    rows: list[Row] = []
    for one in result.measured:
        if one.kind == "random":
            rows.append((one.kind, "", dict(one.evaluations)))
            continue
        for labels in AUGMENTATIONS:
            if labels == "both":
                rows.append((one.kind, labels, dict(one.evaluations)))
            elif (one.kind, labels) in tried:
                rows.append((one.kind, labels, tried[one.kind, labels]))
    return rows


def augmentation_table(rows: Sequence[Row]) -> Table:
    """Return the table of routers by labels by benchmarks, beside the paper's own rows."""
    table = _table("What the pair's golden and judge labels bring")
    table.add_column("labels", no_wrap=True)
    for name in (r"APGR \[95 %]", "CPT50/80", "saved $", "paper", "CPT50/80"):
        table.add_column(name, justify="right", no_wrap=True)
    for benchmark in _benchmarks(rows):
        first = next(e[benchmark] for _, _, e in rows if benchmark in e)
        pair = Pair(first.strong, first.weak)
        flag = "[yellow]SIMULATED[/]" if first.simulated else f"{first.n:,} prompts"
        table.add_row(f"[bold]{benchmark}[/]", flag)
        before = ""
        for kind, labels, evaluations in rows:
            one = evaluations.get(benchmark)
            if one is None:
                continue
            if labels and kind != before:
                table.add_row(kind)
            row = published(pair, benchmark, labels, kind)
            paper = () if row is None else _figures(row)
            table.add_row(f"  {labels}" if labels else kind, *_ours(one), *paper)
            before = kind
        best = best_published(pair, benchmark)
        if best is not None:
            kind, labels, row = best
            table.add_row("paper's best", f"{kind}, {labels}", "", "", *_figures(row))
        table.add_section()
    return table


def _ours(one: Evaluation) -> tuple[str, str, str]:
    exact, cost = one.exact, one.cost
    saved = ""
    if cost is not None:
        saved = "/".join(f"{cost.strong - at:.2f}" for at in (cost.at_cpt50, cost.at_cpt80))
    apgr = str(exact.apgr).replace("[", r"\[")
    return apgr, _cpts(exact.cpt50.value, exact.cpt80.value), saved


def _figures(row: Published) -> tuple[str, str]:
    return f"{row.apgr:.3f}", _cpts(row.cpt50, row.cpt80)


def _cpts(cpt50: float, cpt80: float) -> str:
    return f"{100 * cpt50:.0f}/{100 * cpt80:.0f} %"


def seeds_rows(result: Retraining) -> list[tuple[str, str, list[float]]]:
    """Return (kind, benchmark, APGR of each seed), the registered router's first."""
    rows = []
    for one in result.measured:
        others = [t for t in result.trials if t.kind == one.kind and t.augmentation == "both"]
        for benchmark, evaluation in one.evaluations.items():
            found = [t.evaluations[benchmark] for t in others if benchmark in t.evaluations]
            if found:
                values = [e.exact.apgr.value for e in (evaluation, *found)]
                rows.append((one.kind, benchmark, values))
    return rows


def seeds_table(rows: Sequence[tuple[str, str, list[float]]]) -> Table:
    """Return the table of APGR over seeds: mean, standard deviation, least and largest."""
    table = _table(f"APGR over {max(len(values) for *_, values in rows)} seeds")
    for name in ("router", "benchmark"):
        table.add_column(name, no_wrap=True)
    for name in ("mean", "std", "least", "largest"):
        table.add_column(name, justify="right", no_wrap=True)
    before = ""
    for kind, benchmark, values in rows:
        figures = (statistics.fmean(values), statistics.stdev(values), min(values), max(values))
        if before and kind != before:
            table.add_section()
        table.add_row(kind if kind != before else "", benchmark, *(f"{v:.3f}" for v in figures))
        before = kind
    return table


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def _benchmarks(rows: Sequence[Row]) -> list[str]:
    """Return the benchmarks' names in order; held-out battles only where there is nothing else."""
    names = list(dict.fromkeys(name for _, _, evaluations in rows for name in evaluations))
    return [n for n in names if n != "heldout"] or names
