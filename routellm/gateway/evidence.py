"""What challengers did online, kept on disk: counts only, never a prompt.

One JSON file for each gateway process and version in ``<home>/online/``, rewritten whole every few
seconds while it changes and at the end. A process that is killed leaves what it wrote last, so its
last `EVERY_S` seconds are missing and nothing else. Where the feedback store is a server's, the
same documents go there too, more seldom: gateways that share no home are then seen together.
`registry.online` sums them.
"""

from __future__ import annotations

import bisect
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from routellm.feedback.errors import FeedbackError
from routellm.gateway.source import VersionRef
from routellm.snapshots import write_atomic

if TYPE_CHECKING:
    from routellm.feedback.store import FeedbackStore

log = logging.getLogger("routellm.gateway")

FORMAT = 1
EVERY_S = 2.0  # seconds between two writes: what a kill can cost
SHARED_EVERY_S = 30.0  # between two writes to the feedback store, which all gateways load
# upper ends of the latency histogram's bins, 0.05 ms to 27 s: a median is right to a quarter
BOUNDS_MS = tuple(0.05 * 1.25**i for i in range(60))


@dataclass
class Counts:
    """One version's counts in one process.

    Attributes
    ----------
    requests : int
        Requests that it was asked to score.
    failures : int
        Those on which it raised, gave no win rate, or took too long.
    dropped : int
        Requests that it was not asked to score because it was behind.
    strong, agreed : int
        Answers that said strong; answers with the champion's route (shadow only).
    asked : float
        Sum over the answers of the strong fraction that was asked for.
    latency : list of int
        Answers by scoring time, in the bins that end at `BOUNDS_MS`, and one beyond.
    """

    requests: int = 0
    failures: int = 0
    dropped: int = 0
    strong: int = 0
    agreed: int = 0
    asked: float = 0.0
    latency: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_MS) + 1))


@dataclass
class Record:
    """What one file holds: the counts of one version in one process, in one mode."""

    model: str
    version: str
    mode: str  # shadow | canary
    process: str
    since: str  # ISO 8601, UTC: the first and the last request counted
    until: str
    counts: Counts
    format: int = FORMAT


class Evidence:
    """Counts what challengers do and keeps it on disk; safe from several threads.

    A file that cannot be written is tried again, logged once and costs no request.

    Parameters
    ----------
    folder : Path
    mode : str
        shadow or canary.
    store : FeedbackStore, optional
        Where the counts go too.
    """

    def __init__(self, folder: Path, mode: str, store: FeedbackStore | None = None) -> None:
        self.folder = folder
        self.mode = mode
        self.store = store
        # the same host name and process number can come again, in a container for one
        self.process = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.unwritten = 0  # writes that failed
        self._records: dict[VersionRef, Record] = {}
        self._changed: set[VersionRef] = set()
        self._unshared: set[VersionRef] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="evidence", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Write what is left."""
        self._stop.set()
        if self._thread.is_alive():  # a start may be under way in another thread
            self._thread.join(timeout=10)
        self.write()
        self.share()

    def answered(
        self,
        ref: VersionRef,
        *,
        strong: bool,
        asked: float,
        latency_ms: float,
        agreed: bool = False,
    ) -> None:
        """Count an answer."""
        with self._lock:
            counts = self._counts(ref)
            counts.requests += 1
            counts.strong += strong
            counts.agreed += agreed
            counts.asked += asked
            counts.latency[bisect.bisect_left(BOUNDS_MS, latency_ms)] += 1

    def failed(self, ref: VersionRef) -> None:
        """Count a request on which the challenger failed."""
        with self._lock:
            counts = self._counts(ref)
            counts.requests += 1
            counts.failures += 1

    def dropped(self, ref: VersionRef) -> None:
        """Count a request that the challenger was not asked about."""
        with self._lock:
            self._counts(ref).dropped += 1

    def write(self) -> None:
        """Write the records that changed to files; never raises."""
        for ref, text in self._taken(self._changed).items():
            try:
                write_atomic(self.folder / self._name(ref), text)
            except OSError as error:
                self._missed(self._changed, {ref}, str(self.folder), error)

    def share(self) -> None:
        """Write the records that changed to the store, if there is one; never raises."""
        if self.store is None:
            return
        documents = self._taken(self._unshared)
        if not documents:
            return
        try:
            self.store.keep_online({self._name(ref): text for ref, text in documents.items()})
        except FeedbackError as error:
            self._missed(self._unshared, set(documents), self.store.name, error)

    def _taken(self, changed: set[VersionRef]) -> dict[VersionRef, str]:
        with self._lock:
            documents = {ref: json.dumps(asdict(self._records[ref])) for ref in changed}
            changed.clear()
        return documents

    def _missed(
        self, changed: set[VersionRef], refs: set[VersionRef], where: str, error: Exception
    ) -> None:
        if not self.unwritten:
            log.warning("cannot keep online evidence in %s: %s", where, error)
        self.unwritten += 1
        with self._lock:
            changed |= refs

    def _name(self, ref: VersionRef) -> str:
        return f"{ref.version}.{self.process}.json"

    def _counts(self, ref: VersionRef) -> Counts:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        record = self._records.get(ref)
        if record is None:
            record = Record(ref.model, ref.version, self.mode, self.process, now, now, Counts())
            self._records[ref] = record
        record.until = now
        self._changed.add(ref)
        self._unshared.add(ref)
        return record.counts

    def _run(self) -> None:
        shared_at = time.monotonic()
        while not self._stop.wait(EVERY_S):
            self.write()
            if time.monotonic() - shared_at >= SHARED_EVERY_S:
                self.share()
                shared_at = time.monotonic()


def median_ms(latency: Sequence[int]) -> float | None:
    """Return the median of a latency histogram, by interpolation in its bin; None if empty."""
    total = sum(latency)
    if not total:
        return None
    below = 0.0
    for i, count in enumerate(latency):
        if count and below + count >= total / 2:
            low = BOUNDS_MS[i - 1] if i else 0.0
            high = BOUNDS_MS[min(i, len(BOUNDS_MS) - 1)]  # nothing is known beyond the last end
            return low + (high - low) * (total / 2 - below) / count
        below += count
    return None
