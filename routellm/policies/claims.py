"""Each policy's own headline claim, held against what was measured on our tables.

A claim *held* where the whole interval lies on its side, *failed* where it lies on the other, and
is *in doubt* where it lies across.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from routellm.evaluation.evaluate import Interval
from routellm.policies.measure import Measured


@dataclass(frozen=True)
class Claim:
    """What a paper says of its policy, as a figure that must be at least so much.

    Attributes
    ----------
    policy : str
        Beginning of the names of the policies that it is of.
    figure : str
        Of `Measured.figures`.
    least : float
    says : str
        In words, with the paper.
    """

    policy: str
    figure: str
    least: float
    says: str


CLAIMS = (
    Claim("mf on a pair", "saving_95", 0.5,
          "half the cost at 95 % of the strong model's quality (RouteLLM, abstract: over 2 times)"),
    Claim("gaussian_process on a pair", "saving_95", 0.5, "the same, of our own kind"),
    Claim("Hybrid-LLM", "cost_advantage_1", 0.2,
          "a fifth of the queries to the small model at 1 % less quality (abstract: up to 40 % "
          "fewer calls to the large one with no drop)"),
    Claim("FrugalGPT", "saving_100", 0.5,
          "half the cost at the best model's quality (abstract: up to 98 %)"),
    Claim("AutoMix", "delta_ibc", 0.0,
          "more quality for a dollar than the large model brings (abstract: up to 86 % more)"),
    Claim("LLM-Blender", "all_gain", 0.0,
          "the answer ranked first is better than the best single model's (section 5)"),
    Claim("best of n", "all_gain", 0.0,
          "choosing after generation is better than the best single model"),
    Claim("KNN over the pool", "aiq_gain", 0.0, "above blind mixing (RouterBench, section 5)"),
    Claim("MLP over the pool", "aiq_gain", 0.0, "above blind mixing (RouterBench, section 5)"),
    Claim("cascade, judge errs", "aiq_gain", 0.0,
          "above blind mixing while the judge errs seldom (RouterBench, section 5: up to 0.1)"),
)  # fmt: skip


@dataclass(frozen=True)
class Checked:
    """A claim beside what was measured of one policy on one table."""

    claim: Claim
    policy: str
    table: str
    measured: Interval
    simulated: bool

    @property
    def verdict(self) -> str:
        if self.measured.low >= self.claim.least and self.measured.value > self.claim.least:
            return "held"
        return "failed" if self.measured.high < self.claim.least else "in doubt"


def check(found: Sequence[Measured]) -> list[Checked]:
    """Return every claim on every table that its policy was measured on."""
    return [
        Checked(claim, one.policy, one.table, one.figures[claim.figure], one.simulated)
        for claim in CLAIMS
        for one in found
        if one.policy.startswith(claim.policy) and claim.figure in one.figures
    ]


def markdown(checked: Sequence[Checked]) -> str:
    """Return the claims as a table."""
    lines = ["| policy | claim | at least | table | measured | verdict |", "| --- " * 6 + "|"]
    lines += [
        f"| {one.policy}{' (SIMULATED)' if one.simulated else ''} | {one.claim.says} | "
        f"{one.claim.least:g} | {one.table} | {one.measured} | {one.verdict} |"
        for one in checked
    ]
    return "\n".join(lines) + "\n"
