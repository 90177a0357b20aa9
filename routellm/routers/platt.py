"""Calibrate a trained router on the validation battles of its pair.

The map is fitted on scores of battles that the router has not learnt from. It is kept if it
foretells battles that it was not fitted on better than no map does; what it brings is measured in
the same way, on folds of prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from routellm.calibration import IDENTITY, Platt, expected_calibration_error
from routellm.errors import TrainingError
from routellm.routers.base import Router, TrainingBattles, cross_entropy

MIN_BATTLES = 30
MAX_BATTLES = 2_000  # are enough for two parameters, and each costs a query
MAX_PROMPTS = 100_000  # that a second router learns from: more are a copy of what is in memory
FOLDS = 5

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PlattReport:
    """What calibration did.

    Attributes
    ----------
    n : int
        Validation battles of the pair, of the most trusted label kind.
    ece_before, ece_after : float
        Expected calibration error of the scores, and of the map fitted on other folds; equal if
        no map is used, nan without a battle.
    loss_before, loss_after : float
        Cross-entropy of the same.
    kept_out : str
        Why no map is used; "" if one is.
    """

    n: int
    ece_before: float
    ece_after: float
    loss_before: float
    loss_after: float
    kept_out: str = ""

    def metrics(self) -> dict[str, float]:
        """Return the figures as flat metrics, less those that are not numbers."""
        figures = {k: v for k, v in asdict(self).items() if k != "kept_out"}
        return {f"calibration_{k}": float(v) for k, v in figures.items() if np.isfinite(v)}


def calibrated(
    router: Router,
    battles: TrainingBattles,
    fit: Callable[[TrainingBattles], Router],
    *,
    rng: np.random.Generator,
) -> tuple[Platt, PlattReport]:
    """Return the map that calibrates a trained router, and what it brings.

    Parameters
    ----------
    router : Router
        Trained on `battles`.
    fit : callable
        Trains a router of the same kind and options on other battles; called for kinds that learn
        from validation battles, with the others alone.

    Returns
    -------
    Platt, PlattReport
        The identity, and why, if there are fewer than `MIN_BATTLES` battles or `FOLDS` prompts to
        fit on, if no router can be fitted without the validation battles, or if the map is no
        gain on prompts it was not fitted on.
    """
    try:
        held, preference = battles.pair_validation()
    except TrainingError as error:
        return _not_calibrated(0, str(error))
    counts = battles.weight[held] > 0
    held, preference = held[counts], preference[counts]
    if len(held) > MAX_BATTLES:
        some = np.linspace(0, len(held) - 1, MAX_BATTLES).astype(np.int64)
        held, preference = held[some], preference[some]
    prompts, where = np.unique(battles.prompt[held], return_inverse=True)
    if len(held) < MIN_BATTLES or len(prompts) < FOLDS:
        return _not_calibrated(
            len(held),
            f"{len(held)} validation battles of the pair on {len(prompts)} prompts: fewer than "
            f"{MIN_BATTLES} on {FOLDS}",
        )
    if router.learns_from_validation:
        try:
            router = fit(without_validation(battles, rng))
        except TrainingError as error:
            return _not_calibrated(
                len(held), f"none can be fitted without validation battles: {error}"
            )
    texts = [battles.prompts[i] for i in prompts]
    scores = router.score(texts, battles.embeddings[prompts])[where]
    weight = battles.weight[held]
    mapped = _cross_fitted(scores, preference, weight, rng.permutation(len(prompts))[where])
    before, after = (
        (expected_calibration_error(rates, preference), cross_entropy(rates, preference))
        for rates in (scores, mapped)
    )
    if after[1] >= before[1]:
        no_gain = (
            f"a map fitted on other prompts has a cross-entropy of {after[1]:.4f}, none has "
            f"{before[1]:.4f}"
        )
        return IDENTITY, PlattReport(len(held), before[0], before[0], before[1], before[1], no_gain)
    found = Platt.fit(scores, preference, weight)
    return found, PlattReport(len(held), before[0], after[0], before[1], after[1])


def without_validation(battles: TrainingBattles, rng: np.random.Generator) -> TrainingBattles:
    """Return the battles, and their prompts, less those kept for validation.

    As large a share of the prompts that are left is marked for validation in their place, so that
    what a kind chooses there it still chooses. Of more than `MAX_PROMPTS` prompts, so many are
    drawn.
    """
    keep = ~battles.validation
    prompts = np.unique(battles.prompt[keep])
    if len(prompts) > MAX_PROMPTS:
        keep &= np.isin(battles.prompt, rng.choice(prompts, MAX_PROMPTS, replace=False))
    left = battles.where(keep)
    marked = rng.random(len(left.prompts)) < 1.0 - len(prompts) / len(battles.prompts)
    return replace(left, validation=marked[left.prompt])


def _not_calibrated(n: int, why: str) -> tuple[Platt, PlattReport]:
    nan = float("nan")
    return IDENTITY, PlattReport(n, nan, nan, nan, nan, why)


def _cross_fitted(
    scores: Floats, preference: Floats, weight: Floats, place: NDArray[np.int64]
) -> Floats:
    """Return each battle's win rate (n,) by the map fitted on the folds that it is not in.

    `place` (n,) is the place of its prompt in a random order.
    """
    fold = place % FOLDS
    out = np.empty(len(scores))
    for k in range(FOLDS):
        inside = fold == k
        found = Platt.fit(scores[~inside], preference[~inside], weight[~inside])
        out[inside] = found(scores[inside])
    return out
