"""Several models by one router: what each is worth on a prompt, and which is worth its price."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from routellm.routers.base import Pair, Router

Floats = NDArray[np.float64]


class Pool:
    """One router, turned to each model of a pool against the first one.

    A win rate is P(preferred), a tie counting half; where answers are right or wrong,
    ``2 * win rate - 1`` is by how much one model's expected score is above the other's. A pair is
    the case of two: the dearer one answers where its win rate is at least
    ``(1 + weight * (its dollars - the other's)) / 2``.

    Parameters
    ----------
    router : Router
        Of a kind that knows any pair (`Router.any_pair`), unless the pool is its own pair.
    models : sequence of str
        As the router's battles name them; the first, best the cheapest, is what the others are
        held against.

    Raises
    ------
    UsageError
        If the router knows one pair only, or too little of a model.
    """

    def __init__(self, router: Router, models: Sequence[str]) -> None:
        self.models = tuple(models)
        first = self.models[0]
        self._routers = [router.for_pair(Pair(one, first)) for one in self.models[1:]]

    def quality(self, prompts: Sequence[str]) -> Floats:
        """Return how much better than the first each model is expected to be, (n, m) in [-1, 1]."""
        out = np.zeros((len(prompts), len(self.models)))
        for column, router in enumerate(self._routers, start=1):
            out[:, column] = 2.0 * router.win_rate(prompts) - 1.0
        return out


def best_at(quality: Floats, usd: Floats, weight: float) -> NDArray[np.int64]:
    """Return the column (n,) with the highest quality - weight x dollars of each row (n, m)."""
    return np.asarray((quality - weight * usd).argmax(axis=1), dtype=np.int64)
