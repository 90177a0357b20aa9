"""The last step of a retraining: the gate judges, and the alias moves or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flows.announce import announced
from flows.trained import Measured
from registry import Decision, Gate, Registry, VersionInfo
from registry.evidence import gather
from registry.figures import mean_apgr
from registry.history import CHALLENGER
from registry.online import forget_deleted


def promote_best(measured: Sequence[Measured], primary: str, registry: Registry) -> Decision:
    """Let the gate judge the best router of this retraining, and move the alias if it may.

    The best is the one with the highest mean APGR over the benchmarks; the gate then holds it
    against the champion on the same prompts. A version that is in line is looked at again before:
    it may have seen more traffic. `registry.notices` says what a killed promotion had left and was
    mended, and who could not be told.
    """
    routers = (m for m in measured if m.kind != "random")
    best = max(routers, key=lambda m: mean_apgr(m.evaluations), default=None)
    if best is None:
        why = "only the random router was trained: there is nothing to promote"
        decision = Decision("reject", why)
        if not any(e.version == measured[0].version.version for e in registry.history()):
            registry.record(measured[0].version, decision)
        return decision
    forget_deleted(registry.settings, [v.version for v in registry.versions()])
    with announced(registry):
        registry.repair()
        _look_again_at_challenger(best.version, primary, registry)
        champion = registry.champion()
        before = _decided(registry, champion, best.version)
        if before is not None:
            return before
        decision = Gate(registry.settings).decide(
            gather(registry, champion, best.version, primary=primary)
        )
        if decision.outcome == "promote":
            expected = champion.version if champion else None
            registry.promote(best.version, decision, expected=expected)
        else:
            registry.record(best.version, decision)
    return decision


def promote_version(version: VersionInfo, registry: Registry) -> Decision:
    """Let the gate judge one version by what there is to go by now, and move the alias if it may.

    `registry.notices` as in `promote_best`.
    """
    with announced(registry):
        registry.repair()
        champion = registry.champion()
        if champion is not None and champion.version == version.version:
            return Decision("reject", f"version {version.version} is the champion")
        decision = Gate(registry.settings).decide(gather(registry, champion, version))
        if decision.outcome == "promote":
            expected = champion.version if champion else None
            registry.promote(version, decision, expected=expected)
        else:
            registry.record(version, decision)
    return decision


def _look_again_at_challenger(best: VersionInfo, primary: str, registry: Registry) -> None:
    """Judge the version in line by what there is to go by now.

    Nothing is written down while the verdict is still inconclusive.
    """
    champion = registry.champion()
    waiting = next((v for v in registry.versions() if CHALLENGER in v.aliases), None)
    if waiting is None or champion is None or waiting.version in (best.version, champion.version):
        return
    decision = Gate(registry.settings).decide(gather(registry, champion, waiting, primary=primary))
    if decision.outcome == "promote":
        registry.promote(waiting, decision, expected=champion.version)
    elif decision.outcome == "reject":
        registry.record(waiting, decision)


def _decided(
    registry: Registry, champion: VersionInfo | None, candidate: VersionInfo
) -> Decision | None:
    """Return what needs no gate: it is champion already, or was rejected against this champion.

    A verdict that was inconclusive is sought again: there may be more evidence now.
    """
    if champion is None:
        return None
    if champion.version == candidate.version:
        return Decision("reject", f"version {champion.version} is the champion")
    for entry in reversed(registry.history()):
        if entry.version != candidate.version or entry.decision is None:
            continue
        if entry.action == "reject" and entry.from_ == champion.version:
            said = Decision.from_dict(dict(entry.decision))
            return replace(said, reason=f"{said.reason} (decided before, at {entry.at})")
        return None
    return None
