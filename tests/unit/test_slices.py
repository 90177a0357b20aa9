import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from routellm.errors import BenchmarkError
from routellm.evaluation.benchmarks import Benchmark, load_benchmarks
from routellm.evaluation.slices import LONG_WORDS, SHORT_WORDS, SLICES, length, script, slices_of


def table(**labels):
    prompts = ("Write a python function", "What is love?", "Почему небо голубое?")
    scores = {"s": np.array([1.0, 1.0, 0.0]), "w": np.array([0.0, 1.0, 0.0])}
    return Benchmark("b", prompts, scores, **labels)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Why is the sky blue?", "Latin"),
        ("Почему небо blue?", "Cyrillic"),
        ("为什么天空是蓝色的", "Han"),
        ("なぜ空は青いのですか", "Kana"),
        ("하늘은 왜 파란가요", "Hangul"),
        ("لماذا السماء زرقاء", "Arabic"),
        ("Ｗｈｙ 𝐰𝐡𝐲", "Latin"),
        ("2 + 2 = ?", "none"),
        ("", "none"),
    ],
)
def test_the_script_is_that_of_most_letters(prompt, expected):
    assert script(prompt) == expected


def test_length_is_by_words_and_by_characters_where_no_spaces_are_written():
    assert length("word " * (SHORT_WORDS - 1)) == "short"
    assert length("word " * SHORT_WORDS) == length("word " * (LONG_WORDS - 1)) == "medium"
    assert length("word " * LONG_WORDS) == "long"
    assert length("天" * LONG_WORDS) == "long"


def test_every_prompt_has_one_value_of_each_slice():
    found = slices_of(table())
    assert tuple(found) == SLICES
    assert found["language"] == ("Latin", "Latin", "Cyrillic")
    assert found["code"] == ("yes", "no", "no")
    assert found["length"] == ("short",) * 3
    assert found["category"] == ("",) * 3


def test_what_a_table_says_comes_before_what_the_prompt_looks_like():
    found = slices_of(table(language=("en", "en", "ru"), category=("code", "chat", "chat")))
    assert found["language"] == ("en", "en", "ru")
    assert found["category"] == ("code", "chat", "chat")


def test_labels_stay_with_their_prompts_and_out_of_the_digest():
    labelled = table(category=("x", "y", "z"), language=("a", "b", "c"), cluster=("1", "1", "2"))
    assert labelled.digest == table().digest
    left = labelled.without(np.array([False, True, False]))
    assert (left.category, left.language, left.cluster) == (("x", "z"), ("a", "c"), ("1", "2"))
    assert table().without(np.array([True, False, False])).category == ()


def test_a_label_for_some_prompts_only_is_refused():
    with pytest.raises(BenchmarkError, match="3 prompts and 2 values of category"):
        table(category=("x", "y"))


@pytest.mark.parametrize("column", ["category", "domain", "task"])
def test_a_table_s_own_columns_are_carried_and_are_no_scores(tmp_path, column):
    rows = {
        "prompt": ["first turn", "second turn", "another"],
        "question_id": [7, 7, 8],
        "turn": [1, 2, 1],
        "language": ["English", None, "French"],
        column: ["a", "a", "b"],
        "strong": [1.0, 0.5, 1.0],
        "weak": [0.0, 0.5, 1.0],
    }
    pq.write_table(pa.table(rows), tmp_path / "mine.benchmark.parquet")
    (found,) = load_benchmarks(tmp_path)
    assert set(found.scores) == {"strong", "weak"}
    assert found.cluster == ("7", "7", "8")
    assert found.category == ("a", "a", "b")
    assert found.language == ("English", "", "French")


def test_the_published_tables_say_what_their_prompts_are_about(real_data):
    found = {b.name: b for b in load_benchmarks(real_data)}
    assert len(set(found["mmlu"].category)) == 57
    assert len(set(found["mt_bench"].category)) == 8
    assert not found["mt_bench"].cluster  # one row a question
    assert found["gsm8k"].category == ()
