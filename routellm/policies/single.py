"""Policies that need no router: one model for all, mixes of such (the zero router), an oracle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from routellm.evaluation.metrics import Floats
from routellm.policies.policy import Point, Policy, asked_once
from routellm.policies.recorded import Recorded
from routellm.routers.pool import best_at

_WEIGHTS = 31


class ZeroRouter(Policy):
    """Each model alone; its hull is what drawing a model blindly reaches (RouterBench, 3.2)."""

    def __init__(self) -> None:
        super().__init__("zero router")

    def answer(self, table: Recorded) -> Sequence[Point]:
        order = np.argsort(table.usd.mean(axis=0), kind="stable")
        return [
            asked_once(table, np.full(len(table), column), table.models[column]) for column in order
        ]


class Oracle(Policy):
    """Knows every answer's score: the cheapest of the best, at each weight of money.

    No router can do better at its price; it says what there is to be gained.
    """

    def __init__(self) -> None:
        super().__init__("oracle")

    def answer(self, table: Recorded) -> Sequence[Point]:
        return [
            asked_once(table, best_at(table.quality, table.usd, weight), f"{weight:.3g} per dollar")
            for weight in weights(table.usd.mean(axis=0))
        ]


def weights(usd: Floats) -> list[float]:
    """Return weights of a dollar against a point of quality, the heaviest first.

    The heaviest sends all to the cheapest model, and the lightest only breaks ties. `usd` (m,) is
    what each model costs on average.
    """
    spread = float(usd.max() - usd.min()) or 1.0
    return [float(one) / spread for one in np.geomspace(100.0, 1e-3, _WEIGHTS)]
