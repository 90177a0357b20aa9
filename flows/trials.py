"""Trials: routers trained to be compared and not to be served.

What augmentation brings (each router without golden labels, without a judge's, without both), and
what chance does (each router with other seeds). A trial is trained and measured like any router,
on the same prompts, and logged as a run; no version is registered. One that was run before on the
same content is read from its run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from flows.trained import Trained, evaluate_router, fit_report, train_router
from flows.work import Plan, embedded, training_key
from registry import Registry
from registry.log import log_trial
from routellm.augmentation.effect import AUGMENTATIONS
from routellm.embeddings import Progress
from routellm.errors import TrainingError
from routellm.evaluation.evaluate import Evaluation
from routellm.settings import Settings
from routellm.training import with_augmentation


@dataclass(frozen=True, eq=False)
class Trial:
    """A router to train for comparison, and how it did.

    Attributes
    ----------
    augmentation : str
        A key of `AUGMENTATIONS`; the routers that are registered are trained on ``both``.
    evaluations : dict
        By benchmark; empty before it is run, or if it cannot be trained.
    failed : str
        Why it cannot be trained, or "".
    """

    kind: str
    augmentation: str
    seed: int
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    failed: str = ""

    @property
    def label(self) -> str:
        what = "" if self.augmentation == "both" else f", labels {self.augmentation}"
        return f"{self.kind}{what}, seed {self.seed}"


def trials_to_run(
    kinds: Sequence[str], settings: Settings, *, seeds: int, augmentations: bool
) -> list[Trial]:
    """Return the trials that are asked for beside the routers that are registered."""
    first = settings.training.seed
    wanted = [
        Trial(kind, "both", seed) for seed in range(first + 1, first + seeds) for kind in kinds
    ]
    if augmentations:  # random learns nothing from labels
        wanted += [
            Trial(kind, one, first)
            for one in AUGMENTATIONS
            if one != "both"
            for kind in kinds
            if kind != "random"
        ]
    return wanted


def variants(plan: Plan, settings: Settings, wanted: Sequence[Trial]) -> dict[str, Plan | str]:
    """Return the plan of each augmentation that trials ask for, or why there is none."""
    out: dict[str, Plan | str] = {"both": plan}
    prepared = embedded(plan, settings)
    for name in dict.fromkeys(trial.augmentation for trial in wanted):
        if name in out:
            continue
        try:
            battles = with_augmentation(prepared, name, settings)
            out[name] = replace(plan, augmentation=name, prepared=battles)
        except TrainingError as error:
            out[name] = str(error)
    return out


def find_trial(trial: Trial, plan: Plan, registry: Registry, settings: Settings) -> Trial | None:
    """Return the trial as it was run before on the same content, or None."""
    mine = replace(plan, augmentation=trial.augmentation)
    key = training_key(trial.kind, mine, seeded(settings, trial.seed))
    found = registry.trial_evaluations(key)
    if found is None:
        return None
    Trained.of(trial.kind, key, settings).clear(settings)  # a kill left it
    return replace(trial, evaluations=found)


def run_trial(
    trial: Trial,
    plan: Plan | str,
    registry: Registry,
    settings: Settings,
    parent: str,
    progress: Progress | None = None,
) -> Trial:
    """Train, measure and log one trial; `plan` is its augmentation's, or why there is none."""
    if isinstance(plan, str):
        return replace(trial, failed=plan)
    mine = seeded(settings, trial.seed)
    try:
        trained = train_router(trial.kind, plan, mine, progress)
    except TrainingError as error:
        Trained.of(trial.kind, training_key(trial.kind, plan, mine), settings).clear(settings)
        return replace(trial, failed=str(error))
    evaluations = evaluate_router(trained, plan, mine, with_speed=False)
    log_trial(
        registry,
        kind=trial.kind,
        augmentation=trial.augmentation,
        seed=trial.seed,
        training_key=trained.key,
        report=fit_report(trained),
        evaluations=evaluations,
        primary=plan.primary,
        simulated=plan.manifest.simulated,
        parent_run_id=parent,
    )
    trained.clear(settings)
    return replace(trial, evaluations=evaluations)


def seeded(settings: Settings, seed: int) -> Settings:
    """Return the settings with another seed."""
    training = settings.training.model_copy(update={"seed": seed})
    return settings.model_copy(update={"training": training})
