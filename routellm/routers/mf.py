"""``mf``: a bilinear score of model times query, learnt from battles between any two models.

The paper's section 4.2: ``score(M, q) = w2 . (v_M * (W1 v_q + b))`` and
``P(a preferred to b | q) = sigmoid(score(a, q) - score(b, q))``. As in RouteLLM's code the model
vectors are normalised to unit length. The epoch with the lowest validation loss is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routellm.embeddings.base import Encoder, Progress
from routellm.errors import TrainingError
from routellm.ratings import sigmoid
from routellm.routers.base import Arrays, FitReport, Pair, Router, TrainingBattles

DIMENSIONS = 128  # paper, appendix
LEARNING_RATE = 3e-4
WEIGHT_DECAY = 1e-5
BATCH_SIZE = 64
EPOCHS = 10
MAX_STEPS_PER_EPOCH = 4_000  # a bound on nightly time: past this the batch grows instead


class MatrixFactorizationRouter(Router):
    """Bilinear router.

    Attributes
    ----------
    models_ : tuple of str, length m
    vectors_ : ndarray float32 (m, 128)
        Unit model vectors v_M.
    projection_ : ndarray float32 (128, d)
        W1; `bias_` (128,) is b and `head_` (128,) is w2.
    """

    kind = "mf"

    def fit(
        self,
        battles: TrainingBattles,
        *,
        rng: np.random.Generator,
        progress: Progress | None = None,
    ) -> FitReport:
        import torch
        from torch.nn import functional as F

        train = np.flatnonzero(~battles.validation)
        held = np.flatnonzero(battles.validation)
        if not len(train) or not len(held):
            raise TrainingError(
                f"mf needs battles to train on and to validate with, found {len(train)} and "
                f"{len(held)}: ingest more battles"
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        make = torch.Generator().manual_seed(int(rng.integers(2**62)))
        d = battles.embeddings.shape[1]
        vectors = torch.randn(len(battles.models), DIMENSIONS, generator=make)
        bound = d**-0.5
        projection = (torch.rand(DIMENSIONS, d, generator=make) * 2 - 1) * bound
        head = (torch.rand(DIMENSIONS, generator=make) * 2 - 1) * DIMENSIONS**-0.5
        bias = torch.zeros(DIMENSIONS)
        parameters = [p.to(device).requires_grad_() for p in (vectors, projection, bias, head)]
        optimizer = torch.optim.Adam(
            parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, foreach=True
        )
        x = torch.from_numpy(battles.embeddings).to(device)
        prompt = torch.from_numpy(battles.prompt).to(device)
        a, b = (torch.from_numpy(m).to(device) for m in (battles.model_a, battles.model_b))
        y = torch.from_numpy(battles.preference_a).float().to(device)
        w = torch.from_numpy(battles.weight).float().to(device)

        def loss(rows: Any) -> Any:
            v, w1, b1, w2 = parameters
            unit = F.normalize(v, dim=1)
            h = x[prompt[rows]] @ w1.T + b1  # (n, 128)
            gap = ((unit[a[rows]] - unit[b[rows]]) * h) @ w2  # (n,)
            each = F.binary_cross_entropy_with_logits(gap, y[rows], reduction="none")
            return (each * w[rows]).sum() / w[rows].sum()

        batch = max(BATCH_SIZE, -(-len(train) // MAX_STEPS_PER_EPOCH))
        history: dict[str, list[float]] = {"train_loss": [], "validation_loss": []}
        best = (np.inf, 0, [p.detach().clone() for p in parameters])
        for epoch in range(EPOCHS):
            order = torch.from_numpy(rng.permutation(train)).to(device)
            total = 0.0
            for rows in torch.split(order, batch):
                optimizer.zero_grad()
                value = loss(rows)
                value.backward()
                optimizer.step()
                total += float(value.detach()) * len(rows)
            with torch.no_grad():
                chunks = torch.split(torch.from_numpy(held).to(device), 65_536)
                share = [float(w[c].sum()) for c in chunks]
                validation = float(np.average([float(loss(c)) for c in chunks], weights=share))
            if not np.isfinite(validation):
                raise TrainingError(
                    f"mf diverged in epoch {epoch + 1}: the validation loss is {validation}; "
                    "check the embeddings and battle weights for values that are not finite"
                )
            history["train_loss"].append(total / len(train))
            history["validation_loss"].append(validation)
            if validation < best[0]:
                best = (validation, epoch, [p.detach().clone() for p in parameters])
            if progress:
                progress(epoch + 1, EPOCHS)
        vectors, projection, bias, head = best[2]
        self.models_ = battles.models
        self.vectors_ = F.normalize(vectors, dim=1).cpu().numpy()
        self.projection_, self.bias_, self.head_ = (
            p.cpu().numpy() for p in (projection, bias, head)
        )
        return FitReport(
            params={
                "dimensions": DIMENSIONS,
                "learning_rate": LEARNING_RATE,
                "weight_decay": WEIGHT_DECAY,
                "batch_size": batch,
                "epochs": EPOCHS,
            },
            metrics={"best_epoch": float(best[1] + 1), "validation_loss": float(best[0])},
            history=history,
        )

    def score(self, prompts: Sequence[str], embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
        strong = self.vectors_[self.models_.index(self.pair.strong)]
        weak = self.vectors_[self.models_.index(self.pair.weak)]
        direction = (strong - weak) * self.head_  # (128,): the gap is linear in the embedding
        gap = embeddings @ (self.projection_.T @ direction) + float(self.bias_ @ direction)
        return sigmoid(gap.astype(np.float64))

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        arrays: Arrays = {
            "vectors": self.vectors_,
            "projection": self.projection_,
            "bias": self.bias_,
            "head": self.head_,
        }
        return arrays, {"models": list(self.models_)}

    @classmethod
    def from_state(
        cls, encoder: Encoder, pair: Pair, arrays: Mapping[str, NDArray[Any]], doc: dict[str, Any]
    ) -> MatrixFactorizationRouter:
        router = cls(encoder, pair)
        router.models_ = tuple(doc["models"])
        router.vectors_ = arrays["vectors"]
        router.projection_ = arrays["projection"]
        router.bias_ = arrays["bias"]
        router.head_ = arrays["head"]
        return router


ROUTER = MatrixFactorizationRouter
