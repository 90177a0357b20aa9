"""Policies on recorded tables: what each point costs, the hull, and what no policy may see."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routellm.errors import BenchmarkError, TrainingError, UsageError
from routellm.policies import aiq, answered, budget, hull, load_recorded, measure
from routellm.policies.measure import _chosen
from routellm.policies.pair import PairRouter, battles_of
from routellm.policies.policy import asked_once
from routellm.policies.pool import KindPool, KNNPool, MLPPool
from routellm.policies.recorded import Split
from routellm.policies.recorded import split as split_of
from routellm.policies.single import Oracle, ZeroRouter, best_at
from routellm.policies.tokens import counter
from routellm.routers.base import Pair
from routellm.settings import Price, Settings

PRICED = {"small": Price(input=0.0, output=1.0), "big": Price(input=0.0, output=9.0)}


def words(texts):
    return np.array([len(text.split()) for text in texts], dtype=np.int64)


def settings_with(tmp_path, **changes):
    return Settings(home=tmp_path / "home", prices=PRICED | changes)


def write(folder, n=400, name="gsm8k", **columns):
    """Write a table in which big is right on prompts with `hard`, where small is not."""
    prompts = [f"{'hard' if i % 2 else 'easy'} question {i}" for i in range(n)]
    hard = np.array(["hard" in p for p in prompts])
    pq.write_table(
        pa.table({"prompt": prompts, "small": ~hard, "big": np.ones(n, bool), **columns}),
        folder / f"{name}.parquet",
    )


@pytest.fixture
def split(tmp_path):
    said = ["one two three"] * 400
    write(tmp_path, **{"small:response": said, "big:response": said})
    (found,) = load_recorded(tmp_path, settings_with(tmp_path), words)
    return found


def test_answers_are_counted_and_priced_and_timed(split, tmp_path):
    table = split.measure
    assert table.models == ("small", "big")
    assert table.usd.tolist()[0] == [3e-6, 27e-6]  # three tokens written, at 1 and 9 a million
    slow = settings_with(tmp_path).policies.latency_of("big")
    assert table.latency_s[0, 1] == pytest.approx(slow.first_token_s + 3 * slow.token_s)
    assert not table.tokens_assumed
    assert budget(table) == pytest.approx(15e-6)


def test_no_prompt_is_trained_and_measured_on_and_the_halves_are_alike(split):
    parts = (split.train, split.held, split.measure)
    assert len({one for part in parts for one in part.ids}) == sum(map(len, parts)) == 400
    assert 150 < len(split.measure) < 250
    assert len(split.held) < len(split.train) / 2
    assert split_of(split.held).held.ids == split.held.ids  # a prompt is always on the same side


def test_no_more_rows_are_measured_on_than_the_setting_says_and_always_the_same(tmp_path, split):
    write(tmp_path, n=400)

    def at_most(rows):
        home = {"home": tmp_path / "home", "prices": PRICED}
        (found,) = load_recorded(tmp_path, Settings(**home, policies={"rows": rows}), words)
        return found

    few, more = at_most(60), at_most(61)
    assert len(few.measure) == 60
    assert set(few.measure.ids) < set(more.measure.ids) < set(split.measure.ids)
    assert (few.train.ids, few.held.ids) == (split.train.ids, split.held.ids)


def test_without_answers_their_tokens_are_the_settings_and_it_is_said(tmp_path):
    write(tmp_path)
    settings = settings_with(tmp_path)
    (found,) = load_recorded(tmp_path, settings, words)
    assert found.train.tokens_assumed
    assert found.train.written_tokens.max() == settings.evaluation.output_tokens


def test_mmlu_is_split_as_published_and_contaminated_rows_are_left_out(tmp_path):
    split = ["gold" if i < 100 else "eval" for i in range(400)]
    contaminated = [i % 10 == 0 for i in range(400)]
    write(tmp_path, name="mmlu", split=split, contaminated=contaminated)
    (found,) = load_recorded(tmp_path, settings_with(tmp_path), words)
    assert (len(found.train) + len(found.held), len(found.measure)) == (90, 270)


def test_alpaca_takes_the_judge_that_judged_most_and_the_reference_ties_itself(tmp_path):
    prompts = [f"question {i}" for i in range(60)]
    answers = [(p, m, f"{m} says") for p in prompts for m in ("ref", "small", "big")]
    keys = ("prompt", "model", "response")
    outputs = dict(zip(keys, zip(*answers, strict=True), strict=True))
    pq.write_table(pa.table(outputs), tmp_path / "alpaca_eval_outputs.parquet")
    said = [(p, "ref", m, 1.25, "wide") for p in prompts for m in ("small", "big")]
    said += [(p, "ref", "big", 2.0, "narrow") for p in prompts]
    keys = ("prompt", "model_a", "model_b", "preference", "judge")
    judged = dict(zip(keys, zip(*said, strict=True), strict=True))
    pq.write_table(pa.table(judged), tmp_path / "alpaca_eval_judgements.parquet")
    settings = settings_with(tmp_path, ref=Price(input=1.0, output=1.0))
    (found,) = load_recorded(tmp_path, settings, words)
    assert found.train.models == ("big", "ref", "small")
    assert found.train.quality[0].tolist() == [0.25, 0.5, 0.25]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (
            {"other": np.ones(400)},
            r"1 models without a price \(other\): .* in \[prices.\"other\"\]",
        ),
        ({"big": np.full(400, np.nan)}, "lacks scores of big"),
        ({"big": ["x"] * 400}, "has scores of 1 model: there is nothing to choose between"),
        ({"prompt": None}, r"has no column `prompt`"),
    ],
)
def test_a_table_that_cannot_be_measured_on_is_refused(tmp_path, columns, says):
    write(tmp_path)
    table = pq.read_table(tmp_path / "gsm8k.parquet")
    for name, values in columns.items():
        if name in table.column_names:
            table = table.drop_columns(name)
        if values is not None:
            table = table.append_column(name, pa.array(values))
    pq.write_table(table, tmp_path / "gsm8k.parquet")
    with pytest.raises(BenchmarkError, match=says):
        load_recorded(tmp_path, settings_with(tmp_path), words)


def test_a_folder_without_tables_is_refused(tmp_path):
    with pytest.raises(BenchmarkError, match=r"no recorded tables in .*expected .*gsm8k\.parquet"):
        load_recorded(tmp_path, Settings(), words)
    with pytest.raises(BenchmarkError, match="no folder"):
        load_recorded(tmp_path / "nowhere", Settings(), words)


# --- hull and AIQ


def test_the_hull_leaves_out_what_is_dearer_and_no_better_and_what_a_mix_beats():
    usd = np.array([1.0, 2.0, 3.0, 4.0, 2.5])
    quality = np.array([0.2, 0.3, 0.8, 0.7, 0.1])
    x, y = hull(usd, quality)
    assert (x.tolist(), y.tolist()) == ([1.0, 3.0], [0.2, 0.8])
    # half-way up from 0.2 to 0.8 over two of three dollars, then 0.8
    assert aiq(usd, quality, 1.0, 4.0) == pytest.approx((0.5 * 2 + 0.8) / 3)


points = st.lists(
    st.tuples(st.floats(0.01, 10), st.floats(0, 1)), min_size=1, max_size=30
)  # fmt: skip


@given(points)
def test_a_hull_rises_ever_more_slowly_and_lies_on_or_above_every_point(found):
    usd, quality = np.array(found).T
    x, y = hull(usd, quality)
    assert (np.diff(x) > 0).all()
    assert (np.diff(y) > 0).all()
    slopes = np.diff(y) / np.diff(x)
    assert (np.diff(slopes) <= 1e-9 * np.abs(slopes).max(initial=1.0)).all()
    assert (np.interp(usd, x, y) >= quality - 1e-9).all()


def test_blind_mixing_of_two_models_has_the_aiq_of_the_straight_line(split):
    table = split.measure
    x, y = table.usd.mean(axis=0), table.quality.mean(axis=0)
    found = measure([ZeroRouter()], split, resamples=20, rng=np.random.default_rng(0))[0]
    assert found.aiq.value == pytest.approx(y.mean())
    assert aiq(x, y, *x) == pytest.approx(y.mean())
    assert found.apgr is None


# --- policies


def test_an_oracle_sends_to_big_only_what_small_fails(split):
    points = Oracle().answer(split.measure)
    best = points[-1]
    assert best.quality.mean() == 1.0
    hard = split.measure.quality[:, 0] == 0
    assert (best.usd[hard] > best.usd[~hard].max()).all()
    assert points[0].usd.mean() == split.measure.usd[:, 0].mean()


def test_routers_over_a_pool_learn_whom_to_ask(split, encoder):
    pair = Pair("big", "small")
    ours = KindPool("ours", encoder, kind="knn", between=pair)
    for policy in (KNNPool("knn", encoder), MLPPool("mlp", encoder), ours):
        policy.fit(split.train, split.held)
        (found,) = measure([policy], split, resamples=50, rng=np.random.default_rng(0))
        blind = measure([ZeroRouter()], split, resamples=50, rng=np.random.default_rng(0))[0]
        assert found.aiq.low > blind.aiq.high, policy.name
        assert found.calls.value == 1.0


def test_a_router_kind_is_turned_to_every_model_of_a_pool(tmp_path, encoder):
    easy, mid = np.arange(400) % 2 == 0, np.arange(400) % 4 < 3
    write(tmp_path, n=400, mid=easy | mid)
    prices = {"mid": Price(input=0.0, output=2.0)}
    (split,) = load_recorded(tmp_path, settings_with(tmp_path, **prices), words)
    policy = KindPool("ours", encoder, kind="knn", between=Pair("big", "small"))
    policy.fit(split.train, split.held)
    assert policy.models[0] == "small"  # the cheapest is what the others are held against
    assert set(policy.models) == {"small", "mid", "big"}
    points = policy.answer(split.measure)
    assert points[0].usd.mean() == split.measure.usd[:, split.measure.cheapest()].mean()
    best = points[-1]
    assert best.quality.mean() > 0.95
    assert policy.trained_on == frozenset(split.train.ids + split.held.ids)


def test_a_router_kind_on_a_pair_has_an_apgr(split, encoder):
    policy = PairRouter("knn", "knn", encoder, Pair("gpt-4", "none of these"))
    policy.fit(split.train, split.held)
    assert policy.router.pair == Pair("big", "small")
    (found,) = measure([policy], split, resamples=50, rng=np.random.default_rng(0))
    assert found.apgr.low > 0.6
    assert found.usd_per_1000.value <= budget(split.measure) * 1000 * 1.1
    # the ends are weak alone and strong alone
    assert found.points[0, 1] == split.measure.quality[:, 0].mean()
    assert found.points[-1, 1] == split.measure.quality[:, 1].mean()


def test_battles_of_scores_are_golden_and_equal_scores_tie(split, encoder):
    battles = battles_of(split.train, Pair("big", "small"), encoder, 0)
    assert len(battles) == len(split.train)
    small_right = split.train.quality[battles.prompt, 0] == 1
    assert set(battles.preference_a[small_right]) == {0.5}
    assert set(battles.preference_a[~small_right]) == {0.0}  # model_a is small
    assert set(battles.label_kind) == {"golden"}


def test_rows_that_a_policy_has_learnt_from_are_refused_by_id(split, encoder):
    policy = KNNPool("knn", encoder)
    policy.fit(split.train, split.held)
    first = split.train.ids[0][:12]
    with pytest.raises(UsageError, match=rf"learnt from \d+ of .* \(row 0, {first}\)"):
        answered(policy, split.train)
    with pytest.raises(UsageError, match="knn has learnt from"):
        measure(
            [policy],
            Split(split.train, split.held, split.train),
            resamples=10,
            rng=np.random.default_rng(0),
        )


def test_too_few_rows_and_a_pair_of_one_are_refused(split, encoder):
    few = split.train.where(np.arange(len(split.train)) < 3)
    with pytest.raises(TrainingError, match="cannot learn from 3 rows"):
        KNNPool("knn", encoder).fit(few, split.held)
    same = PairRouter("knn", "knn", encoder, Pair("big", "big"))
    with pytest.raises(TrainingError, match="nothing to route between"):
        same.fit(split.train, split.held)


def test_the_setting_is_chosen_in_training_within_the_budget(split):
    policy = Oracle()
    points = policy.answer(split.held)
    at = _chosen(points, budget(split.held))
    assert points[at].usd.mean() <= budget(split.held) * 1.001
    only_big = [asked_once(split.held, np.ones(len(split.held), dtype=np.int64), "big")]
    assert _chosen(only_big, budget(split.held)) == 0  # none is as cheap: the cheapest stands


def test_money_is_weighed_by_row():
    quality, usd = np.array([[0.5, 0.9]]), np.array([[0.0, 1.0]])
    assert best_at(quality, usd, 0.1).tolist() == [1]
    assert best_at(quality, usd, 1.0).tolist() == [0]


def test_the_installed_tokenizer_counts_and_an_unknown_one_is_refused(tmp_path):
    count = counter(Settings().policies.tokenizer)
    assert count(["hello world", "", "a" * 5000 + "\udc80"])[:2].tolist() == [2, 0]
    assert count(["word " * 1000])[0] == 1000  # nothing is cut off
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"`policies.tokenizer`"):
        counter(str(tmp_path / "empty"))
