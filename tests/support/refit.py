"""The plain refit that RouteLLM's code does for each query: a logistic regression over battles."""

from __future__ import annotations

import numpy as np


def plain_refit(router, battles, embedding):
    """Return the win rate of one query, refitting a logistic regression over all battles."""
    from scipy.optimize import minimize

    tier = np.array([router.tiers_[m] for m in battles.models])
    t = router.n_tiers_
    similarity = (battles.embeddings @ embedding).astype(np.float64)
    omega = router.options.gamma ** (1.0 + similarity / similarity.max())
    omega *= len(omega) / omega.sum()
    weight = omega[battles.prompt] * battles.weight
    a, b = tier[battles.model_a], tier[battles.model_b]
    y = battles.preference_a

    def loss(beta):
        gap = beta[a] - beta[b]
        value = (weight * (np.logaddexp(0, gap) - y * gap)).sum() + 0.5 * (beta @ beta)
        slope = weight * (1 / (1 + np.exp(-gap)) - y)
        gradient = np.bincount(a, slope, t) - np.bincount(b, slope, t) + beta
        return value, gradient

    found = minimize(
        loss,
        np.zeros(t),
        jac=True,
        method="L-BFGS-B",
        options={"ftol": 1e-16, "gtol": 1e-10, "maxiter": 5000, "maxcor": 20},
    ).x
    gap = found[router.tiers_[router.pair.strong]] - found[router.tiers_[router.pair.weak]]
    return 1 / (1 + np.exp(-gap))
