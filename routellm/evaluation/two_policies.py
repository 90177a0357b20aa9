"""Two policies on the same battles: APGR, cross-entropy, Brier score, and how sure the gain is."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routellm.errors import BenchmarkError
from routellm.evaluation.bootstrap import paired_bootstrap
from routellm.evaluation.evaluate import CONFIDENCE, Interval
from routellm.evaluation.metrics import exact_curve

Floats = NDArray[np.float64]

_EDGE = 1e-6  # a win rate of 0 or 1 counts as this far from it, so that its loss is finite
_DRAWS_AT_ONCE = 4_000_000  # draws of battles held in memory, in a bootstrap of means


@dataclass(frozen=True)
class Figures:
    """How a policy did.

    Attributes
    ----------
    apgr : Interval or None
        None where strong was no better than weak: there was no gap to recover.
    cross_entropy : Interval
        Of win rates against votes, in nats.
    brier : Interval
        Mean squared distance of win rates from votes.
    """

    apgr: Interval | None
    cross_entropy: Interval
    brier: Interval


@dataclass(frozen=True)
class Comparison:
    """Two policies on the same battles.

    Attributes
    ----------
    battles : int
    gain : Figures
        Retrained against never retrained, more than 0 where retraining was better: APGR gained,
        cross-entropy and Brier score taken off.
    """

    battles: int
    retrained: Figures
    never: Figures
    gain: Figures


@dataclass(frozen=True)
class Answers:
    """What the two policies said of n battles at the time.

    Attributes
    ----------
    retrained, never : ndarray float64 (n,)
        Win rates.
    preference : ndarray float64 (n,)
        P(strong preferred).
    prompt, window : ndarray int64 (n,)
    """

    retrained: Floats
    never: Floats
    preference: Floats
    prompt: NDArray[np.int64]
    window: NDArray[np.int64]

    @classmethod
    def join(cls, several: Sequence[Answers]) -> Answers:
        """Return those of several windows, or of none, as one."""

        def joined(name: str, kind: type) -> NDArray[Any]:
            return np.concatenate([np.empty(0, kind), *(getattr(one, name) for one in several)])

        floats = (joined(name, np.float64) for name in ("retrained", "never", "preference"))
        return cls(*floats, *(joined(name, np.int64) for name in ("prompt", "window")))


def compare(answers: Answers, *, resamples: int, rng: np.random.Generator) -> Comparison | None:
    """Compare the two policies on the same battles; None if there are none.

    Battles on one prompt are resampled together. Battles of one window are ranked among
    themselves, since a threshold is calibrated anew for each version: at a strong fraction c, the
    share c of every window goes to strong.
    """
    if not len(answers.preference):
        return None
    both, strong = (answers.retrained, answers.never), answers.preference
    weak = 1.0 - strong
    ranked = [_ranks(rates, answers.window) for rates in both]
    _, cluster = np.unique(answers.prompt, return_inverse=True)
    apgr: list[Interval | None] = [None, None, None]
    if strong.mean() > weak.mean():
        with contextlib.suppress(BenchmarkError):  # hardly any resample has a gap
            draws = paired_bootstrap(
                ranked, strong, weak, cluster, resamples=resamples, rng=rng
            ).apgr  # (2, resamples)
            ones = np.ones(len(strong))
            value = [exact_curve(rates, strong, weak, ones).apgr() for rates in ranked]
            apgr = [
                _interval(value[0], draws[0]),
                _interval(value[1], draws[1]),
                _interval(value[0] - value[1], draws[0] - draws[1]),
            ]
    losses = []
    for loss in (_cross_entropy, _brier):
        of = [loss(rates, strong) for rates in both]
        columns = np.stack([*of, of[1] - of[0]], axis=1)  # (n, 3)
        losses.append(_means(columns, cluster, resamples, rng))
    three = [Figures(a, c, b) for a, c, b in zip(apgr, losses[0], losses[1], strict=True)]
    return Comparison(len(strong), *three)


def _ranks(rates: Floats, window: NDArray[np.int64]) -> Floats:
    """Return each win rate's rank in its window, as a share in (0, 1), the mean of equal ones."""
    from scipy.stats import rankdata

    out = np.empty(len(rates))
    for one in np.unique(window):
        rows = np.flatnonzero(window == one)
        out[rows] = (rankdata(rates[rows]) - 0.5) / len(rows)
    return out


def _cross_entropy(rates: Floats, preference: Floats) -> Floats:
    p = np.clip(rates, _EDGE, 1.0 - _EDGE)
    loss: Floats = -(preference * np.log(p) + (1.0 - preference) * np.log1p(-p))
    return loss


def _brier(rates: Floats, preference: Floats) -> Floats:
    return (rates - preference) ** 2


def _means(
    columns: Floats, cluster: NDArray[np.int64], resamples: int, rng: np.random.Generator
) -> list[Interval]:
    """Return the mean of each column (n, k), with intervals from resamples of whole clusters."""
    size = np.bincount(cluster).astype(np.float64)  # (c,)
    sums = np.stack([np.bincount(cluster, column) for column in columns.T], axis=1)  # (c, k)
    block = max(1, _DRAWS_AT_ONCE // len(size))
    drawn = []
    for first in range(0, resamples, block):
        times = rng.integers(len(size), size=(min(block, resamples - first), len(size)))
        total = size[times].sum(axis=1)
        drawn.append(np.stack([s[times].sum(axis=1) / total for s in sums.T], axis=1))
    draws = np.concatenate(drawn)
    return [_interval(float(c.mean()), draws[:, i]) for i, c in enumerate(columns.T)]


def _interval(value: float, draws: Floats) -> Interval:
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    return Interval(float(value), float(low), float(high))
