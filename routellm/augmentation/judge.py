"""LLM-as-a-judge labels: recorded answers of two models become ``judge`` battles.

Every pair of answers is judged in both orders, since judges favour a place (Zheng et al., arXiv
2306.05685, section 3.4). If both orders name the same model, it won; if they differ, it is a tie.
Without two verdicts there is no label.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from routellm.augmentation.answers import AnswerPair, Answers
from routellm.augmentation.budget import Budget, StopJudging
from routellm.augmentation.endpoint import CallFailed, Endpoint, Reply
from routellm.augmentation.labels import Labels, label
from routellm.augmentation.template import SYSTEM, Choice, Question, cut, read_verdict
from routellm.augmentation.verdicts import Verdict, VerdictStore
from routellm.embeddings.base import Progress
from routellm.errors import JudgeError
from routellm.settings import JudgeSettings

_TIMES_ASKED = 2  # a reply without a verdict is asked for once more
_OUTPUT_TOKENS = 150  # what 100 words of reasons and a verdict come to
_CHARS_PER_TOKEN = 4  # of English text, roughly
_FAILURES_IN_A_ROW = 5  # more than two bad pairs side by side: it is the endpoint, not the texts


@dataclass(frozen=True)
class Estimate:
    """What judging would take now.

    Attributes
    ----------
    verdicts, cached, calls : int
        Verdicts needed, of them known already, and calls to make for the others.
    answers_cut : int
        Answers longer than `max_answer_chars`.
    input_tokens, output_tokens : int
        Of these calls, estimated at four characters a token.
    cost_usd : float
        At the prices set.
    """

    pairs: int
    verdicts: int
    cached: int
    calls: int
    answers_cut: int
    input_tokens: int
    output_tokens: int
    cost_usd: float


@dataclass(frozen=True)
class Judging:
    """What came of a run.

    Attributes
    ----------
    calls, cached : int
        Calls made, and verdicts that were known before.
    cost_usd : float
        Spent by this run.
    unseen_calls, unseen_usd : int, float
        Of these, calls whose usage nobody reported, counted at the most they could cost.
    stopped : str or None
        Why it ended before its end, as a sentence.
    """

    labels: Labels
    calls: int
    cached: int
    cost_usd: float
    unseen_calls: int
    unseen_usd: float
    stopped: str | None

    def raise_if_stopped(self) -> None:
        """Raise a JudgeError that says why the run ended before its end, if it did."""
        if self.stopped is not None:
            raise JudgeError(self.stopped)


@dataclass
class _Run:
    """What is known as a run goes on; verdicts and failures by question key."""

    endpoint: Endpoint
    budget: Budget
    verdicts: dict[bytes, Verdict]
    total: int
    progress: Progress | None
    done: int = 0
    failed: dict[bytes, str] = field(default_factory=dict)
    failed_in_a_row: int = 0
    stopped: str | None = None


class Judge:
    """Labels pairs of answers by asking an LLM, and remembers its verdicts on disk.

    Parameters
    ----------
    cache_path : Path
        SQLite file of verdicts; made if it is not there.
    backoff_s : float
        Wait before the second attempt of a call.
    """

    def __init__(
        self, settings: JudgeSettings, cache_path: Path, *, backoff_s: float = 0.5
    ) -> None:
        self._settings = settings
        self._store = VerdictStore(cache_path)
        self._backoff_s = backoff_s

    def estimate(self, answers: Answers) -> Estimate:
        """Say what judging would take, counting out the verdicts that are known. Asks nobody."""
        questions = self._questions(answers)
        known = self._store.get(list(questions))
        asked = [q for key, q in questions.items() if key not in known]
        input_tokens = sum(
            math.ceil((len(SYSTEM) + len(q.text())) / _CHARS_PER_TOKEN) for q in asked
        )
        output_tokens = len(asked) * min(_OUTPUT_TOKENS, self._settings.max_output_tokens)
        longest = self._settings.max_answer_chars
        return Estimate(
            pairs=len(answers.pairs),
            verdicts=len(questions),
            cached=len(known),
            calls=len(asked),
            answers_cut=sum(
                (len(p.answer_a) > longest) + (len(p.answer_b) > longest) for p in answers.pairs
            ),
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            cost_usd=input_tokens * self._settings.usd_per_million_input / 1e6
            + output_tokens * self._settings.usd_per_million_output / 1e6,
        )

    def judge(self, answers: Answers, *, progress: Progress | None = None) -> Judging:
        """Ask for the verdicts that are not known, and make battles of all.

        A run that is stopped, by its budget or by the endpoint, returns what was judged; one that
        is killed has it in the cache. Either way the next run goes on from there.

        Raises
        ------
        UsageError
            If the endpoint is not set.
        JudgeError
            If the cache cannot be used.
        """
        questions = self._questions(answers)
        verdicts = self._store.get(list(questions))
        cached = len(verdicts)
        todo = {key: q for key, q in questions.items() if key not in verdicts}
        budget = Budget(self._settings.budget_usd)
        failed: dict[bytes, str] = {}
        stopped = None
        if todo:  # else no endpoint is needed
            endpoint = Endpoint(self._settings, budget, backoff_s=self._backoff_s)
            run = _Run(endpoint, budget, verdicts, len(todo), progress, failed=failed)
            _wait_for(self._ask_all(todo, run))
            stopped = run.stopped
        labels = label(
            answers,
            [self._keys(pair) for pair in answers.pairs],
            verdicts,
            failed,
            judge=self._settings.model,
        )
        if stopped is not None:
            stopped = f"{stopped} ({labels.remaining} of {len(answers.pairs)} pairs remain)"
        return Judging(
            labels=labels,
            calls=budget.calls,
            cached=cached,
            cost_usd=budget.spent_usd,
            unseen_calls=budget.unseen_calls,
            unseen_usd=budget.unseen_usd,
            stopped=stopped,
        )

    def _questions(self, answers: Answers) -> dict[bytes, Question]:
        """Return what there is to ask, by key; both orders of a pair side by side."""
        asked = (q for pair in answers.pairs for q in self._orders(pair))
        return {q.key(self._settings.model): q for q in asked}

    def _orders(self, pair: AnswerPair) -> tuple[Question, Question]:
        a = cut(pair.answer_a, self._settings.max_answer_chars)
        b = cut(pair.answer_b, self._settings.max_answer_chars)
        return Question(pair.prompt, a, b), Question(pair.prompt, b, a)

    def _keys(self, pair: AnswerPair) -> tuple[bytes, bytes]:
        a_first, b_first = self._orders(pair)
        return a_first.key(self._settings.model), b_first.key(self._settings.model)

    async def _ask_all(self, todo: dict[bytes, Question], run: _Run) -> None:
        work = iter(todo.items())
        # as many workers as calls may be in flight: no task a question is held
        workers = min(self._settings.concurrency, len(todo))
        async with run.endpoint:
            with self._store.held():
                await asyncio.gather(*(self._work(work, run) for _ in range(workers)))

    async def _work(self, work: Iterator[tuple[bytes, Question]], run: _Run) -> None:
        """Ask one question after another, until there is none left or the run is stopped."""
        for key, question in work:
            try:
                known = self._store.get([key]).get(key)  # another process may have asked since
                if known is None:
                    verdict = await self._ask(question, run.endpoint)
                    known = self._store.put(key, verdict, self._settings.model)
                run.verdicts[key] = known
                run.failed_in_a_row = 0
            except CallFailed as error:
                run.failed[key] = str(error)
                run.failed_in_a_row += 1
                if run.failed_in_a_row >= _FAILURES_IN_A_ROW:
                    run.stopped = run.stopped or (
                        f"{run.failed_in_a_row} questions in a row got no reply, the last for "
                        f"{error}: see that the judge's endpoint works and run again"
                    )
            except StopJudging as stop:
                run.stopped = run.stopped or str(stop)
            if run.stopped is not None:
                run.budget.close()
                return
            run.done += 1
            if run.progress:
                run.progress(run.done, run.total)

    async def _ask(self, question: Question, endpoint: Endpoint) -> Verdict:
        replies: list[Reply] = []
        choice: Choice | None = None
        while choice is None and len(replies) < _TIMES_ASKED:
            reply = await endpoint.ask(SYSTEM, question.text())
            replies.append(reply)
            if not reply.refused:
                choice = read_verdict(reply.text, whole=reply.whole)
        last = replies[-1]
        reason = "a refusal" if last.refused else "no verdict" if last.whole else "cut off"
        inputs = [r.input_tokens for r in replies if r.input_tokens is not None]
        outputs = [r.output_tokens for r in replies if r.output_tokens is not None]
        return Verdict(
            choice=choice,
            reason=None if choice else reason,
            reply=endpoint.without_key(last.text)[-500:],  # the verdict stands at the end
            input_tokens=sum(inputs) if len(inputs) == len(replies) else None,
            output_tokens=sum(outputs) if len(outputs) == len(replies) else None,
            cost_usd=sum(r.cost_usd for r in replies),
            judged_at=datetime.now(UTC),
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
