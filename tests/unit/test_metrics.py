import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routellm.errors import BenchmarkError
from routellm.evaluation.benchmarks import Benchmark, heldout_benchmark, load_benchmarks
from routellm.evaluation.evaluate import Evaluation, evaluate
from routellm.evaluation.metrics import auc, exact_curve, paper_curve
from routellm.routers.base import Pair


@st.composite
def tables(draw):
    n = draw(st.integers(3, 40))
    strong = np.array(draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=n, max_size=n)))
    weak = np.array(draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=n, max_size=n)))
    strong[0], weak[0] = 1.0, 0.0
    if strong.sum() <= weak.sum():
        strong, weak = np.maximum(strong, weak), np.minimum(strong, weak)
    rates = np.array(draw(st.lists(st.floats(0, 1), min_size=n, max_size=n)))
    return rates, strong, weak, np.ones(n)


@given(tables())
@settings(max_examples=150, deadline=None)
def test_no_router_beats_the_perfect_one(table):
    rates, strong, weak, w = table
    best = exact_curve(strong - weak, strong, weak, w).apgr()
    assert exact_curve(rates, strong, weak, w).apgr() <= best + 1e-9


@given(tables())
@settings(max_examples=100, deadline=None)
def test_a_constant_router_is_random(table):
    rates, strong, weak, w = table
    curve = exact_curve(np.full_like(rates, 0.3), strong, weak, w)
    assert curve.apgr() == pytest.approx(0.5)
    assert curve.cpt(0.5) == pytest.approx(0.5)


@given(tables())
@settings(max_examples=100, deadline=None)
def test_a_reversed_router_mirrors_the_area(table):
    rates, strong, weak, w = table
    forth = exact_curve(rates, strong, weak, w).apgr()
    assert exact_curve(-rates, strong, weak, w).apgr() == pytest.approx(1.0 - forth)


@given(tables())
@settings(max_examples=100, deadline=None)
def test_only_the_order_of_win_rates_counts(table):
    rates, strong, weak, w = table
    _, ranks = np.unique(rates, return_inverse=True)
    one, two = (exact_curve(r, strong, weak, w).apgr() for r in (rates, ranks.astype(float)))
    assert one == pytest.approx(two)


@given(tables())
@settings(max_examples=60, deadline=None)
def test_a_weight_of_two_is_the_prompt_twice(table):
    rates, strong, weak, w = table
    doubled = w.copy()
    doubled[0] = 2.0
    again = [np.r_[x, x[0]] for x in (rates, strong, weak, w)]
    for curve in (exact_curve, paper_curve):
        assert curve(rates, strong, weak, doubled).apgr() == pytest.approx(curve(*again).apgr())


def test_the_paper_reading_of_a_small_table_by_hand():
    # ten prompts in order of win rate; strong alone is right on the first five
    rates = np.linspace(0.95, 0.05, 10)
    strong, weak = np.ones(10), np.r_[np.zeros(5), np.ones(5)]
    curve = paper_curve(rates, strong, weak, np.ones(10))
    assert curve.fraction[0] == 0.0
    assert curve.fraction[-1] == 1.0
    assert curve.cpt(0.5) == pytest.approx(0.25, abs=0.01)
    assert curve.apgr() == pytest.approx(0.75, abs=0.01)


def test_cpt_is_the_first_crossing():
    rates = np.array([0.9, 0.8, 0.7, 0.6])
    strong, weak = np.array([1.0, 0, 1, 1]), np.array([0.0, 1, 0, 0])
    curve = exact_curve(rates, strong, weak, np.ones(4))
    assert curve.cpt(0.5) == pytest.approx(0.25)


def test_auc_counts_ties_half():
    strong, weak = np.array([1.0, 1, 0, 0]), np.array([0.0, 0, 1, 1])
    assert auc(np.array([0.9, 0.5, 0.5, 0.1]), strong, weak, np.ones(4)) == pytest.approx(0.875)


def bench(n=200, seed=0):
    rng = np.random.default_rng(seed)
    strong, weak = (rng.random(n) < 0.8).astype(float), (rng.random(n) < 0.6).astype(float)
    return Benchmark("b", tuple(f"p{i}" for i in range(n)), {"s": strong, "w": weak})


