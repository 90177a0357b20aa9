"""Snapshots that several homes have in common, in a storage (`routellm.storage`).

::

    <storage>/snapshots/manifests/000000012.json   the twelfth publish; the highest is the newest
    <storage>/snapshots/aside/<digest>.json        what was known at a moment (`routellm.as_of`)
    <storage>/snapshots/parts/<sha256>-<id>.parquet
    <home>/shared/snapshots-<storage>/             what this home has read of it, and its staging

There is no pointer to the newest that could be written twice: a publish is one `put_new` of the
next number, so of several publishers one succeeds, and the others are told to read again. Whatever
is killed before it leaves parts that nobody names; compaction removes them once they are a day
old. A number is never given again: of a removed snapshot a note stays in its place.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from routellm.errors import SnapshotError, StorageError
from routellm.snapshots import (
    Manifest,
    PartInfo,
    SnapshotStore,
    copy_durably,
    file_sha256,
    write_atomic,
)
from routellm.storage import Blob, Blobs, fetch_verified
from routellm.storage.blobs import NAME_WITHIN_S, UNNAMED_S

_MANIFESTS, _ASIDE, _PARTS = "manifests/", "aside/", "parts/"


@dataclass(frozen=True)
class _Published:
    """One publish.

    Attributes
    ----------
    manifest : Manifest or None
        None where the snapshot was removed.
    taken_in : dict
        When a snapshot first held each of its parts.
    """

    blob: Blob
    manifest: Manifest | None
    taken_in: dict[str, str]

    @property
    def number(self) -> int:
        return int(Path(self.blob.name).stem)


class SharedSnapshotStore(SnapshotStore):
    """The snapshots in a storage, of which a folder keeps what was read."""

    def __init__(self, directory: Path, blobs: Blobs) -> None:
        super().__init__(directory)
        self.blobs = blobs
        self._kept = directory / "manifests"
        self._tidy = False

    @property
    def where(self) -> str:
        return self.blobs.address

    def latest(self) -> Manifest | None:
        newest = self._newest()
        return newest.manifest if newest else None

    def all(self) -> list[Manifest]:
        found = {p.manifest.digest: p.manifest for p in self._published() if p.manifest}
        # of two in one second, too, the later first
        return sorted(found.values(), key=lambda m: m.created_at)[::-1]

    def verify(self, manifest: Manifest) -> None:
        there = {blob.name for blob in self.blobs.list(_PARTS)}
        for part in manifest.parts:
            path = self.parts_dir / part.name
            if path.exists() and file_sha256(path) != part.sha256:
                path.unlink()  # this home's copy alone is damaged
            if _PARTS + part.name not in there:
                raise self._gone(part)
            self._part(part)

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
        with self._writing() as in_time:
            newest = self._newest()
            now = newest.manifest if newest else None
            if (now and now.digest) != (previous and previous.digest):
                raise self._overtaken()
            if newest is None:
                self._see_that_names_are_given_once()
            manifest = self._build(
                parts,
                dict(cursors),
                previous,
                dict(quarantined_by_rule),
                dict(validation),
                simulated,
            )
            before = newest.taken_in if newest else {}
            doc = {
                "publish": uuid.uuid4().hex,  # tells two publishers' documents apart
                "manifest": asdict(manifest),
                "taken_in": {p.name: before.get(p.name, manifest.created_at)
                             for p in manifest.parts},
            }  # fmt: skip
            in_time()
            number = newest.number + 1 if newest else 1
            if not self.blobs.put_new(f"{_MANIFESTS}{number:09d}.json", _encoded(doc)):
                raise self._overtaken()
        self._tidy_up()
        return manifest

    def publish_aside(
        self,
        parts: Sequence[PartInfo | Path],
        *,
        as_of: str,
        simulated: bool,
        check: Callable[[Manifest], dict[str, Any]],
    ) -> Manifest:
        with self._writing() as in_time:
            draft = replace(self._build(parts, {}, None, {}, {}, simulated), as_of=as_of)
            manifest = replace(draft, validation=check(draft))
            in_time()
            doc = {"manifest": asdict(manifest), "taken_in": {}}
            self.blobs.put(f"{_ASIDE}{manifest.digest}.json", _encoded(doc))
            return manifest

    # --- retention ------------------------------------------------------------------------------

    def only_in(self, digests: Collection[str]) -> dict[str, int]:
        """Return the parts that no snapshot but these names, and old ones that nobody names."""
        there = self.blobs.list(_PARTS)  # first: a part that is named meanwhile is a young one
        manifests = self.all()
        kept = {p.name for m in manifests if m.digest not in digests for p in m.parts}
        going = {p.name for m in manifests if m.digest in digests for p in m.parts}
        found = {blob.name.removeprefix(_PARTS): blob for blob in there}
        return {
            name: blob.size_bytes
            for name, blob in found.items()
            if name not in kept and (name in going or blob.is_left_over())
        }

    def taken_in(self) -> dict[str, str]:
        first: dict[str, str] = {}
        for one in self._published():
            parts = one.manifest.parts if one.manifest else ()
            named = {part.name: one.manifest.created_at for part in parts if one.manifest}
            for name, at in (named | one.taken_in).items():
                first[name] = min(first.get(name, "~"), at)
        return first

    def _remove(self, digests: Collection[str]) -> None:
        newest = self._newest()
        going = set(digests)
        if newest and newest.manifest:
            going -= {newest.manifest.digest}
        gone = self.only_in(going)
        for one in self._published():
            if one.manifest is None or one.manifest.digest not in going:
                continue
            if one.blob.name.startswith(_ASIDE):
                self.blobs.delete([one.blob.name])
            else:  # a publisher that stood still since could take the number again
                self.blobs.put(one.blob.name, _encoded({"removed": one.manifest.digest}))
        self.blobs.delete(_PARTS + name for name in gone)
        self._tidy_up()

    # --- how it is done -------------------------------------------------------------------------

    def _keep(self, path: Path, rows: int, sha256: str) -> PartInfo:
        # a name of its own: what this publish puts is never what another one removes
        info = PartInfo(f"{sha256[:32]}-{uuid.uuid4().hex[:8]}.parquet", rows, sha256)
        copy_durably(path, self.parts_dir / info.name)
        self.blobs.put(_PARTS + info.name, path)
        return info

    def _part(self, part: PartInfo) -> Path:
        """Return this home's copy of a part; it is fetched once, and checked then."""
        path = self.parts_dir / part.name
        if not path.exists():
            if not fetch_verified(self.blobs, _PARTS + part.name, path, part.sha256):
                raise self._gone(part)
            if not self._tidy:
                self._tidy_up()
        return path

    def _digests(self) -> list[str]:
        return sorted(m.digest for m in self.all())

    def _by_digest(self, digest: str) -> Manifest:
        return next(m for m in self.all() if m.digest == digest)

    def _newest(self) -> _Published | None:
        """Return the newest publish; what this home saw last spares listing all before it."""
        kept = (path.name[:9] for path in self._kept.glob("[0-9]" * 9 + "-*.json"))
        seen = int(max(kept, default="0"))
        before = f"{_MANIFESTS}{seen - 1:09d}.json" if seen > 1 else ""
        listed = self.blobs.list(_MANIFESTS, before) or self.blobs.list(_MANIFESTS)
        return self._read(listed[-1]) if listed else None

    def _published(self) -> list[_Published]:
        """Return what was published, aside first, then in order of numbers."""
        listed = [*self.blobs.list(_ASIDE), *self.blobs.list(_MANIFESTS)]
        return [one for blob in listed if (one := self._read(blob))]

    def _read(self, blob: Blob) -> _Published | None:
        """Read one publish, from this home's copy if it has it; None if it was removed just now."""
        version = hashlib.sha256(blob.version.encode()).hexdigest()[:12]
        path = self._kept / f"{Path(blob.name).stem}-{version}.json"
        try:
            return _decoded(blob, path.read_bytes())
        except (OSError, ValueError, TypeError, KeyError):
            data = self.blobs.get(blob.name)
        if data is None:
            return None
        try:
            one = _decoded(blob, data)
        except (ValueError, TypeError, KeyError) as error:
            raise SnapshotError(
                f"the snapshot manifest {blob.name} in {self.where} cannot be read "
                f"({type(error).__name__}): put it back from a backup"
            ) from error
        for old in self._kept.glob(f"{Path(blob.name).stem}-*.json"):
            old.unlink(missing_ok=True)
        try:
            write_atomic(path, data.decode())
        except OSError as error:
            raise self._disk(error) from error
        return one

    @contextmanager
    def _writing(self) -> Iterator[Callable[[], None]]:
        """Give what refuses to name parts that compaction may take for left over by then."""
        started = time.monotonic()

        def in_time() -> None:
            if time.monotonic() - started > NAME_WITHIN_S:
                raise SnapshotError(
                    f"publishing in {self.where} took over {NAME_WITHIN_S / 3600:.0f} hours, so "
                    "nothing was published: run it again, with a faster connection"
                )

        try:
            yield in_time
        except OSError as error:
            raise self._disk(error) from error

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """No lock: nothing that is removed here can be what a publisher is about to name."""
        yield

    def _see_that_names_are_given_once(self) -> None:
        """Refuse a storage that knows no conditional write and says nothing of it."""
        name = f"probe/{uuid.uuid4().hex}"
        try:
            if not self.blobs.put_new(name, b"first") or self.blobs.put_new(name, b"second"):
                raise StorageError(
                    f"{self.where} overwrites what must not be overwritten (it does not heed "
                    "If-None-Match), so two publishers could undo each other: use an S3 service "
                    "that does, such as Amazon's or MinIO"
                )
        finally:
            self.blobs.delete([name])

    def _tidy_up(self) -> None:
        """Remove this home's copies of what is not in the storage any more, once they are old."""
        self._tidy = True
        copies = [*self.parts_dir.glob("*"), *self._kept.glob("*")]
        old = [p for p in copies if time.time() - p.stat().st_mtime > UNNAMED_S]
        if not old:
            return
        published = self._published()
        stems = {Path(one.blob.name).stem for one in published}
        named = {p.name for one in published if one.manifest for p in one.manifest.parts}
        for path in old:
            if path.name not in named and path.stem.rpartition("-")[0] not in stems:
                path.unlink(missing_ok=True)

    def _overtaken(self) -> SnapshotError:
        return SnapshotError(
            f"another ingest published a snapshot in {self.where} in the meantime: run the ingest "
            "again"
        )

    def _gone(self, part: PartInfo) -> SnapshotError:
        return SnapshotError(
            f"a snapshot in {self.where} is damaged: its part {part.name} is missing; put it back "
            "from a backup, or ingest the sources again into a new storage"
        )

    def _disk(self, error: OSError) -> SnapshotError:
        return SnapshotError(
            f"cannot write in {self.directory} ({error.strerror or error}): nothing was published; "
            "make room or set `home` to another disk, then run again"
        )


def _encoded(doc: dict[str, Any]) -> bytes:
    return json.dumps(doc, sort_keys=True).encode()


def _decoded(blob: Blob, data: bytes) -> _Published:
    doc = json.loads(data)
    if "removed" in doc:
        return _Published(blob, None, {})
    manifest = Manifest.from_json(json.dumps(doc["manifest"]))
    return _Published(blob, manifest, dict(doc["taken_in"]))
