"""Files and folders of battles: CSV, Parquet, JSON Lines, and gzip or zip of these."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from routellm.errors import SourceError, SourceUnreachable
from routellm.settings import IngestSettings
from routellm.snapshots import file_sha256
from routellm.sources.base import NOTHING
from routellm.sources.shapes import find_shape, to_battles

log = logging.getLogger(__name__)

FORMATS = (".csv", ".parquet", ".jsonl", ".json")
_MAX_UNPACKED_BYTES = 64 * 2**30  # a zip that unpacks to more than this is not preference data
_MAX_ARRAY_BYTES = 256 * 2**20  # a JSON array is read whole; JSON Lines has no such limit


class FileSource:
    """One file of battles."""

    simulated = False
    passed_over: Mapping[str, str] = NOTHING

    def __init__(self, path: Path, settings: IngestSettings) -> None:
        self.path = path
        self.name = str(path.resolve())
        self._settings = settings

    def cursor(self) -> dict[str, Any]:
        return {"sha256": file_sha256(self.path)}

    def batches(self, since: dict[str, Any] | None) -> Iterator[pa.RecordBatch]:
        found = False
        for label, shape_batches in read_file(self.path, self._settings):
            if shape_batches is None:
                raise SourceError(
                    f"{label} is a benchmark table, not battles: measure on it with `--benchmarks`"
                )
            for batch in shape_batches:
                found = True
                yield batch
        if not found:
            raise SourceError(f"{self.path} holds no battles: it is empty; give another source")


class FolderSource:
    """Every file of battles in a folder; hidden files and benchmark tables are left alone."""

    simulated = False
    passed_over: Mapping[str, str] = NOTHING

    def __init__(self, path: Path, settings: IngestSettings) -> None:
        self.path = path
        self.name = str(path.resolve())
        self._settings = settings
        self._looked: dict[str, SeenFile] | None = None

    def cursor(self) -> dict[str, Any]:
        self._looked = {path.name: SeenFile.of(path) for path in self._files()}
        return {name: one.sha256 for name, one in self._looked.items()}

    def batches(self, since: dict[str, Any] | None) -> Iterator[pa.RecordBatch]:
        """Yield the battles of the files that the last `cursor` saw.

        Raises
        ------
        SourceUnreachable
            If one of them changed since, or is gone: its cursor is not of what was read.
        """
        if self._looked is None:
            self.cursor()
        found = False
        for name, one in (self._looked or {}).items():
            if since and since.get(name) == one.sha256:
                found = True
            else:
                found |= yield from self._read(one)
        if not found:
            self._holds_none()

    def _read(self, one: SeenFile) -> Generator[pa.RecordBatch, None, bool]:
        """Yield a file's battles and make sure that it is still the same; return if it has any."""
        found = False
        try:
            for label, shape_batches in read_file(one.path, self._settings):
                if shape_batches is None:
                    log.info("%s is a benchmark table: not ingested", label)
                    continue
                found = True
                yield from shape_batches
        except FileNotFoundError as error:
            raise _changed(one.path) from error
        except SourceError:
            if one.is_as_it_was():
                raise
        if not one.is_as_it_was():
            raise _changed(one.path)
        return found

    def _files(self) -> list[Path]:
        return sorted(p for p in self.path.iterdir() if is_readable(p.name) and p.is_file())

    def _holds_none(self) -> None:
        raise SourceError(
            f"no file of battles in {self.path}: expected one of {', '.join(FORMATS)} (or "
            "gzip or zip of these) in a published shape; docs/ingest.md lists them"
        )


def is_readable(name: str) -> bool:
    """Return whether a folder's file is read, by its name: hidden ones are not."""
    return not name.startswith(".") and _format(name) is not None


