"""The decision: what a version makes of a prompt, and where the query goes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from routellm.routers.base import Pair


def user_of(body: Mapping[str, Any]) -> str:
    """Return the caller's own name for its user (OpenAI's `user` field), or ""."""
    user = body.get("user")
    return user if isinstance(user, str) else ""


def on_canary_side(version: str, user: str, prompt: str, share: float) -> bool:
    """Say whether a conversation belongs to the share that a canary decides for.

    By a hash of the user and the first user turn, not by a draw: all turns of a conversation, on
    whichever gateway, are decided by one version, so that it does not change models on its way.
    The version is hashed too, so that each challenger meets other conversations.
    """
    conversation = f"{user}\0{prompt}".encode("utf-8", "surrogatepass")
    key = version.encode()[: hashlib.blake2b.MAX_KEY_SIZE]
    # `person` keeps this draw apart from the `random` router's, which hashes prompts as well
    raw = hashlib.blake2b(conversation, key=key, person=b"canary", digest_size=8).digest()
    return int.from_bytes(raw, "big") / 2.0**64 < share


@dataclass(frozen=True)
class Scored:
    """What one version makes of one prompt."""

    route: str  # strong | weak
    win_rate: float
    threshold: float
    latency_ms: float  # of scoring alone


@dataclass(frozen=True)
class Routed:
    """Where a query goes, and why."""

    route: str  # strong | weak | a model of the pool
    model: str
    reason: str
    version: str = ""
    kind: str = ""
    win_rate: float | None = None
    threshold: float | None = None
    policy: str = ""  # that the request asked for instead of the pair's router
    confidence: float | None = None  # in the weak model's answer, as that policy found it
    canary: bool = False  # whether a challenger decided
    named: bool = False  # whether the request named the model: no other may answer
    probability: float = 1.0  # with which this version was the one to decide, beside a canary
    prompt: str | None = field(default=None, repr=False)  # what was scored
    pair: Pair | None = None  # of the version that decided

    def headers(self) -> dict[str, str]:
        """Return the response headers that say so."""
        out = {
            "x-routellm-route": self.route,
            "x-routellm-model": self.model,
            "x-routellm-reason": self.reason,
        }
        if self.version:
            out |= {"x-routellm-version": self.version, "x-routellm-kind": self.kind}
        if self.win_rate is not None:
            out["x-routellm-win-rate"] = f"{self.win_rate:.4f}"
        if self.threshold is not None:
            out["x-routellm-threshold"] = f"{self.threshold:.4f}"
        if self.policy:
            out["x-routellm-policy"] = self.policy
        if self.confidence is not None:
            out["x-routellm-confidence"] = f"{self.confidence:.4f}"
        if self.canary:
            out["x-routellm-canary"] = "true"
        return out
