"""Would retraining have paid? History replayed: two policies on the battles that came next.

At each date t, routers are trained on what was known then (`routellm.as_of`). Until the next date
the *retrained* policy serves the best of them, by what was known at t; the *never retrained* one
serves the best of the first date for ever. Both are measured on the battles voted in between,
whose prompts no training had shown, and compared on the same resamples of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routellm.as_of import History, utc
from routellm.errors import UsageError
from routellm.evaluation.two_policies import Comparison
from routellm.ratings import assign_tiers, fit_bradley_terry, win_table
from routellm.routers.base import MIN_PAIR_BATTLES, N_TIERS, Pair

Floats = NDArray[np.float64]

_UNITS = {"h": "hours", "d": "days", "w": "weeks"}
MAX_DATES = 1000


@dataclass(frozen=True)
class Votes:
    """The battles that policies are measured on, in the order they were voted.

    Attributes
    ----------
    prompts : tuple of str, length u
        Distinct.
    prompt : ndarray int64 (n,)
        Row of each battle's prompt.
    preference : ndarray float64 (n,)
        P(strong preferred): 1 win, 0.5 tie, 0 loss, or a judge's probability.
    voted : ndarray datetime64[us] (n,)
    """

    prompts: tuple[str, ...]
    prompt: NDArray[np.int64]
    preference: Floats
    voted: NDArray[np.datetime64]

    def between(self, start: datetime, end: datetime) -> NDArray[np.int64]:
        """Return the rows of the battles voted after `start`, and by `end`."""
        return np.flatnonzero((self.voted > utc(start)) & (self.voted <= utc(end)))


@dataclass(frozen=True)
class Window:
    """The time from one training to the next.

    Attributes
    ----------
    start, end : datetime
        Trained on what was known by `start`; measured on battles voted after it, and by `end`.
    known : int
        Battles known by `start`.
    heldout_apgr : dict
        By router kind, what the routers trained at `start` were chosen by.
    serves : str
        Kind of the router that the retrained policy serves.
    excluded : int
        Battles left out because training had shown their prompts.
    comparison : Comparison or None
        None without battles.
    """

    start: datetime
    end: datetime
    known: int
    heldout_apgr: dict[str, float]
    serves: str
    excluded: int
    comparison: Comparison | None


@dataclass(frozen=True)
class Backtest:
    """A replayed history.

    Attributes
    ----------
    snapshot : str
        Digest of the snapshot that was replayed.
    sides : (tuple of str, tuple of str)
        Models whose battles stand for strong's against weak's: the two themselves, or their tiers.
    undated : int
        Battles of these that say no date: they train from when they were taken in, and measure
        nothing.
    pooled : Comparison or None
        Over all windows; None without battles.
    """

    snapshot: str
    simulated: bool
    pair: Pair
    sides: tuple[tuple[str, ...], tuple[str, ...]]
    every: timedelta
    windows: tuple[Window, ...]
    pooled: Comparison | None
    undated: int

    @property
    def days(self) -> float:
        """The time replayed."""
        return (self.windows[-1].end - self.windows[0].start) / timedelta(days=1)

    @property
    def verdict(self) -> str:
        """Whether retraining paid, in a sentence with its numbers."""
        often, weeks = f"every {spelled(self.every)}", f"over {spelled(timedelta(days=self.days))}"
        if self.pooled is None:
            return f"Nothing can be said of retraining {often}: no battle was voted {weeks}."
        on = f"{weeks} on {self.pooled.battles:,} battles"
        gain = self.pooled.gain.apgr
        if gain is None:
            return (
                f"Nothing can be said of retraining {often}: {weeks} {self.pair.strong} was no "
                f"better than {self.pair.weak} on {self.pooled.battles:,} battles."
            )
        span = f"[{gain.low:.3f}, {gain.high:.3f}] APGR {on}"
        if gain.low > 0:
            return f"Retraining {often} gained {gain.value:.3f} {span}."
        if gain.high < 0:
            return f"Retraining {often} lost {-gain.value:.3f}: {gain.value:+.3f} {span}."
        return f"No gain from retraining {often} can be shown: {gain.value:+.3f} {span}."

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(v) for v in value]
            if isinstance(value, datetime):
                return value.isoformat()
            return value / timedelta(days=1) if isinstance(value, timedelta) else value

        doc = plain(asdict(self))
        doc["every_days"] = doc.pop("every")
        return {"verdict": self.verdict, **doc}


def period(text: str) -> timedelta:
    """Return the time that ``7d``, ``12h`` or ``2w`` names.

    Raises
    ------
    UsageError
        If it is none of these.
    """
    found = re.fullmatch(r"([1-9]\d{0,4})([hdw])", text)
    if found is None:
        raise UsageError(
            f"{text!r} is no period: give a whole number of hours, days or weeks, such as 12h, "
            "7d or 2w"
        )
    return timedelta(**{_UNITS[found.group(2)]: int(found.group(1))})


def spelled(length: timedelta) -> str:
    """Return a length of time as a person says it."""
    hours = round(length / timedelta(hours=1))
    for unit, size in (("week", 168), ("day", 24)):
        if hours % size == 0 and hours > size:  # 7 days, as a person sets it; then 2 weeks
            return f"{hours // size} {unit}s"
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return "1 hour" if hours == 1 else f"{hours} hours"


def dates(start: datetime, end: datetime, every: timedelta) -> list[tuple[datetime, datetime]]:
    """Return the windows (t, next t]: the last one ends at `end`, and may be shorter.

    Raises
    ------
    UsageError
        If there is no time between the two, or for too many trainings.
    """
    if end <= start:
        raise UsageError(
            f"nothing lies between {start:%Y-%m-%dT%H:%M} and {end:%Y-%m-%dT%H:%M} UTC: give a "
            "--to after --from"
        )
    n = -(-(end - start) // every)
    if n > MAX_DATES:
        raise UsageError(
            f"retraining every {spelled(every)} is {n:,} trainings of each router: give a longer "
            f"--every (at most {MAX_DATES:,} are replayed)"
        )
    return [(start + i * every, min(start + (i + 1) * every, end)) for i in range(n)]


def sides_of(
    history: History, pair: Pair, start: datetime, end: datetime
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the models whose battles stand for strong's against weak's.

    The two themselves, if they met at least `MIN_PAIR_BATTLES` times between the two dates; else
    the models of their tiers, as rated by what was known at the first (paper, section 4.1).
    """
    both = {pair.strong, pair.weak}
    a, b = (np.array(history.table[c].to_pylist(), dtype=object) for c in ("model_a", "model_b"))
    in_time = (history.voted > utc(start)) & (history.voted <= utc(end))
    met = sum({x, y} == both for x, y in zip(a[in_time], b[in_time], strict=True))
    mask = history.known_by(start)
    models = sorted(set(a[mask]) | set(b[mask]))
    if met >= MIN_PAIR_BATTLES or not both <= set(models):
        return (pair.strong,), (pair.weak,)
    row = {name: i for i, name in enumerate(models)}
    rows_a, rows_b = (np.array([row[name] for name in side[mask]]) for side in (a, b))
    preference = history.table["preference_a"].to_numpy()[mask]
    table = win_table(rows_a, rows_b, preference, np.ones(len(rows_a)), len(models))
    tier = assign_tiers(fit_bradley_terry(table), N_TIERS, apart=(row[pair.strong], row[pair.weak]))
    strong, weak = (
        tuple(name for name in models if tier[row[name]] == tier[row[one]])
        for one in (pair.strong, pair.weak)
    )
    return strong, weak


