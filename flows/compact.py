"""The flow ``compact``: remove what is old and nobody needs, by the rules in `retention`."""

from __future__ import annotations

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.states import Completed, State

from flows.steps import step
from flows.worker import said_failed, worker_settings
from registry import connect, retention


@flow(name="compact", on_failure=[said_failed], on_crashed=[said_failed])
def compact() -> State:
    """Decide what goes, say it (artifact ``compaction``), and remove it."""
    registry = connect(worker_settings())
    decided = retention.plan(registry)
    create_table_artifact(
        key="compaction",
        table=[
            {"what": one.what, "which": one.name, "bytes": one.size_bytes, "why": one.why}
            for one in decided.removals
        ],
        description=f"What goes, {decided.size_bytes / 1e6:,.1f} MB; versions that stay: "
        + (", ".join(f"{v} ({why})" for v, why in decided.kept.items()) or "none"),
    )
    with step("compact") as line:
        removed = retention.carry_out(decided, registry, line.advance)
        line.result = f"{len(decided.removals):,} removed, {len(removed)} versions among them"
        line.notes.extend(registry.notices)
    return Completed(message=line.result)
