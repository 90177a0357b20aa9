"""The pacer keeps the strong fraction that was asked for while the traffic drifts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.pacer import DRIFTS, SEEDS, simulate
from routellm.calibration import Calibration
from routellm.errors import UsageError
from routellm.gateway.pacer import Pacer, Pacers
from routellm.ratings import sigmoid

UNIFORM = Calibration.of(np.linspace(0.0, 1.0, 2001), "test")


def decided(pacer, rates):
    """Return for each query whether it went to strong."""
    return np.array([rate >= pacer.decide(rate) for rate in np.asarray(rates).tolist()])


@pytest.mark.parametrize("drift", DRIFTS)
def test_it_holds_30_percent_within_2_over_10_000_queries(drift):
    for seed in range(3):
        assert simulate(drift, seed).paced.overall == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("drift", ["a step", "slow"])
def test_a_fixed_threshold_ends_at_twice_that(drift):
    found = [simulate(drift, seed).fixed for seed in range(3)]
    assert np.mean([one.overall for one in found]) == pytest.approx(0.6, abs=0.04)
    assert all(one.last > 0.55 for one in found)


def test_the_drift_that_is_simulated_is_several_kinds_over_several_seeds():
    assert len(DRIFTS) >= 4
    assert SEEDS >= 5


@pytest.mark.parametrize("drift", ["none", "a step", "bursts of 500 queries"])
def test_it_holds_where_a_prompt_is_sent_over_and_over(drift):
    found = simulate(drift, 0, repeated=0.4)
    assert found.paced.overall == pytest.approx(0.3, abs=0.02)
    assert found.paced.worst == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5, 0.9, 0.98])
def test_it_holds_other_fractions_too(fraction):
    rng = np.random.default_rng(1)
    pacer = Pacer(Calibration.of(sigmoid(rng.standard_normal(1000)), "t"), fraction)
    strong = decided(pacer, sigmoid(0.7 + rng.standard_normal(10_000)))
    assert strong.mean() == pytest.approx(fraction, abs=0.02)
    assert pacer.realised == strong.mean()


def test_one_value_for_every_query_is_shared_out_evenly():
    strong = decided(Pacer(UNIFORM, 0.25), np.full(4000, 0.5))
    assert strong.mean() == pytest.approx(0.25, abs=0.02)
    last = strong[-1000:].reshape(-1, 100).mean(axis=1)
    assert np.abs(last - 0.25).max() <= 0.03


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.9])
def test_a_new_one_has_the_calibrated_threshold(fraction):
    pacer = Pacer(UNIFORM, fraction)
    assert pacer.threshold(0.123456) == pytest.approx(UNIFORM.threshold(fraction), abs=0.005)


def test_without_drift_its_threshold_stays_near_the_calibrated_one():
    pacer = Pacer(UNIFORM, 0.3)
    rates = np.random.default_rng(0).random(5000).tolist()
    thresholds = [pacer.decide(rate) for rate in rates]
    assert np.mean(thresholds) == pytest.approx(0.7, abs=0.01)
    assert np.std(thresholds) < 0.04


@pytest.mark.parametrize(("fraction", "sends"), [(0.0, 0.0), (1.0, 1.0)])
def test_nothing_and_everything_are_kept_exactly(fraction, sends):
    rates = [0.0, 0.2, 1.0, *np.random.default_rng(0).random(1000)]
    assert decided(Pacer(UNIFORM, fraction), rates).mean() == sends


@pytest.mark.parametrize(("rate", "limit"), [(0.999, 0.9490), (0.001, 0.2258)])
def test_it_goes_no_further_than_its_limits_whatever_comes(rate, limit):
    pacer = Pacer(UNIFORM, 0.3, most_odds=8.0)
    noise = np.random.default_rng(0).uniform(-1e-4, 1e-4, 5000)
    thresholds = [pacer.decide(r) for r in (rate + noise).tolist()]
    assert pacer.limited
    assert thresholds[-1] == pytest.approx(limit, abs=0.001)
    assert min(thresholds) >= 0.2257
    assert max(thresholds) <= 0.9492


def test_after_a_long_time_at_its_limits_it_pays_back_a_bounded_part():
    pacer = Pacer(UNIFORM, 0.3)
    rng = np.random.default_rng(0)
    decided(pacer, 0.98 + 0.01 * rng.random(20_000))  # all of them to strong, and no way to help it
    back = decided(pacer, rng.random(4000))
    assert back[500:1500].mean() > 0.1
    assert back[-2000:].mean() == pytest.approx(0.3, abs=0.03)


@given(st.lists(st.floats(0.0, 1.0), max_size=300), st.floats(0.0, 1.0), st.integers(1, 40))
@settings(max_examples=60)
def test_the_same_queries_get_the_same_thresholds(rates, fraction, window):
    runs = []
    for _ in range(2):
        pacer = Pacer(UNIFORM, fraction, window=window)
        run = []
        for rate in rates:
            looked = pacer.threshold(rate)
            run.append(pacer.decide(rate))
            assert run[-1] == looked  # looking changes nothing
        runs.append(run)
    assert runs[0] == runs[1]
    assert pacer.queries == len(rates)


@pytest.mark.parametrize("rate", [float("nan"), -0.1, 1.1])
def test_what_is_no_win_rate_is_refused_and_leaves_no_trace(rate):
    pacer = Pacer(UNIFORM, 0.3)
    before = pacer.threshold(0.5)
    with pytest.raises(UsageError, match="win rate"):
        pacer.decide(rate)
    assert (pacer.queries, pacer.threshold(0.5)) == (0, before)


def test_another_key_version_or_fraction_has_a_pacer_of_its_own():
    pacers = Pacers()
    one = pacers.of("alice", "1", UNIFORM, 0.3)
    decided(one, np.full(800, 0.9) + np.linspace(0, 0.05, 800))
    assert pacers.of("alice", "1", UNIFORM, 0.3) is one
    for other in (("bob", "1", 0.3), ("alice", "2", 0.3), ("alice", "1", 0.4)):
        key, version, fraction = other
        fresh = pacers.of(key, version, UNIFORM, fraction)
        assert fresh.queries == 0
        assert fresh.threshold(0.1) == pytest.approx(UNIFORM.threshold(fraction), abs=0.005)


def test_a_key_that_asks_for_ever_other_fractions_takes_nothing_from_another_key():
    pacers = Pacers()
    kept = pacers.of("alice", "1", UNIFORM, 0.3)
    own = [pacers.of("bob", "1", UNIFORM, i / 100) for i in range(100)]
    assert pacers.of("alice", "1", UNIFORM, 0.3) is kept
    assert pacers.of("bob", "1", UNIFORM, 0.0) is not own[0]
    assert pacers.of("bob", "1", UNIFORM, 0.99) is own[-1]
