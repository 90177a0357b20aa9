"""Policies that ask several models at once and keep the best answer: ranked in pairs, or scored.

LLM-Blender (Jiang et al. 2023, arXiv 2306.02561) ranks by PairRanker; reward-model selection (best
of n) scores each answer by itself. Both pay for every answer, also those that are thrown away.
"""

from __future__ import annotations

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


@dataclass
class BestOfN(Policy):
    """Asks the n cheapest models, and keeps the answer with the highest score; n from 1 to all.

    Of the models that are worth asking by themselves in training, as `LLMBlender`.
    """

    reads_answers: ClassVar[bool] = True
    score: AnswerScore
    models: tuple[str, ...] = field(default=(), init=False)

    def fit(self, table: Recorded, held: Recorded) -> None:
        self.models = worth_asking(table)
        self.score.fit(table.of(self.models))
        self.trained_on = frozenset(table.ids + held.ids)

    def answer(self, table: Recorded) -> Sequence[Point]:
        table, columns = table.of(self.models), range(len(self.models))
        scores, usd = self.score.scores(table), self.score.usd(table)
        out = []
        for n in range(1, len(columns) + 1):
            some = np.array(columns[:n])
            kept = some[scores[:, some].argmax(axis=1)]
            looked = n > 1  # one answer is not chosen from
            seconds = looked * n * self.score.settings.seconds
            out.append(
                asked_together(
                    table, some.tolist(), kept, looked * usd[:, some].sum(axis=1), seconds
                )
            )
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
class LLMBlender(Policy):
    """Asks the n cheapest models, and keeps the answer that PairRanker puts first; no fusing.

    The winner so far meets the next answer (section 3.3, the paper's single bubble sort): n - 1
    comparisons a query instead of all pairs.
    """

    reads_answers: ClassVar[bool] = True
    ranker: PairRanker
    models: tuple[str, ...] = field(default=(), init=False)
    _known: dict[tuple[str, ...], Sequence[Point]] = field(default_factory=dict, init=False)

    def fit(self, table: Recorded, held: Recorded) -> None:
        self.models = worth_asking(table)
        self.ranker.fit(table.of(self.models))
        self.trained_on = frozenset(table.ids + held.ids)
        self._known = {}

    def answer(self, table: Recorded) -> Sequence[Point]:
        if table.ids not in self._known:
            self._known[table.ids] = self._answer(table)
        return self._known[table.ids]

    def _answer(self, table: Recorded) -> Sequence[Point]:
        table, columns = table.of(self.models), range(len(self.models))
        o = self.ranker.settings
        kept = np.full(len(table), columns[0])
        usd, seconds, rows = np.zeros(len(table)), 0.0, np.arange(len(table))
        out = [asked_together(table, columns[:1], kept, usd, seconds)]
        for n, column in enumerate(columns[1:], start=2):
            new = np.full(len(table), column)
            read = table.read_tokens + table.written_tokens[rows, kept]
            read = np.minimum(read + table.written_tokens[:, column], o.max_length)
            usd = usd + 2 * read * o.usd_per_million / 1e6  # in both orders, side by side
            seconds += o.seconds
            kept = np.where(self.ranker.better(table, kept, new) >= 0.5, kept, new)
            out.append(asked_together(table, columns[:n], kept, usd, seconds))
        return out
