"""The verbs that look at versions and move the champion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from routellm.cli.context import load_settings, out, print_json, registry_of
from routellm.cli.options import Json
from routellm.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from registry import Decision, Registry, VersionInfo
    from registry.gate import CheckResult
    from registry.history import Entry

VERSIONS = "Example: routellm versions"
COMPARE = "Example: routellm compare champion 7 --html compare.html"
PROMOTE = 'Example: routellm promote 7 --dry-run; routellm promote 7 --force --reason "hotfix"'
ROLLBACK = "Example: routellm rollback --to 3"
HISTORY = 'Example: routellm history --at "2026-11-17 14:05"'

_MARKS = {
    "pass": "[green]✓ pass[/]",
    "fail": "[red]✗ fail[/]",
    "unsure": "[yellow]? unsure[/]",
    "skipped": "[dim]– skipped[/]",
}
_WIDE = 120  # columns from which a check stands on one line
_OUTCOMES = {"promote": "green", "reject": "red", "inconclusive": "yellow"}


def versions(json: Json = False) -> None:
    """List registered versions, newest first."""
    found = registry_of(load_settings()).versions()
    if json:
        print_json([vars(v) for v in found])
        return
    pairs = {(v.tags.get("strong", "?"), v.tags.get("weak", "?")) for v in found}
    table = _table()
    for column in ("version", "kind", "aliases", "created (UTC)", "snapshot"):
        table.add_column(column, no_wrap=True)
    if len(pairs) > 1:
        table.add_column("pair")
    for v in found:
        kind = f"{v.kind} [yellow]SIMULATED[/]" if v.simulated else v.kind
        cells = [
            v.version,
            kind,
            f"[bold green]{', '.join(v.aliases)}[/]" if v.aliases else "",
            v.created_at[:16].replace("T", " "),
            v.tags.get("snapshot", "")[:12],
        ]
        if len(pairs) > 1:
            cells.append(f"{v.tags.get('strong', '?')} / {v.tags.get('weak', '?')}")
        table.add_row(*cells)
    out.print(table)
    if len(pairs) == 1:
        (pair,) = pairs
        out.print(f"[dim]all of them route between {pair[0]} and {pair[1]}[/]", soft_wrap=True)


def compare(
    a: Annotated[str, typer.Argument(help="Version or alias that stands, as the champion would.")],
    b: Annotated[str, typer.Argument(help="Version or alias that would take its place.")],
    html: Annotated[
        Path | None, typer.Option(help="Also write a page with the curves to this file.")
    ] = None,
    json: Json = False,
) -> None:
    """Put two versions' figures side by side, and say what the gate would decide."""
    registry = registry_of(load_settings())
    standing, candidate = (registry.get(name) for name in (a, b))
    decision = _judged(registry, standing, candidate)
    metrics = [registry.run_metrics(info) for info in (standing, candidate)]
    if html is not None:
        _write_page(html, registry, standing, candidate, decision)
    if json:
        shared = sorted(n for n in metrics[0] if n in metrics[1] and not n.endswith(".pgr"))
        rows = {n: (metrics[0][n], metrics[1][n]) for n in shared}
        print_json(
            {
                "decision": decision.to_dict(),
                "metrics": {n: {"a": x, "b": y, "delta": y - x} for n, (x, y) in rows.items()},
                "html": html,
            }
        )
        return
    out.print(_figures_table(registry, (standing, candidate), metrics))
    _print_decision(decision)
    if html is not None:
        out.print(f"curves: {html}", soft_wrap=True)


