"""The maths of a backtest: windows, what is measured on, two policies on the same battles."""

import io
import itertools
import json
import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pytest

from registry.backtest import backtest_page
from routellm.backtest import (
    Backtest,
    Window,
    dates,
    period,
    sides_of,
    spelled,
    votes_of,
)
from routellm.errors import UsageError
from routellm.evaluation.backtest_plot import plot_backtest
from routellm.evaluation.metrics import exact_curve
from routellm.evaluation.two_policies import Answers, compare
from routellm.routers.base import Pair
from tests.conftest import battle_table

DAY = timedelta(days=1)
START = datetime(2026, 3, 1, tzinfo=UTC)
PAIR = Pair("m1", "m3")


# --- time ------------------------------------------------------------------------------------


def test_a_period_is_a_whole_number_of_hours_days_or_weeks():
    assert [period(t) for t in ("12h", "7d", "2w")] == [DAY / 2, 7 * DAY, 14 * DAY]
    for wrong in ("7", "d", "0d", "-7d", "1.5d", "7 d", "7m", "", "999999d"):
        with pytest.raises(UsageError, match=f"'{wrong}' is no period: give a whole number"):
            period(wrong)


def test_a_length_of_time_is_said_as_a_person_says_it():
    said = {12: "12 hours", 1: "1 hour", 24: "24 hours", 168: "7 days", 336: "2 weeks",
            8 * 168: "8 weeks", 60 * 24: "60 days", 60: "2.5 days"}  # fmt: skip
    assert {h: spelled(timedelta(hours=h)) for h in said} == said


def test_windows_follow_each_other_and_the_last_ends_where_history_does():
    spans = dates(START, START + 17 * DAY, 7 * DAY)
    assert spans == [
        (START, START + 7 * DAY),
        (START + 7 * DAY, START + 14 * DAY),
        (START + 14 * DAY, START + 17 * DAY),
    ]
    assert len(dates(START, START + 14 * DAY, 7 * DAY)) == 2
    with pytest.raises(UsageError, match="nothing lies between 2026-03-01T00:00 and 2026-03-01"):
        dates(START, START, DAY)
    with pytest.raises(UsageError, match=r"is 2,400 trainings of each router: give a longer"):
        dates(START, START + 100 * DAY, DAY / 24)


# --- what is measured on ---------------------------------------------------------------------


def history(models_a, models_b, **columns):
    """Return what `sides_of` and `votes_of` read of a history: a battle an hour from START."""
    n = len(models_a)
    changes = {"model_a": list(models_a), "model_b": list(models_b), **columns}
    voted = np.datetime64(START.replace(tzinfo=None), "us") + np.arange(n) * np.timedelta64(1, "h")
    return SimpleNamespace(
        table=battle_table(n, **changes),
        voted=voted,
        known_by=lambda when: voted <= np.datetime64(when.replace(tzinfo=None), "us"),
    )


def test_the_pairs_own_battles_are_measured_on_where_it_met_often_enough():
    often = history(["m1", "m3"] * 150, ["m3", "m1"] * 150)
    assert sides_of(often, PAIR, START, START + 20 * DAY) == (("m1",), ("m3",))


def test_where_the_pair_met_too_seldom_its_tiers_as_rated_at_the_first_date_stand_in():
    # ten ratings, of which the pair's models share theirs with a twin each
    rated = {"m1": 4.0, "twin1": 4.0, "m3": -4.0, "twin3": -4.0}
    rated |= {f"other{i}": 0.6 * i - 2.0 for i in range(8)}
    a, b = zip(*itertools.combinations(rated, 2), strict=True)
    won = [1 / (1 + math.exp(rated[y] - rated[x])) for x, y in zip(a, b, strict=True)]
    start = START + timedelta(hours=len(a) - 1)
    # what is voted later says the opposite, and must not count
    past = history(a * 2, b * 2, preference_a=won + [1.0 - p for p in won])
    assert sides_of(past, PAIR, start, START + 20 * DAY) == (("m1", "twin1"), ("m3", "twin3"))
    assert sides_of(history(a[:4], b[:4]), Pair("m1", "gone"), start, START + DAY) == (
        ("m1",), ("gone",),
    )  # fmt: skip


