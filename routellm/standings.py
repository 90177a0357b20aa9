"""Standings: how much better or worse than expected each model did on each prompt.

A battle says which of two models did better on a prompt. What it says beyond their overall
strength is its residual: the preference less what their Bradley-Terry ratings expect. A model's
standing on a prompt is the mean residual of its battles there, so that battles of any pair speak
one language: what they say of a *model*. Ratings are fitted per label kind, since a judge and a
right answer prefer a model by different amounts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from routellm.kinship import family
from routellm.ratings import fit_bradley_terry, sigmoid, win_table
from routellm.routers.base import Pair, TrainingBattles

Floats = NDArray[np.float64]

_BLOCK_BYTES = 64 * 2**20  # of similarities held at once
_BLOCK_COLUMNS = 16_384  # of them, that several sharpnesses pass over at once


@dataclass(frozen=True)
class Standings:
    """Residuals of models on prompts.

    Attributes
    ----------
    residual, weight : csr_matrix float64 (u, m)
        For each prompt and model, the sum over label kinds of weight times mean residual, and of
        weights. A residual is a difference of P(preferred), in [-1, 1].
    expected : ndarray float64 (m, m)
        P(row preferred to column) over all prompts, by the most trusted label kind that rates
        both; 0.5 where none does.
    """

    models: tuple[str, ...]
    residual: sparse.csr_matrix
    weight: sparse.csr_matrix
    expected: Floats

    def gap(self, pair: Pair, *, of_kin: bool = False) -> tuple[Floats, Floats]:
        """Return half the difference of two models' standings on each prompt (u,), and its weight.

        With `of_kin`, the standings are the mean of each model's relatives instead of its own;
        neither of the two counts as a relative of the other. A model that did not fight on a
        prompt stands there as expected (0); the weight (u,) is 0 where neither did.
        """
        total, weights = np.zeros(self.residual.shape[0]), np.zeros(self.residual.shape[0])
        for sign, name in ((0.5, pair.strong), (-0.5, pair.weak)):
            counts = np.array(
                [
                    float(
                        m not in (pair.strong, pair.weak) and family(m) == family(name)
                        if of_kin
                        else m == name
                    )
                    for m in self.models
                ]
            )
            residual, weight = self.residual @ counts, self.weight @ counts
            said = weight > 0
            total[said] += sign * residual[said] / weight[said]
            # relatives err alike: together they say no more than one model does
            weights = np.maximum(weights, np.minimum(weight, 1.0))
        return total, weights

    def expected_of(self, pair: Pair) -> float:
        """Return P(strong preferred) over all prompts."""
        s, w = (self.models.index(m) for m in (pair.strong, pair.weak))
        return float(self.expected[s, w])

    def on(self, prompts: NDArray[np.int64]) -> Standings:
        """Return the standings on some of the prompts (rows)."""
        return replace(self, residual=self.residual[prompts], weight=self.weight[prompts])

    def to_arrays(self) -> tuple[dict[str, NDArray[Any]], list[str]]:
        """Return named arrays, and the models' names: what `from_arrays` takes."""
        out: dict[str, NDArray[Any]] = {"expected": self.expected}
        for name in ("residual", "weight"):
            matrix = getattr(self, name)
            out[f"{name}_data"] = matrix.data
            out[f"{name}_indices"] = matrix.indices.astype(np.int32)
            out[f"{name}_indptr"] = matrix.indptr.astype(np.int64)
        return out, list(self.models)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], models: Sequence[str]) -> Standings:
        """Return the standings that `to_arrays` gave."""

        def matrix(name: str) -> sparse.csr_matrix:
            parts = (arrays[f"{name}_{part}"] for part in ("data", "indices", "indptr"))
            return sparse.csr_matrix(
                tuple(parts), shape=(len(arrays[f"{name}_indptr"]) - 1, len(models))
            )

        return cls(tuple(models), matrix("residual"), matrix("weight"), arrays["expected"])


