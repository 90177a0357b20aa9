"""What is asked of a storage: whole objects by name, and one kind of write that settles races.

A name that is put with `put_new` is given once: of several machines that put it at the same time,
one is told that it did. Everything that must not be done twice stands on that; all else is
objects whose names nobody else uses.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from routellm.errors import StorageError

# An object that nothing names is removed once it is a day old. Who puts objects first and names
# them later has a quarter of that for it, so what is about to be named is never taken for left.
UNNAMED_S = 86_400.0
NAME_WITHIN_S = UNNAMED_S / 4


@dataclass(frozen=True)
class Blob:
    """One object as it is listed.

    Attributes
    ----------
    version : str
        Another one when its content is another.
    """

    name: str
    size_bytes: int
    changed_at: datetime
    version: str

    def is_left_over(self, now: datetime | None = None) -> bool:
        """Say whether it is so old that it is left over, if nothing names it."""
        return ((now or datetime.now(UTC)) - self.changed_at).total_seconds() > UNNAMED_S


class Blobs(Protocol):
    """Objects below one address.

    Every method raises StorageError at once where the storage refuses, and StorageUnreachable
    where it has not answered for a minute; nothing is half-done then.
    """

    @property
    def address(self) -> str:
        """Where they are, for messages; holds no credentials."""

    def put(self, name: str, data: bytes | Path) -> None:
        """Put an object whole, in place of one of that name."""

    def put_new(self, name: str, data: bytes) -> bool:
        """Put an object if there is none of that name, and say whether `data` is what is there.

        `data` must be unlike anyone else's: where an answer was lost on its way, what is there is
        compared with it.
        """

    def get(self, name: str) -> bytes | None:
        """Return an object, or None if there is none."""

    def fetch(self, name: str, path: Path) -> bool:
        """Write an object into a file, and say whether there is one."""

    def list(self, prefix: str = "", after: str = "") -> list[Blob]:
        """Return the objects whose names start so and come after `after`, in order of names."""

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; one that is not there is none too many."""


def fetch_verified(blobs: Blobs, name: str, path: Path, sha256: str) -> bool:
    """Bring an object into a file whole and as it was written, or not at all.

    Returns
    -------
    bool
        Whether there is such an object.

    Raises
    ------
    StorageError
        If it is not what was written, also when read again; or if the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            if not blobs.fetch(name, temporary):
                return False
            with temporary.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                    os.fsync(file.fileno())
                    temporary.replace(path)
                    return True
    except OSError as error:
        raise StorageError(
            f"cannot write {path} ({error.strerror or error}): make room or set `home` to another "
            "disk, then run again"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    raise StorageError(
        f"{name} in {blobs.address} is not what was written (its SHA-256 differs): put it back "
        "from a backup"
    )


class FolderBlobs:
    """Objects as files of a folder, on this machine or one that several machines mount.

    It relies on what POSIX says of `rename` and `link`, which NFS keeps: a file is renamed in one
    step, and of several that link one name, one succeeds.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._unfinished = root / ".unfinished"

    @property
    def address(self) -> str:
        return f"file://{self.root}"

    def put(self, name: str, data: bytes | Path) -> None:
        with self._working("write"), self._written(data) as temporary:
            target = self._target(name)
            temporary.replace(target)
            _make_durable(target.parent)

    def put_new(self, name: str, data: bytes) -> bool:
        with self._working("write"), self._written(data) as temporary:
            target = self._target(name)
            try:
                os.link(temporary, target)
            except FileExistsError:
                return self.get(name) == data
            _make_durable(target.parent)
            return True

    def get(self, name: str) -> bytes | None:
        with self._working("read"):
            try:
                return (self.root / name).read_bytes()
            except FileNotFoundError:
                return None

    def fetch(self, name: str, path: Path) -> bool:
        with self._working("read"):
            try:
                source = (self.root / name).open("rb")
            except FileNotFoundError:
                return False
        with source, path.open("wb") as file:
            shutil.copyfileobj(source, file)
        return True

    def list(self, prefix: str = "", after: str = "") -> list[Blob]:
        with self._working("list"):
            found = []
            for path in self._files(self.root / prefix.rpartition("/")[0]):
                name = path.relative_to(self.root).as_posix()
                if name.startswith(prefix) and name > after:
                    with suppress(FileNotFoundError):  # removed just now
                        one = path.stat()
                        changed_at = datetime.fromtimestamp(one.st_mtime, UTC)
                        version = f"{one.st_ino}-{one.st_mtime_ns}-{one.st_size}"
                        found.append(Blob(name, one.st_size, changed_at, version))
            return sorted(found, key=lambda blob: blob.name)

    def delete(self, names: Iterable[str]) -> None:
        with self._working("remove from"):
            for name in names:
                (self.root / name).unlink(missing_ok=True)

    def _files(self, folder: Path) -> Iterator[Path]:
        for where, folders, files in os.walk(folder):
            folders[:] = [f for f in folders if not f.startswith(".")]
            yield from (Path(where) / file for file in files if not file.startswith("."))

    def _target(self, name: str) -> Path:
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    @contextmanager
    def _written(self, data: bytes | Path) -> Iterator[Path]:
        """Give a file that holds `data` for good; what killed writes left goes first."""
        self._unfinished.mkdir(parents=True, exist_ok=True)
        for old in self._unfinished.iterdir():
            with suppress(FileNotFoundError):
                if time.time() - old.stat().st_mtime > UNNAMED_S:
                    old.unlink()
        temporary = self._unfinished / uuid.uuid4().hex
        try:
            with temporary.open("wb") as file:
                if isinstance(data, bytes):
                    file.write(data)
                else:
                    with data.open("rb") as source:
                        shutil.copyfileobj(source, file)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _working(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"cannot {what} {self.address} ({error.strerror or error}): see that it is mounted "
                "and has room, and that this user may, then run again"
            ) from error


def _make_durable(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
