"""LLM-as-a-judge labels: recorded answers of two models become ``judge`` battles.

Every pair of answers is judged in both orders, since judges favour a place (Zheng et al., arXiv
2306.05685, section 3.4). If both orders name the same model, it won; if they differ, it is a tie.
Without two verdicts there is no label.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from routellm.augmentation.answers import AnswerPair, Answers
from routellm.augmentation.asking import Asker, ask_until_read
from routellm.augmentation.endpoint import Endpoint, Reply
from routellm.augmentation.labels import Labels, label
from routellm.augmentation.template import SYSTEM, Choice, Question, cut, read_verdict
from routellm.augmentation.verdicts import Verdict, VerdictStore
from routellm.embeddings.base import Progress
from routellm.errors import JudgeError
from routellm.settings import JudgeSettings

_TIMES_ASKED = 2  # a reply without a verdict is asked for once more
_OUTPUT_TOKENS = 150  # what 100 words of reasons and a verdict come to
_CHARS_PER_TOKEN = 4  # of English text, roughly


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
        asked = Asker(self._settings, self._store, self._ask, self._backoff_s).run(
            self._questions(answers), progress
        )
        labels = label(
            answers,
            [self._keys(pair) for pair in answers.pairs],
            asked.known,
            asked.failed,
            judge=self._settings.model,
        )
        stopped, budget = asked.stopped, asked.budget
        if stopped is not None:
            stopped = f"{stopped} ({labels.remaining} of {len(answers.pairs)} pairs remain)"
        return Judging(
            labels=labels,
            calls=budget.calls,
            cached=asked.cached,
            cost_usd=asked.cost_usd,
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

    async def _ask(self, question: Question, endpoint: Endpoint) -> Verdict:
        said = await ask_until_read(endpoint, SYSTEM, question.text(), _choice, times=_TIMES_ASKED)
        return Verdict(
            choice=cast("Choice | None", said.outcome),
            reason=said.reason,
            reply=said.reply,
            input_tokens=said.input_tokens,
            output_tokens=said.output_tokens,
            cost_usd=said.cost_usd,
            judged_at=said.asked_at,
        )


def _choice(reply: Reply) -> Choice | None:
    return read_verdict(reply.text, whole=reply.whole)
