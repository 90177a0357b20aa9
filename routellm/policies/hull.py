"""Quality that money buys: the non-decreasing convex hull, and its mean height (AIQ).

RouterBench (Hu et al. 2024, arXiv 2403.12031), section 3. Between two settings of a policy lies
what drawing one of them for each query gives, so its settings' convex hull is within reach; and who
may spend more need not, so it never falls.
"""

from __future__ import annotations

import numpy as np

from routellm.evaluation.metrics import Floats, upper_hull
from routellm.policies.recorded import Recorded


def hull(usd: Floats, quality: Floats) -> tuple[Floats, Floats]:
    """Return the corners of the non-decreasing convex hull of points (k,), cheapest first.

    Returns
    -------
    usd, quality : ndarray (h,)
        Both rise strictly, and quality ever more slowly.
    """
    best = np.lexsort((usd, -quality))[0]  # of the best, the cheapest
    within = usd <= usd[best]
    corners = upper_hull(np.column_stack([usd, quality])[within])
    rises = np.append(np.diff(corners[:, 0]) > 0, True)  # of points at one price, the last is best
    return corners[rises, 0], corners[rises, 1]


def aiq(usd: Floats, quality: Floats, low: float, high: float) -> float:
    """Return the average improvement in quality: the hull's mean height over [low, high].

    Parameters
    ----------
    usd, quality : ndarray (k,)
        A policy's points: mean price and mean quality of each setting.
    low, high : float
        Prices between which all policies of a table are compared: those of its cheapest and its
        dearest model. A policy that has no setting as cheap as `low` reaches nothing below its
        first, so give it one: asking the cheapest model is open to all.
    """
    x, y = hull(usd, quality)
    inside = x[(x > low) & (x < high)]
    at = np.concatenate([[low], inside, [high]])
    return float(np.trapezoid(np.interp(at, x, y), at) / (high - low))


def worth_asking(table: Recorded) -> tuple[str, ...]:
    """Return the models on the hull of all, the cheapest first: others cost more for no more."""
    usd, quality = table.usd.mean(axis=0), table.quality.mean(axis=0)
    x, _ = hull(usd, quality)
    return tuple(table.models[int(np.flatnonzero(usd == at)[0])] for at in x)