def votes_of(
    history: History, sides: tuple[Sequence[str], Sequence[str]], label_kinds: Sequence[str]
) -> tuple[Votes, int]:
    """Return the dated battles between two sides, and how many say no date."""
    strong, weak = (set(side) for side in sides)
    table = history.table.select(["model_a", "model_b", "label_kind"]).to_pydict()
    rows, forth = [], []
    for i, (a, b, kind) in enumerate(zip(*table.values(), strict=True)):
        if kind in label_kinds and ((a in strong and b in weak) or (a in weak and b in strong)):
            rows.append(i)
            forth.append(a in strong)
    at = np.array(rows, dtype=np.int64)
    preference = history.table["preference_a"].to_numpy()[at]
    preference = np.where(np.array(forth, dtype=bool), preference, 1.0 - preference)
    dated = np.flatnonzero(~np.isnat(history.voted[at]))
    order = dated[np.argsort(history.voted[at[dated]], kind="stable")]
    asked = history.table["prompt"].take(at[order]).combine_chunks().dictionary_encode()
    votes = Votes(
        tuple(asked.dictionary.to_pylist()),
        asked.indices.to_numpy().astype(np.int64),
        preference[order].astype(np.float64),
        history.voted[at[order]],
    )
    return votes, len(at) - len(order)
