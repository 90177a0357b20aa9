import json
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest

from registry import Decision, Gate
from registry.online import Online
from registry.paired import Paired
from registry.smoke import Smoke
from routellm.evaluation.metrics import exact_curve
from routellm.settings import PromotionSettings, Settings
from tests.support.judged import GOOD, NOW, evidence, judged, simulated_pair

BETTER, EQUAL, WORSE = (0.45, 0.85), (0.45, 0.45), (0.85, 0.45)


@pytest.fixture(scope="module")
def pairs():
    """A candidate that is surely better, one that is as good, and one that is surely worse."""
    rng = np.random.default_rng(5)
    return {name: simulated_pair(rng, 2000, skills) for name, skills in (
        ("better", BETTER), ("equal", EQUAL), ("worse", WORSE),
    )}  # fmt: skip


@pytest.fixture(scope="module")
def decided(pairs):
    """The verdicts on them."""
    return {name: Gate(Settings()).decide(evidence(pair)) for name, pair in pairs.items()}


@pytest.fixture
def gate(tmp_path):
    return Gate(Settings(home=tmp_path))


def outcomes(decision):
    return {one.name: one.outcome for one in decision.checks}


def named(decision, name):
    (found,) = (one for one in decision.checks if one.name == name)
    return found


def test_a_surely_better_candidate_is_promoted_with_its_numbers(decided):
    decision = decided["better"]
    assert decision.outcome == "promote"
    gain = named(decision, "delta_apgr")
    assert 0 < gain.low < gain.value < gain.high
    assert decision.numbers["delta_apgr"] == pytest.approx(
        decision.numbers["candidate_apgr"] - decision.numbers["champion_apgr"]
    )
    assert f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]" in decision.reason
    assert "of version 1" in decision.reason
    assert set(outcomes(decision).values()) <= {"pass", "skipped"}
    assert {"slice code=no", "slice length=medium", "small slices", "cost at 50%"} <= set(
        outcomes(decision)
    )


def test_one_as_good_is_inconclusive_and_a_worse_one_rejected(decided):
    decision = decided["equal"]
    assert decision.outcome == "inconclusive"
    assert decision.reason.startswith("delta_apgr")
    decision = decided["worse"]
    assert decision.outcome == "reject"
    assert decision.reason.startswith("delta_apgr -0.")


def test_identical_routers_are_rejected_whatever_their_scale(gate, pairs):
    same = replace(pairs["equal"], candidate=pairs["equal"].champion / 2)
    decision = gate.decide(evidence(same))
    assert decision.outcome == "reject"
    gain = named(decision, "delta_apgr")
    assert (gain.value, gain.low, gain.high) == (0.0, 0.0, 0.0)


def test_the_same_evidence_gives_the_same_verdict(gate, pairs, decided):
    assert gate.decide(evidence(pairs["equal"])) == decided["equal"]


def test_the_best_of_several_must_be_better_by_more(gate, decided, pairs):
    alone = named(decided["better"], "delta_apgr")
    best = named(gate.decide(evidence(pairs["better"], chosen_among=5)), "delta_apgr")
    assert best.low < alone.low
    assert (best.value, best.high) == (alone.value, alone.high)
    assert best.detail.endswith("as one of 5 trained on these battles")
    margin = Settings(promotion=PromotionSettings(margin=(best.low + alone.low) / 2))
    verdicts = {
        among: Gate(margin).decide(evidence(pairs["better"], chosen_among=among)).outcome
        for among in (1, 5)
    }
    assert verdicts == {1: "promote", 5: "inconclusive"}


def test_a_margin_asks_for_more_than_better(tmp_path, pairs):
    asking = Settings(home=tmp_path, promotion=PromotionSettings(margin=0.2))
    decision = Gate(asking).decide(evidence(pairs["better"]))
    assert decision.outcome == "reject"
    assert "surely does not clear 0.2" in decision.reason


