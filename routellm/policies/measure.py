"""Measure policies on a table: quality, calls, dollars, seconds and AIQ, each with its interval.

All policies of a table are measured on the same rows and the same resamples of them, so their
figures can be compared, and what one has over blind mixing or over the best model is a difference
within each resample. 95 % bootstrap intervals, by percentiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from routellm.evaluation.evaluate import Interval
from routellm.evaluation.metrics import Floats, exact_curve
from routellm.policies.hull import aiq, hull
from routellm.policies.policy import Point, Policy, answered
from routellm.policies.recorded import Recorded, Split


@dataclass(frozen=True)
class Measured:
    """How a policy did on a table.

    Attributes
    ----------
    setting : str
        The setting that the figures up to `latency_p95_s` are of: the best within the budget.
    quality, calls, usd_per_1000, latency_p50_s, latency_p95_s : Interval
        Per query, dollars per thousand.
    aiq : Interval
        Over the prices from the cheapest to the dearest model.
    apgr : Interval or None
        Of a router between two models; None of other policies.
    figures : dict of Interval
        By name. Of all: ``aiq_gain``, over blind mixing of the models; ``gain``, how much better
        than the best single model the setting is that answered best on the rows to choose by;
        ``saving_100`` and ``saving_95``, the share of the best model's dollars that are saved at
        so many percent of its quality. And what a policy's own paper measures it by.
    points : ndarray (k, 2)
        Dollars per thousand queries and quality of each setting.
    """

    policy: str
    table: str
    n: int
    simulated: bool
    setting: str
    quality: Interval
    calls: Interval
    usd_per_1000: Interval
    latency_p50_s: Interval
    latency_p95_s: Interval
    aiq: Interval
    apgr: Interval | None
    figures: Mapping[str, Interval]
    points: Floats


def measure(
    policies: Sequence[Policy],
    split: Split,
    *,
    resamples: int,
    rng: np.random.Generator,
) -> list[Measured]:
    """Measure fitted policies on the rows of a table that are kept to measure on.

    The setting that is shown is the one that answered best on the rows to choose by within
    `budget`, or the cheapest where none is as cheap; nothing is chosen on what is measured on.
    """
    drawn = rng.integers(len(split.measure), size=(resamples, len(split.measure)))
    return [_measured(policy, split, drawn) for policy in policies]


def budget(table: Recorded) -> float:
    """Return half-way between the cheapest and the best model's dollars a query."""
    usd = table.usd.mean(axis=0)
    return float((usd[table.cheapest()] + usd[table.best()]) / 2.0)


def _measured(policy: Policy, split: Split, drawn: NDArray[np.int64]) -> Measured:
    table = split.measure
    points = answered(policy, table)
    held = policy.answer(split.held)
    shown = points[_chosen(held, budget(split.held))]
    best = points[int(np.argmax([p.quality.mean() for p in held]))]
    counts = np.array([np.bincount(rows, minlength=len(table)) for rows in drawn], dtype=np.float64)
    once = np.ones(len(table))

    def over(figure: Callable[[Floats], float]) -> Interval:
        """Return a figure that takes how often each row counts, and its interval."""
        return _interval(figure(once), np.array([figure(weight) for weight in counts]))

    def mean(values: Floats, scale: float = 1.0) -> Interval:
        return _interval(values.mean() * scale, values[drawn].mean(axis=1) * scale)

    def quantile(q: float) -> Interval:
        values = shown.latency_s
        return _interval(np.quantile(values, q), np.quantile(values[drawn], q, axis=1))

    own, blind = _Means.of(points, table), _Means.of((), table)
    alone = table.quality[:, split.train.best()]
    routed = policy.routed(table)
    figures = {
        "aiq_gain": over(lambda w: own.aiq(w) - blind.aiq(w)),
        "gain": mean(best.quality - alone),
        "saving_100": over(lambda w: own.saving(w, 1.0)),
        "saving_95": over(lambda w: own.saving(w, 0.95)),
    }
    own_figures = policy.figures(points, table, once)
    if own_figures:
        resampled = [policy.figures(points, table, weight) for weight in counts]
        for name, value in own_figures.items():
            figures[name] = _interval(value, np.array([one[name] for one in resampled]))
    return Measured(
        policy.name,
        table.name,
        len(table),
        policy.simulated,
        shown.setting,
        mean(shown.quality),
        mean(shown.calls),
        mean(shown.usd, 1000.0),
        quantile(0.5),
        quantile(0.95),
        over(own.aiq),
        over(lambda w: exact_curve(*routed, w).apgr()) if routed else None,
        figures,
        np.array([[p.usd.mean() * 1000.0, p.quality.mean()] for p in points]),
    )


def _chosen(points: Sequence[Point], most_usd: float) -> int:
    usd = np.array([p.usd.mean() for p in points])
    quality = np.array([p.quality.mean() for p in points])
    within = np.flatnonzero(usd <= most_usd * (1 + 1e-9))
    return int(within[quality[within].argmax()]) if len(within) else int(usd.argmin())


@dataclass(frozen=True)
class _Means:
    """The settings of a policy and what is open to all: asking any one model.

    Attributes
    ----------
    usd : ndarray (k,)
        Mean dollars a query. Prices stay as they are: what is in doubt is what they buy.
    quality : ndarray (n, k)
    low, high : float
        Dollars of the cheapest and the dearest model.
    """

    usd: Floats
    quality: Floats
    low: float
    high: float

    @classmethod
    def of(cls, points: Sequence[Point], table: Recorded) -> _Means:
        """With no points, all models: blind mixing. Else the points and the cheapest model."""
        columns = table.usd.mean(axis=0)
        models = [table.cheapest()] if points else range(len(table.models))
        usd = [*(columns[c] for c in models), *(p.usd.mean() for p in points)]
        quality = [*(table.quality[:, c] for c in models), *(p.quality for p in points)]
        best = table.best()
        # the best model is kept last: what is saved is counted from it
        return cls(
            np.array([*usd, columns[best]]),
            np.column_stack([*quality, table.quality[:, best]]),
            float(columns.min()),
            float(columns.max()),
        )

    def aiq(self, weight: Floats) -> float:
        quality = weight @ self.quality[:, :-1] / weight.sum()
        return aiq(self.usd[:-1], quality, self.low, self.high)

    def saving(self, weight: Floats, share: float) -> float:
        """Return the share of the best model's dollars saved at `share` of its quality."""
        quality = weight @ self.quality / weight.sum()
        x, y = hull(self.usd, quality)
        usd = float(np.interp(share * quality[-1], y, x))
        return 1.0 - usd / float(self.usd[-1])


def _interval(value: float, resampled: Floats) -> Interval:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(float(value), float(low), float(high))
