"""What a retraining did, for people: Markdown for Prefect and MLflow, and a page for a manager.

What came in, what was thrown out and why, what was trained, how it did, and what was decided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from registry.calls import said
from registry.client import Registry
from registry.gate import Decision
from registry.page import checks_table, figures_table, page, svg, verdict
from routellm.evaluation.evaluate import Evaluation
from routellm.evaluation.plots import plot_curves
from routellm.snapshots import Manifest


@dataclass(frozen=True)
class RetrainingReport:
    """All that the report tells.

    Attributes
    ----------
    at : str
        When it ended, ISO 8601, UTC.
    read, new_battles, duplicates : int
        Battles read from the sources, those that no snapshot had, and the others.
    unchanged : tuple of str
        Sources that had not changed since they were last read.
    routers : dict
        Evaluations by benchmark, of each router by its label (``knn v7``).
    trained, reused : tuple of str
        Kinds trained now, and found trained before on the same content.
    left_out : dict
        Kinds that were not trained, and why: they cannot be on this machine, or they failed.
    standing : str
        Label of the champion before, or "".
    champion, champion_why : str
        Label of the champion now, or "", and why it is champion.
    notes : tuple of str
        Sentences on what else a person should know: rules that warned, contamination.
    """

    at: str
    manifest: Manifest
    read: int
    new_battles: int
    duplicates: int
    unchanged: tuple[str, ...]
    routers: Mapping[str, Mapping[str, Evaluation]]
    primary: str
    trained: tuple[str, ...]
    reused: tuple[str, ...]
    left_out: Mapping[str, str]
    decision: Decision | None
    standing: str
    champion: str
    champion_why: str
    label_weights: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """The one sentence that most readers want."""
        if not self.champion:
            return "There is no champion yet: the gateway answers from its fallback."
        if self.champion != self.standing:
            before = f", in place of {self.standing}" if self.standing else ""
            return f"{self.champion} is champion now{before}: {self.champion_why}."
        if self.decision is None:
            return f"{self.champion} stays champion: promotion was not asked for."
        return f"{self.champion} stays champion: {self.decision.reason}."

    @property
    def money(self) -> str:
        """What the champion's routing costs on the primary benchmark; "" if not known."""
        one = self.routers.get(self.champion, {}).get(self.primary)
        if one is None or one.cost is None:
            return ""
        cost = one.cost
        return (
            f"On {self.primary}{' (SIMULATED)' if one.simulated else ''}, half of what "
            f"{one.strong} is better than {one.weak} is kept at ${cost.at_cpt50:.2f} a 1,000 "
            f"queries, {cost.saved(cost.at_cpt50):.0%} less than all of them to {one.strong} "
            f"(${cost.strong:.2f}); 80 % of it at ${cost.at_cpt80:.2f}, "
            f"{cost.saved(cost.at_cpt80):.0%} less."
        )


Table = tuple[tuple[str, ...], Sequence[tuple[str, ...]]]


def markdown(report: RetrainingReport) -> str:
    """Return the report as Markdown."""
    flag = " (SIMULATED)" if report.manifest.simulated else ""
    lines = [f"# Retraining of {report.at}{flag}", "", report.headline, ""]
    if report.money:
        lines += [report.money, ""]
    lines += ["## What came in", "", _came_in(report), ""]
    lines += [*_table(_battles(report)), "", "## What was thrown out", ""]
    lines += [*(_table(_thrown_out(report)) if _thrown_out(report)[1] else ["Nothing."]), ""]
    lines += [f"- {note}" for note in report.notes if note] + [""]
    lines += ["## What was trained", "", *_table(_trained(report)), ""]
    lines += ["## How it did", "", *_table(_figures(report)), ""]
    if report.decision is not None:
        one = report.decision
        lines += ["## What was decided", "", f"**{one.outcome}**: {one.reason}", ""]
        if one.checks:
            head = ("check", "outcome", "measured", "limit", "")
            rows = [(c.name, c.outcome, str(c.measured), str(c.limit), c.detail)
                    for c in one.checks]  # fmt: skip
            lines += [*_table((head, rows)), ""]
    return "\n".join(lines)


