"""The history: what was decided and moved, and where that leaves the aliases.

An `Entry` is one decision or move. Who is champion and where a rollback goes is a replay of the
entries (`replay`). How they are kept is in `registry.chain`.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import math
import os
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, Literal

from routellm import __version__

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
ALIASES = (PREVIOUS, CHAMPION, CHALLENGER)  # the order they are set in
GENESIS = "0" * 64  # what the first entry follows

Action = Literal[
    "promote", "rollback", "revert", "outside", "challenger", "reject", "inconclusive", "retire"
]


@dataclass(frozen=True)
class Entry:
    """One line of the history.

    Attributes
    ----------
    version : str or None
        The version it is about: promoted, rejected, put in line; of a ``revert``, the one that
        failed its smoke check.
    from_, to : str or None
        The champion before and after it.
    aliases : Mapping
        What it sets: alias -> version, or None to take the alias away.
    smoke_due : bool
        Whether a smoke check follows it.
    decision : Mapping or None
        The gate's verdict with every check and number.
    at : str
        When it was written, UTC.
    prev : str
        SHA-256 of the entry before it.
    n, raw, sha256, created_s, void, marks
        Its number; its text as written, and the SHA-256 of that; seconds since the epoch by
        MLflow's clock; whether its writer lost a race; what became of it (``applied``: when,
        ``smoke``, ``written``). These are not part of the text.
    """

    action: Action
    version: str | None
    from_: str | None
    to: str | None
    reason: str
    aliases: Mapping[str, str | None] = field(default_factory=dict)
    forced: bool = False
    smoke_due: bool = False
    decision: Mapping[str, Any] | None = None
    snapshot: str | None = None
    code_version: str = __version__
    by: str = field(default_factory=lambda: who())
    at: str = field(default_factory=lambda: now_utc())
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    prev: str = GENESIS
    n: int = 0
    raw: str = ""
    sha256: str = ""
    created_s: float = 0.0
    void: bool = False
    marks: Mapping[str, str] = field(default_factory=dict)

    @property
    def applied(self) -> bool:
        """Whether all that it sets was set."""
        return "applied" in self.marks

    @property
    def since(self) -> str:
        """From when it counted, UTC: when it was applied, or written."""
        return self.marks.get("applied", self.at)

    def text(self) -> str:
        """Return what is hashed: JSON, the same from the same values."""
        return canonical({name.rstrip("_"): getattr(self, name) for name in TEXT})

    def to_dict(self) -> dict[str, Any]:
        """Return it for printing and for other programs."""
        return {
            "n": self.n,
            "at": self.at,
            "by": self.by,
            "action": self.action,
            "version": self.version,
            "from": self.from_,
            "to": self.to,
            "reason": self.reason,
            "forced": self.forced,
            "decision": None if self.decision is None else dict(self.decision),
            "snapshot": self.snapshot,
            "code_version": self.code_version,
            "applied_at": self.marks.get("applied"),
            "smoke": self.marks.get("smoke"),
            "sha256": self.sha256,
            "prev": self.prev,
        }

    def told(self) -> str:
        """Return it in words."""
        if self.action == "challenger":
            what = f"version {self.version} put in line"
        elif self.action in ("reject", "inconclusive"):
            what = f"version {self.version}: {self.action}"
        else:
            what = f"{self.action}: champion {self.from_ or 'none'} → {self.to or 'none'}"
        return f"{what}, by {self.by} at {self.at}: {self.reason}"


_NOT_TEXT = ("n", "raw", "sha256", "created_s", "void", "marks")
TEXT = tuple(f.name for f in fields(Entry) if f.name not in _NOT_TEXT)  # what is hashed


@dataclass(frozen=True)
class Standing:
    """Where a history leaves things: the champion, those before it, and the entry that made it."""

    champion: str | None = None
    before: tuple[str, ...] = ()
    entry: Entry | None = None


def advance(standing: Standing, entry: Entry) -> Standing:
    """Return where one more entry leaves things."""
    champion, before = standing.champion, list(standing.before)
    if entry.action == "promote" or (entry.action == "outside" and entry.to not in before):
        if champion is not None:
            before.insert(0, champion)
    elif entry.action in ("rollback", "outside"):
        if entry.to in before:
            before = before[before.index(entry.to) + 1 :]
    elif entry.action == "revert":
        before = [b for b in before if b != entry.version]
    else:
        return standing
    before = [b for i, b in enumerate(before) if b != entry.to and b not in before[:i]]
    made = entry if entry.to != champion else standing.entry
    return Standing(entry.to, tuple(before), made)


def replay(entries: Iterable[Entry]) -> Standing:
    """Return where entries, oldest first, leave things."""
    standing = Standing()
    for entry in entries:
        standing = advance(standing, entry)
    return standing


def serving_at(entries: Iterable[Entry], when: datetime) -> Entry | None:
    """Return the entry whose ``to`` was champion at a time (local, if it names no zone)."""
    moment = when.astimezone(UTC)
    found = None
    for entry in entries:
        if entry.applied and datetime.fromisoformat(entry.since) > moment:
            break
        if entry.applied and entry.from_ != entry.to:
            found = entry
    return found


def canonical(value: Any) -> str:
    """Return JSON that is the same for the same value: sorted, no spaces, ASCII."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(text: str) -> str:
    """Return SHA-256 of a text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: NumPy's numbers as numbers, NaN as None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def who() -> str:
    """Return who is asking: ``ROUTELLM_USER``, or the login name."""
    named = os.environ.get("ROUTELLM_USER")
    if named:
        return named
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return f"uid {os.getuid()}"


def now_utc() -> str:
    """Return the time, UTC, to the second."""
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds")
