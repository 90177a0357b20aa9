"""Takes records off the request path and writes them, a batch every half second."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

from routellm.feedback.errors import FeedbackError, FeedbackUnreachable
from routellm.feedback.records import Decided, Record
from routellm.feedback.store import FeedbackStore

log = logging.getLogger("routellm.feedback")

_BATCH = 500  # records of one transaction
_PURGE_EVERY_S = 3600.0


class Writer:
    """A bounded queue and one thread that writes what is in it.

    Prompts are redacted in the thread, before they are handed to the store: until then they are
    in memory only. While the store is down records wait, and are tried again; when the queue is
    full new ones are dropped. All of it is counted and none of it reaches a request.

    Parameters
    ----------
    store : FeedbackStore
    capacity : int
        Records that may wait.
    flush_s : float
        Seconds between two writes. A process that is killed loses what came since the last, so
        this and the time of a write stay under a second.
    redact : callable, optional
        What takes out of a prompt what must not be kept; without it no prompt is stored.
    keep_days : float, optional
        Remove prompts older than this, at the start and every hour.
    most_prompt_chars : int
        A longer prompt is not stored: cut short it would be another one.

    Attributes
    ----------
    written, dropped : int
        Records written; records lost, because the queue was full or the store refused them.
    unwritten : int
        Writes that failed because the store did not answer.
    unredacted : int
        Prompts that could not be redacted, and were not stored.
    """

    def __init__(
        self,
        store: FeedbackStore,
        *,
        capacity: int = 10_000,
        flush_s: float = 0.5,
        redact: Callable[[str], str] | None = None,
        keep_days: float | None = None,
        most_prompt_chars: int = 20_000,
    ) -> None:
        self.store = store
        self.capacity = capacity
        self.flush_s = flush_s
        self.keep_days = keep_days
        self.most_prompt_chars = most_prompt_chars
        self.written = self.dropped = self.unwritten = self.unredacted = 0
        self._redact = redact
        self._queue: deque[Record] = deque()
        self._ready: list[Record] = []  # taken from the queue, redacted, not yet written
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stop_at: float | None = None  # when to give up, once told to stop
        self._purge_at = 0.0
        self._down = False
        self._thread = threading.Thread(target=self._run, name="feedback", daemon=True)

    def start(self) -> None:
        """Open the store and start the thread; a store that does not answer is opened later.

        Raises
        ------
        FeedbackError
            If it is no feedback store, or of a later schema.
        """
        try:
            self.store.open()
        except FeedbackUnreachable as error:
            self._says_down(error)
        self._thread.start()

    def put(self, record: Record) -> bool:
        """Queue a record; never waits, never raises. False if it was dropped."""
        with self._lock:
            waiting = len(self._queue) + len(self._ready)
            kept = waiting < self.capacity and self._stop_at is None
            if kept:
                self._queue.append(record)
            else:
                self.dropped += 1
        if waiting == self.capacity // 2:  # once on the way up: a store that is down is not pressed
            self._wake.set()
        return kept

    def waiting(self) -> int:
        """Return the number of records that are not yet written."""
        with self._lock:
            return len(self._queue) + len(self._ready)

    def find(self, quoted: str) -> Decided | None:
        """Return the decision with this id or request id, written or not; may wait for the store.

        Raises
        ------
        FeedbackError
            If it is not among those that wait, and the store cannot be asked.
        """
        with self._lock:
            waiting = [*self._ready, *self._queue]
        for record in reversed(waiting):
            if isinstance(record, Decided) and quoted in (record.id, record.request_id):
                return replace(record, user=None, prompt=None)
        return self.store.find(quoted)

    def stop(self, within_s: float = 10.0) -> None:
        """Write all that waits, and end; what is not written in that time is lost, and counted."""
        self._stop_at = time.monotonic() + within_s
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(within_s)
        with self._lock:
            left = len(self._queue) + len(self._ready)
            self.dropped += left
        if left:
            log.error("%d feedback records were not written: the store did not answer", left)

    def _run(self) -> None:
        while self._stop_at is None:
            self._wake.wait(self.flush_s)
            self._wake.clear()
            self._flush()
            self._purge()
        while not self._flush() and time.monotonic() < self._stop_at:
            time.sleep(0.05)

    def _flush(self) -> bool:
        """Write batch after batch; False if the store does not answer."""
        while self._ready or self._take():
            try:
                self.store.append(self._ready)
                done = len(self._ready)
            except FeedbackUnreachable as error:
                self._says_down(error)
                return False
            except Exception:
                if len(self._ready) > 1:  # one that the store refuses costs no other
                    if not self._one_by_one():
                        return False
                    continue
                self._refused()
                continue
            self._down = False
            with self._lock:
                self.written += done
                self._ready = []
        return True

    def _one_by_one(self) -> bool:
        while self._ready:
            try:
                self.store.append(self._ready[:1])
            except FeedbackUnreachable as error:
                self._says_down(error)
                return False
            except Exception:
                self._refused()
                continue
            with self._lock:
                self.written += 1
                self._ready = self._ready[1:]
        return True

    def _refused(self) -> None:
        with self._lock:
            record, self._ready = self._ready[0], self._ready[1:]
            self.dropped += 1
        log.error("the feedback store refused a record (%s)", type(record).__name__)

    def _take(self) -> bool:
        """Move a batch from the queue to what is ready; False if there is none."""
        with self._lock:
            batch = [self._queue.popleft() for _ in range(min(_BATCH, len(self._queue)))]
            self._ready = batch  # counted as waiting while they are redacted
        ready = [self._redacted(record) for record in batch]
        with self._lock:
            self._ready = ready
        return bool(ready)

    def _redacted(self, record: Record) -> Record:
        if not isinstance(record, Decided) or record.prompt is None:
            return record
        if self._redact is None or len(record.prompt) > self.most_prompt_chars:
            return replace(record, prompt=None)
        try:
            return replace(record, prompt=self._redact(record.prompt))
        except Exception as error:
            self.unredacted += 1
            log.error("a prompt could not be redacted (%s): not stored", type(error).__name__)
            return replace(record, prompt=None)

    def _purge(self) -> None:
        if self.keep_days is None or time.monotonic() < self._purge_at:
            return
        self._purge_at = time.monotonic() + _PURGE_EVERY_S
        try:
            gone = self.store.purge(datetime.now(UTC), self.keep_days)
        except FeedbackError as error:
            log.warning("old prompts were not removed: %s", error)
            return
        if gone:
            log.info("removed %d prompts older than %g days", gone, self.keep_days)

    def _says_down(self, error: FeedbackError) -> None:
        self.unwritten += 1
        if not self._down:  # once for each time it goes away
            log.warning("%s; records wait and are tried again", error)
        self._down = True
