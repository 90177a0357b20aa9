"""Train routers as runs of ``train-router`` on Prefect's work pools.

A run gets what it takes to make the same plan again (kind, snapshot, settings) and the training
key that must come out of it. It leaves the trained and measured router under that key, in the home
folder or in the storage, where whoever asked for it takes it from. Nothing is lost with a run that
is killed: who asks again finds what is done, and a checkpoint of what is not.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import WorkerFilter, WorkerFilterStatus
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.states import Cancelled
from pydantic import TypeAdapter, ValidationError

from flows.steps import Step
from flows.trained import Trained
from flows.work import Plan, key_parts, training_key
from flows.worker import reason
from routellm.bundle import content_key
from routellm.errors import RouteLLMError, StorageError, TrainingError, UsageError
from routellm.settings import Settings

POLL_S = 1.0
FULL_S = 90.0  # a run that waits so long for a worker that is there is worth a word
AWAY_S = 600.0  # so long Prefect's server may be away while routers are trained
RESTARTS = 2  # of a router whose run crashed: it goes on from its checkpoint
FOLLOWS_FROM = ("training", "evaluation", "prices", "strong", "weak")  # settings sent along


@dataclass
class Run:
    """A run of ``train-router`` that is under way on the pool ``cpu`` or ``gpu``."""

    kind: str
    on: str
    id: UUID
    since: float = field(default_factory=time.monotonic)
    seen: float = field(default_factory=time.monotonic)  # a worker of its pool, last
    restarts: int = 0
    told: bool = False


def train_on_pools(
    kinds: Sequence[str], plan: Plan, sources: Sequence[str], settings: Settings, line: Step
) -> tuple[list[Trained], dict[str, str]]:
    """Train routers at the same time, each on the pool that its kind asks for.

    Returns
    -------
    list of Trained
        Trained and measured.
    dict
        Why a router could not be trained, by kind.

    Raises
    ------
    UsageError
        If there is no Prefect server, no such deployment, or no worker at all.
    RouteLLMError
        If the server is away for long.
    """
    if not get_current_settings().api.url:
        raise UsageError(
            "`workers.train` is deployments, which needs a Prefect server: set PREFECT_API_URL to "
            "one (`routellm up` starts one), or set `workers.train` to here"
        )
    with get_client(sync_client=True) as client:
        pools = Pools(client, settings, line)
        runs = _Runs(client, pools, plan, sources, settings, line)
        for kind, on in pools.choose(kinds).items():
            runs.start(kind, on)
        line.result = "; ".join(
            f"{', '.join(run.kind for run in runs.running if run.on == on)} on the work pool {name}"
            for on, name in pools.names.items()
            if any(run.on == on for run in runs.running)
        )
        while runs.running:
            time.sleep(POLL_S)
            for run in list(runs.running):
                runs.look(run)
                line.advance(len(kinds) - len(runs.running), len(kinds))
    if runs.failed:
        line.result += f"; {len(runs.trained)} of {len(kinds)} trained"
    for kind, why in runs.failed.items():
        line.note(f"{kind} was not trained: {why}")
    return sorted(runs.trained, key=lambda one: kinds.index(one.kind)), runs.failed


@dataclass
class _Runs:
    """What is under way, and what has come of it."""

    client: SyncPrefectClient
    pools: Pools
    plan: Plan
    sources: Sequence[str]
    settings: Settings
    line: Step
    running: list[Run] = field(default_factory=list)
    trained: list[Trained] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    answered: float = field(default_factory=time.monotonic)

    def start(self, kind: str, on: str, restarts: int = 0) -> None:
        parameters = request(kind, self.plan, self.sources, self.settings)
        self.running.append(
            Run(kind, on, _start(f"train-router/{on}", parameters), restarts=restarts)
        )

    def look(self, run: Run) -> None:
        """See how a run does: whether it has ended, and whether it will ever start."""
        try:
            self._look(run)
            self.answered = time.monotonic()
        except httpx.TransportError as error:  # the server is started anew; runs go on without it
            if time.monotonic() - self.answered > AWAY_S:
                raise RouteLLMError(
                    f"Prefect's server has been away for {AWAY_S / 60:.0f} minutes "
                    f"({type(error).__name__}) while routers are trained: start it, then retrain "
                    "again, which takes what is trained by then"
                ) from error

    def _look(self, run: Run) -> None:
        state = self.client.read_flow_run(run.id).state
        if state is None:
            return
        if state.is_final():
            self._ended(run, state)
        elif (state.is_scheduled() or state.is_pending()) and (why := self.pools.gone(run)):
            self.client.set_flow_run_state(run.id, Cancelled(message=why))
            if run.on == "gpu":
                self.line.note(f"{run.kind} is trained without a GPU: {why}")
                self.start(run.kind, "cpu")
            else:
                self.failed[run.kind] = f"{why}."
        else:
            return
        self.running.remove(run)

    def _ended(self, run: Run, state: Any) -> None:
        if state.is_crashed() and run.restarts < RESTARTS:
            self.line.note(f"{run.kind} is started again, for its run crashed: {reason(state)}")
            (on,) = self.pools.choose([run.kind]).values()
            self.start(run.kind, on, run.restarts + 1)
        elif not state.is_completed():
            self.failed[run.kind] = reason(state)
        else:
            self._take(run.kind)

    def _take(self, kind: str) -> None:
        done = Trained.of(kind, training_key(kind, self.plan, self.settings), self.settings)
        try:
            done.fetch(self.settings)
        except StorageError as error:
            self.failed[kind] = f"{error}."
            return
        if done.figures.exists():
            self.trained.append(done)
        else:
            self.failed[kind] = (
                f"its run ended well and left nothing in {done.folder}: workers, and who asks "
                "them, must share `home`, or `storage`."
            )


def request(kind: str, plan: Plan, sources: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Return the parameters of the run that makes this router: JSON, and no secret in it."""
    dumped = settings.model_dump(mode="json", include=set(FOLLOWS_FROM))
    benchmarks = settings.evaluation.benchmarks
    if benchmarks and benchmarks != "routellm":  # from wherever the worker runs
        dumped["evaluation"]["benchmarks"] = str(Path(benchmarks).resolve())
    return {
        "kind": kind,
        "snapshot": plan.manifest.digest,
        "simulated": plan.manifest.simulated,
        "sources": [str(Path(s).resolve()) if Path(s).exists() else s for s in sources],
        "asked": dumped,
        "made_of": made_of(kind, plan, settings),
    }


