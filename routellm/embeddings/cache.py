"""Content-addressed cache of embeddings on disk, safe under several processes.

One SQLite file in WAL mode: a row per (encoder identity, prompt), keyed by SHA-256. Writers wait
for each other; a row is written whole or not at all, whoever is killed when.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from routellm.embeddings.base import Encoder, Progress
from routellm.errors import EmbeddingError
from routellm.sqlite import connect

_WRITE_EVERY = 1024  # prompts encoded between two commits: what a kill can cost
_ASK_AT_ONCE = 500  # keys in one SELECT, below SQLite's limit on variables
_IN_MEMORY = 4096  # vectors kept for repeated single queries (6 MB at 384 dimensions)


class CachedEncoder:
    """An encoder that remembers on disk what it has encoded.

    Attributes
    ----------
    hits, misses : int
        Distinct prompts found and not found since creation.
    """

    def __init__(self, encoder: Encoder, path: Path) -> None:
        self.encoder = encoder
        self.path = path
        self.hits = 0
        self.misses = 0
        self._recent: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
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
        salt = hashlib.sha256(self.identity.encode()).digest()
        keys = [hashlib.sha256(salt + p.encode("utf-8", "surrogatepass")).digest() for p in prompts]
        if len(keys) == 1 and (known := self._recall(keys[0])) is not None:
            return known[None]
        first = dict(zip(reversed(keys), range(len(keys) - 1, -1, -1), strict=True))
        try:
            found = self._get(list(first))
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error
        missing = [k for k in first if k not in found]
        with self._lock:
            self.hits += len(first) - len(missing)
            self.misses += len(missing)
        for start in range(0, len(missing), _WRITE_EVERY):
            batch = missing[start : start + _WRITE_EVERY]

            def report(done: int, _: int, base: int = start) -> None:
                if progress:
                    progress(base + done, len(missing))

            vectors = self.encoder.encode([prompts[first[k]] for k in batch], progress=report)
            fresh = dict(zip(batch, vectors, strict=True))
            found.update(fresh)
            try:
                self._put(fresh)
            except sqlite3.DatabaseError as error:
                raise self._damaged(error) from error
        if not keys:
            return np.empty((0, self.dimensions), dtype=np.float32)
        if len(keys) == 1:
            self._remember(keys[0], found[keys[0]])
        return np.stack([found[k] for k in keys])

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

    def _recall(self, key: bytes) -> NDArray[np.float32] | None:
        with self._lock:
            if key in self._recent:
                self._recent.move_to_end(key)
                return self._recent[key]
        return None

    def _remember(self, key: bytes, vector: NDArray[np.float32]) -> None:
        with self._lock:
            self._recent[key] = vector
            if len(self._recent) > _IN_MEMORY:
                self._recent.popitem(last=False)

    def _damaged(self, error: Exception) -> EmbeddingError:
        return EmbeddingError(
            f"the embedding cache {self.path} cannot be used ({error}): delete that file and run "
            "again; it is rebuilt"
        )
