"""Self-verification: a model is asked k times whether its own answer is correct.

AutoMix (Aggarwal et al. 2024, arXiv 2310.12963, section 3): the share of k few-shot verdicts,
drawn at a temperature above 0, is how sure the model is of its answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from routellm.augmentation.asking import Asked, Asker, ask_until_read
from routellm.augmentation.endpoint import Endpoint, Reply
from routellm.augmentation.replies import ReplyStore, Said
from routellm.augmentation.template import cut
from routellm.embeddings.base import Progress
from routellm.embeddings.sentence import clean
from routellm.errors import JudgeError, UsageError
from routellm.evaluation.metrics import Floats
from routellm.policies.recorded import Recorded
from routellm.policies.verify_prompt import VERIFY_SYSTEM, VERIFY_VERSION, Check, Vote, read_vote
from routellm.settings import VerifierSettings

GOOD = 0.5  # an answer of this score or more counts as right
PROMPT_TOKENS = 440  # of the prompt around a question and its answer, as MiniLM's tokenizer counts
VERDICT_TOKENS = 40  # a check in a few words, and the verdict
_TIMES_ASKED = 2  # a reply without a verdict is asked for once more
_CHARS_PER_TOKEN = 4  # of English text, roughly; where an endpoint reports no usage


@dataclass(frozen=True)
class Verified:
    """What the k votes on each answer said and took.

    Attributes
    ----------
    yes, voted : ndarray (n,)
        Votes that call the answer correct, and votes that could be read.
    calls : ndarray (n,)
        Calls made: one a vote, and one more where the first reply could not be read.
    input_tokens, output_tokens : ndarray (n,)
        Read and written in all these calls.
    turns : ndarray (n,)
        Calls one after the other. Votes are asked for side by side, a second asking waits for the
        first.
    longest_tokens : ndarray (n,)
        Written by the vote that wrote most: the others are ready before it.
    """

    yes: Floats
    voted: Floats
    calls: Floats
    input_tokens: Floats
    output_tokens: Floats
    turns: Floats
    longest_tokens: Floats

    @property
    def confidence(self) -> Floats:
        """Share (n,) of yes among the votes that could be read; 0 where none could."""
        return np.divide(self.yes, self.voted, out=np.zeros(len(self.yes)), where=self.voted > 0)


class Verifier(Protocol):
    """Says how sure a model is of its own answers.

    Attributes
    ----------
    samples : int
        Votes on an answer, k.
    simulated : bool
        Whether votes are made up.
    """

    @property
    def samples(self) -> int: ...

    @property
    def simulated(self) -> bool: ...

    def verify(self, table: Recorded, column: int) -> Verified:
        """Return what the model of a column thinks of its recorded answers."""


@dataclass(frozen=True)
class PlantedVerifier:
    """SIMULATED votes: made up from whether an answer is right, for tables that no model verified.

    Each vote says yes with probability `right` where the recorded score is at least a half, and
    `wrong` where it is less. A vote depends on the prompt, the model and the seed alone, so a row
    has the same votes in whichever table and order it stands.

    The defaults are a model that mostly approves of what it wrote, and little less so where it is
    wrong: eight votes then tell a right answer from a wrong one with an AUC of 0.67. They are
    assumed and not measured. Votes are drawn independently, which those of a model are not: where
    it is wrong it is so again and again, so rates further apart would be too good to be true.
    """

    right: float = 0.75
    wrong: float = 0.65
    samples: int = 8
    seed: int = 0
    simulated: bool = True

    def __post_init__(self) -> None:
        if not (0 <= self.right <= 1 and 0 <= self.wrong <= 1) or self.samples < 1:
            raise UsageError(
                f"a planted verifier takes chances of yes in [0, 1] and one vote or more, not "
                f"{self.right}, {self.wrong} and {self.samples}"
            )

    def verify(self, table: Recorded, column: int) -> Verified:
        chance = np.where(table.quality[:, column] >= GOOD, self.right, self.wrong)
        model = table.models[column]
        n, k = len(table), float(self.samples)
        drawn = np.array([self._drawn(one, model) for one in table.ids]).reshape(n, self.samples)
        read = table.read_tokens + table.written_tokens[:, column] + PROMPT_TOKENS
        return Verified(
            yes=(drawn < chance[:, None]).sum(axis=1).astype(np.float64),
            voted=np.full(n, k),
            calls=np.full(n, k),
            input_tokens=k * read,
            output_tokens=np.full(n, k * VERDICT_TOKENS),
            turns=np.ones(n),
            longest_tokens=np.full(n, float(VERDICT_TOKENS)),
        )

    def _drawn(self, row: str, model: str) -> list[float]:
        """Return k numbers in [0, 1) that are a row's own."""
        told = (f"planted votes\0{self.seed}\0{model}\0{row}\0{i}" for i in range(self.samples))
        digests = (hashlib.sha256(one.encode("utf-8", "replace")).digest() for one in told)
        return [int.from_bytes(one[:7], "big") / 2**56 for one in digests]  # 7 bytes fit a float


