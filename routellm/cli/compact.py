"""The verb ``routellm compact``: remove what is old and nobody needs."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from routellm.cli.context import load_settings, out, print_json, registry_of
from routellm.cli.options import Json

if TYPE_CHECKING:
    from registry.retention import Plan

COMPACT = "Example: routellm compact --dry-run"


def compact(
    dry_run: Annotated[bool, typer.Option(help="Say what would go; remove nothing.")] = False,
    json: Json = False,
) -> None:
    """Remove old snapshots, versions, runs and leftovers, by the rules in `retention`."""
    from registry import retention

    registry = registry_of(load_settings())
    decided = retention.plan(registry)
    if not json:
        _print(decided)
    removed = [] if dry_run else retention.carry_out(decided, registry)
    if json:
        print_json(
            {
                "dry_run": dry_run,
                "size_bytes": decided.size_bytes,
                "removals": [{**asdict(one), "path": None} for one in decided.removals],
                "versions_removed": removed,
                "versions_kept": decided.kept,
            }
        )
        return
    for notice in registry.notices:
        out.print(f"[yellow]{notice}[/]", soft_wrap=True)
    if decided.removals:
        out.print("nothing was removed (--dry-run)" if dry_run else "removed")


def _print(decided: Plan) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    counts = Counter(one.what for one in decided.removals)
    if not counts:
        out.print("nothing to remove: all that there is is young, live, or among the newest")
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("what", "which", "MB"):
        table.add_column(column, justify="right" if column == "MB" else "left", no_wrap=True)
    table.add_column("why", overflow="fold")
    for one in decided.removals:
        size = "" if one.size_bytes is None else f"{one.size_bytes / 1e6:,.1f}"
        table.add_row(one.what, one.name[:40], size, one.why)
    out.print(table)
    told = ", ".join(f"{n} {what}{'s' if n > 1 else ''}" for what, n in counts.items())
    out.print(f"{told}: {decided.size_bytes / 1e6:,.1f} MB")
