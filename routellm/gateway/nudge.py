"""The nudge: ``POST /admin/look`` has the gateway look at its aliases now, not at the next poll.

What a nudge says is not read: where the alias points is what the registry says, so a nudge that is
lost, repeated or early does no harm. It is kept as the time of a file, since the processes that
serve from one home accept from one socket: one of them is posted to, and all have to hear it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import time
from collections.abc import Mapping
from pathlib import Path

from pydantic import SecretStr

from routellm.errors import GatewayError
from routellm.gateway.keys import Keys

MOST_NUDGE_BYTES = 262_144  # our own webhook sends a decision with all of its figures
_FRESH_S = 300.0  # an older signature may be a recording


class Nudge:
    """Takes nudges from whoever may give them.

    Parameters
    ----------
    path : Path
        The file whose time is that of the last nudge; there is none before the first.
    secret : SecretStr, optional
        What webhooks are signed with; without it only admin keys open the endpoint.
    """

    def __init__(self, path: Path, secret: SecretStr | None, keys: Keys) -> None:
        self.path = path
        self._secret = None if secret is None else secret.get_secret_value().encode()
        self._keys = keys

    def let_in(self, headers: Mapping[str, str], body: bytes | bytearray) -> None:
        """Let a nudge in that MLflow or our registry signed, or that has an admin key.

        Raises
        ------
        GatewayError
            If the signature is wrong or old, or there is neither one nor a key (401), or the key
            is not an admin's (403).
        """
        if "x-mlflow-signature" in headers:  # as Standard Webhooks have it
            given = headers["x-mlflow-signature"]
            at = headers.get("x-mlflow-timestamp", "")
            before = f"{headers.get('x-mlflow-delivery-id', '')}.{at}."
            right = "v1," + base64.b64encode(self._mac(before, body)).decode()
        elif "x-routellm-signature" in headers:  # as `registry.notify` has it
            given = headers["x-routellm-signature"]
            at = headers.get("x-routellm-timestamp", "")
            right = "sha256=" + self._mac(f"{at}.", body).hex()
        else:
            self._keys.admin(headers)
            return
        fresh = at.isascii() and at.isdigit() and abs(time.time() - int(at[:20])) <= _FRESH_S
        if not (hmac.compare_digest(given.encode(), right.encode()) and fresh):
            raise GatewayError(
                f"the signature is not right, or older than {_FRESH_S:.0f} s: sign with "
                "gateway.nudge_secret, and check both clocks",
                status=401,
                code="invalid_signature",
            )

    def give(self) -> None:
        """Have every process that serves from this home look; returns at once.

        Raises
        ------
        GatewayError
            If the file cannot be written (503).
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            now = time.time_ns()
            os.utime(self.path, ns=(now, now))  # the system's own stamp is as coarse as 4 ms
        except OSError as error:
            raise GatewayError(
                f"the nudge cannot be kept ({error.strerror}): the next poll sees the alias",
                status=503,
                code="not_kept",
            ) from error

    def given(self) -> int:
        """Return a number that each nudge changes."""
        try:
            return self.path.stat().st_mtime_ns
        except OSError:
            return 0

    def _mac(self, before: str, body: bytes | bytearray) -> bytes:
        if self._secret is None:
            raise GatewayError(
                "signed nudges are not taken here: set gateway.nudge_secret to what they are "
                "signed with, or send an admin key",
                status=401,
                code="invalid_signature",
            )
        return hmac.new(self._secret, before.encode() + body, hashlib.sha256).digest()
