"""Verdicts on disk: what a judge was paid for once is not paid for again.

One SQLite file in WAL mode, a row a question, keyed by content. A verdict is written as it
arrives, whole or not at all; two processes may share the file, and the first verdict stands.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from routellm.augmentation.template import TEMPLATE_VERSION, Choice
from routellm.errors import JudgeError
from routellm.sqlite import connect

_ASK_AT_ONCE = 500  # keys in one SELECT, below SQLite's limit on variables
_COLUMNS = "choice, reason, reply, input_tokens, output_tokens, cost_usd, judged_at"


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


class VerdictStore:
    """The verdicts in one file, of any number of judges."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: sqlite3.Connection | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the file open for a block, in one thread: opening it takes longer than a write."""
        with self._said():
            connection = self._connect()
        try:
            self._held = connection
            yield
        finally:
            self._held = None
            connection.close()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Verdict]:
        """Return the verdicts that are known, by key."""
        found: dict[bytes, Verdict] = {}
        if not keys or not self.path.exists():
            return found
        with self._open() as connection:
            for start in range(0, len(keys), _ASK_AT_ONCE):
                some = keys[start : start + _ASK_AT_ONCE]
                marks = ",".join("?" * len(some))
                rows = connection.execute(
                    f"SELECT key, {_COLUMNS} FROM verdicts WHERE key IN ({marks})", some
                )
                found.update((row[0], _verdict(row[1:])) for row in rows)
        return found

    def put(self, key: bytes, verdict: Verdict, judge: str) -> Verdict:
        """Keep a verdict; returns the one that stands, which another process may have written."""
        row = (
            key, judge, TEMPLATE_VERSION, verdict.choice, verdict.reason, verdict.reply,
            verdict.input_tokens, verdict.output_tokens, verdict.cost_usd,
            verdict.judged_at.isoformat(),
        )  # fmt: skip
        with self._open() as connection:
            with connection:
                connection.execute(
                    "INSERT OR IGNORE INTO verdicts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row
                )
            (kept,) = connection.execute(
                f"SELECT {_COLUMNS} FROM verdicts WHERE key = ?", (key,)
            ).fetchall()
        return _verdict(kept)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with self._said():
            if self._held is not None:
                yield self._held
                return
            with closing(self._connect()) as connection:
                yield connection

    def _connect(self) -> sqlite3.Connection:
        connection = connect(self.path)
        connection.execute("PRAGMA synchronous=FULL")  # what was paid for outlives a power cut too
        connection.execute(
            "CREATE TABLE IF NOT EXISTS verdicts (key BLOB PRIMARY KEY, judge TEXT NOT NULL, "
            "template TEXT NOT NULL, choice TEXT, reason TEXT, reply TEXT NOT NULL, "
            "input_tokens INTEGER, output_tokens INTEGER, cost_usd REAL NOT NULL, "
            "judged_at TEXT NOT NULL) WITHOUT ROWID"
        )
        return connection

    @contextmanager
    def _said(self) -> Iterator[None]:
        """Turn what SQLite raises into one sentence."""
        try:
            yield
        except (OSError, sqlite3.OperationalError) as error:  # a full disk, a lock, no rights
            raise JudgeError(
                f"the cache of verdicts {self.path} cannot be used now ({error}): make it "
                "writable and run again; the verdicts in it are kept"
            ) from error
        except sqlite3.DatabaseError as error:
            raise JudgeError(
                f"the cache of verdicts {self.path} is damaged ({error}): move that file away "
                "and run again; what it held is asked for again"
            ) from error


def _verdict(row: tuple[object, ...]) -> Verdict:
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
