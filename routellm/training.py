"""From a snapshot to training battles, and from those to a trained router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from routellm.augmentation.effect import augmented
from routellm.battles import prompt_split
from routellm.embeddings.base import Encoder, Progress
from routellm.errors import TrainingError
from routellm.evaluation.benchmarks import Benchmark, heldout_benchmark
from routellm.label_weights import (
    LabelWeights,
    choose_label_weights,
    fixed_label_weights,
    unweighted,
    weigh,
)
from routellm.routers import several_devices
from routellm.routers.base import FitReport, Pair, Router, TrainingBattles, make_router
from routellm.routers.platt import calibrated
from routellm.settings import Settings
from routellm.snapshots import Manifest, SnapshotStore

COLUMNS = ("prompt", "model_a", "model_b", "preference_a", "label_kind")
MIN_HELDOUT = 100  # fewer held-out battles than this measure nothing


@dataclass(frozen=True)
class Prepared:
    """Battles to train on, and those kept aside to measure on.

    Attributes
    ----------
    heldout : Benchmark or None
        None where fewer than `MIN_HELDOUT` battles of the pair (or its tiers) were kept aside.
    by_label_kind : dict
        Battles taken, by label kind, after augmentation.
    label_weights : LabelWeights
        How much each label kind counts in `battles`.
    left_out : int
        Battles taken out again because their prompts match evaluation prompts.
    """

    battles: TrainingBattles
    heldout: Benchmark | None
    by_label_kind: dict[str, int]
    label_weights: LabelWeights
    left_out: int = 0


def augment(table: pa.Table, label_kinds: Sequence[str]) -> pa.Table:
    """Return the battles of the chosen label kinds.

    The paper's augmentation adds golden- and judge-labelled battles to people's votes; which
    kinds are in is a setting, so that its effect can be measured.
    """
    return table.filter(pc.is_in(table["label_kind"], pa.array(list(label_kinds), pa.string())))


def prepare(
    store: SnapshotStore,
    manifest: Manifest,
    encoder: Encoder,
    settings: Settings,
    pair: Pair,
    progress: Progress | None = None,
) -> Prepared:
    """Read, augment, split and embed a snapshot's battles.

    Raises
    ------
    TrainingError
        If nothing is left to train on, or the pair is not among the models.
    """
    table = augment(store.read(manifest, COLUMNS), settings.training.augment)
    if not len(table):
        wanted = ", ".join(settings.training.augment)
        raise TrainingError(
            f"snapshot {manifest.digest[:12]} has no battles labelled {wanted}: it has "
            f"{manifest.by_label_kind}; set `training.augment`"
        )
    # the same battles in the same order, however the parts were cut
    prompt_column = table["prompt"].combine_chunks().dictionary_encode()
    prompts = prompt_column.dictionary.to_pylist()
    prompt = prompt_column.indices.to_numpy().astype(np.int64)
    model_a, model_b, models = _models(table)
    for name in (pair.strong, pair.weak):
        if name not in models:
            known = ", ".join(list(manifest.by_model)[:12])
            raise TrainingError(
                f"no battle with {name!r} in snapshot {manifest.digest[:12]}: set `strong` and "
                f"`weak` to two of its models ({known}, ...)"
            )
    share = settings.training
    split = np.array(
        [
            prompt_split(
                p, validation_share=share.validation_share, heldout_share=share.heldout_share
            )
            for p in prompts
        ]
    )
    preference = table["preference_a"].to_numpy().astype(np.float64)
    kinds = np.array(table["label_kind"].to_pylist())

    def select(battle_mask: np.ndarray, embeddings: np.ndarray) -> TrainingBattles:
        rows = np.flatnonzero(battle_mask)
        used, where = np.unique(prompt[rows], return_inverse=True)
        return TrainingBattles(
            prompts=tuple(prompts[i] for i in used),
            embeddings=embeddings[used] if len(embeddings) else np.empty((0, 0), np.float32),
            prompt=where.astype(np.int64),
            models=models,
            model_a=model_a[rows],
            model_b=model_b[rows],
            preference_a=preference[rows],
            weight=np.ones(len(rows)),
            label_kind=kinds[rows],
            validation=split[used][where] == "validation",
            pair=pair,
        )

    no_embeddings = np.empty((0, 0), np.float32)
    kept_aside = split[prompt] == "heldout"
    train_prompts = np.flatnonzero(split != "heldout")
    embeddings = np.zeros((len(prompts), encoder.dimensions), np.float32)
    embeddings[train_prompts] = encoder.encode(
        [prompts[i] for i in train_prompts], progress=progress
    )
    battles = select(~kept_aside, embeddings)
    counts = {str(k): int(n) for k, n in zip(*np.unique(kinds, return_counts=True), strict=True)}
    heldout = _heldout(select(kept_aside, no_embeddings), manifest)
    return _weighed(battles, heldout, counts, settings)


def without_prompts(prepared: Prepared, out: np.ndarray, settings: Settings) -> Prepared:
    """Return what is left without the battles on the prompts marked in `out` (u,).

    Label kinds are weighed again, by the battles that are left.

    Raises
    ------
    TrainingError
        If nothing is left to train on.
    """
    if not out.any():
        return prepared
    battles = prepared.battles
    gone = out[battles.prompt]
    if gone.all():
        raise TrainingError(
            "every training prompt matches an evaluation prompt: set `evaluation.contamination` to "
            "drop_evaluation, or name another benchmark"
        )
    left = unweighted(battles.where(~gone))
    counts = {
        kind: n - int((battles.label_kind[gone] == kind).sum())
        for kind, n in prepared.by_label_kind.items()
    }
    weighed = _weighed(left, prepared.heldout, counts, settings)
    return replace(weighed, left_out=int(gone.sum()))


def with_augmentation(prepared: Prepared, augmentation: str, settings: Settings) -> Prepared:
    """Return what would be trained on had the pair been labelled so (`AUGMENTATIONS`).

    Label kinds are weighed again, by the battles that are left; held-out battles stay.

    Raises
    ------
    TrainingError
        If too little is left of the pair to train on.
    """
    battles = augmented(unweighted(prepared.battles), augmentation)
    kinds, n = np.unique(battles.label_kind, return_counts=True)
    counts = {str(k): int(c) for k, c in zip(kinds, n, strict=True)}
    weighed = _weighed(battles, prepared.heldout, counts, settings)
    return replace(weighed, left_out=prepared.left_out)


def _weighed(
    battles: TrainingBattles, heldout: Benchmark | None, counts: dict[str, int], settings: Settings
) -> Prepared:
    given = settings.training.label_weights
    weights = (
        choose_label_weights(battles) if given is None else fixed_label_weights(battles, given)
    )
    return Prepared(weigh(battles, weights.weights), heldout, counts, weights)


def _models(
    table: pa.Table,
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    names = [table[c].to_pylist() for c in ("model_a", "model_b")]
    models = tuple(sorted(set(names[0]) | set(names[1])))
    row = {name: i for i, name in enumerate(models)}
    a, b = (np.array([row[n] for n in side], dtype=np.int64) for side in names)
    return a, b, models


def _heldout(battles: TrainingBattles, manifest: Manifest) -> Benchmark | None:
    if not len(battles):
        return None
    try:
        rows, preference = battles.of_pair()
    except TrainingError:
        return None
    if len(rows) < MIN_HELDOUT:
        return None
    return heldout_benchmark(
        [battles.prompts[i] for i in battles.prompt[rows]],
        preference,
        battles.pair,
        simulated=manifest.simulated,
    )


def train(
    kind: str,
    battles: TrainingBattles,
    encoder: Encoder,
    *,
    seed: int,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
) -> tuple[Router, FitReport]:
    """Train and calibrate one router; the same battles, options and seed give the same router.

    `checkpoint` is a folder that is this training's own (see `Router.fit`).
    """
    router = make_router(kind, encoder, battles.pair, options)
    report = several_devices.fit(
        router, battles, rng=np.random.default_rng(seed), progress=progress, checkpoint=checkpoint
    )

    def again(others: TrainingBattles) -> Router:
        one = make_router(kind, encoder, others.pair, options)
        one.fit(others, rng=np.random.default_rng(seed))
        return one

    router.platt, found = calibrated(router, battles, again, rng=np.random.default_rng(seed))
    params = {"platt_slope": router.platt.slope, "platt_intercept": router.platt.intercept}
    return router, replace(
        report,
        params=report.params | params | {"platt": found.kept_out or "fitted"},
        metrics=report.metrics | found.metrics(),
    )
