"""Promote, roll back, put in line, write down a verdict: what each move is.

Each gives a plan to `registry.moves.moved`, which makes it again if another process was faster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from registry.history import CHALLENGER, CHAMPION, Entry
from registry.moves import Now, Smoke, moved
from routellm.errors import RegistryError, UsageError

if TYPE_CHECKING:
    from registry.client import Registry, VersionInfo
    from registry.gate import Decision


def promote(
    registry: Registry,
    version: VersionInfo,
    decision: Decision | None,
    *,
    force_reason: str | None,
    expected: str | None,
    smoke: Smoke | None,
) -> Entry:
    """Make a version champion; see `Registry.promote`."""
    number = version.version
    if force_reason is None and (decision is None or decision.outcome != "promote"):
        why = decision.reason if decision else "no gate has looked at it"
        raise UsageError(
            f"version {number} was not promoted: {why}; to promote it all the same, give "
            "--force --reason"
        )

    reason = decision.reason if decision and force_reason is None else f"forced: {force_reason}"

    def plan(now: Now) -> Entry:
        if force_reason is None and (now.champion or "") != (expected or ""):
            raise RegistryError(
                f"the champion moved from {expected or 'none'} to {now.champion or 'none'} while "
                f"version {number} was being judged: promote it again"
            )
        _must_exist(registry, now, version)
        if now.champion == number:
            raise UsageError(f"version {number} is the champion already")
        return now.entry(
            "promote",
            number,
            number,
            reason=reason,
            forced=force_reason is not None,
            smoke_due=True,
            decision=decision.to_dict() if decision else None,
        )

    return moved(registry, plan, smoke)


def rollback(registry: Registry, to: str | None, *, smoke: Smoke | None) -> Entry:
    """Take the champion back to where it was; see `Registry.rollback`."""
    seen = registry.aliases().get(CHAMPION)

    def plan(now: Now) -> Entry:
        if to is not None:
            target = now.aliases.get(to, to)
            if target not in now.versions:
                raise UsageError(_gone(registry, now, target))
            if now.champion == target:
                raise UsageError(f"version {target} is the champion already")
        else:
            if now.champion != seen:
                raise RegistryError(
                    f"the champion moved from {seen or 'none'} to {now.champion or 'none'} in the "
                    "meantime: see `routellm status`, and roll back again if it is still wanted"
                )
            target = _one_before(registry, now)
        return now.entry("rollback", target, target, reason="rollback", smoke_due=True)

    return moved(registry, plan, smoke)


def set_challenger(registry: Registry, version: VersionInfo) -> Entry:
    """Put a version in line; see `Registry.set_challenger`."""

    def plan(now: Now) -> Entry:
        _must_exist(registry, now, version)
        if now.champion == version.version:
            raise UsageError(f"version {version.version} is the champion: it cannot challenge it")
        aliases = {CHALLENGER: version.version}
        return now.entry(
            "challenger", version.version, now.champion, reason="put in line", aliases=aliases
        )

    return moved(registry, plan, None)


def record(registry: Registry, version: VersionInfo, decision: Decision) -> Entry:
    """Write down that a version was not promoted; see `Registry.record`."""
    outcome = decision.outcome
    if outcome == "promote":
        raise UsageError(f"version {version.version} may be promoted: promote it instead")

    def plan(now: Now) -> Entry:
        _must_exist(registry, now, version)
        aliases: dict[str, str | None] = {}
        in_line = now.aliases.get(CHALLENGER) == version.version
        if outcome == "inconclusive" and not in_line and now.champion != version.version:
            aliases = {CHALLENGER: version.version}
        elif outcome == "reject" and in_line:
            aliases = {CHALLENGER: None}
        return now.entry(
            outcome,
            version.version,
            now.champion,
            reason=decision.reason,
            decision=decision.to_dict(),
            aliases=aliases,
        )

    return moved(registry, plan, None)


def _must_exist(registry: Registry, now: Now, version: VersionInfo) -> None:
    there = now.versions.get(version.version)
    if there is None or there.run_id != version.run_id:
        raise UsageError(_gone(registry, now, version.version))


def _gone(registry: Registry, now: Now, number: str) -> str:
    have = ", ".join(sorted(now.versions, key=int)) or "none"
    return f"{registry.model} has no version {number}, it may have been deleted: it has {have}"


def _one_before(registry: Registry, now: Now) -> str:
    before = now.standing.before
    if not before:
        raise UsageError(
            f"nothing to roll back to: {registry.model} has had no champion before this one; "
            "name a version with --to"
        )
    if before[0] not in now.versions:
        left = [v for v in before if v in now.versions]
        way = f"the one before it that is left is {left[0]}" if left else "none before it is left"
        raise UsageError(
            f"version {before[0]}, the champion before this one, was deleted from MLflow: {way}; "
            "name a version with --to"
        )
    return before[0]
