"""Embeddings that several homes have in common, in a storage (`routellm.storage`).

::

    <storage>/embeddings/<encoder>/<rows>-<sha256>.parquet    columns key, vector; never changed

What a home encodes goes up before it is used, and what others put there is taken into the home's
SQLite file before anything is encoded, so a prompt is encoded on one machine once. Which rows the
storage has is noted in that file, too: once it has all that is asked for, it is not asked.
"""

from __future__ import annotations

import hashlib
import io
import re
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from routellm.errors import StorageError
from routellm.storage import Blob, Blobs

Rows = dict[bytes, NDArray[np.float32]]

FULL_ROWS = 65_536  # of an object that is not merged any more: 100 MB at 384 dimensions
MOST_SMALL = 64  # objects with fewer; then the smallest are merged
_NAME = re.compile(r"(\d{9})-([0-9a-f]{64})\.parquet")
_ASK_AT_ONCE = 500
_LISTINGS = 10
_TABLES = (
    "CREATE TABLE IF NOT EXISTS shared_objects "
    "(storage TEXT, name TEXT, PRIMARY KEY (storage, name)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS shared_keys "
    "(storage TEXT, key BLOB, PRIMARY KEY (storage, key)) WITHOUT ROWID",
)


class SharedRows:
    """What one encoder's vectors are in a storage, and which of them a home knows to be there.

    Parameters
    ----------
    connect : callable
        Opens the home's SQLite file, which has the table ``embeddings``.
    """

    def __init__(
        self,
        blobs: Blobs,
        connect: Callable[[], sqlite3.Connection],
        *,
        full_rows: int = FULL_ROWS,
        most_small: int = MOST_SMALL,
    ) -> None:
        self.blobs = blobs
        self.full_rows = full_rows
        self.most_small = most_small
        self._open = connect
        self._storage = hashlib.sha256(blobs.address.encode()).hexdigest()[:16]

    def bring(self, keys: Sequence[bytes]) -> None:
        """Take in what others put there, unless the storage is known to have all of `keys`.

        Raises
        ------
        StorageError, StorageUnreachable
            If it cannot be read, or an object is damaged.
        """
        if not self._unshared(keys):
            return
        for _ in range(_LISTINGS):
            listed = self._listed()
            with closing(self._connect()) as connection:
                rows = connection.execute(
                    "SELECT name FROM shared_objects WHERE storage = ?", (self._storage,)
                )
                seen = {name for (name,) in rows}
            if all(self._take_in(blob) for blob in listed if blob.name not in seen):
                break  # else one was merged meanwhile: its rows are in another
        with closing(self._connect()) as connection, connection:
            connection.executemany(
                "DELETE FROM shared_objects WHERE storage = ? AND name = ?",
                [(self._storage, name) for name in seen - {blob.name for blob in listed}],
            )

    def send(self, rows: Rows) -> None:
        """Put those rows there that it is not known to have.

        Raises
        ------
        StorageError, StorageUnreachable
            If it cannot be written; the next call sends them.
        """
        keys = self._unshared(list(rows))
        for start in range(0, len(keys), self.full_rows):
            some = keys[start : start + self.full_rows]
            name = self._put({key: rows[key] for key in some})
            self._note(name, some)
        if keys:
            self._merge()

    def _take_in(self, blob: Blob) -> bool:
        """Take an object's rows into the home's file, and say whether it is still there."""
        rows = self._get(blob)
        if rows is None:
            return False
        with closing(self._connect()) as connection, connection:
            connection.executemany(
                "INSERT OR IGNORE INTO embeddings VALUES (?, ?)",
                ((key, vector.tobytes()) for key, vector in rows.items()),
            )
        self._note(blob.name, rows)
        return True

    def _merge(self) -> None:
        """Put the smallest objects together where there are many.

        Killed between its steps it leaves rows that are there twice, which costs space alone.
        """
        small = [blob for blob in self._listed() if _rows_of(blob.name) < self.full_rows]
        if len(small) <= self.most_small:
            return
        merged: Rows = {}
        going: list[str] = []
        for blob in sorted(small, key=lambda one: one.name):  # the smallest first
            if len(merged) >= self.full_rows:
                break
            rows = self._get(blob)
            if rows is None:
                return  # another machine merges
            merged |= rows
            going.append(blob.name)
        name = self._put(merged)
        self._note(name, merged)
        self.blobs.delete(one for one in going if one != name)

    def _put(self, rows: Rows) -> str:
        keys = sorted(rows)
        vectors = pa.FixedSizeListArray.from_arrays(
            pa.array(np.concatenate([rows[key] for key in keys])), len(rows[keys[0]])
        )
        table = pa.table({"key": pa.array(keys, pa.binary(32)), "vector": vectors})
        file = io.BytesIO()
        # noise neither compresses nor comes twice
        pq.write_table(table, file, compression="none", use_dictionary=False)
        data = file.getvalue()
        name = f"{len(keys):09d}-{hashlib.sha256(data).hexdigest()}.parquet"
        self.blobs.put(name, data)
        return name

    def _get(self, blob: Blob) -> Rows | None:
        match = _NAME.fullmatch(blob.name)
        for _ in range(2):
            data = self.blobs.get(blob.name)
            if data is None:
                return None
            if match and hashlib.sha256(data).hexdigest() == match[2]:
                table = pq.read_table(io.BytesIO(data))
                flat = table["vector"].combine_chunks().flatten().to_numpy()
                keys = table["key"].to_pylist()
                return dict(zip(keys, flat.reshape(len(keys), -1), strict=True))
        raise StorageError(
            f"{blob.name} in {self.blobs.address} is not what was written (its SHA-256 differs): "
            "remove it; what it held is encoded again"
        )

    def _listed(self) -> list[Blob]:
        return [blob for blob in self.blobs.list() if _NAME.fullmatch(blob.name)]

    def _unshared(self, keys: Sequence[bytes]) -> list[bytes]:
        """Return those of the keys that the storage is not known to have."""
        there: set[bytes] = set()
        with closing(self._connect()) as connection:
            for start in range(0, len(keys), _ASK_AT_ONCE):
                some = keys[start : start + _ASK_AT_ONCE]
                marks = ",".join("?" * len(some))
                rows = connection.execute(
                    f"SELECT key FROM shared_keys WHERE storage = ? AND key IN ({marks})",
                    (self._storage, *some),
                )
                there.update(key for (key,) in rows)
        return [key for key in keys if key not in there]

    def _note(self, name: str, keys: Iterable[bytes]) -> None:
        with closing(self._connect()) as connection, connection:
            connection.executemany(
                "INSERT OR IGNORE INTO shared_keys VALUES (?, ?)",
                ((self._storage, key) for key in keys),
            )
            connection.execute(
                "INSERT OR IGNORE INTO shared_objects VALUES (?, ?)", (self._storage, name)
            )

    def _connect(self) -> sqlite3.Connection:
        connection = self._open()
        for table in _TABLES:
            connection.execute(table)
        return connection


def _rows_of(name: str) -> int:
    return int(name[:9])


def folder_of(identity: str) -> str:
    """Return where the vectors of an encoder are in a storage."""
    return f"embeddings/{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
