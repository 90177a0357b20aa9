"""``sw_ranking``: Bradley–Terry over tiers of models, refitted for each query to similar battles.

The paper's section 4.2. A battle on prompt q' weighs ``gamma ** (1 + S(q, q'))`` for a query q,
where S is the cosine similarity divided by q's largest similarity to any training prompt (as
RouteLLM's code has it; the paper divides by q''s).

The likelihood depends on the weighted battles only through their sums by ordered pair of tiers,
so there is no need to refit a logistic regression over all battles for each query: one sparse
product gives the sums for a batch of queries, and one batched Newton solve the ten coefficients
of each. The result is the refit's own, to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import sparse

from routellm.embeddings.base import Progress
from routellm.errors import UsageError
from routellm.lineup import Lineup
from routellm.ratings import RIDGE, fit_bradley_terry, sigmoid
from routellm.routers.base import (
    Arrays,
    FitReport,
    Router,
    RouterOptions,
    TrainingBattles,
    cross_entropy,
)

_BLOCK_BYTES = 64 * 2**20  # of similarities held at once
_MAX_CHOICE_BATTLES = 2_000  # that weightings are chosen on: each one costs a query


class SWRankingOptions(RouterOptions):
    """Options of ``sw_ranking``."""

    gamma: float = Field(10.0, gt=1, description="base of a battle's weight (paper, section 4.2)")


class SWRankingRouter(Router):
    """Similarity-weighted ranking. Each query is solved for; only the battles' weighting is chosen.

    Attributes
    ----------
    embeddings_ : ndarray float32 (u, d)
        Unit vectors of the training prompts.
    wins_ : csr_matrix float64 (u, t * t)
        Weighted wins of tier i over tier j among a prompt's battles, at column ``i * t + j``.
    tiers_ : dict
        Tier of each model, 0 the best.
    """

    kind = "sw_ranking"
    Options = SWRankingOptions
    any_pair = True

    def fit(
        self,
        battles: TrainingBattles,
        *,
        rng: np.random.Generator,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
    ) -> FitReport:
        choices = battles.weightings()
        held, preference = battles.pair_validation()
        if len(held) > _MAX_CHOICE_BATTLES:
            some = np.linspace(0, len(held) - 1, _MAX_CHOICE_BATTLES).astype(np.int64)
            held, preference = held[some], preference[some]
        losses = []
        if len(choices) > 1 and len(held):
            train = replace(
                battles,
                **{
                    name: getattr(battles, name)[~battles.validation]
                    for name in ("prompt", "model_a", "model_b", "preference_a", "label_kind")
                },
                validation=np.zeros(int((~battles.validation).sum()), dtype=bool),
            )
            prompts, where = np.unique(battles.prompt[held], return_inverse=True)
            for weight in choices:
                self._solve(replace(train, weight=weight[~battles.validation]))
                rates = self.score([], battles.embeddings[prompts])[where]
                losses.append(cross_entropy(rates, preference))
        chosen = int(np.argmin(losses)) if losses else 0
        self._solve(replace(battles, weight=choices[chosen]))
        self.lineup_ = Lineup.of(battles)
        t = self.n_tiers_
        return FitReport(
            params={"gamma": self.options.gamma, "tiers": t, "ridge": RIDGE, "pair_raised": chosen},
            metrics={
                "strong_tier": float(self.tiers_[self.pair.strong]),
                "weak_tier": float(self.tiers_[self.pair.weak]),
            },
            history={"pair_validation_loss": losses},
        )

    def turn(self) -> None:
        strong, weak = (self.tiers_[name] for name in (self.pair.strong, self.pair.weak))
        if strong == weak:  # only the trained pair's tiers are kept apart
            raise UsageError(
                f"{self.pair.strong} and {self.pair.weak} share tier {strong + 1} of "
                f"{self.n_tiers_}, which a sw_ranking router cannot tell apart: use a version of "
                "another kind, or train one for this pair"
            )

    def _solve(self, battles: TrainingBattles) -> None:
        """Set the tiers and the win sums from battles."""
        tier = battles.tiers()
        self.tiers_ = {name: int(t) for name, t in zip(battles.models, tier, strict=True)}
        self.n_tiers_ = int(tier.max()) + 1
        t = self.n_tiers_
        a, b = tier[battles.model_a], tier[battles.model_b]
        row = np.concatenate([battles.prompt, battles.prompt])
        column = np.concatenate([a * t + b, b * t + a])
        won = np.concatenate(
            [battles.weight * battles.preference_a, battles.weight * (1 - battles.preference_a)]
        )
        # battles within a tier cancel out of every difference of coefficients
        apart = np.concatenate([a != b, a != b]) & (won > 0)
        self.wins_ = sparse.coo_matrix(
            (won[apart], (row[apart], column[apart])), shape=(len(battles.prompts), t * t)
        ).tocsr()
        self.embeddings_ = battles.embeddings

    def score(self, prompts: Sequence[str], embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
        beta = self.coefficients(embeddings)
        gap = beta[:, self.tiers_[self.pair.strong]] - beta[:, self.tiers_[self.pair.weak]]
        return sigmoid(gap)

    def coefficients(self, embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the tiers' Bradley–Terry coefficients (n, t) for each query (n, d)."""
        n, t = len(embeddings), self.n_tiers_
        beta = np.empty((n, t))
        step = max(1, _BLOCK_BYTES // (8 * max(1, len(self.embeddings_))))
        # (t * t, u), by column: no copy is made of it, and the product reads it from end to end
        transposed = self.wins_.T
        for start in range(0, n, step):
            block = slice(start, min(start + step, n))
            # gamma ** (1 + S), in place
            omega = (self.embeddings_ @ embeddings[block].T).astype(np.float64)  # (u, b)
            omega /= np.maximum(omega.max(axis=0), 1e-9)
            omega += 1.0
            omega *= np.log(self.options.gamma)
            np.exp(omega, out=omega)
            # scaled to the number of prompts, so that the prior weighs the same for every query
            omega *= len(omega) / omega.sum(axis=0)
            wins = (transposed @ omega).T  # (b, t * t)
            beta[block] = fit_bradley_terry(wins.reshape(-1, t, t))
        return beta

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        arrays: Arrays = {
            "embeddings": self.embeddings_,
            "wins_data": self.wins_.data,
            "wins_indices": self.wins_.indices.astype(np.int64),
            "wins_indptr": self.wins_.indptr.astype(np.int64),
        }
        return arrays, {
            "n_tiers": self.n_tiers_,
            "tiers": self.tiers_,
            "lineup": self.lineup_.to_dict(),
        }

    def load_state(self, arrays: Mapping[str, NDArray[Any]], doc: dict[str, Any]) -> None:
        self.embeddings_ = arrays["embeddings"]
        self.n_tiers_ = int(doc["n_tiers"])
        self.tiers_ = {str(k): int(v) for k, v in doc["tiers"].items()}
        self.lineup_ = Lineup.from_dict(doc["lineup"])
        self.wins_ = sparse.csr_matrix(
            (arrays["wins_data"], arrays["wins_indices"], arrays["wins_indptr"]),
            shape=(len(self.embeddings_), self.n_tiers_**2),
        )
