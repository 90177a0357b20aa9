"""Calibrated win rates: the map, its error, and what it is fitted on."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import routellm.routers.platt
from routellm.bundle import Bundle, golden_predictions, load_bundle, save_bundle
from routellm.calibration import (
    IDENTITY,
    MIN_SLOPE,
    Calibration,
    Platt,
    chance_calibration_error,
    expected_calibration_error,
)
from routellm.errors import UsageError
from routellm.ratings import sigmoid
from routellm.routers import FitReport, Pair, Router
from routellm.routers.base import cross_entropy
from routellm.routers.platt import calibrated, without_validation
from routellm.settings import EmbeddingSettings
from routellm.training import train


def truth(n, seed=0):
    """Return true win rates (n,), and preferences drawn from them."""
    rng = np.random.default_rng(seed)
    rates = sigmoid(rng.normal(0.3, 1.0, n))
    return rates, (rng.random(n) < rates).astype(float)


def distorted(rates):
    """Return win rates whose log-odds are three times too large, and shifted."""
    return sigmoid(3.0 * np.log(rates / (1.0 - rates)) + 1.0)


@given(
    st.lists(st.integers(0, 10**6), min_size=2, max_size=50, unique=True),
    st.floats(MIN_SLOPE, 2.0),  # steeper ones reach the end of what a float tells from 1
    st.floats(-3.0, 3.0),
)
def test_the_order_of_win_rates_is_kept(parts, slope, intercept):
    rates = np.array(sorted(parts)) / 10**6
    mapped = Platt(slope, intercept)(rates)
    assert (np.diff(mapped) > 0).all()
    assert ((mapped > 0) & (mapped < 1)).all()


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=60),
    st.integers(0, 10),
)
def test_whatever_it_is_fitted_on_the_map_rises(pairs, seed):
    rates, preferences = np.array(pairs).T
    weights = np.random.default_rng(seed).random(len(rates)) + 0.1
    found = Platt.fit(rates, preferences, weights)
    assert found.slope >= MIN_SLOPE
    assert np.isfinite([found.slope, found.intercept]).all()


def test_a_known_distortion_is_undone():
    rates, preferences = truth(20_000)
    found = Platt.fit(distorted(rates), preferences)
    assert found.slope == pytest.approx(1 / 3, abs=0.02)
    assert found(distorted(rates)) == pytest.approx(rates, abs=0.03)


def test_soft_preferences_say_as_much_as_many_votes():
    rates, _ = truth(2_000)
    found = Platt.fit(distorted(rates), rates)
    assert found(distorted(rates)) == pytest.approx(rates, abs=0.005)


def test_a_battle_of_twice_the_weight_counts_twice():
    rates, preferences = truth(200)
    weights = np.where(np.arange(200) < 50, 2.0, 1.0)
    twice = [np.concatenate([v, v[:50]]) for v in (rates, preferences)]
    weighted, repeated = Platt.fit(rates, preferences, weights), Platt.fit(*twice)
    # Platt's targets look at the number of battles, which differs
    assert weighted.slope == pytest.approx(repeated.slope, abs=0.02)
    assert weighted.intercept == pytest.approx(repeated.intercept, abs=0.02)


def test_a_reversed_router_keeps_its_order_and_says_little():
    rates, preferences = truth(5_000)
    found = Platt.fit(1 - rates, preferences)
    assert found.slope == MIN_SLOPE
    assert found(1 - rates).mean() == pytest.approx(preferences.mean(), abs=0.01)


def test_the_identity_changes_nothing():
    rates = np.array([0.0, 1e-9, 0.3, 1.0])
    assert np.array_equal(IDENTITY(rates), rates)


def test_a_calibrated_router_has_a_small_error_and_a_distorted_one_a_large():
    rates, preferences = truth(5_000)
    assert expected_calibration_error(rates, preferences) < 0.03
    assert expected_calibration_error(distorted(rates), preferences) > 0.15


def test_the_error_of_a_constant_is_its_distance_from_the_mean_in_any_order():
    preferences = np.sort(truth(400)[1])
    error = expected_calibration_error(np.full(400, 0.9), preferences)
    assert error == pytest.approx(0.9 - preferences.mean())


def test_few_battles_make_few_bins():
    """Of perfect win rates: with ten bins of four battles each, chance alone would give 0.2."""
    errors = []
    for seed in range(200):
        rates, preferences = truth(40, seed)
        errors.append(expected_calibration_error(rates, preferences))
    assert np.mean(errors) < 0.4 / np.sqrt(20)


def test_no_battles_are_refused():
    with pytest.raises(UsageError, match="found 0 win rates"):
        Platt.fit(np.empty(0), np.empty(0))
    with pytest.raises(UsageError, match="found 2 win rates and 3 preferences"):
        expected_calibration_error(np.zeros(2), np.zeros(3))


class Overconfident(Router):
    """Knows the planted battles' win rates, and says their log-odds five times too large."""

    kind = "overconfident"
    learns_from_validation = False

    def fit(self, battles, *, rng, progress=None, checkpoint=None):
        return FitReport({}, {}, {})

    def score(self, prompts, embeddings):
        return np.array([0.999 if "hard" in p else 0.62 for p in prompts])

    def state(self):
        return {}, {}

    def load_state(self, arrays, doc):
        pass


