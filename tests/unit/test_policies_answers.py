"""Policies that read answers or fine-tune an encoder: what they learn, cost and refuse."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from routellm.errors import TrainingError, UsageError
from routellm.policies import fitted, hull, load_recorded, measure
from routellm.policies.answer_score import AnswerScore
from routellm.policies.bart_score import BartScore
from routellm.policies.cascade import Cascade, FrugalGPT, JudgedCascade, Looked, search
from routellm.policies.encoder_score import EncoderScore
from routellm.policies.hybrid import (
    LABELS,
    GapEncoder,
    HybridLLM,
    cost_advantage,
    neighbours,
    slack,
)
from routellm.policies.several import BestOfN, LLMBlender, PairRanker, together
from routellm.routers.base import Pair
from routellm.routers.encoder_head import shares
from routellm.settings import Price, ScorerSettings, Settings
from tests.support.tiny_bert import WORDS, save_tiny_bert

PRICED = {"small": Price(input=0, output=1), "mid": Price(input=0, output=3),
          "big": Price(input=0, output=9)}  # fmt: skip


def words(texts):
    return np.array([len(text.split()) for text in texts], dtype=np.int64)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return str(save_tiny_bert(tmp_path_factory.mktemp("bert")))


@pytest.fixture
def scorer(bert):
    return ScorerSettings(
        model=bert, max_length=32, learning_rate=5e-3, epochs=4, examples=2_000, seconds=0.5,
        usd_per_million=0.0,
    )  # fmt: skip


@pytest.fixture
def split(tmp_path):
    """Small fails on hard prompts, and a wrong answer says `river` where a right one `tiger`."""
    rng = np.random.default_rng(0)
    prompts = [f"{rng.choice(WORDS)} {'hard' if i % 2 else 'easy'} {i}" for i in range(600)]
    right = {
        "small": np.arange(600) % 2 == 0,
        "mid": (np.arange(600) % 2 == 0) | (np.arange(600) % 4 == 1),
        "big": np.ones(600, bool),
    }
    said = {f"{m}:response": ["tiger" if r else "river" for r in right[m]] for m in right}
    pq.write_table(pa.table({"prompt": prompts, **right, **said}), tmp_path / "gsm8k.parquet")
    settings = Settings(home=tmp_path / "home", prices=PRICED)
    (found,) = load_recorded(tmp_path, settings, words)
    return found


def measured(policy, split):
    fitted(policy, split.train, split.held)
    return measure([policy], split, resamples=50, rng=np.random.default_rng(0))[0]


# --- the encoder


def test_texts_share_the_room_and_long_ones_keep_both_ends(bert, scorer):
    assert shares([10, 500, 500], 310) == [10, 150, 150]
    assert shares([5, 5], 100) == [5, 5]
    assert shares([9, 9, 9], 10) == [3, 3, 4]
    score = EncoderScore("x", replace_settings(scorer, max_length=16))
    texts = [("apple", "river"), ("tiger", "window")] * 40
    score.fit(texts, np.tile([[0.0], [1.0]], (40, 1)), np.arange(80))
    long = "apple " + "music " * 50 + "winter"
    (ids,) = score._model.parted_tokens([("hard", long)])
    assert len(ids) == 16
    decoded = score._model.tokenizer.decode(ids, skip_special_tokens=False)
    assert decoded.startswith("[CLS] hard [SEP] apple music")
    assert decoded.endswith("music winter [SEP]")


def replace_settings(settings, **changes):
    return settings.model_copy(update=changes)


def test_the_same_seed_learns_the_same(scorer):
    texts = [(w, "hard" if i % 2 else "easy") for i, w in enumerate(WORDS * 20)]
    labels = (np.arange(len(texts)) % 2).astype(float)[:, None]
    found = []
    for _ in range(2):
        score = EncoderScore("x", scorer, seed=3)
        score.fit(texts, labels, np.arange(len(texts)))
        found.append(score.score(texts[:20]))
    assert (found[0] == found[1]).all()
    assert ((found[0] > 0.5) == labels[:20]).all()


def test_too_few_texts_are_refused(scorer):
    with pytest.raises(TrainingError, match="the answer scorer needs examples of more prompts"):
        EncoderScore("the answer scorer", scorer).fit([("a",)] * 8, np.ones((8, 1)), np.arange(8))


# --- Hybrid-LLM


def test_hybrid_llm_learns_where_small_will_do(split, encoder, scorer):
    gap = GapEncoder(encoder, Pair("big", "small"), scorer)
    for label in LABELS:
        found = measured(HybridLLM(f"Hybrid-LLM, {label}", gap, label), split)
        assert found.apgr.low > 0.65, label
        assert found.calls.value == 1.0
    # half the prompts are easy: at 1 % less quality all of them may go to small, and few more
    assert 0.4 < found.figures["cost_advantage_1"].value < 0.55
    assert found.figures["cost_advantage_4"].value >= found.figures["cost_advantage_1"].value


def test_the_slack_spreads_labels_that_are_all_near_nothing():
    gaps = np.random.default_rng(0).normal(-0.4, 0.1, (200, 10))  # small is never as good
    found = slack(gaps)
    assert 0.3 < found < 0.5  # about half the labels are then one
    assert slack(np.where(np.arange(200)[:, None] % 2, 0.0, -1.0) * np.ones((200, 10))) == 0.0


def test_cost_advantage_by_hand():
    strong, weak = np.ones(10), np.array([0.0] * 5 + [1.0] * 5)
    knows = 1.0 - weak
    once = np.ones(10)
    assert cost_advantage(knows, strong, weak, once, 0.0) == pytest.approx(0.5)
    assert cost_advantage(knows, strong, weak, once, 0.1) == pytest.approx(0.6)
    assert cost_advantage(knows, strong, weak, once, 0.5) == 1.0  # small alone is good enough


def test_a_rows_nearest_is_itself():
    vectors = np.eye(12, dtype=np.float32)
    assert (neighbours(vectors, 3)[:, 0] == np.arange(12)).all()
    with pytest.raises(TrainingError, match="cannot learn from 4 rows"):
        neighbours(vectors[:4])


def test_bart_score_prefers_what_the_model_finds_likely(tmp_path):
    folder = save_tiny_bart(tmp_path / "bart")
    score = BartScore(str(folder), "main")
    found = score.score(["tiger", "tiger river"], ["tiger", "river window garden"])
    again = score.score(["tiger river"], ["river window garden"])
    assert found[1] == pytest.approx(again[0], abs=1e-5)  # padding counts for nothing
    assert (found < 0).all()
    with pytest.raises(TrainingError, match=r"`policies.bart_score.model`"):
        BartScore(str(save_tiny_bert(tmp_path / "bert")), "main").score(["a"], ["b"])


def save_tiny_bart(folder):
    import torch
    from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(save_tiny_bert(folder / "tokenizer"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BartConfig(
            vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
            decoder_ffn_dim=32, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id,
            decoder_start_token_id=tokenizer.sep_token_id,
            forced_eos_token_id=tokenizer.sep_token_id,
        )  # fmt: skip
        BartForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- cascades


def test_a_cascade_pays_for_every_model_it_asks(split):
    table = split.measure.where(np.arange(len(split.measure)) < 40)
    small, big = table.models.index("small"), table.models.index("big")
    looked = Looked(table.quality.copy(), np.full(table.usd.shape, 1e-6), 0.5)
    point = Cascade((small, big), (0.5,)).on(table, looked)
    went_on = table.quality[:, small] == 0
    assert (point.quality == 1.0).all()
    assert point.calls.tolist() == (1.0 + went_on).tolist()
    usd = table.usd[:, small] + 1e-6 + went_on * table.usd[:, big]  # the last is not looked at
    assert point.usd == pytest.approx(usd)
    seconds = table.latency_s[:, small] + 0.5 + went_on * table.latency_s[:, big]
    assert point.latency_s == pytest.approx(seconds)
    assert point.setting == "small (stop at 0.50) > big"


def test_the_search_finds_the_best_orders_for_their_price(split):
    table = split.held
    looked = Looked(table.quality.copy(), np.zeros_like(table.usd), 0.0)
    found = search(table, looked, 3)
    points = [one.on(table, looked) for one in found]
    usd, quality = (np.array([getattr(p, k).mean() for p in points]) for k in ("usd", "quality"))
    assert (np.diff(usd) > 0).all()
    assert (np.diff(quality) > 0).all()
    assert quality[-1] == 1.0
    assert [table.models[c] for c in found[0].order] == ["small"]
    assert [table.models[c] for c in found[-1].order] == ["small", "mid", "big"]
    assert len(hull(usd, quality)[0]) == len(points)
    assert all(len(one.order) == 1 for one in search(table, looked, 1))


def test_frugalgpt_learns_to_tell_right_answers_and_stops_there(split, scorer):
    score = AnswerScore(scorer)
    found = measured(FrugalGPT("FrugalGPT", score), split)
    assert found.quality.value > 0.95
    assert found.calls.value < 2.6
    assert found.figures["saving_100"].low > 0.2
    assert found.figures["aiq_gain"].low > 0
    right = score.scores(split.measure)
    assert right[split.measure.quality == 1].min() > right[split.measure.quality == 0].max()


def test_a_judge_that_errs_more_is_worth_less_and_says_it_is_simulated(split):
    found = [measured(JudgedCascade(f"cascade {r}", r), split) for r in (0.0, 0.2, 0.5)]
    aiq = [one.aiq.value for one in found]
    assert aiq[0] > aiq[1] > aiq[2]
    assert found[0].figures["aiq_gain"].low > 0
    assert all(one.simulated for one in found)
    reordered = split.measure.where(np.arange(len(split.measure)) < 50)
    policy = JudgedCascade("x", 0.2)
    policy.fit(split.train, split.held)
    many, few = policy.answer(split.measure)[-1], policy.answer(reordered)[-1]
    assert (many.quality[:50] == few.quality).all()  # chance is a row's own


# --- all asked at once


def test_the_best_of_several_is_found_and_every_answer_paid(split, scorer):
    found = measured(BestOfN("best of n", AnswerScore(scorer)), split)
    assert len(found.points) == 7  # every choice of three models
    assert found.points[-1, 1] > 0.97
    usd = split.measure.usd.sum(axis=1).mean() * 1000
    assert found.points[-1, 0] == pytest.approx(usd)
    assert together(2) == [(0,), (1,), (0, 1)]
    assert together(7)[2] == (0, 1, 2)
    assert len(together(7)) == 7


def test_a_ranker_learns_which_of_two_answers_is_better_wherever_it_stands(split, scorer):
    policy = LLMBlender("LLM-Blender", PairRanker(scorer))
    found = measured(policy, split)
    assert found.points[-1, 1] > 0.97
    table = split.measure
    a, b = np.zeros(len(table), dtype=np.int64), np.full(len(table), 2)
    forth, back = policy.ranker.better(table, a, b), policy.ranker.better(table, b, a)
    assert forth == pytest.approx(1.0 - back)
    assert found.figures["all_gain"].value == pytest.approx(found.points[-1, 1] - 1.0)
    assert found.figures["all_gain"].value <= 0  # big is always right here
    last = policy.answer(table)[-1]
    assert last.calls.tolist() == [3.0] * len(table)
    assert last.latency_s == pytest.approx(table.latency_s.max(axis=1) + 2 * 0.5)


def test_a_table_without_answers_is_refused_by_policies_that_read_them(split, scorer):
    bare = replace(split.train, answers={})
    for policy in (
        FrugalGPT("FrugalGPT", AnswerScore(scorer)),
        BestOfN("best of n", AnswerScore(scorer)),
        LLMBlender("LLM-Blender", PairRanker(scorer)),
    ):
        with pytest.raises(UsageError, match=f"{policy.name} reads .* gsm8k has no answers: give"):
            fitted(policy, bare, bare)
