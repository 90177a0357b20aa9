"""Standings, kinship, and the weights of label kinds."""

from dataclasses import replace

import numpy as np
import pytest

import routellm.standings
from routellm.battles import prompt_split
from routellm.errors import UsageError
from routellm.kinship import family
from routellm.label_weights import choose_label_weights, fixed_label_weights, weigh
from routellm.routers.base import Pair, TrainingBattles
from routellm.standings import Smoother, leave_one_out, standings
from routellm.training import train


def battles(rows, prompts, models, pair, embeddings=None, kind="golden", validation=None):
    prompt, a, b, preference = (np.array(column) for column in zip(*rows, strict=True))
    n = len(rows)
    return TrainingBattles(
        prompts=tuple(prompts),
        embeddings=np.eye(len(prompts), dtype=np.float32) if embeddings is None else embeddings,
        prompt=prompt, models=models, model_a=a, model_b=b,
        preference_a=preference.astype(float), weight=np.ones(n),
        label_kind=np.broadcast_to(np.array(kind), n).copy(),
        validation=np.zeros(n, bool) if validation is None else validation, pair=pair,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other", "kin"),
    [
        ("mixtral-8x7b-instruct-v0.1", "mistral-7b-instruct-v0.3", True),
        ("gpt-4-1106-preview", "gpt-3.5-turbo-0613", True),
        ("llama-3.1-nemotron-51b-instruct", "vicuna-13b", True),
        ("claude-2.1", "gemini-pro", False),
        ("our-own-model", "our-other-model", False),
    ],
)
def test_kin_is_told_by_the_base_models_name(one, other, kin):
    assert (family(one) == family(other)) is kin


def test_a_standing_is_what_a_battle_says_beyond_overall_strength():
    # strong wins 3 of 4 overall: winning says little of a prompt, losing says much
    rows = [(0, 0, 1, 1), (1, 0, 1, 1), (2, 0, 1, 1), (3, 1, 0, 1)]
    stood = standings(battles(rows, "abcd", ("s", "w"), Pair("s", "w")))
    gap, weight = stood.gap(Pair("s", "w"))
    assert weight.tolist() == [1, 1, 1, 1]
    assert gap[:3] == pytest.approx(gap[0])
    assert 0 < gap[0] < 0.35 < -gap[3]
    level = stood.expected_of(Pair("s", "w"))
    assert gap[0] == pytest.approx(1 - level)
    assert gap[3] == pytest.approx(-level)


def test_a_model_has_one_say_on_a_prompt_however_many_battles_it_fought():
    twice = [(0, 0, 1, 1), (0, 0, 1, 1), (1, 0, 1, 0)]
    once = [(0, 0, 1, 1), (1, 0, 1, 0)]
    for rows in (twice, once):
        _, weight = standings(battles(rows, "ab", ("s", "w"), Pair("s", "w"))).gap(Pair("s", "w"))
        assert weight.tolist() == [1, 1]


def test_relatives_stand_in_and_neither_model_of_the_pair_is_one():
    models = ("gpt-4", "mistral-7b", "mixtral-8x7b", "other")
    rows = [(0, 1, 3, 0), (1, 1, 3, 1), (2, 0, 2, 1)]
    stood = standings(battles(rows, "abc", models, Pair("gpt-4", "mixtral-8x7b")))
    _, own_weight = stood.gap(Pair("gpt-4", "mixtral-8x7b"))
    kin, kin_weight = stood.gap(Pair("gpt-4", "mixtral-8x7b"), of_kin=True)
    assert own_weight.tolist() == [0, 0, 1]
    assert kin_weight.tolist() == [1, 1, 0]
    assert (
        kin[0] > 0 > kin[1]
    )  # the weak model's relative lost on the first prompt, won on the second
    _, none = stood.gap(Pair("mistral-7b", "mixtral-8x7b"), of_kin=True)
    assert none.tolist() == [0, 0, 0]


def test_far_from_its_neighbours_a_smoother_says_nothing():
    near = np.array([[1, 0, 0]], np.float32)
    one = Smoother(near, np.array([0.4]), np.array([1.0]), 40.0)
    mean, mass = one(np.array([[1, 0, 0], [0, 1, 0]], np.float32))
    assert mean[0] == pytest.approx(0.4, abs=1e-6)
    assert mean[1] == pytest.approx(0.0, abs=1e-6)
    assert mass[0] > 1e6 * mass[1]
    left_out, _ = one(near, left_out=np.array([0]))
    assert left_out[0] == 0.0


