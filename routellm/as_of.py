"""What was known at a moment: the battles that a router trained then could have learnt from.

A battle is known from when it was voted. One without a date is known from when a snapshot first
took it in: later than it was fought, never earlier. What was known at a moment can be published
as a snapshot of its own: a manifest that names parts with just these battles, beside the newest
one, which stays the newest. Its digest is that of its battles, as every snapshot's is, so the same
battles are trained on once, whichever moment they are asked for by.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from routellm.battles import digest_of_ids
from routellm.errors import UsageError
from routellm.settings import Settings
from routellm.snapshots import Manifest, PartInfo, SnapshotStore, snapshot_store

Check = Callable[[Manifest], dict[str, Any]]


def moment(text: str, *, now: datetime | None = None) -> datetime:
    """Return the moment that a person names, in UTC.

    Parameters
    ----------
    text : str
        An ISO 8601 date, which means the end of that day in UTC, or a date and time (in UTC unless
        it says otherwise).
    now : datetime, optional
        The present.

    Raises
    ------
    UsageError
        If it is neither, or not over yet: what will be known by then is not known now.
    """
    now = now or datetime.now(UTC)
    try:
        try:
            when = datetime.combine(date.fromisoformat(text), time.max, UTC)
        except ValueError:
            when = datetime.fromisoformat(text)
    except ValueError as error:
        raise UsageError(
            f"{text!r} is no date: give one such as 2026-01-31 (the end of that day, UTC) or "
            "2026-01-31T12:00"
        ) from error
    when = when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
    if when > now:
        raise UsageError(
            f"{text} is not over yet (it is {now:%Y-%m-%dT%H:%M} UTC), so what is known by then is "
            "not settled: give a moment that has passed"
        )
    return when


def store_with_history(settings: Settings, sources: Sequence[str] | None = None) -> SnapshotStore:
    """Return the snapshots to look back in: of the sources that are named, or set.

    Where none is named and those that are set (simulated or real) were never read, the others'.
    """
    names = list(sources or settings.sources)
    simulated = all(name.startswith("simulated://") for name in names)
    store = snapshot_store(settings, simulated=simulated)
    if store.latest() is None and not sources:
        other = snapshot_store(settings, simulated=not simulated)
        return other if other.latest() is not None else store
    return store


@dataclass(frozen=True)
class History:
    """A snapshot's battles, and since when each is known.

    Attributes
    ----------
    table : pyarrow.Table
        The columns that were asked for, n rows in the snapshot's order.
    ids : tuple of str, length n
    voted : ndarray datetime64[us] (n,)
        UTC; NaT where no date is known.
    known : ndarray datetime64[us] (n,)
        UTC, from when the battle could have been trained on.
    """

    store: SnapshotStore
    manifest: Manifest
    table: pa.Table
    ids: tuple[str, ...]
    voted: NDArray[np.datetime64]
    known: NDArray[np.datetime64]

    @classmethod
    def of(cls, store: SnapshotStore, columns: Sequence[str] = ()) -> History:
        """Return that of the newest snapshot.

        Raises
        ------
        UsageError
            If there is none.
        """
        manifest = store.latest()
        if manifest is None:
            raise UsageError(
                f"no snapshot in {store.directory} to look back in: run `routellm ingest SOURCE` "
                "first"
            )
        table = store.read(manifest, [*columns, "battle_id", "voted_at"])
        voted = table["voted_at"].to_numpy().astype("datetime64[us]")
        first = store.taken_in()
        taken_in = np.concatenate(
            [np.full(part.rows, utc(first[part.name])) for part in manifest.parts]
        )
        known = np.where(np.isnat(voted), taken_in, voted)
        ids = tuple(table["battle_id"].to_pylist())
        return cls(store, manifest, table.select(list(columns)), ids, voted, known)

    def known_by(self, when: datetime) -> NDArray[np.bool_]:
        """Return which battles (n,) were known at a moment.

        Raises
        ------
        UsageError
            If none was.
        """
        mask: NDArray[np.bool_] = self.known <= utc(when)
        if not mask.any():
            raise UsageError(
                f"no battle was known by {when:%Y-%m-%dT%H:%M} UTC: the first of snapshot "
                f"{self.manifest.digest[:12]} is of {np.datetime_as_string(self.known.min(), 'm')}"
            )
        return mask

    def digest(self, when: datetime) -> str:
        """Return the digest of the battles that were known at a moment."""
        return digest_of_ids(self.ids[i] for i in np.flatnonzero(self.known_by(when)))

    @property
    def last_voted(self) -> datetime | None:
        """When the newest dated battle was voted, in UTC; None if no battle says a date."""
        dated = self.voted[~np.isnat(self.voted)]
        if not len(dated):
            return None
        last: datetime = dated.max().item()
        return last.replace(tzinfo=UTC)

    def pieces(self, when: datetime) -> Iterator[tuple[PartInfo, NDArray[np.bool_]]]:
        """Yield each part of which anything was known at a moment, and which of its battles."""
        mask, start = self.known_by(when), 0
        for part in self.manifest.parts:
            mine = mask[start : start + part.rows]
            start += part.rows
            if mine.any():
                yield part, mine

    def write(self, part: PartInfo, keep: NDArray[np.bool_], folder: Path) -> Path:
        """Write the battles of a part that are marked in `keep` to a file of the same name."""
        table = self.store.read(replace(self.manifest, parts=(part,)))
        path = folder / part.name
        pq.write_table(table.filter(pa.array(keep)), path, compression="zstd")
        return path


def publish_as_of(store: SnapshotStore, when: datetime, check: Check) -> Manifest:
    """Return the snapshot of what was known at a moment; it is made once.

    The newest snapshot stays the newest. Killed at any point this leaves nothing published, and at
    most parts that nobody names.

    Parameters
    ----------
    check : callable
        Says of the finished manifest what its `validation` is, or raises: nothing is published
        then.

    Returns
    -------
    Manifest
        With `as_of` the moment asked for. Where a snapshot of the same battles is there already,
        it is that one: on disk it keeps what it was first made for.

    Raises
    ------
    UsageError
        If there is no snapshot, or no battle was known.
    """
    history = History.of(store)
    digest = history.digest(when)
    as_of = when.isoformat()
    for manifest in store.all():
        if manifest.digest == digest:
            return replace(manifest, as_of=as_of)
    store.staging_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=store.staging_dir, prefix="as-of-") as folder:
        parts: list[PartInfo | Path] = [
            part if known.all() else history.write(part, known, Path(folder))
            for part, known in history.pieces(when)
        ]
        return store.publish_aside(
            parts, as_of=as_of, simulated=history.manifest.simulated, check=check
        )


def utc(when: datetime | str) -> np.datetime64:
    """Return a moment as numpy has it: UTC, in microseconds."""
    if isinstance(when, str):
        when = datetime.fromisoformat(when)
    return np.datetime64(when.astimezone(UTC).replace(tzinfo=None), "us")