def standings(battles: TrainingBattles, *, only: str | None = None) -> Standings:
    """Return the standings of all models, by battles of all label kinds or `only` one.

    A battle of weight 0 says nothing.
    """
    u, m = len(battles.prompts), len(battles.models)
    residual, weight = sparse.csr_matrix((u, m)), sparse.csr_matrix((u, m))
    expected = np.full((m, m), np.nan)
    for kind in battles.kinds_by_trust() if only is None else [only]:
        rows = np.flatnonzero((battles.label_kind == kind) & (battles.weight > 0))
        a, b = battles.model_a[rows], battles.model_b[rows]
        w, preference = battles.weight[rows], battles.preference_a[rows]
        table = win_table(a, b, preference, w, m)
        rating = fit_bradley_terry(table)
        chance = sigmoid(rating[:, None] - rating[None, :])
        rated = (table + table.T).sum(1) > 0
        unknown = np.isnan(expected) & rated[:, None] & rated[None, :]
        expected[unknown] = chance[unknown]
        over = preference - chance[a, b]
        cell = (np.concatenate([battles.prompt[rows]] * 2), np.concatenate([a, b]))

        def total(values: Floats, cell: tuple[NDArray[np.int64], ...] = cell) -> sparse.csr_matrix:
            both = sparse.coo_matrix((values, cell), (u, m)).tocsr()
            both.sum_duplicates()
            return both

        # one say for each model on each prompt, however many battles it fought there
        fought = total(np.ones(2 * len(rows)))
        for sums, of in (
            (residual_ := total(np.concatenate([w * over, -w * over])), fought),
            (weight_ := total(np.concatenate([w, w])), fought),
        ):
            sums.data /= of.data
        residual, weight = residual + residual_, weight + weight_
    expected[np.isnan(expected)] = 0.5
    return Standings(battles.models, residual.tocsr(), weight.tocsr(), expected)


@dataclass(frozen=True)
class Smoother:
    """Nadaraya and Watson's estimate of standings at a query, from those at known prompts.

    ``sum_i k_i w_i r_i / (sum_i k_i w_i + prior)``, ``k_i = exp(sharpness * (cos(q, q_i) - 1))``;
    the prior is one neighbour at half the largest similarity, so that a query far from all of
    them gets 0.

    Attributes
    ----------
    embeddings : ndarray float32 (u, d)
    residual, weight : ndarray float64 (u,)
        As `Standings.gap` returns them, of the prompts that have one.
    """

    embeddings: NDArray[np.float32]
    residual: Floats
    weight: Floats
    sharpness: float

    def __call__(
        self, queries: NDArray[np.float32], *, left_out: NDArray[np.int64] | None = None
    ) -> tuple[Floats, Floats]:
        """Return the estimate (n,) at queries (n, d), and its mass ``sum_i k_i w_i`` (n,).

        `left_out` (n,) are the queries' own rows, for leave-one-out.
        """
        mean, mass = np.empty(len(queries)), np.empty(len(queries))
        prior = np.exp(-0.5 * self.sharpness)
        step = max(1, _BLOCK_BYTES // (8 * max(1, len(self.embeddings))))
        for start in range(0, len(queries), step):
            block = slice(start, min(start + step, len(queries)))
            similarity = (queries[block] @ self.embeddings.T).astype(np.float64)  # (b, u)
            kernel = np.exp(self.sharpness * (similarity - 1.0))
            if left_out is not None:
                kernel[np.arange(len(kernel)), left_out[block]] = 0.0
            mass[block] = kernel @ self.weight
            mean[block] = kernel @ (self.weight * self.residual) / (mass[block] + prior)
        return mean, mass


def leave_one_out(
    embeddings: NDArray[np.float32],
    residual: Floats,
    weight: Floats,
    rows: NDArray[np.int64],
    sharpness: Sequence[float],
) -> tuple[Floats, Floats]:
    """Return what a `Smoother` of each sharpness says at its own `rows` (n,), each left out.

    As ``Smoother(...)(embeddings[rows], left_out=rows)``, but similarities, which are most of the
    work, are computed once for all of them.

    Returns
    -------
    mean, mass : ndarray float64 (len(sharpness), n)
    """
    mean = np.zeros((len(sharpness), len(rows)))
    mass = np.zeros_like(mean)
    step = _BLOCK_BYTES // (8 * _BLOCK_COLUMNS)
    both = np.stack([weight, weight * residual], axis=1)  # (u, 2)
    for start in range(0, len(rows), step):
        queries = rows[start : start + step]
        at = slice(start, start + len(queries))
        for first in range(0, len(embeddings), _BLOCK_COLUMNS):
            known = slice(first, first + _BLOCK_COLUMNS)
            below = (embeddings[queries] @ embeddings[known].T).astype(np.float64)  # (b, c)
            below -= 1.0
            inside = np.flatnonzero((queries >= first) & (queries < first + below.shape[1]))
            below[inside, queries[inside] - first] = -np.inf  # its kernel is 0
            kernel = np.empty_like(below)
            for i, sharp in enumerate(sharpness):
                np.multiply(below, sharp, out=kernel)
                np.exp(kernel, out=kernel)
                sums = kernel @ both[known]
                mass[i, at] += sums[:, 0]
                mean[i, at] += sums[:, 1]
    mean /= mass + np.exp(-0.5 * np.asarray(sharpness))[:, None]
    return mean, mass
