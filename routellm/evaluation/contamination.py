"""Which evaluation prompts training may have seen, and how alike the two sets are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_BLOCK_BYTES = 64 * 2**20


def largest_similarity(
    prompts: NDArray[np.float32], training: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Return for each prompt (n, d) its largest cosine similarity to any of training (u, d).

    Its mean is the paper's benchmark-dataset similarity S(B, D); prompts at or above 0.95 are
    what the paper calls contaminated.
    """
    out = np.zeros(len(prompts))
    if not len(training):
        return out
    step = max(1, _BLOCK_BYTES // (4 * len(training)))
    for start in range(0, len(prompts), step):
        out[start : start + step] = (prompts[start : start + step] @ training.T).max(axis=1)
    return out
