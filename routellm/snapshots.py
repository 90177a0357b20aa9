"""Snapshots: immutable, content-addressed sets of validated battles.

::

    <home>/snapshots/parts/<sha256>.parquet    battles; never changed once named
    <home>/snapshots/<digest>.json             a manifest: which parts, how many, from where
    <home>/snapshots/LATEST                    the digest of the newest manifest

A new snapshot shares its predecessor's parts and adds its own, so nothing is copied. The only
step that publishes anything is the rename of ``LATEST``: whatever is killed before it leaves the
previous snapshot in force, and at most some parts that nobody names.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
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
        found = [p for p in self._manifest_paths() if p.stem.startswith(digest)]
        if len(found) != 1 or not digest:
            have = ", ".join(p.stem[:12] for p in self._manifest_paths()) or "none"
            raise UsageError(
                f"{'no' if not found else 'more than one'} snapshot starts with {digest!r} in "
                f"{self.directory}: use one of {have}"
            )
        return self._read_manifest(found[0])

    def all(self) -> list[Manifest]:
        """Return all manifests, newest first."""
        found = [self._read_manifest(p) for p in self._manifest_paths()]
        return sorted(found, key=lambda m: m.created_at, reverse=True)

    def iter_batches(
        self, manifest: Manifest, columns: Sequence[str] | None = None, batch_rows: int = 65_536
    ) -> Iterator[pa.RecordBatch]:
        """Yield a snapshot's battles, never holding more than a batch."""
        for part in manifest.parts:
            path = self.parts_dir / part.name
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

    def _build(
        self,
        parts: Sequence[Path],
        cursors: dict[str, dict[str, Any]],
        previous: Manifest | None,
        quarantined_by_rule: dict[str, int],
        validation: dict[str, Any],
        simulated: bool,
    ) -> Manifest:
        self.parts_dir.mkdir(parents=True, exist_ok=True)
        infos = list(previous.parts) if previous else []
        for path in parts:
            rows = pq.ParquetFile(path).metadata.num_rows
            if not rows:
                continue
            digest = file_sha256(path)
            info = PartInfo(f"{digest[:32]}.parquet", rows, digest)
            if info not in infos:
                _copy_durably(path, self.parts_dir / info.name)
                infos.append(info)
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

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """One publisher at a time; the kernel lets go of the lock when its holder dies."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / "publish.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


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


def _copy_durably(source: Path, target: Path) -> None:
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
