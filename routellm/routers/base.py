"""The router protocol, and the training battles a router learns from.

A router kind is one file with one class, found through the entry points of the group
``routellm.routers`` (ours and those of any other installed package). It learns from
:class:`TrainingBattles`, scores prompts in batches, and keeps its state as named arrays plus a
JSON document, so that saving never needs pickle.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from pydantic import ValidationError as InvalidOptions

from routellm.calibration import IDENTITY, Platt
from routellm.embeddings.base import Encoder, Progress
from routellm.errors import TrainingError, UsageError
from routellm.lineup import Lineup
from routellm.ratings import assign_tiers, fit_bradley_terry, win_table
from routellm.threads import one_blas_thread

Arrays = dict[str, NDArray[Any]]

N_TIERS = 10  # paper, section 4.1
MIN_PAIR_BATTLES = 200  # fewer than this and the pair's tiers stand in for it

# which label kind says what a better answer is, where they differ: a known right answer before a
# person's vote, a vote before a judge's
TRUST = ("golden", "human", "feedback", "judge")
MIN_TRUSTED = 30  # validation battles of a kind worth choosing by


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

    def where(self, keep: NDArray[np.bool_]) -> TrainingBattles:
        """Return the battles marked in `keep` (n,), with the prompts that they are on."""
        used, prompt = np.unique(self.prompt[keep], return_inverse=True)
        return replace(
            self,
            prompts=tuple(self.prompts[i] for i in used),
            embeddings=self.embeddings[used],
            prompt=prompt.astype(np.int64),
            model_a=self.model_a[keep],
            model_b=self.model_b[keep],
            preference_a=self.preference_a[keep],
            weight=self.weight[keep],
            label_kind=self.label_kind[keep],
            validation=self.validation[keep],
        )

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

    def kinds_by_trust(self) -> list[str]:
        """Return the label kinds at hand, the most trusted first."""
        have = set(np.unique(self.label_kind))
        return [k for k in TRUST if k in have] + sorted(have - set(TRUST))

    def trusted_kind(self) -> str:
        """Return the label kind that choices are made by.

        The most trusted one with at least `MIN_TRUSTED` battles of the pair among the validation
        prompts; if none has as many, the one that has most.
        """
        rows, _ = self.of_pair()
        kinds = self.label_kind[rows][self.validation[rows]]
        counts = {k: int((kinds == k).sum()) for k in self.kinds_by_trust()}
        enough = [k for k, n in counts.items() if n >= MIN_TRUSTED]
        return enough[0] if enough else max(counts, key=lambda k: counts[k])

    def trusted_prompts(self) -> NDArray[np.int64]:
        """Return the prompts (k,), ascending, on which the pair has battles of the trusted kind."""
        rows, _ = self.of_pair()
        trusted = self.label_kind[rows] == self.trusted_kind()
        return np.unique(self.prompt[rows[trusted]])

    def pair_validation(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the pair's validation battles as `of_pair` does: what choices are made on.

        Only those of the most trusted label kind (`trusted_kind`): kinds differ in what they
        call better, and a choice needs one measure.
        """
        rows, preference = self.of_pair()
        held = self.validation[rows] & (self.label_kind[rows] == self.trusted_kind())
        return rows[held], preference[held]

    def tiers(self) -> NDArray[np.int64]:
        """Return each model's tier (m,), 0 the best, the pair's two models kept apart."""
        table = win_table(
            self.model_a, self.model_b, self.preference_a, self.weight, len(self.models)
        )
        pair = (self.models.index(self.pair.strong), self.models.index(self.pair.weak))
        return assign_tiers(fit_bradley_terry(table), N_TIERS, apart=pair)


