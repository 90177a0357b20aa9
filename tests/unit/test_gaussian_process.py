"""``gaussian_process``: the estimate itself, what it learns, and what it keeps."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy.stats import spearmanr

import routellm.routers.gaussian_process as gp
from routellm.evaluation.metrics import auc
from routellm.prompt_features import prompt_features
from routellm.routers.base import Pair, TrainingBattles
from routellm.standings import standings
from routellm.training import train

MODELS = ("gpt-4", "mistral-7b", "mixtral-8x7b", "other")
PAIR = Pair("gpt-4", "mixtral-8x7b")
OWN_ONLY = {"kinship": 0.0}  # the score is then the level plus the process's estimate


def drawn(n, seed=0, dimensions=8, numbers=False, kinds=("golden",)):
    """Return battles of the pair on random prompts and random unit vectors.

    With `numbers`, strong wins nine in ten where a prompt has many of them and two in ten
    elsewhere; otherwise what decides is the first coordinate of the vector.
    """
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n, dimensions)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    many = rng.random(n) < 0.5
    words = np.array(["apple", "river", "tiger", "why?", "(garden)", "not", "Music,"])
    prompts = []
    for i in range(n):
        said = list(rng.choice(words, rng.integers(4, 12)))
        said += [str(x) for x in rng.integers(100, size=6 if many[i] else 0)]
        prompts.append(f"{' '.join(rng.permutation(said))} p{chr(97 + i % 26)}")
    hard = many if numbers else vectors[:, 0] > 0
    wins = (rng.random(n) < np.where(hard, 0.9, 0.2)).astype(float)
    battles = TrainingBattles(
        prompts=tuple(prompts), embeddings=vectors, prompt=np.arange(n), models=MODELS,
        model_a=np.zeros(n, int), model_b=np.full(n, 2), preference_a=wins, weight=np.ones(n),
        label_kind=rng.choice(np.array(kinds), n), validation=np.arange(n) % 5 == 0, pair=PAIR,
    )  # fmt: skip
    return battles, hard


def with_relatives(battles, seed=1):
    """Return the battles, and as many of a relative of weak with another model."""
    n = len(battles)
    rng = np.random.default_rng(seed)
    more, _ = drawn(n, seed=seed, dimensions=battles.embeddings.shape[1])
    return replace(
        battles,
        prompts=battles.prompts + more.prompts,
        embeddings=np.vstack([battles.embeddings, more.embeddings]),
        prompt=np.arange(2 * n),
        model_a=np.r_[battles.model_a, np.full(n, 1)],
        model_b=np.r_[battles.model_b, np.full(n, 3)],
        preference_a=np.r_[battles.preference_a, (rng.random(n) < 0.5).astype(float)],
        weight=np.r_[battles.weight, more.weight],
        label_kind=np.r_[battles.label_kind, more.label_kind],
        validation=np.r_[battles.validation, more.validation],
    )


def inputs(battles, scale, of=None):
    """Return what the kernel compares, written down once more."""
    f = prompt_features(battles.prompts)
    mean, deviation = f.mean(axis=0), f.std(axis=0)
    vectors, asked = (
        (battles.embeddings, f) if of is None else (of.embeddings, prompt_features(of.prompts))
    )
    varied = deviation > 1e-9
    shown = np.zeros_like(asked)
    shown[:, varied] = np.clip((asked - mean)[:, varied] / deviation[varied], -3, 3)
    return np.hstack([vectors.astype(float), scale * shown])


def squared_distance(x, z):
    return ((x[:, None, :] - z[None, :, :]) ** 2).sum(axis=-1)


def plain_mean(battles, pair, shape, asked):
    """Return the posterior mean (n,) at other battles' prompts, by scikit-learn."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF

    gap, weight = standings(battles).gap(pair)
    told = weight > 0
    process = GaussianProcessRegressor(
        RBF(1.0 / np.sqrt(2.0 * shape.sharpness)), alpha=shape.noise / weight[told], optimizer=None
    )
    process.fit(inputs(battles, shape.feature_scale)[told], gap[told])
    return process.predict(inputs(battles, shape.feature_scale, of=asked))


@pytest.mark.parametrize("kinds", [("golden",), ("golden", "judge")])
def test_the_estimate_is_the_posterior_mean_of_a_gaussian_process(kinds, monkeypatch):
    monkeypatch.setattr(gp, "_BLOCK", 33)  # several blocks
    battles, _ = drawn(150, kinds=kinds)
    battles = replace(battles, weight=np.where(battles.label_kind == "judge", 0.25, 1.0))
    router, _ = train("gaussian_process", battles, None, seed=0, options=OWN_ONLY)
    asked, _ = drawn(70, seed=9)
    expected = plain_mean(battles, PAIR, router.shape_, asked)
    assert expected.std() > 0.01
    score = router.score(asked.prompts, asked.embeddings)
    np.testing.assert_allclose(score, np.clip(router.level_ + expected, 0, 1), atol=1e-5)


