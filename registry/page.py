"""Pages that need nothing but themselves: no script, no address, no prompt text."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from registry.gate import CheckResult, Decision
from routellm.evaluation.evaluate import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {"promote": "#00724f", "reject": "#b3261e", "inconclusive": "#8a5a00"}
_MARKS = {"pass": "✓ pass", "fail": "✗ fail", "unsure": "? unsure", "skipped": "– skipped"}
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1f24; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid #e3e6ea;
         vertical-align: top; }
th { font-weight: 600; color: #57606a; } td.n, th.n { text-align: right; white-space: nowrap; }
.verdict { border-left: 5px solid; padding: .6rem 1rem; background: #f6f8fa; }
.verdict b { text-transform: uppercase; letter-spacing: .04em; }
.fail { color: #b3261e; } .pass { color: #00724f; } .unsure { color: #8a5a00; }
.skipped { color: #6e7781; } td.o { white-space: nowrap; }
p.note { color: #57606a; }
.simulated { background: #fff3cd; padding: .1rem .4rem; border-radius: 3px; }
svg { max-width: 100%; height: auto; }
"""


def page(title: str, parts: Iterable[str], *, simulated: bool) -> str:
    """Return a whole HTML page under a heading; `parts` are HTML."""
    flag = ' <span class="simulated">trained on SIMULATED battles</span>' if simulated else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>{escape(title)}{flag}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def verdict(decision: Decision) -> str:
    """Return a decision's outcome and reason."""
    colour = _COLOURS[decision.outcome]
    return (
        f'<p class="verdict" style="border-color: {colour}"><b style="color: {colour}">'
        f"{decision.outcome}</b>: {escape(decision.reason)}</p>"
    )


def checks_table(checks: Sequence[CheckResult]) -> str:
    """Return what the gate looked at, with its numbers."""
    if not checks:
        return "<p>Nothing: the reason above settled it.</p>"
    rows = []
    for one in checks:
        n = "" if one.n is None else f"{one.n:,}"
        rows.append(
            f'<tr><td>{escape(one.name)}</td><td class="o {one.outcome}">{_MARKS[one.outcome]}</td>'
            f'<td class="n">{one.measured}</td><td class="n">{one.limit}</td><td class="n">{n}</td>'
            f"<td>{escape(one.detail)}</td></tr>"
        )
    head = (
        '<tr><th>check</th><th></th><th class="n">measured</th><th class="n">limit</th>'
        '<th class="n">n</th><th></th></tr>'
    )
    return f"<table>{head}{''.join(rows)}</table>"


def figures_table(routers: Mapping[str, Mapping[str, Evaluation]]) -> str:
    """Return quality and cost by benchmark, of routers by name."""
    head = "<tr><th>benchmark</th><th>router</th>" + "".join(
        f'<th class="n">{column}</th>'
        for column in ("prompts", "APGR [95 %]", "CPT(50)", "CPT(80)", "saved at CPT(50) / (80)")
    )
    rows = []
    for benchmark in dict.fromkeys(b for found in routers.values() for b in found):
        for name, found in routers.items():
            if benchmark not in found:
                continue
            one = found[benchmark]
            saved = ""
            if one.cost is not None:
                at = (one.cost.at_cpt50, one.cost.at_cpt80)
                saved = " / ".join(f"{one.cost.saved(cost):.0%}" for cost in at)
            label = f"{benchmark} (SIMULATED)" if one.simulated else benchmark
            cells = (
                f"{one.n:,}",
                str(one.exact.apgr),
                f"{one.exact.cpt50.value:.1%}",
                f"{one.exact.cpt80.value:.1%}",
                saved,
            )
            rows.append(
                f"<tr><td>{escape(label)}</td><td>{escape(name)}</td>"
                + "".join(f'<td class="n">{cell}</td>' for cell in cells)
                + "</tr>"
            )
    return f"<table>{head}</tr>{''.join(rows)}</table>"


def svg(figure: Figure) -> str:
    """Return a figure as inline SVG, the same bytes for the same figure."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "routellm", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