def test_votes_are_for_strong_in_the_order_they_were_cast_and_undated_ones_are_counted():
    past = history(
        ["m1", "m3", "m1", "m2", "m1", "m1"],
        ["m3", "m1", "m3", "m3", "m3", "m3"],
        preference_a=[1.0, 1.0, 0.5, 1.0, 0.2, 0.0],
        label_kind=["human", "human", "human", "human", "judge", "golden"],
        prompt=["p", "q", "p", "r", "s", "t"],
    )
    past.voted[0] += np.timedelta64(9, "h")
    past.voted[4] = np.datetime64("NaT")
    votes, undated = votes_of(past, (("m1",), ("m3",)), ("human", "judge"))
    assert undated == 1
    assert [votes.prompts[i] for i in votes.prompt] == ["q", "p", "p"]
    assert votes.preference.tolist() == [0.0, 0.5, 1.0]
    hour = timedelta(hours=1)
    assert votes.between(START + hour, START + 9 * hour).tolist() == [1, 2]  # after, and by
    assert votes.between(START, START + hour).tolist() == [0]


# --- two policies ----------------------------------------------------------------------------


def answers(rng, n=400, *, noise=(0.0, 0.0), windows=1, shift=1.0):
    """Return policies that see the true win rates through noise, and votes drawn from them."""
    truth = np.clip(rng.beta(2.0, 1.2, n), 0.02, 0.98)
    logit = np.log(truth / (1 - truth))
    seen = [1 / (1 + np.exp(-(logit + s * rng.normal(size=n)))) for s in noise]
    return Answers(
        *seen,
        (rng.random(n) < truth).astype(float),
        np.arange(n),
        np.arange(n) * windows // n,
    )


def compared(a, resamples=300):
    return compare(a, resamples=resamples, rng=np.random.default_rng(1))


def test_the_policy_that_sees_more_gains_and_the_same_policy_gains_nothing():
    rng = np.random.default_rng(0)
    found = compared(answers(rng, 2000, noise=(0.2, 2.0)))
    for gain in (found.gain.apgr, found.gain.cross_entropy, found.gain.brier):
        assert gain.low > 0
    assert found.retrained.apgr.value > found.never.apgr.value
    assert found.retrained.brier.value < found.never.brier.value
    a = answers(rng)
    same = compared(replace(a, never=a.retrained))
    for gain in (same.gain.apgr, same.gain.cross_entropy, same.gain.brier):
        assert (gain.value, gain.low, gain.high) == (0.0, 0.0, 0.0)


def test_one_window_is_read_as_any_benchmark_is():
    a = answers(np.random.default_rng(2), noise=(0.5, 1.0))
    curve = exact_curve(a.retrained, a.preference, 1 - a.preference, np.ones(400))
    assert compared(a).retrained.apgr.value == pytest.approx(curve.apgr(), abs=1e-12)


def test_the_scale_of_one_windows_win_rates_says_nothing_against_anothers():
    a = answers(np.random.default_rng(3), noise=(0.5, 1.0), windows=4)
    squeezed = replace(a, retrained=np.where(a.window == 2, 0.9 + a.retrained / 100, a.retrained))
    assert compared(squeezed).retrained.apgr == compared(a).retrained.apgr
    assert compared(squeezed).retrained.brier.value > compared(a).retrained.brier.value


def test_without_a_gap_there_is_no_apgr_and_without_battles_nothing():
    a = answers(np.random.default_rng(4))
    lost = compared(replace(a, preference=np.zeros(400)))
    assert lost.gain.apgr is None
    assert lost.gain.cross_entropy.high >= lost.gain.cross_entropy.low
    assert compared(Answers.join([])) is None
    halves = [replace(a, window=a.window + i) for i in range(2)]
    assert compared(Answers.join(halves)).battles == 800