def promote(
    version: Annotated[str, typer.Argument(help="Version number or alias.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the verdict only.")] = False,
    challenger: Annotated[
        bool, typer.Option("--challenger", help="Only put it in line, for a canary or shadow.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Promote whatever the gate says.")] = False,
    reason: Annotated[str | None, typer.Option(help="Why; needed with --force.")] = None,
    json: Json = False,
) -> None:
    """Make a version champion, if the gate lets it."""
    if force and not reason:
        raise UsageError("--force needs --reason: it is written into the history")
    if reason and not force:
        raise UsageError("--reason goes with --force: without it the gate gives the reason")
    if dry_run + challenger + force > 1:
        raise UsageError("give one of --dry-run, --challenger and --force: each does another thing")
    with _moving() as registry:
        info = registry.get(version)
        champion = registry.champion()
        if challenger:
            registry.set_challenger(info)
            if json:
                print_json(vars(registry.get(info.version)))
            else:
                out.print(f"version {info.version} ({info.kind}) is [bold]challenger[/]")
            return
        if force:
            registry.promote(info, force_reason=reason)
            _print_state(registry, as_json=json)
            return
        decision = _judged(registry, champion, info)
        if not json:
            _print_decision(decision)
        elif dry_run or decision.outcome != "promote":
            print_json(decision.to_dict())
        if dry_run:
            return
        if decision.outcome == "promote":
            registry.promote(info, decision, expected=champion.version if champion else None)
            _print_state(registry, as_json=json)
            return
        if champion is None or champion.version != info.version:
            registry.record(info, decision)
        raise UsageError(
            f"version {info.version} was not promoted: {decision.reason}; to promote it all the "
            "same, give --force --reason"
        )


def rollback(
    to: Annotated[str | None, typer.Option(help="Version; the one before if not given.")] = None,
    json: Json = False,
) -> None:
    """Take the champion back to where it was."""
    with _moving() as registry:
        info = registry.rollback(to)
        if json:
            print_json(registry.state())
        else:
            out.print(f"[green]champion is version {info.version}[/] ({info.kind}) again")


def history(
    at: Annotated[
        str | None,
        typer.Option(help="What was serving then: ISO date and time, UTC unless it says."),
    ] = None,
    json: Json = False,
) -> None:
    """Print every decision and move, oldest first; checks that none was altered."""
    registry = registry_of(load_settings())
    if at is not None:
        when = _time(at)
        entry = registry.serving_at(when)
        if json:
            print_json(None if entry is None else entry.to_dict())
        elif entry is None or entry.to is None:
            out.print(f"nothing was serving at {when:%Y-%m-%d %H:%M} UTC")
        else:
            out.print(
                f"version [bold]{entry.to}[/] was serving at {when:%Y-%m-%d %H:%M} UTC, since "
                f"{entry.since}: {entry.reason}",
                soft_wrap=True,
            )
        return
    entries = registry.history()
    if json:
        print_json([one.to_dict() for one in entries])
        return
    table = _table()
    for column in ("", "when (UTC)", "who", "what", "version", "champion"):
        table.add_column(column, no_wrap=True)
    table.add_column("why", overflow="fold")
    for one in entries:
        table.add_row(*_history_cells(one))
    out.print(table)
    n = len(entries)
    counted = f"{n} {'entry' if n == 1 else 'entries'}"
    out.print(f"[dim]{counted}; each holds the hash of the one before, none is missing[/]")


def _history_cells(one: Entry) -> tuple[str, ...]:
    moved = one.from_ != one.to
    champion = f"{one.from_ or '–'} → [bold]{one.to or '–'}[/]" if moved else (one.to or "–")
    when = one.at[:16].replace("T", " ")
    what = f"[yellow]{one.action}, forced[/]" if one.forced else one.action
    return (str(one.n), when, one.by, what, one.version or "", champion, one.reason)


def _time(text: str) -> datetime:
    try:
        when = datetime.fromisoformat(text)
    except ValueError as error:
        raise UsageError(
            f"--at {text!r} is not a time: give it as 2026-11-17T14:05, with +01:00 behind it if "
            "it is not UTC"
        ) from error
    return when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)


def _judged(registry: Registry, champion: VersionInfo | None, candidate: VersionInfo) -> Decision:
    from registry.evidence import gather
    from registry.gate import Gate

    return Gate(registry.settings).decide(gather(registry, champion, candidate))


