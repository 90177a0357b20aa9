"""How often the gate errs, on simulated routers whose true quality is known.

The truth is measured, not assumed: a router's true APGR is its exact APGR on a million simulated
prompts, on which it is known to 0.001. `BETTER` was found by halving the interval of skills until
the candidate's true APGR was 0.05 above that of a champion of skill 0.45 (0.580); a test below
measures it again. The routers share three fifths of their noise's variance, which makes the rank
correlation of two of the same skill 0.66: they are different routers. At 2,000 prompts their
difference then has a standard error of about 0.014. The gates are the real ones; only the smoke
check's process is left out. The quick tests leave out slices and costs too, which hold back some
more of the good and the bad alike; the slow one has every check.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from registry import Gate
from routellm.settings import Settings
from tests.support.judged import evidence, simulated_pair

SKILL, BETTER = 0.45, 0.713
PROMPTS = 2000


def outcomes(seed, gates, skills, *, n=PROMPTS, whole=False):
    """Return how many of so many simulated gates end in each outcome."""
    rng, gate = np.random.default_rng(seed), Gate(Settings() if whole else Settings(prices={}))
    among = len(skills) - 1
    found = (
        gate.decide(
            evidence(simulated_pair(rng, n, skills, sliced=whole), chosen_among=among)
        ).outcome
        for _ in range(gates)
    )
    return Counter(found)


def test_the_better_routers_true_apgr_is_five_hundredths_higher():
    large = simulated_pair(np.random.default_rng(0), 1_000_000, (SKILL, BETTER), sliced=False)
    champion, candidate = large.apgr(large.champion), large.apgr(large.candidate)
    assert champion == pytest.approx(0.580, abs=0.002)
    assert candidate - champion == pytest.approx(0.05, abs=0.002)
    equal = simulated_pair(np.random.default_rng(1), 1_000_000, (SKILL, SKILL), sliced=False)
    assert equal.apgr(equal.candidate) == pytest.approx(equal.apgr(equal.champion), abs=0.002)
    ranks = [np.argsort(np.argsort(r)) for r in (equal.champion, equal.candidate)]
    assert np.corrcoef(*ranks)[0, 1] == pytest.approx(0.66, abs=0.01)


@pytest.mark.slow
def test_routers_as_good_as_the_champion_are_promoted_at_most_one_time_in_twenty():
    found = outcomes(1, 200, (SKILL, SKILL), n=500)
    assert found["promote"] <= 10
    assert found["inconclusive"] > 150  # they are not told apart, and it says so


@pytest.mark.slow
def test_a_truly_better_router_is_promoted_at_least_four_times_in_five():
    assert outcomes(2, 60, (SKILL, BETTER))["promote"] >= 48


@pytest.mark.slow
def test_the_best_of_five_is_promoted_as_seldom_by_chance_and_as_surely_if_it_is_better():
    assert outcomes(7, 100, (SKILL,) * 6, n=500)["promote"] <= 5
    assert outcomes(8, 30, (SKILL, BETTER, *(SKILL,) * 4))["promote"] >= 24


def test_identical_routers_are_never_promoted():
    rng, gate = np.random.default_rng(3), Gate(Settings())
    for _ in range(30):
        pair = simulated_pair(rng, 300, (SKILL, SKILL), sliced=False)
        same = replace(pair, candidate=pair.champion)
        assert gate.decide(evidence(same)).outcome == "reject"


@pytest.mark.slow
def test_the_error_rates_hold_over_whole_gates():
    assert outcomes(4, 20, (SKILL, SKILL), whole=True)["promote"] <= 1
    assert outcomes(5, 15, (SKILL, BETTER), whole=True)["promote"] >= 12
    found = outcomes(6, 5, (BETTER, SKILL), whole=True)
    assert found["promote"] == 0
    assert found["reject"] >= 4
