"""Runs that were under way when everything stopped: who starts everything again starts them too."""

from __future__ import annotations

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import StateType
from prefect.states import Cancelled, Scheduled

from flows.apply import TAG

_UNDER_WAY = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]


def resume() -> list[str]:
    """Have the server start again what it takes for running; must be called while no worker runs.

    Every step knows what was done before, so that a run which starts again does what is left. Runs
    that another one had started are ended: that one asks for them again, where they are needed.

    Returns
    -------
    list of str
        The runs that will start again.
    """
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_UNDER_WAY)),
                tags=FlowRunFilterTags(all_=[TAG]),
            )
        )
        again = []
        for run in found:
            if run.parent_task_run_id is not None or run.state_type == StateType.CANCELLING:
                state = Cancelled(message="everything was stopped")
            else:
                state = Scheduled(message="everything was stopped; it starts again")
                again.append(run.name)
            client.set_flow_run_state(run.id, state, force=True)
    return again
