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
from routellm.errors import UsageError

Arrays = dict[str, NDArray[Any]]


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
        How much each battle counts; 1 unless its label kind is weighted.
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
    validation: NDArray[np.bool_]
    pair: Pair

    def __len__(self) -> int:
        return len(self.prompt)


class Router(ABC):
    """Says how likely the strong model's answer would be preferred.

    Subclasses set `kind` and implement `fit`, `score`, `state` and `from_state`.
    """

    kind: ClassVar[str]

    def __init__(self, encoder: Encoder, pair: Pair) -> None:
        self.encoder = encoder
        self.pair = pair

    def win_rate(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        """Return P(strong preferred to weak | prompt), a tie counting half: float64 (n,) in [0, 1]."""
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
    def score(
        self, prompts: Sequence[str], embeddings: NDArray[np.float32]
    ) -> NDArray[np.float64]:
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
