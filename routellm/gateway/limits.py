"""What a key may use: requests a minute, requests at once, dollars a day and a month.

All of it is in one small SQLite file that the gateway's processes on a machine share, so that a
limit holds over all of them together and spending outlives a restart. A request of a key is two
small transactions, one before it and one after.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from routellm.errors import GatewayError, UsageError
from routellm.gateway.key_file import Key
from routellm.gateway.keys import Caller
from routellm.sqlite import connect

log = logging.getLogger("routellm.gateway")

_LONGEST_WAIT_MS = 100  # for another process's write; the event loop waits with it
_LEFT_ALONE_S = 1.0  # after the file failed, so that not every request waits for it
_FORGOTTEN_S = 3600.0  # a process that has said nothing for as long has no requests
_MINUTE_S = 60.0
_TABLES = """
CREATE TABLE IF NOT EXISTS spend (
    key TEXT, day TEXT, usd REAL NOT NULL, requests INTEGER NOT NULL, PRIMARY KEY (key, day)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS bucket (key TEXT PRIMARY KEY, full_at REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS busy (
    key TEXT, process TEXT, pid INTEGER NOT NULL, n INTEGER NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (key, process)
) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Spent:
    """What a key has spent in the day and the month (UTC) that it is."""

    today_usd: float
    month_usd: float
    month_requests: int


class Limits:
    """Lets requests in while their key's limits are kept; called from the event loop.

    Requests a minute are a token bucket that holds one minute's tokens: after a pause a key may
    send all of them at once. A budget is looked at before a request and charged after it, so what
    is in flight then can pass it. While the file cannot be used (a full disk), spending waits in
    memory to be written, only requests at once are limited, within this process, and `failures`
    counts it: one tenant's limits are not worth every tenant's answers.

    SQLite keeps a connection to the thread that opened it: `open`, then, in the event loop's.

    Parameters
    ----------
    path : Path
        ``<home>/spend.db``.
    clock : function
        Seconds since 1970: budgets go by the calendar, and processes share it.

    Attributes
    ----------
    failures : int
        Uses of the file that failed.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self.failures = 0
        self._clock = clock
        self._process = uuid.uuid4().hex
        self._at_once: Counter[str] = Counter()  # in this process, by key
        self._owed: dict[tuple[str, str], tuple[float, int]] = {}  # by key and day, not yet written
        self._unpriced: set[str] = set()
        self._again_at = 0.0  # by time.monotonic

    def open(self) -> None:
        """Open the file, and make it if there is none.

        Raises
        ------
        UsageError
            If that cannot be done.
        """
        try:
            self._db = connect(self.path)
            self._db.executescript(_TABLES)
        except (OSError, sqlite3.Error) as error:
            raise UsageError(
                f"the keys' spending cannot be kept in {self.path} ({error}): make room for it, or "
                "take away what is there"
            ) from error
        self._db.isolation_level = None  # `_transaction` begins and ends them
        # what was written outlives the process, and that is enough: not a power cut
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute(f"PRAGMA busy_timeout={_LONGEST_WAIT_MS}")

    def close(self) -> None:
        """Write what is still owed, and give all places back."""

        def last() -> None:
            self._pay()
            self._db.execute("DELETE FROM busy WHERE process = ?", (self._process,))

        self._again_at = 0.0
        if not self._transaction(last):
            log.error("$%.4f of spending was lost", sum(usd for usd, _ in self._owed.values()))
        self._db.close()

    def enter(self, caller: Caller) -> None:
        """Let a request in; `leave` must follow if this returns.

        Raises
        ------
        GatewayError
            429: ``insufficient_quota`` where a budget is spent, ``rate_limit_exceeded`` where there
            are too many requests; it says after which time another try makes sense.
        """
        key = caller.key
        if key is None:
            return
        if key.concurrent is not None and self._at_once[key.id] >= key.concurrent:
            raise _too_many_at_once(key, key.concurrent)

        def take() -> None:
            now = self._clock()
            self._check_budget(key, now)
            if key.requests_per_minute is not None:
                self._take_token(key, key.requests_per_minute, now)
            if key.concurrent is not None:
                self._take_place(key, key.concurrent, now)

        if key.budgeted or key.requests_per_minute is not None or key.concurrent is not None:
            self._transaction(take)
        self._at_once[key.id] += 1

    def leave(self, caller: Caller, usd: float | None) -> None:
        """Count a request that is over; never raises.

        Parameters
        ----------
        usd : float or None
            What it cost: 0 if nobody answered it, None if no price is set.
        """
        key = caller.key
        if key is None:
            return
        self._at_once[key.id] -= 1
        if usd is None and key.budgeted and key.id not in self._unpriced:
            self._unpriced.add(key.id)
            log.error("key %s has a budget and its answers no price: set [prices.MODEL]", key.id)
        now = self._clock()
        day = _day(now)
        owed_usd, owed_n = self._owed.get((key.id, day), (0.0, 0))
        self._owed[key.id, day] = owed_usd + (usd or 0.0), owed_n + 1

        def settle() -> None:
            self._pay()
            if key.concurrent is not None:
                self._write_places(key.id, self._at_once[key.id], now)

        if self._transaction(settle):
            self._owed.clear()

    def spent(self, key_id: str) -> Spent:
        """Return what a key has spent.

        Raises
        ------
        sqlite3.Error
            If the file cannot be read.
        """
        day = _day(self._clock())
        today, month, n = self._db.execute(
            "SELECT TOTAL(usd) FILTER (WHERE day = :day), TOTAL(usd), TOTAL(requests)"
            " FROM spend WHERE key = :key AND day BETWEEN :first AND :day",
            {"day": day, "key": key_id, "first": f"{day[:7]}-01"},
        ).fetchone()
        for (owing, owed_day), (usd, owed_n) in self._owed.items():
            if owing == key_id and owed_day[:7] == day[:7]:
                today += usd if owed_day == day else 0.0
                month, n = month + usd, n + owed_n
        return Spent(today, month, int(n))

    def _check_budget(self, key: Key, now: float) -> None:
        if not key.budgeted:
            return
        spent = self.spent(key.id)
        for budget, used, span in (
            (key.usd_per_day, spent.today_usd, "day"),
            (key.usd_per_month, spent.month_usd, "month"),
        ):
            if budget is not None and used >= budget:
                raise GatewayError(
                    f"the key {key.name!r} has spent ${used:.2f} of its ${budget:.2f} for this "
                    f"{span} (UTC): wait for the next one, or ask for a larger budget",
                    status=429,
                    code="insufficient_quota",
                    retry_after_s=_left_s(now, span),
                )

    def _take_token(self, key: Key, per_minute: int, now: float) -> None:
        """Take a token; a bucket is kept as the time at which it will be full again."""
        row = self._db.execute("SELECT full_at FROM bucket WHERE key = ?", (key.id,)).fetchone()
        # none needs more than a minute to be full: the clock was set back, and it begins anew
        kept = row is not None and row[0] <= now + _MINUTE_S + 1e-6
        full_at = (max(row[0], now) if kept else now) + _MINUTE_S / per_minute
        wait_s = full_at - (now + _MINUTE_S)
        if wait_s > 1e-6:
            raise GatewayError(
                f"the key {key.name!r} may send {per_minute} requests a minute: try again in a "
                "moment",
                status=429,
                code="rate_limit_exceeded",
                retry_after_s=wait_s,
            )
        self._db.execute("INSERT OR REPLACE INTO bucket VALUES (?, ?)", (key.id, full_at))

    def _take_place(self, key: Key, places: int, now: float) -> None:
        """Take one of the places that a key has over all processes."""
        taken = self._at_once[key.id] + self._elsewhere(key.id)
        if taken >= places:
            self._forget_dead(now)
            taken = self._at_once[key.id] + self._elsewhere(key.id)
        if taken >= places:
            raise _too_many_at_once(key, places)
        self._write_places(key.id, self._at_once[key.id] + 1, now)

    def _elsewhere(self, key_id: str) -> int:
        """Return how many of a key's requests other processes have."""
        (n,) = self._db.execute(
            "SELECT TOTAL(n) FROM busy WHERE key = ? AND process <> ?", (key_id, self._process)
        ).fetchone()
        return int(n)

    def _write_places(self, key_id: str, n: int, now: float) -> None:
        """Write how many this process has: the number itself, so that no mistake lasts."""
        row = (key_id, self._process, os.getpid(), n, now)
        self._db.execute("INSERT OR REPLACE INTO busy VALUES (?, ?, ?, ?, ?)", row)

    def _forget_dead(self, now: float) -> None:
        """Give back the places of processes that ended without doing so."""
        rows = self._db.execute("SELECT DISTINCT process, pid, at FROM busy").fetchall()
        for process, pid, at in rows:
            if process != self._process and (now - at > _FORGOTTEN_S or not _lives(pid)):
                self._db.execute("DELETE FROM busy WHERE process = ?", (process,))

    def _pay(self) -> None:
        self._db.executemany(
            "INSERT INTO spend VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
            " usd = usd + excluded.usd, requests = requests + excluded.requests",
            [(key_id, day, usd, n) for (key_id, day), (usd, n) in self._owed.items()],
        )

    def _transaction(self, work: Callable[[], None]) -> bool:
        """Do what reads and writes the file, all of it or none; say whether that worked."""
        if time.monotonic() < self._again_at:
            return False
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                work()
            except GatewayError:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.rollback()
            self.failures += 1
            self._again_at = time.monotonic() + _LEFT_ALONE_S
            log.error("the keys' limits cannot be kept: %s", error)
            return False
        return True


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is somebody else's
        return True
    return True


def _too_many_at_once(key: Key, places: int) -> GatewayError:
    return GatewayError(
        f"the key {key.name!r} may have {places} requests at once: wait until one is answered",
        status=429,
        code="rate_limit_exceeded",
        retry_after_s=1.0,
    )


def _day(now: float) -> str:
    return f"{datetime.fromtimestamp(now, UTC):%Y-%m-%d}"


def _left_s(now: float, span: str) -> float:
    """Return the seconds until the day or the month (UTC) ends."""
    at = datetime.fromtimestamp(now, UTC)
    midnight = at.replace(hour=0, minute=0, second=0, microsecond=0)
    if span == "day":
        end = midnight + timedelta(days=1)
    else:
        end = (midnight.replace(day=1) + timedelta(days=32)).replace(day=1)
    return (end - at).total_seconds()
