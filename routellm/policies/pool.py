"""Routers over a pool: each model's quality is predicted, and weighed against what it costs.

One fit, any number of models: `predict` gives a score for every model, and lowering the weight of
a dollar draws the curve from the cheapest to the best. RouterBench (Hu et al. 2024, arXiv
2403.12031, section 4.2) has a KNN and an MLP router; `KindPool` is one of our router kinds turned
to every model, as the gateway serves it. A pair of models is the case of two.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from routellm.embeddings.base import Encoder
from routellm.errors import TrainingError
from routellm.evaluation.metrics import Floats
from routellm.policies.pair import PairRouter
from routellm.policies.policy import Point, Policy, asked_once
from routellm.policies.recorded import Recorded
from routellm.policies.single import weights
from routellm.routers.base import Pair
from routellm.routers.pool import Pool, best_at

MIN_ROWS = 50
_FOLDS = 5
_NEIGHBOURS = (5, 10, 20, 40, 80, 160)
_HIDDEN = ((50,), (100,), (100, 50))


@dataclass
class PoolRouter(Policy):
    """Learns from prompts' embeddings what each model will score.

    Money is weighed by what a model cost on average in training: how long an answer will be is not
    known when a model is chosen.
    """

    encoder: Encoder
    seed: int = 0
    models: tuple[str, ...] = field(default=(), init=False)
    _usd: Floats = field(default_factory=lambda: np.empty(0), init=False)

    def fit(self, table: Recorded, held: Recorded) -> None:
        if len(table) < MIN_ROWS:
            raise TrainingError(
                f"{self.name} cannot learn from {len(table)} rows of {table.name}: give at least "
                f"{MIN_ROWS}"
            )
        self._usd = table.usd.mean(axis=0)
        self.models = table.models
        self.learn(table, held)
        self.trained_on = frozenset(table.ids + held.ids)

    @abstractmethod
    def learn(self, table: Recorded, held: Recorded) -> None:
        """Learn from training rows."""

    @abstractmethod
    def predict(self, prompts: Sequence[str]) -> Floats:
        """Return the score (n, m) that each model is predicted to have on each prompt.

        Up to what is added to all models of a prompt alike, which changes no choice.
        """

    def answer(self, table: Recorded) -> Sequence[Point]:
        columns = [table.models.index(one) for one in self.models]
        predicted = self.predict(table.prompts)
        usd = np.broadcast_to(self._usd, predicted.shape)
        return [
            asked_once(
                table,
                np.array(columns)[best_at(predicted, usd, weight)],
                f"{weight:.3g} per dollar",
            )
            for weight in weights(self._usd)
        ]


@dataclass
class KindPool(PoolRouter):
    """One of our router kinds, trained for a pair and turned to every model against the cheapest.

    Attributes
    ----------
    between : Pair
        Where a table lacks one of the two, strong is its best model in training, weak its cheapest.
    """

    kind: str = field(kw_only=True)
    between: Pair = field(kw_only=True)
    _pool: Pool | None = field(default=None, init=False)

    def learn(self, table: Recorded, held: Recorded) -> None:
        own = PairRouter(self.name, self.kind, self.encoder, self.between, self.seed)
        own.fit(table, held)
        assert own.router is not None
        cheapest = table.models[table.cheapest()]
        self.models = (cheapest, *(one for one in table.models if one != cheapest))
        self._usd = self._usd[[table.models.index(one) for one in self.models]]
        self._pool = Pool(own.router, self.models)

    def predict(self, prompts: Sequence[str]) -> Floats:
        assert self._pool is not None, "fit it first"
        return self._pool.quality(prompts)


@dataclass
class RegressionPool(PoolRouter):
    """A regression from a prompt's embedding to every model's score, chosen by cross-validation."""

    _model: Any = field(default=None, init=False)

    def learn(self, table: Recorded, held: Recorded) -> None:
        vectors = self.encoder.encode(table.prompts)
        error = {
            name: _foretold(model, vectors, table.quality, self.seed)
            for name, model in self.candidates(len(table)).items()
        }
        chosen = min(error, key=lambda name: error[name])
        self._model = self.candidates(len(table))[chosen].fit(vectors, table.quality)

    @abstractmethod
    def candidates(self, n: int) -> dict[str, Any]:
        """Return by name the models to choose from by cross-validation, for n rows."""

    def predict(self, prompts: Sequence[str]) -> Floats:
        found = self._model.predict(self.encoder.encode(prompts))
        return np.asarray(found, dtype=np.float64).reshape(len(prompts), len(self.models))


class KNNPool(RegressionPool):
    """The mean score of the most similar training prompts, by cosine."""

    def candidates(self, n: int) -> dict[str, Any]:
        from sklearn.neighbors import KNeighborsRegressor

        most = n - -(-n // _FOLDS)  # in the smallest training fold
        return {f"{k} neighbours": KNeighborsRegressor(k) for k in _NEIGHBOURS if k <= most}


class MLPPool(RegressionPool):
    """A small neural network from a prompt's embedding to every model's score."""

    def candidates(self, n: int) -> dict[str, Any]:
        from sklearn.neural_network import MLPRegressor

        return {
            f"hidden {'x'.join(map(str, hidden))}": MLPRegressor(
                hidden_layer_sizes=hidden,
                alpha=1e-2,
                early_stopping=True,
                max_iter=1000,
                random_state=self.seed,
            )
            for hidden in _HIDDEN
        }


def _foretold(model: Any, vectors: np.ndarray, quality: Floats, seed: int) -> float:
    """Return the mean squared error on rows that were kept out, over folds."""
    from sklearn.base import clone
    from sklearn.model_selection import KFold

    folds = KFold(_FOLDS, shuffle=True, random_state=seed)
    errors = []
    for train, test in folds.split(vectors):
        found = clone(model).fit(vectors[train], quality[train]).predict(vectors[test])
        errors.append(np.mean((found - quality[test]) ** 2))
    return float(np.mean(errors))
