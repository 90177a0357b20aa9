"""The flow ``monitor``: look at everything, and tell of what has changed since the last look.

What was found and told is remembered in ``<home>/monitor.json``, which is written last: a run that
is killed tells of a change once more, and of none too little.
"""

from __future__ import annotations

from dataclasses import asdict

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.states import Completed, State

from flows.send import send_event
from flows.worker import said_failed, worker_settings
from registry.monitored import look_now
from routellm.monitoring.report import (
    Report,
    asked,
    changed,
    markdown,
    read_report,
    write_report,
)

WANTED = "routellm.retrain.wanted"


@flow(name="monitor", on_failure=[said_failed], on_crashed=[said_failed])
def monitor() -> State:
    """Run the checks; a check that fails is told, and fails no run of this flow."""
    settings = worker_settings()
    before, report = read_report(settings.home), look_now(settings)
    create_table_artifact(
        key="monitor",
        table=[{**asdict(one), "since": report.since[one.name]} for one in report.findings],
        description=f"The monitor's checks at {report.at:%Y-%m-%d %H:%M} UTC",
    )
    create_markdown_artifact(key="monitor-summary", markdown=markdown(report))
    for was, one in changed(before, report):
        send_event(
            f"routellm.monitor.{one.name}",
            f"routellm.monitor.{one.name}",
            one.name,
            {**asdict(one), "was": was, "champion": report.champion},
        )
    if report.wants_retraining:
        send_event(WANTED, "routellm.drift", "drift of the traffic", wanted(report))
        report = asked(report)
    write_report(report, settings.home)
    wrong = [one.name for one in report.findings if one.outcome in ("fail", "warn")]
    return Completed(message=f"{report.outcome}: {', '.join(wrong)}" if wrong else report.outcome)


def wanted(report: Report) -> dict[str, object]:
    """Return what the event says that asks for a retraining."""
    return {
        "reason": "drift",
        "why": "; ".join(one.detail for one in report.drifted),
        "champion": report.champion,
        "numbers": {one.name: one.value for one in report.drifted},
    }
