"""What a win rate means, and what a threshold means.

A win rate is calibrated when strong is preferred in that share of the queries that have it: `Platt`
maps a router's scores there, and `expected_calibration_error` says how far off they are. A
threshold sends a share of queries to strong: `Calibration` says which, and back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from routellm.errors import UsageError
from routellm.ratings import sigmoid

Floats = NDArray[np.float64]

_GRID = 1001
MIN_SLOPE = 0.05  # a router that foretells nothing keeps its order
_EDGE = 1e-6  # a score of 0 or 1 counts as this far from it, so that its log-odds are finite
MIN_BIN = 20  # fewer battles in a bin measure chance


@dataclass(frozen=True)
class Platt:
    """A rising map of win rates, ``sigmoid(slope * logit(p) + intercept)`` (Platt, 1999).

    Two parameters, and strictly rising: the samples that routers are calibrated on have some
    hundred battles, on which isotonic regression overfits and makes ties. The order of queries,
    and with it every strong fraction, APGR and CPT, stays as it was.
    """

    slope: float = 1.0
    intercept: float = 0.0

    def __call__(self, win_rates: Floats) -> Floats:
        """Return the calibrated win rates (n,) of scores (n,) in [0, 1]."""
        if self == IDENTITY:
            return win_rates
        return sigmoid(self.slope * _log_odds(win_rates) + self.intercept)

    @classmethod
    def fit(cls, win_rates: Floats, preferences: Floats, weights: Floats | None = None) -> Platt:
        """Fit the map by cross-entropy.

        Parameters
        ----------
        win_rates : ndarray (n,)
            Scores of battles that the router has not learnt from.
        preferences : ndarray (n,)
            P(strong preferred) in [0, 1].
        weights : ndarray (n,), optional

        Notes
        -----
        Newton steps with halving (Lin, Lin and Weng, 2007), against Platt's targets
        ``(n+ + 1) / (n+ + 2)`` and ``1 / (n- + 2)`` instead of 1 and 0, between which a preference
        lies in proportion. The slope is at least `MIN_SLOPE`.

        Raises
        ------
        UsageError
            If there is no battle.
        """
        _check_battles(win_rates, preferences)
        w = np.ones(len(win_rates)) if weights is None else weights / weights.mean()
        wins, losses = float(w @ preferences), float(w @ (1.0 - preferences))
        top, bottom = (wins + 1.0) / (wins + 2.0), 1.0 / (losses + 2.0)
        target = bottom + (top - bottom) * preferences
        x = np.stack([_log_odds(win_rates), np.ones(len(win_rates))], axis=1)  # (n, 2)
        found = _newton(x, target, w, np.array([1.0, 0.0]), free=[0, 1])
        if found[0] < MIN_SLOPE:
            found = _newton(x, target, w, np.array([MIN_SLOPE, 0.0]), free=[1])
        return cls(float(found[0]), float(found[1]))


IDENTITY = Platt()


def _log_odds(win_rates: Floats) -> Floats:
    p = _EDGE + (1.0 - 2.0 * _EDGE) * np.asarray(win_rates, np.float64)
    out: Floats = np.log(p) - np.log1p(-p)
    return out


def _newton(x: Floats, target: Floats, w: Floats, start: Floats, *, free: list[int]) -> Floats:
    """Minimise ``sum w (log(1 + e^z) - target z)``, ``z = x @ theta`` (n,), over `free` entries."""

    def loss(theta: Floats) -> float:
        z = x @ theta
        return float(w @ (np.logaddexp(0.0, z) - target * z))

    theta = start.copy()
    value = loss(theta)
    for _ in range(100):
        p = sigmoid(x @ theta)
        gradient = (x[:, free].T @ (w * (p - target)))[:, None]
        hessian = (x[:, free].T * (w * p * (1.0 - p))) @ x[:, free]
        # scores that are all the same leave the slope open: the ridge keeps it where it was
        step = np.linalg.solve(hessian + 1e-9 * np.eye(len(free)), gradient)[:, 0]
        scale = 1.0
        while scale > 1e-6:
            trial = theta.copy()
            trial[free] -= scale * step
            reached = loss(trial)
            if reached <= value:
                theta, value = trial, reached
                break
            scale *= 0.5
        if np.abs(scale * step).max() < 1e-9 or scale <= 1e-6:
            break
    return theta


def expected_calibration_error(win_rates: Floats, preferences: Floats, bins: int = 10) -> float:
    """Return the mean distance of win rates (n,) from what was preferred (n,), bin by bin.

    Bins hold equally many battles (Nixon et al., 2019; Guo et al., 2017, with bins of equal
    width), at least `MIN_BIN` each: with fewer than ``bins * MIN_BIN`` battles there are fewer
    bins. Battles of the same win rate count with their mean preference, so that it does not matter
    between which of them a bin ends. `chance_calibration_error` is what chance alone gives.

    Raises
    ------
    UsageError
        If there is no battle.
    """
    _check_battles(win_rates, preferences)
    _, where = np.unique(win_rates, return_inverse=True)
    preferred = (np.bincount(where, preferences) / np.bincount(where))[where]
    order = np.argsort(win_rates, kind="stable")
    parts = np.array_split(order, _bins(len(order), bins))
    gaps = [abs(float((win_rates[rows] - preferred[rows]).sum())) for rows in parts]
    return sum(gaps) / len(order)


def chance_calibration_error(n: int, bins: int = 10) -> float:
    """Return about what `expected_calibration_error` is of perfect win rates, over n battles.

    ``sqrt(2 / pi) * sigma / sqrt(battles in a bin)``, the mean distance of a normal mean from its
    expectation, with the largest standard deviation that a preference can have, 1/2.
    """
    return float(np.sqrt(2.0 / np.pi) * 0.5 / np.sqrt(n / _bins(n, bins))) if n else 0.0


def _bins(n: int, bins: int) -> int:
    return max(1, min(bins, n // MIN_BIN))


def _check_battles(win_rates: Floats, preferences: Floats) -> None:
    if not len(win_rates) or len(win_rates) != len(preferences):
        raise UsageError(
            f"calibration needs a preference for each win rate, found {len(win_rates)} win rates "
            f"and {len(preferences)} preferences: give battles"
        )


@dataclass(frozen=True)
class Calibration:
    """Win-rate quantiles of a router over a named sample of queries.

    Attributes
    ----------
    sample : str
        What the queries were; other traffic has other quantiles.
    n : int
        How many.
    quantiles : tuple of 1001 floats
        Win rate at each 0.1 % of the sample, rising.
    """

    sample: str
    n: int
    quantiles: tuple[float, ...]

    @classmethod
    def of(cls, win_rates: NDArray[np.float64], sample: str) -> Calibration:
        """Calibrate on the win rates (n,) of a sample of queries."""
        if not len(win_rates):
            raise UsageError(f"no queries to calibrate on in {sample}: give at least one")
        grid = np.quantile(win_rates, np.linspace(0.0, 1.0, _GRID))
        return cls(sample, len(win_rates), tuple(float(v) for v in grid))

    def threshold(self, strong_fraction: float) -> float:
        """Return the win rate from which `strong_fraction` of the sample goes to strong."""
        check_share(strong_fraction, "strong fraction")
        if strong_fraction == 0.0:
            return float(np.nextafter(1.0, 2.0))  # above every win rate, of the sample or not
        return float(np.interp(1.0 - strong_fraction, np.linspace(0, 1, _GRID), self.quantiles))

    def threshold_interval(self, strong_fraction: float) -> tuple[float, float]:
        """Return the 95 % interval of `threshold`, for traffic that the sample was drawn from.

        The number of a sample's queries above the true threshold is binomial, so the order
        statistics at its 2.5 % and 97.5 % points bound that threshold.
        """
        from scipy.stats import binom

        check_share(strong_fraction, "strong fraction")
        low, high = (binom.ppf(q, self.n, strong_fraction) / self.n for q in (0.025, 0.975))
        return self.threshold(float(high)), self.threshold(float(low))

    def strong_fraction(self, threshold: float) -> float:
        """Return the share of the sample that a threshold sends to strong."""
        check_share(threshold, "threshold")
        below = np.searchsorted(np.array(self.quantiles), threshold, side="left")
        return float(1.0 - below / _GRID)


def check_share(value: float, what: str) -> None:
    """Refuse a value outside [0, 1] (or not a number)."""
    if not 0.0 <= value <= 1.0:
        raise UsageError(f"{what} {value} is outside [0, 1]: give a number from 0 to 1")
