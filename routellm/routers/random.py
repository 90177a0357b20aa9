"""``random``: a win rate from the prompt's own hash; the floor every router must clear."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routellm.embeddings.base import Encoder, Progress
from routellm.routers.base import Arrays, FitReport, Pair, Router, TrainingBattles


class RandomRouter(Router):
    """Uniform win rates that do not look at what the prompt says.

    The hash of seed and prompt stands in for a dice roll, so that the same prompt gets the
    same answer from every replica and in every replay.
    """

    kind = "random"

    def __init__(self, encoder: Encoder, pair: Pair, seed: int = 0) -> None:
        super().__init__(encoder, pair)
        self.seed = seed

    def fit(
        self,
        battles: TrainingBattles,
        *,
        rng: np.random.Generator,
        progress: Progress | None = None,
    ) -> FitReport:
        self.seed = int(rng.integers(2**31))
        return FitReport(params={"seed": self.seed}, metrics={}, history={})

    def win_rate(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        # no embedding: nothing of the prompt's meaning is used
        return self.score(prompts, np.empty((len(prompts), 0), dtype=np.float32))

    def score(self, prompts: Sequence[str], embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
        salt = str(self.seed).encode()
        raw = b"".join(
            hashlib.blake2b(p.encode("utf-8", "surrogatepass"), key=salt, digest_size=8).digest()
            for p in prompts
        )
        return np.frombuffer(raw, dtype=">u8").astype(np.float64) / 2.0**64

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        return {}, {"seed": self.seed}

    @classmethod
    def from_state(
        cls, encoder: Encoder, pair: Pair, arrays: Mapping[str, NDArray[Any]], doc: dict[str, Any]
    ) -> RandomRouter:
        return cls(encoder, pair, seed=int(doc["seed"]))


ROUTER = RandomRouter
