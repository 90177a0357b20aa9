"""Slices of a benchmark: its prompts by language, code, length and category.

A router that is better on the whole can be worse on a part of the traffic that somebody lives on.
Each prompt has one value of each slice; a part is the prompts that share it, ``code=yes`` say.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cache

from routellm.evaluation.benchmarks import Benchmark
from routellm.prompt_features import FEATURES, prompt_features

SLICES = ("language", "code", "length", "category")
SHORT_WORDS = 25  # a prompt of fewer words is short
LONG_WORDS = 100  # one of this many or more is long

# Chinese and Japanese write no spaces: there each character counts as a word
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
_SCRIPTS = {"Cjk": "Han", "Hiragana": "Kana", "Katakana": "Kana"}


def slices_of(benchmark: Benchmark) -> dict[str, tuple[str, ...]]:
    """Return for each of `SLICES` the value (n,) of every prompt; "" where nothing is known.

    Language is what the table says, else the script that most letters are of (`script`); code is
    ``yes`` where `routellm.prompt_features` finds a word of programming; length is by words;
    category is what the table says.
    """
    prompts = benchmark.prompts
    code = prompt_features(prompts)[:, FEATURES.index("code_word")]
    return {
        "language": benchmark.language or tuple(script(p) for p in prompts),
        "code": tuple("yes" if c else "no" for c in code),
        "length": tuple(length(p) for p in prompts),
        "category": benchmark.category or ("",) * len(prompts),
    }


def length(prompt: str) -> str:
    """Return ``short``, ``medium`` or ``long``, by the prompt's words."""
    words = len(_WORD.findall(prompt))
    return "short" if words < SHORT_WORDS else "medium" if words < LONG_WORDS else "long"


def script(prompt: str) -> str:
    """Return the Unicode script that most of a prompt's letters are of, such as ``Latin``.

    ``none`` where there are no letters. Scripts are read off the characters' Unicode names.
    """
    counts: Counter[str] = Counter()
    for character, n in Counter(prompt).items():
        if character.isalpha():
            counts[_script_of(character)] += n
    return max(counts, key=lambda s: (counts[s], s)) if counts else "none"


@cache
def _script_of(character: str) -> str:
    plain = unicodedata.normalize("NFKC", character)[:1]  # a full-width or bold letter is a letter
    first = unicodedata.name(plain, "none").split()[0].split("-")[0].title()
    return _SCRIPTS.get(first, first)
