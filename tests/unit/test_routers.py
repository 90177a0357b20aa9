import numpy as np
import pytest

from routellm.errors import TrainingError, UsageError
from routellm.routers import Pair, make_router, router_class, router_kinds
from routellm.training import train
from tests.support.refit import plain_refit

# kinds that read no embedding train a language model: their own tests do that
KINDS = [k for k in router_kinds() if k == "random" or router_class(k).reads_embeddings]
HARD, EASY = "apple river hard 9", "apple river easy 8"


@pytest.mark.parametrize("kind", ["sw_ranking", "mf", "knn", "gaussian_process"])
def test_a_router_learns_which_prompts_need_the_strong_model(kind, planted, encoder):
    router, _ = train(kind, planted, encoder, seed=0)
    hard, easy = router.win_rate([HARD, EASY])
    assert hard > easy + 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_win_rates_are_probabilities_and_one_prompt_is_a_batch_of_one(kind, planted, encoder):
    router, _ = train(kind, planted, encoder, seed=0)
    rates = router.win_rate([HARD, EASY, "", "unseen \ud800 words"])
    assert rates.dtype == np.float64
    assert ((rates >= 0) & (rates <= 1)).all()
    assert router.win_rate([EASY])[0] == pytest.approx(rates[1], abs=1e-6)
    assert router.win_rate([]).shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_battles_and_seed_give_the_same_router(kind, planted, encoder):
    one, _ = train(kind, planted, encoder, seed=3)
    two, _ = train(kind, planted, encoder, seed=3)
    for name, array in one.state()[0].items():
        assert array.tobytes() == two.state()[0][name].tobytes(), name
    assert one.state()[1] == two.state()[1]


@pytest.mark.parametrize("kind", KINDS)
def test_state_rebuilds_the_router(kind, planted, encoder):
    router, _ = train(kind, planted, encoder, seed=0)
    again = make_router(kind, encoder, router.pair)
    again.load_state(*router.state())
    again.platt = router.platt  # a bundle keeps it beside the state
    assert again.win_rate([HARD, EASY]) == pytest.approx(router.win_rate([HARD, EASY]), abs=1e-9)


def test_ranking_agrees_with_the_plain_refit(planted, encoder):
    router, _ = train("sw_ranking", planted, encoder, seed=0)
    queries = [HARD, EASY, "music winter", "tiger tiger hard"]
    vectors = encoder.encode(queries)
    refitted = [plain_refit(router, planted, v) for v in vectors]
    assert router.score(queries, vectors) == pytest.approx(refitted, abs=1e-6)


def test_an_unknown_kind_is_refused_by_name():
    with pytest.raises(UsageError, match=r"unknown router kind 'gpt'.*knn, mf, random, sw_ranking"):
        router_class("gpt")


def test_a_pair_that_never_met_is_refused(planted, encoder):
    from dataclasses import replace

    only_other = (planted.model_a == 0) ^ (planted.model_b == 0)
    alone = replace(
        planted,
        **{
            f: getattr(planted, f)[only_other & (planted.model_a + planted.model_b != 2)]
            for f in ("prompt", "model_a", "model_b", "preference_a", "weight", "label_kind",
                      "validation")
        },
        pair=Pair("strong", "weak"),
    )  # fmt: skip
    with pytest.raises(TrainingError, match="ingest battles of this pair"):
        train("knn", alone, encoder, seed=0)
