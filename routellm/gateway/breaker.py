"""A circuit breaker: an upstream that keeps failing is left alone for a while."""

from __future__ import annotations

import time
from collections.abc import Callable


class Breaker:
    """Opens after several failures in a row; then lets one request through at a time.

    Parameters
    ----------
    failures : int
        In a row, that open it.
    open_s : float
        Seconds that it stays open; after them one request tries, and the others wait as long again.
    """

    def __init__(
        self, failures: int, open_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.failures = failures
        self.open_s = open_s
        self._clock = clock
        self._in_a_row = 0
        self._closed_until_next: float | None = None  # when the next request may try

    @property
    def is_open(self) -> bool:
        return self._closed_until_next is not None

    def wait_s(self) -> float:
        """Return 0 if a request may be sent now (and count it as the try), else the seconds left.

        Every request that was let through must end in `succeeded` or `failed`.
        """
        if self._closed_until_next is None:
            return 0.0
        left = self._closed_until_next - self._clock()
        if left > 0:
            return left
        self._closed_until_next = self._clock() + self.open_s  # this one tries
        return 0.0

    def succeeded(self) -> None:
        self._in_a_row = 0
        self._closed_until_next = None

    def failed(self) -> None:
        self._in_a_row += 1
        if self._in_a_row >= self.failures:
            self._closed_until_next = self._clock() + self.open_s