def test_leaving_out_in_closed_form_is_fitting_again_without_each_prompt():
    battles, _ = drawn(40, kinds=("golden", "judge"))
    battles = replace(battles, weight=np.where(battles.label_kind == "judge", 0.5, 1.0))
    _, report = train("gaussian_process", battles, None, seed=0)
    found = report.history["leave_one_out_mse_by_shape"]
    gap, weight = standings(battles).gap(PAIR)
    truth, known = standings(battles, only="golden").gap(PAIR)
    expected = []
    for sharpness in gp.SHARPNESS:
        for scale in gp.FEATURE_SCALE:
            x = inputs(battles, scale)
            k = np.exp(-sharpness * squared_distance(x, x))
            for noise in gp.NOISE:
                errors = []
                for i in np.flatnonzero(known):  # judged by the trusted kind alone
                    o = np.delete(np.arange(40), i)
                    pulled = np.linalg.solve(k[np.ix_(o, o)] + np.diag(noise / weight[o]), gap[o])
                    errors.append((k[i, o] @ pulled - truth[i]) ** 2)
                expected.append(np.mean(errors))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert report.metrics["leave_one_out_mse"] == min(found)


def test_fewer_landmarks_than_prompts_give_nearly_the_same():
    battles, _ = drawn(600, dimensions=3)
    battles = replace(battles, prompts=("the same words",) * 600)  # the vectors alone differ
    asked = drawn(200, seed=9, dimensions=3)[0]
    asked = replace(asked, prompts=("the same words",) * 200)
    rates = []
    for landmarks in (2000, 150):
        options = OWN_ONLY | {"landmarks": landmarks}
        router, report = train("gaussian_process", battles, None, seed=0, options=options)
        assert report.params["landmarks"] == len(router.landmarks_) == min(landmarks, 600)
        rates.append(router.score(asked.prompts, asked.embeddings))
    assert rates[0].std() > 0.05
    np.testing.assert_allclose(rates[1], rates[0], atol=0.01)


def test_a_rule_in_a_prompts_look_is_learnt_and_by_neighbours_it_is_not():
    battles, _ = drawn(400, numbers=True, dimensions=64)
    asked, many = drawn(300, seed=9, numbers=True, dimensions=64)
    found = {}
    for kind in ("knn", "gaussian_process"):
        router, _ = train(kind, battles, None, seed=0)
        rates = router.score(asked.prompts, asked.embeddings)
        found[kind] = auc(rates, many.astype(float), 1.0 - many, np.ones(300))
    assert found["gaussian_process"] > 0.95
    assert found["knn"] < 0.6


def test_a_prompts_look_is_left_out_where_only_its_meaning_counts():
    """Features are a chance to overfit: they are scaled by leave-one-out error, down to 0."""
    battles, _ = drawn(400, dimensions=3)
    asked, hard = drawn(300, seed=9, dimensions=3)
    router, _ = train("gaussian_process", battles, None, seed=0)
    assert router.shape_.feature_scale < max(gp.FEATURE_SCALE)
    rates = router.score(asked.prompts, asked.embeddings)
    assert auc(rates, hard.astype(float), 1.0 - hard, np.ones(300)) > 0.95


def test_a_saved_router_gives_the_same_scores_to_the_last_bit(tmp_path):
    battles = with_relatives(drawn(300, numbers=True)[0])
    router, _ = train("gaussian_process", battles, None, seed=0)
    arrays, doc = router.state()
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, tmp_path / "router")
    again = gp.GaussianProcessRouter(None, PAIR)
    again.load_state(load_file(tmp_path / "router"), json.loads(json.dumps(doc)))
    asked, _ = drawn(50, seed=9)
    for prompts, vectors in (
        (asked.prompts, asked.embeddings),
        (asked.prompts[:1], asked.embeddings[:1]),
    ):
        assert again.score(prompts, vectors).tobytes() == router.score(prompts, vectors).tobytes()
    other = Pair("other", "mistral-7b")
    one, two = (r.for_pair(other).score(asked.prompts, asked.embeddings) for r in (router, again))
    assert one.tobytes() == two.tobytes()


def test_training_repeats_byte_for_byte():
    battles = drawn(300, numbers=True)[0]
    one, two = (train("gaussian_process", battles, None, seed=4)[0].state() for _ in range(2))
    assert one[1] == two[1]
    assert all(a.tobytes() == two[0][name].tobytes() for name, a in one[0].items())


