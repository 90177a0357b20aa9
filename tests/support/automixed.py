"""Small recorded tables of two models, made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from routellm.policies.recorded import Recorded


def recorded(
    quality: Sequence[Sequence[float]],
    *,
    usd: Sequence[float] = (1.0, 10.0),
    seconds: Sequence[float] = (1.0, 3.0),
    read: float = 100.0,
    written: float = 50.0,
    start: int = 0,
) -> Recorded:
    """Return a table of the models small and big; each row's answers name the row.

    Parameters
    ----------
    quality : shape (n, 2)
        Scores of small's and of big's answers.
    start : int
        Number of the first row: tables with other numbers share no row.
    """
    n = len(quality)
    numbers = range(start, start + n)
    return Recorded(
        "hand",
        tuple(f"question {i}" for i in numbers),
        ("small", "big"),
        np.asarray(quality, dtype=np.float64).reshape(n, 2),
        usd=np.tile(np.array(usd, dtype=np.float64), (n, 1)),
        latency_s=np.tile(np.array(seconds, dtype=np.float64), (n, 1)),
        read_tokens=np.full(n, read),
        written_tokens=np.full((n, 2), written),
        answers={
            "small": tuple(f"small says {i}" for i in numbers),
            "big": tuple(f"big says {i}" for i in numbers),
        },
        tokens_assumed=False,
    )


def drawn(rng: np.random.Generator, n: int, shares: Sequence[float], start: int = 0) -> Recorded:
    """Return n rows of which about so many are simple, complex and unsolvable, in this order."""
    state = rng.choice(3, n, p=shares)
    quality = np.array([(1.0, 1.0), (0.0, 1.0), (0.0, 0.0)])[state]
    return recorded(quality, start=start)
