"""``gaussian_process``: a smooth function of the prompt for the pair, its kin where that is silent.

It goes by the same standings as ``knn``, but differs in both parts. The pair's own are estimated,
instead of by an average over neighbours, by the posterior mean of a Gaussian process (Rasmussen and
Williams 2006, section 2.2) over the prompt's embedding and its features
(`routellm.prompt_features`), so that what a prompt looks like counts beside what it is about. And
kin have no say on prompts as familiar as the pair's own, where what it fought says more: on those
their word made win rates worse (`python -m benchmarks.validation`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from routellm.embeddings.base import Progress
from routellm.prompt_features import prompt_features, standardised
from routellm.routers.base import Arrays, FitReport, TrainingBattles
from routellm.routers.knn import KNearestOptions, KNearestRouter, spread
from routellm.standings import leave_one_out, standings

Floats = NDArray[np.float64]

# of the kernel. None wider: over other pairs of models such a function did harm on prompts unlike
# those it was fitted on (`python -m benchmarks.extrapolation`)
SHARPNESS = (2.0, 4.0)
FEATURE_SCALE = (0.0, 0.1, 0.2)  # how much a standard deviation of a feature is worth; 0 leaves out
NOISE = (0.5, 1.0, 2.0, 4.0, 8.0)  # variance of a standing over that of the function
_CHOOSE_BY = 4_000  # prompts are enough to choose these by
_BLOCK = 2_000  # prompts at once, to bound memory
_JITTER = 1e-6
_LEAST = 1e-300


class GaussianProcessOptions(KNearestOptions):
    """Options of ``gaussian_process``."""

    landmarks: int = Field(
        2000,
        ge=10,
        le=10_000,
        description="prompts that carry the function; exact where the pair has no more than these",
    )


@dataclass(frozen=True)
class Shape:
    """What is chosen about a process.

    ``k(x, z) = exp(-sharpness * (|e_x - e_z|^2 + feature_scale^2 * |f_x - f_z|^2))``, e being unit
    embeddings and f standardised features; a standing of weight w has variance ``noise / w``.
    """

    sharpness: float
    feature_scale: float
    noise: float


class GaussianProcessRouter(KNearestRouter):
    """Gaussian-process regression over the pair's standings, its kin's where those are strange.

    Attributes
    ----------
    features_ : ndarray float64 (u, f)
        Of the prompts on which any model stands, not standardised.
    mean_, deviation_ : ndarray float64 (f,)
        By which features are standardised.
    shape_ : Shape
    landmarks_ : ndarray float64 (m, d + f)
        Inputs of the prompts that carry the function.
    coefficients_ : ndarray float64 (m,)
        The estimate at a query is their sum weighted by the kernel.
    familiar_ : float
        Neighbours (at full similarity, as sharp as kin's) that a prompt needs to count as familiar:
        three of four of the pair's own have as many beside themselves. 0 if there are no own.
    """

    kind = "gaussian_process"
    Options = GaussianProcessOptions

    def fit(
        self,
        battles: TrainingBattles,
        *,
        rng: np.random.Generator,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
    ) -> FitReport:
        report = super().fit(battles, rng=rng, checkpoint=checkpoint)
        said = np.unique(battles.prompt[battles.weight > 0])  # the prompts of `embeddings_`
        self.features_ = prompt_features([battles.prompts[i] for i in said])
        self._standardise()
        truth, known = standings(battles, only=battles.trusted_kind()).gap(self.pair)
        self.shape_, error, history = self._choose(truth[said], known[said] > 0, rng, progress)
        self._solve()
        self.familiar_ = self._familiar()
        return FitReport(
            params={
                **report.params,
                "sharpness": self.shape_.sharpness,
                "feature_scale": self.shape_.feature_scale,
                "noise": self.shape_.noise,
                "landmarks": len(self.landmarks_),
                "familiar": self.familiar_,
            },
            metrics=report.metrics | ({} if error is None else {"leave_one_out_mse": error}),
            history={**report.history, "leave_one_out_mse_by_shape": history},
        )

    def _choose(
        self,
        truth: Floats,
        known: NDArray[np.bool_],
        rng: np.random.Generator,
        progress: Progress | None,
    ) -> tuple[Shape, float | None, list[float]]:
        """Return the shape with the least leave-one-out error, that error, and those of all shapes.

        `truth` (u,) are the standings by the trusted label kind alone, `known` (u,) where there
        are any: errors are counted there, in closed form (Rasmussen and Williams 2006, section
        5.4.2). Where there is none to count, the shape that says least, and no error.
        """
        rows, gap, weight = self._pair_rows()
        if len(rows) > _CHOOSE_BY:
            # however rare the trusted kind is, half of them are of it if there are as many
            order = rng.permutation(len(rows))
            first = order[known[rows][order]][: _CHOOSE_BY // 2]
            others = order[~np.isin(order, first)][: _CHOOSE_BY - len(first)]
            some = np.sort(np.concatenate([first, others]))
            rows, gap, weight = rows[some], gap[some], weight[some]
        judged = np.flatnonzero(known[rows])
        if not len(judged):
            return Shape(SHARPNESS[-1], 0.0, NOISE[-1]), None, []
        root_weight = np.sqrt(weight)
        shapes: list[Shape] = []
        errors: list[float] = []
        grid = [(s, f) for s in SHARPNESS for f in FEATURE_SCALE]
        for done, (sharpness, scale) in enumerate(grid, 1):
            basis = self._basis(rows, sharpness, scale)
            root = basis(self._inputs(rows, scale)) * root_weight[:, None]  # (n, m)
            values, turned = np.linalg.eigh(root.T @ root)
            root = root @ turned
            pulled = (root_weight * gap) @ root
            for noise in NOISE:
                inverse = 1.0 / (np.maximum(values, 0.0) + noise)
                leverage = (root**2) @ inverse
                fitted = (root @ (inverse * pulled)) / root_weight
                residual = (gap - fitted) / np.maximum(1.0 - leverage, 1e-9)
                shapes.append(Shape(sharpness, scale, noise))
                errors.append(float(np.mean((gap - residual - truth[rows])[judged] ** 2)))
            if progress:
                progress(done, len(grid))
        chosen = int(np.argmin(errors))
        return shapes[chosen], errors[chosen], errors

    def _pair_rows(self) -> tuple[NDArray[np.int64], Floats, Floats]:
        """Return the rows (n,) where the pair stands, half its difference there, and weights."""
        gap, weight = self.stood_.gap(self.pair)
        rows = np.flatnonzero(weight)
        return rows, gap[rows], weight[rows]

    def _standardise(self) -> None:
        """Set what features are standardised by."""
        f = self.features_
        some = len(f) > 0
        self.mean_ = f.mean(axis=0) if some else np.zeros(f.shape[1])
        self.deviation_ = f.std(axis=0) if some else np.zeros(f.shape[1])

    def _inputs(self, rows: NDArray[np.int64], scale: float) -> Floats:
        """Return what the kernel compares of the prompts at `rows`, (n, d + f)."""
        return self._compared(self.embeddings_[rows], self.features_[rows], scale)

    def _compared(self, embeddings: NDArray[np.float32], features: Floats, scale: float) -> Floats:
        shown = standardised(features, self.mean_, self.deviation_)
        return np.hstack([embeddings.astype(np.float64), scale * shown])

    def _basis(self, rows: NDArray[np.int64], sharpness: float, scale: float) -> _Basis:
        marks = spread(rows, self.options.landmarks)
        return _Basis.on(self._inputs(marks, scale), sharpness)

    def _solve(self) -> None:
        """Set the landmarks and coefficients from the pair's standings."""
        rows, gap, weight = self._pair_rows()
        if not len(rows):
            self.landmarks_ = np.empty((0, self.embeddings_.shape[1] + len(self.mean_)))
            self.coefficients_ = np.empty(0)
            return
        scale = self.shape_.feature_scale
        basis = self._basis(rows, self.shape_.sharpness, scale)
        m = len(basis.landmarks)
        precision, pulled = self.shape_.noise * np.eye(m), np.zeros(m)
        for start in range(0, len(rows), _BLOCK):
            block = slice(start, start + _BLOCK)
            root_weight = np.sqrt(weight[block])
            root = basis(self._inputs(rows[block], scale)) * root_weight[:, None]
            precision += root.T @ root
            pulled += (root_weight * gap[block]) @ root
        self.landmarks_ = basis.landmarks
        self.coefficients_ = basis.coefficients(np.linalg.solve(precision, pulled))

    def _familiar(self) -> float:
        own = np.flatnonzero(self.own_.weight)
        if not len(own):
            return 0.0
        _, mass = leave_one_out(
            self.own_.embeddings, self.own_.residual, self.own_.weight, spread(own, _CHOOSE_BY),
            (self.kin_.sharpness,),
        )  # fmt: skip
        return float(np.quantile(mass[0], 0.25))

    def turn(self) -> None:
        super().turn()
        self._solve()
        self.familiar_ = self._familiar()

    def score(self, prompts: Sequence[str], embeddings: NDArray[np.float32]) -> Floats:
        own = np.empty(len(prompts))
        for start in range(0, len(prompts), _BLOCK):
            block = slice(start, start + _BLOCK)
            x = self._compared(
                embeddings[block], prompt_features(prompts[block]), self.shape_.feature_scale
            )
            own[block] = kernel(x, self.landmarks_, self.shape_.sharpness) @ self.coefficients_
        kin, _ = self.kin_(embeddings)
        share = np.zeros(len(prompts))  # of kin
        if self.options.kinship and self.kin_.weight.any():
            _, mass = replace(self.own_, sharpness=self.kin_.sharpness)(embeddings)
            share = 1.0 - np.minimum(1.0, mass / max(self.familiar_, _LEAST))
        gap = (1.0 - share) * own + share * self.options.kinship * kin
        rate: Floats = np.clip(self.level_ + gap, 0.0, 1.0)
        return rate

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        arrays, doc = super().state()
        own = {
            "features": self.features_,
            "landmarks": self.landmarks_,
            "coefficients": self.coefficients_,
        }
        return arrays | own, doc | {
            "shape": asdict(self.shape_),
            "familiar": self.familiar_,
        }

    def load_state(self, arrays: Mapping[str, NDArray[Any]], doc: dict[str, Any]) -> None:
        super().load_state(arrays, doc)
        self.features_ = arrays["features"]
        self._standardise()
        self.landmarks_, self.coefficients_ = arrays["landmarks"], arrays["coefficients"]
        self.shape_, self.familiar_ = Shape(**doc["shape"]), float(doc["familiar"])


@dataclass(frozen=True)
class _Basis:
    """Coordinates (n, m) whose products are the kernel.

    Exact at the landmarks, Nyström's approximation elsewhere (Rasmussen and Williams 2006,
    section 8.1).
    """

    landmarks: Floats
    lower: NDArray[Any]
    sharpness: float

    @classmethod
    def on(cls, landmarks: Floats, sharpness: float) -> _Basis:
        between = kernel(landmarks, landmarks, sharpness)
        # duplicates leave it without full rank
        lower = np.linalg.cholesky(between + _JITTER * np.eye(len(between)))
        return cls(landmarks, lower, sharpness)

    def __call__(self, x: Floats) -> Floats:
        from scipy.linalg import solve_triangular

        between = kernel(self.landmarks, x, self.sharpness)
        out: Floats = solve_triangular(self.lower, between, lower=True).T
        return out

    def coefficients(self, of_coordinates: NDArray[Any]) -> Floats:
        """Return weights (m,) on the kernel for those (m,) on the coordinates."""
        from scipy.linalg import solve_triangular

        out: Floats = solve_triangular(self.lower.T, of_coordinates, lower=False)
        return out


def kernel(x: Floats, z: Floats, sharpness: float) -> Floats:
    """Return ``exp(-sharpness * |x_i - z_j|^2)``, (n, m)."""
    x_square, z_square = (np.einsum("ij,ij->i", y, y) for y in (x, z))  # without a copy of either
    distance = x_square[:, None] + z_square[None, :] - 2.0 * (x @ z.T)
    out: Floats = np.exp(-sharpness * np.maximum(distance, 0.0))
    return out
