"""Our routers as policies: one of the kinds of `routellm.routers`, on a pair of a pool's models.

The router learns from golden labels: on each training row, of every two models the one that scored
higher wins.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from routellm.embeddings.base import Encoder
from routellm.errors import TrainingError
from routellm.evaluation.metrics import Floats
from routellm.policies.policy import Point, Policy, asked_once
from routellm.policies.recorded import Recorded
from routellm.routers.base import Pair, Router, TrainingBattles

_VALIDATION = 5  # every fifth prompt is kept to choose by
_THRESHOLDS = 41


@dataclass
class PairRouter(Policy):
    """A router kind at thresholds from nothing sent to strong to everything.

    Attributes
    ----------
    between : Pair
        Where a table lacks one of the two, strong is its best model in training, weak its cheapest.
    """

    kind: str
    encoder: Encoder
    between: Pair
    seed: int = 0
    router: Router | None = field(default=None, init=False)
    _thresholds: Floats = field(default_factory=lambda: np.empty(0), init=False)

    def fit(self, table: Recorded) -> None:
        from routellm.training import train

        pair = self.between
        if not {pair.strong, pair.weak} <= set(table.models):
            pair = Pair(table.models[table.best()], table.models[table.cheapest()])
        if pair.strong == pair.weak:
            raise TrainingError(
                f"on {table.name} {pair.strong} is both the best and the cheapest model: there is "
                "nothing to route between"
            )
        self.router, _ = train(
            self.kind, battles_of(table, pair, self.encoder), self.encoder, seed=self.seed
        )
        self.trained_on = frozenset(table.ids)
        rates = self.router.win_rate(table.prompts)
        edges = np.quantile(rates, np.linspace(1.0, 0.0, _THRESHOLDS)[1:-1])
        self._thresholds = np.array([np.inf, *np.unique(edges)[::-1], -np.inf])

    def answer(self, table: Recorded) -> Sequence[Point]:
        rates, strong, weak = self._read(table)
        return [
            asked_once(table, np.where(rates >= at, strong, weak), f"threshold {at:.3f}")
            for at in self._thresholds
        ]

    def routed(self, table: Recorded) -> tuple[Floats, Floats, Floats] | None:
        rates, strong, weak = self._read(table)
        return rates, table.quality[:, strong], table.quality[:, weak]

    def _read(self, table: Recorded) -> tuple[Floats, int, int]:
        assert self.router is not None, "fit it first"
        pair = self.router.pair
        strong, weak = table.models.index(pair.strong), table.models.index(pair.weak)
        return self.router.win_rate(table.prompts), strong, weak


def battles_of(table: Recorded, pair: Pair, encoder: Encoder) -> TrainingBattles:
    """Return golden battles: every two models on every row, equal scores being a tie."""
    columns = list(itertools.combinations(range(len(table.models)), 2))
    a, b = np.array(columns).T
    gap = np.sign(table.quality[:, a] - table.quality[:, b])
    n, k = gap.shape
    prompt = np.repeat(np.arange(n), k)
    return TrainingBattles(
        prompts=table.prompts,
        embeddings=encoder.encode(table.prompts),
        prompt=prompt,
        models=table.models,
        model_a=np.tile(a, n),
        model_b=np.tile(b, n),
        preference_a=(gap.ravel() + 1.0) / 2.0,
        weight=np.ones(n * k),
        label_kind=np.full(n * k, "golden"),
        validation=prompt % _VALIDATION == 0,
        pair=pair,
    )
