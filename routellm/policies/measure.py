"""Measure policies on a table: quality, calls, dollars, seconds and AIQ, each with its interval.

All policies of a table are measured on the same rows and the same resamples of them, so their
figures can be compared. 95 % bootstrap intervals, by percentiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from routellm.evaluation.evaluate import Interval
from routellm.evaluation.metrics import Floats, exact_curve
from routellm.policies.hull import aiq
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
    points: Floats


def measure(
    policies: Sequence[Policy],
    split: Split,
    *,
    resamples: int,
    rng: np.random.Generator,
) -> list[Measured]:
    """Measure fitted policies on the rows of a table that are kept to measure on.

    The setting that is shown is the one that answered best in training within `budget`, or the
    cheapest where none is as cheap; so nothing is chosen on the rows that are measured on.
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
    shown = points[_chosen(policy, split.train)]

    def mean(values: Floats, scale: float = 1.0) -> Interval:
        return _interval(values.mean() * scale, values[drawn].mean(axis=1) * scale)

    def quantile(q: float) -> Interval:
        values = shown.latency_s
        return _interval(np.quantile(values, q), np.quantile(values[drawn], q, axis=1))

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
        _aiq(points, table, drawn),
        _apgr(policy, table, drawn),
        np.array([[p.usd.mean() * 1000.0, p.quality.mean()] for p in points]),
    )


def _chosen(policy: Policy, train: Recorded) -> int:
    points = policy.answer(train)
    usd = np.array([p.usd.mean() for p in points])
    quality = np.array([p.quality.mean() for p in points])
    within = np.flatnonzero(usd <= budget(train) * (1 + 1e-9))
    return int(within[quality[within].argmax()]) if len(within) else int(usd.argmin())


def _aiq(points: Sequence[Point], table: Recorded, drawn: NDArray[np.int64]) -> Interval:
    columns = table.usd.mean(axis=0)
    low, high = float(columns.min()), float(columns.max())
    cheapest = table.cheapest()
    usd = np.column_stack([table.usd[:, cheapest], *(p.usd for p in points)])
    quality = np.column_stack([table.quality[:, cheapest], *(p.quality for p in points)])
    # prices stay as they are: what is in doubt is what they buy
    usd_mean = usd.mean(axis=0)
    resampled = np.array([aiq(usd_mean, quality[rows].mean(axis=0), low, high) for rows in drawn])
    return _interval(aiq(usd_mean, quality.mean(axis=0), low, high), resampled)


def _apgr(policy: Policy, table: Recorded, drawn: NDArray[np.int64]) -> Interval | None:
    routed = policy.routed(table)
    if routed is None:
        return None
    counts = np.array([np.bincount(rows, minlength=len(table)) for rows in drawn], dtype=np.float64)
    resampled = np.array([exact_curve(*routed, weight).apgr() for weight in counts])
    return _interval(exact_curve(*routed, np.ones(len(table))).apgr(), resampled)


def _interval(value: float, resampled: Floats) -> Interval:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(float(value), float(low), float(high))
