"""What MLflow holds and nobody needs any more, and how it goes: `routellm compact`.

A version stays while an alias points at it, while it is among the newest, and while the history
speaks of it and is young. With a version that goes, its run, its model and its artifacts go; so do
old runs of trials, and a retraining's own run once no run inside it is left. A run that a killed
process left RUNNING is ended. The history stays: its entries are versions of another registered
model, and each holds its whole decision.

Versions are removed as a move is made (`registry.moves`): an entry of the history says so first,
and while it is not finished nobody moves an alias. So a version cannot be promoted while it is
being removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from registry import moves
from registry.at_work import end_left
from registry.calls import said
from registry.client import Registry, VersionInfo
from registry.history import Entry, replay
from registry.moves import Now
from registry.old_runs import delete_model, delete_run, plan_runs
from registry.online import forget_deleted
from routellm.retention import (
    Removal,
    plan_leftovers,
    plan_snapshots,
    remove_leftovers,
    snapshots_to_keep,
    stores,
)

_AT_ONCE = 50  # versions that one entry of the history removes: well within a lease
_JUDGING = timedelta(days=1)  # a version this young may be about to be promoted

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """What goes, decided before anything does."""

    removals: tuple[Removal, ...]
    kept: dict[str, str]  # version -> why
    at: datetime

    def of(self, *what: str) -> list[Removal]:
        return [one for one in self.removals if one.what in what]

    @property
    def size_bytes(self) -> int:
        """What it frees, as far as that is known."""
        return sum(one.size_bytes or 0 for one in self.removals)


def plan(registry: Registry, now: datetime | None = None) -> Plan:
    """Decide what goes; changes nothing.

    Raises
    ------
    RegistryError
        If MLflow does not answer, or its history was tampered with: what is live is not known then.
    SnapshotError
        If a snapshot's manifest cannot be read.
    """
    now = now or datetime.now(UTC)
    settings = registry.settings
    versions = registry.versions()
    kept = versions_to_keep(registry, versions, now)
    going = [v for v in versions if v.version not in kept]
    why = "no alias points at it, it is old, and so is what the history says of it"
    found = [Removal("version", v.version, f"{v.kind}, {v.created_at[:10]}: {why}") for v in going]
    found += plan_runs(registry, versions, kept, now)
    named = _named_snapshots(registry, [v for v in versions if v.version in kept], now)
    for store in stores(settings):
        found += plan_snapshots(store, named, settings, now)
    return Plan((*found, *plan_leftovers(settings, now)), kept, now)


def carry_out(decided: Plan, registry: Registry, progress: Progress | None = None) -> list[str]:
    """Remove what was decided, but for what has come to be needed since.

    Versions go first, then what only they needed; killed anywhere, the next compaction goes on.

    Returns
    -------
    list of str
        Versions that were removed.

    Raises
    ------
    RegistryError, SnapshotError
        If MLflow or the disk fails; what is removed by then is removed whole.
    """
    settings, now = registry.settings, decided.at
    removed = _retire(registry, [one.name for one in decided.of("version")], now)
    works = decided.of("model", "run")
    for done, one in enumerate(works, 1):
        (delete_model if one.what == "model" else delete_run)(registry, one.name)
        if progress:
            progress(done, len(works))
    left = end_left(registry, now - timedelta(days=settings.retention.run_days))
    if left:
        told = "run was" if len(left) == 1 else "runs were"
        registry.notices.append(
            f"{len(left)} {told} still called running in MLflow, and nobody works on "
            f"{'it' if len(left) == 1 else 'them'}: ended as killed"
        )
    versions = registry.versions()
    forget_deleted(settings, {v.version for v in versions})
    named = _named_snapshots(registry, versions, now)
    for store in stores(settings):
        keep = snapshots_to_keep(store, named, settings, now)
        wanted = {one.name for one in decided.of("snapshot")} - set(keep)
        if store.directory.is_dir():
            store.remove(wanted)
    remove_leftovers(decided.of("quarantine", "leftover"), settings, now)
    return removed


# --- versions -------------------------------------------------------------------------------------


def versions_to_keep(
    registry: Registry, versions: Sequence[VersionInfo], now: datetime
) -> dict[str, str]:
    """Return the versions that stay, with why.

    Raises
    ------
    RegistryError
        If the history cannot be read.
    """
    how = registry.settings.retention
    keep: dict[str, str] = {}
    for info in versions:
        if info.aliases:
            keep[info.version] = ", ".join(info.aliases)
    for info in versions[: how.versions]:
        keep.setdefault(info.version, "among the newest")
    history = registry.history()
    for before in replay(history).before[:1]:
        keep.setdefault(before, "where a rollback goes")
    for entry in _young(history, now - timedelta(days=how.snapshot_days)):
        for number in (entry.version, entry.from_, entry.to, *entry.aliases.values()):
            if number is not None:
                keep.setdefault(number, f"in the history of {entry.at[:10]}")
    for info in versions:
        if datetime.fromisoformat(info.created_at) > now - _JUDGING:
            keep.setdefault(info.version, "new")
    there = {info.version for info in versions}
    return {number: why for number, why in keep.items() if number in there}


def _named_snapshots(
    registry: Registry, kept: Iterable[VersionInfo], now: datetime
) -> dict[str, str]:
    """Return the snapshots that a version that stays, or the young history, names."""
    since = now - timedelta(days=registry.settings.retention.snapshot_days)
    named = {
        entry.snapshot: f"in the history of {entry.at[:10]}"
        for entry in _young(registry.history(), since)
        if entry.snapshot
    }
    return named | {
        v.tags["snapshot"]: f"version {v.version}" for v in kept if "snapshot" in v.tags
    }


def _young(entries: Iterable[Entry], since: datetime) -> list[Entry]:
    return [e for e in entries if not e.applied or datetime.fromisoformat(e.at) > since]


def _retire(registry: Registry, numbers: Sequence[str], at: datetime) -> list[str]:
    """Remove versions, each unless it has come to be needed; returns which are gone."""
    gone: list[str] = []
    left = list(numbers)
    while left:
        some, left = left[:_AT_ONCE], left[_AT_ONCE:]
        wanted: list[str] = []

        def retire(now: Now, some: list[str] = some, wanted: list[str] = wanted) -> Entry | None:
            infos = sorted(now.versions.values(), key=lambda v: -int(v.version))
            keep = versions_to_keep(registry, infos, at)
            wanted[:] = [n for n in some if n in now.versions and n not in keep]
            if not wanted:
                return None
            told = f"retention: removing {'version' if len(wanted) == 1 else 'versions'} "
            entry = now.entry("retire", None, now.champion, reason=told + ", ".join(wanted))
            return replace(entry, marks={})  # not finished: until it is, nobody moves an alias

        entry = moves._written(registry, retire, recheck=False)
        if entry is None:
            continue
        for number in wanted:
            # the MLflow UI moves aliases without asking the history
            if number in registry.aliases().values() or registry.entries.overtaken(entry):
                continue
            moves.step(f"before version {number}")
            with said(registry.settings):
                registry.client.delete_model_version(registry.model, number)
            moves.step(f"version {number}")
            gone.append(number)
        moves._apply(registry, entry)
    return gone