def test_turned_to_another_pair_it_is_that_pairs_process_and_leaves_its_own_alone():
    battles = with_relatives(drawn(200)[0])
    router, _ = train("gaussian_process", battles, None, seed=0, options=OWN_ONLY)
    asked, _ = drawn(60, seed=9)
    before = router.score(asked.prompts, asked.embeddings)
    other = Pair("other", "mistral-7b")
    turned = router.for_pair(other)
    expected = plain_mean(battles, other, router.shape_, asked)
    score = turned.score(asked.prompts, asked.embeddings)
    np.testing.assert_allclose(score, np.clip(turned.level_ + expected, 0, 1), atol=1e-5)
    assert router.score(asked.prompts, asked.embeddings).tobytes() == before.tobytes()
    assert router.for_pair(PAIR) is router


def test_with_no_standing_of_the_pairs_own_its_kin_decide():
    battles = with_relatives(drawn(200)[0])
    asked, _ = drawn(60, seed=9)
    silent = replace(battles, weight=np.where(battles.model_a == 0, 0.0, 1.0))
    router, _ = train("gaussian_process", silent, None, seed=0)
    kin, _ = router.kin_(asked.embeddings)
    assert np.ptp(kin) > 0.01
    score = router.score(asked.prompts, asked.embeddings)
    np.testing.assert_allclose(score, np.clip(router.level_ + 0.5 * kin, 0, 1), atol=1e-12)


def test_kin_are_silent_on_familiar_prompts_and_heard_on_strange_ones():
    own, _ = drawn(200, dimensions=16)
    topic = np.zeros((200, 16), np.float32)
    topic[:, 0] = 3.0  # the pair fought over one topic, its relatives over everything
    vectors = own.embeddings + topic
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    battles = with_relatives(replace(own, embeddings=vectors.astype(np.float32)))
    router, _ = train("gaussian_process", battles, None, seed=0)
    alone = train("gaussian_process", battles, None, seed=0, options=OWN_ONLY)[0]

    def heard(prompts, embeddings):
        return np.abs(router.score(prompts, embeddings) - alone.score(prompts, embeddings))

    familiar = heard(own.prompts, vectors.astype(np.float32))
    assert (familiar < 1e-12).mean() >= 0.75
    strange, _ = drawn(60, seed=9, dimensions=16)
    assert np.median(heard(strange.prompts, -np.abs(strange.embeddings))) > 0.005


def test_without_a_battle_that_counts_it_reports_no_error_and_says_a_half():
    battles, _ = drawn(60)
    router, report = train("gaussian_process", replace(battles, weight=np.zeros(60)), None, seed=0)
    assert "leave_one_out_mse" not in report.metrics
    assert np.isfinite(list(report.metrics.values())).all()
    assert router.score(battles.prompts, battles.embeddings).tolist() == [0.5] * 60


def test_prompts_that_are_all_alike_can_be_fitted():
    battles, _ = drawn(200)
    alike = replace(
        battles,
        prompts=("the same words",) * 200,
        embeddings=np.tile(battles.embeddings[:1], (200, 1)),
    )
    router, _ = train("gaussian_process", alike, None, seed=0)
    rate = router.score(alike.prompts[:1], alike.embeddings[:1])[0]
    assert rate == pytest.approx(battles.preference_a.mean(), abs=0.02)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_rare_trusted_kind_still_decides_when_prompts_are_many(seed, monkeypatch):
    monkeypatch.setattr(gp, "_CHOOSE_BY", 40)
    battles, _ = drawn(400, kinds=("judge",))
    kind = battles.label_kind.astype("<U6")
    kind[[7, 333]] = "golden"
    none = np.zeros(400, dtype=bool)
    rare = replace(battles, label_kind=kind, validation=none)
    assert rare.trusted_kind() == "golden"
    _, report = train("gaussian_process", rare, None, seed=seed)
    assert np.isfinite(report.metrics["leave_one_out_mse"])


def test_with_more_prompts_than_are_chosen_by_the_same_rule_is_found(monkeypatch):
    battles, _ = drawn(500, numbers=True, dimensions=64)
    asked, _ = drawn(200, seed=9, numbers=True, dimensions=64)
    rates = []
    for most in (4000, 250):
        monkeypatch.setattr(gp, "_CHOOSE_BY", most)
        router, _ = train("gaussian_process", battles, None, seed=0)
        rates.append(router.score(asked.prompts, asked.embeddings))
    assert spearmanr(*rates).statistic > 0.95
