"""The models that a router has met: how often, and how they rate, by label kind.

Kept with routers that can be turned to another pair, so that they can say which pairs they know
enough of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from routellm.battles import canonical_model
from routellm.errors import UsageError
from routellm.ratings import fit_bradley_terry, win_table

if TYPE_CHECKING:
    from routellm.routers.base import TrainingBattles

MIN_MODEL_BATTLES = 30  # a standard error of 0.09 on the share of battles a model wins
_SHOWN = 8


@dataclass(frozen=True)
class Lineup:
    """Battles and ratings of every model.

    Attributes
    ----------
    models : tuple of str, length m
    kinds : tuple of str, length k
        Label kinds, the most trusted first.
    battles : ndarray int64 (k, m)
        Battles of each model that count, by label kind.
    ratings : ndarray float64 (k, m)
        Bradley-Terry ratings by each label kind; 0 where it has no battle of the model.
    groups : ndarray int64 (k, m)
        Models that battles of a label kind link, if only through others, have the same number.
    """

    models: tuple[str, ...]
    kinds: tuple[str, ...]
    battles: NDArray[np.int64]
    ratings: NDArray[np.float64]
    groups: NDArray[np.int64]

    @classmethod
    def of(cls, battles: TrainingBattles) -> Lineup:
        """Count and rate the models of training battles; a battle of weight 0 does not count."""
        from scipy.sparse import csr_matrix
        from scipy.sparse.csgraph import connected_components

        m = len(battles.models)
        kinds = tuple(battles.kinds_by_trust())
        count, group = np.zeros((2, len(kinds), m), np.int64)
        rating = np.zeros((len(kinds), m))
        for i, kind in enumerate(kinds):
            rows = np.flatnonzero((battles.label_kind == kind) & (battles.weight > 0))
            a, b = battles.model_a[rows], battles.model_b[rows]
            count[i] = np.bincount(a, minlength=m) + np.bincount(b, minlength=m)
            table = win_table(a, b, battles.preference_a[rows], battles.weight[rows], m)
            rating[i] = np.where(count[i] > 0, fit_bradley_terry(table), 0.0)
            _, group[i] = connected_components(csr_matrix(table), directed=False)
        return cls(battles.models, kinds, count, rating, group)

    def resolve(self, strong: str, weak: str) -> tuple[str, str]:
        """Return the two models' names as they are known here.

        Raises
        ------
        UsageError
            If they are one model, or one of them is unknown or has fewer than
            `MIN_MODEL_BATTLES` battles.
        """
        names = self._name(strong), self._name(weak)
        if names[0] == names[1]:
            raise UsageError(f"strong and weak are the same model ({names[0]}): name two models")
        for name in names:
            n = int(self.battles[:, self.models.index(name)].sum())
            if n < MIN_MODEL_BATTLES:
                raise UsageError(
                    f"{name} has {n:,} battles that count in this router, {MIN_MODEL_BATTLES} are "
                    f"needed: ingest more of them and retrain, or name another model "
                    f"({self._best_known()})"
                )
        return names

    def doubt(self, strong: str, weak: str) -> str:
        """Return a sentence on what speaks against this pair, or "".

        Either nothing links the two, or the most trusted label kind that links them rates strong
        below weak.
        """
        kinds = np.flatnonzero(self.shares(strong, weak))
        if not len(kinds):
            return (
                f"no battles of one label kind link {strong} and {weak}, not even through other "
                "models: win rates order queries, but their level is a guess"
            )
        s, w = (self.ratings[kinds[0], self.models.index(name)] for name in (strong, weak))
        if s >= w:
            return ""
        return (
            f"{strong} is rated below {weak} by {self.kinds[kinds[0]]} labels: swap strong and "
            "weak if this is not what you mean"
        )

    def shares(self, strong: str, weak: str) -> NDArray[np.float64]:
        """Return how much each label kind (k,) says of how two models compare.

        In proportion to the battles of the model that has fewer of that kind; they sum to 1, or
        are all 0 if no kind links the two.
        """
        two = [self.models.index(strong), self.models.index(weak)]
        linked = self.groups[:, two[0]] == self.groups[:, two[1]]
        both = np.where(linked, self.battles[:, two].min(axis=1), 0)
        share: NDArray[np.float64] = both / max(int(both.sum()), 1)
        return share

    def to_dict(self) -> dict[str, Any]:
        return {
            "models": list(self.models),
            "kinds": list(self.kinds),
            "battles": self.battles.tolist(),
            "ratings": self.ratings.tolist(),
            "groups": self.groups.tolist(),
        }

    @classmethod
    def from_dict(cls, doc: Mapping[str, Any]) -> Lineup:
        return cls(
            tuple(doc["models"]),
            tuple(doc["kinds"]),
            np.array(doc["battles"], np.int64),
            np.array(doc["ratings"], np.float64),
            np.array(doc["groups"], np.int64),
        )

    def _name(self, name: str) -> str:
        known = name if name in self.models else canonical_model(name)
        if known not in self.models:
            raise UsageError(
                f"this router has no battle of {name!r}: name models it knows "
                f"({self._best_known()})"
            )
        return known

    def _best_known(self) -> str:
        order = np.argsort(-self.battles.sum(axis=0), kind="stable")
        more = ", ..." if len(order) > _SHOWN else ""
        return ", ".join(self.models[i] for i in order[:_SHOWN]) + more
