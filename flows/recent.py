"""The latest flow runs, asked of Prefect's server over HTTP.

Prefect itself is not imported: who watches a server all night keeps small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx

from routellm.supervise import tls

_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class FlowRun:
    """One run of a flow.

    Attributes
    ----------
    name : str
        ``<deployment or flow>`` it was a run of.
    kind : str
        The router kind that it trains, or "".
    state : str
        Prefect's name of its state: Scheduled, Running, Completed, Failed, ...
    message : str
        What Prefect says of that state, its first line.
    at : datetime
        When it started, or is to start.
    seconds : float
        How long it has run.
    """

    id: str
    name: str
    kind: str
    state: str
    message: str
    at: datetime
    seconds: float


def recent_runs(api: str, limit: int = 6) -> list[FlowRun]:
    """Return the newest runs that are under way or over, the newest first.

    Parameters
    ----------
    api : str
        The server's address, up to and including ``/api``.

    Raises
    ------
    httpx.HTTPError
        If the server does not answer.
    """
    with httpx.Client(base_url=api, timeout=_TIMEOUT_S, verify=tls()) as client:
        runs = _post(
            client,
            "/flow_runs/filter",
            limit=limit,
            sort="START_TIME_DESC",
            flow_runs={"state": {"type": {"not_any_": ["SCHEDULED"]}}},
        )
        flows = _names(client, "flows", [run["flow_id"] for run in runs])
        deployments = _names(
            client, "deployments", [run["deployment_id"] for run in runs if run["deployment_id"]]
        )
    return [_of(run, flows, deployments) for run in runs]


def _names(client: httpx.Client, what: str, ids: Sequence[str]) -> dict[str, str]:
    if not ids:
        return {}
    found = _post(client, f"/{what}/filter", **{what: {"id": {"any_": sorted(set(ids))}}})
    return {one["id"]: one["name"] for one in found}


def _post(client: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    reply = client.post(path, json=body)
    reply.raise_for_status()
    found: list[dict[str, Any]] = reply.json()
    return found


def _of(run: dict[str, Any], flows: dict[str, str], deployments: dict[str, str]) -> FlowRun:
    flow = flows.get(run["flow_id"], "?")
    deployment = deployments.get(run["deployment_id"] or "", "")
    when = run["start_time"] or run["expected_start_time"] or run["created"]
    return FlowRun(
        id=run["id"],
        name=flow if deployment in ("", flow) else f"{flow}/{deployment}",
        kind=str((run.get("parameters") or {}).get("kind", "")),
        state=run["state_name"] or "?",
        message=((run.get("state") or {}).get("message") or "").split("\n")[0],
        at=datetime.fromisoformat(when.replace("Z", "+00:00")).astimezone(UTC),
        seconds=float(run["total_run_time"] or run["estimated_run_time"] or 0.0),
    )


def deployments(api: str) -> dict[str, bool]:
    """Return the deployments on a server, and whether each is paused.

    Raises
    ------
    httpx.HTTPError
        If the server does not answer.
    """
    with httpx.Client(base_url=api, timeout=_TIMEOUT_S, verify=tls()) as client:
        found = _post(client, "/deployments/filter")
        flows = _names(client, "flows", [one["flow_id"] for one in found])
    return {f"{flows.get(d['flow_id'], '?')}/{d['name']}": bool(d["paused"]) for d in found}


def online_workers(api: str, pool: str) -> list[str]:
    """Return the names of the workers of a pool that answered of late; none if it is missing.

    Raises
    ------
    httpx.HTTPError
        If the server does not answer.
    """
    with httpx.Client(base_url=api, timeout=_TIMEOUT_S, verify=tls()) as client:
        reply = client.post(f"/work_pools/{pool}/workers/filter", json={})
        if reply.status_code == httpx.codes.NOT_FOUND:
            return []
        reply.raise_for_status()
        return [one["name"] for one in reply.json() if one["status"] == "ONLINE"]