def test_a_decision_survives_json_and_one_without_checks_is_read(decided):
    decision = decided["better"]
    document = json.loads(json.dumps(decision.to_dict(), allow_nan=False))
    assert Decision.from_dict(document) == decision
    assert Decision.from_dict({"outcome": "promote", "reason": "better"}) == Decision(
        "promote", "better"
    )


# --- who is held against whom ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("champion", "candidate", "says"),
    [
        (judged("2"), judged("2"), "version 2 is the champion"),
        (judged("1"), judged("2", simulated=True), "SIMULATED"),
        (judged("1", strong="another"), judged("2"), "--force to change the pair"),
    ],
)
def test_some_are_rejected_before_anything_is_measured(gate, champion, candidate, says):
    def never():
        raise AssertionError("loaded")

    decision = gate.decide(evidence(champion=champion, candidate=candidate, load=never))
    assert decision.outcome == "reject"
    assert says in decision.reason
    assert decision.checks == ()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"champion": None}, "first version; APGR 0.600 on mmlu"),
        ({"champion": None, "gone": "7"}, "version 7, or its alias, was deleted"),
        ({"champion": judged("1", simulated=True)}, "champion was trained on SIMULATED battles"),
        (
            {"champion": judged("1", simulated=True, strong="simulated/strong")},
            "champion was trained on SIMULATED battles",
        ),
    ],
)
def test_without_a_champion_to_compare_with_the_other_checks_hold(gate, changes, says):
    decision = gate.decide(evidence(**changes))
    assert decision.outcome == "promote"
    assert says in decision.reason
    found = outcomes(decision)
    assert [n for n, o in found.items() if o == "skipped"] == [
        "delta_apgr", "benchmarks", "slices", "cost", "canary",
    ]  # fmt: skip
    assert says.split(";")[0].split(",")[0] in named(decision, "slices").detail
    broken = gate.decide(evidence(**changes, load=lambda: Smoke(False, "it does not load: gone")))
    assert broken.outcome == "reject"
    assert "it does not load: gone" in broken.reason
    assert gate.decide(evidence(**changes, calibration_error=0.3)).outcome == "reject"
    assert gate.decide(evidence(**changes, snapshot_validated=None)).outcome == "inconclusive"


def test_a_primary_benchmark_that_cannot_be_compared_is_inconclusive(gate):
    decision = gate.decide(evidence(missing={"mmlu": "version 1 has no predictions"}))
    assert decision.outcome == "inconclusive"
    assert "version 1 has no predictions" in decision.reason
    assert outcomes(decision)["slices"] == outcomes(decision)["cost"] == "skipped"


# --- elsewhere than on the primary benchmark -------------------------------------------------


def other(pair, name="gsm8k", *, upside_down=False):
    candidate = 1.0 - pair.candidate if upside_down else pair.candidate
    return replace(pair, candidate=candidate, benchmark=name, slices={})


def test_a_loss_on_another_benchmark_rejects_what_is_better_on_the_primary(gate, pairs):
    decision = gate.decide(evidence(pairs["better"], other(pairs["better"], upside_down=True)))
    assert decision.outcome == "reject"
    assert decision.reason.startswith("benchmark gsm8k -0.")
    assert outcomes(decision)["delta_apgr"] == "pass"


def test_doubt_on_another_benchmark_holds_back_only_where_it_has_enough_prompts(gate, pairs):
    rng = np.random.default_rng(3)
    doubtful = other(simulated_pair(rng, 410, WORSE, shared=0.0))
    assert gate.decide(evidence(pairs["better"], doubtful)).outcome == "inconclusive"
    few = other(simulated_pair(rng, 100, WORSE, shared=0.0))
    decision = gate.decide(evidence(pairs["better"], few))
    assert decision.outcome == "promote"
    assert named(decision, "benchmark gsm8k").outcome == "skipped"
    assert named(decision, "benchmark gsm8k").value is not None
    assert "too few to tell" in named(decision, "benchmark gsm8k").detail