def never(battles):
    raise AssertionError("a second router was fitted")


def rng():
    return np.random.default_rng(0)


def test_an_overconfident_router_is_calibrated_on_validation_battles(planted, encoder):
    router = Overconfident(encoder, planted.pair)
    found, report = calibrated(router, planted, never, rng=rng())
    assert report.n == len(planted.pair_validation()[0])
    assert report.kept_out == ""
    assert report.ece_before > 0.07
    assert report.ece_after < 0.7 * report.ece_before
    assert report.loss_after < report.loss_before
    router.platt = found
    hard, easy = router.win_rate(["hard", "easy"])
    assert hard == pytest.approx(sigmoid(np.array(2.0)), abs=0.06)
    assert easy == pytest.approx(sigmoid(np.array(0.2)), abs=0.08)
    assert report.metrics()["calibration_ece_after"] == report.ece_after


def test_too_few_validation_battles_leave_win_rates_as_they_are(planted, encoder):
    rows, _ = planted.pair_validation()
    few = np.zeros(len(planted), bool)
    few[rows[:29]] = True
    router = Overconfident(encoder, planted.pair)
    found, report = calibrated(router, replace(planted, validation=few), never, rng=rng())
    assert found == IDENTITY
    assert (report.n, "29 validation battles" in report.kept_out) == (29, True)
    assert report.metrics() == {"calibration_n": 29.0}


def test_a_map_that_is_no_gain_on_other_prompts_is_not_used(planted, encoder):
    """Of random scores that are right on average, a map can only overfit."""

    class Level(Overconfident):
        def score(self, prompts, embeddings):
            rng = np.random.default_rng(1)
            return mean + 0.02 * rng.normal(size=len(prompts))

    mean = planted.pair_validation()[1].mean()
    found, report = calibrated(Level(encoder, planted.pair), planted, never, rng=rng())
    assert found == IDENTITY
    assert report.ece_after == report.ece_before
    assert "a map fitted on other prompts" in report.kept_out


def test_the_error_after_is_not_measured_on_what_the_map_was_fitted_on(planted, encoder):
    class Seen(Overconfident):
        """Scores that foretell nothing, so that a map fitted on all battles looks better."""

        def score(self, prompts, embeddings):
            return np.random.default_rng(2).random(len(prompts))

    held, preference = planted.pair_validation()
    found, report = calibrated(Seen(encoder, planted.pair), planted, never, rng=rng())
    prompts, where = np.unique(planted.prompt[held], return_inverse=True)
    scores = Seen(encoder, planted.pair).score(prompts, None)[where]
    clipped = np.clip(found(scores), 1e-6, 1 - 1e-6)
    on_all = -(preference * np.log(clipped) + (1 - preference) * np.log(1 - clipped)).mean()
    assert on_all < report.loss_after < report.loss_before


@pytest.mark.parametrize("kind", ["knn", "sw_ranking"])
def test_kinds_that_learn_from_validation_are_scored_by_a_router_that_did_not(
    kind, planted, encoder
):
    router, _ = train(kind, planted, encoder, seed=0)
    fitted = []

    def fit(battles):
        fitted.append(battles)
        return train(kind, battles, encoder, seed=0)[0]

    _, report = calibrated(router, planted, fit, rng=rng())
    (seen,) = fitted
    held = {planted.prompts[i] for i in planted.prompt[planted.validation]}
    assert not held & set(seen.prompts)
    assert len(seen) == (~planted.validation).sum()
    assert report.n == len(planted.pair_validation()[0])
    # its scores are those of the router that was fitted on the others
    rows, preference = planted.pair_validation()
    unseen = train(kind, seen, encoder, seed=0)[0].score(
        [], planted.embeddings[planted.prompt[rows]]
    )
    assert report.loss_before == pytest.approx(cross_entropy(unseen, preference), abs=1e-9)
    assert report.n == len(rows)


