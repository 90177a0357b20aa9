"""Embeddings in memory: what a server keeps of the prompts that come again."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from routellm.embeddings.base import Encoder, Progress
from routellm.embeddings.cache import CachedEncoder

_REMEMBERED = 20_000  # vectors (31 MB at 384 dimensions)


class RememberingEncoder:
    """An encoder that remembers the vectors of the latest prompts; nothing goes to disk.

    Several threads may use it: one encodes at a time.
    """

    def __init__(self, encoder: Encoder, size: int = _REMEMBERED) -> None:
        self.encoder = encoder
        self.size = size
        self._known: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()  # of what is known
        self._encoding = threading.Lock()  # tokenizers cannot be used by two threads at once

    @property
    def identity(self) -> str:
        return self.encoder.identity

    @property
    def dimensions(self) -> int:
        return self.encoder.dimensions

    def encode(
        self, prompts: Sequence[str], *, progress: Progress | None = None
    ) -> NDArray[np.float32]:
        keys = [
            hashlib.blake2b(p.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            for p in prompts
        ]
        found = self._recall(keys)
        missing = {k: p for k, p in zip(keys, prompts, strict=True) if k not in found}
        if missing:
            with self._encoding:
                vectors = self.encoder.encode(list(missing.values()), progress=progress)
            fresh = dict(zip(missing, vectors, strict=True))
            found |= fresh
            self._remember(fresh)
        if not keys:
            return np.empty((0, self.dimensions), dtype=np.float32)
        return np.stack([found[k] for k in keys])

    def _recall(self, keys: list[bytes]) -> dict[bytes, NDArray[np.float32]]:
        with self._lock:
            found = {k: self._known[k] for k in keys if k in self._known}
            for key in found:
                self._known.move_to_end(key)
        return found

    def _remember(self, fresh: dict[bytes, NDArray[np.float32]]) -> None:
        with self._lock:
            self._known |= fresh
            while len(self._known) > self.size:
                self._known.popitem(last=False)


class Encoders:
    """One encoder in memory for all versions that read its vectors."""

    def __init__(self) -> None:
        self._by_identity: dict[str, RememberingEncoder] = {}
        self._lock = threading.Lock()

    def shared(self, encoder: Encoder) -> RememberingEncoder:
        """Return the encoder in use that gives the same vectors, or this one from now on.

        A cache on disk is left out: live traffic would let it grow without end.
        """
        if isinstance(encoder, CachedEncoder):
            encoder = encoder.encoder
        with self._lock:
            known = self._by_identity.get(encoder.identity)
            if known is None:
                known = self._by_identity[encoder.identity] = RememberingEncoder(encoder)
            return known
