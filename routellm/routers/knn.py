"""``knn``: how the two models stood on similar prompts, and how their kin did where those are few.

A model's standing on a prompt is what its battles there say beyond its overall strength
(`routellm.standings`). The win rate of a query is the pair's overall level plus half of the
difference of the two models' standings, averaged over neighbours by similarity. What the same
average over the models' relatives foretells counts as some more neighbours: as many as the pair
has on prompts like those it fought over, so that it is heard there and decides far away from them.
Battles of either model with any other count, so two models need not have met to be routed between.
The standings of all models are kept, so that another pair needs no training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from routellm.embeddings.base import Progress
from routellm.lineup import Lineup
from routellm.routers.base import Arrays, FitReport, Router, RouterOptions, TrainingBattles
from routellm.standings import Smoother, Standings, leave_one_out, standings

SHARPNESS = (2.5, 5.0, 7.0, 10.0, 14.0, 20.0, 40.0)
_MAX_LEFT_OUT = 4_000  # prompts left out in turn: more would take time in proportion to its square
_PULL_PROMPTS = 2_000  # enough for a median; all of them would take as long as training does


class KNearestOptions(RouterOptions):
    """Options of ``knn``."""

    kinship: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="how closely a model stands where its relatives stand (a correlation; a "
        "prior, since the pair's battles cannot tell it for prompts unlike theirs)",
    )


class KNearestRouter(Router):
    """Kernel-weighted nearest neighbours over standings.

    Attributes
    ----------
    embeddings_ : ndarray float32 (u, d)
        Of the prompts on which any model stands; `stood_` are the standings there.
    own_, kin_ : Smoother
        Over the pair's own standings and its relatives'.
    level_ : float
        P(strong preferred) over all prompts.
    pull_ : float
        How many neighbours (at full similarity) the relatives' word counts as:
        ``kinship / (1 - kinship)`` of those at the pair's own prompts (median).
    """

    kind = "knn"
    Options = KNearestOptions
    any_pair = True

    def fit(
        self,
        battles: TrainingBattles,
        *,
        rng: np.random.Generator,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
    ) -> FitReport:
        stood = standings(battles)
        best, own_errors = best_own(battles, stood)
        own_sharpness = best.sharpness
        if progress:
            progress(1, 2)
        gap, weight = stood.gap(self.pair, of_kin=True)
        rows = np.flatnonzero(weight)
        best, kin_errors = _best(
            battles.embeddings[rows], gap[rows], weight[rows], np.arange(len(rows)), gap[rows]
        )
        kin_sharpness = best.sharpness
        del best  # a copy of most embeddings
        if progress:
            progress(2, 2)
        said = np.flatnonzero(stood.weight.getnnz(axis=1))
        everywhere = len(said) == len(battles.prompts)
        self.embeddings_ = battles.embeddings if everywhere else battles.embeddings[said]
        self.stood_ = stood if everywhere else stood.on(said)
        self.lineup_ = Lineup.of(battles)
        self._smooth(own_sharpness, kin_sharpness)
        self.pull_ = self._pull(_MAX_LEFT_OUT)
        return FitReport(
            params={
                "kinship": self.options.kinship,
                "own_sharpness": self.own_.sharpness,
                "kin_sharpness": self.kin_.sharpness,
            },
            metrics={
                "own_prompts": int(np.count_nonzero(self.own_.weight)),
                "kin_prompts": int(np.count_nonzero(self.kin_.weight)),
                "kin_pull": self.pull_,
            },
            history={
                "own_leave_one_out_mse_by_sharpness": [float(e.mean()) for e in own_errors],
                "kin_leave_one_out_mse_by_sharpness": [float(e.mean()) for e in kin_errors],
            },
        )

    def _smooth(self, own_sharpness: float, kin_sharpness: float) -> None:
        """Set the level and the smoothers of the pair."""
        self.level_ = self.stood_.expected_of(self.pair)

        def smoother(sharpness: float, *, of_kin: bool) -> Smoother:
            gap, weight = self.stood_.gap(self.pair, of_kin=of_kin)
            rows: Any = np.flatnonzero(weight)
            if 2 * len(rows) > len(weight):  # the others weigh nothing: no copy for their sake
                rows = slice(None)
            return Smoother(self.embeddings_[rows], gap[rows], weight[rows], sharpness)

        self.own_ = smoother(own_sharpness, of_kin=False)
        self.kin_ = smoother(kin_sharpness, of_kin=True)

    def _pull(self, most: int) -> float:
        """Return `pull_`, by at most so many prompts of the pair's, spread over them."""
        at = spread(np.flatnonzero(self.own_.weight), most)
        _, mass = self.own_(self.own_.embeddings[at], left_out=at)
        usual = float(np.median(mass)) if len(mass) else 0.0
        share = self.options.kinship if self.kin_.weight.any() else 0.0
        pull: float = share / (1.0 - share) * usual
        return pull

    def turn(self) -> None:
        self._smooth(self.own_.sharpness, self.kin_.sharpness)
        self.pull_ = self._pull(_PULL_PROMPTS)

    def score(self, prompts: Sequence[str], embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
        own, mass = self.own_(embeddings)
        kin, _ = self.kin_(embeddings)
        foretold = self.options.kinship * kin
        gap = (mass * own + self.pull_ * foretold) / np.maximum(mass + self.pull_, 1e-300)
        rate: NDArray[np.float64] = np.clip(self.level_ + gap, 0.0, 1.0)
        return rate

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        arrays, models = self.stood_.to_arrays()
        return {"embeddings": self.embeddings_, **arrays}, {
            "models": models,
            "lineup": self.lineup_.to_dict(),
            "own_sharpness": self.own_.sharpness,
            "kin_sharpness": self.kin_.sharpness,
            "pull": self.pull_,
        }

    def load_state(self, arrays: Mapping[str, NDArray[Any]], doc: dict[str, Any]) -> None:
        self.embeddings_ = arrays["embeddings"]
        self.stood_ = Standings.from_arrays(arrays, doc["models"])
        self.lineup_ = Lineup.from_dict(doc["lineup"])
        self._smooth(float(doc["own_sharpness"]), float(doc["kin_sharpness"]))
        self.pull_ = float(doc["pull"])


def best_own(
    battles: TrainingBattles,
    stood: Standings,
    trusted: tuple[str, NDArray[np.int64]] | None = None,
) -> tuple[Smoother, list[NDArray[np.float64]]]:
    """Return the smoother over the pair's standings that is best on its trusted battles.

    And for each of `SHARPNESS` the squared errors (k,) on the k prompts of these, each left out
    in turn.

    Parameters
    ----------
    trusted : (str, ndarray), optional
        The trusted label kind and its prompts, where they must not depend on the battles' weights
        (as tiers that stand in for the pair do); by default the battles' own.
    """
    kind, prompts = trusted or (battles.trusted_kind(), battles.trusted_prompts())
    gap, weight = stood.gap(battles.pair)
    rows = np.flatnonzero(weight)
    truth, told = standings(battles, only=kind).gap(battles.pair)
    judged = np.intersect1d(np.flatnonzero(told), prompts)
    return _best(
        battles.embeddings[rows], gap[rows], weight[rows], np.searchsorted(rows, judged),
        truth[judged],
    )  # fmt: skip


def _best(
    embeddings: NDArray[np.float32],
    residual: NDArray[np.float64],
    weight: NDArray[np.float64],
    judged: NDArray[np.int64],
    truth: NDArray[np.float64],
) -> tuple[Smoother, list[NDArray[np.float64]]]:
    """Return the best smoother on the rows `judged` (k,), and all squared errors there."""
    if not len(judged):
        return Smoother(embeddings, residual, weight, SHARPNESS[0]), []
    some = spread(np.arange(len(judged)), _MAX_LEFT_OUT)
    mean, _ = leave_one_out(embeddings, residual, weight, judged[some], SHARPNESS)
    errors = list((mean - truth[some]) ** 2)
    best = SHARPNESS[int(np.argmin([e.mean() for e in errors]))]
    return Smoother(embeddings, residual, weight, best), errors


def spread(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return at most so many of the rows, evenly spread."""
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]
