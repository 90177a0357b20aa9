"""``mf``: a bilinear score of model times query, learnt from battles between any two models.

The paper's section 4.2: ``score(M, q) = w2 . (v_M * (W1 v_q + b))`` and
``P(a preferred to b | q) = sigmoid(score(a, q) - score(b, q))``. As in RouteLLM's code the model
vectors are normalised to unit length.

Beyond the paper, each model has a level per label kind: a judge and a right answer prefer a model
by different amounts, whatever the prompt. The epoch, and the weight of the pair's own battles
among all, are those with the lowest loss on the pair's validation battles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routellm.embeddings.base import Progress
from routellm.errors import TrainingError
from routellm.lineup import Lineup
from routellm.ratings import sigmoid
from routellm.routers.base import (
    Arrays,
    FitReport,
    Router,
    TrainingBattles,
    cross_entropy,
)
from routellm.threads import one_torch_thread

DIMENSIONS = 128  # paper, appendix
LEARNING_RATE = 3e-4
WEIGHT_DECAY = 1e-5
BATCH_SIZE = 64
EPOCHS = 10
MAX_STEPS_PER_EPOCH = 1_000  # a bound on nightly time: past this the batch grows instead


@dataclass(frozen=True)
class _Fit:
    """The best epoch under one weighting of the battles."""

    loss: float
    epoch: int
    batch: int
    arrays: tuple[NDArray[np.float32], ...]
    history: dict[str, list[float]]


class MatrixFactorizationRouter(Router):
    """Bilinear router.

    Attributes
    ----------
    models_ : tuple of str, length m
    vectors_ : ndarray float32 (m, 128)
        Unit model vectors v_M.
    projection_ : ndarray float32 (128, d)
        W1; `bias_` (128,) is b and `head_` (128,) is w2.
    levels_ : ndarray float32 (k, m)
        Of each model by label kind, in the order of `kinds_`; `level_` (m,) is their mean as the
        pair was labelled.
    """

    kind = "mf"
    any_pair = True
    learns_from_validation = False

    def fit(
        self,
        battles: TrainingBattles,
        *,
        rng: np.random.Generator,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
    ) -> FitReport:
        train = np.flatnonzero(~battles.validation)
        held, preference = battles.pair_validation()
        if not len(train) or not len(held):
            raise TrainingError(
                f"mf needs battles to train on and battles of the pair to validate with, found "
                f"{len(train)} and {len(held)}: ingest more battles"
            )
        choices = battles.weightings()
        fits = []
        for i, weight in enumerate(choices):

            def report(done: int, total: int, before: int = i) -> None:
                if progress:
                    progress(before * total + done, len(choices) * total)

            with one_torch_thread():  # steps of 64 battles
                fits.append(self._fit(battles, weight, train, held, preference, rng, report))
        chosen = int(np.argmin([f.loss for f in fits]))
        best = fits[chosen]
        self.models_ = battles.models
        self.kinds_ = tuple(str(k) for k in np.unique(battles.label_kind))
        self.lineup_ = Lineup.of(battles)
        self._set(best.arrays)
        return FitReport(
            params={
                "dimensions": DIMENSIONS,
                "learning_rate": LEARNING_RATE,
                "weight_decay": WEIGHT_DECAY,
                "batch_size": best.batch,
                "epochs": EPOCHS,
                "pair_raised": chosen,
            },
            metrics={"best_epoch": float(best.epoch), "validation_loss": best.loss},
            history=best.history,
        )

    def _set(self, arrays: tuple[NDArray[np.float32], ...]) -> None:
        self.vectors_, self.projection_, self.bias_, self.head_, self.level_, self.levels_ = arrays

    def turn(self) -> None:
        by_kind = dict(
            zip(
                self.lineup_.kinds,
                self.lineup_.shares(self.pair.strong, self.pair.weak),
                strict=True,
            )
        )
        share = np.array([by_kind[kind] for kind in self.kinds_], np.float32)
        self.level_ = share @ self.levels_

    def _fit(
        self,
        battles: TrainingBattles,
        weight: NDArray[np.float64],
        train: NDArray[np.int64],
        held: NDArray[np.int64],
        preference: NDArray[np.float64],
        rng: np.random.Generator,
        progress: Progress,
    ) -> _Fit:
        """Train once under one weighting, keeping the epoch that is best on the pair."""
        import torch
        from torch.nn import functional as F

        device = "cuda" if torch.cuda.is_available() else "cpu"
        make = torch.Generator().manual_seed(int(rng.integers(2**62)))
        d = battles.embeddings.shape[1]
        vectors = torch.randn(len(battles.models), DIMENSIONS, generator=make)
        projection = (torch.rand(DIMENSIONS, d, generator=make) * 2 - 1) * d**-0.5
        head = (torch.rand(DIMENSIONS, generator=make) * 2 - 1) * DIMENSIONS**-0.5
        bias = torch.zeros(DIMENSIONS)
        kinds, kind = np.unique(battles.label_kind, return_inverse=True)
        level = torch.zeros(len(kinds), len(battles.models))
        parameters = [
            p.to(device).requires_grad_() for p in (vectors, projection, bias, head, level)
        ]
        optimizer = torch.optim.Adam(
            parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, foreach=True
        )
        x = torch.from_numpy(battles.embeddings).to(device)
        prompt = torch.from_numpy(battles.prompt).to(device)
        k = torch.from_numpy(kind).to(device)
        a, b = (torch.from_numpy(m).to(device) for m in (battles.model_a, battles.model_b))
        y = torch.from_numpy(battles.preference_a).float().to(device)
        w = torch.from_numpy(weight / weight[train].mean()).float().to(device)

        def loss(rows: Any) -> Any:
            v, w1, b1, w2, by_kind = parameters
            unit = F.normalize(v, dim=1)
            h = x[prompt[rows]] @ w1.T + b1  # (n, 128)
            gap = ((unit[a[rows]] - unit[b[rows]]) * h) @ w2  # (n,)
            gap = gap + by_kind[k[rows], a[rows]] - by_kind[k[rows], b[rows]]
            each = F.binary_cross_entropy_with_logits(gap, y[rows], reduction="none")
            return (each * w[rows]).mean()

        def learnt() -> tuple[NDArray[np.float32], ...]:
            v, *rest, by_kind = (p.detach() for p in parameters)
            out = (F.normalize(v, dim=1), *rest, share @ by_kind, by_kind)
            return tuple(p.cpu().numpy().copy() for p in out)

        # a query's label kind is not known: levels count as often as the pair was labelled so
        of_pair = battles.of_pair()[0]
        share = torch.from_numpy(np.bincount(kind[of_pair], minlength=len(kinds)) / len(of_pair))
        share = share.float().to(device)
        batch = max(BATCH_SIZE, -(-len(train) // MAX_STEPS_PER_EPOCH))
        history: dict[str, list[float]] = {"train_loss": [], "validation_loss": []}
        best = _Fit(np.inf, 0, batch, learnt(), history)
        asked = battles.embeddings[battles.prompt[held]]
        self.models_ = battles.models
        for epoch in range(EPOCHS):
            order = torch.from_numpy(rng.permutation(train)).to(device)
            total = 0.0
            for rows in torch.split(order, batch):
                optimizer.zero_grad()
                value = loss(rows)
                value.backward()
                optimizer.step()
                total += float(value.detach()) * len(rows)
            self._set(learnt())
            validation = cross_entropy(self.score([], asked), preference)
            if not np.isfinite(validation):
                raise TrainingError(
                    f"mf diverged in epoch {epoch + 1}: the validation loss is {validation}; "
                    "check the embeddings and battle weights for values that are not finite"
                )
            history["train_loss"].append(total / len(train))
            history["validation_loss"].append(validation)
            if validation < best.loss:
                best = _Fit(validation, epoch + 1, batch, learnt(), history)
            progress(epoch + 1, EPOCHS)
        return best

    def score(self, prompts: Sequence[str], embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
        s, w = (self.models_.index(m) for m in (self.pair.strong, self.pair.weak))
        # (128,): the gap is linear in the embedding
        direction = (self.vectors_[s] - self.vectors_[w]) * self.head_
        offset = float(self.bias_ @ direction + self.level_[s] - self.level_[w])
        gap = embeddings @ (self.projection_.T @ direction) + offset
        return sigmoid(gap.astype(np.float64))

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        arrays: Arrays = {
            "vectors": self.vectors_,
            "projection": self.projection_,
            "bias": self.bias_,
            "head": self.head_,
            "level": self.level_,
            "levels": self.levels_,
        }
        return arrays, {
            "models": list(self.models_),
            "kinds": list(self.kinds_),
            "lineup": self.lineup_.to_dict(),
        }

    def load_state(self, arrays: Mapping[str, NDArray[Any]], doc: dict[str, Any]) -> None:
        self.models_, self.kinds_ = tuple(doc["models"]), tuple(doc["kinds"])
        self.lineup_ = Lineup.from_dict(doc["lineup"])
        names = ("vectors", "projection", "bias", "head", "level", "levels")
        self._set(tuple(arrays[name] for name in names))
