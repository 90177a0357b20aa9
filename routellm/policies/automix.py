"""AutoMix: the small model answers and verifies itself; a meta-verifier decides on the large one.

Aggarwal et al. 2024, arXiv 2310.12963. Self-verification is noisy, so its confidence is not taken
at its word: `ThresholdAutoMix` asks the large model below a threshold, `PomdpAutoMix` by what
training rows say of each confidence.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from routellm.errors import TrainingError, UsageError
from routellm.evaluation.metrics import Floats
from routellm.policies.ibc import ibc
from routellm.policies.pair import columns_of, pair_of
from routellm.policies.policy import Point, Policy, asked_once
from routellm.policies.prices import price_of
from routellm.policies.recorded import Recorded
from routellm.policies.verify import GOOD, Verified, Verifier
from routellm.routers.base import Pair
from routellm.settings import Settings

_STATES = 3  # simple, complex, unsolvable
_NEVER, _ALWAYS = "the small model alone", "the large model alone"


@dataclass
class AutoMix(Policy):
    """What both meta-verifiers share: what is asked, and what it costs.

    One after the other: the small model's answer, its k verifications side by side, and the large
    model where asked. The two ends ask one model and verify nothing, for nothing hangs on it.

    Attributes
    ----------
    between : Pair
        Where a table lacks one of the two, strong is its best model in training, weak its cheapest.
    settings : Settings
        Verifications are priced and timed as the small model's calls are there.
    """

    reads_answers: ClassVar[bool] = True
    between: Pair
    verifier: Verifier
    settings: Settings
    pair: Pair | None = field(default=None, init=False)
    _papers: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.simulated = self.verifier.simulated

    def fit(self, table: Recorded, held: Recorded) -> None:
        """Learn when to ask the large model.

        Raises
        ------
        TrainingError
            If there are no rows, or the best model is the cheapest.
        """
        if not len(table):
            raise TrainingError(f"{self.name} cannot learn from 0 rows of {table.name}: give some")
        self.pair = pair_of(table, self.between)
        self.learn(table)
        self._papers = self._best_for_its_price(held) if len(held) else None
        self.trained_on = frozenset(table.ids + held.ids)

    def learn(self, table: Recorded) -> None:
        """Learn from training rows. A threshold needs none."""
        return

    @abstractmethod
    def asks(self) -> Sequence[tuple[str, NDArray[np.bool_]]]:
        """Return each setting: its words, and at which confidence, 0/k to k/k, large is asked.

        A setting that asks at none or at all, (k + 1,), verifies nothing.
        """

    def answer(self, table: Recorded) -> Sequence[Point]:
        large, small = self._columns(table)
        verified = self.verifier.verify(table, small)
        at = self._nearest(verified)
        usd, seconds = self._verifying(verified, table.models[small])
        usd, seconds = usd + table.usd[:, small], seconds + table.latency_s[:, small]
        points = []
        for setting, ask in [
            (_NEVER, np.zeros(self.verifier.samples + 1, dtype=bool)),
            *self.asks(),
            (_ALWAYS, np.ones(self.verifier.samples + 1, dtype=bool)),
        ]:
            if ask.all() or not ask.any():
                column = np.full(len(table), large if ask.all() else small)
                points.append(asked_once(table, column, setting))
                continue
            on = ask[at]  # (n,)
            points.append(
                Point(
                    setting,
                    np.where(on, table.quality[:, large], table.quality[:, small]),
                    usd + on * table.usd[:, large],
                    1.0 + verified.calls + on,
                    seconds + on * table.latency_s[:, large],
                )
            )
        return points

    def figures(self, points: Sequence[Point], table: Recorded, weight: Floats) -> dict[str, float]:
        """Return ``delta_ibc`` in percent, of the verifying setting where it was best on held rows.

        So the paper chooses its setting too. Nothing, if no setting verifies.
        """
        if self._papers is None:
            return {}
        return {"delta_ibc": self._delta(points[self._papers], table, weight)}

    def _best_for_its_price(self, held: Recorded) -> int | None:
        """Return the position of the verifying setting with the highest delta IBC, if any."""
        points, once = self.answer(held), np.ones(len(held))
        verifying = [i for i, one in enumerate(points) if one.calls.max() > 1]
        deltas = [np.nan_to_num(self._delta(points[i], held, once), nan=-np.inf) for i in verifying]
        return verifying[int(np.argmax(deltas))] if verifying else None

    def _delta(self, point: Point, table: Recorded, weight: Floats) -> float:
        large, small = self._columns(table)

        def mean(quality: Floats, usd: Floats) -> tuple[float, float]:
            total = weight.sum()
            return float(weight @ quality / total), float(weight @ usd / total)

        alone = [mean(table.quality[:, one], table.usd[:, one]) for one in (small, large)]
        found = ibc(*mean(point.quality, point.usd), small=alone[0], large=alone[1])
        return found.delta_percent

    def _columns(self, table: Recorded) -> tuple[int, int]:
        assert self.pair is not None, "fit it first"
        return columns_of(table, self.pair)

    def _nearest(self, verified: Verified) -> NDArray[np.int64]:
        """Return the nearest of 0/k to k/k (n,), as a number of votes.

        It is another than the yes votes where some could not be read.
        """
        return np.floor(verified.confidence * self.verifier.samples + 0.5).astype(np.int64)

    def _verifying(self, verified: Verified, model: str) -> tuple[Floats, Floats]:
        """Return dollars and seconds (n,) of the verifications, as the small model's calls."""
        price, latency = price_of(model, self.settings), self.settings.policies.latency_of(model)
        if price is None:
            raise UsageError(
                f"{model} has no price, so its verifications have none: set input and output, in "
                f'dollars per million tokens, in [prices."{model}"]'
            )
        usd = (verified.input_tokens * price.input + verified.output_tokens * price.output) / 1e6
        seconds = verified.turns * latency.first_token_s + verified.longest_tokens * latency.token_s
        return usd, seconds


