"""The paper's own figures, to stand beside ours (Ong et al. 2024, tables 1 to 3).

Its routers read text-embedding-3-small or are fine-tuned BERT-base and Llama-3-8B, and train on
65,000 arena votes; ours train on what is at hand. Between the same two models, on the same
benchmarks, in its own reading of the curves (`metrics.paper_curve`).
"""

from __future__ import annotations

from dataclasses import dataclass

from routellm.routers.base import Pair
from routellm.settings import PAPER_STRONG, PAPER_WEAK

PAIR = Pair(PAPER_STRONG, PAPER_WEAK)


@dataclass(frozen=True)
class Published:
    """One row of a table: shares of strong calls in [0, 1], and APGR."""

    cpt50: float
    cpt80: float
    apgr: float


def _rows(*figures: tuple[float, float, float]) -> dict[str, Published]:
    kinds = ("bert", "causal_llm", "mf", "sw_ranking")
    return {
        kind: Published(cpt50 / 100, cpt80 / 100, apgr)
        for kind, (cpt50, cpt80, apgr) in zip(kinds, figures, strict=True)
    }


# by benchmark, labels beside the arena's votes, and router kind
PUBLISHED: dict[str, dict[str, dict[str, Published]]] = {
    "mmlu": {
        "none": _rows(
            (49.43, 77.80, 0.502), (48.88, 77.93, 0.499), (45.00, 76.86, 0.524),
            (55.82, 80.25, 0.473),
        ),
        "golden": _rows(
            (41.30, 72.20, 0.572), (35.49, 70.31, 0.600), (35.46, 71.40, 0.597),
            (35.40, 71.55, 0.603),
        ),
    },
    "gsm8k": {
        "none": _rows(
            (58.78, 83.84, 0.438), (56.09, 83.56, 0.461), (53.59, 85.24, 0.475),
            (54.43, 82.11, 0.475),
        ),
        "judge": _rows(
            (44.76, 79.09, 0.531), (33.64, 63.26, 0.622), (38.82, 72.62, 0.565),
            (41.21, 72.20, 0.568),
        ),
    },
    "mt_bench": {
        "none": _rows(
            (78.09, 87.64, 0.391), (28.82, 77.53, 0.573), (25.32, 74.26, 0.580),
            (37.85, 58.99, 0.610),
        ),
        "judge": _rows(
            (19.58, 34.02, 0.751), (31.50, 48.75, 0.679), (13.40, 31.31, 0.802),
            (23.21, 36.04, 0.759),
        ),
    },
}  # fmt: skip


def published(pair: Pair, benchmark: str, augmentation: str, kind: str) -> Published | None:
    """Return the paper's figures for a router, or None where it has none."""
    if pair != PAIR:
        return None
    return PUBLISHED.get(benchmark, {}).get(augmentation, {}).get(kind)


def best_published(pair: Pair, benchmark: str) -> tuple[str, str, Published] | None:
    """Return the kind and labels with the highest APGR that the paper has, and its figures."""
    if pair != PAIR:
        return None
    rows = [
        (kind, labels, row)
        for labels, kinds in PUBLISHED.get(benchmark, {}).items()
        for kind, row in kinds.items()
    ]
    return max(rows, key=lambda found: found[2].apgr, default=None)
