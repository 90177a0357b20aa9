"""What the gate decides on: both versions' answers to the same prompts, and the rest of the record.

Predictions that were logged with the versions are joined. Where that cannot be, because the
benchmark has changed since the champion was measured or because a version is older than
predictions are, the version's router answers the candidate's evaluation set now; its answers are
kept on its run, so that this is done once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property

from registry.calls import said
from registry.client import Registry, VersionInfo
from registry.logged import Incomparable, Logged, or_none
from registry.online import Online, online
from registry.paired import Paired, joined
from registry.smoke import Smoke, smoke
from routellm.errors import UsageError
from routellm.evaluation.evaluate import Evaluation


@dataclass(frozen=True)
class Judged:
    """A version that is looked at."""

    version: str
    strong: str
    weak: str
    simulated: bool

    @property
    def pair(self) -> tuple[str, str]:
        return self.strong, self.weak


@dataclass(frozen=True)
class Evidence:
    """All that the gate looks at.

    Attributes
    ----------
    champion : Judged or None
    gone : str or None
        The version that was champion and is no longer there, where there is none.
    primary : str
        Benchmark on which the candidate must be better.
    paired : dict
        Both versions' answers, by benchmark.
    missing : dict
        Why they cannot be compared, by benchmark.
    apgr : dict
        The candidate's APGR when it was trained, by benchmark.
    left_out : dict
        The candidate's prompts (measured on, left out as seen in training), by benchmark.
    contamination : str or None
        How its retraining kept training and evaluation apart; None if it has not logged it.
    snapshot_validated : str or None
        ``true`` or ``false``, as logged.
    chosen_among : int
        Versions that were trained on the candidate's battles for its pair, itself one of them: who
        takes the best of several by the very prompts of the comparison is favoured by chance.
    load : callable
        Loads the candidate in a clean process and asks it; takes seconds.
    at : datetime
        When this was gathered.
    """

    candidate: Judged
    champion: Judged | None
    primary: str
    load: Callable[[], Smoke]
    at: datetime
    gone: str | None = None
    paired: dict[str, Paired] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    apgr: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, tuple[int, int]] = field(default_factory=dict)
    calibration_error: float | None = None
    calibration_n: int = 0
    contamination: str | None = None
    snapshot_created_at: datetime | None = None
    snapshot_validated: str | None = None
    chosen_among: int = 1
    online: Online | None = None

    @property
    def nothing_to_compare(self) -> str:
        """Why there is no champion to be held against; "" if there is one."""
        if self.champion is not None:
            simulated = self.champion.simulated and not self.candidate.simulated
            return "the champion was trained on SIMULATED battles" if simulated else ""
        if self.gone is not None:
            return f"no champion: version {self.gone}, or its alias, was deleted"
        return "first version"

    @cached_property
    def smoked(self) -> Smoke:
        """What came of loading and asking the candidate, done at the first look."""
        return self.load()

    def why_not(self, benchmark: str) -> str:
        """Return why the versions cannot be compared on a benchmark."""
        return self.missing.get(benchmark, f"the candidate was not measured on {benchmark}")

    def share_left_out(self, benchmark: str) -> float:
        """Return the share of a benchmark's prompts that were left out; 0 if it is not known."""
        kept, out = self.left_out.get(benchmark, (1, 0))
        return out / (kept + out)


