"""Bradley–Terry ratings from win counts, for one table or a whole batch, and tiers of models.

``wins[i, j]`` is the (weighted) number of times i was preferred to j, a tie counting half to
each side. Only these sums enter the likelihood, so a fit never needs the single battles.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from routellm.errors import TrainingError

Floats = NDArray[np.float64]

# One battle's worth of prior: negligible against thousands of battles, and it keeps the rating
# of a model that never lost (or never met anyone) finite.
RIDGE = 1.0
_TOLERANCE = 1e-11
_MAX_STEPS = 100


def sigmoid(x: Floats) -> Floats:
    """Logistic function, without overflow."""
    out: Floats = 0.5 * (1.0 + np.tanh(0.5 * x))
    return out


def win_table(
    model_a: NDArray[np.int64],
    model_b: NDArray[np.int64],
    preference_a: Floats,
    weight: Floats,
    n_models: int,
) -> Floats:
    """Return ``wins`` (m, m): weighted preferences of each model over each other."""
    size = n_models * n_models
    ab = np.bincount(model_a * n_models + model_b, weight * preference_a, size)
    ba = np.bincount(model_b * n_models + model_a, weight * (1.0 - preference_a), size)
    table: Floats = np.asarray(ab + ba, dtype=np.float64).reshape(n_models, n_models)
    return table


def fit_bradley_terry(wins: Floats, *, ridge: float = RIDGE) -> Floats:
    """Fit Bradley–Terry coefficients by damped Newton steps.

    Maximises ``sum_ij wins_ij log sigmoid(b_i - b_j) - ridge/2 |b|^2``, which is the weighted
    cross-entropy of the paper's section 4.1 (a tie being half a win each way).

    Parameters
    ----------
    wins : ndarray (..., t, t)
        Win counts; leading axes are independent problems solved together.
    ridge : float
        Strength of the zero-mean Gaussian prior, in battles.

    Returns
    -------
    ndarray (..., t)
        Coefficients on the natural-log scale, mean zero.
    """
    wins = np.asarray(wins, dtype=np.float64)
    t = wins.shape[-1]
    flat = wins.reshape(-1, t, t).copy()
    diagonal = np.arange(t)
    flat[:, diagonal, diagonal] = 0.0  # a model says nothing about itself
    games = flat + flat.transpose(0, 2, 1)
    beta = np.zeros((len(flat), t))
    value = _log_likelihood(flat, beta, ridge)
    open_ = np.arange(len(flat))  # problems that have not converged yet
    for _ in range(_MAX_STEPS):
        b, w, n = beta[open_], flat[open_], games[open_]
        p = sigmoid(b[:, :, None] - b[:, None, :])
        gradient = (w - n * p).sum(-1) - ridge * b
        curvature = n * p * (1.0 - p)
        hessian = -curvature
        hessian[:, diagonal, diagonal] = curvature.sum(-1) + ridge
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        scale = np.ones(len(open_))
        while True:  # halve the steps that overshoot; the problem is concave, so this ends
            trial = b + scale[:, None] * step
            reached = _log_likelihood(w, trial, ridge)
            worse = reached < value[open_] - 1e-9 * np.abs(value[open_])
            if not worse.any() or scale.min() < 1e-6:
                break
            scale[worse] *= 0.5
        beta[open_], value[open_] = trial, reached
        open_ = open_[np.abs(scale[:, None] * step).max(-1) > _TOLERANCE]
        if not len(open_):
            break
    out: Floats = beta.reshape(wins.shape[:-1])
    return out


def _log_likelihood(wins: Floats, beta: Floats, ridge: float) -> Floats:
    gap = beta[:, :, None] - beta[:, None, :]
    value: Floats = -(wins * np.logaddexp(0.0, -gap)).sum((1, 2)) - 0.5 * ridge * (beta**2).sum(-1)
    return value


def assign_tiers(
    ratings: Floats, n_tiers: int, *, apart: tuple[int, int] | None = None
) -> NDArray[np.int64]:
    """Cut models into tiers, best first, minimising the variance of ratings within tiers.

    Exact, by dynamic programming over the sorted ratings (the paper's section 4.2).

    Parameters
    ----------
    ratings : ndarray (m,)
    n_tiers : int
        Wanted number; fewer when there are fewer models.
    apart : (int, int), optional
        Two models that must not share a tier, as the pair to route between must not: if they
        would, their tier is cut half way between their ratings.

    Returns
    -------
    ndarray int64 (m,)
        Tier of each model, 0 the best.
    """
    m = len(ratings)
    if m == 0:
        raise TrainingError("no models to cut into tiers: the battles name none")
    k = min(n_tiers, m)
    order = np.argsort(-ratings, kind="stable")
    x = ratings[order]
    s1, s2 = np.r_[0.0, np.cumsum(x)], np.r_[0.0, np.cumsum(x * x)]
    first = np.arange(m)
    cost = np.full((k + 1, m + 1), np.inf)
    cost[0, 0] = 0.0
    cut = np.zeros((k + 1, m + 1), dtype=np.int64)
    for tiers in range(1, k + 1):
        for end in range(tiers, m + 1):
            start = first[tiers - 1 : end]
            within = s2[end] - s2[start] - (s1[end] - s1[start]) ** 2 / (end - start)
            total = cost[tiers - 1, start] + within
            best = int(np.argmin(total))
            cost[tiers, end], cut[tiers, end] = total[best], start[best]
    tier = np.zeros(m, dtype=np.int64)
    end = m
    for tiers in range(k, 0, -1):
        start_at = cut[tiers, end]
        tier[order[start_at:end]] = tiers - 1
        end = start_at
    if apart is not None and tier[apart[0]] == tier[apart[1]]:
        shared = tier[apart[0]]
        middle = (ratings[apart[0]] + ratings[apart[1]]) / 2.0
        lower = (tier == shared) & (ratings < middle)
        lower[min(apart, key=lambda i: ratings[i])] = True
        lower[max(apart, key=lambda i: ratings[i])] = False
        tier = np.where((tier > shared) | lower, tier + 1, tier)
    return tier
