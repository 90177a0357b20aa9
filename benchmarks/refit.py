"""``sw_ranking`` against what it replaces: a logistic regression over all battles for each query.

SIMULATED battles: random ones between random models. Both answer the same queries in one process,
so that the ratio holds on a busy machine as well.
"""

from __future__ import annotations

import time

import numpy as np

PROMPTS, DIMENSIONS, MODELS = 25_000, 384, 60
QUERIES, REFITS = 64, 5


def measure(battles: int = 50_000) -> list[tuple[str, str]]:
    """Return the table's rows."""
    from sklearn.linear_model import LogisticRegression

    from routellm.routers.base import Pair, TrainingBattles
    from routellm.routers.sw_ranking import SWRankingRouter

    rng = np.random.default_rng(0)
    u, m = PROMPTS, MODELS
    vectors = rng.normal(size=(u, DIMENSIONS)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    a, b = rng.integers(m, size=(2, battles))
    b = np.where(a == b, (b + 1) % m, b)
    skill = np.linspace(1, -1, m)
    won = (rng.random(battles) < 1 / (1 + np.exp(skill[b] - skill[a]))).astype(float)
    data = TrainingBattles(
        prompts=tuple(str(i) for i in range(u)), embeddings=vectors,
        prompt=rng.integers(u, size=battles), models=tuple(f"m{i:02d}" for i in range(m)),
        model_a=a, model_b=b, preference_a=won, weight=np.ones(battles),
        label_kind=np.full(battles, "human"), validation=np.zeros(battles, bool),
        pair=Pair("m02", "m30"),
    )  # fmt: skip
    router = SWRankingRouter(None, data.pair)  # type: ignore[arg-type]
    router.fit(data, rng=rng)
    queries = vectors[:QUERIES]
    router.score([], queries[:2])
    started = time.perf_counter()
    fast = router.score([], queries)
    ours_ms = (time.perf_counter() - started) / len(queries) * 1000

    tier = np.array([router.tiers_[name] for name in data.models])
    rows = np.arange(battles)
    x = np.zeros((battles, router.n_tiers_))
    np.add.at(x, (rows, tier[a]), 1.0)
    np.add.at(x, (rows, tier[b]), -1.0)
    x = np.concatenate([x, -x])  # as RouteLLM's code: every battle twice
    y = np.concatenate([won, 1 - won])
    slow, started = [], time.perf_counter()
    for q in queries[:REFITS]:
        similarity = (vectors @ q).astype(np.float64)
        omega = 10.0 ** (1.0 + similarity / similarity.max())
        omega *= len(omega) / omega.sum()
        w = np.concatenate([omega[data.prompt]] * 2) / 2
        beta = (
            LogisticRegression(C=1.0, fit_intercept=False, tol=1e-8, max_iter=1000)
            .fit(x, y, sample_weight=w)
            .coef_[0]
        )
        gap = beta[tier[2]] - beta[tier[30]]
        slow.append(1 / (1 + np.exp(-gap)))
    refit_ms = (time.perf_counter() - started) / len(slow) * 1000
    return [
        (f"sw_ranking, {battles:,} battles: ours", f"{ours_ms:.2f} ms a query, batch of {QUERIES}"),
        ("  plain refit of a logistic regression", f"{refit_ms:.0f} ms a query"),
        ("  ours is faster (limit 30x)", f"{refit_ms / ours_ms:.0f}x"),
        ("  largest difference in win rate", f"{np.abs(fast[: len(slow)] - slow).max():.1e}"),
    ]