def test_a_benchmark_that_training_has_mostly_seen_does_not_count(gate, pairs):
    seen = {"mmlu": (2000, 10), "gsm8k": (2000, 4000)}
    both = (pairs["better"], other(pairs["better"], upside_down=True))
    decision = gate.decide(evidence(*both, left_out=seen))
    assert decision.outcome == "promote"
    assert "67%" in named(decision, "benchmark gsm8k").detail
    decision = gate.decide(evidence(champion=None, left_out={"mmlu": (2000, 2100)}))
    assert decision.outcome == "reject"
    assert named(decision, "contamination").value == pytest.approx(2100 / 4100)


def spoilt(pair, here):
    """The pair with a candidate that sends the wrong prompts to strong, on some of them."""
    wrong = 0.5 + 0.4 * (pair.weak - pair.strong)
    return replace(pair, candidate=np.where(here, wrong, pair.candidate))


def test_a_loss_on_a_slice_rejects_and_is_named(gate, pairs):
    pair = pairs["better"]
    decision = gate.decide(evidence(spoilt(pair, pair.slices["code"] == "yes")))
    assert decision.outcome == "reject"
    assert named(decision, "slice code=yes").outcome == "fail"
    assert named(decision, "slice code=yes").n < 400  # too small to make it unsure, not to fail
    assert named(decision, "slice code=yes").threshold == -0.1
    assert outcomes(decision)["slice code=no"] == "pass"


def test_slices_on_which_strong_is_no_better_have_nothing_to_lose(gate, pairs):
    pair = pairs["better"]
    yes = pair.slices["code"] == "yes"
    flat = replace(pair, weak=np.where(yes, pair.strong, pair.weak))
    decision = gate.decide(evidence(spoilt(flat, yes)))
    assert decision.outcome == "promote"
    assert "slice code=yes" not in outcomes(decision)


def test_turns_of_one_question_are_resampled_together(gate, pairs):
    pair = pairs["better"]
    n = 60
    single = Paired(
        "mmlu", pair.champion[:n], pair.candidate[:n], pair.strong[:n], pair.weak[:n],
        np.arange(n), {},
    )  # fmt: skip
    arrays = {
        name: np.repeat(getattr(single, name), 30)
        for name in ("champion", "candidate", "strong", "weak")
    }
    as_prompts = replace(single, **arrays, cluster=np.arange(30 * n))
    as_turns = replace(single, **arrays, cluster=np.repeat(np.arange(n), 30))
    width = {}
    for name, one in (("single", single), ("prompts", as_prompts), ("turns", as_turns)):
        gain = named(gate.decide(evidence(one)), "delta_apgr")
        width[name] = gain.high - gain.low
    assert width["turns"] == pytest.approx(width["single"], rel=0.1)
    assert width["prompts"] < width["single"] / 4


# --- cost ------------------------------------------------------------------------------------


def test_the_champions_quality_may_not_cost_more(decided):
    assert named(decided["better"], "cost at 50%").value < 0
    dearer = named(decided["worse"], "cost at 80%")
    assert dearer.value > dearer.threshold == 0.05
    assert dearer.outcome in ("unsure", "fail")


def test_cost_is_what_the_prices_make_of_both_cpts(settings, pairs, decided):
    pair = pairs["better"]
    usd = []
    for rates in (pair.champion, pair.candidate):
        share = exact_curve(rates, pair.strong, pair.weak, np.ones(len(pair))).cpt(0.5)
        models = (judged("1").strong, judged("1").weak)
        strong_usd, weak_usd = (settings.usd_per_query(m) for m in models)
        usd.append(share * strong_usd + (1 - share) * weak_usd)
    found = named(decided["better"], "cost at 50%")
    assert found.value == pytest.approx(usd[1] / usd[0] - 1)
    assert found.low < found.value < found.high


def test_without_prices_cost_is_skipped_and_says_so(tmp_path, pairs):
    decision = Gate(Settings(home=tmp_path, prices={})).decide(evidence(pairs["better"]))
    assert decision.outcome == "promote"
    assert "no price is set for gpt-4-1106-preview and mixtral" in named(decision, "cost").detail


