"""Two routers on the same resamples of the same prompts: how sure their difference is.

Resampling the prompts for both at once takes out what they share, and that is most of it: how hard
the drawn prompts happen to be for the two models (Efron and Tibshirani, *An Introduction to the
Bootstrap*, 1993, chapters 8 and 13). Where prompts belong together, as the turns of one question
do, whole clusters are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from routellm.errors import BenchmarkError

Floats = NDArray[np.float64]

_LEAST_AT_ONCE = 125  # resamples: a row of fewer is mostly overhead
_WEIGHTS_AT_ONCE = 250_000  # two megabytes, which a processor's cache holds
_MOST_DRAWS = 50  # times the resamples wanted, before there is taken to be no gap


@dataclass(frozen=True)
class Draws:
    """What r routers score on R resamples.

    Attributes
    ----------
    apgr : ndarray (r, R)
    cpt : ndarray (len(cpts), r, R)
        Strong fraction at which each asked-for share of the gap is recovered.
    no_gap : float
        Share of the resamples drawn in which strong was no better than weak: they are drawn again.
    """

    apgr: Floats
    cpt: Floats
    no_gap: float


def paired_bootstrap(
    win_rates: Sequence[Floats],
    strong: Floats,
    weak: Floats,
    cluster: NDArray[np.int64],
    *,
    resamples: int,
    rng: np.random.Generator,
    cpts: Sequence[float] = (),
) -> Draws:
    """Measure r routers on the same resamples, in the exact reading (`metrics.exact_curve`).

    Parameters
    ----------
    win_rates : r arrays (n,)
    strong, weak : scores (n,)
    cluster : the number, from 0, of the cluster that each prompt is of (n,)
    cpts : shares of the gap, in (0, 1], to find the strong fractions of

    Raises
    ------
    BenchmarkError
        If strong is hardly ever better than weak.
    """
    n, clusters = len(strong), int(cluster.max()) + 1
    gain = strong - weak
    ranked = [_Ranked.of(rates, gain) for rates in win_rates]
    alone = clusters == n and bool((cluster == np.arange(n)).all())
    block = block_size(n)
    areas: list[Floats] = []
    found: list[Floats] = []
    kept = drawn = 0
    while kept < resamples:
        if drawn > _MOST_DRAWS * resamples:
            raise BenchmarkError(
                f"strong is hardly ever better than weak on these {n} prompts: there is no gap "
                "for a router to recover"
            )
        times = _resamples(clusters, block, rng)
        drawn += block
        weight = times if alone else times[cluster]
        has_gap = gain @ weight > 0
        if not has_gap.all():
            weight = weight[:, has_gap]
        kept += weight.shape[1]
        both = [one.read(weight, cpts) for one in ranked]
        areas.append(np.stack([area for area, _ in both]))
        found.append(np.stack([cpt for _, cpt in both], axis=1))
    return Draws(
        np.concatenate(areas, axis=1)[:, :resamples],
        np.concatenate(found, axis=2)[:, :, :resamples],
        1.0 - kept / drawn,
    )


def block_size(n: int) -> int:
    """Return how many resamples of n prompts are measured at once, side by side in memory."""
    return max(_LEAST_AT_ONCE, _WEIGHTS_AT_ONCE // n)


def _resamples(clusters: int, block: int, rng: np.random.Generator) -> Floats:
    """Return how often each cluster is drawn in each of `block` resamples (clusters, block)."""
    drawn = rng.integers(clusters, size=(clusters, block))
    drawn *= block
    drawn += np.arange(block)
    counts = np.bincount(drawn.ravel(), minlength=clusters * block)
    return counts.reshape(clusters, block).astype(np.float64)


@dataclass(frozen=True)
class _Ranked:
    """A router's order of the prompts, found once for all resamples.

    Attributes
    ----------
    order : ndarray int64 (n,)
        Prompts by falling win rate.
    gain : ndarray (n, 1)
        What strong gains on each, in that order.
    last : ndarray int64 (k,) or None
        Where each run of equal win rates ends; None if there are none.
    """

    order: NDArray[np.int64]
    gain: Floats
    last: NDArray[np.int64] | None

    @classmethod
    def of(cls, win_rates: Floats, gain: Floats) -> _Ranked:
        order = np.argsort(-win_rates, kind="stable")
        last = np.r_[np.flatnonzero(np.diff(win_rates[order])), len(order) - 1]
        return cls(order, gain[order, None], None if len(last) == len(order) else last)

    def read(self, weight: Floats, cpts: Sequence[float]) -> tuple[Floats, Floats]:
        """Return the APGR (b,) and strong fractions (len(cpts), b) on weights (n, b)."""
        width = weight[self.order]  # of each prompt's step, in calls
        rise = width * self.gain
        recovered = np.cumsum(rise, axis=0)
        total, gap = width.sum(axis=0), recovered[-1]
        calls = np.cumsum(width, axis=0) if self.last is not None or cpts else width
        if self.last is not None:  # a run of equal win rates is one step
            calls, recovered = calls[self.last], recovered[self.last]
            width = np.diff(calls, axis=0, prepend=0.0)
            rise = np.diff(recovered, axis=0, prepend=0.0)
        # the trapezoid under a step is its width times the mean of its two heights
        area = np.einsum("kb,kb->b", width, recovered) - np.einsum("kb,kb->b", width, rise) / 2.0
        cpt = np.empty((len(cpts), len(gap)))
        for i, x in enumerate(cpts):
            cpt[i] = _fraction_at(calls, recovered, x * gap) / total
        return area / (total * gap), cpt


def _fraction_at(calls: Floats, recovered: Floats, wanted: Floats) -> Floats:
    """Return the calls (b,) by which curves (k, b) first recover what is wanted (b,)."""
    slack = 1e-12 * np.abs(recovered[-1])
    at = (recovered >= wanted - slack).argmax(axis=0)
    column = np.arange(len(at))
    before = np.maximum(at - 1, 0)
    low = np.where(at > 0, recovered[before, column], 0.0)
    left = np.where(at > 0, calls[before, column], 0.0)
    high, right = recovered[at, column], calls[at, column]
    share = (wanted - low) / np.where(high > low, high - low, 1.0)
    fraction: Floats = left + share * (right - left)
    return fraction