@dataclass(frozen=True)
class SeenFile:
    """A file as it was when its digest was taken."""

    path: Path
    sha256: str
    stamp: tuple[int, ...]

    @classmethod
    def of(cls, path: Path) -> SeenFile:
        stamp = _stamp(path)
        try:
            return cls(path, file_sha256(path), stamp)
        except FileNotFoundError as error:
            raise _changed(path) from error
        except OSError as error:
            raise SourceError(
                f"{path} cannot be read ({error.strerror}): see that this process may read it"
            ) from error

    def is_as_it_was(self) -> bool:
        return _stamp(self.path) == self.stamp


def _stamp(path: Path) -> tuple[int, ...]:
    """Return what tells one state of a file from another, without reading it."""
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise _changed(path) from error
    return found.st_ino, found.st_size, found.st_mtime_ns


def _changed(path: Path) -> SourceUnreachable:
    return SourceUnreachable(
        f"{path} changed while it was read: nothing was ingested; run again once it is written"
    )


def read_file(
    path: Path, settings: IngestSettings, source: str | None = None
) -> Iterator[tuple[str, Iterator[pa.RecordBatch] | None]]:
    """Yield (label, battles) for each table in a file; None for a table that is not battles.

    Raises
    ------
    SourceError
        With one sentence, if anything in it cannot be read.
    """
    with _said(str(path)):
        if path.stat().st_size == 0:
            raise SourceError(f"{path} is empty (0 bytes): give a file with battles")
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                members = [m for m in archive.infolist() if _format(m.filename)]
                if sum(m.file_size for m in members) > _MAX_UNPACKED_BYTES:
                    raise SourceError(
                        f"{path} would unpack to over {_MAX_UNPACKED_BYTES >> 30} GB: unpack it "
                        "yourself and give the folder"
                    )
                if not members:
                    raise SourceError(
                        f"{path} holds none of {', '.join(FORMATS)}: give an archive of these"
                    )
                for member in members:
                    label = f"{path}:{member.filename}"
                    with archive.open(member) as file:
                        yield label, _battles(file, member.filename, label, settings, source)
        elif path.suffix == ".gz":
            with gzip.open(path) as packed:
                inner = path.name.removesuffix(".gz")
                yield str(path), _battles(packed, inner, str(path), settings, source)
        else:
            with path.open("rb") as plain:
                yield str(path), _battles(plain, path.name, str(path), settings, source)


def _format(name: str) -> str | None:
    lower = name.lower()
    if lower.endswith(".zip"):
        return ".zip"
    lower = lower.removesuffix(".gz")
    return next((f for f in FORMATS if lower.endswith(f)), None)


def _battles(
    file: Any, name: str, label: str, settings: IngestSettings, source: str | None
) -> Iterator[pa.RecordBatch] | None:
    """Return the battles in an open file, or None if its columns are a benchmark's."""
    raw = _raw_batches(file, name, label, settings)
    with _said(label):
        first = next(raw, None)
    if first is None:
        raise SourceError(f"{label} has no rows: give a file with battles")
    shape = find_shape(first.schema.names, label)
    if shape.rows is None:
        return None
    origin = source or Path(name).name

    def battles() -> Iterator[pa.RecordBatch]:
        with _said(label):
            yield to_battles(shape, first, origin)
            for batch in raw:
                yield to_battles(shape, batch, origin)

    return battles()


def _raw_batches(
    file: Any, name: str, label: str, settings: IngestSettings
) -> Iterator[pa.RecordBatch]:
    kind = _format(name)
    if kind == ".parquet":
        with tempfile.TemporaryFile() as spool:
            if not isinstance(file, io.BufferedReader):  # Parquet is read from its end: unpack
                shutil.copyfileobj(file, spool)
                file = spool
            with pq.ParquetFile(file) as table:
                yield from table.iter_batches(batch_size=settings.batch_rows)
    elif kind == ".csv":
        yield from _csv_batches(file, label, settings)
    else:
        yield from _json_batches(file, label, settings)