class RouterOptions(BaseModel):
    """What can be set about a kind (``training.options.KIND``); a kind adds fields of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Router(ABC):
    """Says how likely the strong model's answer would be preferred.

    Subclasses set `kind` and implement `fit`, `score`, `state` and `load_state`.

    Attributes
    ----------
    kind : str
        The name it is registered under.
    Options : type
        What can be set about it.
    reads_embeddings : bool
        Whether `score` looks at embeddings; False spares the encoder.
    any_pair : bool
        Whether it learns of models rather than of its pair alone, so that `for_pair` can turn it
        to another one. Such a kind sets `lineup_` when it is fitted and loaded.
    lineup_ : Lineup
        The models it has met.
    learns_from_validation : bool
        Whether `fit` learns from validation battles too. If so, calibration fits a second router
        without them; a kind that only chooses by them (an epoch, say) sets False.
    golden_tolerance : float
        Largest change of a win rate that another machine's rounding can make.
    platt : Platt
        Maps scores to calibrated win rates; unchanged until a trainer sets it.
    """

    kind: ClassVar[str]
    Options: ClassVar[type[RouterOptions]] = RouterOptions
    reads_embeddings: ClassVar[bool] = True
    any_pair: ClassVar[bool] = False
    learns_from_validation: ClassVar[bool] = True
    golden_tolerance: ClassVar[float] = 1e-4
    lineup_: Lineup
    platt: Platt = IDENTITY

    def __init__(self, encoder: Encoder, pair: Pair, options: RouterOptions | None = None) -> None:
        self.encoder = encoder
        self.pair = pair
        self.options: Any = options if options is not None else self.Options()

    def win_rate(self, prompts: Sequence[str]) -> NDArray[np.float64]:
        """Return P(strong preferred | prompt), a tie counting half: float64 (n,) in [0, 1].

        Calibrated: `score`, mapped by `platt`.
        """
        if not prompts:
            return np.empty(0, dtype=np.float64)
        if not self.reads_embeddings:
            return self.rates(prompts, np.empty((len(prompts), 0), dtype=np.float32))
        embeddings = self.encoder.encode(prompts)
        with one_blas_thread() if len(prompts) == 1 else nullcontext():
            return self.rates(prompts, embeddings)

    def rates(self, prompts: Sequence[str], embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return `win_rate` (n,) of prompts whose embeddings (n, d) are at hand."""
        return self.platt(self.score(prompts, embeddings))

    def for_pair(self, pair: Pair) -> Self:
        """Return a router between two other models, by what this one knows of them.

        Nothing is trained; this router stays as it is. What was chosen on the trained pair's
        battles (epochs, sharpness, weights of label kinds) stays as chosen. Its win rates are not
        calibrated: `platt` was fitted on the trained pair and is dropped.

        Raises
        ------
        UsageError
            If the kind knows one pair only, or too little of these two models.
        """
        if pair == self.pair:
            return self
        if not self.any_pair:
            able = ", ".join(k for k in router_kinds() if router_class(k).any_pair)
            raise UsageError(
                f"a {self.kind} router knows only the pair it was trained for "
                f"({self.pair.strong}, {self.pair.weak}): use a version of a kind that knows "
                f"others ({able}), or train one for {pair.strong} and {pair.weak}"
            )
        pair = Pair(*self.lineup_.resolve(pair.strong, pair.weak))
        if pair == self.pair:
            return self
        turned = copy(self)
        turned.pair, turned.platt = pair, IDENTITY
        turned.turn()
        return turned

    def turn(self) -> None:  # noqa: B027 (most of what is learnt may hold for any pair)
        """Set what depends on the pair, once `for_pair` has changed it."""

    def unavailable(self) -> str:
        """Return why this router cannot be trained on this machine, or "" if it can.

        Asked before any work is done; kinds whose weights come from a hub say so here.
        """
        return ""

    @abstractmethod
    def fit(
        self,
        battles: TrainingBattles,
        *,
        rng: np.random.Generator,
        progress: Progress | None = None,
        checkpoint: Path | None = None,
    ) -> FitReport:
        """Learn from battles; deterministic for the same battles and generator.

        Parameters
        ----------
        checkpoint : Path, optional
            Folder that belongs to this very training, kept when it is killed and removed when it
            is done: kinds that train for long keep there what they need to go on.
        """

    @abstractmethod
    def score(self, prompts: Sequence[str], embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return win rates (n,) as learnt, before calibration; `rates` has them calibrated."""

    @abstractmethod
    def state(self) -> tuple[Arrays, dict[str, Any]]:
        """Return what was learnt: named arrays, and a JSON-serialisable document."""

    @abstractmethod
    def load_state(self, arrays: Mapping[str, NDArray[Any]], doc: dict[str, Any]) -> None:
        """Take on what `state` returned."""


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


GROUP = "routellm.routers"


def router_kinds() -> tuple[str, ...]:
    """Return the names of all installed router kinds, in alphabetical order."""
    from importlib.metadata import entry_points

    return tuple(sorted({e.name for e in entry_points(group=GROUP)}))


def router_class(kind: str) -> type[Router]:
    """Return the class of a router kind, importing only that kind.

    Raises
    ------
    UsageError
        If there is no such kind, two packages claim it, or it cannot be imported.
    """
    from importlib.metadata import entry_points

    found = {e.value: e for e in entry_points(group=GROUP, name=kind)}
    if not found:
        known = ", ".join(router_kinds())
        raise UsageError(f"unknown router kind {kind!r}: use one of {known}")
    if len(found) > 1:
        raise UsageError(
            f"router kind {kind!r} is claimed by {' and '.join(sorted(found))}: uninstall one of "
            "these packages"
        )
    (entry,) = found.values()
    try:
        loaded = entry.load()
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"router kind {kind!r} cannot be imported from {entry.value} ({error}): mend or "
            "reinstall the package that registers it"
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, Router)):
        raise UsageError(
            f"router kind {kind!r} is {entry.value}, which is no subclass of "
            "routellm.routers.Router: mend the package that registers it"
        )
    return loaded


def make_router(
    kind: str, encoder: Encoder, pair: Pair, options: Mapping[str, Any] | None = None
) -> Router:
    """Return an untrained router.

    Parameters
    ----------
    options : mapping, optional
        Values for fields of the kind's `Options`.

    Raises
    ------
    UsageError
        If there is no such kind, or it has no such option.
    """
    cls = router_class(kind)
    try:
        return cls(encoder, pair, cls.Options.model_validate(dict(options or {})))
    except InvalidOptions as error:
        first = error.errors()[0]
        known = ", ".join(cls.Options.model_fields) or "none"
        raise UsageError(
            f"training.options.{kind}.{'.'.join(map(str, first['loc']))}: {first['msg']} (its "
            f"options: {known}); see docs/routers.md"
        ) from error


def options_table() -> str:
    """Return the options of all installed kinds as a Markdown table: what docs/routers.md shows."""
    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    for kind in router_kinds():
        for name, field in router_class(kind).Options.model_fields.items():
            lines.append(f"| `{kind}.{name}` | `{field.default}` | {field.description} |")
    return "\n".join(lines) + "\n"
