"""Cascades: ask a model, look at its answer, stop or go on to the next one.

FrugalGPT (Chen et al. 2023, arXiv 2305.05176, section 3) learns what looks at the answer, and
searches the order of models and the scores at which to stop. RouterBench (Hu et al. 2024, arXiv
2403.12031, section 4.3) goes by price, with a judge that errs at a given rate.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from routellm.evaluation.metrics import Floats
from routellm.policies.answer_score import AnswerScore
from routellm.policies.hull import hull, worth_asking
from routellm.policies.policy import Point, Policy
from routellm.policies.recorded import Recorded

_LENGTH = 3  # as in the paper, where longer ones brought little
_STOPS = 8  # scores to stop at that are tried for each model


@dataclass(frozen=True)
class Looked:
    """What looking at answers gave and cost.

    Attributes
    ----------
    good : ndarray (n, m)
        Score of each model's answer: the cascade stops where it is high enough.
    usd : ndarray (n, m)
    seconds : float
        Of one look.
    """

    good: Floats
    usd: Floats
    seconds: float


@dataclass(frozen=True)
class Cascade:
    """Models by column, in the order they are asked, and the score to stop at after each but one.

    One score less than models: the last answer is taken as it is.
    """

    order: tuple[int, ...]
    stop_at: tuple[float, ...]

    def on(self, table: Recorded, looked: Looked) -> Point:
        """Return what it does on a table."""
        n = len(table)
        quality, usd, calls, seconds = np.zeros(n), np.zeros(n), np.zeros(n), np.zeros(n)
        going = np.ones(n, dtype=bool)
        for i, column in enumerate(self.order):
            usd += going * table.usd[:, column]
            seconds += going * table.latency_s[:, column]
            calls += going
            stops = going
            if i < len(self.stop_at):
                usd += going * looked.usd[:, column]
                seconds += going * looked.seconds
                stops = going & (looked.good[:, column] >= self.stop_at[i])
            quality[stops] = table.quality[stops, column]
            going = going & ~stops
        models = [table.models[c] for c in self.order]
        told = [f"{m} (stop at {at:.2f})" for m, at in zip(models, self.stop_at, strict=False)]
        return Point(" > ".join([*told, models[-1]]), quality, usd, calls, seconds)


@dataclass
class FrugalGPT(Policy):
    """The cascades that were best for their price on held rows, by a trained answer scorer.

    Of the models that are worth asking by themselves in training.
    """

    reads_answers: ClassVar[bool] = True
    score: AnswerScore
    length: int = _LENGTH
    models: tuple[str, ...] = field(default=(), init=False)
    cascades: tuple[Cascade, ...] = field(default=(), init=False)

    def fit(self, table: Recorded, held: Recorded) -> None:
        self.models = worth_asking(table)
        self.score.fit(table.of(self.models))
        self.trained_on = frozenset(table.ids + held.ids)
        held = held.of(self.models)
        self.cascades = search(held, self._looked(held), self.length)

    def answer(self, table: Recorded) -> Sequence[Point]:
        table = table.of(self.models)
        looked = self._looked(table)
        return [one.on(table, looked) for one in self.cascades]

    def _looked(self, table: Recorded) -> Looked:
        seconds = self.score.settings.seconds
        return Looked(self.score.scores(table), self.score.usd(table), seconds)


def search(table: Recorded, looked: Looked, length: int) -> tuple[Cascade, ...]:
    """Return the cascades of at most `length` models on the hull of all, the cheapest first.

    Every order of models is tried with every combination of scores to stop at: for each budget in
    dollars the best one lies on the hull, mixing two of them where it lies between.
    """
    candidates = list(_candidates(table, looked, length))
    points = np.array([_mean(table, looked, one) for one in candidates])
    x, y = hull(points[:, 0], points[:, 1])
    found = []
    for usd, quality in zip(x, y, strict=True):
        at = np.flatnonzero((points[:, 0] == usd) & (points[:, 1] == quality))[0]
        found.append(candidates[at])
    return tuple(found)


def _candidates(table: Recorded, looked: Looked, length: int) -> Iterator[Cascade]:
    m = len(table.models)
    share = np.arange(1, _STOPS + 1) / (_STOPS + 1)
    grid = np.quantile(looked.good, share, axis=0)  # (stops, m)
    stops = [np.unique(grid[:, c]).tolist() for c in range(m)]
    for k in range(1, min(length, m) + 1):
        for order in itertools.permutations(range(m), k):
            for at in itertools.product(*(stops[c] for c in order[:-1])):
                yield Cascade(order, at)


def _mean(table: Recorded, looked: Looked, one: Cascade) -> tuple[float, float]:
    """Return mean dollars and quality, by as few steps as can be: there are many to try."""
    usd = quality = 0.0
    going: NDArray[np.bool_] | None = None  # all
    rows: NDArray[np.int64] = np.arange(len(table))
    for i, column in enumerate(one.order):
        usd += table.usd[rows, column].sum()
        if i == len(one.stop_at):
            quality += table.quality[rows, column].sum()
            break
        usd += looked.usd[rows, column].sum()
        going = looked.good[rows, column] < one.stop_at[i]
        quality += table.quality[rows[~going], column].sum()
        rows = rows[going]
    return usd / len(table), quality / len(table)


@dataclass
class JudgedCascade(Policy):
    """RouterBench's: by price, until a judge that errs in a share of cases says good enough.

    SIMULATED: the judge knows the recorded score, and errs by chance. Its settings are how many
    models may be asked, of those worth asking by themselves in training; its own cost is not known
    and not counted, as in the paper.
    """

    error_rate: float
    seed: int = 0
    models: tuple[str, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        self.simulated = True

    def fit(self, table: Recorded, held: Recorded) -> None:
        self.models = worth_asking(table)
        self.trained_on = frozenset(table.ids + held.ids)

    def answer(self, table: Recorded) -> Sequence[Point]:
        table = table.of(self.models)
        columns = tuple(range(len(self.models)))
        good = table.quality >= 0.5
        wrong = draws(table, self.seed) < self.error_rate
        looked = Looked((good ^ wrong).astype(np.float64), np.zeros_like(table.usd), 0.0)
        return [
            Cascade(columns[:k], (0.5,) * (k - 1)).on(table, looked)
            for k in range(1, len(columns) + 1)
        ]


def draws(table: Recorded, seed: int) -> Floats:
    """Return a number in [0, 1) for each row and model (n, m) that its own content decides."""
    out = np.empty((len(table), len(table.models)))
    for i, row in enumerate(table.ids):
        for j, model in enumerate(table.models):
            digest = hashlib.sha256(f"{seed} {row} {model}".encode()).digest()
            out[i, j] = int.from_bytes(digest[:8], "big") / 2**64
    return out