def test_leaving_out_for_all_sharpnesses_at_once_is_leaving_out_for_each(monkeypatch):
    monkeypatch.setattr(routellm.standings, "_BLOCK_COLUMNS", 7)  # several blocks either way
    monkeypatch.setattr(routellm.standings, "_BLOCK_BYTES", 8 * 7 * 5)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(30, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    residual, weight = rng.normal(size=30), rng.random(30)
    rows = np.array([0, 3, 6, 7, 13, 20, 21, 28, 29])
    means, masses = leave_one_out(vectors, residual, weight, rows, (2.5, 40.0))
    for sharpness, mean, mass in zip((2.5, 40.0), means, masses, strict=True):
        one = Smoother(vectors, residual, weight, sharpness)
        expected = one(vectors[rows], left_out=rows)
        np.testing.assert_allclose(mean, expected[0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(mass, expected[1], rtol=1e-4)


def test_knn_asks_the_kin_where_the_pair_never_fought():
    """The pair fought over one topic only; a relative of weak loses on another one's hard half."""
    rng = np.random.default_rng(0)
    models = ("gpt-4", "mistral-7b", "mixtral-8x7b", "other")
    centres = np.linalg.qr(rng.normal(size=(32, 3)))[0].T
    points, rows = [], []
    for i in range(300):
        topic = i % 3
        x = centres[topic] + 0.1 * rng.normal(size=32)
        points.append(x / np.linalg.norm(x))
        if topic == 0:
            rows.append((i, 0, 2, float(rng.random() < 0.6)))
        else:  # the relative loses on topic 1 and wins on topic 2
            rows.append((i, 1, 3, float(rng.random() < (0.1 if topic == 1 else 0.9))))
    x = np.array(points, np.float32)
    found = battles(
        rows, [str(i) for i in range(300)], models, Pair("gpt-4", "mixtral-8x7b"), x,
        validation=np.arange(300) % 3 == 0,
    )  # fmt: skip
    found = replace(found, preference_a=np.array([r[3] for r in rows]))
    with_kin, _ = train("knn", found, None, seed=0)
    alone, _ = train("knn", found, None, seed=0, options={"kinship": 0.0})
    asked = centres.astype(np.float32)
    rate = with_kin.score([], asked)
    assert rate[1] > rate[2] + 0.1
    assert np.abs(np.diff(alone.score([], asked)[1:])) < 0.02


def labelled(judge_says):
    """Return golden battles in which hard prompts need strong, and judged ones of `judge_says`."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(600, 8)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    hard = x[:, 0] > 0
    kind = np.where(np.arange(600) < 200, "golden", "judge")
    chance = np.where(kind == "golden", np.where(hard, 0.9, 0.4), judge_says(hard))
    rows = [(i, 0, 1, float(rng.random() < chance[i])) for i in range(600)]
    return battles(
        rows, [str(i) for i in range(600)], ("s", "w"), Pair("s", "w"), x, kind,
        validation=np.arange(600) % 4 == 0,
    )  # fmt: skip


def test_a_judge_that_agrees_with_right_answers_counts_and_one_that_does_not_is_left_out():
    agrees = choose_label_weights(labelled(lambda hard: np.where(hard, 0.9, 0.4)))
    assert agrees.trusted == "golden"
    assert agrees.weights["golden"] == 1.0
    assert agrees.weights["judge"] > 0
    contradicts = choose_label_weights(labelled(lambda hard: np.where(hard, 0.2, 0.9)))
    assert contradicts.weights == {"golden": 1.0, "judge": 0.0}


def test_weights_are_chosen_where_the_pair_met_too_rarely_and_its_tiers_stand_in():
    # tiers follow the weights that are tried; what is judged on must not
    for seed in range(3):
        rng = np.random.default_rng(seed)
        n, m = 600, 12
        a, b = rng.integers(m, size=(2, n))
        b = np.where(a == b, (b + 1) % m, b)
        vectors = rng.normal(size=(n, 4)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        kind = np.where(rng.random(n) < 0.5, "golden", "judge")
        rows = list(zip(range(n), a, b, rng.integers(2, size=n), strict=True))
        models, held = tuple(f"m{i:02d}" for i in range(m)), rng.random(n) < 0.2
        rare = battles(rows, map(str, range(n)), models, Pair("m03", "m08"), vectors, kind, held)
        chosen = choose_label_weights(rare)
        assert set(chosen.weights) == {"golden", "judge"}
        assert chosen.weights[chosen.trusted] == 1.0


def test_weights_can_be_set_and_wrong_ones_are_refused():
    found = labelled(lambda hard: np.where(hard, 0.9, 0.4))
    weights = fixed_label_weights(found, {"judge": 0.5}).weights
    assert weights == {"golden": 1.0, "judge": 0.5}
    weighed = weigh(found, weights)
    assert set(weighed.weight[found.label_kind == "judge"]) == {0.5}
    with pytest.raises(UsageError, match=r"training.label_weights has \{'judgement': 1.0\}"):
        fixed_label_weights(found, {"judgement": 1.0})
    with pytest.raises(UsageError, match="label_weights"):
        fixed_label_weights(found, {"judge": -1.0})


def test_a_publishers_hash_split_does_not_fall_on_one_side_of_ours():
    """The golden part of a published table was cut off by a plain hash of the prompt."""
    import hashlib

    published = [
        p
        for p in (f"question {i}" for i in range(4000))
        if int.from_bytes(hashlib.sha256(p.encode()).digest()[:8], "big") / 2**64 < 0.15
    ]
    sides = [prompt_split(p, validation_share=0.1, heldout_share=0.05) for p in published]
    assert sides.count("train") / len(sides) == pytest.approx(0.85, abs=0.05)
    assert sides.count("validation") / len(sides) == pytest.approx(0.1, abs=0.05)
