"""The verb ``routellm monitor``: look at everything now, or at what the last look found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from routellm.cli.context import load_settings, out, print_json
from routellm.cli.options import Json
from routellm.errors import UsageError

if TYPE_CHECKING:
    from routellm.monitoring.report import Report

MONITOR = "Example: routellm monitor --json"

_MARKS = {
    "ok": "[green]✓[/]",
    "warn": "[yellow]![/]",
    "fail": "[red]✗[/]",
    "unknown": "[dim]?[/]",
}


def monitor(
    last: Annotated[
        bool, typer.Option(help="Show what the deployment `monitor` found last; look at nothing.")
    ] = False,
    json: Json = False,
) -> None:
    """Check freshness, drift, spend and the gateways' health; exit status 1 if one fails."""
    from routellm.monitoring.report import read_report

    settings = load_settings()
    if last:
        report = read_report(settings.home)
        if report is None:
            raise UsageError(
                f"the deployment `monitor` has not looked yet (no {settings.home}/monitor.json): "
                "run `routellm monitor` without --last"
            )
    else:
        from registry.monitored import look_now

        report = look_now(settings)
    if json:
        print_json(report.to_dict())
    else:
        _print(report)
    if report.outcome == "fail":
        raise typer.Exit(1)


def _print(report: Report) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    champion = f"champion version {report.champion}" if report.champion else "no champion known"
    table = Table(
        title=f"{report.at:%Y-%m-%d %H:%M} UTC, {champion}",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("", "check"):
        table.add_column(column, no_wrap=True)
    table.add_column("", overflow="fold")
    for one in report.findings:
        limit = "" if one.limit is None or one.outcome == "ok" else f" (limit {one.limit:.3g})"
        table.add_row(_MARKS[one.outcome], one.name, escape(one.detail + limit))
    out.print(table)