def html(report: RetrainingReport) -> str:
    """Return the report as a page that needs nothing but itself."""
    parts = [f"<p><strong>{escape(report.headline)}</strong></p>"]
    if report.money:
        parts.append(f"<p>{escape(report.money)}</p>")
    for benchmark in _benchmarks(report):
        on_it = {n: found[benchmark] for n, found in report.routers.items() if benchmark in found}
        parts.append(svg(plot_curves(on_it)))
        break  # the primary one says it; the others are in the table
    if report.decision is not None:
        parts += ["<h2>What was decided</h2>", verdict(report.decision),
                  checks_table(report.decision.checks)]  # fmt: skip
    parts += ["<h2>How the routers did</h2>", figures_table(report.routers)]
    parts += ["<h2>What came in</h2>", f"<p>{escape(_came_in(report))}</p>"]
    parts.append(_html_table(_battles(report)))
    parts.append("<h2>What was thrown out</h2>")
    thrown = _thrown_out(report)
    parts.append(_html_table(thrown) if thrown[1] else "<p>Nothing.</p>")
    parts += [f'<p class="note">{escape(note)}</p>' for note in report.notes if note]
    parts += ["<h2>What was trained</h2>", _html_table(_trained(report))]
    return page(f"Retraining of {report.at}", parts, simulated=report.manifest.simulated)


def log_report(registry: Registry, run_id: str, report: RetrainingReport) -> None:
    """Keep the report with the retraining's run, as ``report.md`` and ``report.html``.

    Raises
    ------
    RegistryError
        If MLflow does not take it.
    """
    with said(registry.settings):
        registry.client.log_text(run_id, markdown(report), "report.md")
        registry.client.log_text(run_id, html(report), "report.html")


def _came_in(report: RetrainingReport) -> str:
    told = (
        f"{report.new_battles:,} new battles of {report.read:,} read "
        f"({report.duplicates:,} known before); snapshot {report.manifest.digest[:12]} holds "
        f"{report.manifest.rows:,}."
    )
    if report.unchanged:
        told += f" Unchanged since they were last read: {', '.join(report.unchanged)}."
    return told


def _battles(report: RetrainingReport) -> Table:
    rows = [
        (kind, f"{n:,}", f"{report.label_weights[kind]:g}" if kind in report.label_weights else "")
        for kind, n in report.manifest.by_label_kind.items()
    ]
    return ("label kind", "battles", "weight"), rows


def _thrown_out(report: RetrainingReport) -> Table:
    rows = [(rule, f"{n:,}") for rule, n in report.manifest.quarantined_by_rule.items()]
    return ("rule that battles failed", "quarantined"), rows


def _trained(report: RetrainingReport) -> Table:
    rows = [(kind, "trained now") for kind in report.trained]
    rows += [(kind, "trained before on the same content") for kind in report.reused]
    rows += [(kind, why) for kind, why in report.left_out.items()]
    return ("router", ""), rows


def _figures(report: RetrainingReport) -> Table:
    head = ("benchmark", "router", "APGR [95 %]", "CPT(50)", "CPT(80)")
    rows = []
    for benchmark in _benchmarks(report):
        for label, found in report.routers.items():
            one = found.get(benchmark)
            if one is not None:
                name = f"{benchmark} (SIMULATED)" if one.simulated else benchmark
                cpts = (f"{c.value:.1%}" for c in (one.exact.cpt50, one.exact.cpt80))
                rows.append((name, label, str(one.exact.apgr), *cpts))
    return head, rows


def _benchmarks(report: RetrainingReport) -> list[str]:
    """Return all benchmarks, the primary one first."""
    names = dict.fromkeys(b for found in report.routers.values() for b in found)
    return sorted(names, key=lambda name: name != report.primary)


def _table(table: Table) -> list[str]:
    head, rows = table
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return lines + ["| " + " | ".join(_cell(c) for c in row) + " |" for row in rows]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _html_table(table: Table) -> str:
    head, rows = table

    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(c)}</{tag}>" for c in cells) + "</tr>"

    return f"<table>{row(head, 'th')}{''.join(row(r, 'td') for r in rows)}</table>"
