"""The loop: ingest -> validate -> augment -> train -> evaluate -> register -> promote.

Each task is one call into the library or the registry. What was done before is known by content
(a source's fingerprint, a snapshot's digest, a router's training key), not by Prefect's cache: a
version that someone deleted is trained again, and a cache never hands back what is gone. Between
training and registering, a router is a folder named by its training key: a run that is killed
goes on where it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_link_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

import expectations
from flows.promotion import promote_best
from flows.steps import step
from flows.trials import Trial, find_trial, run_trial, trials_to_run, variants
from flows.work import (
    Measured,
    Plan,
    Trained,
    embedded,
    evaluate_router,
    evaluation_sets,
    find_done,
    kinds_to_train,
    log_plots,
    measured_version,
    named_benchmarks,
    plan_of,
    register_router,
    train_router,
)
from registry import Decision, Registry, VersionInfo, connect
from registry.log import retraining_run
from routellm.embeddings import get_encoder
from routellm.errors import RegistryError, SourceUnreachable, UsageError
from routellm.evaluation.evaluate import Evaluation
from routellm.ingest import Staged, stage
from routellm.settings import Settings
from routellm.snapshots import Manifest, SnapshotStore


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
    except (SourceUnreachable, RegistryError):
        return True
    except Exception:
        return False
    return False


def _apgr(found: Mapping[str, Evaluation]) -> str:
    figures = (f"{name} {one.exact.apgr.value:.3f}" for name, one in found.items())
    return "APGR " + ", ".join(figures)


def _task(**options: Any) -> Any:
    # results hold battles and weights, which belong in our own folders, not in Prefect's storage
    return task(cache_policy=NO_CACHE, persist_result=False, **options)


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
    return staged


@_task()
def validate(
    staged: Staged, store: SnapshotStore, settings: Settings
) -> tuple[Manifest, Path | None, tuple[str, ...]]:
    with step("validate") as line:
        try:
            if not staged.new:
                if staged.previous is None:
                    raise UsageError("the sources hold no battles: give another --source")
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
                line.notes.append(f"{n:,} quarantined by {rule}: {found.quarantine_path}")
            warnings = tuple(
                f"{r.name} is {r.observed}, expected {r.expected}"
                for r in found.rules
                if not r.passed and r.kind == "set"
            )
            line.notes.extend(warnings)
            if found.data_docs:
                create_link_artifact(
                    found.data_docs.resolve().as_uri(), key="data-docs", link_text="Data Docs"
                )
            return manifest, found.data_docs, warnings
        finally:
            staged.discard()


@_task()
def augment(plan: Plan, settings: Settings) -> None:
    with step("augment") as line:
        prepared = embedded(plan, settings, line.advance)
        weights = prepared.label_weights.weights
        kinds = ", ".join(
            f"{n:,} {k} (weight {weights.get(k, 1.0):g})" for k, n in prepared.by_label_kind.items()
        )
        line.result = f"{kinds}; {len(prepared.battles.prompts):,} distinct prompts embedded"
        if plan.contamination and plan.contamination.summary:
            line.notes.append(plan.contamination.summary)


@_task(task_run_name="train-{kind}")
def train(kind: str, plan: Plan, settings: Settings) -> Trained:
    with step(f"train {kind}") as line:
        trained = train_router(kind, plan, settings, line.advance)
        line.result = f"key {trained.key[:12]}"
    return trained


@_task(task_run_name="evaluate-{trained.kind}")
def evaluate(trained: Trained, plan: Plan, settings: Settings) -> dict[str, Evaluation]:
    with step("evaluate") as line:
        found = evaluate_router(trained, plan, settings)
        line.result = _apgr(found)
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
        line.notes.extend(dict.fromkeys(registry.notices))
    return decision


@_task(task_run_name="trial-{trial.label}")
def run_one_trial(
    trial: Trial, plan: Plan | str, registry: Registry, settings: Settings, parent: str
) -> Trial:
    with step(f"trial of {trial.label}") as line:
        done = run_trial(trial, plan, registry, settings, parent, line.advance)
        line.result = done.failed or _apgr(done.evaluations)
    return done


def _compare(
    wanted: Sequence[Trial],
    plan: Plan,
    registry: Registry,
    settings: Settings,
    docs: Path | None,
) -> tuple[Trial, ...]:
    """Run the trials that were not run before on the same content."""
    known = {trial: find_trial(trial, plan, registry, settings) for trial in wanted}
    missing = [trial for trial, before in known.items() if before is None]
    fresh: dict[Trial, Trial] = {}
    if missing:
        if plan.prepared is None:
            augment(plan, settings)
        plans = variants(plan, settings, missing)
        with retraining_run(
            registry, plan.manifest, docs, plan.label_weights, plan.contamination, what="compare"
        ) as parent:
            for trial in missing:
                fresh[trial] = run_one_trial(
                    trial, plans[trial.augmentation], registry, settings, parent
                )
    return tuple(known[trial] or fresh[trial] for trial in wanted)


@flow(name="retrain", persist_result=False, validate_parameters=False)
def retrain(
    settings: Settings,
    sources: Sequence[str] | None = None,
    move_alias: bool = True,
    seeds: int = 1,
    compare_augmentation: bool = False,
) -> Retraining:
    """Run the loop once.

    Parameters
    ----------
    sources : where battles come from; by default `settings.sources`.
    move_alias : whether the best router may become champion.
    seeds : with how many seeds each router is trained; the first one's is registered.
    compare_augmentation : whether each router is also trained without the pair's golden labels,
        without a judge's, and without both.
    """
    names = list(sources or settings.sources)
    simulated = [name.startswith("simulated://") for name in names]
    if any(simulated) and not all(simulated):
        raise UsageError("simulated and real sources cannot share a snapshot: run them apart")
    if settings.evaluation.benchmarks:  # refused before anything is ingested
        named_benchmarks(settings.evaluation.benchmarks, settings.home)
    registry = connect(settings)
    store = SnapshotStore(settings.snapshots_dir(simulated=all(simulated)))
    staged = ingest(names, store, settings)
    manifest, docs, warnings = validate(staged, store, settings)
    encoder = get_encoder(settings.embedding, settings.embeddings_path)
    plan = plan_of(manifest, store, encoder, names, settings)
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
            line.notes.extend(f"{kind}: {why}" for kind, why in skipped.items())
    missing = [kind for kind in kinds if kind not in done]
    if missing:
        augment(plan, settings)
        with retraining_run(
            registry,
            manifest,
            docs,
            plan.label_weights,
            plan.contamination,
            evaluation_sets=evaluation_sets(plan),
        ) as parent:
            for kind in missing:
                trained = train(kind, plan, settings)
                evaluate(trained, plan, settings)
                measured.append(register(trained, plan, registry, parent))
            log_plots(measured, registry)
    decision = promote(measured, plan, registry) if move_alias else None
    wanted = trials_to_run(kinds, settings, seeds=seeds, augmentations=compare_augmentation)
    trials = _compare(wanted, plan, registry, settings, docs)
    champion = registry.champion()
    result = Retraining(
        manifest=manifest,
        new_battles=staged.new,
        primary=plan.primary,
        trained=tuple(missing),
        reused=tuple(done),
        measured=tuple(sorted(measured, key=lambda m: kinds.index(m.kind))),
        champion=champion,
        champion_why=str(registry.state().get("why", "")),
        decision=decision,
        data_docs=docs,
        trials=trials,
        simulated=manifest.simulated,
        warnings=warnings,
    )
    create_table_artifact(
        key="retraining",
        table=[
            {
                "router": label,
                "version": version,
                "benchmark": f"{name} (SIMULATED)" if e.simulated else name,
                "APGR": str(e.exact.apgr),
                "CPT(50)": f"{e.exact.cpt50.value:.3f}",
                "CPT(80)": f"{e.exact.cpt80.value:.3f}",
            }
            for label, version, evaluations in (
                *((m.kind, m.version.version, m.evaluations) for m in result.measured),
                *((t.label, "", t.evaluations) for t in result.trials),
            )
            for name, e in evaluations.items()
        ],
        description=f"Routers on snapshot {manifest.digest[:12]}",
    )
    return result
