"""SIMULATED battles of any number, in the form that routers train on: what `growth` measures with.

Drawn to have an arena's shape rather than its content: prompts in clusters, in which models differ
by amounts of their own; models that fight as often as Zipf has it; people's votes and a judge's.
Embeddings are drawn too, so that no encoder's time or memory is in any figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from routellm.embeddings.base import Progress
from routellm.routers.base import Pair, TrainingBattles

DIMENSIONS = 384  # of the default encoder
MODELS = 60
BATTLES_A_PROMPT = 1.3
MAX_PROMPTS = 300_000  # 461 MB of embeddings
CLUSTERS = 300
PAIR_SHARE = 0.1  # of battles, between the pair itself
JUDGE_SHARE = 0.3
TIE_SHARE = 0.2
VALIDATION_SHARE = 0.1  # of prompts, the default of `training.validation_share`

# names of known families, so that `knn` finds relatives
_FAMILIES = ("gpt", "claude", "mixtral", "llama", "qwen", "gemini")
NAMES = tuple(f"{_FAMILIES[i % len(_FAMILIES)]}-{i:02d}" for i in range(MODELS))
PAIR = Pair(NAMES[0], NAMES[2])
_ROWS = 20_000  # drawn at once


@dataclass(frozen=True)
class DrawnEncoder:
    """An encoder that has its answers ready: prompt ``i`` has row i of `vectors` (k, d)."""

    vectors: NDArray[np.float32]
    identity: str = "drawn"

    @property
    def dimensions(self) -> int:
        return int(self.vectors.shape[1])

    def encode(
        self, prompts: Sequence[str], *, progress: Progress | None = None
    ) -> NDArray[np.float32]:
        return self.vectors[[int(p.split()[0]) for p in prompts]]


def _centres() -> NDArray[np.float32]:
    centres = np.random.default_rng(1).standard_normal((CLUSTERS, DIMENSIONS), dtype=np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    return centres


def _vectors(cluster: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return unit vectors (k, d) whose cosine is about a half within a cluster."""
    centres = _centres()
    out = np.empty((len(cluster), DIMENSIONS), np.float32)
    for start in range(0, len(out), _ROWS):
        block = out[start : start + _ROWS]
        rng.standard_normal(dtype=np.float32, out=block)
        block /= np.sqrt(np.float32(DIMENSIONS))
        block += centres[cluster[start : start + _ROWS]]
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return out


def _prompt(i: int) -> str:
    return f"{i} is the number of this question, which is about as long as people's questions are"


def draw_queries(n: int) -> tuple[list[str], DrawnEncoder]:
    """Return n prompts that no battle was fought over, and an encoder that knows them."""
    rng = np.random.default_rng(2)
    vectors = _vectors(rng.integers(CLUSTERS, size=n), rng)
    return [_prompt(i) for i in range(n)], DrawnEncoder(vectors)


def draw_battles(n: int) -> TrainingBattles:
    """Return n battles; the same ones for the same n."""
    rng = np.random.default_rng(0)
    u = min(round(n / BATTLES_A_PROMPT), MAX_PROMPTS)
    cluster = rng.integers(CLUSTERS, size=u)
    embeddings = _vectors(cluster, rng)
    # each prompt once, and what is left over anywhere
    prompt = rng.permutation(np.concatenate([np.arange(u), rng.integers(u, size=n - u)]))

    share = 1.0 / np.arange(1, MODELS + 1)
    a, b = rng.choice(MODELS, size=(2, n), p=share / share.sum())
    b = np.where(a == b, (b + 1 + rng.integers(MODELS - 1, size=n)) % MODELS, b)
    of_pair = rng.random(n) < PAIR_SHARE
    pair = [NAMES.index(m) for m in (PAIR.strong, PAIR.weak)]
    swapped = rng.random(n) < 0.5
    a[of_pair] = np.where(swapped[of_pair], pair[0], pair[1])
    b[of_pair] = np.where(swapped[of_pair], pair[1], pair[0])

    skill = np.linspace(1.0, -1.0, MODELS)
    in_cluster = np.random.default_rng(3).normal(0.0, 0.7, (MODELS, CLUSTERS))
    c = cluster[prompt]
    gap = skill[a] - skill[b] + in_cluster[a, c] - in_cluster[b, c]
    preference = (rng.random(n) < 1.0 / (1.0 + np.exp(-gap))).astype(np.float64)
    preference[rng.random(n) < TIE_SHARE] = 0.5
    return TrainingBattles(
        prompts=tuple(_prompt(i) for i in range(u)),
        embeddings=embeddings,
        prompt=prompt,
        models=NAMES,
        model_a=a,
        model_b=b,
        preference_a=preference,
        weight=np.ones(n),
        label_kind=np.where(rng.random(n) < JUDGE_SHARE, "judge", "human"),
        validation=(rng.random(u) < VALIDATION_SHARE)[prompt],
        pair=PAIR,
    )
