"""The feedback store: an SQLite file or a PostgreSQL database that rows are added to.

Rows are never changed, but for the counts of challengers (`keep_online`), which grow. They are
removed in three cases: a prompt whose time is over (`purge`), all that there is of a user who is to
be forgotten (`forget`), and counts of versions that are gone (`remove_online`).
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import sqlalchemy as sa
import sqlalchemy.dialects.postgresql
import sqlalchemy.dialects.sqlite
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from routellm import sqlite
from routellm.feedback import schema
from routellm.feedback.engine import engine_of, parse_url
from routellm.feedback.errors import FeedbackError, FeedbackUnreachable
from routellm.feedback.records import Decided, Dueled, Outcome, Record

_LOCK = 0x726C6C6D  # PostgreSQL's advisory lock that a migration holds
_LONGEST_ID = 300  # characters: an index of PostgreSQL takes no more than 2,700 bytes
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class FeedbackStore:
    """Decisions, judgements and duels; safe from several threads and processes.

    Parameters
    ----------
    url : str
        ``sqlite:///path`` or ``postgresql://user@host/database``; a path alone is SQLite.

    Raises
    ------
    UsageError
        If it is neither, or PostgreSQL's client is not installed.
    """

    def __init__(self, url: str) -> None:
        self._url = parse_url(url)
        self._engine = engine_of(self._url)
        self._opening = threading.Lock()
        self._salt: bytes | None = None  # None until it is open

    @property
    def _path(self) -> Path:
        return Path(str(self._url.database))

    @property
    def name(self) -> str:
        """Where it is, without a password."""
        if self._url.drivername == "sqlite":
            return str(self._path)
        at = f"{self._url.host or 'localhost'}:{self._url.port or 5432}"
        return f"postgresql://{at}/{self._url.database or ''}"

    def exists(self) -> bool:
        """Say whether there may be something in it: False for an SQLite file that is not there."""
        return self._url.drivername != "sqlite" or self._path.exists()

    def open(self) -> None:
        """Make the tables, or bring older ones to the schema of today; done once.

        Raises
        ------
        FeedbackUnreachable
            If it does not answer.
        FeedbackError
            If it is no feedback store, or of a later schema.
        """
        with self._opening:
            if self._salt is None:
                with self._writing(opening=True) as connection:
                    if connection.dialect.name == "postgresql":
                        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
                    self._migrate(connection)
                    self._salt = _salt(connection)

    def close(self) -> None:
        self._engine.dispose()

    def digest(self, user: str) -> str:
        """Return what is stored instead of a user's id.

        A hash with a key that only this store has: who has just the digests can try no names, and
        one user's digests in two stores differ. Who has all of the store can try names.
        """
        self.open()
        assert self._salt is not None
        raw = user.encode("utf-8", "surrogatepass")
        return hashlib.blake2b(raw, key=self._salt, person=b"user", digest_size=16).hexdigest()

    def append(self, records: Sequence[Record]) -> None:
        """Add records, all or none; one that was added before is left as it is.

        Raises
        ------
        FeedbackUnreachable
            If the store does not answer; the same records can be tried again.
        FeedbackError
            If it cannot take one of them.
        """
        rows: dict[sa.Table, list[dict[str, Any]]] = {}
        for record in records:
            for table, row in self._rows(record):
                rows.setdefault(table, []).append(row)
        with self._writing() as connection:
            for table, values in rows.items():
                connection.execute(_insert(connection, table), values)

    def find(self, quoted: str) -> Decided | None:
        """Return the latest decision with this id or request id; without its user and prompt."""
        d = schema.decisions
        same = sa.or_(d.c.id == _id(quoted), d.c.request_id == _id(quoted))
        # `+ 0`: PostgreSQL without statistics would walk the index of time, all of it for an id
        # that is not there
        query = sa.select(d).where(same).order_by((d.c.at_us + 0).desc()).limit(1)
        with self._reading() as connection:
            row = connection.execute(query).mappings().first()
        if row is None:
            return None
        fields = {k: v for k, v in row.items() if k not in ("at_us", "user_digest")}
        return Decided(**fields, at=_time(row["at_us"]), user=None)

    def outcomes(self) -> Iterator[Outcome]:
        """Yield judgements and duels of answered decisions whose prompt is stored.

        Those of one decision come together, in the order of their time.
        """
        found = _outcomes()
        query = sa.select(found).order_by(found.c.decision, found.c.at_us, found.c.id)
        with self._reading() as connection:
            if connection.dialect.name == "postgresql":  # else it plans for the first rows alone
                connection.exec_driver_sql("SET LOCAL cursor_tuple_fraction = 1")
            rows = connection.execution_options(yield_per=1000).execute(query)
            for row in rows.mappings():
                fields = {k: v for k, v in row.items() if k != "at_us"}
                yield Outcome(**fields, at=_time(row["at_us"]))

    def outcomes_seen(self) -> dict[str, Any]:
        """Return how many outcomes there are, and the time of the last (microseconds)."""
        found = _outcomes()
        query = sa.select(sa.func.count(), sa.func.max(found.c.at_us)).select_from(found)
        with self._reading() as connection:
            n, last = connection.execute(query).one()
        return {"outcomes": int(n), "last_us": last}

    def count(self) -> dict[str, int]:
        """Return the number of rows by what they are."""
        tables = (schema.decisions, schema.prompts, schema.judgements, schema.duels)
        with self._reading() as connection:
            return {
                table.name.removeprefix("feedback_"): int(
                    connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
                )
                for table in tables
            }

    @property
    def is_shared(self) -> bool:
        """Whether it is a server's, which machines that have nothing else in common can reach."""
        return self._url.drivername != "sqlite"

    def keep_online(self, counts: Mapping[str, str]) -> None:
        """Put documents of counts under names that are one gateway process's, over older ones.

        Raises
        ------
        FeedbackUnreachable
            If the store does not answer.
        FeedbackError
            If it refuses.
        """
        with self._writing() as connection:
            for name, text in counts.items():
                row = {"name": name, "counts": text}
                connection.execute(_insert(connection, schema.online, over="name"), row)

    def online(self) -> dict[str, str]:
        """Return all documents of counts, by name."""
        with self._reading() as connection:
            rows = connection.execute(sa.select(schema.online))
            return {row.name: row.counts for row in rows}

    def remove_online(self, names: Collection[str]) -> None:
        """Remove documents of counts."""
        with self._writing() as connection:
            o = schema.online
            connection.execute(sa.delete(o).where(o.c.name.in_(names)))

    def purge(self, now: datetime, keep_days: float) -> int:
        """Remove prompts that are older than so many days; returns how many.

        The decisions stay, which have no text.
        """
        p = schema.prompts
        end = _us(now - timedelta(days=keep_days))
        with self._writing() as connection:
            gone = connection.execute(sa.delete(p).where(p.c.at_us < end)).rowcount
        if gone:
            self._scrub()
        return int(gone)

    def forget(self, user_id: str) -> int:
        """Remove a user's decisions, with their prompts, judgements and duels.

        Returns
        -------
        int
            Decisions removed.
        """
        d = schema.decisions
        digest = self.digest(user_id)
        his = d.c.user_digest == digest
        names = sa.union(sa.select(d.c.id).where(his), sa.select(d.c.request_id).where(his))
        with self._writing() as connection:
            for table in (schema.judgements, schema.duels):
                connection.execute(sa.delete(table).where(table.c.decision_id.in_(names)))
            uids = sa.select(d.c.uid).where(his)
            connection.execute(sa.delete(schema.prompts).where(schema.prompts.c.uid.in_(uids)))
            gone = connection.execute(sa.delete(d).where(his)).rowcount
        if gone:
            self._scrub()
        return int(gone)

    def _migrate(self, connection: Connection) -> None:
        connection.exec_driver_sql(schema.STEPS_TAKEN)
        taken = connection.exec_driver_sql("SELECT max(step) FROM feedback_schema").scalar() or 0
        if taken > len(schema.STEPS):
            raise FeedbackError(
                f"the feedback store {self.name} has schema {taken}, and this software knows "
                f"{len(schema.STEPS)}: a later version has used it; update this one, or name "
                "another store"
            )
        for number, step in enumerate(schema.STEPS[taken:], taken + 1):
            for statement in step:
                connection.exec_driver_sql(statement)
            connection.exec_driver_sql(
                f"INSERT INTO feedback_schema VALUES ({number}, {_us(datetime.now(UTC))})"
            )

    def _rows(self, record: Record) -> Iterator[tuple[sa.Table, dict[str, Any]]]:
        row = {k: _clean(v) for k, v in asdict(record).items()}
        at_us = row["at_us"] = _us(row.pop("at"))
        if isinstance(record, Decided):
            row["id"], row["request_id"] = _id(record.id), _id(record.request_id)
            prompt = row.pop("prompt")
            row.pop("user")
            row["user_digest"] = None if record.user is None else self.digest(record.user)
            yield schema.decisions, row
            if prompt is not None:
                uid = record.uid
                yield schema.prompts, {"uid": uid, "at_us": at_us, "prompt": prompt}
            return
        row["decision_id"] = _id(record.decision_id)
        row["judge"] = row.pop("by")
        yield (schema.duels if isinstance(record, Dueled) else schema.judgements), row

    def _scrub(self) -> None:
        """Take what was deleted out of SQLite's write-ahead log too, unless it is being read."""
        if self._url.drivername == "sqlite":
            with closing(sqlite.connect(self._path)) as file, suppress(sqlite3.OperationalError):
                file.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    @contextmanager
    def _writing(self, *, opening: bool = False) -> Iterator[Connection]:
        # SQLite: take the lock at once, since one that reads first may be refused it later
        with self._connected(opening, "BEGIN IMMEDIATE") as connection:
            yield connection
            connection.commit()

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with self._connected(False, "BEGIN") as connection:
            yield connection

    @contextmanager
    def _connected(self, opening: bool, begin: str) -> Iterator[Connection]:
        if not opening:
            self.open()
        try:
            with self._engine.connect().execution_options(begin=begin) as connection:
                yield connection
        except (OperationalError, InterfaceError) as error:
            raise FeedbackUnreachable(
                f"the feedback store {self.name} does not answer ({_why(error)}): see that it "
                "runs, and that this process may write to it"
            ) from error
        except DBAPIError as error:
            # not what it said, which may quote a prompt
            raise FeedbackError(
                f"the feedback store {self.name} refuses ({type(error.orig).__name__}): see that "
                "it is one"
            ) from error
        except OSError as error:
            raise FeedbackUnreachable(
                f"the feedback store {self.name} cannot be opened ({error.strerror}): see that "
                "its folder can be written to"
            ) from error


