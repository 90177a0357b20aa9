"""The gate: whether a candidate may take the champion's place."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class GateInput:
    """What the gate looks at of one version.

    Attributes
    ----------
    benchmark_digest : str
        Digest of the very prompts and scores that `apgr` was measured on.
    apgr : float
        Exact reading, on the primary benchmark.
    """

    version: str
    kind: str
    strong: str
    weak: str
    simulated: bool
    benchmark: str
    benchmark_digest: str
    apgr: float


@dataclass(frozen=True)
class Decision:
    """A verdict with its numbers."""

    outcome: Literal["promote", "reject", "inconclusive"]
    reason: str
    numbers: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Gate:
    """Promotes a candidate that does better than the champion on the same frozen prompts."""

    def decide(self, champion: GateInput | None, candidate: GateInput) -> Decision:
        """Return the verdict on `candidate` against `champion` (None if there is none)."""
        numbers: dict[str, Any] = {
            "benchmark": candidate.benchmark,
            "candidate_apgr": candidate.apgr,
        }
        measured = f"APGR {candidate.apgr:.3f} on {candidate.benchmark}"
        if champion is None:
            return Decision("promote", f"first version; {measured}, random is 0.500", numbers)
        numbers["champion_version"] = champion.version
        if champion.version == candidate.version:
            return Decision("reject", f"version {candidate.version} is the champion", numbers)
        if candidate.simulated and not champion.simulated:
            return Decision(
                "reject", "a router trained on SIMULATED battles never replaces a real one", numbers
            )
        if champion.simulated and not candidate.simulated:
            return Decision(
                "promote",
                f"the champion was trained on SIMULATED battles; {measured}, nothing to compare",
                numbers,
            )
        if (champion.strong, champion.weak) != (candidate.strong, candidate.weak):
            return Decision(
                "reject",
                f"the champion routes {champion.strong}/{champion.weak}, the candidate "
                f"{candidate.strong}/{candidate.weak}: promote with --force to change the pair",
                numbers,
            )
        if champion.benchmark_digest != candidate.benchmark_digest:
            return Decision(
                "inconclusive",
                "the benchmark changed since the champion was measured: both must be measured on "
                "the same prompts",
                numbers,
            )
        numbers |= {"champion_apgr": champion.apgr, "delta_apgr": candidate.apgr - champion.apgr}
        versus = f"{measured} against {champion.apgr:.3f} of version {champion.version}"
        if candidate.apgr > champion.apgr:
            return Decision("promote", versus, numbers)
        return Decision("reject", versus, numbers)
