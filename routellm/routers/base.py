"""The router protocol, and the training battles a router learns from.

A router kind is one file with one class. It learns from :class:`TrainingBattles`, scores
prompts in batches, and keeps its state as named arrays plus a JSON document, so that saving
never needs pickle.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from routellm.embeddings.base import Encoder, Progress
from routellm.errors import TrainingError, UsageError
from routellm.ratings import assign_tiers, fit_bradley_terry, win_table

Arrays = dict[str, NDArray[Any]]

N_TIERS = 10  # paper, section 4.1
MIN_PAIR_BATTLES = 200  # fewer than this and the pair's tiers stand in for it


@dataclass(frozen=True)
class Pair:
    """The two models a router chooses between, by canonical name."""

    strong: str
    weak: str


@dataclass(frozen=True)
class TrainingBattles:
    """Battles in the compact form that routers train on.

    Attributes
    ----------
    prompts : tuple of str, length u
        Distinct prompts.
    embeddings : ndarray float32 (u, d)
        Their unit vectors.
    prompt : ndarray int64 (n,)
        Row of each battle's prompt.
    models : tuple of str, length m
    model_a, model_b : ndarray int64 (n,)
        Rows into `models`.
    preference_a : ndarray float64 (n,)
        P(model_a preferred): 1 win, 0.5 tie, 0 loss, or a judge's probability.
    weight : ndarray float64 (n,)
        How much each battle counts.
    label_kind : ndarray of str (n,)
        Where each preference comes from.
    validation : ndarray bool (n,)
        Battles whose prompts are kept to choose epochs, neighbours and the like.
    pair : Pair
        The pair to route between.
    """

    prompts: tuple[str, ...]
    embeddings: NDArray[np.float32]
    prompt: NDArray[np.int64]
    models: tuple[str, ...]
    model_a: NDArray[np.int64]
    model_b: NDArray[np.int64]
    preference_a: NDArray[np.float64]
    weight: NDArray[np.float64]
    label_kind: NDArray[np.str_]
    validation: NDArray[np.bool_]
    pair: Pair

    def __len__(self) -> int:
        return len(self.prompt)

    def between(
        self, strong: NDArray[np.bool_], weak: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return rows of the battles between two sets of models, and P(the first preferred).

        `strong` and `weak` are masks over `models`.
        """
        forth = strong[self.model_a] & weak[self.model_b]
        back = weak[self.model_a] & strong[self.model_b]
        rows = np.flatnonzero(forth | back)
        preference = np.where(forth, self.preference_a, 1.0 - self.preference_a)[rows]
        return rows, preference

    def of_pair(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return rows of the pair's own battles, and P(strong preferred) of each.

        Where the pair met fewer than `MIN_PAIR_BATTLES` times, battles between models of
        strong's tier and of weak's stand in, as the paper does for its sparse arena data
        (section 4.1).

        Raises
        ------
        TrainingError
            If not even the tiers have met.
        """
        names = np.array(self.models)
        rows, preference = self.between(names == self.pair.strong, names == self.pair.weak)
        if len(rows) < MIN_PAIR_BATTLES:
            tier = self.tiers()
            strong, weak = (tier[self.models.index(m)] for m in (self.pair.strong, self.pair.weak))
            rows, preference = self.between(tier == strong, tier == weak)
        if not len(rows):
            raise TrainingError(
                f"no battle between {self.pair.strong} and {self.pair.weak}, nor between models "
                "of their tiers: ingest battles of this pair, or name another pair"
            )
        return rows, preference

    def weightings(self) -> list[NDArray[np.float64]]:
        """Return the battle weights (n,) that a router chooses between on validation.

        As they are; and with the pair's own battles raised to half of the total, for data in
        which battles between other models would drown what the pair's own say.
        """
        rows, _ = self.of_pair()
        pair, total = self.weight[rows].sum(), self.weight.sum()
        raised = self.weight.copy()
        raised[rows] *= (total - pair) / pair
        return [self.weight, raised] if pair < total / 2 else [self.weight]

    def pair_validation(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the pair's validation battles as `of_pair` does: what choices are made on."""
        rows, preference = self.of_pair()
        held = self.validation[rows]
        return rows[held], preference[held]

    def tiers(self) -> NDArray[np.int64]:
        """Return each model's tier (m,), 0 the best, the pair's two models kept apart."""
        table = win_table(
            self.model_a, self.model_b, self.preference_a, self.weight, len(self.models)
        )
        pair = (self.models.index(self.pair.strong), self.models.index(self.pair.weak))
        return assign_tiers(fit_bradley_terry(table), N_TIERS, apart=pair)


class Router(ABC):
    """Says how likely the strong model's answer would be preferred.

    Subclasses set `kind` and implement `fit`, `score`, `state` and `from_state`.
    """

    kind: ClassVar[str]

    def __init__(self, encoder: Encoder, pair: Pair) -> None:
        self.encoder = encoder
        self.pair = pair

    def win_rate(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        """Return P(strong preferred | prompt), a tie counting half: float64 (n,) in [0, 1]."""
        if not prompts:
            return np.empty(0, dtype=np.float64)
        return self.score(prompts, self.encoder.encode(prompts))

    @abstractmethod
    def fit(
        self,
        battles: TrainingBattles,
        *,
        rng: np.random.Generator,
        progress: Progress | None = None,
    ) -> FitReport:
        """Learn from battles; deterministic for the same battles and generator."""

    @abstractmethod
    def score(self, prompts: Sequence[str], embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return win rates (n,) for prompts whose embeddings (n, d) are at hand."""

    @abstractmethod
    def state(self) -> tuple[Arrays, dict[str, Any]]:
        """Return what was learnt: named arrays, and a JSON-serialisable document."""

    @classmethod
    @abstractmethod
    def from_state(
        cls, encoder: Encoder, pair: Pair, arrays: Mapping[str, NDArray[Any]], doc: dict[str, Any]
    ) -> Router:
        """Rebuild a router from what `state` returned."""


def cross_entropy(win_rates: NDArray[np.float64], preference: NDArray[np.float64]) -> float:
    """Return the mean cross-entropy of win rates (n,) against preferences for strong (n,)."""
    p = np.clip(win_rates, 1e-6, 1.0 - 1e-6)
    return float(-(preference * np.log(p) + (1.0 - preference) * np.log1p(-p)).mean())


@dataclass(frozen=True)
class FitReport:
    """What training did, for the run's log.

    Attributes
    ----------
    params : settings the router was trained with, flat.
    metrics : final figures, flat.
    history : stepped metrics, e.g. ``{"validation_loss": [0.69, 0.66, ...]}`` by epoch.
    """

    params: dict[str, str | int | float]
    metrics: dict[str, float]
    history: dict[str, list[float]]


ROUTER_MODULES: dict[str, str] = {
    "random": "routellm.routers.random",
    "sw_ranking": "routellm.routers.sw_ranking",
    "mf": "routellm.routers.mf",
    "knn": "routellm.routers.knn",
}


def router_class(kind: str) -> type[Router]:
    """Return the class of a router kind, importing only that kind.

    Raises
    ------
    UsageError
        If there is no such kind.
    """
    import importlib

    if kind not in ROUTER_MODULES:
        known = ", ".join(ROUTER_MODULES)
        raise UsageError(f"unknown router kind {kind!r}: use one of {known}")
    module = importlib.import_module(ROUTER_MODULES[kind])
    found: type[Router] = module.ROUTER
    return found
