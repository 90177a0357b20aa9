"""Prompts that training has shown: what is found, what is not, and what is left out."""

import dataclasses
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from routellm.errors import TrainingError
from routellm.evaluation.contamination import (
    COMMON,
    Contamination,
    find_matches,
    listed,
    nearest,
    shared_ngrams,
)
from routellm.label_weights import choose_label_weights, weigh
from routellm.settings import Settings
from routellm.training import Prepared, without_prompts

QUESTION = (
    "A football team played twenty-two games. They won eight more than they lost. "
    "How many of the games did they win this season?"
)
OTHER = (
    "Name the river that flows through the capital of Hungary, and say which sea it "
    "reaches in the end after how many kilometres."
)
words = st.lists(st.text(string.ascii_lowercase, min_size=1, max_size=6), min_size=13, max_size=40)


def found(encoder, prompts, training, *, similarity=0.95, ngram=13, side="evaluation"):
    return find_matches(
        prompts, encoder.encode(prompts), training, encoder.encode(training),
        similarity=similarity, ngram=ngram, side=side,
    ).matches  # fmt: skip


def pairs(prompts, training, n=13):
    return {(i, j) for i, j, _ in shared_ngrams(prompts, training, n)}


@pytest.mark.parametrize(
    ("planted", "by"),
    [
        (QUESTION, "both"),
        (QUESTION.upper().replace(".", " ...").replace(",", ";"), "ngram"),
        (QUESTION + " After careful thought, put your final answer in a box, please!", "ngram"),
        ("Solve this riddle for my little sister, who is nine: " + QUESTION, "ngram"),
        ("this season?" + QUESTION.replace(" this season?", ""), "both"),
        (QUESTION.replace("eight", "seven"), "similarity"),
        (" ".join(reversed(QUESTION.split())), "similarity"),
    ],
)
def test_planted_paraphrases_are_found_by_the_one_test_or_the_other(encoder, planted, by):
    (match,) = found(encoder, ["What is a quokka?", planted], [OTHER, QUESTION])
    assert (match.prompt, match.training, match.by) == (1, 1, by)
    cosine = encoder.encode([planted])[0] @ encoder.encode([QUESTION])[0]
    assert match.similarity == pytest.approx(cosine, abs=1e-6)


def test_the_nearest_training_prompt_is_named(encoder):
    training = encoder.encode(["the tiger sat by the river", "music in winter"])
    row, similarity = nearest(encoder.encode(["winter music", "the tiger"]), training)
    assert row.tolist() == [1, 0]
    assert similarity == pytest.approx(
        (encoder.encode(["winter music", "the tiger"]) * training[row]).sum(axis=1)
    )
    row, similarity = nearest(training, training[:0])
    assert (row.tolist(), similarity.tolist()) == ([-1, -1], [0.0, 0.0])


def test_prompts_that_share_a_run_of_words_and_little_else_are_not_the_same():
    options = " A. True, True B. False, False C. True, False D. False, True. Answer with a letter:"
    assert pairs([QUESTION + options], [OTHER + options]) == set()


def test_one_template_filled_with_other_words_is_not_evidence():
    template = (
        "You are a careful and helpful assistant who answers in plain words. Read the question "
        "twice, think step by step, and give the answer alone on the last line. Question: "
    )
    slots = [f"why is {thing} warm" for thing in "abcdefghijklmnopqrstuvwxyz"]
    asked = [template + QUESTION, template + "why is 1 warm"]
    training = [template + slot for slot in slots]
    assert len(training) > COMMON
    assert pairs(asked, training) == set()
    # a template of the benchmark is none the less one for being in a single training prompt
    assert pairs([template + slot for slot in slots], [template + "why is 1 warm"]) == set()
    # what fills the template is still held against what fills it elsewhere
    assert pairs(asked, [*training, template + QUESTION + " Thank you"]) == {(0, len(training))}


@pytest.mark.parametrize(
    ("asked", "training", "same"),
    [
        ("Hello", "hello!", True),
        ("Hello", "hello there", False),
        ("Tell me a joke", "tell me a joke.", True),
        ("Tell me a joke", "tell me a joke about llamas and their many odd little habits", False),
        ("Write a short poem about the last llama", "Please: write a short poem about the last "
         "llama, in rhymes, for the birthday of my friend", True),
        ("?", "!", False),
        ("", "", False),
        ("讲一个关于最后一只骆驼的笑话", "请讲一个关于最后一只骆驼的笑话!", True),
        ("讲一个关于最后一只骆驼的笑话", "请写一首关于夏天和海边的长诗", False),
    ],
)  # fmt: skip
def test_a_short_prompt_is_found_whole_or_not_at_all(asked, training, same):
    assert bool(pairs([asked], [training])) is same