def test_battles_without_validation_are_the_others_as_they_were(planted):
    left = without_validation(planted, rng())
    kept = np.flatnonzero(~planted.validation)
    assert [left.prompts[i] for i in left.prompt] == [
        planted.prompts[i] for i in planted.prompt[kept]
    ]
    assert np.array_equal(left.embeddings[left.prompt], planted.embeddings[planted.prompt[kept]])
    assert np.array_equal(left.preference_a, planted.preference_a[kept])
    assert 0.1 < left.validation.mean() < 0.3


def test_a_router_gives_out_calibrated_win_rates_and_its_bundle_keeps_them(
    planted, encoder, tmp_path
):
    router, _ = train("random", planted, encoder, seed=0)
    prompts = list(planted.prompts[:50])
    scores = router.score(prompts, np.empty((50, 0)))
    assert router.platt != Platt()
    assert np.array_equal(router.win_rate(prompts), router.platt(scores))
    router.platt = Platt(0.5, 0.25)
    assert np.array_equal(router.win_rate(prompts), Platt(0.5, 0.25)(scores))
    assert np.array_equal(router.rates(prompts, np.empty((50, 0))), router.win_rate(prompts))
    bundle = Bundle(
        router, EmbeddingSettings(), Calibration.of(router.win_rate(prompts), "test"),
        golden_predictions(router, prompts), "abc", True, "0.1.0",
    )  # fmt: skip
    save_bundle(bundle, tmp_path / "b")
    again = load_bundle(tmp_path / "b")
    again.check_golden()
    assert again.router.platt == Platt(0.5, 0.25)
    assert np.array_equal(again.router.win_rate(prompts), router.win_rate(prompts))


def test_a_bundle_from_before_has_no_map(planted, encoder, tmp_path):
    import hashlib
    import json

    router, _ = train("random", planted, encoder, seed=0)
    save_bundle(
        Bundle(router, EmbeddingSettings(), Calibration.of(np.ones(3), "test"), (), "a", True, "0"),
        tmp_path / "b",
    )
    path = tmp_path / "b" / "router.json"
    doc = json.loads(path.read_text())
    del doc["platt"]
    path.write_text(json.dumps(doc))
    sums = json.loads((tmp_path / "b" / "digests.json").read_text())
    sums["router.json"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "b" / "digests.json").write_text(json.dumps(sums))
    assert load_bundle(tmp_path / "b").router.platt == IDENTITY


def test_another_pair_drops_the_map_of_the_trained_one(planted, encoder):
    router, _ = train("sw_ranking", planted, encoder, seed=0)
    router.platt = Platt(0.5, 0.25)
    assert router.for_pair(Pair("strong", "other")).platt == IDENTITY
    assert router.platt == Platt(0.5, 0.25)


def test_a_second_router_and_its_map_are_fitted_on_bounded_numbers(planted, monkeypatch):
    monkeypatch.setattr(routellm.routers.platt, "MAX_PROMPTS", 40)
    left = without_validation(planted, rng())
    assert len(left.prompts) == 40
    held = {planted.prompts[i] for i in planted.prompt[planted.validation]}
    assert not held & set(left.prompts)
    monkeypatch.setattr(routellm.routers.platt, "MAX_BATTLES", 50)
    router, _ = train("random", planted, None, seed=0)
    _, report = calibrated(router, planted, None, rng=rng())
    assert report.n == 50
    assert len(planted.pair_validation()[0]) > 50


@pytest.mark.parametrize("n", [40, 150, 2000])
def test_what_chance_makes_of_perfect_win_rates_is_known(n):
    rng = np.random.default_rng(5)
    found = []
    for _ in range(300):
        rates = rng.uniform(0.4, 0.6, n)
        found.append(expected_calibration_error(rates, (rng.random(n) < rates).astype(float)))
    assert np.mean(found) == pytest.approx(chance_calibration_error(n), rel=0.1)
