"""Ingest: read what is new from the sources into a staging folder of unique battles.

Nothing is published here. A staged batch is checked by the expectations and then committed to
the snapshot store, together with how far each source was read: one atomic step, so that a crash
at any point means that the same rows are read again, never that they are lost or doubled.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from routellm.battles import BATTLE_SCHEMA
from routellm.errors import SnapshotError, UsageError
from routellm.settings import Settings
from routellm.snapshots import Manifest, SnapshotStore
from routellm.sources import open_source

_STALE_S = 86_400.0  # staging folders older than a day are what a crash left


@dataclass(frozen=True)
class Staged:
    """Unique battles that no snapshot holds yet.

    Attributes
    ----------
    parts : tuple of Path
        Parquet files in the battle schema.
    cursors : dict
        How far each source has been read, to be published with the battles.
    read, new, duplicates : int
        Battles read, of them not seen before, and seen before (here or in the snapshot).
    unchanged : tuple of str
        Sources that were not read again, since nothing in them changed.
    passed_over : tuple of str
        Why files of the inbox were passed over, a sentence each.
    previous : Manifest or None
        The snapshot that this adds to.
    """

    directory: Path
    parts: tuple[Path, ...]
    cursors: dict[str, dict[str, Any]]
    read: int
    new: int
    duplicates: int
    sources: tuple[str, ...]
    unchanged: tuple[str, ...]
    simulated: bool
    previous: Manifest | None
    passed_over: tuple[str, ...] = ()

    @property
    def held_nothing(self) -> UsageError:
        """What to raise where there is no snapshot, and nothing to make one of."""
        if self.passed_over:
            first, more = self.passed_over[0], len(self.passed_over) - 1
            also = f" ({more} more could not be read)" if more else ""
            return UsageError(f"there is no battle to begin with: {first}{also}")
        return UsageError("the sources hold no battles: give another source")

    def discard(self) -> None:
        """Remove the staging folder."""
        shutil.rmtree(self.directory, ignore_errors=True)


def stage(
    sources: Sequence[str],
    store: SnapshotStore,
    settings: Settings,
    progress: Callable[[str, int], None] | None = None,
) -> Staged:
    """Read what is new from `sources`.

    Parameters
    ----------
    sources : sequence of str
        Files, folders, hub names or ``simulated://arena``; see `routellm.sources.open_source`.
    progress : callable, optional
        Called with (source name, battles read so far).

    Raises
    ------
    UsageError, SourceError
        If a source is unknown or cannot be read; nothing is left behind.
    SnapshotError
        If the disk is full.
    """
    opened = [open_source(spec, settings) for spec in sources]
    previous = store.latest()
    _remove_stale(store.staging_dir)
    directory = store.staging_dir / uuid.uuid4().hex
    known = store.ids(previous) if previous else set()
    before = len(known)
    parts: list[Path] = []
    cursors: dict[str, dict[str, Any]] = {}
    unchanged: list[str] = []
    read = 0
    try:
        directory.mkdir(parents=True)
        for source in opened:
            since = previous.cursors.get(source.name) if previous else None
            cursor = source.cursor()
            if since == cursor:
                unchanged.append(source.name)
                continue
            for batch in source.batches(since):
                read += len(batch)
                fresh = _unseen(batch, known)
                if len(fresh):
                    path = directory / f"part-{len(parts):05d}.parquet"
                    pq.write_table(pa.Table.from_batches([fresh]), path, compression="zstd")
                    parts.append(path)
                if progress:
                    progress(source.name, read)
            # what was passed over has not been read: the next ingest tries it again
            cursors[source.name] = {k: v for k, v in cursor.items() if k not in source.passed_over}
    except OSError as error:
        shutil.rmtree(directory, ignore_errors=True)
        raise SnapshotError(
            f"cannot write to {directory} ({error.strerror or error}): nothing was changed; make "
            "room or set `home` to another disk, then run again"
        ) from error
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    new = len(known) - before
    return Staged(
        directory=directory,
        parts=tuple(parts),
        cursors=cursors,
        read=read,
        new=new,
        duplicates=read - new,
        sources=tuple(source.name for source in opened),
        unchanged=tuple(unchanged),
        simulated=any(source.simulated for source in opened),
        previous=previous,
        passed_over=tuple(why for source in opened for why in source.passed_over.values()),
    )


def _unseen(batch: pa.RecordBatch, known: set[bytes]) -> pa.RecordBatch:
    """Return the rows whose ids are not in `known`, and add them to it."""
    keep = []
    for one in batch.column("battle_id").to_pylist():
        key = bytes.fromhex(one)
        keep.append(key not in known)
        known.add(key)
    fresh = batch if all(keep) else batch.filter(pa.array(keep))
    return fresh.cast(BATTLE_SCHEMA)


def _remove_stale(staging: Path) -> None:
    for folder in staging.glob("*"):
        if time.time() - folder.stat().st_mtime > _STALE_S:
            shutil.rmtree(folder, ignore_errors=True)