def test_no_words_are_compared_with_an_n_of_zero(encoder):
    longer = QUESTION + " After careful thought, put your final answer in a box, please!"
    assert found(encoder, [longer], [QUESTION])
    assert found(encoder, [longer], [QUESTION], ngram=0) == ()


@given(words, st.integers(1, 13))
def test_a_prompt_is_always_found_in_itself(some, n):
    prompt = " ".join(some)
    assert list(shared_ngrams([prompt], ["unrelated", prompt], n)) == [(0, 1, 1.0)]


@hypothesis_settings(max_examples=30)
@given(words, words, st.randoms(use_true_random=False))
def test_case_and_punctuation_change_nothing(some, others, random):
    def dress(text):
        return "".join(
            (c.upper() if random.random() < 0.5 else c)
            if c != " "
            else random.choice([" ", ", ", " -- ", "\n"])
            for c in text
        )

    training = [" ".join(others), " ".join(others + some), " ".join(some[:20] + others[:3])]
    plain = list(shared_ngrams([" ".join(some)], training, 5))
    assert list(shared_ngrams([dress(" ".join(some))], [dress(t) for t in training], 5)) == plain


@given(words, words)
def test_both_sides_are_taken_from_the_same_pairs(some, others):
    from tests.conftest import HashEncoder

    prompts = [" ".join(some), " ".join(others), "nothing like it"]
    training = [" ".join([*others, "more"]), " ".join(some)]
    of_prompts = found(HashEncoder(), prompts, training)
    of_training = found(HashEncoder(), prompts, training, side="training")
    assert {m.prompt for m in of_prompts} >= {0, 1}
    assert {m.training for m in of_training} == {0, 1}
    assert [m.training for m in of_training] == sorted({m.training for m in of_training})


def test_a_listing_holds_digests_and_no_text(encoder):
    prompts, training = [OTHER, QUESTION], [QUESTION.upper()]
    (one,) = listed(found(encoder, prompts, training), prompts, training)
    assert len(one.prompt_sha256) == len(one.training_sha256) == 16
    assert one.prompt_sha256 != one.training_sha256
    assert "football" not in str(one).lower()
    said = Contamination("evaluation", {"mine": (one,), "other": ()})
    assert said.summary.endswith("1 of mine")
    assert Contamination("training", {"mine": (one,)}, 1200).summary.startswith("1,200 training")
    assert Contamination("training", {"mine": ()}).summary == ""


def test_battles_on_prompts_left_out_are_gone_and_label_kinds_weighed_again(planted):
    half = np.arange(len(planted)) % 2 == 0
    battles = dataclasses.replace(planted, label_kind=np.where(half, "human", "judge"))
    counts = {"human": int(half.sum()), "judge": int((~half).sum())}
    weights = choose_label_weights(battles)
    prepared = Prepared(weigh(battles, weights.weights), None, counts, weights)
    out = np.zeros(len(battles.prompts), dtype=bool)
    out[[3, 50]] = True
    left = without_prompts(prepared, out, Settings())
    gone = np.isin(battles.prompt, [3, 50])
    assert left.left_out == gone.sum()
    assert left.battles.prompts == tuple(
        p for p, o in zip(battles.prompts, out, strict=True) if not o
    )
    kept = [battles.prompts[i] for i in battles.prompt[~gone]]
    assert [left.battles.prompts[i] for i in left.battles.prompt] == kept
    assert left.battles.embeddings == pytest.approx(battles.embeddings[~out])
    assert left.battles.preference_a.tolist() == battles.preference_a[~gone].tolist()
    assert left.by_label_kind == {k: int((battles.label_kind[~gone] == k).sum()) for k in counts}
    assert left.label_weights.trusted == "human"
    again = [left.label_weights.weights[k] for k in left.battles.label_kind]
    assert left.battles.weight.tolist() == again
    assert without_prompts(prepared, np.zeros_like(out), Settings()) is prepared
    with pytest.raises(TrainingError, match="every training prompt matches"):
        without_prompts(prepared, np.ones_like(out), Settings())
