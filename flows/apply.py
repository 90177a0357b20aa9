"""Make a Prefect server know what runs by itself: work pools, limits, deployments, triggers.

``prefect.yaml`` says what there is, and Prefect's own ``prefect deploy`` reads it; here only what
has changed since is handed to it. So what a person changed on the server since then (a schedule
that is paused, say) stays so until the file or the code of that deployment changes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import get_current_settings
from prefect.workers.process import ProcessWorker

from flows.device import LIMIT
from flows.send import server_url
from routellm import __version__
from routellm.bundle import content_key
from routellm.errors import RouteLLMError
from routellm.settings import Settings
from routellm.snapshots import file_sha256

TAG = "routellm"  # of every deployment in the file
GONE = "routellm: end a run whose machine is gone"
GONE_AFTER = timedelta(minutes=10)  # without a heartbeat, which comes every 30 seconds
UNSTARTED = "routellm: start a run again whose worker is gone"
UNSTARTED_AFTER = timedelta(minutes=3)  # a process starts within seconds


def apply(settings: Settings, file: Path | None = None) -> list[str]:
    """Bring the Prefect server in `PREFECT_API_URL` up to date; a second time changes nothing.

    Killed anywhere, the next time does the rest.

    Parameters
    ----------
    file : Path, optional
        Another ``prefect.yaml``.

    Returns
    -------
    list of str
        What was changed, in words.

    Raises
    ------
    UsageError
        If no server is set.
    RouteLLMError
        If it does not answer, or refuses a deployment.
    """
    url = server_url()
    try:
        with get_client(sync_client=True) as client:
            changed = [
                *_make_pools(client, settings),
                *_set_limit(client, settings),
                *_watch_heartbeats(client),
                *watch_starts(client),
            ]
            return changed + _deploy(client, settings, file or prefect_yaml())
    except (httpx.HTTPError, PrefectHTTPStatusError, RuntimeError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise RouteLLMError(
            f"Prefect's server at {url} could not be told what runs by itself ({why}): see that it "
            "runs and that PREFECT_API_URL is right, then run `routellm deploy` again"
        ) from error


def prefect_yaml() -> Path:
    """Return the file of deployments: in the installed package, or in the checkout beside it."""
    here = Path(__file__).resolve().parent
    installed = here / "prefect.yaml"
    return installed if installed.exists() else here.parent / "deploy" / "prefect.yaml"


def _make_pools(client: SyncPrefectClient, settings: Settings) -> list[str]:
    made = []
    for name in dict.fromkeys((settings.workers.cpu_pool, settings.workers.gpu_pool)):
        try:
            client.read_work_pool(name)  # of whatever type: one for Kubernetes is made elsewhere
        except ObjectNotFound:
            template = ProcessWorker.get_default_base_job_template()
            client.create_work_pool(
                WorkPoolCreate(name=name, type="process", base_job_template=template)
            )
            made.append(f"work pool {name} made, for process workers")
    return made


def _set_limit(client: SyncPrefectClient, settings: Settings) -> list[str]:
    wanted = settings.workers.gpus
    try:
        if client.read_global_concurrency_limit_by_name(LIMIT).limit == wanted:
            return []
    except ObjectNotFound:
        pass
    client.upsert_global_concurrency_limit_by_name(LIMIT, wanted)
    return [f"limit {LIMIT} set to {wanted}"]


def _watch_heartbeats(client: SyncPrefectClient) -> list[str]:
    """Have the server end a run that has fallen silent: whoever waits for it then goes on."""
    ended = ("Completed", "Failed", "Cancelled", "Crashed")
    crashed = ChangeFlowRunState(
        state=StateType.CRASHED,
        message="its machine is gone: it has given no sign of life for "
        f"{GONE_AFTER.seconds // 60} minutes",
    )
    return _where_nothing_follows(
        client, GONE, ("heartbeat",), ("heartbeat", *ended), GONE_AFTER, crashed
    )


def watch_starts(client: SyncPrefectClient) -> list[str]:
    """Have the server give a run free again that a worker took, and died before it began.

    Such a run holds its deployment's one place: no ingest, and no retraining, comes after it. Only
    of work pools of processes: elsewhere a run may wait for a machine for long.
    """
    then = ("Running", "Completed", "Failed", "Cancelled", "Cancelling", "Crashed", "Scheduled",
            "Late", "AwaitingConcurrencySlot", "AwaitingRetry", "Retrying")  # fmt: skip
    again = ChangeFlowRunState(
        state=StateType.SCHEDULED,
        force=True,  # out of Pending, where its place is given free too
        message=f"no worker began it within {UNSTARTED_AFTER.seconds // 60} minutes of taking it",
    )
    processes = {"prefect.resource.role": ["work-pool"], "prefect.work-pool.type": ["process"]}
    return _where_nothing_follows(
        client, UNSTARTED, ("Pending", "Submitting"), then, UNSTARTED_AFTER, again, processes
    )


def _where_nothing_follows(
    client: SyncPrefectClient,
    name: str,
    after: Sequence[str],
    expected: Sequence[str],
    within: timedelta,
    action: ChangeFlowRunState,
    related: dict[str, list[str]] | None = None,
) -> list[str]:
    """Make the automation that acts on a run where one event is not followed by another in time."""
    if client.read_automations_by_name(name):
        return []
    client.create_automation(
        AutomationCore(
            name=name,
            trigger=EventTrigger(
                after={f"prefect.flow-run.{one}" for one in after},
                expect={f"prefect.flow-run.{one}" for one in expected},
                match={"prefect.resource.id": ["prefect.flow-run.*"]},
                match_related=related or {},
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                threshold=1,
                within=within,
            ),
            actions=[action],
        )
    )
    return [f"automation made: {name}"]


def _deploy(client: SyncPrefectClient, settings: Settings, file: Path) -> list[str]:
    doc = yaml.safe_load(file.read_text())
    pools = {"cpu": settings.workers.cpu_pool, "gpu": settings.workers.gpu_pool}
    of_us = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
    known = {(d.entrypoint, d.name): d for d in client.read_deployments(deployment_filter=of_us)}
    changed = []
    for one in doc["deployments"]:
        one["work_pool"] = {**one["work_pool"], "name": pools[one["work_pool"]["name"]]}
        one["version"] = _version(one)
        found = known.get((one["entrypoint"], one["name"]))
        if found is not None and found.version == one["version"]:
            owner = f"prefect.deployment.{found.id}"
            triggers = client.read_resource_related_automations(owner)
            if len(triggers) >= len(one.get("triggers", [])):
                continue
        changed.append(one)
    if changed:
        _prefect_deploy({**doc, "deployments": changed})
    return [f"deployment {_named(one)} applied" for one in changed]


def _version(deployment: dict[str, Any]) -> str:
    """Return what changes when the deployment, or the file of its flow, does."""
    module = importlib.util.find_spec(deployment["entrypoint"].rpartition(".")[0])
    if module is None or module.origin is None:
        raise RouteLLMError(
            f"prefect.yaml names {deployment['entrypoint']}, which is not installed here: install "
            "routellm-mlops anew"
        )
    made_of = (json.dumps(deployment, sort_keys=True), file_sha256(Path(module.origin)))
    return f"{__version__}-{content_key(*made_of)[:8]}"


def _named(deployment: dict[str, Any]) -> str:
    function = deployment["entrypoint"].rpartition(".")[2].replace("_", "-")
    name: str = deployment["name"]
    return name if name == function else f"{function}/{name}"


def _prefect_deploy(doc: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prefect.yaml"
        file.write_text(yaml.safe_dump(doc))
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all",
             "--prefect-file", str(file)],
            cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL,
            env=os.environ | get_current_settings().to_environment_variables(exclude_unset=True),
        )  # fmt: skip
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise RouteLLMError(
            "`prefect deploy` failed: " + " ".join(line.strip() for line in lines[-3:])
        )
