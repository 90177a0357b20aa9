"""How far one distribution has moved from another."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def psi(expected: Iterable[float], actual: Iterable[float]) -> float:
    """Return the population stability index of two counts over the same bins.

    ``sum((a - e) * ln(a / e))`` over shares; an empty bin counts as one part in ten thousand.
    0 is no change, above 0.25 is usually called a major shift.
    """
    e, a = (np.array(list(x), dtype=np.float64) for x in (expected, actual))
    if not e.sum() or not a.sum():
        return 0.0
    e, a = np.maximum(e / e.sum(), 1e-4), np.maximum(a / a.sum(), 1e-4)
    return float(((a - e) * np.log(a / e)).sum())
