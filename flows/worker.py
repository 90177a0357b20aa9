"""What a run of a deployment begins with, and what it leaves where it fails.

A worker starts each run as a program of its own in a temporary folder. Its settings are those of
the worker's machine: ``ROUTELLM_*`` in the worker's environment, and the ``routellm.toml`` of the
folder that ``ROUTELLM_WORKERS__FOLDER`` names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.logging.loggers import flow_run_logger, get_run_logger
from prefect.states import Cancelled
from prefect.types._datetime import now

from routellm.cli.context import load_settings
from routellm.errors import UsageError
from routellm.settings import Settings

_FOLDER = "ROUTELLM_WORKERS__FOLDER"


def worker_settings(**changed: Mapping[str, Any] | None) -> Settings:
    """Return the settings of this machine, with groups changed field by field.

    Parameters
    ----------
    **changed
        By group (``training``, ``evaluation``), the fields to change; None changes none.

    Raises
    ------
    UsageError
        If a setting is not allowed, or the home folder would lie in the run's temporary one.
    """
    folder = os.environ.get(_FOLDER)
    if folder:
        try:
            os.chdir(folder)
        except OSError as error:
            raise UsageError(
                f"this worker's {_FOLDER} is {folder}, which cannot be entered ({error.strerror}): "
                "set it to the folder that holds routellm.toml"
            ) from error
    settings = load_settings()
    if not folder and not settings.home.is_absolute():
        raise UsageError(
            f"the home folder of this worker is {settings.home}, which is none: a run starts in a "
            f"temporary folder; set {_FOLDER} to the folder that holds routellm.toml, or "
            "ROUTELLM_HOME to a whole path, in the worker's environment"
        )
    file = Path("routellm.toml").resolve()
    told = f"{file} and " if file.exists() else ""
    get_run_logger().info(f"settings from {told}the environment; home {settings.home.resolve()}")
    update: dict[str, Any] = {"home": settings.home.resolve()}
    for group, fields in changed.items():
        if fields:
            before = getattr(settings, group)
            update[group] = type(before).model_validate(before.model_dump() | dict(fields))
    return settings.model_copy(update=update)


def cancel_waiting_like_this() -> int:
    """Cancel the runs of this deployment that wait with the same parameters; returns how many.

    This run has not read its sources yet, so that it does what they were to do: however many ask
    for a run while one is at work, one more follows.
    """
    if runtime.deployment.id is None:
        return 0
    mine = UUID(str(runtime.flow_run.id))
    with get_client(sync_client=True) as client:
        parameters = client.read_flow_run(mine).parameters
        waiting = client.read_flow_runs(
            deployment_filter=DeploymentFilter(
                id=DeploymentFilterId(any_=[UUID(str(runtime.deployment.id))])
            ),
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
                expected_start_time=FlowRunFilterExpectedStartTime(before_=now("UTC")),
            ),
        )
        alike = [run for run in waiting if run.id != mine and run.parameters == parameters]
        for run in alike:
            message = f"run {runtime.flow_run.name} reads all that this one was to read"
            client.set_flow_run_state(run.id, Cancelled(message=message))
    if alike:
        get_run_logger().info(f"does the work of {len(alike)} runs that waited, too")
    return len(alike)


def crashed_since(deployment: UUID, age: timedelta) -> list[FlowRun]:
    """Return the runs of a deployment that have crashed within a time."""
    with get_client(sync_client=True) as client:
        found: list[FlowRun] = client.read_flow_runs(
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment])),
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CRASHED])),
                end_time=FlowRunFilterEndTime(after_=now("UTC") - age),
            ),
        )
    return found


def said_failed(flow: Any, flow_run: Any, state: Any) -> None:
    """Say in one sentence why a run failed and how to try again: a log line and an artifact.

    A hook for a flow's ``on_failure`` and ``on_crashed``.
    """
    why, retry = reason(state), f"prefect flow-run retry {flow_run.id}"
    flow_run_logger(flow_run, flow).error(f"{why} To try again: {retry}")
    with get_client(sync_client=True) as client:
        client.create_artifact(
            ArtifactCreate(
                key=f"{flow.name}-failed",
                type="markdown",
                description=why,
                flow_run_id=flow_run.id,
                data=f"**{flow.name}** {state.name.lower()}: {why}\n\nTo try again:\n\n"
                f"```\n{retry}\n```\n",
            )
        )


def reason(state: Any) -> str:
    """Return why a run ended badly, as one sentence: our own errors say it themselves."""
    text = (state.message or f"it {state.name.lower()} and left no message").split("\n")[0]
    for what in ("Flow run encountered an exception: ", "Task run encountered an exception "):
        text = text.removeprefix(what)
    kind, colon, said = text.partition(": ")
    if colon and kind.isidentifier():  # the error's class is of no use to a person
        text = said
    return text if text.endswith((".", "!", "?")) else f"{text}."
