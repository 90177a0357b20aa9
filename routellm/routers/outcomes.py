"""The strong model's three outcomes, win, tie and loss, as targets, a loss and a win rate.

Fine-tuned kinds put a softmax over these. A preference becomes shares of them, and
``P(win) + P(tie) / 2`` is the win rate again, as everywhere in this package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routellm.routers.base import TrainingBattles, cross_entropy

OUTCOMES = ("win", "tie", "loss")  # of the strong model
MAX_CLASS_WEIGHT = 4.0


def outcome_targets(preference: NDArray[np.float64], tie_band: float = 0.0) -> NDArray[np.float64]:
    """Return P(win, tie, loss) of strong (n, 3) for P(strong preferred) (n,).

    Within `tie_band` of 0.5 is a tie. Beyond it a preference is shared by the two outcomes on
    either side, 1 a win, 0.5 a tie and 0 a loss, so that ``P(win) + P(tie) / 2`` gives it again.

    >>> outcome_targets(np.array([1.0, 0.8, 0.54, 0.1]), tie_band=0.05).round(2).tolist()
    [[1.0, 0.0, 0.0], [0.6, 0.4, 0.0], [0.0, 1.0, 0.0], [0.0, 0.2, 0.8]]
    """
    p = np.where(np.abs(preference - 0.5) <= tie_band + 1e-9, 0.5, preference)
    win, loss = np.maximum(2 * p - 1, 0.0), np.maximum(1 - 2 * p, 0.0)
    return np.stack([win, 1 - win - loss, loss], axis=1)


def outcome_loss(logits: Any, targets: NDArray[np.float64]) -> Any:
    """Return the sum of the cross-entropies of logits float32 (b, 3) against targets (b, 3).

    Targets may be weighted: a row's sum is how much it counts.
    """
    import torch

    return -(torch.from_numpy(targets).to(logits) * logits.log_softmax(dim=1)).sum()


def win_rates(
    logits: Callable[[NDArray[np.int64]], Any], lengths: Sequence[int], batch_size: int
) -> NDArray[np.float64]:
    """Return P(win) + P(tie) / 2 (n,) of prompts, computed in batches of like length.

    Parameters
    ----------
    logits : callable
        From rows (b,) to the outcomes' logits float32 (b, 3).
    lengths : sequence of int, length n
        Of the prompts, in any unit.
    """
    import torch

    out = np.empty(len(lengths), dtype=np.float64)
    # longest first: a batch is padded to its longest, and want of memory shows at once
    order = np.argsort([-n for n in lengths], kind="stable")
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            p = logits(some).double().softmax(dim=1).cpu().numpy()  # (b, 3)
            out[some] = p[:, 0] + p[:, 1] / 2
    return np.clip(out, 0.0, 1.0)


@dataclass(frozen=True)
class Examples:
    """Distinct prompts, and what the pair's battles on them say.

    Attributes
    ----------
    prompts : tuple of str, length u
    targets : ndarray float64 (u, 3)
        P(win, tie, loss), the weighted mean of the battles' own.
    weight : ndarray float64 (u,)
        Sum of the battles' weights.
    """

    prompts: tuple[str, ...]
    targets: NDArray[np.float64]
    weight: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        battles: TrainingBattles,
        rows: NDArray[np.int64],
        preference: NDArray[np.float64],
        *,
        tie_band: float = 0.0,
    ) -> Examples:
        """Merge battles (rows of `battles`, with P(strong preferred) of each) by prompt."""
        used, where = np.unique(battles.prompt[rows], return_inverse=True)
        weight = battles.weight[rows]
        sums = np.zeros((len(used), len(OUTCOMES)))
        np.add.at(sums, where, outcome_targets(preference, tie_band) * weight[:, None])
        total = np.bincount(where, weight, len(used)).astype(np.float64)
        targets = sums / np.maximum(total, 1e-12)[:, None]
        return cls(tuple(battles.prompts[i] for i in used), targets, total)


def class_weights(examples: Examples) -> NDArray[np.float64]:
    """Return how much each outcome counts (3,): in inverse proportion to its share, within bounds.

    An outcome with a third of the examples counts 1; none counts more than `MAX_CLASS_WEIGHT` or
    less than its inverse.
    """
    share = np.average(examples.targets, axis=0, weights=examples.weight)
    weights: NDArray[np.float64] = np.clip(
        1 / (len(OUTCOMES) * np.maximum(share, 1e-12)), 1 / MAX_CLASS_WEIGHT, MAX_CLASS_WEIGHT
    )
    return weights


@dataclass(frozen=True)
class Asked:
    """Validation battles, by the prompts that they are on.

    Attributes
    ----------
    prompts : tuple of str, length u
        Distinct prompts.
    prompt : ndarray int64 (n,)
        Row of each battle's prompt.
    preference : ndarray float64 (n,)
        P(strong preferred) of each battle.
    """

    prompts: tuple[str, ...]
    prompt: NDArray[np.int64]
    preference: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        battles: TrainingBattles,
        rows: NDArray[np.int64],
        preference: NDArray[np.float64],
        *,
        most: int | None = None,
        seed: int = 0,
    ) -> Asked:
        """Group rows of `battles`, with P(strong preferred) of each, by prompt.

        Of more than `most` prompts that many are drawn, by `seed`.
        """
        prompt = battles.prompt[rows]
        used = np.unique(prompt)
        if most is not None:
            used = np.sort(np.random.default_rng(seed).permutation(used)[:most])
        kept = np.isin(prompt, used)
        where = np.searchsorted(used, prompt[kept])
        return cls(tuple(battles.prompts[i] for i in used), where, preference[kept])

    def loss(self, score: Callable[[Sequence[str]], NDArray[np.float64]]) -> float:
        """Return the mean cross-entropy of a router's win rates on these battles."""
        return cross_entropy(score(self.prompts)[self.prompt], self.preference)