# --- the candidate alone ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "check", "outcome", "says"),
    [
        ({"calibration_error": 0.11}, "calibration", "fail", "above 0.1"),
        ({"calibration_error": 0.1}, "calibration", "pass", "within 0.1"),
        ({"calibration_error": None}, "calibration", "skipped", "not measured"),
        (
            {"calibration_error": 0.15, "calibration_n": 80},
            "calibration",
            "pass",
            "0.150, of which chance gives 0.089: within",
        ),
        (
            {"calibration_error": 0.15, "calibration_n": 8000},
            "calibration",
            "fail",
            "0.150, of which chance gives 0.014: above",
        ),
        ({"contamination": None}, "contamination", "unsure", "has not logged"),
        ({"left_out": {}}, "contamination", "unsure", "no evaluation on mmlu"),
        ({"snapshot_validated": "false"}, "snapshot", "fail", "did not pass validation"),
        ({"snapshot_validated": None}, "snapshot", "unsure", "whether it was validated"),
        ({"snapshot_created_at": None}, "snapshot", "unsure", "when it was made"),
        ({"snapshot_created_at": NOW - timedelta(days=31)}, "snapshot", "fail", "31.0 days old"),
        ({"snapshot_created_at": NOW - timedelta(days=29)}, "snapshot", "pass", "29.0 days old"),
        ({"load": lambda: Smoke(True, None, 0.0, 501.0)}, "latency", "fail", "501.0 ms"),
        ({"load": lambda: Smoke(False, "off by 0.2", 0.2, 9.0)}, "reproduces", "fail", "off by"),
        ({"load": lambda: Smoke(False, "it does not load")}, "latency", "skipped", "not answer"),
    ],
)
def test_what_a_candidate_is_held_to_by_itself(gate, changes, check, outcome, says):
    decision = gate.decide(evidence(champion=None, **changes))
    found = named(decision, check)
    assert found.outcome == outcome
    assert says in found.detail
    if outcome in ("fail", "unsure"):
        assert decision.outcome == {"fail": "reject", "unsure": "inconclusive"}[outcome]
        assert says in decision.reason


def seen(requests, failures):
    return Online(requests, failures, 0, requests, 0.5, 0.45, 9.0, 0.9, "", "", 1)


@pytest.mark.parametrize(
    ("online", "outcome"),
    [
        (None, "skipped"),
        (seen(0, 0), "unsure"),
        (seen(499, 5), "unsure"),
        (seen(20, 6), "fail"),  # more than 500 requests may have
        (seen(500, 5), "pass"),
        (seen(500, 6), "fail"),
        (seen(100_000, 900), "pass"),
    ],
)
def test_what_gateways_saw_of_a_challenger_counts(gate, online, outcome):
    decision = gate.decide(evidence(champion=None, online=online))
    assert named(decision, "canary").outcome == outcome
    if online is not None:
        assert named(decision, "canary").detail.endswith("; strong for 50% where 45% was asked")
    assert decision.outcome == {"fail": "reject", "unsure": "inconclusive"}.get(outcome, "promote")


def test_no_process_is_started_for_a_candidate_that_has_failed_already(gate, pairs):
    loaded = []

    def load():
        loaded.append(1)
        return GOOD

    decision = gate.decide(evidence(pairs["worse"], load=load))
    assert not loaded
    assert "failed already" in named(decision, "reproduces").detail
    gate.decide(evidence(pairs["equal"], load=load))
    assert len(loaded) == 1  # once for two checks


def test_a_failure_outweighs_doubt_and_the_reason_counts_the_rest(gate, pairs):
    decision = gate.decide(
        evidence(pairs["equal"], calibration_error=0.4, snapshot_validated="false")
    )
    assert decision.outcome == "reject"
    assert decision.reason.startswith("calibration fails")
    assert decision.reason.endswith("and 1 more check")
