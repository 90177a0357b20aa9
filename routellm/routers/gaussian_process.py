"""``gaussian_process``: a smooth function of the prompt for the pair, its kin where that is silent.

It goes by the same standings as ``knn``, but differs in both parts. The pair's own are estimated,
instead of by an average over neighbours, by the posterior mean of a Gaussian process (Rasmussen and
Williams 2006, section 2.2). Its kernel has a local part, over the prompt's embedding, and a linear
one (section 2.7 there) over what can be said of the prompt at large: its features
(`routellm.prompt_features`), and how every other model is expected to stand on it, by a process of
the same form over the prompts where the pair did not fight. What another model's standing is worth,
and with which sign, is so learnt from the pair's own battles. And kin have no say on prompts as
familiar as the pair's own, where what it fought says more: on those their word made win rates worse
(`python -m benchmarks.validation`).
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

# of the local part. None wider: over other pairs of models such a function did harm on prompts
# unlike those it was fitted on (`python -m benchmarks.extrapolation`)
SHARPNESS = (2.0, 4.0)
TREND = (0.0, 0.01, 0.03)  # variance of a slope over that of the local part; 0 leaves out
NOISE = (0.5, 1.0, 2.0, 4.0, 8.0)  # variance of a standing over that of the local part
# by which other models' standings are foretold: as wide as allowed, since trends are asked for
_OTHERS = (2.0, 4.0)  # sharpness, noise
_MIN_STOOD = 100  # prompts that a model must stand on to be foretold
_MOST_OTHERS = 50  # models; those that stand on most prompts
_FORETOLD_BY = 20_000  # prompts at most
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

    ``k(x, z) = exp(-sharpness * |e_x - e_z|^2) + trend * t_x . t_z``, e being unit embeddings and t
    what can be said at large, each column standardised; a standing of weight w has variance
    ``noise / w``.
    """

    sharpness: float
    trend: float
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
    landmarks_ : ndarray int64 (m,)
        Rows of `embeddings_` that carry the local part.
    coefficients_ : ndarray float64 (m,)
        The local part at a query is their sum weighted by the kernel.
    slopes_ : ndarray float64 (f,)
        On standardised features.
    others_landmarks_, others_coefficients_, level_of_others_ : ndarray (m,), ndarray (m,), float
        What other models' standings add, slopes and all: a sum weighted by the kernel, less the
        level that it has on the pair's own prompts.
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
        others = self._others()
        truth, known = standings(battles, only=battles.trusted_kind()).gap(self.pair)
        self.shape_, error, history = self._choose(
            others, truth[said], known[said] > 0, rng, progress
        )
        self._solve(others)
        self.familiar_ = self._familiar()
        return FitReport(
            params={
                **report.params,
                "sharpness": self.shape_.sharpness,
                "trend": self.shape_.trend,
                "noise": self.shape_.noise,
                "landmarks": len(self.landmarks_),
                "foretold_models": others.values.shape[1],
                "familiar": self.familiar_,
            },
            metrics=report.metrics | ({} if error is None else {"leave_one_out_mse": error}),
            history={**report.history, "leave_one_out_mse_by_shape": history},
        )

    def _choose(
        self,
        others: _Others,
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
            rest = order[~np.isin(order, first)][: _CHOOSE_BY - len(first)]
            some = np.sort(np.concatenate([first, rest]))
            rows, gap, weight = rows[some], gap[some], weight[some]
        judged = np.flatnonzero(known[rows])
        if not len(judged):
            return Shape(SHARPNESS[-1], 0.0, NOISE[-1]), None, []
        root_weight = np.sqrt(weight)
        trends = self._trends(rows, others)
        shapes: list[Shape] = []
        errors: list[float] = []
        grid = [(s, t) for s in SHARPNESS for t in TREND]
        for done, (sharpness, trend) in enumerate(grid, 1):
            basis = self._basis(rows, sharpness)
            root = np.hstack([basis(self.embeddings_[rows]), np.sqrt(trend) * trends])
            root *= root_weight[:, None]  # (n, m + t)
            values, turned = np.linalg.eigh(root.T @ root)
            root = root @ turned
            pulled = (root_weight * gap) @ root
            for noise in NOISE:
                inverse = 1.0 / (np.maximum(values, 0.0) + noise)
                leverage = (root**2) @ inverse
                fitted = (root @ (inverse * pulled)) / root_weight
                residual = (gap - fitted) / np.maximum(1.0 - leverage, 1e-9)
                shapes.append(Shape(sharpness, trend, noise))
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

    def _others(self) -> _Others:
        """Return how other models are expected to stand, from where the pair does not."""
        own, _, _ = self._pair_rows()
        weight = self.stood_.weight
        off = np.setdiff1d(np.flatnonzero(weight.getnnz(axis=1)), own)
        stood = weight[off].getnnz(axis=0)
        stood[[self.stood_.models.index(m) for m in (self.pair.strong, self.pair.weak)]] = 0
        models = np.argsort(-stood, kind="stable")[:_MOST_OTHERS]
        models = models[stood[models] >= _MIN_STOOD]
        off = spread(off, _FORETOLD_BY) if len(own) and len(models) else off[:0]
        sharpness, noise = _OTHERS
        marks = spread(off, self.options.landmarks)
        basis = self._basis(marks, sharpness)
        m = len(marks)
        precision, pulled = noise * np.eye(m), np.zeros((m, len(models)))
        for start in range(0, len(off), _BLOCK):
            block = off[start : start + _BLOCK]
            root = basis(self.embeddings_[block])
            precision += root.T @ root
            pulled += root.T @ self.stood_.residual[block][:, models].toarray()
        values = basis.coefficients(np.linalg.solve(precision, pulled)) if m else pulled
        shown = kernel(self.embeddings_[own], basis.landmarks, sharpness) @ values
        deviation = np.maximum(shown.std(axis=0), _LEAST) if m else np.ones(len(models))
        mean = shown.mean(axis=0) if m else np.zeros(len(models))
        return _Others(marks, values / deviation, mean / deviation)

    def _trends(self, rows: NDArray[np.int64], others: _Others) -> Floats:
        """Return what can be said at large (n, t) of the prompts at `rows`."""
        features = standardised(self.features_[rows], self.mean_, self.deviation_)
        marks = self.embeddings_[others.landmarks]
        foretold = kernel(self.embeddings_[rows], marks, _OTHERS[0]) @ others.values - others.mean
        return np.hstack([features, foretold])

    def _basis(self, rows: NDArray[np.int64], sharpness: float) -> _Basis:
        return _Basis.on(self.embeddings_[spread(rows, self.options.landmarks)], sharpness)

    def _solve(self, others: _Others) -> None:
        """Set the landmarks, coefficients and slopes from the pair's standings."""
        rows, gap, weight = self._pair_rows()
        self.landmarks_ = spread(rows, self.options.landmarks)
        basis = self._basis(rows, self.shape_.sharpness)
        m, root_trend = len(self.landmarks_), np.sqrt(self.shape_.trend)
        t = len(self.mean_) + others.values.shape[1]
        precision, pulled = self.shape_.noise * np.eye(m + t), np.zeros(m + t)
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            root_weight = np.sqrt(weight[start : start + _BLOCK])
            root = np.hstack(
                [basis(self.embeddings_[block]), root_trend * self._trends(block, others)]
            )
            root *= root_weight[:, None]
            precision += root.T @ root
            pulled += (root_weight * gap[start : start + _BLOCK]) @ root
        solved = np.linalg.solve(precision, pulled)
        self.coefficients_ = basis.coefficients(solved[:m])
        slopes = root_trend * solved[m:]
        self.slopes_ = slopes[: len(self.mean_)]
        of_others = slopes[len(self.mean_) :]
        self.others_landmarks_ = others.landmarks
        self.others_coefficients_ = others.values @ of_others
        self.level_of_others_ = float(others.mean @ of_others)

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
        self._solve(self._others())
        self.familiar_ = self._familiar()

    def score(self, prompts: Sequence[str], embeddings: NDArray[np.float32]) -> Floats:
        own = np.empty(len(prompts))
        for start in range(0, len(prompts), _BLOCK):
            block = slice(start, start + _BLOCK)
            own[block] = self._own(prompts[block], embeddings[block])
        kin, _ = self.kin_(embeddings)
        share = np.zeros(len(prompts))  # of kin
        if self.options.kinship and self.kin_.weight.any():
            _, mass = replace(self.own_, sharpness=self.kin_.sharpness)(embeddings)
            share = 1.0 - np.minimum(1.0, mass / max(self.familiar_, _LEAST))
        gap = (1.0 - share) * own + share * self.options.kinship * kin
        rate: Floats = np.clip(self.level_ + gap, 0.0, 1.0)
        return rate

    def _own(self, prompts: Sequence[str], embeddings: NDArray[np.float32]) -> Floats:
        """Return the posterior mean (n,) of the pair's standing."""
        marks = self.embeddings_[self.landmarks_]
        out: Floats = kernel(embeddings, marks, self.shape_.sharpness) @ self.coefficients_
        if self.shape_.trend:
            features = standardised(prompt_features(prompts), self.mean_, self.deviation_)
            marks = self.embeddings_[self.others_landmarks_]
            foretold = kernel(embeddings, marks, _OTHERS[0]) @ self.others_coefficients_
            out += features @ self.slopes_ + foretold - self.level_of_others_
        return out

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        arrays, doc = super().state()
        own = {
            "features": self.features_,
            "landmarks": self.landmarks_,
            "coefficients": self.coefficients_,
            "slopes": self.slopes_,
            "others_landmarks": self.others_landmarks_,
            "others_coefficients": self.others_coefficients_,
        }
        return arrays | own, doc | {
            "shape": asdict(self.shape_),
            "level_of_others": self.level_of_others_,
            "familiar": self.familiar_,
        }

    def load_state(self, arrays: Mapping[str, NDArray[Any]], doc: dict[str, Any]) -> None:
        super().load_state(arrays, doc)
        self.features_ = arrays["features"]
        self._standardise()
        self.landmarks_, self.coefficients_ = arrays["landmarks"], arrays["coefficients"]
        self.slopes_ = arrays["slopes"]
        self.others_landmarks_ = arrays["others_landmarks"]
        self.others_coefficients_ = arrays["others_coefficients"]
        self.shape_, self.familiar_ = Shape(**doc["shape"]), float(doc["familiar"])
        self.level_of_others_ = float(doc["level_of_others"])


@dataclass(frozen=True)
class _Others:
    """How other models are expected to stand on a prompt, each standardised on the pair's own.

    ``kernel(e, landmarks) @ values - mean``, values being (m, p), mean (p,); `landmarks` (m,) are
    rows of the router's embeddings.
    """

    landmarks: NDArray[np.int64]
    values: Floats
    mean: Floats


@dataclass(frozen=True)
class _Basis:
    """Coordinates (n, m) whose products are the kernel.

    Exact at the landmarks, Nyström's approximation elsewhere (Rasmussen and Williams 2006,
    section 8.1).
    """

    landmarks: NDArray[np.float32]
    lower: NDArray[Any]
    sharpness: float

    @classmethod
    def on(cls, landmarks: NDArray[np.float32], sharpness: float) -> _Basis:
        between = kernel(landmarks, landmarks, sharpness)
        # duplicates leave it without full rank
        lower = np.linalg.cholesky(between + _JITTER * np.eye(len(between)))
        return cls(landmarks, lower, sharpness)

    def __call__(self, x: NDArray[np.float32]) -> Floats:
        from scipy.linalg import solve_triangular

        between = kernel(self.landmarks, x, self.sharpness)
        out: Floats = solve_triangular(self.lower, between, lower=True).T
        return out

    def coefficients(self, of_coordinates: NDArray[Any]) -> Floats:
        """Return weights (m, ...) on the kernel for those (m, ...) on the coordinates."""
        from scipy.linalg import solve_triangular

        out: Floats = solve_triangular(self.lower.T, of_coordinates, lower=False)
        return out


def kernel(x: NDArray[np.float32], z: NDArray[np.float32], sharpness: float) -> Floats:
    """Return ``exp(-sharpness * |x_i - z_j|^2)``, (n, m), computed in float64."""
    x64, z64 = x.astype(np.float64), z.astype(np.float64)
    x_square, z_square = (np.einsum("ij,ij->i", y, y) for y in (x64, z64))  # no copy of either
    distance = x_square[:, None] + z_square[None, :] - 2.0 * (x64 @ z64.T)
    out: Floats = np.exp(-sharpness * np.maximum(distance, 0.0))
    return out
