"""Ask an endpoint many questions side by side: within a budget, and none that is answered.

What is answered is kept as it arrives, so a run that is stopped, or killed, goes on from there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

from routellm.augmentation.budget import Budget, StopJudging
from routellm.augmentation.endpoint import CallFailed, Endpoint, Reply
from routellm.augmentation.kept import Kept
from routellm.augmentation.replies import Said
from routellm.embeddings.base import Progress
from routellm.settings import JudgeSettings

_FAILURES_IN_A_ROW = 5  # more than two bad texts side by side: it is the endpoint, not the texts
_REPLY_KEPT_CHARS = 500  # what was asked for stands at the end

Q = TypeVar("Q")
T = TypeVar("T")


@dataclass
class Asked(Generic[T]):
    """What came of a run, by key of a question.

    Attributes
    ----------
    known : dict
        Answers, those that were known before too.
    failed : dict
        Why questions got no reply at all; they are not kept.
    cached : int
        Answers that were known before.
    cost_usd : float
        Spent by this run.
    stopped : str or None
        Why it ended before its end, as a sentence.
    """

    known: dict[bytes, T]
    cached: int
    budget: Budget
    failed: dict[bytes, str] = field(default_factory=dict)
    cost_usd: float = 0.0
    stopped: str | None = None


@dataclass
class Asker(Generic[Q, T]):
    """Asks questions of one kind; one budget for all its runs.

    Attributes
    ----------
    ask : callable
        Puts one question to an endpoint and returns what came of it.
    backoff_s : float
        Wait before the second attempt of a call.
    section : str
        Where its settings stand, for messages.
    spent_usd : float
        Spent by its runs so far.
    """

    settings: JudgeSettings
    store: Kept[T]
    ask: Callable[[Q, Endpoint], Coroutine[Any, Any, T]]
    backoff_s: float
    section: str = "judge"
    spent_usd: float = field(default=0.0, init=False)

    def run(self, questions: Mapping[bytes, Q], progress: Progress | None = None) -> Asked[T]:
        """Ask those that are not known.

        Raises
        ------
        UsageError
            If there is something to ask and the endpoint is not set.
        JudgeError
            If the store cannot be used.
        """
        known = self.store.get(list(questions))
        budget = Budget(self.settings.budget_usd, section=self.section, spent_usd=self.spent_usd)
        asked = Asked(known, len(known), budget)
        todo = {key: q for key, q in questions.items() if key not in known}
        if todo:  # else no endpoint is needed
            endpoint = Endpoint(
                self.settings, budget, backoff_s=self.backoff_s, section=self.section
            )
            try:
                _wait_for(_Run(self, asked, endpoint, len(todo), progress).all(todo))
            finally:
                asked.cost_usd = budget.spent_usd - self.spent_usd
                self.spent_usd = budget.spent_usd
        return asked


@dataclass
class _Run(Generic[Q, T]):
    asker: Asker[Q, T]
    asked: Asked[T]
    endpoint: Endpoint
    total: int
    progress: Progress | None
    done: int = 0
    failed_in_a_row: int = 0

    async def all(self, todo: Mapping[bytes, Q]) -> None:
        work = iter(todo.items())
        # as many workers as calls may be in flight: no task a question is held
        workers = min(self.asker.settings.concurrency, len(todo))
        async with self.endpoint:
            with self.asker.store.held():
                await asyncio.gather(*(self._work(work) for _ in range(workers)))

    async def _work(self, work: Iterator[tuple[bytes, Q]]) -> None:
        """Ask one question after another, until there is none left or the run is stopped."""
        store, asked = self.asker.store, self.asked
        for key, question in work:
            try:
                known = store.get([key]).get(key)  # another process may have asked since
                if known is None:
                    answer = await self.asker.ask(question, self.endpoint)
                    known = store.put(key, answer, self.asker.settings.model)
                asked.known[key] = known
                self.failed_in_a_row = 0
            except CallFailed as error:
                asked.failed[key] = str(error)
                self.failed_in_a_row += 1
                if self.failed_in_a_row >= _FAILURES_IN_A_ROW:
                    asked.stopped = asked.stopped or (
                        f"{self.failed_in_a_row} questions in a row got no reply, the last for "
                        f"{error}: see that the {self.endpoint.who}'s endpoint works and run again"
                    )
            except StopJudging as stop:
                asked.stopped = asked.stopped or str(stop)
            if asked.stopped is not None:
                asked.budget.close()
                return
            self.done += 1
            if self.progress:
                self.progress(self.done, self.total)


async def ask_until_read(
    endpoint: Endpoint,
    system: str,
    user: str,
    read: Callable[[Reply], str | None],
    *,
    times: int,
    nothing: str = "no verdict",
    temperature: float = 0,
) -> Said:
    """Ask one question until `read` returns something, at most `times`.

    Parameters
    ----------
    nothing : str
        What to say of a whole reply in which nothing could be read.

    Raises
    ------
    StopJudging, CallFailed
        As the endpoint raises them.
    """
    replies: list[Reply] = []
    outcome: str | None = None
    while outcome is None and len(replies) < times:
        reply = await endpoint.ask(system, user, temperature=temperature)
        replies.append(reply)
        if not reply.refused:
            outcome = read(reply)
    last = replies[-1]
    reason = "a refusal" if last.refused else nothing if last.whole else "cut off"
    inputs = [r.input_tokens for r in replies if r.input_tokens is not None]
    outputs = [r.output_tokens for r in replies if r.output_tokens is not None]
    return Said(
        outcome=None if outcome is None else endpoint.without_key(outcome),
        reason=reason if outcome is None else None,
        reply=endpoint.without_key(last.text)[-_REPLY_KEPT_CHARS:],
        calls=len(replies),
        input_tokens=sum(inputs) if len(inputs) == len(replies) else None,
        output_tokens=sum(outputs) if len(outputs) == len(replies) else None,
        cost_usd=sum(r.cost_usd for r in replies),
        asked_at=datetime.now(UTC),
    )


def _wait_for(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end, also where a loop runs already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, work).result()
