"""What fine-tuned kinds share: where they train, when they stop, what they say when they break."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from routellm.errors import TrainingError


def torch_device(wanted: str, kind: str) -> Any:
    """Return the torch device that `wanted` (auto, cpu, cuda or cuda:N) means here.

    Raises
    ------
    TrainingError
        If a CUDA device is asked for and there is none.
    """
    import torch

    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise TrainingError(
            "torch finds no CUDA device here: install its CUDA build on a machine with a GPU, or "
            f"leave `training.options.{kind}.device` at auto"
        )
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def since_best(losses: Sequence[float]) -> int:
    """Return how many validations have passed since the one with the lowest loss."""
    return len(losses) - 1 - int(np.argmin(losses)) if losses else 0
