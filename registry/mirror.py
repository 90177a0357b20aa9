"""A copy of the history in the home folder, by which a history that was cut short is noticed.

``history.jsonl`` has a line for every entry that a command run from this home has seen, and each
entry carries the hash of the one before it. Lines say which MLflow and which model they are of.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from routellm.errors import RegistryError


class Copied(Protocol):
    """What is copied of an entry."""

    @property
    def n(self) -> int: ...
    @property
    def sha256(self) -> str: ...
    @property
    def raw(self) -> str: ...


class Mirror:
    """The copy at `path` of one model's history in one MLflow."""

    def __init__(self, path: Path, mlflow: str, model: str) -> None:
        self.path = path
        self.key = {"mlflow": mlflow, "model": model}

    def lines(self) -> list[Mapping[str, Any]]:
        """Return the copied entries of this history, oldest first.

        Raises
        ------
        RegistryError
            If a line was edited or taken out.
        """
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RegistryError(f"{self.path} cannot be read: {error.strerror}") from error
        return self._parsed(raw)

    def _parsed(self, raw: bytes) -> list[Mapping[str, Any]]:
        whole = raw[: raw.rfind(b"\n") + 1]  # a line without an end was being written
        found: list[Mapping[str, Any]] = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                doc = json.loads(line)
                text = json.dumps(doc["entry"], sort_keys=True, separators=(",", ":"))
                sound = hashlib.sha256(text.encode()).hexdigest() == doc["sha256"]
                ours = all(doc[k] == v for k, v in self.key.items())
                n = int(doc["n"])
            except (ValueError, KeyError, TypeError):
                sound, ours, n = False, False, 0
            if not sound:
                raise self._broken(f"line {number} of {self.path} was edited")
            if ours:
                if n != len(found) + 1:
                    raise self._broken(
                        f"line {number} of {self.path} is entry {n} where entry {len(found) + 1} "
                        "should be"
                    )
                found.append(doc)
        return found

    def compare(
        self, known: Sequence[Mapping[str, Any]], entries: Sequence[Copied], name: str, remedy: str
    ) -> None:
        """Hold what MLflow has against what was copied before it was read.

        Raises
        ------
        RegistryError
            If an entry is not there any more, or is another.
        """
        for line, entry in zip(known, entries, strict=False):
            if line["sha256"] != entry.sha256:
                raise RegistryError(
                    f"the history was tampered with: entry {entry.n} of {name} is not the same in "
                    f"MLflow and in {self.path}; {remedy}"
                )
        if len(known) > len(entries):
            raise RegistryError(
                f"the history was tampered with: entry {len(entries) + 1} of {name} is missing "
                f"from MLflow, {self.path} has it; {remedy}"
            )

    def extend(self, entries: Iterable[Copied]) -> None:
        """Copy the entries that are not copied yet.

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        entries = list(entries)
        if not entries:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file, _locked(file):
            file.seek(0)
            raw = file.read()
            copied = len(self._parsed(raw))
            new = [
                {**self.key, "n": e.n, "sha256": e.sha256, "entry": json.loads(e.raw)}
                for e in entries[copied:]
            ]
            if not new:
                return
            file.truncate(raw.rfind(b"\n") + 1)
            file.write("".join(json.dumps(line) + "\n" for line in new).encode())
            file.flush()
            os.fsync(file.fileno())

    def _broken(self, what: str) -> RegistryError:
        return RegistryError(
            f"this home's copy of the history was tampered with: {what}; MLflow has the history "
            f"itself: move the file away, and the next command copies it again"
        )


@contextmanager
def _locked(file: BinaryIO) -> Iterator[None]:
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
