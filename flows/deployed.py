"""The flows that deployments run (``deploy/prefect.yaml``), each on a worker of a work pool.

Their parameters are JSON; everything else is a setting of the worker's machine. `monitor` and
`compact` are in files of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.states import Completed, State

from flows import retrain as loop
from flows.dispatch import as_asked, refuse_other_work
from flows.promotion import promote_version
from flows.report import apgr, figures_table
from flows.send import send_event
from flows.steps import log, step
from flows.wanted import (
    EVENT,
    FIRST,
    FRESH,
    NEW_MODEL,
    Wanted,
    retraining_wanted,
    trained_snapshots,
)
from flows.work import measure_version, plan_again
from flows.worker import (
    cancel_waiting_like_this,
    crashed_since,
    said_failed,
    worker_settings,
)
from registry import Registry, connect
from routellm.as_of import moment
from routellm.ingest import Staged
from routellm.lock import alone
from routellm.settings import Settings
from routellm.snapshots import Manifest, SnapshotStore, snapshot_store
from routellm.sources.inbox import sources_now

INGESTED = "routellm.ingested"
UNREADABLE = "routellm.inbox.unreadable"
_NOTHING_TO_READ = "no source is set, and the inbox is empty"


def _flow(*, on_crashed: Sequence[Any] = (), **options: Any) -> Any:
    crashed = [said_failed, *on_crashed]
    return flow(persist_result=False, on_failure=[said_failed], on_crashed=crashed, **options)


def ask_again(flow: Any, flow_run: Any, state: Any) -> None:
    """Ask again for a retraining that was killed: a hook for a flow's ``on_crashed``.

    The first time within an hour, and if it was asked for as it is every night. One that is killed
    again and again, for it needs more memory than there is, is left to the hourly ingest to try.
    """
    given = {name for name, value in flow_run.parameters.items() if value not in (None, True, "")}
    if flow_run.deployment_id is None or given - {"because"}:
        return
    if len(crashed_since(flow_run.deployment_id, timedelta(hours=1))) > 1:
        return
    why = f"retraining {flow_run.name} was killed"
    told = {"reason": flow_run.parameters.get("because", ""), "why": why, "numbers": {}}
    send_event(EVENT, f"routellm.run.{flow_run.id}", flow_run.name, told)


@_flow(name="ingest")
def ingest(sources: list[str] | None = None) -> State[Any] | None:
    """Take in what is new, and ask for a retraining if there is reason to.

    There may be reason without anything new: the retraining that was asked for before was killed.
    Asking twice does no harm, since one that finds the work done does nothing.

    Parameters
    ----------
    sources : list of str
        Where battles come from; by default the settings' sources, and the inbox.
    """
    settings = worker_settings()
    cancel_waiting_like_this()
    names = list(sources or sources_now(settings))
    if not names:
        return Completed(message=_NOTHING_TO_READ)
    store = snapshot_store(settings, simulated=loop.only_simulated(names))
    staged, manifest, _, _ = loop.take_in(names, store, settings)
    with step("tell") as line:
        line.result = _tell(staged, manifest, store, settings)
    return None


@_flow(name="retrain", on_crashed=[ask_again])
def retrain(
    sources: list[str] | None = None,
    routers: list[str] | None = None,
    benchmarks: str | None = None,
    move_alias: bool = True,
    because: str = "",
    as_of: str | None = None,
) -> State[Any] | None:
    """Run the loop once: ingest, validate, augment, train, evaluate, register, promote.

    Parameters
    ----------
    sources, routers, benchmarks : optional
        As `sources`, `training.routers` and `evaluation.benchmarks` of the settings.
    move_alias : bool
        Whether the best router may become champion.
    because : str
        Why an event asked for it. Where that holds no longer when its turn comes, for another
        retraining came before, nothing is done.
    as_of : str, optional
        Train on what was known at this moment (`routellm.as_of.moment`): no source is read, and the
        champion stays.

    Raises
    ------
    UsageError
        If `as_of` is no moment, or one that has not passed.
    """
    when = None if as_of is None else moment(as_of)  # refused before anything else
    settings = worker_settings(
        training={"routers": tuple(routers)} if routers else None,
        evaluation={"benchmarks": benchmarks} if benchmarks else None,
    )
    cancel_waiting_like_this()
    if when is None and not (sources or sources_now(settings)):
        return Completed(message=_NOTHING_TO_READ)
    if when is None and because in (FIRST, FRESH, NEW_MODEL):
        names = sources or sources_now(settings)
        store = snapshot_store(settings, simulated=loop.only_simulated(names))
        wanted = _wanted(store.latest(), store, settings)
        if not wanted:
            return Completed(message=f"another retraining came before: {wanted.why}")
    if because:
        log(f"asked for because of: {because}")
    # `.fn`: its tasks are this run's own, not those of a run within it
    loop.retrain.fn(settings, sources, move_alias=move_alias, as_of=when)
    return None


@_flow(name="train-router")
def train_router(
    kind: str,
    snapshot: str,
    simulated: bool,
    sources: list[str],
    asked: dict[str, Any],
    made_of: dict[str, str],
) -> None:
    """Train and measure one router, and leave it where who asked takes it (`flows.dispatch`).

    Parameters
    ----------
    snapshot : str
        Digest.
    sources : list of str
        Folders among them may hold benchmarks.
    asked : dict
        The settings that a router follows from, of whoever asks.
    made_of : dict
        Digests of all that its training key is made of.
    """
    settings = as_asked(worker_settings(), asked)
    plan = plan_again(snapshot, simulated=simulated, sources=sources, settings=settings)
    refuse_other_work(made_of, kind, plan, settings)
    # who asked for a run may have been killed, and ask again while it is still at work
    with alone(settings.home / "locks" / f"train-{kind}"):
        trained = loop.train(kind, plan, settings)
        loop.evaluate(trained, plan, settings)


@_flow(name="evaluate")
def evaluate(version: str = "champion", benchmarks: str | None = None) -> None:
    """Show how a version did as an artifact, or measure it on other benchmark tables.

    Parameters
    ----------
    version : str
        Number or alias.
    benchmarks : str
        Folder of benchmark tables; by default what was measured when it was trained.
    """
    settings = worker_settings()
    registry = connect(settings)
    info = registry.get(version)
    with step("evaluate") as line:
        if benchmarks is None:
            found = registry.evaluations(info)
        else:
            found = measure_version(info, benchmarks, registry, settings)
            line.note("not checked for prompts that training may have seen")
        line.result = f"{info.kind}, version {info.version}: {apgr(found)}"
    create_table_artifact(
        key="evaluation",
        table=figures_table([(info.kind, info.version, found)]),
        description=f"Version {info.version} ({info.kind})",
    )


@_flow(name="promote")
def promote(version: str = "challenger") -> None:
    """Let the gate judge a version by what there is to go by now, and move the alias if it may.

    Parameters
    ----------
    version : str
        Number or alias; the challenger may have seen more traffic since it was last judged.
    """
    registry = connect(worker_settings())
    with step("promote") as line:
        if version == "challenger" and "challenger" not in registry.aliases():
            line.result = "no version is in line"
            return
        decision = promote_version(registry.get(version), registry)
        line.result = f"{decision.outcome}: {decision.reason}"
        for notice in dict.fromkeys(registry.notices):
            line.note(notice)


def _tell(staged: Staged, manifest: Manifest, store: SnapshotStore, settings: Settings) -> str:
    """Send the events that follow from the newest snapshot; returns in words what they say."""
    about = (f"routellm.snapshot.{manifest.digest[:12]}", f"snapshot {manifest.digest[:12]}")
    numbers = {"snapshot": manifest.digest, "new_battles": staged.new, "battles": manifest.rows}
    if staged.new:
        send_event(INGESTED, *about, {**numbers, "simulated": manifest.simulated})
    if staged.passed_over:
        inbox = ("routellm.inbox", str(settings.inbox_dir))
        send_event(UNREADABLE, *inbox, {"passed_over": list(staged.passed_over)})
    wanted = _wanted(manifest, store, settings)
    if wanted:
        told = {"reason": wanted.reason, "why": wanted.why, "numbers": wanted.numbers | numbers}
        send_event(EVENT, *about, told)
    return f"{'a' if wanted else 'no'} retraining is wanted: {wanted.why}"


def _wanted(latest: Manifest | None, store: SnapshotStore, settings: Settings) -> Wanted:
    if latest is None:
        return Wanted(FIRST, "there is no snapshot yet", {})
    registry: Registry = connect(settings)
    alike = [one for one in registry.versions() if one.simulated == latest.simulated]
    done = trained_snapshots(alike, registry.history(), store.all())
    return retraining_wanted(latest, done, settings.workers.min_fresh_battles)