@dataclass
class ThresholdAutoMix(AutoMix):
    """Asks the large model where the confidence is below a threshold."""

    def asks(self) -> Sequence[tuple[str, NDArray[np.bool_]]]:
        k = self.verifier.samples
        return [(f"confidence below {i}/{k}", np.arange(k + 1) < i) for i in range(1, k + 1)]


@dataclass
class PomdpAutoMix(AutoMix):
    """Asks the large model where that is worth its price, as far as the confidence tells.

    The paper's states, of which the confidence c is a noisy observation: *simple* (the small model
    is right), *complex* (only the large one is) and *unsolvable* (neither is). By Bayes
    b(s) ~ P(c | s) P(s), and the large model is asked where

        sum_s b(s) (Q_large(s) - Q_small(s)) > lambda x its mean dollars

    P(s), Q and P(c | s) are shares and means of training rows, the last with one row added to each
    confidence. With one observation and one action there is nothing to plan. A confidence that
    mostly *unsolvable* questions have is not worth asking at, which no threshold can say.
    """

    gain: Floats = field(default_factory=lambda: np.empty(0), init=False)
    _usd: float = field(default=0.0, init=False)

    def learn(self, table: Recorded) -> None:
        large, small = self._columns(table)
        at = self._nearest(self.verifier.verify(table, small))
        better = table.quality[:, large] - table.quality[:, small]
        right = table.quality[:, [small, large]] >= GOOD
        state = np.where(right[:, 0], 0, np.where(right[:, 1], 1, 2))
        rows = np.zeros((_STATES, self.verifier.samples + 1))  # (states, confidences)
        np.add.at(rows, (state, at), 1.0)
        of_state = rows.sum(axis=1)
        seen = (rows + 1.0) / (rows + 1.0).sum(axis=1, keepdims=True)  # P(c | s)
        belief = seen * (of_state / len(table))[:, None]
        belief /= belief.sum(axis=0)  # b(s), by confidence
        gain_of_state = np.bincount(state, better, _STATES) / np.maximum(of_state, 1.0)
        self.gain = gain_of_state @ belief
        self._usd = float(table.usd[:, large].mean())

    def asks(self) -> Sequence[tuple[str, NDArray[np.bool_]]]:
        # every lambda at which the answer changes, so that no setting is passed over
        worth = np.unique(self.gain[self.gain > 0])[::-1]
        return [(f"{one / self._usd:.3g} per dollar", self.gain >= one) for one in worth.tolist()]
