"""Verdicts on disk: what a judge was paid for once is not paid for again."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import cast

from routellm.augmentation.kept import Kept
from routellm.augmentation.template import TEMPLATE_VERSION, Choice


@dataclass(frozen=True)
class Verdict:
    """What came of one question to the judge.

    Attributes
    ----------
    choice : str or None
        ``first``, ``second`` or ``tie``; None if the judge gave no verdict.
    reason : str or None
        Why there is no verdict.
    reply : str
        The end of what the judge wrote.
    input_tokens, output_tokens : int or None
        As the endpoint reported them; None if it did not.
    cost_usd : float
        At the prices then set; the most it could be, if usage was not reported.
    judged_at : datetime
        UTC.
    """

    choice: Choice | None
    reason: str | None
    reply: str
    input_tokens: int | None
    output_tokens: int | None
    cost_usd: float
    judged_at: datetime


class VerdictStore(Kept[Verdict]):
    """The verdicts in one file, of any number of judges."""

    table = "verdicts"
    schema = (
        "judge TEXT NOT NULL, template TEXT NOT NULL, choice TEXT, reason TEXT, "
        "reply TEXT NOT NULL, input_tokens INTEGER, output_tokens INTEGER, "
        "cost_usd REAL NOT NULL, judged_at TEXT NOT NULL"
    )
    columns = "choice, reason, reply, input_tokens, output_tokens, cost_usd, judged_at"

    def to_row(self, value: Verdict, model: str) -> tuple[object, ...]:
        return (
            model, TEMPLATE_VERSION, value.choice, value.reason, value.reply,
            value.input_tokens, value.output_tokens, value.cost_usd, value.judged_at.isoformat(),
        )  # fmt: skip

    def to_value(self, row: tuple[object, ...]) -> Verdict:
        choice, reason, reply, input_tokens, output_tokens, cost_usd, judged_at = row
        return Verdict(
            choice=cast("Choice | None", choice),
            reason=cast("str | None", reason),
            reply=str(reply),
            input_tokens=cast("int | None", input_tokens),
            output_tokens=cast("int | None", output_tokens),
            cost_usd=cast(float, cost_usd),
            judged_at=datetime.fromisoformat(str(judged_at)).astimezone(UTC),
        )
