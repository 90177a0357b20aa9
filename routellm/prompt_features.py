"""What a prompt looks like, beside what it is about: length, numbers, code, marks, its kind of ask.

A sentence embedding averages wording away, and with it much of what makes a query hard: how many
numbers it juggles, whether it negates, whether answers are given to choose from. These counts keep
it. The word lists are English; in other languages the rest still says something.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

_MOST_CHARS = 20_000  # of a prompt are looked at
_CLIP = 3.0  # standard deviations: one odd prompt must not be unlike everything
_NO_SPREAD = 1e-9  # of a feature: what summing leaves of one that is the same everywhere

_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
# space other than line ends: `\s*` would run to the end of a blank prompt from each of its lines
_OPTION = re.compile(r"^[^\S\n]*[A-D][.)]\s", re.MULTILINE)
_NEGATION = re.compile(r"\b(?:not|except|least|incorrect|false)\b")
_CODE = re.compile(
    r"\b(?:def|import|class|return|function|code|python|java|html|sql|algorithm)\b|\bc\+\+"
)
_WRITE = re.compile(
    r"\b(?:write|draft|compose|create|describe|explain|list|summari[sz]e|generate|give me"
    r"|tell me)\b"
)
_CALCULATE = re.compile(
    r"\b(?:how many|how much|calculate|compute|solve|find the|prove|equation|probability|total"
    r"|percent)\b"
)
_ROLE = re.compile(r"\b(?:act as|you are|pretend|role|imagine|assume)\b")
_MATHS = frozenset("=+*/^<>\\$%|")
_RELATION = frozenset("=+*/^<>\\$|")
_BRACKETS = frozenset("{}[]();_")

FEATURES = (
    "log_chars", "log_words", "chars_a_word", "digits", "log_numbers", "log_lines",
    "log_questions", "log_sentences", "maths_signs", "log_relations", "brackets", "code_word",
    "capitals", "not_ascii", "answer_options", "negation", "asks_for_text", "asks_to_calculate",
    "sets_a_role", "log_commas", "ends_in_question", "log_quotes", "distinct_words",
)  # fmt: skip


def prompt_features(prompts: Sequence[str]) -> NDArray[np.float64]:
    """Return the features (n, 23) of prompts, in the order of `FEATURES`.

    Counts are ``log(1 + count)``, the other figures shares of the characters or words, or 0/1.
    """
    rows = [_features(prompt[:_MOST_CHARS]) for prompt in prompts]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(FEATURES))


def _features(prompt: str) -> list[float]:
    words, lower = prompt.split(), prompt.lower()
    chars, n_words = max(len(prompt), 1), max(len(words), 1)
    each = Counter(prompt)  # one pass; what follows looks at distinct characters only

    def number(of: Callable[[str], bool]) -> int:
        return sum(n for c, n in each.items() if of(c))

    def count(n: int) -> float:
        return math.log1p(n)

    return [
        count(len(prompt)),
        count(len(words)),
        chars / n_words,
        number(str.isdigit) / chars,
        count(len(_NUMBER.findall(prompt))),
        count(each["\n"]),
        count(each["?"]),
        count(len(_SENTENCE_END.findall(prompt))),
        number(_MATHS.__contains__) / chars,
        count(number(_RELATION.__contains__)),
        number(_BRACKETS.__contains__) / chars,
        float(bool(_CODE.search(lower))),
        number(str.isupper) / chars,
        number(lambda c: ord(c) > 127) / chars,
        float(bool(_OPTION.search(prompt))),
        float(bool(_NEGATION.search(lower))),
        float(bool(_WRITE.search(lower))),
        float(bool(_CALCULATE.search(lower))),
        float(bool(_ROLE.search(lower))),
        count(each[","]),
        float(prompt.strip().endswith("?")),
        count(each['"'] + each["'"]),
        len({w.lower() for w in words}) / n_words,
    ]


def standardised(
    features: NDArray[np.float64], mean: NDArray[np.float64], deviation: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return features (n, f) in standard deviations from the mean, cut at three either way.

    A feature that did not vary in training (`deviation` 0, but for rounding) says nothing: it is 0.
    """
    varied = deviation > _NO_SPREAD
    scaled = np.where(varied, (features - mean) / np.where(varied, deviation, 1.0), 0.0)
    return np.clip(scaled, -_CLIP, _CLIP)
