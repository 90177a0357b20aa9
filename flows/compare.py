"""Trials within a run: those that were not run before, some of them side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from flows.report import apgr
from flows.side_by_side import SideBySide
from flows.steps import step
from flows.trials import Trial, run_trial, variants
from flows.work import Plan
from registry import Registry
from registry.log import retraining_run
from routellm.errors import TrainingError
from routellm.settings import Settings


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="trial-{trial.label}")
def run_one_trial(
    trial: Trial, plan: Plan | str, registry: Registry, settings: Settings, parent: str
) -> Trial:
    with step(f"trial of {trial.label}") as line:
        done = run_trial(trial, plan, registry, settings, parent, line.advance)
        line.result = done.failed or apgr(done.evaluations)
    return done


def compare(
    known: Mapping[Trial, Trial | None],
    plan: Plan,
    registry: Registry,
    settings: Settings,
    docs: Path | None,
    beside: SideBySide,
) -> tuple[Trial, ...]:
    """Run the trials that are not known from a run before; returns all, as they came out."""
    missing = [trial for trial, before in known.items() if before is None]
    fresh: dict[Trial, Trial] = {}
    if missing:
        plans = variants(plan, settings, missing)
        with retraining_run(
            registry, plan.manifest, docs, plan.label_weights, plan.contamination, what="compare"
        ) as parent:
            can = [trial for trial in missing if not isinstance(plans[trial.augmentation], str)]
            failed = beside.make(can, with_speed=False)
            for trial in missing:
                error = failed.get(trial)
                if error and not isinstance(error, TrainingError):
                    raise error
                fresh[trial] = (
                    replace(trial, failed=str(error))
                    if error
                    else run_one_trial(trial, plans[trial.augmentation], registry, settings, parent)
                )
    return tuple(before or fresh[trial] for trial, before in known.items())
