"""What a threshold means: the share of queries that it sends to strong, and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from routellm.errors import UsageError

_GRID = 1001


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
            return 1.0 if self.quantiles[-1] < 1.0 else float(np.nextafter(1.0, 2.0))
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
