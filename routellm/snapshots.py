"""Snapshots: immutable, content-addressed sets of validated battles.

::

    <home>/snapshots/parts/<sha256>.parquet    battles; never changed once named
    <home>/snapshots/<digest>.json             a manifest: which parts, how many, from where
    <home>/snapshots/LATEST                    the digest of the newest manifest

A new snapshot shares its predecessor's parts and adds its own, so nothing is copied. The only
step that publishes anything is the rename of ``LATEST``: whatever is killed before it leaves the
previous snapshot in force, and at most some parts that nobody names.

With `storage` set, several homes have their snapshots in common: `routellm.shared_snapshots`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from routellm import __version__
from routellm.battles import BATTLE_SCHEMA, digest_of_ids
from routellm.errors import SnapshotError, UsageError
from routellm.lock import alone
from routellm.settings import Settings

_COUNTED = ("label_kind", "source", "model", "winner")


@dataclass(frozen=True)
class PartInfo:
    """One Parquet file of a snapshot."""

    name: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a snapshot holds, and how it came to be.

    Attributes
    ----------
    digest : str
        SHA-256 over the sorted battle ids: two snapshots of the same battles have the same.
    created_at : str
        ISO 8601, UTC.
    cursors : dict
        For each source, how far it had been read: a second ingest starts there.
    quarantined_by_rule : dict
        Rows kept out by this snapshot's ingest, by the rule that failed.
    validation : dict
        What the expectations found; ``passed`` says whether it may be trained on.
    as_of : str or None
        ISO 8601, UTC: the battles that were known then, published aside (`routellm.as_of`). None
        for what an ingest published.
    """

    digest: str
    created_at: str
    code_version: str
    rows: int
    parts: tuple[PartInfo, ...]
    by_label_kind: dict[str, int]
    by_source: dict[str, int]
    by_model: dict[str, int]
    by_winner: dict[str, int]
    quarantined_by_rule: dict[str, int]
    cursors: dict[str, dict[str, Any]]
    validation: dict[str, Any]
    simulated: bool
    previous: str | None
    as_of: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        doc = json.loads(text)
        doc["parts"] = tuple(PartInfo(**part) for part in doc["parts"])
        return cls(**doc)