def _insert(connection: Connection, table: sa.Table, *, over: str | None = None) -> sa.Insert:
    """Return an insert that leaves a row that is there, or replaces the one with its key `over`."""
    # the two dialects' `insert` are different functions with the same methods
    insert: Any = getattr(sa.dialects, connection.dialect.name).insert(table)
    if over is None:
        return cast(sa.Insert, insert.on_conflict_do_nothing())
    new = {column.name: column for column in insert.excluded if column.name != over}
    return cast(sa.Insert, insert.on_conflict_do_update(index_elements=[over], set_=new))


def _salt(connection: Connection) -> bytes:
    m = schema.meta
    found = connection.execute(sa.select(m.c.value).where(m.c.name == "salt")).scalar()
    if found is None:
        found = secrets.token_hex(32)
        connection.execute(sa.insert(m), {"name": "salt", "value": found})
    return bytes.fromhex(found)


def _outcomes() -> sa.Subquery:
    """Return judgements and duels, each with the latest decision of its id before it."""
    d, p, j, u = schema.decisions, schema.prompts, schema.judgements, schema.duels
    given = sa.union_all(
        sa.select(j.c.id, j.c.at_us, j.c.decision_id, j.c.kind, j.c.value, j.c.judge.label("by")),
        sa.select(
            u.c.uid, u.c.at_us, u.c.decision_id, sa.literal("duel"), u.c.winner, u.c.judge
        ),
    ).subquery("given")  # fmt: skip
    # two joins on one column each: on either of two a database compares all with all
    names = sa.union_all(
        *(sa.select(name.label("name"), d.c.uid, d.c.at_us) for name in (d.c.id, d.c.request_id))
    ).subquery("names")
    latest = sa.func.row_number().over(partition_by=given.c.id, order_by=names.c.at_us.desc())
    matched = (
        sa.select(given, names.c.uid, latest.label("nth"))
        .join(names, sa.and_(names.c.name == given.c.decision_id, names.c.at_us <= given.c.at_us))
        .subquery("matched")
    )
    return (
        sa.select(
            d.c.uid.label("decision"), p.c.prompt, d.c.route, d.c.model, d.c.other_model,
            matched.c.id, matched.c.at_us, matched.c.kind, matched.c.value, matched.c.by,
        )
        .select_from(matched)
        .join(d, d.c.uid == matched.c.uid)
        .join(p, p.c.uid == matched.c.uid)
        .where(matched.c.nth == 1, d.c.status.between(200, 299))
        .subquery("outcomes")
    )  # fmt: skip


def _clean(value: Any) -> Any:
    """Return text that every database takes: valid Unicode without NUL."""
    if isinstance(value, str):
        return value.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()
    return value


def _id(text: str) -> str:
    return str(_clean(text[:_LONGEST_ID]))


def _us(at: datetime) -> int:
    return (at - _EPOCH) // timedelta(microseconds=1)


def _time(us: int) -> datetime:
    return _EPOCH + timedelta(microseconds=us)


def _why(error: DBAPIError) -> str:
    """Return the first line of what the database said, which has no parameters in it."""
    said = str(error.orig).strip().splitlines()
    return said[0][:200] if said else type(error).__name__
