"""The loop: ingest -> validate -> augment -> train -> evaluate -> register -> promote.

Each task is one call into the library or the registry. What was done before is known by content
(a source's fingerprint, a snapshot's digest, a router's training key), not by Prefect's cache: a
version that someone deleted is trained again, and a cache never hands back what is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

import expectations
from flows.steps import step
from flows.work import (
    Measured,
    Plan,
    embedded,
    find_done,
    log_curves,
    measured_version,
    named_benchmarks,
    plan_of,
    promote_best,
    train_and_register,
)
from registry import Decision, Registry, VersionInfo, connect
from registry.log import retraining_run
from routellm.embeddings import get_encoder
from routellm.errors import UsageError
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
    simulated: bool = False
    warnings: tuple[str, ...] = field(default_factory=tuple)


@task(cache_policy=NO_CACHE, persist_result=False)
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


@task(cache_policy=NO_CACHE, persist_result=False)
def validate(
    staged: Staged, store: SnapshotStore, settings: Settings
) -> tuple[Manifest, Path | None, tuple[str, ...]]:
    with step("validate") as line:
        try:
            if not staged.new:
                if staged.previous is None:
                    raise UsageError("the sources hold no battles: give another --source")
                line.result = f"snapshot {staged.previous.digest[:12]} passed before"
                return staged.previous, None, ()
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
            return manifest, found.data_docs, warnings
        finally:
            staged.discard()


@task(cache_policy=NO_CACHE, persist_result=False)
def augment(plan: Plan, settings: Settings) -> None:
    with step("augment") as line:
        prepared = embedded(plan, settings, line.advance)
        kinds = ", ".join(f"{n:,} {k}" for k, n in prepared.by_label_kind.items())
        line.result = f"{kinds}; {len(prepared.battles.prompts):,} distinct prompts embedded"


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="train-{kind}")
def train(kind: str, plan: Plan, registry: Registry, settings: Settings, parent: str) -> Measured:
    with step(kind) as line:
        measured = train_and_register(kind, plan, registry, settings, parent, line.advance)
        figures = ", ".join(
            f"{name} {e.exact.apgr.value:.3f}" for name, e in measured.evaluations.items()
        )
        line.result = f"v{measured.version.version}, APGR {figures}"
    return measured


@task(cache_policy=NO_CACHE, persist_result=False)
def promote(measured: Sequence[Measured], plan: Plan, registry: Registry) -> Decision:
    with step("promote") as line:
        decision = promote_best(measured, plan, registry)
        line.result = f"{decision.outcome}: {decision.reason}"
    return decision


@flow(name="retrain", persist_result=False, validate_parameters=False)
def retrain(
    settings: Settings,
    sources: Sequence[str] | None = None,
    move_alias: bool = True,
) -> Retraining:
    """Run the loop once.

    Parameters
    ----------
    sources : where battles come from; by default `settings.sources`.
    move_alias : whether the best router may become champion.
    """
    names = list(sources or settings.sources)
    simulated = [name.startswith("simulated://") for name in names]
    if any(simulated) and not all(simulated):
        raise UsageError("simulated and real sources cannot share a snapshot: run them apart")
    if settings.evaluation.benchmarks:  # refused before anything is ingested
        named_benchmarks(settings.evaluation.benchmarks)
    registry = connect(settings)
    store = SnapshotStore(settings.snapshots_dir(simulated=all(simulated)))
    staged = ingest(names, store, settings)
    manifest, docs, warnings = validate(staged, store, settings)
    encoder = get_encoder(settings.embedding, settings.embeddings_path)
    plan = plan_of(manifest, store, encoder, names, settings)
    done = find_done(plan, registry, settings)
    missing = [kind for kind in settings.training.routers if kind not in done]
    measured = [measured_version(done[k], registry) for k in settings.training.routers if k in done]
    if done:
        with step("reuse") as line:
            line.result = "trained before on the same content: " + ", ".join(
                f"{kind} (version {v.version})" for kind, v in done.items()
            )
    if missing:
        augment(plan, settings)
        with retraining_run(registry, manifest, f"retrain {manifest.digest[:12]}") as parent:
            measured += [train(kind, plan, registry, settings, parent) for kind in missing]
            log_curves(measured, registry)
    decision = promote(measured, plan, registry) if move_alias else None
    champion = registry.champion()
    result = Retraining(
        manifest=manifest,
        new_battles=staged.new,
        primary=plan.primary,
        trained=tuple(missing),
        reused=tuple(done),
        measured=tuple(sorted(measured, key=lambda m: settings.training.routers.index(m.kind))),
        champion=champion,
        champion_why=str(registry.state().get("why", "")),
        decision=decision,
        data_docs=docs,
        simulated=manifest.simulated,
        warnings=warnings,
    )
    create_table_artifact(
        key="retraining",
        table=[
            {
                "router": m.kind,
                "version": m.version.version,
                "benchmark": f"{name} (SIMULATED)" if e.simulated else name,
                "APGR": str(e.exact.apgr),
                "CPT(50)": f"{e.exact.cpt50.value:.3f}",
                "CPT(80)": f"{e.exact.cpt80.value:.3f}",
            }
            for m in result.measured
            for name, e in m.evaluations.items()
        ],
        description=f"Routers on snapshot {manifest.digest[:12]}",
    )
    return result