class SnapshotStore:
    """The snapshots of one home folder."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.parts_dir = directory / "parts"
        self.staging_dir = directory / "staging"

    @property
    def where(self) -> str:
        """Where the snapshots are, for messages."""
        return str(self.directory)

    def latest(self) -> Manifest | None:
        """Return the newest snapshot's manifest, or None before the first ingest."""
        try:
            digest = (self.directory / "LATEST").read_text().strip()
        except FileNotFoundError:
            return None
        return self._read_manifest(self.directory / f"{digest}.json")

    def get(self, digest: str) -> Manifest:
        """Return the manifest whose digest starts with `digest`.

        Raises
        ------
        UsageError
            If none or several do.
        """
        digests = self._digests()
        found = [one for one in digests if one.startswith(digest)]
        if len(found) != 1 or not digest:
            have = ", ".join(one[:12] for one in digests) or "none"
            raise UsageError(
                f"{'no' if not found else 'more than one'} snapshot starts with {digest!r} in "
                f"{self.where}: use one of {have}"
            )
        return self._by_digest(found[0])

    def all(self) -> list[Manifest]:
        """Return all manifests, newest first."""
        found = []
        for path in self._manifest_paths():
            try:
                found.append(self._read_manifest(path))
            except SnapshotError:
                if path.exists():  # else it was removed just now
                    raise
        return sorted(found, key=lambda m: m.created_at, reverse=True)

    def iter_batches(
        self, manifest: Manifest, columns: Sequence[str] | None = None, batch_rows: int = 65_536
    ) -> Iterator[pa.RecordBatch]:
        """Yield a snapshot's battles, never holding more than a batch."""
        for part in manifest.parts:
            path = self._part(part)
            try:
                with pq.ParquetFile(path) as file:
                    yield from file.iter_batches(batch_size=batch_rows, columns=columns)
            except (OSError, pa.ArrowException) as error:
                raise SnapshotError(
                    f"snapshot {manifest.digest[:12]} cannot be read: its part {path} is missing "
                    f"or damaged; ingest the sources again into a new home folder"
                ) from error

    def read(self, manifest: Manifest, columns: Sequence[str] | None = None) -> pa.Table:
        """Return a snapshot's battles as one table."""
        schema = (
            BATTLE_SCHEMA
            if columns is None
            else pa.schema([BATTLE_SCHEMA.field(c) for c in columns])
        )
        return pa.Table.from_batches(self.iter_batches(manifest, columns), schema=schema)

    def ids(self, manifest: Manifest) -> set[bytes]:
        """Return the battle ids as 16-byte values (a third of the text's memory)."""
        out: set[bytes] = set()
        for batch in self.iter_batches(manifest, ["battle_id"]):
            out.update(bytes.fromhex(one) for one in batch.column(0).to_pylist())
        return out

    def verify(self, manifest: Manifest) -> None:
        """Check every part against its digest.

        Raises
        ------
        SnapshotError
            If a part is missing or not what was written.
        """
        for part in manifest.parts:
            path = self.parts_dir / part.name
            if not path.exists() or file_sha256(path) != part.sha256:
                raise SnapshotError(
                    f"snapshot {manifest.digest[:12]} is damaged: {path} is missing or not what "
                    "was written; ingest the sources again into a new home folder"
                )

    def commit(
        self,
        *,
        parts: Sequence[Path],
        cursors: Mapping[str, dict[str, Any]],
        previous: Manifest | None,
        quarantined_by_rule: Mapping[str, int],
        validation: Mapping[str, Any],
        simulated: bool,
    ) -> Manifest:
        """Publish the previous snapshot's battles plus `parts` as the newest snapshot.

        Raises
        ------
        SnapshotError
            If the disk is full, or another ingest published first. Nothing is published then.
        """
        try:
            with self._lock():
                now = self.latest()
                if (now.digest if now else None) != (previous.digest if previous else None):
                    raise SnapshotError(
                        f"another ingest published snapshot {now.digest[:12] if now else '-'} in "
                        f"{self.directory} in the meantime: run the ingest again"
                    )
                manifest = self._build(
                    parts,
                    dict(cursors),
                    previous,
                    dict(quarantined_by_rule),
                    dict(validation),
                    simulated,
                )
                write_atomic(self.directory / f"{manifest.digest}.json", manifest.to_json())
                write_atomic(self.directory / "LATEST", manifest.digest + "\n")
                return manifest
        except OSError as error:
            raise SnapshotError(
                f"cannot write a snapshot in {self.directory} ({error.strerror or error}): the "
                "previous one is untouched; make room or set `home` to another disk, then run again"
            ) from error

    def publish_aside(
        self,
        parts: Sequence[PartInfo | Path],
        *,
        as_of: str,
        simulated: bool,
        check: Callable[[Manifest], dict[str, Any]],
    ) -> Manifest:
        """Publish parts, own ones or files, as a snapshot beside the newest, which stays that.

        Parameters
        ----------
        check : callable
            Returns the finished manifest's `validation`, or raises: nothing is published then.

        Raises
        ------
        SnapshotError
            If the disk is full, or a part is gone. Nothing is published then.
        """
        try:
            with self._lock():  # nothing is removed meanwhile
                draft = replace(self._build(parts, {}, None, {}, {}, simulated), as_of=as_of)
                manifest = replace(draft, validation=check(draft))
                write_atomic(self.directory / f"{manifest.digest}.json", manifest.to_json())
                return manifest
        except OSError as error:
            raise SnapshotError(
                f"cannot write a snapshot in {self.directory} ({error.strerror or error}): the "
                "others are untouched; make room or set `home` to another disk, then run again"
            ) from error

    # --- retention (routellm.retention decides what goes) ---------------------------------------

    def only_in(self, digests: Collection[str]) -> dict[str, int]:
        """Return the parts that no snapshot but these names, and nobody names: name -> bytes."""
        named = {p.name for m in self.all() if m.digest not in digests for p in m.parts}
        there = self.parts_dir.iterdir() if self.parts_dir.is_dir() else ()
        return {path.name: path.stat().st_size for path in there if path.name not in named}

    def taken_in(self) -> dict[str, str]:
        """Return when a snapshot first held each part, also where that snapshot was removed."""
        try:
            first = dict(json.loads((self.directory / "TAKEN_IN").read_text()))
        except FileNotFoundError:
            first = {}
        for manifest in self.all():
            for part in manifest.parts:
                first[part.name] = min(first.get(part.name, "~"), manifest.created_at)
        return first

    def remove(self, digests: Collection[str]) -> None:
        """Remove snapshots, then the parts that no other names; the newest is never removed.

        Killed anywhere it leaves parts that nobody names, which the next call removes, and nothing
        that lacks a part: a manifest is gone for good before its parts are. No snapshot is
        published meanwhile.

        Raises
        ------
        SnapshotError
            If the disk fails, or a manifest cannot be read: what it names is not known then, and
            nothing is removed.
        """
        try:
            with self._lock():
                self._remove(digests)
        except OSError as error:
            raise SnapshotError(
                f"snapshots in {self.directory} were not removed ({error.strerror or error}): see "
                "that this user may, and that the disk has room, then compact again"
            ) from error

    def _remove(self, digests: Collection[str]) -> None:
        latest = self.latest()
        going = {m.digest for m in self.all()} & set(digests)
        going -= {latest.digest} if latest else set()
        first, gone = self.taken_in(), self.only_in(going)
        if going:
            kept = {name: at for name, at in first.items() if name not in gone}
            write_atomic(self.directory / "TAKEN_IN", json.dumps(kept, indent=1))
        for digest in going:
            (self.directory / f"{digest}.json").unlink()
        _make_durable(self.directory)
        for name in gone:
            (self.parts_dir / name).unlink(missing_ok=True)

    def _build(
        self,
        parts: Sequence[PartInfo | Path],
        cursors: dict[str, dict[str, Any]],
        previous: Manifest | None,
        quarantined_by_rule: dict[str, int],
        validation: dict[str, Any],
        simulated: bool,
    ) -> Manifest:
        self.parts_dir.mkdir(parents=True, exist_ok=True)
        infos = list(previous.parts) if previous else []
        for one in parts:
            if isinstance(one, PartInfo):
                infos.append(one)
            elif rows := pq.ParquetFile(one).metadata.num_rows:
                digest = file_sha256(one)
                if digest not in {info.sha256 for info in infos}:
                    infos.append(self._keep(one, rows, digest))
        draft = Manifest(
            digest="",
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            code_version=__version__,
            rows=sum(info.rows for info in infos),
            parts=tuple(infos),
            by_label_kind={},
            by_source={},
            by_model={},
            by_winner={},
            quarantined_by_rule=quarantined_by_rule,
            cursors={**(previous.cursors if previous else {}), **cursors},
            validation=validation,
            simulated=simulated or bool(previous and previous.simulated),
            previous=previous.digest if previous else None,
        )
        ids: list[str] = []
        counts: dict[str, dict[str, int]] = {name: {} for name in _COUNTED}
        columns = ["battle_id", "label_kind", "source", "model_a", "model_b", "winner"]
        for batch in self.iter_batches(draft, columns):
            ids.extend(batch.column("battle_id").to_pylist())
            for name in _COUNTED:
                for column in ("model_a", "model_b") if name == "model" else (name,):
                    for pair in pc.value_counts(batch.column(column)).to_pylist():
                        key = str(pair["values"])
                        counts[name][key] = counts[name].get(key, 0) + pair["counts"]
        ordered = {
            name: dict(sorted(c.items(), key=lambda kv: -kv[1])) for name, c in counts.items()
        }
        return replace(
            draft,
            digest=digest_of_ids(ids),
            by_label_kind=ordered["label_kind"],
            by_source=ordered["source"],
            by_model=ordered["model"],
            by_winner=ordered["winner"],
        )

    def _keep(self, path: Path, rows: int, sha256: str) -> PartInfo:
        """Take a file in as a part, for good."""
        info = PartInfo(f"{sha256[:32]}.parquet", rows, sha256)
        copy_durably(path, self.parts_dir / info.name)
        return info

    def _part(self, part: PartInfo) -> Path:
        """Return where a part is on this machine."""
        return self.parts_dir / part.name

    def _digests(self) -> list[str]:
        return [path.stem for path in self._manifest_paths()]

    def _by_digest(self, digest: str) -> Manifest:
        return self._read_manifest(self.directory / f"{digest}.json")

    def _manifest_paths(self) -> list[Path]:
        return sorted(self.directory.glob("*.json"))

    def _read_manifest(self, path: Path) -> Manifest:
        try:
            return Manifest.from_json(path.read_text())
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise SnapshotError(
                f"the snapshot manifest {path} cannot be read ({type(error).__name__}): put it "
                "back from a backup, or ingest again into a new home folder"
            ) from error

    def _lock(self) -> AbstractContextManager[None]:
        """One publisher at a time."""
        return alone(self.directory / "publish.lock")


def snapshot_store(settings: Settings, *, simulated: bool = False) -> SnapshotStore:
    """Return the snapshots that settings name: of the home folder, or those in `storage`.

    Raises
    ------
    UsageError
        If `storage` is no address of a kind that is known.
    """
    directory = settings.snapshots_dir(simulated=simulated)
    if settings.storage is None:
        return SnapshotStore(directory)
    from routellm.shared_snapshots import SharedSnapshotStore
    from routellm.storage import open_storage

    blobs = open_storage(settings.storage, directory.name)
    kept = hashlib.sha256(blobs.address.encode()).hexdigest()[:8]  # of each storage by itself
    return SharedSnapshotStore(settings.home / "shared" / f"{directory.name}-{kept}", blobs)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that readers see the old or the new content, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _make_durable(folder: Path) -> None:
    """Make what was renamed or removed in a folder outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_durably(source: Path, target: Path) -> None:
    if target.exists():
        return
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with source.open("rb") as read, temporary.open("wb") as write:
            shutil.copyfileobj(read, write)
            write.flush()
            os.fsync(write.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
