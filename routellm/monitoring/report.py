"""Run the checks, remember what they found, and tell what has changed since."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from routellm.errors import RouteLLMError
from routellm.monitoring.budget import KeyBudgets, Spend, StrongFraction
from routellm.monitoring.drift import (
    CodeDrift,
    LanguageDrift,
    LengthDrift,
    NumberDrift,
    WinRateDrift,
)
from routellm.monitoring.finding import ORDER, Check, Finding, Outcome, Unknown
from routellm.monitoring.freshness import ChampionAge, SnapshotAge
from routellm.monitoring.gateways import GatewayHealth
from routellm.monitoring.seen import Champion, Seen
from routellm.snapshots import write_atomic

CHECKS: tuple[Check, ...] = (
    SnapshotAge(), ChampionAge(), WinRateDrift(), LengthDrift(), LanguageDrift(), CodeDrift(),
    NumberDrift(), StrongFraction(), Spend(), KeyBudgets(), GatewayHealth(),
)  # fmt: skip
_RETRAIN = {check.name for check in CHECKS if check.retrain}


@dataclass(frozen=True)
class Report:
    """What one look found.

    Attributes
    ----------
    champion : str or None
        The version that it was about.
    since : dict
        Check -> when its outcome became what it is.
    asked_for : str or None
        The champion's version for which a retraining was asked because of drift, last.
    """

    at: datetime
    champion: str | None
    findings: tuple[Finding, ...]
    since: dict[str, str]
    asked_for: str | None = None

    @property
    def outcome(self) -> Outcome:
        """The worst of all."""
        return min((one.outcome for one in self.findings), key=ORDER.index, default="unknown")

    @property
    def drifted(self) -> tuple[Finding, ...]:
        """What failed and a retraining would help."""
        return tuple(f for f in self.findings if f.outcome == "fail" and f.name in _RETRAIN)

    @property
    def wants_retraining(self) -> bool:
        """Whether a retraining is to be asked for: once for each champion."""
        return bool(self.drifted) and self.champion is not None and self.asked_for != self.champion

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return {
            "at": self.at.isoformat(timespec="seconds"),
            "outcome": self.outcome,
            "champion": self.champion,
            "checks": [{**asdict(f), "since": self.since[f.name]} for f in self.findings],
            "retraining_asked_for": self.asked_for,
        }

    @classmethod
    def from_dict(cls, doc: dict[str, Any]) -> Report:
        checks = doc["checks"]
        return cls(
            at=datetime.fromisoformat(doc["at"]),
            champion=doc["champion"],
            findings=tuple(
                Finding(**{k: v for k, v in one.items() if k != "since"}) for one in checks
            ),
            since={one["name"]: one["since"] for one in checks},
            asked_for=doc["retraining_asked_for"],
        )


def look(seen: Seen, before: Report | None = None, checks: Sequence[Check] = CHECKS) -> Report:
    """Run the checks; one that cannot be made says why and holds up none of the others.

    Parameters
    ----------
    before : Report, optional
        The look before this one.
    """
    findings = []
    for check in checks:
        try:
            findings.append(check.look(seen))
        except (Unknown, RouteLLMError) as why:
            findings.append(Finding(check.name, "unknown", detail=str(why)))
    at = seen.at.isoformat(timespec="seconds")
    was = {one.name: one.outcome for one in before.findings} if before else {}
    known = seen.champion_or_why
    return Report(
        at=seen.at,
        champion=known.version if isinstance(known, Champion) else None,
        findings=tuple(findings),
        since={
            one.name: before.since[one.name] if before and was.get(one.name) == one.outcome else at
            for one in findings
        },
        asked_for=before.asked_for if before else None,
    )


def changed(before: Report | None, after: Report) -> list[tuple[Outcome | None, Finding]]:
    """Return the findings whose outcome is another than before, with what it was.

    At the first look those that are wrong.
    """
    was = {one.name: one.outcome for one in before.findings} if before else {}
    return [
        (was.get(one.name), one)
        for one in after.findings
        if one.outcome != was.get(one.name) and (one.name in was or one.outcome in ("warn", "fail"))
    ]


def asked(report: Report) -> Report:
    """Return a report that remembers that a retraining was asked for."""
    return replace(report, asked_for=report.champion)


def read_report(home: Path) -> Report | None:
    """Return what the last look that was written down found; None if there is none.

    A file that is not one, as of another version of this software, counts as none.
    """
    try:
        return Report.from_dict(json.loads((home / "monitor.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_report(report: Report, home: Path) -> None:
    """Write a look down in ``<home>/monitor.json``."""
    write_atomic(home / "monitor.json", json.dumps(report.to_dict(), indent=1))


def markdown(report: Report) -> str:
    """Return a report as Markdown, the worst first."""
    marks = {"ok": "✓ ok", "warn": "! warn", "fail": "✗ **fail**", "unknown": "? unknown"}
    ordered = sorted(report.findings, key=lambda f: ORDER.index(f.outcome))
    counts = ", ".join(
        f"{n} {outcome}"
        for outcome in ORDER
        if (n := sum(f.outcome == outcome for f in report.findings))
    )
    lines = [
        f"**{counts}** at {report.at:%Y-%m-%d %H:%M} UTC; champion: "
        f"{'version ' + report.champion if report.champion else 'none known'}.",
        "",
        "| check | outcome | since | |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {f.name} | {marks[f.outcome]} | {report.since[f.name][:16].replace('T', ' ')} | "
        f"{f.detail.replace('|', '/')} |"
        for f in ordered
    ]
    return "\n".join(lines)
