"""Judge two registered versions for `promote`, from what was measured when they were trained."""

from __future__ import annotations

from registry.client import Registry, VersionInfo
from registry.gate import GateInput
from routellm.errors import UsageError
from routellm.evaluation.evaluate import Evaluation


def gate_inputs(
    registry: Registry, champion: VersionInfo | None, candidate: VersionInfo
) -> tuple[GateInput | None, GateInput]:
    """Return (champion, candidate) on the widest benchmark that both were measured on.

    Raises
    ------
    UsageError
        If they have no benchmark in common.
    """
    own = registry.evaluations(candidate)
    theirs = registry.evaluations(champion) if champion else own
    shared = [name for name in own if name in theirs]
    if champion is not None and champion.simulated != candidate.simulated:
        shared = list(own)
    if not shared:
        raise UsageError(
            f"versions {candidate.version} and {champion.version if champion else '-'} were "
            "measured on no common benchmark: retrain, or promote with --force --reason"
        )
    name = max(shared, key=lambda n: own[n].n)
    judged = None
    if champion is not None:
        judged = gate_input(champion, theirs.get(name) or next(iter(theirs.values())))
    return judged, gate_input(candidate, own[name])


def gate_input(version: VersionInfo, evaluation: Evaluation) -> GateInput:
    """Return what the gate looks at."""
    return GateInput(
        version=version.version,
        kind=version.kind,
        strong=evaluation.strong,
        weak=evaluation.weak,
        simulated=version.simulated,
        benchmark=evaluation.benchmark,
        benchmark_digest=evaluation.benchmark_digest,
        apgr=evaluation.exact.apgr.value,
    )