def made_of(kind: str, plan: Plan, settings: Settings) -> dict[str, str]:
    """Return digests of all that a router's training key is made of."""
    return {n: content_key(v) for n, v in key_parts(kind, plan, settings).items()}


def as_asked(settings: Settings, asked: Mapping[str, Any]) -> Settings:
    """Return this machine's settings with those that a router follows from as `request` sent them.

    Raises
    ------
    TrainingError
        If this machine's code knows other settings.
    """
    update: dict[str, Any] = {}
    try:
        for name in FOLLOWS_FROM:
            of: TypeAdapter[Any] = TypeAdapter(cast(Any, Settings.model_fields[name].annotation))
            update[name] = of.validate_python(asked[name])
    except (ValidationError, KeyError) as error:
        raise TrainingError(
            f"this worker does not know the settings that a router was asked for with "
            f"({str(error).splitlines()[0]}): install the same version of routellm-mlops on all "
            "machines"
        ) from error
    return settings.model_copy(update=update)


def refuse_other_work(asked: Mapping[str, str], kind: str, plan: Plan, settings: Settings) -> None:
    """Make sure that this machine would make the very router that was asked for.

    Raises
    ------
    TrainingError
        If not; it says what differs.
    """
    mine = made_of(kind, plan, settings)
    differ = [name for name in {**asked, **mine} if asked.get(name) != mine.get(name)]
    if differ:
        raise TrainingError(
            f"this worker would train another {kind} router than the one that was asked for: its "
            f"{' and '.join(differ)} would be another; install the same version of routellm-mlops "
            "on all machines, with the same settings of embedding and data"
        )


class Pools:
    """The two work pools, and who works there."""

    def __init__(self, client: SyncPrefectClient, settings: Settings, line: Step) -> None:
        self.client, self.line = client, line
        self.gpu_kinds, self.wait_s = settings.workers.gpu_kinds, settings.workers.wait_s
        self.names = {"cpu": settings.workers.cpu_pool, "gpu": settings.workers.gpu_pool}

    def choose(self, kinds: Sequence[str]) -> dict[str, str]:
        """Return where each kind is to be trained; without a GPU pool at work, on the CPU's."""
        chosen = {kind: "gpu" if kind in self.gpu_kinds else "cpu" for kind in kinds}
        asking = [kind for kind, on in chosen.items() if on == "gpu"]
        if asking and (why := self._wait_for("gpu")):
            self.line.note(f"{', '.join(asking)} trained without a GPU: {why}")
            chosen = dict.fromkeys(kinds, "cpu")
        if "cpu" in chosen.values() and (why := self._wait_for("cpu")):
            raise UsageError(
                f"routers cannot be trained on the work pools: {why}; start one with `prefect "
                f"worker start --pool {self.names['cpu']}`, or set `workers.train` to here"
            )
        return chosen

    def gone(self, run: Run) -> str:
        """Return why a run that waits will never start, or "".

        A worker may be late with a sign of life: it has to be away for `workers.wait_s`.
        """
        now = time.monotonic()
        if why := self._absent(run.on):
            return why if now - run.seen > self.wait_s else ""
        run.seen = now
        if not run.told and now - run.since > FULL_S:
            run.told = True
            self.line.note(
                f"{run.kind} waits for a free place on the work pool {self.names[run.on]}: give "
                "its workers a higher --limit, or start more of them"
            )
        return ""

    def _wait_for(self, on: str) -> str:
        give_up = time.monotonic() + self.wait_s
        while (why := self._absent(on)) and "no worker" in why and time.monotonic() < give_up:
            time.sleep(POLL_S)
        return why

    def _absent(self, on: str) -> str:
        """Return why nobody takes runs from a pool at present, or ""."""
        name = self.names[on]
        try:
            pool = self.client.read_work_pool(name)
        except ObjectNotFound:
            return f"there is no work pool {name}"
        if pool.is_paused:
            return f"the work pool {name} is paused"
        if pool.is_push_pool or pool.is_managed_pool:  # nobody needs to stand by
            return ""
        online = WorkerFilter(status=WorkerFilterStatus(any_=["ONLINE"]))
        if not self.client.read_workers_for_work_pool(name, worker_filter=online):
            return f"no worker of the work pool {name} is online"
        return ""


def _start(deployment: str, parameters: dict[str, Any]) -> UUID:
    try:
        started = run_deployment(
            deployment, parameters=parameters, timeout=0, flow_run_name=parameters["kind"]
        )
    except ObjectNotFound as error:
        raise UsageError(
            f"the Prefect server at {get_current_settings().api.url} has no deployment "
            f"{deployment}: run `routellm deploy` first"
        ) from error
    return UUID(str(started.id))
