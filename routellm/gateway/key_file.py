"""The file of API keys: made, revoked and read here; it holds digests, never a key.

A key is 256 random bits, so its plain SHA-256 is as hard to turn back as the key is to guess: slow
hashes are for passwords, which people choose, and would cost every request milliseconds.

Keys that were revoked stay in the file. So a gateway of which every key was revoked is closed,
not open to everyone, and what a key has spent can still be told.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from routellm.errors import UsageError
from routellm.gateway.targets import FIELDS, Target
from routellm.lock import alone

FORMAT = 1


class Key(BaseModel):
    """One API key, without the key itself.

    Attributes
    ----------
    digest : str
        SHA-256 of the key.
    requests_per_minute, concurrent : int, optional
        Most requests in a minute, and at once; None is no limit.
    usd_per_day, usd_per_month : float, optional
        Most dollars that its requests may cost in a day, a month (UTC).
    threshold, strong_fraction, quality, max_usd : float, optional
        Its target, where a request asks for none; at most one (`routellm.gateway.targets`).
    admin : bool
        Opens the admin endpoints, and those alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    name: str = Field(pattern=r"^[^\x00-\x1f\x7f]{1,100}$")
    digest: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    created_at: AwareDatetime
    revoked_at: AwareDatetime | None = None
    admin: bool = False
    requests_per_minute: int | None = Field(None, ge=1)
    concurrent: int | None = Field(None, ge=1)
    usd_per_day: float | None = Field(None, ge=0, allow_inf_nan=False)
    usd_per_month: float | None = Field(None, ge=0, allow_inf_nan=False)
    threshold: float | None = Field(None, ge=0, le=1)
    strong_fraction: float | None = Field(None, ge=0, le=1)
    quality: float | None = Field(None, ge=0, le=1)
    max_usd: float | None = Field(None, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_target(self) -> Key:
        if sum(getattr(self, name) is not None for name in FIELDS) > 1:
            raise ValueError(f"a key has one target: give one of {', '.join(FIELDS)}")
        return self

    @property
    def target(self) -> Target | None:
        given = {n: v for n in FIELDS if (v := getattr(self, n)) is not None}
        return Target.of(given, "key")

    @property
    def budgeted(self) -> bool:
        return self.usd_per_day is not None or self.usd_per_month is not None


def add_key(path: Path, name: str, **limits: object) -> tuple[Key, str]:
    """Make a key and write it; returns it and its text, which is nowhere else.

    Parameters
    ----------
    limits
        As the attributes of `Key`.

    Raises
    ------
    UsageError
        If a limit is not allowed, or the file cannot be read or written.
    """
    with _changing(path) as keys:
        key_id = secrets.token_hex(6)
        # the prefix lets secret scanners find a key that was published; the id says which it is
        text = f"rlk_{key_id}_{secrets.token_hex(32)}"
        now = datetime.now(UTC).replace(microsecond=0)
        given = {n: v for n, v in limits.items() if v is not None}
        try:
            key = Key.model_validate(
                {"id": key_id, "name": name, "digest": digest_of(text), "created_at": now, **given}
            )
        except ValidationError as error:
            raise UsageError(f"the key is not allowed: {_first(error)}") from error
        keys[key_id] = key
    return key, text


def revoke_key(path: Path, key_id: str) -> Key:
    """Revoke a key; gateways that run refuse it from their next request on.

    Raises
    ------
    UsageError
        If there is no such key, or it is revoked already.
    """
    with _changing(path) as keys:
        key = keys.get(key_id)
        if key is None:
            raise UsageError(f"there is no key {key_id!r} in {path}: `routellm keys list` has them")
        if key.revoked_at is not None:
            raise UsageError(f"key {key_id} was revoked on {key.revoked_at:%Y-%m-%d %H:%M} already")
        now = datetime.now(UTC).replace(microsecond=0)
        keys[key_id] = key.model_copy(update={"revoked_at": now})
    return keys[key_id]


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[dict[str, Key]]:
    """Yield the keys, and write them back; one process at a time."""
    try:
        with alone(path.with_name(f".{path.name}.lock")):
            keys = read_keys(path) if path.exists() else {}
            yield keys
            _write(path, keys)
    except OSError as error:
        raise UsageError(f"the key file {path} cannot be written ({error.strerror})") from error


def digest_of(text: str) -> str:
    """Return what the file holds of a key."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read_keys(path: Path) -> dict[str, Key]:
    """Return the file's keys by id, revoked ones too.

    Raises
    ------
    UsageError
        If there is no such file, or it cannot be read.
    """
    try:
        doc = json.loads(path.read_text("utf-8"))
        if doc["format"] != FORMAT:
            raise UsageError(
                f"the key file {path} has format {doc['format']}, and this version reads "
                f"{FORMAT}: install the version that wrote it"
            )
        keys = [Key.model_validate(one) for one in doc["keys"]]
    except ValidationError as error:
        raise UsageError(f"a key in {path} is not allowed: {_first(error)}; mend it") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"the key file {path} cannot be read ({type(error).__name__}): mend or restore it"
        ) from error
    return {key.id: key for key in keys}


def _write(path: Path, keys: Mapping[str, Key]) -> None:
    """Write the file so that readers see the old or the new one, and nobody else any of it."""
    doc = {
        "format": FORMAT,
        "keys": [k.model_dump(mode="json", exclude_none=True) for k in keys.values()],
    }
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
            f.write(json.dumps(doc, indent=1))
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _first(error: ValidationError) -> str:
    """Return what is wrong, without the values: one of them may be a secret."""
    first = error.errors(include_input=False, include_url=False)[0]
    where = ".".join(str(p) for p in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])
