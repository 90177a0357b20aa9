"""Hybrid-LLM: an encoder that says whether the small model will do (Ding et al. 2024).

arXiv 2404.14618, section 3. With the quality gap ``H(x) = q(small) - q(large)`` of a query, an
encoder is trained by binary cross-entropy on one of three labels:

- deterministic: ``1[H(x) >= 0]``, of the one answer that was recorded;
- probabilistic: ``Pr[H(x) >= 0]``, answers being drawn anew each time;
- transformed: ``Pr[H(x) >= -t*]``, ``t* = argmax_t 1/N^2 sum_ij |y_i(t) - y_j(t)|``: where the
  small model is seldom as good, the labels are all near nothing, and a slack of t* spreads them.

Tables record one answer of each model to a query. So the probabilities are shares over the
queries most like it, itself among them, instead of over ten answers of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from routellm.embeddings.base import Encoder
from routellm.errors import TrainingError
from routellm.evaluation.metrics import Floats, exact_curve
from routellm.policies.encoder_score import EncoderScore
from routellm.policies.pair import at_thresholds, columns_of, pair_of, thresholds
from routellm.policies.policy import Point, Policy
from routellm.policies.recorded import Recorded
from routellm.routers.base import Pair
from routellm.settings import ScorerSettings

LABELS = ("deterministic", "probabilistic", "transformed")
DROPS = (0.01, 0.02, 0.04)  # of the large model's quality, as in the paper's tables
_NEIGHBOURS = 10  # the paper draws ten answers
_SLACKS = 201

Quality = Callable[[Recorded, int], Floats]  # a table and a column to scores (n,)


def recorded_quality(table: Recorded, column: int) -> Floats:
    """Return what the table says: correctness, or a judge's preference."""
    return table.quality[:, column]


@dataclass
class GapEncoder:
    """One encoder with an output for each of the three labels, which three policies share.

    Attributes
    ----------
    quality : callable
        Scores an answer for the labels: `BartScore`, or the table's own scores, as ever where no
        answers were recorded.
    slack : float
        t*, in the units of `quality`.
    """

    encoder: Encoder
    between: Pair
    settings: ScorerSettings
    seed: int = 0
    quality: Quality = recorded_quality
    slack: float = field(default=0.0, init=False)
    pair: Pair | None = field(default=None, init=False)
    _score: EncoderScore | None = field(default=None, init=False)
    _of: tuple[str, ...] = field(default=(), init=False)
    _known: dict[tuple[str, ...], Floats] = field(default_factory=dict, init=False)

    def fit(self, table: Recorded) -> None:
        """Learn from a table's rows, once however many policies ask."""
        if self._of == table.ids:
            return
        pair = pair_of(table, self.between)
        strong, weak = columns_of(table, pair)
        quality = self.quality if table.answers else recorded_quality  # what it reads is not there
        gap = quality(table, weak) - quality(table, strong)
        near = neighbours(self.encoder.encode(table.prompts))
        self.slack = slack(gap[near])
        labels = np.column_stack(
            [gap >= 0, (gap[near] >= 0).mean(axis=1), (gap[near] >= -self.slack).mean(axis=1)]
        ).astype(np.float64)
        score = EncoderScore("Hybrid-LLM", self.settings, len(LABELS), self.seed)
        score.fit([(p,) for p in table.prompts], labels, np.arange(len(table)))
        self._score, self.pair, self._of, self._known = score, pair, table.ids, {}

    def will_do(self, table: Recorded, label: str) -> Floats:
        """Return how likely (n,) the small model will do, by the output for a label."""
        assert self._score is not None, "fit it first"
        if table.ids not in self._known:
            self._known[table.ids] = self._score.score([(p,) for p in table.prompts])
        return self._known[table.ids][:, LABELS.index(label)]


@dataclass
class HybridLLM(Policy):
    """Asks the small model where it is likely to do, at thresholds from never to always."""

    gap: GapEncoder
    label: str
    _thresholds: Floats = field(default_factory=lambda: np.empty(0), init=False)

    def fit(self, table: Recorded, held: Recorded) -> None:
        self.gap.fit(table)
        self.trained_on = frozenset(table.ids + held.ids)
        self._thresholds = thresholds(1.0 - self.gap.will_do(held, self.label))

    def answer(self, table: Recorded) -> Sequence[Point]:
        rates, strong, weak = self._read(table)
        return at_thresholds(table, rates, self._thresholds, strong, weak)

    def routed(self, table: Recorded) -> tuple[Floats, Floats, Floats] | None:
        rates, strong, weak = self._read(table)
        return rates, table.quality[:, strong], table.quality[:, weak]

    def figures(self, points: Sequence[Point], table: Recorded, weight: Floats) -> dict[str, float]:
        rates, strong, weak = self._read(table)
        routed = rates, table.quality[:, strong], table.quality[:, weak]
        return {
            f"cost_advantage_{drop * 100:.0f}": cost_advantage(*routed, weight, drop)
            for drop in DROPS
        }

    def _read(self, table: Recorded) -> tuple[Floats, int, int]:
        assert self.gap.pair is not None, "fit it first"
        return 1.0 - self.gap.will_do(table, self.label), *columns_of(table, self.gap.pair)


def cost_advantage(
    win_rates: Floats, strong: Floats, weak: Floats, weight: Floats, drop: float
) -> float:
    """Return the largest share of queries that the small model can take (section 4.1).

    At which quality is at most a share `drop` below the large model's: 1 is all of them. Read
    from the exact curve, as CPT is.
    """
    large, small = np.average(strong, weights=weight), np.average(weak, weights=weight)
    needed = (1.0 - drop) * large
    if needed <= small:
        return 1.0
    curve = exact_curve(win_rates, strong, weak, weight)
    return 1.0 - curve.cpt((needed - small) / (large - small))


def slack(gaps: Floats) -> float:
    """Return t*, that spreads the labels ``share of gaps >= -t`` (n, k) most (equation 3).

    The smallest of those that spread them alike; 0 where nothing spreads them more, as where
    answers are right or wrong and a gap is a whole one.
    """
    most = max(0.0, float(-gaps.min()))
    tried = np.linspace(0.0, most, _SLACKS)
    spread = [_spread((gaps >= -t).mean(axis=1)) for t in tried]
    best = int(np.argmax(spread))
    return float(tried[best]) if spread[best] > spread[0] + 1e-9 else 0.0


def _spread(y: Floats) -> float:
    """Return the mean of |y_i - y_j| over all i and j, of y (n,)."""
    n = len(y)
    return float(2.0 * (np.sort(y) * (2 * np.arange(n) - n + 1)).sum() / n**2)


def neighbours(vectors: NDArray[np.float32], k: int = _NEIGHBOURS) -> NDArray[np.int64]:
    """Return the rows (n, k) most like each of unit vectors (n, d), itself first."""
    from sklearn.neighbors import NearestNeighbors

    if len(vectors) < k:
        raise TrainingError(f"Hybrid-LLM cannot learn from {len(vectors)} rows: give at least {k}")
    found = NearestNeighbors(n_neighbors=k).fit(vectors)
    return np.asarray(found.kneighbors(vectors, return_distance=False), dtype=np.int64)
