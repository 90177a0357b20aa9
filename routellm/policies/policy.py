"""What a policy is: anything that answers a query at a quality, a price and a number of calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from routellm.errors import UsageError
from routellm.evaluation.metrics import Floats
from routellm.policies.recorded import Recorded


@dataclass(frozen=True)
class Point:
    """What one setting of a policy did on each query of a table.

    Attributes
    ----------
    setting : str
        What was set, in words: a threshold, a weight of cost.
    quality, usd, calls, latency_s : ndarray (n,)
        Score of the answer given; dollars of all calls made for it; how many calls; seconds until
        the answer was whole, calls one after the other adding up and calls side by side taking as
        long as the longest.
    """

    setting: str
    quality: Floats
    usd: Floats
    calls: Floats
    latency_s: Floats


def asked_once(table: Recorded, column: NDArray[np.int64], setting: str) -> Point:
    """Return the point that asks one model for each query: `column` (n,) says which."""
    rows = np.arange(len(table))
    return Point(
        setting,
        table.quality[rows, column],
        table.usd[rows, column],
        np.ones(len(table)),
        table.latency_s[rows, column],
    )


@dataclass
class Policy(ABC):
    """One way to answer queries with the models of a pool.

    Attributes
    ----------
    name : str
    trained_on : frozenset of str
        Ids of the rows that it has learnt from; it is not measured on any of these.
    simulated : bool
        Whether what it was measured on was made up for it.
    reads_answers : bool
        Whether it reads what models answered: a table must have recorded it.
    """

    reads_answers: ClassVar[bool] = False
    name: str
    trained_on: frozenset[str] = field(default=frozenset(), init=False)
    simulated: bool = field(default=False, init=False)

    def fit(self, table: Recorded, held: Recorded) -> None:
        """Learn from recorded rows, and choose settings by those of `held`.

        By default there is nothing to learn.
        """
        return

    @abstractmethod
    def answer(self, table: Recorded) -> Sequence[Point]:
        """Return what each of its settings does on a table; the settings are always the same."""

    def figures(self, points: Sequence[Point], table: Recorded, weight: Floats) -> dict[str, float]:
        """Return what its paper measures it by beside quality and price, by name.

        `weight` (n,) is how often each row of the table counts.
        """
        return {}

    def routed(self, table: Recorded) -> tuple[Floats, Floats, Floats] | None:
        """Return win rates, and the scores (n,) of strong and weak, if it routes between two."""
        return None


def answerable(policy: Policy, table: Recorded) -> bool:
    """Say whether a table has recorded what a policy reads."""
    return bool(table.answers) or not policy.reads_answers


def fitted(policy: Policy, table: Recorded, held: Recorded) -> None:
    """Have a policy learn from recorded rows.

    Raises
    ------
    UsageError
        If it reads answers, and none were recorded.
    TrainingError
        If the rows are too few.
    """
    if not answerable(policy, table):
        raise UsageError(
            f"{policy.name} reads what models answered, and table {table.name} has no answers: "
            "give it a column `MODEL:response` for each model, or leave the policy out"
        )
    policy.fit(table, held)


def answered(policy: Policy, table: Recorded) -> Sequence[Point]:
    """Return what a policy does on a table that it has not learnt from.

    Raises
    ------
    UsageError
        If it has learnt from a row of the table; it names that row.
    """
    seen = [i for i, one in enumerate(table.ids) if one in policy.trained_on]
    if seen:
        raise UsageError(
            f"{policy.name} has learnt from {len(seen)} of the {len(table)} rows of {table.name} "
            f"that it is to be measured on (row {seen[0]}, {table.ids[seen[0]][:12]}): train it on "
            "others"
        )
    return policy.answer(table)
