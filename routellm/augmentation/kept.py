"""What a model was paid to say, on disk: one SQLite file in WAL mode, a row a question.

Keyed by content. A row is written as it arrives, whole or not at all; two processes may share the
file, and the first row of a key stands.
"""

from __future__ import annotations

import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from routellm.errors import JudgeError
from routellm.sqlite import connect

_ASK_AT_ONCE = 500  # keys in one SELECT, below SQLite's limit on variables

T = TypeVar("T")


class Kept(ABC, Generic[T]):
    """One table of one file.

    Attributes
    ----------
    table : str
        Its name, and what messages call its rows.
    schema : str
        Its columns after `key`, as SQL declares them.
    columns : str
        Those that a value is made of.
    """

    table: ClassVar[str]
    schema: ClassVar[str]
    columns: ClassVar[str]

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: sqlite3.Connection | None = None

    @abstractmethod
    def to_row(self, value: T, model: str) -> tuple[object, ...]:
        """Return the cells of `schema`."""

    @abstractmethod
    def to_value(self, row: tuple[object, ...]) -> T:
        """Return what the cells of `columns` say."""

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

    def get(self, keys: Sequence[bytes]) -> dict[bytes, T]:
        """Return what is known, by key."""
        found: dict[bytes, T] = {}
        if not keys or not self.path.exists():
            return found
        with self._open() as connection:
            for start in range(0, len(keys), _ASK_AT_ONCE):
                some = keys[start : start + _ASK_AT_ONCE]
                marks = ",".join("?" * len(some))
                rows = connection.execute(
                    f"SELECT key, {self.columns} FROM {self.table} WHERE key IN ({marks})", some
                )
                found.update((row[0], self.to_value(row[1:])) for row in rows)
        return found

    def put(self, key: bytes, value: T, model: str) -> T:
        """Keep a value; returns the one that stands, which another process may have written."""
        row = (key, *self.to_row(value, model))
        marks = ", ".join("?" * len(row))
        with self._open() as connection:
            with connection:
                connection.execute(f"INSERT OR IGNORE INTO {self.table} VALUES ({marks})", row)
            (kept,) = connection.execute(
                f"SELECT {self.columns} FROM {self.table} WHERE key = ?", (key,)
            ).fetchall()
        return self.to_value(kept)

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
            f"CREATE TABLE IF NOT EXISTS {self.table} (key BLOB PRIMARY KEY, {self.schema}) "
            "WITHOUT ROWID"
        )
        return connection

    @contextmanager
    def _said(self) -> Iterator[None]:
        """Turn what SQLite raises into one sentence."""
        try:
            yield
        except (OSError, sqlite3.OperationalError) as error:  # a full disk, a lock, no rights
            raise JudgeError(
                f"the cache of {self.table} {self.path} cannot be used now ({error}): make it "
                f"writable and run again; the {self.table} in it are kept"
            ) from error
        except sqlite3.DatabaseError as error:
            raise JudgeError(
                f"the cache of {self.table} {self.path} is damaged ({error}): move that file away "
                "and run again; what it held is asked for again"
            ) from error
