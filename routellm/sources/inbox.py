"""The inbox: a folder that files of new battles are dropped into, and who drops them is not known.

A file that is still being written looks like any other. So only those are read that have not
changed for a while (`inbox_settle_s`); whoever can should write to a hidden name, or one that ends
in ``.part`` or ``.tmp``, and rename the file once it is whole. Files stay where they are: what has
been read of them is known by their digests, as of any folder.

A file that cannot be read holds back no other. It is passed over, again at every ingest, and a note
beside it says why (``<name>.why.txt``), until it can be read or is taken away.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from routellm.errors import SourceError, SourceUnreachable
from routellm.settings import Settings
from routellm.snapshots import snapshot_store, write_atomic
from routellm.sources.files import FolderSource, SeenFile, is_readable

_NOTE = ".why.txt"  # behind a file's name: no file of battles is called so


@dataclass(frozen=True)
class Dropped:
    """A file in the inbox.

    Attributes
    ----------
    changed_s : float
        When it, or its name, changed last: seconds since 1970, by the file system's clock.
    """

    name: str
    size_bytes: int
    changed_s: float


def dropped(folder: Path) -> list[Dropped]:
    """Return the files of battles in a folder, settled or not, by name; none if it is not there.

    Raises
    ------
    OSError
        If the folder cannot be read.
    """
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not is_readable(entry.name):
                    continue
                try:
                    if entry.is_file():
                        of = entry.stat()
                        # of the inode: a copy may bear another time of change than its own
                        found.append(Dropped(entry.name, of.st_size, of.st_ctime))
                except FileNotFoundError:  # renamed or taken away just now
                    continue
    except FileNotFoundError:
        return []
    return sorted(found, key=lambda one: one.name)


def settled(settings: Settings) -> list[Dropped]:
    """Return the files in the inbox that may be read now."""
    now = time.time()
    return [
        one for one in dropped(settings.inbox_dir) if now - one.changed_s >= settings.inbox_settle_s
    ]


def sources_now(settings: Settings) -> tuple[str, ...]:
    """Return where battles come from now: `sources`, and the inbox if it holds any.

    Simulated and real battles never share a snapshot. Where `sources` are all simulated, as by
    default, the inbox takes their place, and keeps it: once its battles are in a snapshot, nothing
    simulated is trained on because the folder was emptied.

    Raises
    ------
    SnapshotError
        If the newest snapshot cannot be read.
    """
    inbox = settings.inbox_dir
    if any(is_inbox(Path(name).expanduser(), settings) for name in settings.sources):
        return settings.sources
    if not settled(settings) and not _was_read(settings):
        return settings.sources
    if all(name.startswith("simulated://") for name in settings.sources):
        return (str(inbox),)
    return (*settings.sources, str(inbox))


def is_inbox(path: Path, settings: Settings) -> bool:
    """Return whether a path is the inbox."""
    return path.resolve() == settings.inbox_dir.resolve()


def unreadable(folder: Path) -> dict[str, str]:
    """Return the files that the last ingest had to pass over, and why; none if it is not there."""
    found = {}
    for note in sorted(folder.glob(f"*{_NOTE}")):
        if _noted(note).exists():
            with contextlib.suppress(OSError):  # mended and read by an ingest just now
                found[_noted(note).name] = note.read_text(errors="replace").strip()
    return found


class InboxSource(FolderSource):
    """The settled files of the inbox, but for those that cannot be read.

    That there are none is nothing wrong.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.inbox_dir, settings.ingest)
        self._all = settings
        self.passed_over: Mapping[str, str] = {}
        if not self.path.is_dir():
            raise SourceError(
                f"the inbox {self.path} is not there: make it (or mount it), or set `inbox` to "
                "another folder"
            )

    def cursor(self) -> dict[str, Any]:
        self.passed_over = {}
        self._looked = {}
        for path in self._files():
            try:
                self._looked[path.name] = SeenFile.of(path)
            except SourceUnreachable:
                raise
            except SourceError as error:
                self._pass_over(path, error)
        for note in self.path.glob(f"*{_NOTE}"):
            if is_readable(_noted(note).name) and not _noted(note).exists():
                _remove(note)
        return {name: one.sha256 for name, one in self._looked.items()}

    def _read(self, one: SeenFile) -> Generator[pa.RecordBatch, None, bool]:
        # twice: nothing is taken of a file whose end cannot be read, and batches go as they come
        try:
            for _ in super()._read(one):
                pass
        except SourceUnreachable:
            raise
        except SourceError as error:
            self._pass_over(one.path, error)
            return False
        _remove(_note_of(one.path))
        return (yield from super()._read(one))

    def _pass_over(self, path: Path, error: SourceError) -> None:
        self.passed_over = {**self.passed_over, path.name: str(error)}
        with contextlib.suppress(OSError):  # a folder that others write to may be read-only here
            write_atomic(_note_of(path), f"{error}\n")

    def _files(self) -> list[Path]:
        return [self.path / one.name for one in settled(self._all)]

    def _holds_none(self) -> None:
        pass


def _note_of(path: Path) -> Path:
    return path.with_name(path.name + _NOTE)


def _noted(note: Path) -> Path:
    return note.with_name(note.name.removesuffix(_NOTE))


def _remove(note: Path) -> None:
    with contextlib.suppress(OSError):
        note.unlink()


def _was_read(settings: Settings) -> bool:
    latest = snapshot_store(settings).latest()
    return latest is not None and str(settings.inbox_dir.resolve()) in latest.cursors
