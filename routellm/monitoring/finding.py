"""What a check of the monitor is, and what it finds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from routellm.monitoring.seen import Seen

Outcome = Literal["ok", "warn", "fail", "unknown"]
ORDER: tuple[Outcome, ...] = ("fail", "warn", "unknown", "ok")  # the worst first


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes
    ----------
    name : str
        Of the check; an event of the monitor is called ``routellm.monitor.<name>``.
    outcome : str
        ``unknown`` where nothing could be measured; `detail` says why.
    value, limit : float or None
        What was measured, and from where on it fails.
    detail : str
        One sentence.
    """

    name: str
    outcome: Outcome
    value: float | None = None
    limit: float | None = None
    detail: str = ""


class Unknown(Exception):
    """Something cannot be measured; the message says why."""


class Check(ABC):
    """One thing that is looked at.

    Attributes
    ----------
    name : str
    retrain : bool
        Whether a retraining is what helps where it fails.
    """

    name: ClassVar[str]
    retrain: ClassVar[bool] = False

    @abstractmethod
    def look(self, seen: Seen) -> Finding:
        """Return what it finds.

        Raises
        ------
        Unknown, RouteLLMError
            If it cannot be measured.
        """


def graded(value: float, limit: float, warn_from: float) -> Outcome:
    """Return how a value stands that must not be above a limit."""
    return "fail" if value > limit else "warn" if value > warn_from else "ok"
