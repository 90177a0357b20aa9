"""Policies that ask several models at once and keep the best answer: ranked in pairs, or scored.

LLM-Blender (Jiang et al. 2023, arXiv 2306.02561) ranks by PairRanker; reward-model selection (best
of n) scores each answer by itself. Both pay for every answer, also those that are thrown away.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from routellm.evaluation.metrics import Floats
from routellm.policies.answer_score import AnswerScore
from routellm.policies.encoder_score import EncoderScore, Parts
from routellm.policies.hull import worth_asking
from routellm.policies.policy import Point, Policy
from routellm.policies.recorded import Recorded
from routellm.settings import ScorerSettings

_FEW = 5


def asked_together(
    table: Recorded,
    asked: Sequence[int],
    kept: NDArray[np.int64],
    usd: Floats,
    seconds: float,
) -> Point:
    """Return the point that asks the models `asked` side by side and keeps column `kept` (n,).

    `usd` (n,) and `seconds` are what choosing took.
    """
    rows, columns = np.arange(len(table)), list(asked)
    return Point(
        f"best of {len(columns)}: {', '.join(table.models[c] for c in columns)}",
        table.quality[rows, kept],
        table.usd[:, columns].sum(axis=1) + usd,
        np.full(len(table), float(len(columns))),
        table.latency_s[:, columns].max(axis=1) + seconds,
    )


def together(models: int) -> list[tuple[int, ...]]:
    """Return which of some models, by price, are asked together: every choice, all of them last.

    Of more than `_FEW` models the n cheapest, n from 1 to all: their choices are too many.

    >>> together(3)
    [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
    """
    columns = range(models)
    if models > _FEW:
        return [tuple(columns[:n]) for n in range(1, models + 1)]
    return [some for n in range(1, models + 1) for some in itertools.combinations(columns, n)]


@dataclass
class AskSeveral(Policy):
    """Asks several models side by side and keeps one answer; its settings are who is asked.

    Of the models that are worth asking by themselves in training.
    """

    reads_answers: ClassVar[bool] = True
    models: tuple[str, ...] = field(default=(), init=False)

    def fit(self, table: Recorded, held: Recorded) -> None:
        self.models = worth_asking(table)
        self.learn(table.of(self.models))
        self.trained_on = frozenset(table.ids + held.ids)

    @abstractmethod
    def learn(self, table: Recorded) -> None:
        """Learn to choose between the answers of a table's models."""

    def figures(self, points: Sequence[Point], table: Recorded, weight: Floats) -> dict[str, float]:
        """Return ``all_gain``: how much better than the best model the choice among all is."""
        gain = points[-1].quality - table.quality[:, table.best()]
        return {"all_gain": float(weight @ gain / weight.sum())}


@dataclass
class BestOfN(AskSeveral):
    """Keeps the answer with the highest score."""

    score: AnswerScore

    def learn(self, table: Recorded) -> None:
        self.score.fit(table)

    def answer(self, table: Recorded) -> Sequence[Point]:
        table = table.of(self.models)
        scores, usd = self.score.scores(table), self.score.usd(table)
        out = []
        for asked in together(len(self.models)):
            some = np.array(asked)
            kept = some[scores[:, some].argmax(axis=1)]
            looked = len(some) > 1  # one answer is not chosen from
            out.append(
                asked_together(
                    table, asked, kept, looked * usd[:, some].sum(axis=1),
                    looked * len(some) * self.score.settings.seconds,
                )
            )  # fmt: skip
        return out


@dataclass
class PairRanker:
    """Says which of two answers to a query is better: one encoder that reads all three.

    Section 3.2 of the paper: trained on pairs of candidates in both places, by cross-entropy, on
    which is preferred. Asked in both orders, so that its place is worth nothing to an answer.
    """

    settings: ScorerSettings
    seed: int = 0
    _score: EncoderScore | None = field(default=None, init=False)

    def fit(self, table: Recorded) -> None:
        """Learn from every two answers of each row of which one is better."""
        rng = np.random.default_rng(self.seed)
        m = len(table.models)
        a, b = np.array([(a, b) for a in range(m) for b in range(m) if a != b]).T
        row = np.repeat(np.arange(len(table)), len(a))
        a, b = np.tile(a, len(table)), np.tile(b, len(table))
        gap = table.quality[row, a] - table.quality[row, b]
        unlike = np.flatnonzero(gap)
        # as many as are trained on, before any text is made of them
        some = rng.permutation(unlike)[: self.settings.examples]
        self._score = EncoderScore("PairRanker", self.settings, 1, self.seed)
        texts = [_texts(table, int(row[i]), int(a[i]), int(b[i])) for i in some]
        self._score.fit(texts, (gap[some] > 0).astype(np.float64)[:, None], row[some])

    def better(self, table: Recorded, a: NDArray[np.int64], b: NDArray[np.int64]) -> Floats:
        """Return how likely (n,) the answer of column a (n,) beats that of column b (n,)."""
        assert self._score is not None, "fit it first"
        forth = [
            _texts(table, i, int(x), int(y)) for i, (x, y) in enumerate(zip(a, b, strict=True))
        ]
        back = [_texts(table, i, int(x), int(y)) for i, (x, y) in enumerate(zip(b, a, strict=True))]
        found = self._score.score([*forth, *back])[:, 0]
        return (found[: len(a)] + 1.0 - found[len(a) :]) / 2.0


def _texts(table: Recorded, i: int, a: int, b: int) -> Parts:
    first, second = table.answers[table.models[a]][i], table.answers[table.models[b]][i]
    return table.prompts[i], first, second


@dataclass
class LLMBlender(AskSeveral):
    """Keeps the answer that PairRanker puts first; nothing is fused.

    The winner so far meets the next answer (section 3.3, the paper's single bubble sort): n - 1
    comparisons a query instead of all pairs.
    """

    ranker: PairRanker
    _known: dict[tuple[str, ...], Sequence[Point]] = field(default_factory=dict, init=False)

    def learn(self, table: Recorded) -> None:
        self.ranker.fit(table)
        self._known = {}

    def answer(self, table: Recorded) -> Sequence[Point]:
        if table.ids not in self._known:
            self._known[table.ids] = self._answer(table.of(self.models))
        return self._known[table.ids]

    def _answer(self, table: Recorded) -> Sequence[Point]:
        n, m, o = len(table), len(self.models), self.ranker.settings
        rows = np.arange(n)
        wins, read = np.zeros((n, m, m), dtype=bool), np.zeros((n, m, m))
        for a, b in itertools.combinations(range(m), 2):
            better = self.ranker.better(table, np.full(n, a), np.full(n, b)) >= 0.5
            wins[:, a, b], wins[:, b, a] = better, ~better
            both = table.read_tokens + table.written_tokens[:, a] + table.written_tokens[:, b]
            read[:, a, b] = read[:, b, a] = np.minimum(both, o.max_length)
        out = []
        for asked in together(m):
            kept, usd = np.full(n, asked[0]), np.zeros(n)
            for column in asked[1:]:
                # in both orders, side by side
                usd = usd + 2 * read[rows, kept, column] * o.usd_per_million / 1e6
                kept = np.where(wins[rows, kept, column], kept, column)
            out.append(asked_together(table, asked, kept, usd, (len(asked) - 1) * o.seconds))
        return out
