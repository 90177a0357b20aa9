import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routellm.ratings import assign_tiers, fit_bradley_terry, win_table


def spread(ratings, tier):
    return sum(((ratings[tier == t] - ratings[tier == t].mean()) ** 2).sum() for t in set(tier))


@given(st.lists(st.floats(-3, 3), min_size=3, max_size=7), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_tiers_have_the_least_variance_of_all_cuts(values, k):
    ratings = np.array(values)
    tier = assign_tiers(ratings, k)
    order = np.argsort(-ratings, kind="stable")
    k = min(k, len(ratings))
    best = min(
        spread(ratings[order], np.searchsorted(cut, np.arange(len(ratings)), "right"))
        for cut in itertools.combinations(range(1, len(ratings)), k - 1)
    )
    assert spread(ratings, tier) == pytest.approx(best, abs=1e-9)
    assert (np.diff(tier[order]) >= 0).all()


def test_the_pair_never_shares_a_tier():
    tier = assign_tiers(np.array([1.0, 0.99, -1.0]), 2, apart=(0, 1))
    assert tier[0] < tier[1] < tier[2]


def test_ratings_recover_planted_skills():
    rng = np.random.default_rng(0)
    skill = np.array([1.0, 0.3, -0.2, -1.1])
    a, b = np.array([rng.permutation(4)[:2] for _ in range(60_000)]).T
    won = (rng.random(60_000) < 1 / (1 + np.exp(skill[b] - skill[a]))).astype(float)
    found = fit_bradley_terry(win_table(a, b, won, np.ones(60_000), 4))
    assert found == pytest.approx(skill - skill.mean(), abs=0.05)


def test_a_batch_is_solved_like_its_members():
    wins = np.random.default_rng(1).random((5, 6, 6)) * 50
    together = fit_bradley_terry(wins)
    for one, table in zip(together, wins, strict=True):
        assert fit_bradley_terry(table) == pytest.approx(one, abs=1e-9)


def test_a_model_that_never_lost_has_a_finite_rating():
    wins = np.zeros((3, 3))
    wins[0, 1:] = 1000.0
    assert np.isfinite(fit_bradley_terry(wins)).all()
