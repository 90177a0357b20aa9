"""``knn``: the preferences on similar prompts, smoothly weighted by similarity.

Only battles of the pair count (or, where the pair met too rarely, of models in the same tiers):
a battle between two other models says who of *those two* does better on a prompt, and on real
data pooling the two drowned what the pair's own battles say. Labels of different kinds
(a judge's vote, a known right answer) sit at different levels, so each kind's mean is taken off
before prompts are compared and their common level is put back after.

The win rate is ``level + sum_i w_i r_i / (sum_i w_i + prior)`` with
``w_i = exp(sharpness * (cos(q, q_i) - 1))``; the sharpness is chosen by leave-one-out error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routellm.embeddings.base import Progress
from routellm.routers.base import Arrays, FitReport, Router, TrainingBattles

SHARPNESS = (2.5, 5.0, 10.0, 20.0, 40.0)
_BLOCK = 1024  # prompts compared at once


class KNearestRouter(Router):
    """Kernel-weighted nearest neighbours.

    Attributes
    ----------
    embeddings_ : ndarray float32 (u, d)
        Prompts on which the pair met.
    residual_, count_ : ndarray float64 (u,)
        Weighted sum of preferences for strong above their label kind's mean, and of weights.
    level_ : float
        Mean preference for strong.
    sharpness_ : float
    """

    kind = "knn"

    def fit(
        self,
        battles: TrainingBattles,
        *,
        rng: np.random.Generator,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
    ) -> FitReport:
        rows, preference = battles.of_pair()
        weight, kind = battles.weight[rows], battles.label_kind[rows]
        self.level_ = float(np.average(preference, weights=weight))
        above = preference.copy()
        for one in np.unique(kind):
            above[kind == one] -= np.average(preference[kind == one], weights=weight[kind == one])
        prompts, where = np.unique(battles.prompt[rows], return_inverse=True)
        self.embeddings_ = battles.embeddings[prompts]
        self.residual_ = np.bincount(where, weight * above, len(prompts))
        self.count_ = np.bincount(where, weight, len(prompts)).astype(np.float64)
        errors = {}
        for done, sharpness in enumerate(SHARPNESS, 1):
            self.sharpness_ = sharpness
            guess = self._smooth(self.embeddings_, leave_out_self=True)
            error = self.residual_ / self.count_ - guess
            errors[sharpness] = float(np.average(error**2, weights=self.count_))
            if progress:
                progress(done, len(SHARPNESS))
        self.sharpness_ = min(errors, key=lambda s: errors[s])
        return FitReport(
            params={"sharpness": self.sharpness_, "neighbours": len(prompts)},
            metrics={"leave_one_out_mse": errors[self.sharpness_], "pair_battles": len(rows)},
            history={"leave_one_out_mse_by_sharpness": list(errors.values())},
        )

    def _smooth(
        self, embeddings: NDArray[np.float32], *, leave_out_self: bool = False
    ) -> NDArray[np.float64]:
        out = np.empty(len(embeddings))
        # one battle at half the largest similarity: keeps far-off queries at the common level
        prior = np.exp(-0.5 * self.sharpness_)
        for start in range(0, len(embeddings), _BLOCK):
            block = embeddings[start : start + _BLOCK]
            similarity = (block @ self.embeddings_.T).astype(np.float64)  # (b, u)
            weight = np.exp(self.sharpness_ * (similarity - 1.0))
            if leave_out_self:
                at = np.arange(len(block))
                weight[at, start + at] = 0.0
            out[start : start + len(block)] = (weight @ self.residual_) / (
                weight @ self.count_ + prior
            )
        return out

    def score(self, prompts: Sequence[str], embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
        rate: NDArray[np.float64] = np.clip(self.level_ + self._smooth(embeddings), 0.0, 1.0)
        return rate

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        arrays: Arrays = {
            "embeddings": self.embeddings_,
            "residual": self.residual_,
            "count": self.count_,
        }
        return arrays, {"level": self.level_, "sharpness": self.sharpness_}

    def load_state(self, arrays: Mapping[str, NDArray[Any]], doc: dict[str, Any]) -> None:
        self.embeddings_ = arrays["embeddings"]
        self.residual_, self.count_ = arrays["residual"], arrays["count"]
        self.level_, self.sharpness_ = float(doc["level"]), float(doc["sharpness"])
