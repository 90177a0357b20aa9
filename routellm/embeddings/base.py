"""The encoder protocol: all a router knows of how text becomes a vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

# called with (done, total) as work proceeds; the command line draws a bar with it
Progress = Callable[[int, int], None]


class Encoder(Protocol):
    """Turns prompts into unit vectors."""

    @property
    def identity(self) -> str:
        """Name and exact revision, e.g. ``sentence-transformers/all-MiniLM-L6-v2@53aa5117``.

        Two encoders with the same identity give the same vectors: it is part of every cache
        key and of every saved router.
        """

    @property
    def dimensions(self) -> int:
        """Length of a vector."""

    def encode(
        self, prompts: Sequence[str], *, progress: Progress | None = None
    ) -> NDArray[np.float32]:
        """Return float32 (n, dimensions), rows of unit length.

        Raises
        ------
        EmbeddingError
            If the encoder is missing, damaged, or does not answer.
        """
