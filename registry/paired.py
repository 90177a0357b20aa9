"""Two versions' predictions on the same prompts, in the form that they are compared in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from registry.predictions import about
from routellm.evaluation.metrics import exact_curve
from routellm.evaluation.slices import SLICES

Floats = NDArray[np.float64]

MIN_COMMON = 0.9  # of the candidate's prompts; with fewer in common it is another benchmark


@dataclass(frozen=True)
class Paired:
    """What two routers said on the same n prompts.

    Attributes
    ----------
    champion, candidate : ndarray (n,)
        Win rates.
    strong, weak : ndarray (n,)
        Scores of the two models.
    cluster : ndarray int64 (n,)
        Prompts with the same number are resampled together.
    slices : dict
        For each of `SLICES` the value (n,) of every prompt; "" where it has none.
    note : str
        What is unusual about where these came from; "" if nothing is.
    """

    benchmark: str
    champion: Floats
    candidate: Floats
    strong: Floats
    weak: Floats
    cluster: NDArray[np.int64]
    slices: dict[str, NDArray[np.str_]]
    note: str = ""

    def __len__(self) -> int:
        return len(self.strong)

    @property
    def gap(self) -> float:
        """What strong scores more than weak, on average."""
        return float((self.strong - self.weak).mean())

    def apgr(self, win_rates: Floats) -> float:
        """Return the APGR of win rates (n,), in the exact reading."""
        return exact_curve(win_rates, self.strong, self.weak, np.ones(len(self))).apgr()

    def parts(self) -> Iterator[tuple[str, Paired]]:
        """Yield the parts of the slices by name, such as ``code=yes``, but for the whole."""
        for name, values in self.slices.items():
            for value in np.unique(values):
                here = values == value
                if value != "" and not here.all():
                    yield f"{name}={value}", self._where(here)

    def _where(self, here: NDArray[np.bool_]) -> Paired:
        return replace(
            self,
            champion=self.champion[here],
            candidate=self.candidate[here],
            strong=self.strong[here],
            weak=self.weak[here],
            cluster=_numbered(self.cluster[here]),
            slices={},
        )


def joined(champion: pa.Table, candidate: pa.Table) -> Paired | None:
    """Join two predictions tables by question; None if they are of different benchmarks.

    They are where a question's scores differ, or where less than `MIN_COMMON` of the candidate's
    prompts are in both. A prompt that stands in a table twice is joined copy by copy.
    """
    row = {key: i for i, key in enumerate(_keys(champion))}
    both = [(row[key], j) for j, key in enumerate(_keys(candidate)) if key in row]
    if len(both) < MIN_COMMON * len(candidate):
        return None
    theirs, own = (
        table.take(list(rows))
        for table, rows in zip((champion, candidate), zip(*both, strict=True), strict=True)
    )
    if any(not (theirs[n].to_numpy() == own[n].to_numpy()).all() for n in ("strong", "weak")):
        return None
    return Paired(
        benchmark=about(candidate)["benchmark"],
        champion=theirs["win_rate"].to_numpy(),
        candidate=own["win_rate"].to_numpy(),
        strong=own["strong"].to_numpy(),
        weak=own["weak"].to_numpy(),
        cluster=_numbered(_text(own, "cluster")),
        slices={name: _text(own, name) for name in SLICES},
    )


def _keys(table: pa.Table) -> Iterator[tuple[str, int]]:
    """Yield (question, which copy of it) for each row."""
    seen: dict[str, int] = {}
    for question in table["question"].to_pylist():
        seen[question] = seen.get(question, -1) + 1
        yield question, seen[question]


def _text(table: pa.Table, name: str) -> NDArray[np.str_]:
    return np.array([v or "" for v in table[name].to_pylist()], dtype=np.str_)


def _numbered(values: NDArray[np.generic]) -> NDArray[np.int64]:
    """Return the values as numbers from 0, in the order that they first appear in."""
    _, first, where = np.unique(values, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[where]
