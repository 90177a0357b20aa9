"""The ``backtest`` verb: would retraining have paid?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from routellm.cli.context import out, print_json
from routellm.cli.options import Json
from routellm.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from routellm.backtest import Backtest
    from routellm.evaluation.evaluate import Interval
    from routellm.evaluation.two_policies import Figures

BACKTEST = "Example: routellm backtest --from 2026-01-20 --every 7d --routers mf,knn"


def backtest(
    start: Annotated[
        str,
        typer.Option(
            "--from", help="First training: a date (the end of that day, UTC) or a date and time."
        ),
    ],
    end: Annotated[
        str | None,
        typer.Option("--to", help="Last vote that is looked at; by default the newest there is."),
    ] = None,
    every: Annotated[
        str, typer.Option(help="Time between trainings: hours, days or weeks, such as 7d.")
    ] = "7d",
    routers: Annotated[str | None, typer.Option(help="Kinds, by commas, or `all`.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with the figure here.")] = None,
    json: Json = False,
) -> None:
    """Replay history: routers retrained at each date against one that never is."""
    from routellm.as_of import moment
    from routellm.backtest import period
    from routellm.cli.retrain import settings_for

    first, last = moment(start), None if end is None else moment(end)
    length = period(every)
    settings = settings_for(routers, None)
    if html is not None and not html.resolve().parent.is_dir():
        raise UsageError(f"no folder {html.resolve().parent} to write {html.name} in: make it")
    from flows.engine import configure

    configure(settings)
    from flows import backtest as flow

    result = flow.backtest(settings, first, last, length)
    from registry.backtest import backtest_page
    from routellm.evaluation.backtest_plot import plot_backtest
    from routellm.snapshots import write_atomic

    picture = settings.home / "backtest" / "backtest.png"
    plot_backtest(result).savefig(picture)
    if html is not None:
        write_atomic(html, backtest_page(result))
    if json:
        print_json({**result.to_dict(), "figure": picture, "page": html})
        return
    out.print()
    out.print(_table(result))
    out.print(_legend(result))
    out.print(f"\n{_verdict(result)}")
    out.print(f"{_losses(result)}\n")
    for what, path in (("figure", picture), ("page", html)):
        if path is not None:
            out.print(f"  [dim]{what:<8}[/] {path}", soft_wrap=True)


def _table(result: Backtest) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = f"{result.pair.strong} or {result.pair.weak}, snapshot {result.snapshot[:12]}"
    table = Table(
        title=f"[yellow]SIMULATED[/] arena: {title}" if result.simulated else title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("trained", no_wrap=True)
    for name in ("on", "serves"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("votes", justify="right", no_wrap=True)
    for name in ("retrained", "kept", r"gain \[95 %]"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, one in enumerate(result.windows):
        end = i == len(result.windows) - 1
        row = [f"{one.start:%Y-%m-%d}", f"{one.known:,}", one.serves]
        if one.comparison is None:
            table.add_row(*row, "0", "–", "–", "–", end_section=end)
            continue
        c = one.comparison
        table.add_row(*row, f"{c.battles:,}", *_figures(c.retrained, c.never, c.gain),
                      end_section=end)  # fmt: skip
    if result.pooled is not None:
        c = result.pooled
        table.add_row("all", "", "", f"{c.battles:,}", *_figures(c.retrained, c.never, c.gain),
                      style="bold")  # fmt: skip
    return table


def _figures(retrained: Figures, never: Figures, gain: Figures) -> list[str]:
    apgr = [f"{f.apgr.value:.3f}" if f.apgr else "–" for f in (retrained, never)]
    return [*apgr, _signed(gain.apgr) if gain.apgr else "–"]


def _signed(one: Interval) -> str:
    return rf"{one.value:+.3f} \[{one.low:+.3f}, {one.high:+.3f}]"


def _losses(result: Backtest) -> str:
    """Return what became of the win rates themselves, which order and threshold hang on."""
    if result.pooled is None:
        return ""
    both, gain = (result.pooled.never, result.pooled.retrained), result.pooled.gain
    told = []
    for name, what in (("cross_entropy", "cross-entropy"), ("brier", "Brier score")):
        old, new = (getattr(one, name).value for one in both)
        told.append(f"{what} {old:.3f}, {new:.3f}, gain {_signed(getattr(gain, name))}")
    return f"[dim]Win rates, kept and retrained: {'; '.join(told)}.[/]"


def _legend(result: Backtest) -> str:
    first = result.windows[0]
    excluded = sum(one.excluded for one in result.windows)
    told = (
        "[dim]on: battles known. retrained, kept: APGR on the votes until the next training of "
        f"what is served then, and of {first.serves} of {first.start:%Y-%m-%d} for ever; random is "
        "0.500. "
    )
    if excluded:
        told += f"{excluded:,} votes were left out: training had shown their prompts. "
    if len(result.sides[0]) + len(result.sides[1]) > 2:
        strong, weak = (", ".join(side) for side in result.sides)
        told += f"The pair met too seldom: votes are of {strong} against {weak}. "
    if result.undated:
        told += f"{result.undated:,} votes bear no date and measure nothing. "
    return told.rstrip() + "[/]"


def _verdict(result: Backtest) -> str:
    gain = result.pooled.gain.apgr if result.pooled else None
    colour = "yellow"
    if gain is not None and (gain.low > 0 or gain.high < 0):
        colour = "green" if gain.low > 0 else "red"
    text = result.verdict.replace("[", r"\[")
    return f"[bold {colour}]{text}[/]"
