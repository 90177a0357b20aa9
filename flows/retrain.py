"""The loop: ingest -> validate -> augment -> train -> evaluate -> register -> promote.

Each task is one call into the library or the registry. What was done before is known by content
(a source's fingerprint, a snapshot's digest, a router's training key), not by Prefect's cache: a
version that someone deleted is trained again, and a cache never hands back what is gone. Between
training and registering, a router is a folder named by its training key: a run that is killed
goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_link_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

import expectations
from flows.as_of import look_back
from flows.compare import compare
from flows.device import device
from flows.dispatch import train_on_pools
from flows.promotion import promote_best
from flows.report import apgr, end_with, figures_table, label
from flows.runner import Workers
from flows.side_by_side import SideBySide
from flows.steps import log, step
from flows.trained import (
    Measured,
    Trained,
    evaluate_router,
    log_plots,
    measured_version,
    register_router,
    train_router,
)
from flows.trials import Trial, find_trial, trials_to_run
from flows.work import (
    Plan,
    embedded,
    evaluation_sets,
    find_done,
    kinds_to_train,
    named_benchmarks,
    plan_of,
    training_key,
)
from registry import Decision, Registry, VersionInfo, connect
from registry.at_work import end_left
from registry.log import retraining_run
from registry.retraining_report import RetrainingReport
from routellm.as_of import store_with_history
from routellm.embeddings import get_encoder
from routellm.errors import (
    RegistryError,
    SnapshotError,
    SourceUnreachable,
    StorageUnreachable,
    TrainingError,
    UsageError,
)
from routellm.evaluation.evaluate import Evaluation
from routellm.ingest import Staged, stage
from routellm.settings import Settings
from routellm.snapshots import Manifest, SnapshotStore, snapshot_store
from routellm.sources.inbox import sources_now

PUBLISHINGS = 3  # of others, between reading the sources and publishing, before giving up


@dataclass(frozen=True)
class Retraining:
    """What one retraining did.

    Attributes
    ----------
    new_battles : int
    trained, reused : tuple of str
        Router kinds trained now, and found trained before on the same content.
    measured : tuple of Measured
        One per router kind.
    decision : Decision or None
        The gate's verdict; None if promotion was not asked for.
    trials : tuple of Trial
        Routers trained to be compared only: other seeds, less augmentation.
    """

    manifest: Manifest
    new_battles: int
    primary: str
    trained: tuple[str, ...]
    reused: tuple[str, ...]
    measured: tuple[Measured, ...]
    champion: VersionInfo | None
    champion_why: str
    decision: Decision | None
    data_docs: Path | None
    trials: tuple[Trial, ...] = ()
    simulated: bool = False
    warnings: tuple[str, ...] = field(default_factory=tuple)


def _may_pass(task: Any, run: Any, state: Any) -> bool:
    """Say whether what a task died of can be gone at another time."""
    try:
        state.result()
    except (SourceUnreachable, StorageUnreachable, RegistryError):
        return True
    except Exception:
        return False
    return False


def _task(**options: Any) -> Any:
    # results hold battles and weights, which belong in our own folders, not in Prefect's storage
    return task(cache_policy=NO_CACHE, persist_result=False, **options)


def only_simulated(sources: Sequence[str]) -> bool:
    """Say whether sources are simulated.

    Raises
    ------
    UsageError
        If only some of them are.
    """
    simulated = [name.startswith("simulated://") for name in sources]
    if any(simulated) and not all(simulated):
        raise UsageError("simulated and real sources cannot share a snapshot: run them apart")
    return all(simulated)


@_task(retries=2, retry_delay_seconds=[5, 30], retry_condition_fn=_may_pass)
def ingest(sources: Sequence[str], store: SnapshotStore, settings: Settings) -> Staged:
    with step("ingest") as line:
        staged = stage(sources, store, settings)
        if staged.new:
            line.result = f"{staged.new:,} new battles of {staged.read:,} read"
            if staged.duplicates:
                line.result += f" ({staged.duplicates:,} duplicates)"
        else:
            line.result = "nothing new: the sources have not changed"
        for why in staged.passed_over:
            line.note(f"passed over: {why}")
        if staged.passed_over:
            create_table_artifact(
                [{"passed over": why} for why in staged.passed_over],
                key="passed-over",
                description="Files of the inbox that cannot be read; the others were",
            )
    return staged


@_task()
def validate(
    staged: Staged, store: SnapshotStore, settings: Settings
) -> tuple[Manifest, Path | None, tuple[str, ...]]:
    with step("validate") as line:
        try:
            if not staged.new:
                if staged.previous is None:
                    raise staged.held_nothing
                line.result = f"snapshot {staged.previous.digest[:12]} passed before"
                return staged.previous, expectations.data_docs(settings), ()
            found = expectations.validate(staged, store, settings)
            found.raise_if_failed()
            manifest = store.commit(
                parts=found.checked_parts,
                cursors=staged.cursors,
                previous=staged.previous,
                quarantined_by_rule=found.quarantined_by_rule,
                validation=found.summary(),
                simulated=staged.simulated,
            )
            line.result = f"snapshot {manifest.digest[:12]}, {manifest.rows:,} battles"
            for rule, n in found.quarantined_by_rule.items():
                line.note(f"{n:,} quarantined by {rule}: {found.quarantine_path}")
            warnings = tuple(
                f"{r.name} is {r.observed}, expected {r.expected}"
                for r in found.rules
                if not r.passed and r.kind == "set"
            )
            for warning in warnings:
                line.note(warning)
            if found.data_docs:
                create_link_artifact(
                    found.data_docs.resolve().as_uri(), key="data-docs", link_text="Data Docs"
                )
            return manifest, found.data_docs, warnings
        finally:
            staged.discard()


@_task()
def augment(plan: Plan, settings: Settings, beside: SideBySide) -> None:
    with step("augment") as line:
        prepared = embedded(plan, settings, line.advance, encoder=beside.encoder)
        weights = prepared.label_weights.weights
        kinds = ", ".join(
            f"{n:,} {k} (weight {weights.get(k, 1.0):g})" for k, n in prepared.by_label_kind.items()
        )
        line.result = f"{kinds}; {len(prepared.battles.prompts):,} distinct prompts embedded"
        for note in (beside.embedded, plan.contamination and plan.contamination.summary):
            if note:
                line.note(note)


def take_in(
    sources: Sequence[str], store: SnapshotStore, settings: Settings
) -> tuple[Staged, Manifest, Path | None, tuple[str, ...]]:
    """Ingest and validate; anew where another ingest published in the meantime."""
    for left in reversed(range(PUBLISHINGS)):
        staged = ingest(sources, store, settings)
        try:
            return staged, *validate(staged, store, settings)
        except SnapshotError:
            now = store.latest()
            if not left or (now and now.digest) == (staged.previous and staged.previous.digest):
                raise
    raise AssertionError("returned or raised above")


@_task(task_run_name="train-{kind}")
def train(kind: str, plan: Plan, settings: Settings) -> Trained:
    made = Trained.of(kind, training_key(kind, plan, settings), settings).bundle.exists()
    # what was made before, or side by side, waits for no device
    with step(f"train {kind}") as line, nullcontext() if made else device(kind, plan, settings):
        trained = train_router(kind, plan, settings, line.advance)
        line.result = f"key {trained.key[:12]}"
    return trained


@_task()
def train_elsewhere(
    kinds: Sequence[str], plan: Plan, sources: Sequence[str], settings: Settings
) -> tuple[list[Trained], dict[str, str]]:
    with step("train") as line:
        return train_on_pools(kinds, plan, sources, settings, line)


@_task(task_run_name="evaluate-{trained.kind}")
def evaluate(trained: Trained, plan: Plan, settings: Settings) -> dict[str, Evaluation]:
    with step("evaluate") as line:
        found = evaluate_router(trained, plan, settings)
        line.result = apgr(found)
    return found


@_task(
    task_run_name="register-{trained.kind}",
    retries=2,
    retry_delay_seconds=[2, 10],
    retry_condition_fn=_may_pass,
)
def register(trained: Trained, plan: Plan, registry: Registry, parent: str) -> Measured:
    with step("register") as line:
        measured = register_router(trained, plan, registry, parent)
        line.result = f"version {measured.version.version} ({trained.kind})"
    return measured


@_task()
def promote(measured: Sequence[Measured], plan: Plan, registry: Registry) -> Decision:
    with step("promote") as line:
        decision = promote_best(measured, plan.primary, registry)
        line.result = f"{decision.outcome}: {decision.reason}"
        for notice in dict.fromkeys(registry.notices):
            line.note(notice)
    return decision


@flow(name="retrain", persist_result=False, validate_parameters=False)
def retrain(
    settings: Settings,
    sources: Sequence[str] | None = None,
    move_alias: bool = True,
    seeds: int = 1,
    compare_augmentation: bool = False,
    as_of: datetime | None = None,
) -> Retraining:
    """Run the loop once.

    Parameters
    ----------
    sources : where battles come from; by default `settings.sources`.
    move_alias : whether the best router may become champion.
    seeds : with how many seeds each router is trained; the first one's is registered.
    compare_augmentation : whether each router is also trained without the pair's golden labels,
        without a judge's, and without both.
    as_of : train on the battles that were known then (`routellm.as_of`); no source is read, and
        the champion stays.
    """
    with Workers(settings) as workers:
        return _retrain(settings, sources, move_alias, seeds, compare_augmentation, as_of, workers)


def _retrain(
    settings: Settings,
    sources: Sequence[str] | None,
    move_alias: bool,
    seeds: int,
    compare_augmentation: bool,
    as_of: datetime | None,
    workers: Workers,
) -> Retraining:
    names = list(sources or sources_now(settings))
    if not names and as_of is None:
        raise UsageError(
            f"there is nothing to train on: set `sources`, give --source, or drop files of battles "
            f"into {settings.inbox_dir}"
        )
    simulated = only_simulated(names)
    if settings.evaluation.benchmarks:  # refused before anything is ingested
        named_benchmarks(settings.evaluation.benchmarks, settings.home)
    registry = connect(settings)
    for ended in end_left(registry):
        log(f"run {ended} in MLflow was left by a process that was killed: ended as such")
    if as_of is None:
        store = snapshot_store(settings, simulated=simulated)
        staged, manifest, docs, warnings = take_in(names, store, settings)
    else:
        store, move_alias = store_with_history(settings, sources), False
        staged, manifest, docs, warnings = look_back(as_of, store, settings)
    encoder = get_encoder(settings.embedding, settings.embeddings_path, settings.storage)
    plan = plan_of(manifest, store, encoder, names, settings)
    beside = SideBySide(workers, plan, names, settings)
    kinds, skipped = kinds_to_train(plan, settings)
    done = find_done(kinds, plan, registry, settings)
    measured = [measured_version(version, registry) for version in done.values()]
    if done or skipped:
        with step("reuse" if done else "skip") as line:
            line.result = (
                "trained before on the same content: "
                + ", ".join(f"{kind} (version {v.version})" for kind, v in done.items())
                if done
                else "not to be trained on this machine: " + ", ".join(skipped)
            )
            for kind, why in skipped.items():
                line.note(f"{kind}: {why}")
    missing = [kind for kind in kinds if kind not in done]
    failed: dict[str, str] = {}
    run_id = None
    # a task's inputs would travel with what it has done side by side: battles, and open files
    embed = augment if workers.alone else augment.fn
    if missing:
        embed(plan, settings, beside)
        with retraining_run(
            registry,
            manifest,
            docs,
            plan.label_weights,
            plan.contamination,
            evaluation_sets=evaluation_sets(plan),
        ) as parent:
            run_id = parent
            if settings.workers.train == "deployments":
                elsewhere, failed = train_elsewhere(missing, plan, names, settings)
                trained = iter(elsewhere)
            else:
                ahead = [Trial(kind, "both", settings.training.seed) for kind in missing]
                failed = {one.kind: f"{e}." for one, e in beside.make(ahead).items()}
                left = [kind for kind in missing if kind not in failed]
                trained = (train(kind, plan, settings) for kind in left)
            for one in trained:
                evaluate(one, plan, settings)
                measured.append(register(one, plan, registry, parent))
            if measured:
                log_plots(measured, registry)
    standing = label(registry.champion())
    # one kind that fails every night shall not hold back the others'
    decision = promote(measured, plan, registry) if move_alias and measured else None
    champion = registry.champion()
    why = str(registry.state().get("why", ""))
    report = RetrainingReport(
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        manifest=manifest,
        read=staged.read,
        new_battles=staged.new,
        duplicates=staged.duplicates,
        unchanged=staged.unchanged,
        routers={label(m.version): m.evaluations for m in measured},
        primary=plan.primary,
        trained=tuple(kind for kind in missing if kind not in failed),
        reused=tuple(done),
        left_out={**skipped, **failed},
        decision=decision,
        standing=standing,
        champion=label(champion),
        champion_why=why,
        label_weights=plan.label_weights,
        notes=(
            *(f"Passed over: {why}" for why in staged.passed_over),
            *warnings,
            *([plan.contamination.summary] if plan.contamination else []),
        ),
    )
    end_with(report, registry, run_id)
    if failed:
        raise TrainingError(
            "not trained: "
            + " ".join(f"{kind}: {why}" for kind, why in failed.items())
            + f" The other {len(measured)} are registered, and another retraining trains only "
            "what is missing."
        )
    wanted = trials_to_run(kinds, settings, seeds=seeds, augmentations=compare_augmentation)
    known = {trial: find_trial(trial, plan, registry, settings) for trial in wanted}
    if None in known.values() and plan.prepared is None:
        embed(plan, settings, beside)
    trials = compare(known, plan, registry, settings, docs, beside)
    result = Retraining(
        manifest=manifest,
        new_battles=staged.new,
        primary=plan.primary,
        trained=tuple(missing),
        reused=tuple(done),
        measured=tuple(sorted(measured, key=lambda m: kinds.index(m.kind))),
        champion=champion,
        champion_why=why,
        decision=decision,
        data_docs=docs,
        trials=trials,
        simulated=manifest.simulated,
        warnings=warnings,
    )
    create_table_artifact(
        key="retraining",
        table=figures_table(
            [
                *((m.kind, m.version.version, m.evaluations) for m in result.measured),
                *((t.label, "", t.evaluations) for t in result.trials),
            ]
        ),
        description=f"Routers on snapshot {manifest.digest[:12]}",
    )
    return result
