"""The history as a chain of entries in MLflow itself, which all machines share.

An entry is a version of the registered model ``<model>-history``, so it outlives the versions it
speaks of. MLflow creates and numbers a version in one step and never gives a number twice. Each
entry carries the SHA-256 of the entry before it, which does two things:

- Compare-and-set with no lock server. A writer names the last entry it has seen. If another was
  faster, the entry names one that is not the last any more: it is void, and everybody who reads in
  order finds the same.
- Tampering shows. An entry that was edited, taken out or slipped in breaks the chain; one cut off
  at its end is missed by the copies (`registry.mirror`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from registry.calls import patient, redacted, versions_of
from registry.history import GENESIS, TEXT, Entry, digest
from registry.mirror import Mirror
from routellm.errors import RegistryError
from routellm.settings import Settings

_SOURCE = "routellm:/history"  # MLflow wants one, and a server checks its form; nothing is there
_PART = 60_000  # characters of an entry in one tag; MLflow takes 100,000, MySQL 65,535 bytes
_PAGE = 1000


@dataclass(frozen=True)
class Chain:
    """A verified history: all its entries, oldest first, void ones among them."""

    written: tuple[Entry, ...] = ()

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The entries that count."""
        return tuple(e for e in self.written if not e.void)

    @property
    def last(self) -> Entry | None:
        return next((e for e in reversed(self.written) if not e.void), None)

    @property
    def head(self) -> str:
        return self.last.sha256 if self.last else GENESIS


class History:
    """Reads and writes the chain of one registered model."""

    def __init__(self, settings: Settings, client: Any) -> None:
        self.settings = settings
        self.client = client
        self.name = f"{settings.model}-history"
        where = redacted(settings.resolved_tracking_uri)
        self.mirror = Mirror(settings.home / "history.jsonl", where, settings.model)
        self.notices: list[str] = []  # what whoever asked for a move should be told

    def read(self) -> Chain:
        """Return the verified history, having copied what is new of it.

        Raises
        ------
        RegistryError
            If it was tampered with.
        """
        known = self.mirror.lines()  # before MLflow is read: all that is copied must be there
        chain = verified(
            versions_of(self.settings, self.client, self.name), self.name, self._remedy
        )
        self.mirror.compare(known, chain.written, self.name, self._remedy)
        try:
            self.mirror.extend(chain.written)
        except OSError as error:  # it is a copy: neither reading nor a rollback waits for it
            notice = f"the history was not copied to {self.mirror.path} ({error.strerror})"
            if notice not in self.notices:
                self.notices.append(notice)
        return chain

    def append(self, entry: Entry) -> Entry | None:
        """Write an entry; None if another writer was faster."""
        text = entry.text()
        parts = [text[i : i + _PART] for i in range(0, len(text), _PART)]
        tags = {f"entry.{i}": part for i, part in enumerate(parts)}
        tags |= {"sha256": digest(text), **entry.marks}

        # made twice by another try, the second names an entry that is not the last: it is void
        patient(self.settings, lambda: self._create(tags, entry.told()[:1000]))
        for one in self.read().entries:
            if one.id == entry.id:
                return one
        return None

    def mark(self, entry: Entry, name: str, value: str) -> Entry:
        """Note beside an entry what became of it; returns it so."""
        patient(
            self.settings,
            lambda: self.client.set_model_version_tag(self.name, str(entry.n), name, value[:5000]),
        )
        return replace(entry, marks={**entry.marks, name: value})

    def overtaken(self, entry: Entry) -> bool:
        """Return whether the history went on after an entry."""
        newer = patient(
            self.settings,
            lambda: self.client.search_model_versions(
                f"name='{self.name}' and version_number > {entry.n}", max_results=_PAGE
            ),
        )
        return any(f'"prev":"{entry.sha256}"' in _text(row.tags) for row in newer)

    def _create(self, tags: dict[str, str], description: str) -> None:
        from mlflow.exceptions import MlflowException

        def create() -> None:
            self.client.create_model_version(
                self.name, source=_SOURCE, tags=tags, description=description
            )

        try:
            create()
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            try:
                self.client.create_registered_model(
                    self.name,
                    description=f"What was decided about {self.settings.model}, and every move of "
                    "its aliases. Written by `routellm`, read by `routellm history`; an entry that "
                    "is edited or deleted breaks the chain of hashes.",
                )
            except MlflowException as exists:
                if exists.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            create()

    @property
    def _remedy(self) -> str:
        return (
            "restore MLflow from a backup; or, to begin a new history, rename the registered model "
            f"{self.name} and move {self.mirror.path} away"
        )


def verified(rows: Sequence[Any], name: str, remedy: str) -> Chain:
    """Return the history that MLflow's versions (by number) hold.

    Raises
    ------
    RegistryError
        If an entry was edited, is missing, or is none.
    """
    head, known, chain = GENESIS, {GENESIS}, []
    last_valid = 0
    for expected, row in enumerate(rows, 1):
        n = int(row.version)
        if n != expected:
            raise _broken(f"entry {expected} of {name} is missing from MLflow", remedy)
        text, sha = _text(row.tags), row.tags.get("sha256")
        if not text or sha is None:
            raise _broken(f"version {n} of {name} is no entry of the history", remedy)
        if digest(text) != sha:
            raise _broken(f"entry {n} of {name} was edited: its text has another hash", remedy)
        entry = _entry(row, text, name, remedy)
        if entry.prev not in known:
            edited = f"entry {last_valid}" if last_valid else "its beginning"
            raise _broken(
                f"{edited} of {name} was edited: entry {n} carries the hash of what it was",
                remedy,
            )
        if entry.prev == head:
            head, last_valid = sha, n
            known.add(sha)
        else:
            entry = replace(entry, void=True)
        chain.append(entry)
    return Chain(tuple(chain))


def _entry(row: Any, text: str, name: str, remedy: str) -> Entry:
    try:
        doc = json.loads(text)
        return Entry(
            **{name: doc[name.rstrip("_")] for name in TEXT},
            n=int(row.version),
            raw=text,
            sha256=row.tags["sha256"],
            created_s=row.creation_timestamp / 1000,
            marks={k: v for k, v in row.tags.items() if k in ("applied", "smoke", "written")},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise _broken(f"entry {row.version} of {name} cannot be read", remedy) from error


def _text(tags: Mapping[str, str]) -> str:
    parts: list[str] = []
    while (part := tags.get(f"entry.{len(parts)}")) is not None:
        parts.append(part)
    return "".join(parts)


def _broken(what: str, remedy: str) -> RegistryError:
    return RegistryError(f"the history was tampered with: {what}; {remedy}")