def gather(
    registry: Registry,
    champion: VersionInfo | None,
    candidate: VersionInfo,
    *,
    primary: str | None = None,
) -> Evidence:
    """Gather what the gate needs to judge a candidate.

    Parameters
    ----------
    champion : VersionInfo or None
        The version to hold it against; None if there is none.
    primary : str, optional
        Benchmark to be better on; by default `evaluation.primary`, where ``auto`` is the widest
        that the candidate was measured on.

    Raises
    ------
    UsageError
        If the candidate is not a version of this registered model.
    RegistryError
        If MLflow does not answer.
    """
    settings = registry.settings
    if not _is_ours(registry, candidate):
        raise UsageError(
            f"version {candidate.version} (run {candidate.run_id}) is not a version of "
            f"{registry.model}: give a version or alias of {registry.model}"
        )
    gone = None
    if champion is None:
        gone = registry.state().get("version")
    elif not _is_ours(registry, champion):
        gone, champion = champion.version, None
    run = Logged(registry, candidate)
    evaluations = run.evaluations()
    primary = primary or _primary(settings.evaluation.primary, evaluations)
    evidence = Evidence(
        candidate=_judged(candidate),
        champion=None if champion is None else _judged(champion),
        primary=primary,
        load=lambda: smoke(settings, f"models:/{registry.model}/{candidate.version}"),
        at=datetime.now(UTC),
        gone=None if gone is None else str(gone),
        apgr={name: one.exact.apgr.value for name, one in evaluations.items()},
        left_out={name: (one.n, one.excluded) for name, one in evaluations.items()},
        calibration_error=run.metrics.get("calibration_ece_after"),
        calibration_n=int(run.metrics.get("calibration_n", 0)),
        contamination=run.parent_params.get("contamination"),
        snapshot_created_at=_utc(candidate.tags.get("snapshot_created_at")),
        snapshot_validated=candidate.tags.get("snapshot_validated"),
        chosen_among=_chosen_among(registry, candidate),
        online=online(settings, candidate.version),
    )
    if champion is not None and _comparable(evidence):
        other = Logged(registry, champion)
        for name in dict.fromkeys([primary, *evaluations, *other.evaluations()]):
            try:
                if name != primary and name not in evaluations:
                    raise Incomparable("the candidate was not measured on it")
                evidence.paired[name] = _compared(other, run, name)
            except Incomparable as why:
                evidence.missing[name] = str(why)
    return evidence


def _judged(info: VersionInfo) -> Judged:
    tags = info.tags
    return Judged(info.version, tags.get("strong", ""), tags.get("weak", ""), info.simulated)


def _comparable(evidence: Evidence) -> bool:
    """Whether the gate would look at a comparison at all."""
    one, other = evidence.champion, evidence.candidate
    return (
        one is not None
        and one.version != other.version
        and one.simulated == other.simulated
        and one.pair == other.pair
    )


def _is_ours(registry: Registry, info: VersionInfo) -> bool:
    """Whether a version is (still) one of the registered model."""
    with said(registry.settings):
        found = or_none(lambda: registry.client.get_model_version(registry.model, info.version))
    return found is not None and found.run_id == info.run_id


def _chosen_among(registry: Registry, candidate: VersionInfo) -> int:
    def what(info: VersionInfo) -> tuple[str | None, ...]:
        return tuple(info.tags.get(name) for name in ("snapshot", "strong", "weak"))

    alike = (v for v in registry.versions() if what(v) == what(candidate))
    return max(1, sum(v.kind != "random" for v in alike))  # `random` is there to be compared with


def _primary(asked: str, evaluations: dict[str, Evaluation]) -> str:
    if asked != "auto":
        return asked
    size = {name: one.n + one.excluded for name, one in evaluations.items() if name != "heldout"}
    return max(size, key=lambda name: size[name], default="heldout")


def _compared(champion: Logged, candidate: Logged, name: str) -> Paired:
    """Return both versions' answers on a benchmark, measuring again where that is needed."""
    notes = []
    own = candidate.predictions(name)
    if own is None:
        own = candidate.measured_again(candidate.evaluation_set(name))
        notes.append("the candidate was measured again: it has no predictions of its own")
    theirs = champion.predictions(name)
    paired = None if theirs is None else joined(theirs, own)
    if paired is None:
        why = "it has no predictions of its own" if theirs is None else "the benchmark has changed"
        theirs = champion.measured_again(candidate.evaluation_set(name))
        notes.append(f"the champion was measured again: {why}")
        paired = joined(theirs, own)
    if paired is None:
        raise Incomparable(
            f"the evaluation set of {name} is not what version {candidate.info.version} was "
            "measured on: retrain, or promote with --force --reason"
        )
    return replace(paired, note="; ".join(notes))


def _utc(text: str | None) -> datetime | None:
    """Return a time as logged, or None if it is missing or not one in a known zone."""
    try:
        when = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return when if when.tzinfo is not None else None
