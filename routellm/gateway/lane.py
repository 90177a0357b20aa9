"""One thread with a short queue: it can fall behind or hang, and holds nobody up."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class Lane:
    """Runs pieces of work one after the other.

    A thread of its own rather than an executor's: an executor's is waited for when the process
    ends, and a router that hangs would keep the gateway from stopping.

    Parameters
    ----------
    size : int
        Pieces that may wait.
    patience_s : float
        Seconds after which a piece of work counts as hung.
    """

    def __init__(self, name: str, size: int, patience_s: float) -> None:
        self.patience_s = patience_s
        self._queue: queue.Queue[tuple[Future[Any], Callable[[], Any]] | None] = queue.Queue(size)
        self._began: float | None = None  # when the work at hand did
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Queue a piece of work; never waits.

        Raises
        ------
        TimeoutError
            If the work at hand hangs.
        queue.Full
            If too much waits.
        """
        began = self._began
        if began is not None and time.monotonic() - began > self.patience_s:
            raise TimeoutError(f"the work before has taken more than {self.patience_s} s")
        future: Future[T] = Future()
        self._queue.put_nowait((future, work))
        return future

    def close(self) -> None:
        """Let it end once what waits is done; does not wait for that."""
        self._closing = True
        with suppress(queue.Full):  # then it will see the flag when it gets there
            self._queue.put_nowait(None)

    def end(self, within_s: float) -> None:
        """Give what waits so long to be done, cancel the rest, and wait for the work at hand.

        The interpreter must not end while a thread is inside a library's own code, if it can be
        helped: that aborts the process.
        """
        self.close()
        self._thread.join(within_s)
        while True:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
            if item is not None:
                item[0].cancel()
        self.close()
        self._thread.join(self.patience_s)

    def _run(self) -> None:
        while not (self._closing and self._queue.empty()):
            item = self._queue.get()
            if item is None:
                continue
            future, work = item
            if not future.set_running_or_notify_cancel():
                continue
            self._began = time.monotonic()
            try:
                result = work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            self._began = None