def test_an_evaluation_has_intervals_around_its_figures_and_survives_json():
    import json

    one = evaluate(
        np.random.default_rng(1).random(200), bench(), Pair("s", "w"),
        rng=np.random.default_rng(0), resamples=200, similarity=0.4,
    )  # fmt: skip
    for reading in (one.exact, one.paper):
        assert reading.apgr.low <= reading.apgr.value <= reading.apgr.high
    assert one.pgr_by_percent[0] == 0.0
    assert one.pgr_by_percent[100] == pytest.approx(1.0)
    assert Evaluation.from_dict(json.loads(json.dumps(one.to_dict()))) == one


@pytest.mark.slow
def test_a_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    hits = 0
    for seed in range(60):
        one = evaluate(
            np.random.default_rng(1000 + seed).random(200), bench(seed=seed), Pair("s", "w"),
            rng=np.random.default_rng(seed), resamples=200,
        )  # fmt: skip
        hits += one.exact.apgr.low <= 0.5 <= one.exact.apgr.high  # it looks at nothing
    assert hits >= 51


def test_a_pair_that_was_not_measured_is_named():
    with pytest.raises(BenchmarkError, match=r"no scores of 'x'.*it has s, w"):
        bench().of_pair(Pair("x", "w"))


def test_no_gap_is_no_benchmark():
    with pytest.raises(BenchmarkError, match="no better"):
        bench().of_pair(Pair("w", "s"))


def test_heldout_battles_become_shares_of_votes():
    one = heldout_benchmark(["a", "b", "a"], np.array([1.0, 0.5, 0.0]), Pair("s", "w"))
    assert one.prompts == ("a", "b")
    assert one.scores["s"].tolist() == [0.5, 0.5]


def test_published_tables_load_with_their_exclusions(real_data):
    found = {b.name: b for b in load_benchmarks(real_data)}
    assert {n: len(b) for n, b in found.items()} == {"gsm8k": 914, "mmlu": 8318, "mt_bench": 72}
    assert found["mt_bench"].excluded == 8
    scores = found["mt_bench"].scores
    assert scores["gpt-4-1106-preview"].mean() == pytest.approx(9.3, abs=0.15)


def test_a_damaged_benchmark_is_one_sentence(tmp_path):
    (tmp_path / "mmlu.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(BenchmarkError, match=r"mmlu\.parquet"):
        load_benchmarks(tmp_path)


def test_money_is_saved_where_fewer_queries_go_to_strong():
    strong = np.array([1.0, 1.0, 1.0, 1.0])
    weak = np.array([0.0, 0.0, 1.0, 1.0])
    table = Benchmark("b", tuple("abcd"), {"s": strong, "w": weak})

    def measured(rates, **prices):
        return evaluate(
            np.array(rates), table, Pair("s", "w"), rng=np.random.default_rng(0), resamples=100,
            **prices,
        )  # fmt: skip

    assert measured([0.9, 0.8, 0.2, 0.1]).cost is None
    good = measured([0.9, 0.8, 0.2, 0.1], usd_per_query=(0.01, 0.001)).cost
    bad = measured([0.1, 0.2, 0.8, 0.9], usd_per_query=(0.01, 0.001)).cost
    assert (good.strong, good.weak) == pytest.approx((10.0, 1.0))
    # half of the gap is one of the four queries: $10 for 250, $1 for 750
    assert good.at_cpt50 == pytest.approx(0.25 * 10.0 + 0.75 * 1.0)
    assert good.saved(good.at_cpt50) == pytest.approx(0.675)
    assert bad.at_cpt50 > good.at_cpt50
    assert bad.at_cpt80 > bad.at_cpt50


def test_a_price_is_of_a_models_tokens():
    from routellm.settings import Settings

    settings = Settings(
        prices={"m": {"input": 2.0, "output": 10.0}},
        evaluation={"input_tokens": 100, "output_tokens": 50},
    )
    assert settings.usd_per_query("m") == pytest.approx(0.0007)
    assert settings.usd_per_query("other") is None
