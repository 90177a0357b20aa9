"""PGR, APGR and CPT of a curve of quality against strong fraction, in two readings.

*exact*: every distinct threshold, prompts of equal win rate in expectation over their order; the
curve between thresholds is the straight line that mixing the two gives. *paper*: as RouteLLM's
own code draws it, from ten quantile bins, for comparing with published tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
CPTS = (0.2, 0.5, 0.8)


@dataclass(frozen=True)
class Curve:
    """Quality against cost.

    Attributes
    ----------
    fraction : ndarray (k,)
        Strong fraction c, rising from 0 to 1.
    pgr : ndarray (k,)
        Performance gap recovered at c: 0 is weak alone, 1 strong alone.
    """

    fraction: Floats
    pgr: Floats

    def apgr(self) -> float:
        """Area under the curve over c in [0, 1] (paper, section 3.2)."""
        return float(np.trapezoid(self.pgr, self.fraction))

    def cpt(self, x: float) -> float:
        """Smallest strong fraction at which PGR reaches `x` (paper, section 3.2)."""
        reached = np.flatnonzero(self.pgr >= x - 1e-12)
        i = int(reached[0])  # the curve ends at PGR 1
        if i == 0:
            return float(self.fraction[0])
        low, high = self.pgr[i - 1], self.pgr[i]
        t = (x - low) / (high - low)
        return float(self.fraction[i - 1] + t * (self.fraction[i] - self.fraction[i - 1]))


def exact_curve(win_rates: Floats, strong: Floats, weak: Floats, weight: Floats) -> Curve:
    """Return the exact curve; `weight` (n,) is how often each prompt counts (bootstrap)."""
    order = np.argsort(-win_rates, kind="stable")
    rate, w = win_rates[order], weight[order]
    gain = w * (strong - weak)[order]
    last = np.r_[np.flatnonzero(np.diff(rate)), len(rate) - 1]  # end of each tied group
    calls, recovered = np.cumsum(w)[last], np.cumsum(gain)[last]
    return Curve(np.r_[0.0, calls / calls[-1]], np.r_[0.0, recovered / recovered[-1]])


def paper_curve(win_rates: Floats, strong: Floats, weak: Floats, weight: Floats) -> Curve:
    """Return the curve as RouteLLM's code draws it: ten quantile bins of the win rates.

    Routed to strong are win rates at or above each bin's lower edge (above the largest, for the
    last point), edges that coincide being one.
    """
    repeated = np.repeat(win_rates, weight.astype(int))
    edges = np.unique(np.quantile(repeated, np.linspace(0.0, 1.0, 11)))
    fractions, recovered = [], []
    total = weight.sum()
    gap = (weight * (strong - weak)).sum()
    for i, edge in enumerate(edges):
        routed = win_rates > edge if i == len(edges) - 1 else win_rates >= edge
        fractions.append((weight * routed).sum() / total)
        recovered.append((weight * routed * (strong - weak)).sum() / gap)
    order = np.argsort(fractions, kind="stable")
    fraction, pgr = np.array(fractions)[order], np.array(recovered)[order]
    if fraction[0] > 0:  # no router: the two ends are always there
        fraction, pgr = np.r_[0.0, fraction], np.r_[0.0, pgr]
    if fraction[-1] < 1:
        fraction, pgr = np.r_[fraction, 1.0], np.r_[pgr, 1.0]
    return Curve(fraction, pgr)


def auc(win_rates: Floats, strong: Floats, weak: Floats, weight: Floats) -> float:
    """P(a prompt that strong wins has a higher win rate than one that weak wins), ties half."""
    won, lost = weight * (strong > weak), weight * (strong < weak)
    if not won.sum() or not lost.sum():
        return float("nan")
    values, where = np.unique(win_rates, return_inverse=True)
    won_at = np.bincount(where, won, len(values))
    lost_at = np.bincount(where, lost, len(values))
    below = np.cumsum(lost_at) - lost_at
    return float((won_at * (below + 0.5 * lost_at)).sum() / (won.sum() * lost.sum()))


def upper_hull(points: Floats) -> Floats:
    """Return the upper convex hull (k, 2) of points (n, 2), by rising first coordinate."""
    hull: list[tuple[float, float]] = []
    for x, y in sorted(map(tuple, points.tolist())):
        while len(hull) >= 2:
            (x0, y0), (x1, y1) = hull[-2:]
            if (x1 - x0) * (y - y0) < (y1 - y0) * (x - x0):
                break
            hull.pop()
        hull.append((x, y))
    return np.array(hull)
