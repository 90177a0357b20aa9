import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routellm.errors import BenchmarkError
from routellm.evaluation import bootstrap
from routellm.evaluation.bootstrap import paired_bootstrap
from routellm.evaluation.metrics import exact_curve


def drawn(clusters, n, resamples, seed):
    """The weights that the bootstrap draws from this seed, as long as none is drawn again."""
    rng, block = np.random.default_rng(seed), bootstrap.block_size(n)
    found = [bootstrap._resamples(clusters, block, rng) for _ in range(-(-resamples // block))]
    return np.concatenate(found, axis=1)[:, :resamples]


@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(30, 90),
    levels=st.sampled_from([1, 2, 5, 1000]),
    clustered=st.booleans(),
)
@pytest.mark.slow
def test_a_resample_measures_what_the_exact_curve_does(seed, n, levels, clustered):
    rng = np.random.default_rng(seed)
    strong, weak = rng.normal(3.0, 1.0, n), rng.normal(0.0, 1.0, n)  # every resample has a gap
    rates = [rng.integers(levels, size=n) / levels for _ in range(2)]
    cluster = np.arange(n) // 2 if clustered else np.arange(n)
    found = paired_bootstrap(
        rates, strong, weak, cluster, resamples=20, rng=np.random.default_rng(seed),
        cpts=(0.5, 0.8),
    )  # fmt: skip
    weights = drawn(cluster.max() + 1, n, 20, seed)[cluster]
    assert found.no_gap == 0.0
    for router, rate in enumerate(rates):
        for i in range(20):
            curve = exact_curve(rate, strong, weak, weights[:, i])
            assert found.apgr[router, i] == pytest.approx(curve.apgr(), abs=1e-9)
            for x, cpt in zip((0.5, 0.8), found.cpt[:, router, i], strict=True):
                assert cpt == pytest.approx(curve.cpt(x), abs=1e-9)


def test_both_routers_are_measured_on_the_same_resamples():
    rng = np.random.default_rng(0)
    rates, strong, weak = rng.random(200), rng.random(200) + 0.5, rng.random(200)
    found = paired_bootstrap([rates, rates], strong, weak, np.arange(200), resamples=2000, rng=rng)
    assert (found.apgr[0] == found.apgr[1]).all()
    assert found.apgr.shape == (2, 2000)
    assert found.apgr[0].std() > 0


def test_copies_of_a_prompt_in_one_cluster_add_no_certainty():
    rng = np.random.default_rng(0)
    strong, weak, rates = rng.random(100) + 0.3, rng.random(100), rng.random(100)
    spread = {}
    for name, times, cluster in (
        ("once", 1, np.arange(100)),
        ("as four prompts", 4, np.arange(400)),
        ("as four turns", 4, np.repeat(np.arange(100), 4)),
    ):
        arrays = (np.repeat(a, times) for a in (strong, weak, rates))
        s, w, r = arrays
        found = paired_bootstrap([r], s, w, cluster, resamples=4000, rng=rng)
        spread[name] = found.apgr.std()
    assert spread["as four turns"] == pytest.approx(spread["once"], rel=0.05)
    assert spread["as four prompts"] == pytest.approx(spread["once"] / 2, rel=0.05)


def test_resamples_without_a_gap_are_drawn_again():
    rng = np.random.default_rng(0)
    strong = (rng.random(100) < 0.55).astype(float)
    weak = (rng.random(100) < 0.5).astype(float)
    assert strong.mean() > weak.mean()
    found = paired_bootstrap(
        [rng.random(100)], strong, weak, np.arange(100), resamples=2000, rng=rng
    )
    assert found.apgr.shape == (1, 2000)
    assert np.isfinite(found.apgr).all()
    assert 0.01 < found.no_gap < 0.5


def test_where_strong_is_never_better_there_is_nothing_to_measure():
    with pytest.raises(BenchmarkError, match="hardly ever better"):
        paired_bootstrap(
            [np.arange(9.0)], np.zeros(9), np.ones(9), np.arange(9), resamples=50,
            rng=np.random.default_rng(0),
        )  # fmt: skip


def test_two_thousand_resamples_of_eight_thousand_prompts_take_seconds():
    rng = np.random.default_rng(0)
    n = 8000
    strong, weak = (rng.random(n) < 0.8).astype(float), (rng.random(n) < 0.6).astype(float)
    started = time.process_time()
    paired_bootstrap(
        [rng.random(n), rng.random(n)], strong, weak, np.arange(n), resamples=2000, rng=rng
    )
    assert time.process_time() - started < 5.0  # about half a second
