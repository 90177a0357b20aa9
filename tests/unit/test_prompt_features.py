"""What a prompt looks like, as numbers."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routellm.prompt_features import FEATURES, prompt_features, standardised

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=300)  # lone surrogates too
SHARES = ("digits", "maths_signs", "brackets", "capitals", "not_ascii", "distinct_words")
YES_OR_NO = (
    "code_word", "answer_options", "negation", "asks_for_text", "asks_to_calculate", "sets_a_role",
    "ends_in_question",
)  # fmt: skip


def features(prompt):
    return dict(zip(FEATURES, prompt_features([prompt])[0], strict=True))


def test_each_feature_counts_what_it_is_named_after():
    f = features('What is 3 + 4.5? Not "7", É.\n(A) x\nB) y')
    chars, words = 39, 12
    assert f == pytest.approx(
        {
            "log_chars": np.log1p(chars),
            "log_words": np.log1p(words),
            "chars_a_word": chars / words,
            "digits": 4 / chars,
            "log_numbers": np.log1p(3),  # 3, 4.5, 7
            "log_lines": np.log1p(2),
            "log_questions": np.log1p(1),
            "log_sentences": np.log1p(2),
            "maths_signs": 1 / chars,
            "log_relations": np.log1p(1),
            "brackets": 3 / chars,
            "code_word": 0,
            "capitals": 5 / chars,  # W, N, É, A, B
            "not_ascii": 1 / chars,
            "answer_options": 1,
            "negation": 1,
            "asks_for_text": 0,
            "asks_to_calculate": 0,
            "sets_a_role": 0,
            "log_commas": np.log1p(1),
            "ends_in_question": 0,
            "log_quotes": np.log1p(2),
            "distinct_words": 1,
        }
    )


@pytest.mark.parametrize(
    ("name", "yes", "no"),
    [
        ("code_word", "a class in C++ please", "a nice scene"),
        ("code_word", "c++", "c+"),
        ("answer_options", "which one?\n\n  B. this", "Plan A. Then plan B."),
        ("negation", "which is NOT true", "nothing, notably"),
        ("asks_for_text", "Summarise this", "rewritten by hand"),
        ("asks_to_calculate", "how many apples", "how are you"),
        ("sets_a_role", "Act as a pirate", "react assembly"),
        ("ends_in_question", "why? \n", "why? because"),
    ],
)
def test_a_kind_of_ask_is_told_by_whole_words_and_marks(name, yes, no):
    assert features(yes)[name] == 1
    assert features(no)[name] == 0


def test_distinct_words_are_told_apart_without_capitals():
    assert features("the The cat THE")["distinct_words"] == pytest.approx(0.5)


@given(ANY_TEXT)
def test_any_text_has_finite_features_in_their_ranges(prompt):
    row = prompt_features([prompt])
    assert row.shape == (1, len(FEATURES))
    assert row.dtype == np.float64
    assert np.isfinite(row).all()
    assert (row >= 0).all()
    f = features(prompt)
    assert all(f[name] <= 1 for name in SHARES)
    assert all(f[name] in (0, 1) for name in YES_OR_NO)


@given(st.lists(ANY_TEXT, max_size=5))
def test_a_batch_is_its_prompts_one_by_one(prompts):
    together = prompt_features(prompts)
    assert together.shape == (len(prompts), len(FEATURES))
    for row, prompt in zip(together, prompts, strict=True):
        assert row.tobytes() == prompt_features([prompt])[0].tobytes()


def test_only_the_start_of_a_very_long_prompt_is_looked_at():
    start = "word 12.5, " * 2000  # 22,000 characters
    assert prompt_features([start]).tobytes() == prompt_features([start + "?\n" * 10**6]).tobytes()


@pytest.mark.parametrize("unit", ["\n", " ", "\n ", "1", "1.", "A) ", "c+", "\t\r", "É", '"'])
def test_no_repeated_text_takes_long(unit):
    """A pattern that runs on from each of 20,000 blank lines took two seconds."""
    started = time.process_time()
    prompt_features([unit * 20_000])
    assert time.process_time() - started < 0.5


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3),
    st.lists(st.floats(0, 1e3), min_size=3, max_size=3),
)
def test_standardised_features_stay_within_three_deviations(values, deviation):
    out = standardised(np.array([values]), np.zeros(3), np.array(deviation))
    assert (np.abs(out) <= 3).all()


def test_a_feature_is_measured_in_deviations_from_the_mean():
    out = standardised(np.array([[3.0, 100.0]]), np.array([1.0, 0.0]), np.array([4.0, 1.0]))
    assert out.tolist() == [[0.5, 3.0]]


def test_a_feature_that_never_varied_says_nothing_of_a_prompt_in_which_it_does():
    same = prompt_features(["abc defg?"] * 7)  # rounding leaves these a deviation above 0
    deviation = same.std(axis=0)
    assert deviation.max() > 0
    other = prompt_features(["a much longer prompt of 5 or more words"])
    assert not standardised(other, same.mean(axis=0), deviation).any()