def _csv_batches(file: IO[bytes], label: str, settings: IngestSettings) -> Iterator[pa.RecordBatch]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    csv.field_size_limit(settings.max_cell_chars)
    rows = csv.reader(text, strict=True)
    done = 0
    try:
        header = next(rows, None)
        if not header:
            return
        while chunk := list(islice(rows, settings.batch_rows)):
            for offset, row in enumerate(chunk):
                if len(row) != len(header):
                    raise SourceError(
                        f"{label} row {done + offset + 1} has {len(row)} cells where the header "
                        f"has {len(header)}: mend the row or its quoting"
                    )
            done += len(chunk)
            columns = {h: [r[i] for r in chunk] for i, h in enumerate(header)}
            yield pa.RecordBatch.from_pydict({h: _numbers(c) for h, c in columns.items()})
    except csv.Error as error:
        if "field larger than field limit" in str(error):
            raise SourceError(
                f"{label} has a cell of over {settings.max_cell_chars} characters near line "
                f"{rows.line_num}: shorten it or raise `ingest.max_cell_chars`"
            ) from error
        raise SourceError(f"{label} is not valid CSV near line {rows.line_num}: {error}") from error
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{label} is not UTF-8 after line {rows.line_num} (byte {error.object[error.start]:#x}"
            "): convert the whole file to UTF-8"
        ) from error


def _numbers(cells: list[str]) -> list[Any]:
    """Return cells as numbers where every one is a number: score columns are known by type."""
    try:
        return [None if c == "" else float(c) for c in cells]
    except ValueError:
        lower = {c.strip().lower() for c in cells}
        if lower <= {"true", "false", ""}:
            return [None if c == "" else c.strip().lower() == "true" for c in cells]
        return list(cells)


def _json_batches(file: Any, label: str, settings: IngestSettings) -> Iterator[pa.RecordBatch]:
    reader = io.BufferedReader(file)
    if reader.peek(1)[:1] == b"[":
        body = reader.read(_MAX_ARRAY_BYTES + 1)
        if len(body) > _MAX_ARRAY_BYTES:
            raise SourceError(
                f"{label} is a JSON array of over {_MAX_ARRAY_BYTES >> 20} MB: convert it to JSON "
                "Lines, which is read piece by piece"
            )
        objects = _objects(json.loads(body), label)
    else:
        objects = _lines(reader, label, settings)
    while chunk := list(islice(objects, settings.batch_rows)):
        yield pa.RecordBatch.from_pylist(chunk)


def _lines(reader: IO[bytes], label: str, settings: IngestSettings) -> Iterator[dict[str, Any]]:
    number = 0
    limit = 64 * settings.max_cell_chars  # a line holds many cells
    while line := reader.readline(limit):
        number += 1
        if len(line) == limit and not line.endswith(b"\n"):
            raise SourceError(
                f"{label} line {number} is over {limit} bytes: shorten it or raise "
                "`ingest.max_cell_chars`"
            )
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except UnicodeDecodeError as error:
            raise SourceError(
                f"{label} line {number} is not UTF-8: convert the whole file to UTF-8"
            ) from error
        except ValueError as error:
            raise SourceError(f"{label} line {number} is not JSON: {error}; mend it") from error
        yield from _objects([row], f"{label} line {number}")


def _objects(rows: Any, label: str) -> Iterator[dict[str, Any]]:
    for row in rows:
        if not isinstance(row, dict):
            raise SourceError(f"{label} holds {type(row).__name__}, expected an object a row")
        yield row


@contextmanager
def _said(label: str) -> Iterator[None]:
    """Turn what the readers raise into one sentence."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, zipfile.BadZipFile) as error:
        raise SourceError(f"{label} is truncated or damaged ({error}): fetch it again") from error
    except pa.ArrowException as error:
        first = str(error).splitlines()[0].rstrip(".")
        raise SourceError(
            f"{label} cannot be read as its ending says ({first}): it may be truncated; fetch it "
            "again"
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SourceError(f"{label} is not valid UTF-8 JSON ({error}): mend it") from error
