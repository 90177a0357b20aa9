"""``knn``: how the two models stood on similar prompts, and how their kin did where those are few.

A model's standing on a prompt is what its battles there say beyond its overall strength
(`routellm.standings`). The win rate of a query is the pair's overall level plus half of the
difference of the two models' standings, averaged over neighbours by similarity. What the same
average over the models' relatives foretells counts as some more neighbours: as many as the pair
has on prompts like those it fought over, so that it is heard there and decides far away from them.
Battles of either model with any other count, so two models need not have met to be routed between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from routellm.embeddings.base import Progress
from routellm.routers.base import Arrays, FitReport, Router, RouterOptions, TrainingBattles
from routellm.standings import Smoother, Standings, standings

SHARPNESS = (2.5, 5.0, 7.0, 10.0, 14.0, 20.0, 40.0)


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

    def fit(
        self,
        battles: TrainingBattles,
        *,
        rng: np.random.Generator,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
    ) -> FitReport:
        stood = standings(battles)
        self.level_ = stood.expected_of(self.pair)
        self.own_, own_errors = best_own(battles, stood)
        if progress:
            progress(1, 2)
        gap, weight = stood.gap(self.pair, of_kin=True)
        rows = np.flatnonzero(weight)
        self.kin_, kin_errors = _best(
            battles.embeddings[rows], gap[rows], weight[rows], np.arange(len(rows)), gap[rows]
        )
        if progress:
            progress(2, 2)
        every = np.arange(len(self.own_.weight))
        _, mass = self.own_(self.own_.embeddings, left_out=every)
        usual = float(np.median(mass)) if len(mass) else 0.0
        share = self.options.kinship if len(self.kin_.weight) else 0.0
        self.pull_ = share / (1.0 - share) * usual
        return FitReport(
            params={
                "kinship": self.options.kinship,
                "own_sharpness": self.own_.sharpness,
                "kin_sharpness": self.kin_.sharpness,
            },
            metrics={
                "own_prompts": len(self.own_.weight),
                "kin_prompts": len(self.kin_.weight),
                "kin_pull": self.pull_,
            },
            history={
                "own_leave_one_out_mse_by_sharpness": [float(e.mean()) for e in own_errors],
                "kin_leave_one_out_mse_by_sharpness": [float(e.mean()) for e in kin_errors],
            },
        )

    def score(self, prompts: Sequence[str], embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
        own, mass = self.own_(embeddings)
        kin, _ = self.kin_(embeddings)
        foretold = self.options.kinship * kin
        gap = (mass * own + self.pull_ * foretold) / np.maximum(mass + self.pull_, 1e-300)
        rate: NDArray[np.float64] = np.clip(self.level_ + gap, 0.0, 1.0)
        return rate

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        arrays: Arrays = {}
        doc: dict[str, Any] = {"level": self.level_, "pull": self.pull_}
        for name, one in (("own", self.own_), ("kin", self.kin_)):
            arrays[f"{name}_embeddings"] = one.embeddings
            arrays[f"{name}_residual"], arrays[f"{name}_weight"] = one.residual, one.weight
            doc[f"{name}_sharpness"] = one.sharpness
        return arrays, doc

    def load_state(self, arrays: Mapping[str, NDArray[Any]], doc: dict[str, Any]) -> None:
        self.level_, self.pull_ = float(doc["level"]), float(doc["pull"])
        self.own_, self.kin_ = (
            Smoother(
                arrays[f"{name}_embeddings"],
                arrays[f"{name}_residual"],
                arrays[f"{name}_weight"],
                float(doc[f"{name}_sharpness"]),
            )
            for name in ("own", "kin")
        )


def best_own(
    battles: TrainingBattles, stood: Standings
) -> tuple[Smoother, list[NDArray[np.float64]]]:
    """Return the smoother over the pair's standings that is best on its trusted battles.

    And for each of `SHARPNESS` the squared errors (k,) on the k prompts of these, each left out
    in turn.
    """
    gap, weight = stood.gap(battles.pair)
    rows = np.flatnonzero(weight)
    judged = np.intersect1d(rows, battles.trusted_prompts())
    truth, _ = standings(battles, only=battles.trusted_kind()).gap(battles.pair)
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
    tried = [Smoother(embeddings, residual, weight, sharpness) for sharpness in SHARPNESS]
    if not len(judged):
        return tried[0], []
    errors = [(one(embeddings[judged], left_out=judged)[0] - truth) ** 2 for one in tried]
    return tried[int(np.argmin([e.mean() for e in errors]))], errors
