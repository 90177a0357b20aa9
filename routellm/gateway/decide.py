"""The decision: which prompt is scored, against which threshold, and where the query goes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from routellm.errors import GatewayError
from routellm.settings import GatewaySettings

# RouteLLM's own names: router-[kind]-[threshold]
_NAMED = re.compile(r"router-([a-z_]+)-([0-9.eE+-]+)")
_SCORED_CHARS = 20_000  # an encoder reads less than this; a longer prompt is forwarded whole


@dataclass(frozen=True)
class Target:
    """What a request asks for: at most one of the two is set."""

    threshold: float | None = None
    strong_fraction: float | None = None
    kind: str | None = None  # router kind that the model name insists on


def prompt_of(body: Mapping[str, Any]) -> str:
    """Return what is scored: the text of the first user turn, as in training.

    Raises
    ------
    GatewayError
        If there are no messages, or none is from a user.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise GatewayError("`messages` must be a list with at least one message")
    for message in messages:
        if isinstance(message, Mapping) and message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, list):
                parts = [p for p in content if isinstance(p, Mapping)]
                content = "\n".join(p["text"] for p in parts if isinstance(p.get("text"), str))
            return (content if isinstance(content, str) else "")[:_SCORED_CHARS]
    raise GatewayError("no message has the role `user`: there is no query to route")


def target_of(
    body: Mapping[str, Any], headers: Mapping[str, str], settings: GatewaySettings
) -> Target:
    """Return what a request asks for: the model name, else the body, else headers, else settings.

    Raises
    ------
    GatewayError
        If a value is not a number in [0, 1], or two ask for different things.
    """
    name = str(body.get("model", ""))
    if named := _NAMED.fullmatch(name):
        return Target(threshold=_share(named.group(2), "threshold"), kind=named.group(1))
    routing = body.get("routing")
    if routing is not None and not isinstance(routing, Mapping):
        raise GatewayError("`routing` must be an object with `threshold` or `strong_fraction`")
    if routing and not set(routing) <= {"threshold", "strong_fraction"}:
        raise GatewayError(f"`routing` knows threshold and strong_fraction, not {sorted(routing)}")
    threshold = (routing or {}).get("threshold", headers.get("x-routellm-threshold"))
    fraction = (routing or {}).get("strong_fraction", headers.get("x-routellm-strong-fraction"))
    if threshold is not None and fraction is not None:
        raise GatewayError("ask for a threshold or a strong fraction, not both")
    if threshold is not None:
        return Target(threshold=_share(threshold, "threshold"))
    if fraction is not None:
        return Target(strong_fraction=_share(fraction, "strong fraction"))
    if settings.threshold is not None:
        return Target(threshold=settings.threshold)
    return Target(strong_fraction=settings.strong_fraction)


def _share(raw: Any, what: str) -> float:
    try:
        value = float(raw)
    except (TypeError, ValueError):
        value = float("nan")
    if not 0.0 <= value <= 1.0:
        raise GatewayError(f"{what} {str(raw)[:40]!r} is not a number in [0, 1]")
    return value


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

    route: str  # strong | weak
    model: str
    reason: str
    version: str = ""
    kind: str = ""
    win_rate: float | None = None
    threshold: float | None = None
    canary: bool = False  # whether a challenger decided

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
        if self.canary:
            out["x-routellm-canary"] = "true"
        return out
