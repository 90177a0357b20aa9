"""The gate: whether a candidate may take the champion's place."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from registry.checks import (
    Calibration,
    Canary,
    Check,
    CheckResult,
    Contamination,
    Latency,
    Reproduces,
    Snapshot,
)
from registry.comparisons import CostAtQuality, Gain, OtherBenchmarks, Slices
from routellm.settings import Settings

if TYPE_CHECKING:
    from registry.evidence import Evidence

__all__ = ["CheckResult", "Decision", "Gate", "Outcome"]

Outcome = Literal["promote", "reject", "inconclusive"]

# in the order that they are told in: the first that fails gives the reason
CHECKS: tuple[Check, ...] = (
    Gain(), OtherBenchmarks(), Slices(), CostAtQuality(), Calibration(), Contamination(),
    Snapshot(), Canary(), Reproduces(), Latency(),
)  # fmt: skip


@dataclass(frozen=True)
class Decision:
    """A verdict with its numbers.

    Attributes
    ----------
    reason : str
        One sentence, with the number that decided.
    numbers : dict
        ``benchmark``, ``candidate_apgr``, and with a champion ``champion_version``,
        ``champion_apgr`` and ``delta_apgr``, as far as they are known.
    checks : tuple of CheckResult
        Everything that was looked at; empty where the two could not be held against each other.
    """

    outcome: Outcome
    reason: str
    numbers: dict[str, Any] = field(default_factory=dict)
    checks: tuple[CheckResult, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "checks": [asdict(one) for one in self.checks]}

    @classmethod
    def from_dict(cls, doc: dict[str, Any]) -> Decision:
        """Read a decision; those from before checks were kept have none."""
        checks = tuple(CheckResult(**one) for one in doc.get("checks", ()))
        return cls(doc["outcome"], doc["reason"], dict(doc.get("numbers", {})), checks)


class Gate:
    """Promotes a candidate that is surely better than the champion and nowhere surely worse."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def decide(self, evidence: Evidence) -> Decision:
        """Return the verdict: any check that fails rejects, any that is unsure holds back.

        The checks that start a process are made last, and not at all once another has failed.
        """
        numbers = _numbers(evidence)
        settled = _settled(evidence)
        if settled:
            return Decision("reject", settled, numbers)
        checks: list[CheckResult] = []
        for check in (one for one in CHECKS if not one.slow):
            if check.compares and evidence.nothing_to_compare:
                checks.append(check.skipped(evidence.nothing_to_compare))
            else:
                checks.extend(check.run(evidence, self.settings))
        hopeless = any(one.outcome == "fail" for one in checks)
        for check in (one for one in CHECKS if one.slow):
            if hopeless:
                checks.append(check.skipped("another check has failed already"))
            else:
                checks.extend(check.run(evidence, self.settings))
        gain = next(one for one in checks if one.name == "delta_apgr")
        if gain.value is not None:
            numbers["delta_apgr"] = gain.value
        failed = [one for one in checks if one.outcome == "fail"]
        unsure = [one for one in checks if one.outcome == "unsure"]
        if failed:
            return Decision("reject", _reason(failed, "fails"), numbers, tuple(checks))
        if unsure:
            return Decision("inconclusive", _reason(unsure, "open"), numbers, tuple(checks))
        return Decision("promote", _promoted(evidence, numbers, gain), numbers, tuple(checks))


def _settled(evidence: Evidence) -> str:
    """Return why the candidate is rejected without any check; "" if it is not."""
    champion, candidate = evidence.champion, evidence.candidate
    if champion is None:
        return ""
    if champion.version == candidate.version:
        return f"version {candidate.version} is the champion"
    if candidate.simulated and not champion.simulated:
        return "a router trained on SIMULATED battles never replaces a real one"
    if champion.simulated == candidate.simulated and champion.pair != candidate.pair:
        return (
            f"the champion routes {'/'.join(champion.pair)}, the candidate "
            f"{'/'.join(candidate.pair)}: promote with --force to change the pair"
        )
    return ""


def _numbers(evidence: Evidence) -> dict[str, Any]:
    numbers: dict[str, Any] = {"benchmark": evidence.primary}
    if evidence.champion is not None:
        numbers["champion_version"] = evidence.champion.version
    paired = evidence.paired.get(evidence.primary)
    if paired is not None and paired.gap > 0:
        numbers["candidate_apgr"] = paired.apgr(paired.candidate)
        numbers["champion_apgr"] = paired.apgr(paired.champion)
    elif evidence.primary in evidence.apgr:
        numbers["candidate_apgr"] = evidence.apgr[evidence.primary]
    return numbers


def _reason(those: list[CheckResult], word: str) -> str:
    first, more = those[0], len(those) - 1
    figure = "" if first.value is None or first.low is None else f" {first.measured}"
    rest = f", and {more} more {'check' if more == 1 else 'checks'}" if more else ""
    return f"{first.name}{figure} {word}: {first.detail}{rest}"


def _promoted(evidence: Evidence, numbers: dict[str, Any], gain: CheckResult) -> str:
    measured = f"on {evidence.primary}"
    if "candidate_apgr" in numbers:
        measured = f"APGR {numbers['candidate_apgr']:.3f} {measured}"
    if evidence.nothing_to_compare:
        return f"{evidence.nothing_to_compare}; {measured}, random is 0.500"
    return (
        f"{measured} against {numbers['champion_apgr']:.3f} of version "
        f"{numbers['champion_version']}: {gain.measured}"
    )
