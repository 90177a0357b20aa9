"""SQLite files that several processes write."""

from __future__ import annotations

import random
import sqlite3
import time
from pathlib import Path

PATIENCE_S = 60.0


def connect(path: Path) -> sqlite3.Connection:
    """Open a file with a write-ahead log, waiting for others where they have it locked.

    SQLite's own timeout does not cover the switch to that log, at which two processes that make
    the file at once can meet.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=PATIENCE_S)
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return connection
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                connection.close()
                raise
            time.sleep(random.uniform(0.005, 0.05))
