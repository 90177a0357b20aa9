"""Incremental benefit per cost: what a dollar beyond the small model's price buys (AutoMix)."""

from __future__ import annotations

import math
from typing import NamedTuple


class IBC(NamedTuple):
    """A method's benefit per cost beside the large model's.

    Attributes
    ----------
    method, base : float
        Quality gained for each dollar that is spent beyond the small model's; nan where no dollar
        is.
    delta_percent : float
        By how many percent the method's is above the large model's. nan where one of the two is, or
        where the large model is no better than the small one: nothing is to be gained there.
    """

    method: float
    base: float
    delta_percent: float


def ibc(
    quality: float, usd: float, *, small: tuple[float, float], large: tuple[float, float]
) -> IBC:
    """Return the incremental benefit per cost of a method between two models.

    AutoMix (Aggarwal et al. 2024, arXiv 2310.12963, section 4)::

        IBC_M     = (P_M - P_small) / (C_M - C_small)
        IBC_BASE  = (P_large - P_small) / (C_large - C_small)
        delta IBC = (IBC_M - IBC_BASE) / IBC_BASE x 100 %

    Blind mixing of the two models has a delta of 0 at every price, and so has the large model.

    Parameters
    ----------
    quality, usd : float
        The method's mean quality and mean dollars a query.
    small, large : tuple of float
        The same of the two models alone.
    """
    method, base = _slope(quality, usd, small), _slope(*large, small)
    # a comparison with nan is false
    delta = (method - base) / base * 100.0 if base > 0 else math.nan
    return IBC(method, base, delta)


def _slope(quality: float, usd: float, small: tuple[float, float]) -> float:
    more_usd = usd - small[1]
    return (quality - small[0]) / more_usd if more_usd > 0 else math.nan
