"""Battles from the gateway's own feedback: what users and judges made of its answers.

A judgement becomes a battle only where it says something of both models; docs/feedback.md has the
table and the reasons. Of several on one decision the strongest counts, and of two as strong the
later: one answer is one battle, however often it is clicked on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from routellm.battles import BATTLE_SCHEMA, battle_id, canonical_model
from routellm.errors import SourceError, SourceUnreachable
from routellm.feedback import store_url
from routellm.feedback.errors import FeedbackError, FeedbackUnreachable
from routellm.feedback.store import FeedbackStore
from routellm.settings import Settings
from routellm.sources.base import NOTHING

if TYPE_CHECKING:
    from routellm.feedback.records import Outcome

SCHEME = "gateway://"
_BATCH = 1000

# what says more of the pair, first: a person who saw both answers, a person who asked for the
# other one, an LLM that read both, a person who saw one
_STRENGTH = ("vote", "other_was_better", "duel", "judge", "thumbs", "rating")


class GatewaySource:
    """The source ``gateway://``, or ``gateway://`` and the address of a feedback store.

    Raises
    ------
    SourceError
        If there is no store.
    """

    simulated = False
    passed_over: Mapping[str, str] = NOTHING

    def __init__(self, spec: str, settings: Settings) -> None:
        given = spec.removeprefix(SCHEME)
        self._store = FeedbackStore(given or store_url(settings))
        self.name = SCHEME + self._store.name.removeprefix(SCHEME)
        if not self._store.exists():
            raise SourceError(
                f"no feedback store {self._store.name}: the gateway makes it once it answers "
                "requests with `feedback` on"
            )

    def cursor(self) -> dict[str, Any]:
        try:
            return self._store.outcomes_seen()
        except FeedbackError as error:
            raise _source_error(error) from error

    def batches(self, since: dict[str, Any] | None) -> Iterator[pa.RecordBatch]:
        """Yield a battle for each decision that was judged of both models.

        All of them each time, whatever `since` is: a judgement can come to be of a decision that
        is written after it, and prompts are kept for a short time only.
        """
        rows: list[dict[str, Any]] = []
        try:
            for _, found in itertools.groupby(self._store.outcomes(), attrgetter("decision")):
                battle = _battle(list(found), self.name)
                if battle is not None:
                    rows.append(battle)
                if len(rows) == _BATCH:
                    yield pa.RecordBatch.from_pylist(rows, schema=BATTLE_SCHEMA)
                    rows = []
        except FeedbackError as error:
            raise _source_error(error) from error
        if rows:
            yield pa.RecordBatch.from_pylist(rows, schema=BATTLE_SCHEMA)


def winner_of(outcome: Outcome) -> str | None:
    """Return who won: strong, weak or tie; None if this says nothing of the pair."""
    kind, value, route = outcome.kind, outcome.value, outcome.route
    if kind in ("vote", "judge", "duel"):
        return value
    if kind == "other_was_better":
        return "weak" if route == "strong" else "strong"
    if route == "strong":
        return None  # whether weak would have done is not known from strong's answer
    if kind == "thumbs":
        return {"up": "tie", "down": "strong"}[value]
    return {"1": "strong", "2": "strong", "3": None, "4": "tie", "5": "tie"}[value]


def _battle(outcomes: list[Outcome], source: str) -> dict[str, Any] | None:
    """Return the battle that one decision's outcomes make, in the order of their time."""
    said = [(_rank(o), i, o) for i, o in enumerate(outcomes) if winner_of(o) is not None]
    if not said:
        return None
    outcome = min(said, key=lambda s: (s[0], -s[1]))[2]
    strong, weak = outcome.model, outcome.other_model
    if outcome.route == "weak":
        strong, weak = weak, strong
    winner = {"strong": "model_a", "weak": "model_b", "tie": "tie"}[winner_of(outcome) or ""]
    row: dict[str, Any] = {
        "prompt": outcome.prompt,
        "model_a": canonical_model(strong),
        "model_b": canonical_model(weak),
        "winner": winner,
        "preference_a": {"model_a": 1.0, "model_b": 0.0, "tie": 0.5}[winner],
        "label_kind": "feedback",
        "judge": None if outcome.by == "user" else outcome.by,
    }
    row["battle_id"] = battle_id(row_key=outcome.id, **row)
    return row | {"source": source, "voted_at": outcome.at}


def _rank(outcome: Outcome) -> int:
    if outcome.kind == "duel" and outcome.by == "user":
        return _STRENGTH.index("vote")
    return _STRENGTH.index(outcome.kind)


def _source_error(error: FeedbackError) -> SourceError:
    kind = SourceUnreachable if isinstance(error, FeedbackUnreachable) else SourceError
    return kind(str(error))