@contextmanager
def _moving() -> Iterator[Registry]:
    """Yield the registry, cut-short moves mended; tell of moves, and say what went wrong."""
    from rich.console import Console

    from flows.announce import announced

    registry = registry_of(load_settings())
    try:
        with announced(registry):
            registry.repair()
            yield registry
    finally:
        err = Console(stderr=True, highlight=False, soft_wrap=True)
        for notice in dict.fromkeys(registry.notices):
            err.print(notice, style="yellow", markup=False)


def _print_state(registry: Registry, *, as_json: bool) -> None:
    state = registry.state()
    if as_json:
        print_json(state)
    else:
        out.print(f"[green]champion is version {state['version']}[/]: {state['why']}")


def _print_decision(decision: Decision) -> None:
    if decision.checks:
        out.print(gate_table(decision.checks))
    colour = _OUTCOMES[decision.outcome]
    out.print(f"[bold {colour}]{decision.outcome}[/]: {decision.reason}", soft_wrap=True)


def gate_table(checks: Sequence[CheckResult]) -> Table:
    """Return what the gate looked at: a row a check; on a narrow terminal, two lines each."""
    wide = out.width >= _WIDE
    table = _table()
    table.add_column("check", overflow="fold")
    table.add_column("", no_wrap=True)
    for column in ("measured", "limit"):
        table.add_column(column, justify="right", no_wrap=True)
    if wide:
        table.add_column("", overflow="fold")
    for one in checks:
        measured = one.measured.replace("[", r"\[")
        name, *detail = (one.name, one.detail) if wide else (f"{one.name}\n[dim]{one.detail}[/]",)
        table.add_row(name, _MARKS[one.outcome], measured, one.limit, *detail)
    return table


def _figures_table(
    registry: Registry,
    infos: Sequence[VersionInfo],
    metrics: Sequence[Mapping[str, float]],
) -> Table:
    """Return what tells two versions apart: a row a figure."""
    table = _table()
    table.add_column("figure", no_wrap=True)
    for info in infos:
        table.add_column(f"{info.kind} v{info.version}", justify="right")
    table.add_column("difference", justify="right")
    told = (".apgr", ".cpt50", ".cpt80", ".saved_cpt50")
    names = [n for n in sorted(metrics[0]) if n in metrics[1]]
    names = [n for n in names if n.endswith(told) and not n.endswith("paper_apgr")]
    names += [
        n
        for n in ("apgr", "cost_usd_per_1k_queries", "latency_ms_p50", "calibration_ece_after")
        if n in metrics[0] and n in metrics[1]
    ]
    for n in names:
        x, y = metrics[0][n], metrics[1][n]
        better = y > x if n.endswith(("apgr", "saved_cpt50")) else y < x
        colour = "default" if x == y else "green" if better else "red"
        table.add_row(n, f"{x:.4g}", f"{y:.4g}", f"[{colour}]{y - x:+.4g}[/]")
    return table


def _write_page(
    path: Path,
    registry: Registry,
    standing: VersionInfo,
    candidate: VersionInfo,
    decision: Decision,
) -> None:
    from registry.report import compare_page
    from routellm.snapshots import write_atomic

    page = compare_page(
        standing,
        candidate,
        registry.evaluations(standing),
        registry.evaluations(candidate),
        decision,
    )
    try:
        write_atomic(path, page)
    except OSError as error:
        raise UsageError(f"--html {path} cannot be written ({error.strerror})") from error


def _table() -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def champion_doc(registry: Registry) -> dict[str, Any] | None:
    """Return what is live, since when, and why; None if nothing is."""
    champion = registry.champion()
    if champion is None:
        return None
    state = registry.state()
    known = state.get("version") == champion.version
    return {
        "version": champion.version,
        "kind": champion.kind,
        "since": state["at"] if known else None,
        "by": state["by"] if known else None,
        "why": state["why"] if known else "moved by something other than routellm",
        "simulated": champion.simulated,
        "snapshot": champion.tags.get("snapshot"),
    }
