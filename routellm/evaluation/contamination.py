"""Which evaluation prompts training has shown, and how alike the two sets are.

Two tests, as in the field. *Similarity*: the embeddings' cosine reaches a threshold (RouteLLM,
arXiv 2406.18665, takes 0.95). *N-grams*: the two prompts share runs of n words, lower-cased and
without punctuation (GPT-3, arXiv 2005.14165, appendix C: n = 13), which cover most of the shorter
one (Llama 2, arXiv 2307.09288, appendix A.6: 80 %). A single shared run is no evidence between
prompts: two exam questions with the same lines of options share several. The second test finds
what the first misses: a question with a sentence of instructions put behind it.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SHARED = 0.8  # Llama 2's "dirty": this share of a prompt's words in shared n-grams
COMMON = 10  # an n-gram in more prompts than this is boilerplate (GPT-3, appendix C)
MIN_RUN = 8  # words; shorter runs collide by chance (GPT-3, appendix C)

_BLOCK_BYTES = 64 * 2**20
# Chinese and Japanese write no spaces: there each character counts as a word
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")

Side = Literal["evaluation", "training"]
MatchedBy = Literal["similarity", "ngram", "both"]


@dataclass(frozen=True)
class Match:
    """An evaluation prompt and a training prompt that are taken for the same.

    Attributes
    ----------
    prompt, training : int
        Rows of the two prompts.
    similarity : float
        Cosine similarity of this pair.
    by : str
        The test that found it.
    """

    prompt: int
    training: int
    similarity: float
    by: MatchedBy


@dataclass(frozen=True)
class Found:
    """The prompts of one side that match one of the other side.

    Attributes
    ----------
    matches : tuple of Match
        One for each such prompt, in row order: with the nearest where embeddings say so, else
        with the one that it has most words in common with.
    similarity : ndarray float64 (n,)
        Of each of the side's prompts, matching or not, to the nearest of the other side.
    """

    matches: tuple[Match, ...]
    similarity: NDArray[np.float64]


@dataclass(frozen=True)
class Dropped:
    """A prompt that was left out, as a run lists it: by digests, never by text.

    Attributes
    ----------
    prompt_sha256, training_sha256 : str
        First 16 hex digits of the SHA-256 of the evaluation and of the training prompt.
    """

    prompt_sha256: str
    training_sha256: str
    similarity: float
    matched_by: MatchedBy


@dataclass(frozen=True)
class Contamination:
    """What one retraining left out because training and evaluation share it.

    Attributes
    ----------
    side : str
        Which side it was taken from.
    by_benchmark : dict
        Evaluation prompts, or training prompts, that match, by benchmark.
    battles : int
        Training battles left out.
    """

    side: Side
    by_benchmark: dict[str, tuple[Dropped, ...]]
    battles: int = 0

    @property
    def summary(self) -> str:
        """What was left out, in a line; "" if nothing was."""
        counts = {name: len(those) for name, those in self.by_benchmark.items() if those}
        if not counts:
            return ""
        each = ", ".join(f"{n:,} of {name}" for name, n in counts.items())
        if self.side == "evaluation":
            return f"evaluation prompts left out because training has them: {each}"
        return (
            f"{self.battles:,} training battles left out because an evaluation prompt matches "
            f"theirs ({each})"
        )


def listed(
    matches: Sequence[Match], prompts: Sequence[str], training: Sequence[str]
) -> tuple[Dropped, ...]:
    """Return matches as a run lists them."""
    return tuple(
        Dropped(_digest(prompts[m.prompt]), _digest(training[m.training]), m.similarity, m.by)
        for m in matches
    )


def _digest(prompt: str) -> str:
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def nearest(
    prompts: NDArray[np.float32], training: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return for each prompt (n, d) the row of the nearest of training (u, d), and their cosine.

    The mean cosine is the paper's benchmark-dataset similarity S(B, D). Without training prompts
    the row is -1 and the cosine 0.
    """
    row, similarity = np.full(len(prompts), -1), np.zeros(len(prompts))
    if not len(training):
        return row, similarity
    step = max(1, _BLOCK_BYTES // (4 * len(training)))
    for start in range(0, len(prompts), step):
        block = prompts[start : start + step] @ training.T
        best = block.argmax(axis=1)
        row[start : start + step] = best
        similarity[start : start + step] = block[np.arange(len(block)), best]
    return row, similarity


def find_matches(
    prompts: Sequence[str],
    embeddings: NDArray[np.float32],
    training: Sequence[str],
    training_embeddings: NDArray[np.float32],
    *,
    similarity: float,
    ngram: int,
    side: Side = "evaluation",
) -> Found:
    """Return the prompts of a side that match one of the other.

    Parameters
    ----------
    prompts, embeddings : an evaluation set's n prompts, and float32 (n, d) unit vectors
    training, training_embeddings : the u training prompts, and float32 (u, d)
    similarity : cosine from which a pair matches
    ngram : words of a run (see `shared_ngrams`); 0 compares no words
    side : whether each evaluation prompt that matches is wanted, or each training prompt
    """
    if side == "evaluation":
        near, cosine = nearest(embeddings, training_embeddings)
    else:
        near, cosine = nearest(training_embeddings, embeddings)
    alike = {int(row): int(near[row]) for row in np.flatnonzero(cosine >= similarity)}
    worded: dict[int, int] = {}
    pairs = shared_ngrams(prompts, training, ngram) if ngram else iter(())
    for i, j, _ in sorted(pairs, key=lambda pair: -pair[2]):  # the most alike counts
        row, other = (i, j) if side == "evaluation" else (j, i)
        worded.setdefault(row, other)
    matches = []
    for row in sorted(alike | worded):
        by: MatchedBy = "both" if row in worded else "similarity"
        if row not in alike:
            by = "ngram"
        other = alike.get(row, worded.get(row, -1))
        i, j = (row, other) if side == "evaluation" else (other, row)
        matches.append(Match(i, j, float(embeddings[i] @ training_embeddings[j]), by))
    return Found(tuple(matches), cosine)


def shared_ngrams(
    prompts: Sequence[str], training: Sequence[str], n: int
) -> Iterator[tuple[int, int, float]]:
    """Yield (prompt, training prompt, share) of the pairs that have most of their words in common.

    Share is that of the shorter prompt's words which lie in runs of n words found in both; a pair
    matches from `SHARED` up. Runs found in more than `COMMON` prompts of either set are
    boilerplate (instructions, lines of options): they are no evidence, and the words in them do
    not count, so that prompts of one template are held against each other by what fills it.

    An evaluation prompt of fewer than n words has to be found whole in a training prompt, if it
    has at least `MIN_RUN`; a shorter one has to be all of it. Prompts with the same words in the
    same order always match; a prompt without words never does.

    The evaluation prompts' n-grams are held in memory (about 300 bytes each); training prompts
    are read one by one, those that share any n-gram twice.
    """
    asked = [_words(p) for p in prompts]
    whole: dict[str, list[int]] = {}
    rows: dict[str, list[int]] = {}  # the prompts that have a run
    lengths = {n}
    for i, words in enumerate(asked):
        if words:
            whole.setdefault(" ".join(words), []).append(i)
        if MIN_RUN <= len(words) < n:
            lengths.add(len(words))
        for gram in {g for _, g in _runs(words, min(n, max(len(words), MIN_RUN)))}:
            rows.setdefault(gram, []).append(i)

    occurs: Counter[str] = Counter()  # training prompts that have it
    sharing = []
    for j, text in enumerate(training):
        words = _words(text)
        found = {g for k in lengths for _, g in _runs(words, k) if g in rows}
        occurs.update(found)
        if found or " ".join(words) in whole:
            sharing.append(j)
    common = {g for g, have in rows.items() if len(have) > COMMON or occurs[g] > COMMON}

    def own(words: list[str]) -> NDArray[np.bool_]:
        mask = np.ones(len(words), dtype=bool)
        for k in lengths if common else ():
            for start, gram in _runs(words, k):
                if gram in common:
                    mask[start : start + k] = False
        return mask

    own_words = [int(own(words).sum()) for words in asked]
    for j in sharing:
        words = _words(training[j])
        covered: dict[int, NDArray[np.bool_]] = {}
        for k in lengths:
            for start, gram in _runs(words, k):
                for i in rows.get(gram, ()) if gram not in common else ():
                    mask = covered.setdefault(i, np.zeros(len(words), dtype=bool))
                    mask[start : start + k] = True
        same = whole.get(" ".join(words), ())
        yield from ((i, j, 1.0) for i in same)
        mine = own(words)
        for i, mask in covered.items():
            shorter = min(int(mine.sum()), own_words[i])
            share = min(1.0, float((mask & mine).sum()) / shorter) if shorter else 0.0
            if share >= SHARED and i not in same:
                yield i, j, share


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _runs(words: list[str], n: int) -> Iterator[tuple[int, str]]:
    for start in range(len(words) - n + 1):
        yield start, " ".join(words[start : start + n])
