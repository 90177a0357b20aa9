"""``random``: a win rate from the prompt's own hash; the floor every router must clear."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routellm.embeddings.base import Progress
from routellm.routers.base import Arrays, FitReport, Router, TrainingBattles


class RandomRouter(Router):
    """Uniform win rates that do not look at what the prompt says.

    The hash of seed and prompt stands in for a dice roll, so that the same prompt gets the
    same answer from every replica and in every replay.
    """

    kind = "random"
    reads_embeddings = False
    learns_from_validation = False
    seed = 0

    def fit(
        self,
        battles: TrainingBattles,
        *,
        rng: np.random.Generator,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
    ) -> FitReport:
        self.seed = int(rng.integers(2**31))
        return FitReport(params={"seed": self.seed}, metrics={}, history={})

    def score(self, prompts: Sequence[str], embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
        salt = str(self.seed).encode()
        raw = b"".join(
            hashlib.blake2b(p.encode("utf-8", "surrogatepass"), key=salt, digest_size=8).digest()
            for p in prompts
        )
        return np.frombuffer(raw, dtype=">u8").astype(np.float64) / 2.0**64

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        return {}, {"seed": self.seed}

    def load_state(self, arrays: Mapping[str, NDArray[Any]], doc: dict[str, Any]) -> None:
        self.seed = int(doc["seed"])
