"""Content-addressed cache of embeddings on disk, safe under several processes.

One SQLite file in WAL mode: a row per (encoder identity, prompt), keyed by SHA-256. Writers wait
for each other; a row is written whole or not at all, whoever is killed when. With a storage,
several homes have what they encode in common (`routellm.embeddings.shared`).
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from routellm.embeddings.base import Encoder, Progress
from routellm.errors import EmbeddingError
from routellm.sqlite import connect

if TYPE_CHECKING:
    from routellm.embeddings.shared import SharedRows

WRITE_EVERY = 1024  # prompts encoded at once, then committed: what a kill can cost
_ASK_AT_ONCE = 500  # keys in one SELECT, below SQLite's limit on variables


class CachedEncoder:
    """An encoder that remembers on disk what it has encoded.

    Parameters
    ----------
    storage : str, optional
        Address at which homes have their vectors in common.

    Attributes
    ----------
    hits, misses : int
        Distinct prompts found and not found since creation.
    """

    def __init__(self, encoder: Encoder, path: Path, storage: str | None = None) -> None:
        self.encoder = encoder
        self.path = path
        self.storage = storage
        self.hits = 0
        self.misses = 0
        self._lock = threading.Lock()

    @property
    def identity(self) -> str:
        return self.encoder.identity

    @property
    def dimensions(self) -> int:
        return self.encoder.dimensions

    def encode(
        self, prompts: Sequence[str], *, progress: Progress | None = None
    ) -> NDArray[np.float32]:
        keys = self._keys(prompts)
        first = _first_rows(keys)
        shared = self._shared()
        found = self._known(list(first), shared)
        missing = [k for k in first if k not in found]
        with self._lock:
            self.hits += len(first) - len(missing)
            self.misses += len(missing)
        for start in range(0, len(missing), WRITE_EVERY):
            batch = missing[start : start + WRITE_EVERY]

            def report(done: int, _: int, base: int = start) -> None:
                if progress:
                    progress(base + done, len(missing))

            vectors = self.encoder.encode([prompts[first[k]] for k in batch], progress=report)
            fresh = dict(zip(batch, vectors, strict=True))
            found.update(fresh)
            try:
                self._put(fresh)
                if shared:
                    shared.send(fresh)
            except sqlite3.DatabaseError as error:
                raise self._damaged(error) from error
        try:
            if shared:  # what was encoded before there was a storage, or while it was away
                shared.send(found)
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error
        if not keys:
            return np.empty((0, self.dimensions), dtype=np.float32)
        return np.stack([found[k] for k in keys])

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Return the distinct prompts that neither the cache nor the storage has, in order."""
        first = _first_rows(self._keys(prompts))
        found = self._known(list(first), self._shared())
        return [prompts[i] for key, i in first.items() if key not in found]

    def _keys(self, prompts: Sequence[str]) -> list[bytes]:
        salt = hashlib.sha256(self.identity.encode()).digest()
        return [hashlib.sha256(salt + p.encode("utf-8", "surrogatepass")).digest() for p in prompts]

    def _known(
        self, keys: list[bytes], shared: SharedRows | None
    ) -> dict[bytes, NDArray[np.float32]]:
        """Return the vectors that are here, with those of the storage taken in before."""
        try:
            if shared:
                shared.bring(keys)
            return self._get(keys)
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error

    def _shared(self) -> SharedRows | None:
        if self.storage is None:
            return None
        from routellm.embeddings.shared import SharedRows, folder_of
        from routellm.storage import open_storage

        return SharedRows(open_storage(self.storage, folder_of(self.identity)), self._connect)

    def _connect(self) -> sqlite3.Connection:
        connection = connect(self.path)
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS embeddings (key BLOB PRIMARY KEY, vector BLOB NOT NULL) "
            "WITHOUT ROWID"
        )
        return connection

    def _get(self, keys: list[bytes]) -> dict[bytes, NDArray[np.float32]]:
        found: dict[bytes, NDArray[np.float32]] = {}
        if not keys:
            return found
        with closing(self._connect()) as connection:
            for start in range(0, len(keys), _ASK_AT_ONCE):
                some = keys[start : start + _ASK_AT_ONCE]
                marks = ",".join("?" * len(some))
                rows = connection.execute(
                    f"SELECT key, vector FROM embeddings WHERE key IN ({marks})", some
                )
                found.update((k, np.frombuffer(v, dtype=np.float32)) for k, v in rows)
        return found

    def _put(self, vectors: dict[bytes, NDArray[np.float32]]) -> None:
        rows = [(k, np.ascontiguousarray(v, np.float32).tobytes()) for k, v in vectors.items()]
        with closing(self._connect()) as connection, connection:
            connection.executemany("INSERT OR IGNORE INTO embeddings VALUES (?, ?)", rows)

    def _damaged(self, error: Exception) -> EmbeddingError:
        return EmbeddingError(
            f"the embedding cache {self.path} cannot be used ({error}): delete that file and run "
            "again; it is rebuilt"
        )


def _first_rows(keys: Sequence[bytes]) -> dict[bytes, int]:
    """Return where each key stands first, in this order."""
    rows: dict[bytes, int] = {}
    for i, key in enumerate(keys):
        rows.setdefault(key, i)
    return rows
