"""Whole folders in a storage: trained routers and checkpoints that another machine goes on from.

::

    <storage>/folders/<name>/index.json        what the folder holds, and the id of what put it
    <storage>/folders/<name>/<id>/<file>-<n>   its files, in pieces

The index is put last and in one go: a reader finds the folder of before or the new one, whole. Each
upload has an id of its own, so two machines that share one name never mix; the later index counts.
Without `storage` nothing here does anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from routellm.errors import StorageError
from routellm.settings import Settings
from routellm.snapshots import file_sha256
from routellm.storage.address import open_storage
from routellm.storage.blobs import NAME_WITHIN_S, Blob, Blobs

PIECE_BYTES = 64 << 20  # what is sent again when a connection breaks, and held in memory
_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*")
_ID = re.compile("[0-9a-f]{32}")
_PIECE = re.compile(rf"({_ID.pattern})/\d+-\d+")
_INDEX = "index.json"


@dataclass(frozen=True)
class SharedFolder:
    """A folder in the storage.

    Attributes
    ----------
    about : dict
        What was said of it when it was shared.
    """

    name: str
    changed_at: datetime
    size_bytes: int
    about: dict[str, Any]


@dataclass(frozen=True)
class _File:
    sha256: str
    size: int
    pieces: int


@dataclass(frozen=True)
class _Index:
    """What a shared folder holds; `id` is that of the upload whose pieces it names."""

    id: str
    files: dict[str, _File]
    about: dict[str, Any]

    def encoded(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decoded(cls, data: bytes) -> _Index:
        doc = json.loads(data)
        files = {name: _File(**one) for name, one in doc["files"].items()}
        if not _ID.fullmatch(doc["id"]):
            raise ValueError("no id")
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
            raise ValueError("a file outside the folder")
        return cls(doc["id"], files, dict(doc["about"]))


def share_folder(
    folder: Path, name: str, settings: Settings, *, about: dict[str, Any] | None = None
) -> None:
    """Put a folder's files into the storage, in place of what has that name there.

    Files and folders whose names start with a dot stay out: they are not finished. Killed
    anywhere, it leaves what was there; pieces that are left over go with a later share of the name
    or with `remove_left_over`.

    Parameters
    ----------
    about : dict, optional
        Anything that can be JSON, for who decides whether to fetch it (`shared_about`).

    Raises
    ------
    StorageError, StorageUnreachable
        If it cannot be put, or changes meanwhile. What was there stays in force.
    """
    blobs = _of(name, settings)
    if blobs is None:
        return
    started = time.monotonic()
    before = _index(blobs)
    mine = uuid.uuid4().hex
    files: dict[str, _File] = {}
    try:
        for path in _files(folder):
            digest, pieces, size = hashlib.sha256(), 0, 0
            with path.open("rb") as file:
                while piece := file.read(PIECE_BYTES):
                    blobs.put(f"{mine}/{len(files)}-{pieces}", piece)
                    digest.update(piece)
                    pieces, size = pieces + 1, size + len(piece)
            files[path.relative_to(folder).as_posix()] = _File(digest.hexdigest(), size, pieces)
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be shared ({error.strerror or error}): nothing in {blobs.address} "
            "was replaced; see that nothing changes it, then run again"
        ) from error
    if time.monotonic() - started > NAME_WITHIN_S:
        raise StorageError(
            f"putting {folder} into {blobs.address} took over {NAME_WITHIN_S / 3600:.0f} hours, so "
            "nothing was replaced: run it again, with a faster connection"
        )
    blobs.put(_INDEX, _Index(mine, files, about or {}).encoded())
    _remove_pieces(blobs, replaced=before.id if before else None, named=mine)


def fetch_folder(name: str, folder: Path, settings: Settings) -> bool:
    """Bring a folder from the storage, verified, in place of what is at `folder`.

    What is there already, file by file, is not fetched. Killed anywhere, it leaves the old folder,
    the new one or none, and never a part of one.

    Returns
    -------
    bool
        Whether it was brought: False without `storage`, or where it holds no such folder.

    Raises
    ------
    StorageError, StorageUnreachable
        If it is damaged or cannot be read, or the disk is full; `folder` is as it was.
    """
    blobs = _of(name, settings)
    if blobs is None:
        return False
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        doc = _index(blobs)
        while doc is not None:
            if _bring(blobs, doc, folder, temporary):
                _put_in_place(temporary, folder, old)
                return True
            again = _index(blobs)
            if again is not None and again.id == doc.id:
                raise StorageError(
                    f"{blobs.address} is damaged: a piece of it is missing or not what was "
                    "written; remove it, and what it held is made again"
                )
            doc = again  # it was replaced or removed while it was read
        return False
    except OSError as error:
        raise StorageError(
            f"cannot write {folder} ({error.strerror or error}): make room or set `home` to "
            "another disk, then run again"
        ) from error
    finally:
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)


def shared_about(name: str, settings: Settings) -> dict[str, Any] | None:
    """Return what was said of a folder when it was shared; None if there is none."""
    blobs = _of(name, settings)
    doc = _index(blobs) if blobs else None
    return doc.about if doc else None


def remove_folder(name: str, settings: Settings) -> None:
    """Remove a folder from the storage; its index goes first, so nobody finds a part of it."""
    if blobs := _of(name, settings):
        try:
            doc = _index(blobs)
        except StorageError:  # damaged: its pieces go once they are old
            doc = None
        blobs.delete([_INDEX])
        _remove_pieces(blobs, replaced=doc.id if doc else None, named=None)


def shared_folders(settings: Settings) -> list[SharedFolder]:
    """Return the folders that the storage holds, by name."""
    if settings.storage is None:
        return []
    found = []
    for name, blobs in _by_folder(settings).items():
        index = [one for one in blobs if one.name == f"{name}/{_INDEX}"]
        about = shared_about(name, settings)
        if index and about is not None:
            size = sum(one.size_bytes for one in blobs)
            found.append(SharedFolder(name, index[0].changed_at, size, about))
    return found


def remove_left_over(settings: Settings) -> int:
    """Remove what killed uploads left, once it is a day old; returns how many bytes went."""
    removed = 0
    for name in _by_folder(settings):
        if blobs := _of(name, settings):
            doc = _index(blobs)
            removed += _remove_pieces(blobs, replaced=None, named=doc.id if doc else None)
    return removed


# --- how it is done -------------------------------------------------------------------------------


def _of(name: str, settings: Settings) -> Blobs | None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"no name of a shared folder: {name!r}")
    return open_storage(settings.storage, f"folders/{name}") if settings.storage else None


def _index(blobs: Blobs) -> _Index | None:
    data = blobs.get(_INDEX)
    if data is None:
        return None
    try:
        return _Index.decoded(data)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StorageError(
            f"{_INDEX} in {blobs.address} cannot be read ({type(error).__name__}): remove it, and "
            "what the folder held is made again"
        ) from error


def _remove_pieces(blobs: Blobs, *, replaced: str | None, named: str | None) -> int:
    """Remove the pieces of one upload, and old ones that no index names; returns their bytes.

    Young ones stay: another machine may be about to name them.
    """
    listed = [(match[1], blob) for blob in blobs.list() if (match := _PIECE.fullmatch(blob.name))]
    going = [
        blob for id_, blob in listed if id_ != named and (id_ == replaced or blob.is_left_over())
    ]
    blobs.delete(blob.name for blob in going)
    return sum(blob.size_bytes for blob in going)


def _bring(blobs: Blobs, index: _Index, there: Path, folder: Path) -> bool:
    """Write an index's files into a new folder, and say whether all of it was in the storage."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, (name, one) in enumerate(index.files.items()):
        path, have = folder / name, there / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if have.is_file() and have.stat().st_size == one.size and file_sha256(have) == one.sha256:
            shutil.copyfile(have, path)
            continue
        digest = hashlib.sha256()
        with path.open("wb") as file:
            for i in range(one.pieces):
                piece = blobs.get(f"{index.id}/{number}-{i}")
                if piece is None:
                    return False
                digest.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != one.sha256:
            return False
    return True


def _put_in_place(new: Path, folder: Path, old: Path) -> None:
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise


def _files(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    for where, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [one for one in folders if not one.startswith(".")]
        found += [Path(where) / one for one in files if not one.startswith(".")]
    return sorted(found)


def _by_folder(settings: Settings) -> dict[str, list[Blob]]:
    """Return the objects of each folder, by the folder's name."""
    out: dict[str, list[Blob]] = {}
    if settings.storage:
        for blob in open_storage(settings.storage, "folders").list():
            parent, _, last = blob.name.rpartition("/")
            name = parent if last == _INDEX else parent.rpartition("/")[0]
            out.setdefault(name, []).append(blob)
    return out
