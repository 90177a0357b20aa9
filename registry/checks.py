"""What the gate holds a candidate to: each check a small class that measures one thing.

A check comes out as *pass*; *fail*, which rejects; *unsure*, which holds the candidate back until
there is more evidence; or *skipped*, which says why it could not be made and weighs nothing. Here
are those that look at the candidate alone; `registry.comparisons` holds it against the champion.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from routellm.calibration import chance_calibration_error
from routellm.settings import Settings

if TYPE_CHECKING:
    from registry.evidence import Evidence

Result = Literal["pass", "fail", "unsure", "skipped"]


@dataclass(frozen=True)
class CheckResult:
    """What a check found.

    Attributes
    ----------
    name : str
    outcome : str
    value : float or None
        What was measured.
    low, high : float or None
        Its interval, where it has one.
    threshold : float or None
        What it was held to.
    n : int or None
        Prompts, or requests, that it was measured on.
    detail : str
        One plain phrase; of what was skipped, why.
    """

    name: str
    outcome: Result
    value: float | None = None
    low: float | None = None
    high: float | None = None
    threshold: float | None = None
    n: int | None = None
    detail: str = ""

    @property
    def measured(self) -> str:
        """What was measured, with its interval, for a table; "" if nothing was."""
        if self.value is None:
            return ""
        if self.low is None or self.high is None:
            return f"{self.value:.4g}"
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    @property
    def limit(self) -> str:
        """What it was held to, for a table."""
        return "" if self.threshold is None else f"{self.threshold:g}"


class Check(ABC):
    """One thing that a candidate is held to.

    Attributes
    ----------
    name : str
    compares : bool
        Whether it needs a champion to compare with.
    slow : bool
        Whether it starts a process, and is left out once another check has failed.
    """

    name: ClassVar[str]
    compares: ClassVar[bool] = False
    slow: ClassVar[bool] = False

    @abstractmethod
    def run(self, evidence: Evidence, settings: Settings) -> Iterator[CheckResult]:
        """Yield what it finds; most checks find one thing."""

    def skipped(self, why: str) -> CheckResult:
        return CheckResult(self.name, "skipped", detail=why)


class Calibration(Check):
    """Win rates stand for the shares that they name, but for what few battles leave to chance."""

    name = "calibration"

    def run(self, evidence: Evidence, settings: Settings) -> Iterator[CheckResult]:
        value, limit = evidence.calibration_error, settings.promotion.max_calibration_error
        if value is None:
            yield self.skipped("it was not measured: there were too few validation battles")
            return
        n = evidence.calibration_n
        chance = chance_calibration_error(n)
        good = value - chance <= limit
        by_chance = f", of which chance gives {chance:.3f}" if n else ""
        yield CheckResult(
            self.name, "pass" if good else "fail", value, threshold=limit, n=n or None,
            detail=f"expected calibration error {value:.3f}{by_chance}: "
            f"{'within' if good else 'above'} {limit:g}",
        )  # fmt: skip


class Contamination(Check):
    """The prompts measured on were compared with training, and most of them are left.

    Each version's own predictions are on the prompts that its training had not seen, and the
    comparison is on those that both have; a champion that was measured again may have seen some,
    which is to its own advantage.
    """

    name = "contamination"

    def run(self, evidence: Evidence, settings: Settings) -> Iterator[CheckResult]:
        limit = settings.promotion.max_excluded_share
        if evidence.contamination is None:
            why = "its retraining has not logged that prompts were compared with training"
            yield CheckResult(self.name, "unsure", threshold=limit, detail=why)
            return
        if evidence.primary not in evidence.left_out:
            why = f"no evaluation on {evidence.primary} is logged"
            yield CheckResult(self.name, "unsure", threshold=limit, detail=why)
            return
        value = evidence.share_left_out(evidence.primary)
        n = evidence.left_out[evidence.primary][0]
        detail = f"{value:.1%} of {evidence.primary} left out as seen in training"
        outcome: Result = "pass" if value <= limit else "fail"
        yield CheckResult(self.name, outcome, value, threshold=limit, n=n, detail=detail)


class Snapshot(Check):
    """The battles that the candidate was trained on were validated, and are fresh."""

    name = "snapshot"

    def run(self, evidence: Evidence, settings: Settings) -> Iterator[CheckResult]:
        limit = settings.promotion.max_snapshot_age_days
        created, validated = evidence.snapshot_created_at, evidence.snapshot_validated
        age = None if created is None else (evidence.at - created).total_seconds() / 86_400
        outcome: Result = "pass"
        if validated == "false":
            outcome, detail = "fail", "it did not pass validation"
        elif age is None or validated != "true":
            lacking = "when it was made" if age is None else "whether it was validated"
            outcome, detail = "unsure", f"the version does not say {lacking}"
        elif age > limit:
            outcome, detail = "fail", f"validated, but {age:.1f} days old: retrain"
        else:
            detail = f"validated, {age:.1f} days old"
        yield CheckResult(self.name, outcome, age, threshold=limit, detail=detail)


class Canary(Check):
    """What the gateways saw of the candidate while it was challenger."""

    name = "canary"

    def run(self, evidence: Evidence, settings: Settings) -> Iterator[CheckResult]:
        seen, how = evidence.online, settings.promotion
        if seen is None:
            yield self.skipped("it has not run online as challenger")
            return
        limit, wanted = how.max_canary_error_share, how.min_canary_requests
        share = seen.failures / seen.requests if seen.requests else 0.0
        said = f"{seen.failures:,} of {seen.requests:,} requests failed"
        outcome: Result = "pass"
        if seen.failures > limit * max(seen.requests, wanted):  # too many, were no more to come
            outcome = "fail"
        elif seen.requests < wanted:
            outcome, said = "unsure", f"{said}; {wanted:,} are wanted"
        if seen.strong_fraction is not None and seen.asked_fraction is not None:
            said += (
                f"; strong for {seen.strong_fraction:.0%} where {seen.asked_fraction:.0%} was asked"
            )
        yield CheckResult(self.name, outcome, share, threshold=limit, n=seen.requests, detail=said)


class Reproduces(Check):
    """The version loads from the registry in a clean process and answers as it was logged."""

    name = "reproduces"
    slow = True

    def run(self, evidence: Evidence, settings: Settings) -> Iterator[CheckResult]:
        found = evidence.smoked
        detail = found.why or "it loads in a clean process and gives its golden predictions"
        yield CheckResult(self.name, "pass" if found.ok else "fail", found.worst, detail=detail)


class Latency(Check):
    """One query is answered in time, as measured in that same process."""

    name = "latency"
    slow = True

    def run(self, evidence: Evidence, settings: Settings) -> Iterator[CheckResult]:
        value, limit = evidence.smoked.latency_ms, settings.promotion.max_latency_ms
        if value is None:
            yield self.skipped("it did not answer")
            return
        detail = f"{value:.1f} ms for one query, encoder included"
        yield CheckResult(
            self.name, "pass" if value <= limit else "fail", value, threshold=limit, detail=detail
        )
