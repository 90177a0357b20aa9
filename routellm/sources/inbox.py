"""The inbox: a folder that files of new battles are dropped into, and who drops them is not known.

A file that is still being written looks like any other. So only those are read that have not
changed for a while (`inbox_settle_s`); whoever can should write to a hidden name, or one that ends
in ``.part`` or ``.tmp``, and rename the file once it is whole. Files stay where they are: what has
been read of them is known by their digests, as of any folder.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from routellm.errors import SourceError
from routellm.settings import Settings
from routellm.snapshots import snapshot_store
from routellm.sources.files import FolderSource, is_readable


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


class InboxSource(FolderSource):
    """The settled files of the inbox; that there are none is nothing wrong."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.inbox_dir, settings.ingest)
        self._all = settings
        if not self.path.is_dir():
            raise SourceError(
                f"the inbox {self.path} is not there: make it (or mount it), or set `inbox` to "
                "another folder"
            )

    def _files(self) -> list[Path]:
        return [self.path / one.name for one in settled(self._all)]

    def _holds_none(self) -> None:
        pass


def _was_read(settings: Settings) -> bool:
    latest = snapshot_store(settings).latest()
    return latest is not None and str(settings.inbox_dir.resolve()) in latest.cursors
