import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from registry.paired import joined
from registry.predictions import (
    about,
    evaluation_set,
    predictions_table,
    read_evaluation_set,
    read_predictions,
    write_table,
)
from routellm.errors import BenchmarkError
from routellm.evaluation.benchmarks import Benchmark
from routellm.evaluation.slices import SLICES
from routellm.routers.base import Pair

PAIR = Pair("strong", "weak")
RATES = np.linspace(0.0, 1.0, 40)


def table(**changes):
    n = 40
    scores = {"strong": np.ones(n), "weak": np.arange(n) % 2.0, "third": np.zeros(n)}
    prompts = tuple(f"a secret question {i}" for i in range(n))
    return Benchmark("b", prompts, scores, **{"excluded": 3, **changes})


def test_predictions_hold_no_text_of_a_prompt(tmp_path):
    write_table(predictions_table(table(), PAIR, RATES), tmp_path / "predictions" / "b.parquet")
    found = read_predictions(tmp_path / "predictions" / "b.parquet")
    assert found.column_names == [
        "question", "cluster", "win_rate", "strong", "weak", *SLICES,
    ]  # fmt: skip
    assert "secret" not in str(found.to_pydict()) + str(found.schema.metadata)
    assert found["win_rate"].to_pylist() == RATES.tolist()
    assert found["cluster"] == found["question"]
    assert about(found) == {
        "benchmark": "b", "benchmark_digest": table().digest, "strong": "strong", "weak": "weak",
        "excluded": 3, "simulated": False,
    }  # fmt: skip


def test_an_evaluation_set_comes_back_as_the_benchmark_it_was(tmp_path):
    for labels in ({}, {"category": ("x",) * 40, "cluster": ("1", "2") * 20, "simulated": True}):
        whole = table(**labels)
        write_table(evaluation_set(whole), tmp_path / "b.parquet")
        found = read_evaluation_set(tmp_path / "b.parquet")
        assert found.digest == whole.digest
        assert (found.category, found.cluster, found.language) == (
            whole.category, whole.cluster, (),
        )  # fmt: skip
        assert (found.excluded, found.simulated) == (3, whole.simulated)


@pytest.mark.parametrize("reader", [read_predictions, read_evaluation_set])
def test_files_that_are_missing_damaged_or_of_another_kind_are_told_apart(tmp_path, reader):
    path = tmp_path / "b.parquet"
    with pytest.raises(BenchmarkError, match="missing or damaged"):
        reader(path)
    path.write_bytes(b"PAR1 not a table")
    with pytest.raises(BenchmarkError, match="missing or damaged"):
        reader(path)
    pq.write_table(pa.table({"cluster": ["x"]}), path)
    with pytest.raises(BenchmarkError, match="lacks"):
        reader(path)


def test_numbers_that_are_not_numbers_are_refused(tmp_path):
    good = predictions_table(table(), PAIR, RATES)
    for name, values in (("win_rate", ["0.5"] * 40), ("strong", [float("nan")] * 40)):
        at = good.column_names.index(name)
        write_table(good.set_column(at, name, pa.array(values)), tmp_path / "b.parquet")
        with pytest.raises(BenchmarkError, match=r"win_rate|finite"):
            read_predictions(tmp_path / "b.parquet")


def test_an_evaluation_set_that_was_changed_is_refused(tmp_path):
    good = evaluation_set(table())
    at = good.column_names.index("score:weak")
    changed = good.set_column(at, "score:weak", pa.array(np.zeros(40)))
    write_table(changed, tmp_path / "b.parquet")
    with pytest.raises(BenchmarkError, match="not what was written"):
        read_evaluation_set(tmp_path / "b.parquet")


def test_win_rates_must_be_one_finite_number_a_prompt():
    for rates in (RATES[1:], np.where(RATES > 0.5, np.nan, RATES)):
        with pytest.raises(BenchmarkError, match="one finite number a prompt"):
            predictions_table(table(), PAIR, rates)


def test_joining_follows_the_questions_not_the_rows():
    whole = table()
    turned = np.arange(40)[::-1]
    reordered = Benchmark(
        "b",
        tuple(whole.prompts[i] for i in turned),
        {m: s[turned] for m, s in whole.scores.items()},
    )
    found = joined(
        predictions_table(whole, PAIR, RATES), predictions_table(reordered, PAIR, RATES[turned])
    )
    assert (found.champion == found.candidate).all()
    assert (found.cluster == np.arange(40)).all()


def test_a_prompt_that_stands_twice_is_joined_copy_by_copy_and_clustered():
    whole = table()
    twice = Benchmark(
        "b", whole.prompts + whole.prompts[:2],
        {m: np.r_[s, 1.0 - s[:2]] if m == "weak" else np.r_[s, s[:2]]
         for m, s in whole.scores.items()},
    )  # fmt: skip
    rates = np.r_[RATES, RATES[:2]]
    found = joined(predictions_table(twice, PAIR, rates), predictions_table(twice, PAIR, rates))
    assert len(found) == 42
    assert found.cluster[40:].tolist() == [0, 1]


def test_less_than_nine_tenths_in_common_or_other_scores_are_another_benchmark():
    whole = table()
    first = predictions_table(whole, PAIR, RATES)
    for out, joins in ((4, True), (5, False)):
        left = whole.without(np.arange(40) < out)
        few = predictions_table(left, PAIR, RATES[out:])
        assert (joined(few, first) is not None) is joins
        assert joined(first, few) is not None  # all that the candidate has
    scores = whole.scores | {"weak": np.r_[1.0, whole.scores["weak"][1:]]}
    other = predictions_table(Benchmark("b", whole.prompts, scores), PAIR, RATES)
    assert joined(other, first) is None


def test_parts_of_a_slice_cover_its_prompts_and_the_whole_is_none():
    labels = ("x", "y") * 15 + ("",) * 10
    first = predictions_table(table(category=labels), PAIR, RATES)
    parts = dict(joined(first, first).parts())
    assert set(parts) == {"category=x", "category=y"}
    assert [len(p) for p in parts.values()] == [15, 15]
    assert (parts["category=y"].cluster == np.arange(15)).all()
