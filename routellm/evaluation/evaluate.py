"""Measure win rates on a benchmark: every figure with its bootstrap interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routellm.evaluation.benchmarks import Benchmark
from routellm.evaluation.metrics import CPTS, Curve, auc, exact_curve, paper_curve
from routellm.routers.base import Pair

Floats = NDArray[np.float64]
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % bootstrap percentile interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Reading:
    """APGR and call-performance thresholds (strong fractions in [0, 1])."""

    apgr: Interval
    cpt20: Interval
    cpt50: Interval
    cpt80: Interval


@dataclass(frozen=True)
class Cost:
    """What 1,000 queries cost, in dollars, and the share saved against all of them to strong.

    Attributes
    ----------
    strong, weak : all queries to one model.
    at_cpt50, at_cpt80 : routed, at the strong fraction that recovers half (80 %) of the gap.
    """

    strong: float
    weak: float
    at_cpt50: float
    at_cpt80: float

    @classmethod
    def of(cls, reading: Reading, strong_usd: float, weak_usd: float) -> Cost:
        """Return the cost at what a query costs with each model, in dollars."""

        def routed(fraction: float) -> float:
            return 1000.0 * (fraction * strong_usd + (1.0 - fraction) * weak_usd)

        return cls(
            routed(1.0), routed(0.0), routed(reading.cpt50.value), routed(reading.cpt80.value)
        )

    def saved(self, cost: float) -> float:
        """Return the share that `cost` saves against all queries to strong."""
        return 1.0 - cost / self.strong if self.strong else 0.0


@dataclass(frozen=True)
class Evaluation:
    """How one router does on one benchmark.

    Attributes
    ----------
    n, excluded : int
        Prompts measured, and prompts taken out as possibly seen in training.
    similarity : float or None
        Mean largest cosine similarity to a training prompt, the paper's S(B, D).
    perfect_apgr : float
        APGR of the order that knows both scores; the random router's is 0.5.
    pgr_by_percent : tuple of 101 floats
        PGR at strong fractions of 0, 1, ..., 100 %.
    """

    benchmark: str
    benchmark_digest: str
    strong: str
    weak: str
    n: int
    excluded: int
    simulated: bool
    exact: Reading
    paper: Reading
    auc: Interval
    similarity: float | None
    perfect_apgr: float
    pgr_by_percent: tuple[float, ...]
    quality_weak: float
    quality_strong: float
    cost: Cost | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, doc: dict[str, Any]) -> Evaluation:
        def reading(d: dict[str, Any]) -> Reading:
            return Reading(**{k: Interval(**v) for k, v in d.items()})

        return cls(
            **{
                **doc,
                "exact": reading(doc["exact"]),
                "paper": reading(doc["paper"]),
                "auc": Interval(**doc["auc"]),
                "pgr_by_percent": tuple(doc["pgr_by_percent"]),
                "cost": Cost(**doc["cost"]) if doc.get("cost") else None,
            }
        )


def evaluate(
    win_rates: Floats,
    benchmark: Benchmark,
    pair: Pair,
    *,
    rng: np.random.Generator,
    resamples: int,
    similarity: float | None = None,
    usd_per_query: tuple[float | None, float | None] = (None, None),
) -> Evaluation:
    """Measure win rates (n,) on a benchmark.

    `usd_per_query` is what one costs with strong and with weak, where known.

    Intervals are bootstrap percentiles over prompts. A resample in which strong is no better
    than weak has no gap to recover and is drawn again.

    Raises
    ------
    BenchmarkError
        If the pair was not measured, or there is no gap.
    """
    strong, weak = benchmark.of_pair(pair)
    n = len(strong)
    ones = np.ones(n)
    weights: list[Floats] = []
    while len(weights) < resamples:
        w = np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64)
        if (w * (strong - weak)).sum() > 0:
            weights.append(w)
    exact = exact_curve(win_rates, strong, weak, ones)
    at = np.linspace(0.0, 1.0, 101)
    reading = _reading(lambda w: exact_curve(win_rates, strong, weak, w), ones, weights)
    strong_usd, weak_usd = usd_per_query
    cost = None
    if strong_usd is not None and weak_usd is not None:
        cost = Cost.of(reading, strong_usd, weak_usd)
    return Evaluation(
        benchmark=benchmark.name,
        benchmark_digest=benchmark.digest,
        strong=pair.strong,
        weak=pair.weak,
        n=n,
        excluded=benchmark.excluded,
        simulated=benchmark.simulated,
        exact=reading,
        paper=_reading(lambda w: paper_curve(win_rates, strong, weak, w), ones, weights),
        auc=_interval(
            auc(win_rates, strong, weak, ones),
            [auc(win_rates, strong, weak, w) for w in weights],
        ),
        similarity=similarity,
        perfect_apgr=exact_curve(strong - weak, strong, weak, ones).apgr(),
        pgr_by_percent=tuple(float(v) for v in np.interp(at, exact.fraction, exact.pgr)),
        quality_weak=float(weak.mean()),
        quality_strong=float(strong.mean()),
        cost=cost,
    )


def _reading(curve: Callable[[Floats], Curve], ones: Floats, weights: list[Floats]) -> Reading:
    def figures(c: Curve) -> list[float]:
        return [c.apgr(), *(c.cpt(x) for x in CPTS)]

    value = figures(curve(ones))
    drawn = np.array([figures(curve(w)) for w in weights])
    return Reading(*(_interval(v, drawn[:, i]) for i, v in enumerate(value)))


def _interval(value: float, drawn: Any) -> Interval:
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.nanquantile(drawn, [tail, 1.0 - tail]) if np.isfinite(value) else (value, value)
    return Interval(value, float(low), float(high))