def test_an_interval_of_the_gain_holds_the_true_one_about_as_often_as_it_says():
    # two policies that see equally much: what one gains on the other is chance
    rng = np.random.default_rng(5)
    held = dict.fromkeys(("apgr", "cross_entropy", "brier"), 0)
    for _ in range(200):
        gain = compared(answers(rng, 300, noise=(1.0, 1.0), windows=3), 200).gain
        for name in held:
            one = getattr(gain, name)
            held[name] += one.low <= 0 <= one.high
    assert all(180 <= n <= 199 for n in held.values()), held  # 190 expected, 3 standard deviations


def test_votes_on_one_prompt_are_resampled_together():
    a = answers(np.random.default_rng(6), noise=(0.5, 1.0))
    often = Answers.join([a] * 4)  # each vote four times over is no more evidence
    apart = replace(often, prompt=np.arange(1600))
    width = [c.gain.brier.high - c.gain.brier.low for c in map(compared, (a, often, apart))]
    assert width[1] == pytest.approx(width[0], rel=0.25)
    assert width[2] == pytest.approx(width[0] / 2, rel=0.25)


# --- what comes of it ------------------------------------------------------------------------


def result(gained, *, low=None, high=None, simulated=True):
    """Return a backtest over two weeks, of which one saw votes."""
    whole = compared(answers(np.random.default_rng(7), noise=(0.5, 1.0)))
    if gained is not None:
        apgr = replace(whole.gain.apgr, value=gained, low=low, high=high)
        whole = replace(whole, gain=replace(whole.gain, apgr=apgr))
    window = Window(START, START + 7 * DAY, 3000, {"knn": 0.61, "mf": 0.6}, "knn", 3, whole)
    quiet = replace(window, start=window.end, end=START + 14 * DAY, comparison=None)
    return Backtest("abc" * 20, simulated, PAIR, (("m1",), ("m3",)), 7 * DAY, (window, quiet),
                    None if gained is None else whole, 0)  # fmt: skip


@pytest.mark.parametrize(
    ("gained", "low", "high", "says"),
    [
        (0.021, 0.004, 0.038, "Retraining every 7 days gained 0.021 [0.004, 0.038] APGR over 2 "
         "weeks on 400 battles."),
        (0.005, -0.01, 0.02, "No gain from retraining every 7 days can be shown: +0.005 [-0.010, "
         "0.020] APGR over 2 weeks on 400 battles."),
        (-0.03, -0.05, -0.01, "Retraining every 7 days lost 0.030: -0.030 [-0.050, -0.010] APGR "
         "over 2 weeks on 400 battles."),
        (None, None, None, "Nothing can be said of retraining every 7 days: no battle was voted "
         "over 2 weeks."),
    ],
)  # fmt: skip
def test_the_verdict_is_one_honest_sentence(gained, low, high, says):
    assert result(gained, low=low, high=high).verdict == says


def test_where_strong_was_no_better_the_verdict_says_that():
    one = result(0.0, low=0.0, high=0.0)
    flat = replace(one.pooled, gain=replace(one.pooled.gain, apgr=None))
    assert "m1 was no better than m3 on 400 battles" in replace(one, pooled=flat).verdict


def test_a_backtest_is_json_a_figure_and_a_page_and_says_that_it_is_simulated():
    one = result(0.021, low=0.004, high=0.038)
    doc = json.loads(json.dumps(one.to_dict()))
    assert doc["verdict"] == one.verdict
    assert doc["every_days"] == 7.0
    assert doc["windows"][0]["comparison"]["gain"]["apgr"]["low"] == 0.004
    assert doc["windows"][1]["comparison"] is None
    figure = plot_backtest(one)
    assert figure.get_suptitle().startswith("SIMULATED")
    assert one.verdict in " ".join(figure.get_suptitle().split())
    figure.savefig(io.BytesIO(), format="png")
    page = backtest_page(one)
    assert "SIMULATED" in page
    assert one.verdict in page
    assert "<script" not in page
    real = plot_backtest(result(None, simulated=False))
    assert "SIMULATED" not in real.get_suptitle()
    real.savefig(io.BytesIO(), format="svg")
