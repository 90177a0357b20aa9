"""Who is calling: the API key of a request, looked up in a file that may change at any time."""

from __future__ import annotations

import hmac
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from routellm.errors import GatewayError, UsageError
from routellm.gateway.key_file import Key, digest_of, read_keys
from routellm.gateway.targets import Target

log = logging.getLogger("routellm.gateway")

_KEY = re.compile(r"rlk_([0-9a-f]{12})_[0-9a-f]{64}")
_NO_DIGEST = "0" * 64
_HEADERS = ("authorization", "x-api-key")  # OpenAI's, Anthropic's


@dataclass(frozen=True)
class Caller:
    """Who sent a request: a key, or None where the gateway has no keys."""

    key: Key | None = None

    @property
    def id(self) -> str:
        """The key's id, for metrics and records; "" of a caller without one."""
        return "" if self.key is None else self.key.id

    @property
    def target(self) -> Target | None:
        return None if self.key is None else self.key.target


class Keys:
    """The keys of a file, read again whenever it changes.

    Without a file, or with one that never held a key, queries need no key: a gateway on localhost
    is open to its own machine. A file that is gone or damaged while the gateway runs opens
    nothing: the keys that were read last go on to hold, and `problem` says so.

    Parameters
    ----------
    path : Path
        ``<home>/keys.json``.

    Raises
    ------
    UsageError
        If there is a file, and it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem = ""
        self._keys: dict[str, Key] = {}
        self._seen: tuple[int, int, int] | None = None
        self._read_if_changed()

    @property
    def needed(self) -> bool:
        """Whether a query needs a key."""
        self._look()
        return bool(self._keys)

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """Return who sent a query.

        Raises
        ------
        GatewayError
            If a key is needed and is missing, unknown or revoked (401), or is an admin's (403).
        """
        self._look()
        if not self._keys:
            return Caller()
        key = self._key_of(headers)
        if key.admin:
            raise GatewayError(
                "this key is for the admin endpoints: send queries with another one",
                status=403,
                code="admin_key",
            )
        return Caller(key)

    def admin(self, headers: Mapping[str, str]) -> Caller:
        """Return who calls an admin endpoint; closed until there is an admin key.

        Raises
        ------
        GatewayError
            If the key is missing, unknown or revoked (401), or is not an admin's (403).
        """
        self._look()
        key = self._key_of(headers)
        if not key.admin:
            raise GatewayError(
                "this endpoint is for admin keys: make one with `routellm keys add NAME --admin`",
                status=403,
                code="admin_only",
            )
        return Caller(key)

    def all(self) -> list[Key]:
        """Return every key, revoked ones too, oldest first."""
        self._look()
        return sorted(self._keys.values(), key=lambda k: k.created_at)

    def _key_of(self, headers: Mapping[str, str]) -> Key:
        given = [text for name in _HEADERS if (text := headers.get(name))]
        if not given:
            raise _no_key('no API key was sent: send one as "Authorization: Bearer KEY"')
        for text in given:
            scheme, _, rest = text.strip().partition(" ")
            if key := self._known(rest.strip() if scheme.lower() == "bearer" else text.strip()):
                return key
        raise _no_key("the API key is not known here, or was revoked: ask for another one")

    def _known(self, text: str) -> Key | None:
        """Return the key that a text is; compares in the same time whatever it is."""
        shape = _KEY.fullmatch(text)
        key = self._keys.get(shape.group(1)) if shape else None
        right = hmac.compare_digest(digest_of(text), _NO_DIGEST if key is None else key.digest)
        return key if right and key is not None and key.revoked_at is None else None

    def _look(self) -> None:
        """Read the file again if it changed; what was read last holds where that fails."""
        try:
            self._read_if_changed()
        except UsageError as error:
            problem = f"{error}; until then the keys that were read last hold"
            if problem != self.problem:
                log.error("%s", problem)
            self.problem = problem

    def _read_if_changed(self) -> None:
        stamp = _stamp(self.path)
        if stamp == self._seen:
            return
        self._seen = stamp
        if stamp is not None:
            self._keys = read_keys(self.path)
        elif self._keys:
            raise UsageError(f"the key file {self.path} is gone: restore it, or restart")
        self.problem = ""


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Return what tells one state of a file from another; None if there is no file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"the key file {path} cannot be read ({error.strerror})") from error
    return found.st_ino, found.st_mtime_ns, found.st_size


def _no_key(message: str) -> GatewayError:
    return GatewayError(message, status=401, code="invalid_api_key")