class EndpointVerifier:
    """Asks the model itself, through any OpenAI-compatible endpoint, and remembers every vote.

    Parameters
    ----------
    cache_path : Path
        SQLite file of votes; made if it is not there. A run that is stopped or killed goes on from
        it without paying twice.
    backoff_s : float
        Wait before the second attempt of a call.
    section : str
        Where its settings stand, for messages.
    """

    simulated = False

    def __init__(
        self,
        settings: VerifierSettings,
        cache_path: Path,
        *,
        backoff_s: float = 0.5,
        section: str = "verifier",
        progress: Progress | None = None,
    ) -> None:
        self.samples = settings.samples
        self._settings = settings
        self._store = ReplyStore(cache_path, VERIFY_VERSION)
        self._asker = Asker(settings.endpoint, self._store, self._ask, backoff_s, section)
        self._progress = progress

    @property
    def cost_usd(self) -> float:
        """Dollars spent so far, at the endpoint's own prices."""
        return self._asker.spent_usd

    def verify(self, table: Recorded, column: int) -> Verified:
        """Return the votes on a column's recorded answers.

        Raises
        ------
        UsageError
            If the table has no answers of that model, or the endpoint is not set.
        JudgeError
            If the run was stopped before its end, or no reply of all ended in a verdict.
        """
        model = table.models[column]
        if model not in table.answers:
            raise UsageError(
                f"table {table.name} has no answers of {model} to verify: give it a column "
                f"`{model}:response`"
            )
        return self.votes(table.prompts, table.answers[model])

    def votes(self, prompts: Sequence[str], answers: Sequence[str]) -> Verified:
        """Return the votes on answers (n) to prompts (n); see `verify`."""
        n, k = len(prompts), self.samples
        longest = self._settings.endpoint.max_answer_chars
        shown = [(clean(p), cut(clean(a), longest)) for p, a in zip(prompts, answers, strict=True)]
        # vote by vote and not row by row: what cannot be sent does not fail many times in a row
        checks = [Check(p, a, sample) for sample in range(k) for p, a in shown]
        keys = [self._key(check) for check in checks]
        asked = self._asker.run(dict(zip(keys, checks, strict=True)), self._progress)
        self._complete(asked, set(keys))
        per_vote = np.array(
            [_vote(asked.known.get(key), check) for key, check in zip(keys, checks, strict=True)]
        ).reshape(k, n, 5)
        voted, yes, calls, read, written = np.moveaxis(per_vote, 2, 0)  # each (k, n)
        return Verified(
            yes=yes.sum(axis=0),
            voted=voted.sum(axis=0),
            calls=calls.sum(axis=0),
            input_tokens=read.sum(axis=0),
            output_tokens=written.sum(axis=0),
            turns=calls.max(axis=0, initial=1.0),
            longest_tokens=written.max(axis=0, initial=0.0),
        )

    def _key(self, check: Check) -> bytes:
        return check.key(self._settings.endpoint.model, self._settings.temperature)

    async def _ask(self, check: Check, endpoint: Endpoint) -> Said:
        return await ask_until_read(
            endpoint,
            VERIFY_SYSTEM,
            check.text(),
            _read,
            times=_TIMES_ASKED,
            temperature=self._settings.temperature,
        )

    def _complete(self, asked: Asked[Said], keys: set[bytes]) -> None:
        """Raise unless there is something to go by of every answer."""
        if asked.stopped is not None:
            left = len(keys - set(asked.known))
            raise JudgeError(f"{asked.stopped} ({left} of {len(keys)} verifications remain)")
        if keys and not any(said.outcome for said in asked.known.values()):
            why = [*asked.failed.values(), *(said.reason for said in asked.known.values())]
            raise JudgeError(
                f"none of {len(keys)} verifications ended in a verdict, the first for {why[0]}: "
                f"see that {self._settings.endpoint.model} follows the prompt, or ask another"
            )


def _read(reply: Reply) -> Vote | None:
    return read_vote(reply.text, whole=reply.whole)


def _vote(said: Said | None, check: Check) -> tuple[float, float, float, float, float]:
    """Return what could be read, yes, calls, and tokens read and written, of one vote."""
    if said is None:  # it got no reply: there is nothing to pay for
        return 0.0, 0.0, 1.0, 0.0, 0.0
    asked = said.calls * (len(VERIFY_SYSTEM) + len(check.text()))
    read = asked / _CHARS_PER_TOKEN if said.input_tokens is None else said.input_tokens
    wrote = said.calls * len(said.reply) / _CHARS_PER_TOKEN
    written = wrote if said.output_tokens is None else said.output_tokens
    return float(said.outcome is not None), float(said.outcome == "yes"), said.calls, read, written
