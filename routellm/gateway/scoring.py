"""One version's win rates for many requests at once.

Scoring holds the interpreter for milliseconds, so it happens in a thread, one batch after another.
A prompt that comes while the thread is free is scored at once; those that come while it is busy
are the next batch. So a batch is as large as the traffic makes it, and nobody waits for company.
"""

from __future__ import annotations

import asyncio
import hashlib
import queue
import time
from collections import OrderedDict
from dataclasses import dataclass

from routellm.errors import BundleError
from routellm.gateway.follow import Serving
from routellm.gateway.lane import Lane

_BATCH = 64  # prompts that are scored together at most
_REMEMBERED = 20_000  # win rates of the latest prompts (about 2 MB)

Rated = tuple[float, float]  # win rate, milliseconds


@dataclass
class _Waiting:
    key: bytes
    prompt: str
    answer: asyncio.Future[Rated]


class Scorer:
    """Asks one version for win rates. Its methods are called from one event loop.

    Parameters
    ----------
    serving : Serving
    patience_s : float
        Seconds that an answer may take, waiting included.
    most_waiting : int
        Prompts that may wait for the thread.
    """

    def __init__(self, serving: Serving, patience_s: float, most_waiting: int = 2048) -> None:
        self.serving = serving
        self.patience_s = patience_s
        self.most_waiting = most_waiting
        self.batches = 0
        self._lane = Lane(f"score-{serving.ref.version}", 1, patience_s)
        self._known: OrderedDict[bytes, float] = OrderedDict()
        self._waiting: list[_Waiting] = []
        self._began: float | None = None  # when the batch at hand did

    async def rate(self, prompt: str) -> Rated:
        """Return a prompt's win rate, and how long it took, in milliseconds.

        Raises
        ------
        TimeoutError
            If the version does not answer in time.
        Exception
            Whatever a broken router raises.
        """
        began = time.perf_counter()
        key = hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if (known := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            return known, 1000.0 * (time.perf_counter() - began)
        if self._began is not None and time.monotonic() - self._began > self.patience_s:
            raise TimeoutError("the router hangs")
        if len(self._waiting) >= self.most_waiting:
            raise TimeoutError("too many prompts wait for the router")
        loop = asyncio.get_running_loop()
        one = _Waiting(key, prompt, loop.create_future())
        self._waiting.append(one)
        self._next(loop)
        timer = loop.call_later(self.patience_s, self._late, one)
        try:
            rate, _ = await one.answer
        finally:
            timer.cancel()
        return rate, 1000.0 * (time.perf_counter() - began)

    def close(self) -> None:
        """Let the thread end once what waits is done."""
        self._lane.close()

    def _late(self, one: _Waiting) -> None:
        if not one.answer.done():
            one.answer.set_exception(TimeoutError(f"no win rate within {self.patience_s:g} s"))

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin a batch if none is at hand."""
        self._waiting = [one for one in self._waiting if not one.answer.done()]
        if self._began is not None or not self._waiting:
            return
        batch, self._waiting = self._waiting[:_BATCH], self._waiting[_BATCH:]
        try:
            work = self._lane.submit(lambda: self._scored([one.prompt for one in batch]))
        except (queue.Full, TimeoutError) as error:
            self._done(batch, [error] * len(batch))
            return
        self._began = time.monotonic()
        self.batches += 1

        def finished() -> None:
            self._began = None
            self._done(batch, work.result())
            self._next(loop)

        def tell(_: object) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(finished)

        work.add_done_callback(tell)

    def _scored(self, prompts: list[str]) -> list[float | Exception]:
        """Return a win rate or an error for each prompt; runs in the thread."""
        try:
            return [self._checked(rate) for rate in self.serving.bundle.router.win_rate(prompts)]
        except Exception as error:
            if len(prompts) == 1:
                return [error]
        # a prompt that a router cannot read spoils nothing for the others
        return [self._scored([prompt])[0] for prompt in prompts]

    def _checked(self, rate: float) -> float:
        if not 0.0 <= rate <= 1.0:
            raise BundleError(
                f"version {self.serving.ref.version} gave the win rate {rate}: register it anew"
            )
        return float(rate)

    def _done(self, batch: list[_Waiting], found: list[float | Exception]) -> None:
        for one, rate in zip(batch, found, strict=True):
            if isinstance(rate, Exception):
                if not one.answer.done():
                    one.answer.set_exception(rate)
                continue
            self._known[one.key] = rate
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
            if not one.answer.done():
                one.answer.set_result((rate, 0.0))
