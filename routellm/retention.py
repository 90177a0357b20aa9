"""What is old enough to go: snapshots, quarantined rows, and what killed runs left in the home.

Everything here is decided first and removed later (`registry.retention` puts both together with
what MLflow holds). A snapshot stays while it is among the newest, is young, or is named by
somebody; parts go only once no snapshot names them.
"""

from __future__ import annotations

import json
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from routellm.errors import SnapshotError
from routellm.settings import Settings
from routellm.snapshots import Manifest, SnapshotStore, snapshot_store
from routellm.storage import remove_folder, remove_left_over, shared_folders

_DAY_S = 86_400.0
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}")  # what `write_atomic` and `_remove` are killed over


@dataclass(frozen=True)
class Removal:
    """One thing that goes.

    Attributes
    ----------
    what : str
        snapshot, part, quarantine, leftover; of MLflow: version, model, run.
    name : str
    why : str
    size_bytes : int or None
        None where that cannot be told without asking a server for every file.
    path : Path or None
        Of what is a file or folder in the home; what is in the storage goes by its name.
    """

    what: str
    name: str
    why: str
    size_bytes: int | None = None
    path: Path | None = None


def stores(settings: Settings) -> list[SnapshotStore]:
    """Return the stores of real and of simulated snapshots."""
    return [snapshot_store(settings, simulated=s) for s in (False, True)]


def snapshots_to_keep(
    store: SnapshotStore, named: Mapping[str, str], settings: Settings, now: datetime
) -> dict[str, str]:
    """Return the snapshots that stay, digest -> why.

    Parameters
    ----------
    named : dict
        Snapshots that must stay whatever their age, digest -> by whom.
    """
    manifests = {m.digest: m for m in store.all()}
    latest = store.latest()
    keep: dict[str, str] = {}
    one = latest
    while one is not None and len(keep) < settings.retention.snapshots:
        keep[one.digest] = "among the newest"
        one = manifests.get(one.previous or "")
    youngest_to_go = now - timedelta(days=settings.retention.snapshot_days)
    for digest, manifest in manifests.items():
        if digest in named:
            keep[digest] = named[digest]
        elif datetime.fromisoformat(manifest.created_at) > youngest_to_go:
            keep.setdefault(digest, "young")
    return keep


def plan_snapshots(
    store: SnapshotStore, named: Mapping[str, str], settings: Settings, now: datetime
) -> list[Removal]:
    """Return the snapshots of a store that go, and the parts that go with them."""
    keep = snapshots_to_keep(store, named, settings, now)
    going: list[Manifest] = [m for m in store.all() if m.digest not in keep]
    found = [
        Removal("snapshot", m.digest, f"of {m.created_at[:10]}, and nobody names it", 0)
        for m in sorted(going, key=lambda m: m.created_at)
    ]
    parts = store.only_in({m.digest for m in going})
    return found + [
        Removal("part", name, "no snapshot that stays names it", size)
        for name, size in sorted(parts.items())
    ]


def plan_leftovers(settings: Settings, now: datetime) -> list[Removal]:
    """Return the files and folders of the home and the storage that nobody will come back for."""
    how, home = settings.retention, settings.home
    found: list[Removal] = []

    def old(what: str, paths: Iterator[Path], days: float, why: str) -> None:
        for path in sorted(paths):
            changed_s = _changed_s(path)
            if changed_s is not None and now.timestamp() - changed_s > days * _DAY_S:
                told = f"{why}, {(now.timestamp() - changed_s) / _DAY_S:.0f} days ago"
                found.append(Removal(what, _name(path, home), told, _size_bytes(path), path))

    old("quarantine", settings.quarantine_dir.glob("*"), how.quarantine_days, "quarantined")
    old("leftover", (home / "trained").glob("*"), how.leftover_days, "trained, not registered")
    for store in stores(settings):
        old("leftover", store.staging_dir.glob("*"), how.leftover_days, "read, not published")
    old("leftover", _copies(home / "gateway"), how.leftover_days, "served by a gateway")
    for folder in (home, *(s.directory for s in stores(settings))):
        unfinished = (p for p in folder.glob(".*") if _UNFINISHED.fullmatch(p.name))
        old("leftover", unfinished, how.leftover_days, "written, not finished")
    for one in shared_folders(settings):
        days = (now - one.changed_at).total_seconds() / _DAY_S
        if days > how.leftover_days:
            told = f"in the storage, put there {days:.0f} days ago"
            found.append(Removal("leftover", one.name, told, one.size_bytes))
    return found


def remove_leftovers(removals: Sequence[Removal], settings: Settings, now: datetime) -> None:
    """Remove what `plan_leftovers` found, unless somebody has come back to it since.

    Raises
    ------
    SnapshotError, StorageError
        If the disk or the storage does not let go of something.
    """
    planned = plan_leftovers(settings, now)
    still = {one.path for one in planned}
    shared = {one.name for one in planned if one.path is None}
    for one in removals:
        if one.path is None and one.name in shared:
            remove_folder(one.name, settings)
        elif one.path is not None and one.path in still:
            try:
                _remove(one.path)
            except OSError as error:
                raise SnapshotError(
                    f"{one.path} was not removed ({error.strerror or error}): see that this user "
                    "may, and compact again"
                ) from error
    remove_left_over(settings)  # pieces of shared folders that were never finished


def _remove(path: Path) -> None:
    """Remove a file, or a folder so that nobody ever finds half of it."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not _UNFINISHED.fullmatch(path.name):
        hidden = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        with suppress(FileNotFoundError):
            path.rename(hidden)
        path = hidden
    shutil.rmtree(path, ignore_errors=True)


def _copies(gateway: Path) -> Iterator[Path]:
    """Yield the bundles that a gateway kept, but for the one that it would start from."""
    try:
        serving = json.loads((gateway / "last_good.json").read_text())["version"]
    except FileNotFoundError:
        return
    for path in gateway.glob("version-*"):
        if path.name != f"version-{serving}":
            yield path


def _changed_s(path: Path) -> float | None:
    """Return when something in a path changed last; None if it is gone."""
    try:
        times = [path.lstat().st_mtime]
        if path.is_dir() and not path.is_symlink():
            times += [p.lstat().st_mtime for p in path.rglob("*")]
        return max(times)
    except FileNotFoundError:
        return time.time() if path.exists() else None  # somebody works in it


def _size_bytes(path: Path) -> int:
    with suppress(FileNotFoundError):
        if path.is_dir():
            return sum(p.lstat().st_size for p in path.rglob("*") if p.is_file())
        return path.lstat().st_size
    return 0


def _name(path: Path, home: Path) -> str:
    return str(path.relative_to(home)) if path.is_relative_to(home) else str(path)
