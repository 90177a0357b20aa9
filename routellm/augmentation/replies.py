"""Replies on disk: what a model said to questions of any kind, so that none is paid for twice."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from routellm.augmentation.kept import Kept


@dataclass(frozen=True)
class Said:
    """What came of one question, asked until its reply could be read.

    Attributes
    ----------
    outcome : str or None
        What was read from the reply: a verdict, or a text; None if nothing could be.
    reason : str or None
        Why nothing could be read.
    reply : str
        The end of what the model wrote last.
    calls : int
        How often it was asked; each is paid for.
    input_tokens, output_tokens : int or None
        Of all these calls, as the endpoint reported them; None if it did not.
    cost_usd : float
        At the prices then set; the most it could be, if usage was not reported.
    asked_at : datetime
        UTC.
    """

    outcome: str | None
    reason: str | None
    reply: str
    calls: int
    input_tokens: int | None
    output_tokens: int | None
    cost_usd: float
    asked_at: datetime


class ReplyStore(Kept[Said]):
    """The replies in one file, of any number of models.

    Parameters
    ----------
    template : str
        Version of the prompt that is asked with; only noted, for it is part of every key.
    """

    table = "replies"
    schema = (
        "model TEXT NOT NULL, template TEXT NOT NULL, outcome TEXT, reason TEXT, "
        "reply TEXT NOT NULL, calls INTEGER NOT NULL, input_tokens INTEGER, "
        "output_tokens INTEGER, cost_usd REAL NOT NULL, asked_at TEXT NOT NULL"
    )
    columns = "outcome, reason, reply, calls, input_tokens, output_tokens, cost_usd, asked_at"

    def __init__(self, path: Path, template: str) -> None:
        super().__init__(path)
        self._template = template

    def to_row(self, value: Said, model: str) -> tuple[object, ...]:
        return (
            model, self._template, value.outcome, value.reason, value.reply, value.calls,
            value.input_tokens, value.output_tokens, value.cost_usd, value.asked_at.isoformat(),
        )  # fmt: skip

    def to_value(self, row: tuple[object, ...]) -> Said:
        outcome, reason, reply, calls, input_tokens, output_tokens, cost_usd, asked_at = row
        return Said(
            outcome=cast("str | None", outcome),
            reason=cast("str | None", reason),
            reply=str(reply),
            calls=cast(int, calls),
            input_tokens=cast("int | None", input_tokens),
            output_tokens=cast("int | None", output_tokens),
            cost_usd=cast(float, cost_usd),
            asked_at=datetime.fromisoformat(str(asked_at)).astimezone(UTC),
        )
