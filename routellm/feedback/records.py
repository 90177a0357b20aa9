"""What is stored: decisions, judgements of them, and duels. Records are added, never changed."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Literal, get_args

from routellm.errors import UsageError

Route = Literal["strong", "weak"]
Winner = Literal["strong", "weak", "tie"]
JudgedBy = Literal["thumbs", "rating", "other_was_better", "vote", "judge"]

VALUES: Final[dict[str, tuple[str, ...]]] = {
    "thumbs": ("up", "down"),
    "rating": ("1", "2", "3", "4", "5"),  # 5 is best
    "other_was_better": ("yes",),
    "vote": get_args(Winner),  # of the user, who saw both answers
    "judge": get_args(Winner),  # of an LLM, which read both
}


def _uid() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True)
class Decided:
    """One request that was routed and answered.

    Attributes
    ----------
    id : str
        What the client quotes back: the upstream's response id, or `request_id` if it gave none.
    at : datetime
        With a time zone.
    request_id : str
        The gateway's own; found as well as `id`. Clients may choose it, so neither is unique: of
        two decisions of one id, a judgement is of the latest before it.
    key_id : str or None
        Of the API key that it came with.
    user : str or None
        The client's name for its user. The store keeps a digest of it, and gives none back.
    version, kind : str
        Of the router that decided; "" if none did.
    route, model, other_model : str
        Who answered, and the other model of the pair; all as the pair's battles name them.
    win_rate, threshold : float or None
    probability : float
        With which this route was chosen: 1 unless something was drawn.
    reason : str
    canary : bool
    endpoint : str
    status : int
        Of HTTP.
    input_tokens, output_tokens : int or None
    usd : float or None
        What the answer cost.
    prompt : str or None
        What was scored, where prompts are stored; `routellm.feedback.writer` redacts it.
    uid : str
        The record's own; a record that is written twice is stored once.
    """

    id: str
    at: datetime
    request_id: str
    key_id: str | None
    user: str | None
    version: str
    kind: str
    route: Route
    model: str
    other_model: str
    win_rate: float | None
    threshold: float | None
    probability: float
    reason: str
    canary: bool
    endpoint: str
    status: int
    input_tokens: int | None = None
    output_tokens: int | None = None
    usd: float | None = None
    prompt: str | None = field(default=None, repr=False)
    uid: str = field(default_factory=_uid)


@dataclass(frozen=True)
class Judged:
    """What somebody made of an answer.

    Attributes
    ----------
    id : str
        The judgement's own, unique.
    at : datetime
    decision_id : str
        `id` or `request_id` of the decision.
    kind : str
    value : str
        One of `VALUES` of the kind.
    by : str
        ``user``, or the name of the LLM that judged; never a person's id.

    Raises
    ------
    UsageError
        If kind or value is none of these.
    """

    id: str
    at: datetime
    decision_id: str
    kind: JudgedBy
    value: str
    by: str = "user"

    def __post_init__(self) -> None:
        if self.kind not in VALUES:
            raise UsageError(f"no kind of feedback {self.kind!r}: give one of {', '.join(VALUES)}")
        if self.value not in VALUES[self.kind]:
            raise UsageError(
                f"{self.value!r} is no value of {self.kind}: give one of "
                f"{', '.join(VALUES[self.kind])}"
            )


@dataclass(frozen=True)
class Dueled:
    """Both models answered one request, and somebody preferred one.

    Attributes
    ----------
    decision_id : str
    at : datetime
    served_route : str
        Whose answer the client got.
    winner : str
        strong, weak or tie.
    by : str
        ``user``, or the name of the LLM that judged.
    """

    decision_id: str
    at: datetime
    served_route: Route
    winner: Winner
    by: str
    uid: str = field(default_factory=_uid)

    def __post_init__(self) -> None:
        if self.winner not in get_args(Winner):
            raise UsageError(f"a duel's winner is strong, weak or tie, not {self.winner!r}")


@dataclass(frozen=True)
class Outcome:
    """A judgement or a duel beside the decision it is of, whose prompt is stored.

    Attributes
    ----------
    decision : str
        The decision's uid.
    prompt, route, model, other_model : str
        As of the decision.
    id : str
        Of the judgement or duel.
    at : datetime
    kind : str
        Of the judgement, or ``duel``.
    value : str
        Its value, or the duel's winner.
    by : str
    """

    decision: str
    prompt: str
    route: str
    model: str
    other_model: str
    id: str
    at: datetime
    kind: str
    value: str
    by: str


Record = Decided | Judged | Dueled
