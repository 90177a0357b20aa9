"""Evidence for the gate without MLflow: two simulated routers on simulated prompts."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import numpy as np
from numpy.typing import NDArray

from registry.evidence import Evidence, Judged
from registry.paired import Paired
from registry.smoke import Smoke
from routellm.settings import PAPER_STRONG, PAPER_WEAK

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
GOOD = Smoke(True, None, 0.0, 10.0)


def simulated_pair(
    rng: np.random.Generator,
    n: int,
    skills: Sequence[float],
    *,
    shared: float = 0.6,
    sliced: bool = True,
) -> Paired:
    """Draw n prompts, two models' answers to them, and routers' win rates.

    A prompt has a difficulty, which both models' chances of a right answer fall with, weak's
    faster: strong is right on 0.83 of them and weak on 0.63, about as on GSM8K. A router sees
    the difficulty through noise.

    Parameters
    ----------
    skills : correlation of the champion's and the candidate's signal with difficulty; of several
        candidates, the best on these prompts is taken
    shared : part of their noise's variance that all have in common
    """
    difficulty = rng.normal(size=n)
    strong = rng.random(n) < 1.0 / (1.0 + np.exp(1.2 * difficulty - 2.2))
    weak = rng.random(n) < 1.0 / (1.0 + np.exp(1.6 * difficulty - 0.9))
    both = rng.normal(size=n)
    rates: list[NDArray[np.float64]] = []
    for skill in skills:
        noise = np.sqrt(shared) * both + np.sqrt(1.0 - shared) * rng.normal(size=n)
        signal = skill * difficulty + np.sqrt(1.0 - skill**2) * noise
        rates.append(1.0 / (1.0 + np.exp(0.3 - signal)))
    slices = {}
    if sliced:
        topics = 1.0 / (1.0 + np.arange(30)) ** 0.7  # thirty, from a fifth of all to a hundredth
        slices = {
            "length": rng.choice(["short", "medium", "long"], n, p=[0.12, 0.66, 0.22]),
            "code": rng.choice(["yes", "no"], n, p=[0.1, 0.9]),
            "category": rng.choice([f"c{i}" for i in range(30)], n, p=topics / topics.sum()),
        }
    pairs = [
        Paired(
            benchmark="mmlu",
            champion=rates[0],
            candidate=candidate,
            strong=strong.astype(np.float64),
            weak=weak.astype(np.float64),
            cluster=np.arange(n),
            slices=slices,
        )
        for candidate in rates[1:]
    ]
    return max(pairs, key=lambda one: one.apgr(one.candidate))


def judged(version: str, *, simulated: bool = False, strong: str = PAPER_STRONG) -> Judged:
    return Judged(version, strong, PAPER_WEAK, simulated)


def evidence(*paired: Paired, **changes: object) -> Evidence:
    """Evidence in which all is well but for what `changes` says; the first pair is primary."""
    facts: dict[str, object] = {
        "candidate": judged("2"),
        "champion": judged("1"),
        "primary": "mmlu",
        "load": lambda: GOOD,
        "at": NOW,
        "paired": {one.benchmark: one for one in paired},
        "apgr": {"mmlu": 0.6},
        "left_out": {one.benchmark: (len(one), 0) for one in paired} or {"mmlu": (2000, 0)},
        "calibration_error": 0.03,
        "contamination": "drop_evaluation",
        "snapshot_created_at": NOW - timedelta(days=1),
        "snapshot_validated": "true",
    }
    return Evidence(**(facts | changes))  # type: ignore[arg-type]
