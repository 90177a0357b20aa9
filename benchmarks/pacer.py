"""What the budget pacer holds while traffic drifts, and what a fixed threshold makes of it.

SIMULATED win rates: the log-odds of a query are normal, and drift moves their mean, which is how
hard the traffic is. Both begin with the threshold that sends 30 % of a sample of undrifted queries
to strong. `tests/unit/test_pacer.py` holds these figures to their bounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from routellm.calibration import Calibration
from routellm.gateway.pacer import Pacer
from routellm.ratings import sigmoid

Rows = list[tuple[str, str]]
Floats = NDArray[np.float64]

QUERIES = 10_000
STRONG_FRACTION = 0.3
SEEDS = 10
_SAMPLE = 1_000  # queries calibrated on
_HARD = 0.95  # standard deviations that the mean moves: the fixed threshold then sends 66 %


def _step(t: Floats) -> Floats:
    return np.where(t < 0.2, 0.0, _HARD)


def _slow(t: Floats) -> Floats:
    return np.minimum(2.0 * t, 1.0) * _HARD


def _wave(t: Floats) -> Floats:
    out: Floats = _HARD * (0.5 - 0.5 * np.cos(2.0 * np.pi * 4.0 * t))
    return out


def _easier(t: Floats) -> Floats:
    return -_step(t)


def _bursts(t: Floats) -> Floats:
    return np.where(np.floor(20.0 * t) % 2 == 1, _HARD, 0.0)


# how far the mean of the log-odds has moved, at shares t (n,) of the way
DRIFTS: dict[str, Callable[[Floats], Floats]] = {
    "none": np.zeros_like,
    "a step": _step,
    "slow": _slow,
    "a daily wave, four days": _wave,
    "bursts of 500 queries": _bursts,
    "a step, to easier": _easier,
}


@dataclass(frozen=True)
class Held:
    """Strong fractions over all queries, of the last thousand, and the worst of any thousand."""

    overall: float
    last: float
    worst: float

    @classmethod
    def of(cls, strong: NDArray[np.bool_]) -> Held:
        sums = np.concatenate([[0.0], np.cumsum(strong)])
        some = (sums[1000:] - sums[:-1000]) / 1000.0
        worst = some[np.abs(some - STRONG_FRACTION).argmax()]
        return cls(float(strong.mean()), float(some[-1]), float(worst))


@dataclass(frozen=True)
class Simulated:
    """A drift's outcome: with a pacer, with a fixed threshold; and the time of one decision."""

    paced: Held
    fixed: Held
    limited: int  # queries at which the pacer's threshold was held back
    us_per_query: float


def simulate(drift: str, seed: int, *, repeated: float = 0.0) -> Simulated:
    """Run a drift once; `repeated` is the share of queries that are one prompt, over and over."""
    rng = np.random.default_rng(seed)
    calibration = Calibration.of(sigmoid(rng.standard_normal(_SAMPLE)), "undrifted queries")
    moved = DRIFTS[drift](np.arange(QUERIES) / QUERIES)
    rates = sigmoid(moved + rng.standard_normal(QUERIES))
    rates = np.where(rng.random(QUERIES) < repeated, 0.7, rates)
    pacer = Pacer(calibration, STRONG_FRACTION)
    limited, strong = 0, np.empty(QUERIES, bool)
    began = time.perf_counter()
    for i, rate in enumerate(rates.tolist()):
        strong[i] = rate >= pacer.decide(rate)
        limited += pacer.limited
    took_s = time.perf_counter() - began
    fixed = rates >= calibration.threshold(STRONG_FRACTION)
    return Simulated(Held.of(strong), Held.of(fixed), limited, 1e6 * took_s / QUERIES)


def measure() -> Rows:
    """Return a row a drift, and the time of a decision."""
    rows, times = [], []
    for drift in DRIFTS:
        found = [simulate(drift, seed) for seed in range(SEEDS)]
        times += [one.us_per_query for one in found]
        paced = [one.paced.overall for one in found]
        last = sum(one.fixed.last for one in found) / SEEDS
        whole = sum(one.fixed.overall for one in found) / SEEDS
        worst = max((one.paced.worst for one in found), key=lambda x: abs(x - STRONG_FRACTION))
        rows.append(
            (
                f"30 % to strong, drift: {drift}",
                f"paced {min(paced):.1%} to {max(paced):.1%}, worst 1,000 in a row {worst:.0%}\n"
                f"fixed {whole:.0%}, ends at {last:.0%}",
            )
        )
    rows.append(("a pacer's decision", f"{sorted(times)[len(times) // 2]:.1f} µs"))
    return rows
