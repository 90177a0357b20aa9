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
_MOST_BATTLES = 10_000  # a pool of nine has 36 a row: what others' battles add is soon little
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

    def fit(self, table: Recorded, held: Recorded) -> None:
        from routellm.training import train

        pair = pair_of(table, self.between)
        battles = battles_of(table, pair, self.encoder, self.seed)
        self.router, _ = train(self.kind, battles, self.encoder, seed=self.seed)
        self.trained_on = frozenset(table.ids + held.ids)
        self._thresholds = thresholds(self.router.win_rate(held.prompts))

    def answer(self, table: Recorded) -> Sequence[Point]:
        assert self.router is not None, "fit it first"
        strong, weak = columns_of(table, self.router.pair)
        rates = self.router.win_rate(table.prompts)
        return at_thresholds(table, rates, self._thresholds, strong, weak)

    def routed(self, table: Recorded) -> tuple[Floats, Floats, Floats] | None:
        assert self.router is not None, "fit it first"
        strong, weak = columns_of(table, self.router.pair)
        rates = self.router.win_rate(table.prompts)
        return rates, table.quality[:, strong], table.quality[:, weak]


def pair_of(table: Recorded, between: Pair) -> Pair:
    """Return the two models to route between: as asked or, where one lacks, by the table itself.

    Raises
    ------
    TrainingError
        If the two are one, as where a table's best model is its cheapest.
    """
    pair = between
    if not {between.strong, between.weak} <= set(table.models):
        pair = Pair(table.models[table.best()], table.models[table.cheapest()])
    if pair.strong == pair.weak:
        raise TrainingError(
            f"on {table.name} {pair.strong} is to be both strong and weak: there is nothing to "
            "route between"
        )
    return pair


def columns_of(table: Recorded, pair: Pair) -> tuple[int, int]:
    """Return the columns of strong and weak."""
    return table.models.index(pair.strong), table.models.index(pair.weak)


def pair_columns(table: Recorded, between: Pair) -> tuple[int, int]:
    """Return the columns of strong and weak, chosen as `pair_of` does."""
    return columns_of(table, pair_of(table, between))


def thresholds(rates: Floats) -> Floats:
    """Return thresholds from nothing sent to strong to everything, at quantiles of win rates."""
    edges = np.quantile(rates, np.linspace(1.0, 0.0, _THRESHOLDS)[1:-1])
    return np.array([np.inf, *np.unique(edges)[::-1], -np.inf])


def at_thresholds(
    table: Recorded, rates: Floats, at: Floats, strong: int, weak: int
) -> Sequence[Point]:
    """Return the points that send to strong what has a win rate of a threshold or more."""
    return [
        asked_once(table, np.where(rates >= one, strong, weak), f"threshold {one:.3f}")
        for one in at
    ]


def battles_of(table: Recorded, pair: Pair, encoder: Encoder, seed: int) -> TrainingBattles:
    """Return golden battles: two models on a row, the higher score winning, equal ones a tie.

    The pair's own battle of every row and, of the battles that one of the two has with others, as
    many as make `_MOST_BATTLES` with them, drawn at random.
    """
    own = columns_of(table, pair)
    columns = itertools.combinations(range(len(table.models)), 2)
    near = [one for one in columns if set(one) & set(own)]
    a, b = np.array(near).T
    n, k = len(table), len(near)
    prompt, which = np.divmod(np.arange(n * k), k)
    is_own = np.array([set(one) == set(own) for one in near])[which]
    others = np.flatnonzero(~is_own)
    room = min(max(0, _MOST_BATTLES - n), len(others))
    drawn = np.random.default_rng(seed).choice(others, room, replace=False)
    rows = np.sort(np.concatenate([np.flatnonzero(is_own), drawn]))
    prompt, a, b = prompt[rows], a[which[rows]], b[which[rows]]
    gap = np.sign(table.quality[prompt, a] - table.quality[prompt, b])
    return TrainingBattles(
        prompts=table.prompts,
        embeddings=encoder.encode(table.prompts),
        prompt=prompt,
        models=table.models,
        model_a=a,
        model_b=b,
        preference_a=(gap + 1.0) / 2.0,
        weight=np.ones(len(rows)),
        label_kind=np.full(len(rows), "golden"),
        validation=prompt % _VALIDATION == 0,
        pair=pair,
    )
