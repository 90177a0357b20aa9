"""A budget in dollars that calls in flight cannot break.

Before a call starts, the most it could cost is set aside; when it has ended, what it did cost is
spent. So spent and set aside together never exceed the limit, however many calls are in flight.
"""

from __future__ import annotations

import asyncio
import contextlib

from routellm.errors import JudgeError


def dollars(usd: float) -> str:
    """Return an amount for a person: in cents, or finer where cents would say nothing."""
    return f"${usd:,.2f}" if usd >= 1 or usd == 0 else f"${usd:.4f}"


class StopJudging(JudgeError):
    """No further call is to be made in this run."""


class Budget:
    """What a run may spend, has spent, and has set aside.

    Parameters
    ----------
    section : str
        Where the limit is set, for messages.
    spent_usd : float
        Spent under this limit before.

    Attributes
    ----------
    spent_usd : float
        Cost of the calls that ended, and what was spent before.
    calls : int
        Calls started.
    unseen_calls, unseen_usd : int, float
        Of these, calls whose usage nobody reported (a timeout, no usage in the reply), counted
        at the most they could cost.
    """

    def __init__(self, limit_usd: float, *, section: str = "judge", spent_usd: float = 0.0) -> None:
        self.limit_usd = limit_usd
        self._section = section
        self.spent_usd = spent_usd
        self.calls = 0
        self.unseen_calls = 0
        self.unseen_usd = 0.0
        self._set_aside_usd = 0.0
        self._in_flight = 0
        self._settled = asyncio.Event()
        self._closed = asyncio.Event()

    async def reserve(self, most_usd: float) -> None:
        """Set aside the most that a call can cost, waiting for calls in flight to free it.

        Raises
        ------
        StopJudging
            If the budget cannot bear it even with nothing in flight, or the run is stopping.
        """
        while True:
            if self._closed.is_set():
                raise StopJudging("the run is stopping")
            if self.spent_usd + self._set_aside_usd + most_usd <= self.limit_usd:
                break
            if not self._in_flight:
                raise StopJudging(
                    f"the budget of {dollars(self.limit_usd)} a run stops it: "
                    f"{dollars(self.spent_usd)} are spent and the next call could cost "
                    f"{dollars(most_usd)}; run again to go on, or raise "
                    f"`{self._section}.budget_usd`"
                )
            self._settled.clear()
            await self._settled.wait()
        self._set_aside_usd += most_usd
        self._in_flight += 1
        self.calls += 1

    def settle(self, most_usd: float, cost_usd: float | None) -> None:
        """End a call: spend what it cost, or all that was set aside if nobody knows."""
        self._in_flight -= 1
        # exactly nothing when nothing is in flight: sums of fractions leave crumbs
        self._set_aside_usd = self._set_aside_usd - most_usd if self._in_flight else 0.0
        if cost_usd is None:
            self.unseen_calls += 1
            self.unseen_usd += most_usd
        self.spent_usd += most_usd if cost_usd is None else cost_usd
        self._settled.set()

    def close(self) -> None:
        """Let calls in flight end, and no other start."""
        self._closed.set()
        self._settled.set()

    async def sleep(self, seconds: float) -> None:
        """Wait, but no longer than until the run stops."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closed.wait(), seconds)
