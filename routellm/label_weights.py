"""How much each label kind counts, chosen by how well it foretells the most trusted one.

Augmentation adds labels of another kind: a judge's votes to people's, right answers to both. They
help where they say the same thing; where a judge likes what a right answer does not need, they
mislead. So each kind, the most trusted first, gets the weight at which nearest neighbours foretell
the pair's own battles of the trusted kind best, each prompt left out in turn. A larger weight must
take off one per cent of the error, and more than its standard error, or chance would decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from routellm.errors import UsageError
from routellm.routers.base import TRUST, TrainingBattles
from routellm.routers.knn import best_own
from routellm.standings import standings

CHOICES = (0.0, 0.25, 1.0)
MIN_GAIN = 0.01
OUR_OWN = "feedback"


@dataclass(frozen=True)
class LabelWeights:
    """Weights by label kind.

    Attributes
    ----------
    trusted : str
        The kind that the others were held against.
    weights : dict
    errors : dict
        For each kind that was chosen for, the mean squared error at each of `CHOICES`.
    """

    trusted: str
    weights: dict[str, float]
    errors: dict[str, tuple[float, ...]]


def choose_label_weights(battles: TrainingBattles) -> LabelWeights:
    """Choose a weight for each label kind; 1 for the trusted one, and for feedback.

    Feedback is what people said of this very deployment's answers to its own queries. It is mostly
    of other prompts than the trusted labels, so that how well it foretells those says little of
    what it is worth: whether a router that learnt from it is better is the gate's to say.
    """
    trusted, prompts = battles.trusted_kind(), battles.trusted_prompts()
    weights = dict.fromkeys(battles.kinds_by_trust(), 0.0) | {trusted: 1.0}
    errors: dict[str, tuple[float, ...]] = {}
    for kind in battles.kinds_by_trust():
        if kind == trusted:
            continue
        if kind == OUR_OWN:
            weights[kind] = 1.0
            continue
        tried = [
            _errors(battles, weights | {kind: weight}, (trusted, prompts)) for weight in CHOICES
        ]
        if len(tried[0]) < 2:  # nothing to judge by, and no error to give it
            continue
        errors[kind] = tuple(float(e.mean()) for e in tried)
        chosen = 0
        for i in range(1, len(CHOICES)):
            gain = tried[chosen] - tried[i]
            least = max(MIN_GAIN * tried[chosen].mean(), gain.std(ddof=1) / np.sqrt(len(gain)))
            if gain.mean() > least:
                chosen = i
        weights[kind] = CHOICES[chosen]
    return LabelWeights(trusted, weights, errors)


def fixed_label_weights(battles: TrainingBattles, given: Mapping[str, float]) -> LabelWeights:
    """Return weights that a person set (`training.label_weights`); kinds not named count 1.

    Raises
    ------
    UsageError
        If a weight is negative, or a kind unknown.
    """
    wrong = {k: w for k, w in given.items() if k not in TRUST or not 0.0 <= w < float("inf")}
    if wrong:
        raise UsageError(
            f"training.label_weights has {wrong}: name {', '.join(TRUST)} with weights from 0 up"
        )
    kinds = battles.kinds_by_trust()
    return LabelWeights(battles.trusted_kind(), {k: given.get(k, 1.0) for k in kinds}, {})


def _errors(
    battles: TrainingBattles,
    weights: Mapping[str, float],
    trusted: tuple[str, NDArray[np.int64]],
) -> NDArray[np.float64]:
    """Return squared errors (k,) of nearest neighbours, at their best, on the k trusted prompts."""
    weighed = weigh(battles, weights)
    _, errors = best_own(weighed, standings(weighed), trusted)
    return min(errors, key=lambda e: float(e.mean()), default=np.empty(0))


def weigh(battles: TrainingBattles, weights: Mapping[str, float]) -> TrainingBattles:
    """Return the battles with each one's weight multiplied by its label kind's (1 if not named)."""
    kinds, where = np.unique(battles.label_kind, return_inverse=True)
    factor = np.array([weights.get(str(k), 1.0) for k in kinds])
    return replace(battles, weight=battles.weight * factor[where])


def unweighted(battles: TrainingBattles) -> TrainingBattles:
    """Return the battles with a weight of 1 each, as they were before `weigh`."""
    return replace(battles, weight=np.ones(len(battles)))
