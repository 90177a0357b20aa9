"""Other pairs than the trained one: which are known well enough, and what routers say of them."""

from dataclasses import replace

import numpy as np
import pytest

from routellm.errors import UsageError
from routellm.lineup import MIN_MODEL_BATTLES, Lineup
from routellm.routers import Pair, TrainingBattles, make_router
from routellm.training import train

KINDS = ["sw_ranking", "mf", "knn", "gaussian_process"]
HARD, EASY = "apple river hard 9", "apple river easy 8"


def battles(rows, models, kind="human"):
    """Return battles from rows of (model a, model b, preference a, how often)."""
    a, b, preference = (
        np.repeat([row[i] for row in rows], [row[3] for row in rows]) for i in range(3)
    )
    n = len(a)
    return TrainingBattles(
        prompts=tuple(map(str, range(n))), embeddings=np.eye(n, dtype=np.float32),
        prompt=np.arange(n), models=models, model_a=a, model_b=b,
        preference_a=preference.astype(float), weight=np.ones(n),
        label_kind=np.broadcast_to(np.array(kind), n).copy(), validation=np.zeros(n, bool),
        pair=Pair(*models[:2]),
    )  # fmt: skip


def test_a_model_is_found_by_any_of_its_names():
    known = Lineup.of(battles([(0, 1, 1, 40)], ("gpt-4-1106-preview", "weak")))
    assert known.resolve(" GPT4_1106_preview ", "Weak") == ("gpt-4-1106-preview", "weak")
    assert Lineup.from_dict(known.to_dict()).resolve("gpt4_1106_preview", "weak")


def test_a_name_that_is_known_as_it_stands_is_not_changed():
    known = Lineup.of(battles([(0, 1, 1, 40)], ("Ours", "weak")))
    assert known.resolve("Ours", "weak") == ("Ours", "weak")


def test_an_unknown_model_is_refused_with_some_that_are_known():
    known = Lineup.of(battles([(0, 1, 1, 40)], ("strong", "weak")))
    with pytest.raises(UsageError, match=r"no battle of 'strnog'.*\(strong, weak\)"):
        known.resolve("strnog", "weak")


def test_a_model_with_too_few_battles_is_refused_with_their_number():
    models = ("strong", "weak", "new")
    few = battles([(0, 1, 1, 40), (0, 2, 1, MIN_MODEL_BATTLES - 1)], models)
    with pytest.raises(UsageError, match=r"new has 29 battles that count in this router, 30 are"):
        Lineup.of(few).resolve("strong", "new")
    enough = battles([(0, 1, 1, 40), (0, 2, 1, MIN_MODEL_BATTLES)], models)
    assert Lineup.of(enough).resolve("strong", "new") == ("strong", "new")


def test_battles_of_weight_zero_do_not_count():
    found = battles([(0, 1, 1, 40), (0, 2, 1, 40)], ("strong", "weak", "judged"))
    weight = np.where(found.model_b == 2, 0.0, 1.0)
    with pytest.raises(UsageError, match="judged has 0 battles"):
        Lineup.of(replace(found, weight=weight)).resolve("strong", "judged")


def test_one_model_is_no_pair():
    with pytest.raises(UsageError, match="the same model"):
        Lineup.of(battles([(0, 1, 1, 40)], ("strong", "weak"))).resolve("weak", "WEAK")


def test_a_strong_model_rated_below_the_weak_one_is_doubted():
    known = Lineup.of(battles([(0, 1, 1, 30), (0, 1, 0, 10)], ("strong", "weak")))
    assert known.doubt("strong", "weak") == ""
    assert "weak is rated below strong by human labels: swap" in known.doubt("weak", "strong")


def test_the_most_trusted_label_kind_that_links_two_models_rates_them():
    kinds = np.repeat(["golden", "judge"], [40, 90])
    models = ("strong", "weak")
    known = Lineup.of(battles([(0, 1, 1, 40), (0, 1, 0, 90)], models, kinds))
    assert known.doubt("strong", "weak") == ""
    assert known.shares("strong", "weak") == pytest.approx([40 / 130, 90 / 130])


def test_models_that_no_chain_of_battles_links_are_doubted():
    models = ("a", "b", "c", "d")
    apart = Lineup.of(battles([(0, 1, 1, 40), (2, 3, 1, 40)], models))
    assert "no battles of one label kind link a and d" in apart.doubt("a", "d")
    assert apart.shares("a", "d").tolist() == [0.0]
    chain = Lineup.of(battles([(0, 1, 1, 40), (1, 2, 1, 40), (2, 3, 1, 40)], models))
    assert chain.doubt("a", "d") == ""
    # a chain of two label kinds compares nothing
    kinds = np.repeat(["golden", "human", "golden"], 40)
    mixed = Lineup.of(battles([(0, 1, 1, 40), (1, 2, 1, 40), (2, 3, 1, 40)], models, kinds))
    assert "link a and d" in mixed.doubt("a", "d")


def scores(router):
    """Return its win rates before they are calibrated: the map is the trained pair's alone."""
    prompts = [HARD, EASY]
    return router.score(prompts, router.encoder.encode(prompts))


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_is_turned_to_another_pair_without_training(kind, planted, encoder):
    router, _ = train(kind, planted, encoder, seed=0)
    before = scores(router)
    other = router.for_pair(Pair("strong", "other"))
    hard, easy = other.win_rate([HARD, EASY])
    assert hard > easy + 0.01
    assert other.pair == Pair("strong", "other")
    assert router.pair == Pair("strong", "weak")
    assert np.array_equal(scores(router), before)
    assert np.array_equal(scores(other.for_pair(router.pair)), before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_pair_the_other_way_round_has_the_opposite_win_rate(kind, planted, encoder):
    router, _ = train(kind, planted, encoder, seed=0)
    back = router.for_pair(Pair("weak", "strong"))
    assert scores(back) == pytest.approx(1 - scores(router), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_router_can_still_be_turned(kind, planted, encoder):
    router, _ = train(kind, planted, encoder, seed=0)
    again = make_router(kind, encoder, router.pair)
    again.load_state(*router.state())
    assert np.array_equal(scores(again), scores(router))
    turned, other = (r.for_pair(Pair("other", "weak")) for r in (again, router))
    assert np.array_equal(turned.win_rate([HARD, EASY]), other.win_rate([HARD, EASY]))


def test_turned_knn_is_the_one_trained_for_that_pair_but_for_its_sharpness(planted, encoder):
    pair = Pair("other", "weak")
    turned = train("knn", planted, encoder, seed=0)[0].for_pair(pair)
    trained, _ = train("knn", replace(planted, pair=pair), encoder, seed=0)
    own, kin = (replace(s, sharpness=o.sharpness) for s, o in
                ((trained.own_, turned.own_), (trained.kin_, turned.kin_)))  # fmt: skip
    query = encoder.encode([HARD, EASY])
    assert np.array_equal(own(query), turned.own_(query))
    assert np.array_equal(kin(query), turned.kin_(query))
    assert trained.level_ == turned.level_


def test_mf_takes_the_levels_of_the_label_kinds_that_compare_the_two(planted, encoder):
    """The judge never saw `other`: what it says of the pair's levels must not count there."""
    rng = np.random.default_rng(0)
    between = (planted.model_a != 0) & (planted.model_b != 0)
    judged = between & (rng.random(len(planted)) < 0.8)
    router, _ = train(
        "mf", replace(planted, label_kind=np.where(judged, "judge", "human")), encoder, seed=0
    )
    other = router.for_pair(Pair("strong", "other"))
    human = router.kinds_.index("human")
    assert other.level_ == pytest.approx(router.levels_[human])
    assert not np.allclose(router.level_, router.levels_[human])


def test_tiers_that_two_models_share_are_refused(planted, encoder):
    router, _ = train("sw_ranking", planted, encoder, seed=0)
    router.tiers_ = router.tiers_ | {"other": router.tiers_["weak"]}
    with pytest.raises(UsageError, match="other and weak share tier 3 of 3"):
        router.for_pair(Pair("other", "weak"))


def test_a_kind_that_knows_one_pair_says_which_kinds_know_others(planted, encoder):
    router, _ = train("random", planted, encoder, seed=0)
    assert router.for_pair(router.pair) is router
    with pytest.raises(UsageError, match=r"random router knows only .*knn, mf.*sw_ranking"):
        router.for_pair(Pair("strong", "other"))
