"""One request from its first byte to its last, as metrics, logs and feedback see it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from routellm.gateway.decide import Routed
from routellm.gateway.keys import Caller
from routellm.gateway.usage import Usage


@dataclass(frozen=True)
class Call:
    """A call that an answer took beside the one that gave it.

    Attributes
    ----------
    route, model : str
        Who was asked.
    usd : float or None
        None where a price is not set.
    """

    route: str
    model: str
    usage: Usage
    usd: float | None


@dataclass
class Exchange:
    """What is known of a request; filled in as it goes on.

    Attributes
    ----------
    id : str
        Ours, or the caller's ``x-request-id``.
    at : datetime
    endpoint : str
    caller : Caller
        Whose key it came with.
    routed : Routed or None
        The decision; None if there was none.
    route, model : str
        Who answered; "" if nobody did.
    user : str
        The caller's own name for its user, or "".
    prompt : str or None
        What was scored; never logged unless that is switched on.
    pair : dict or None
        The models of the version that decided, by route, as its battles name them.
    traceparent : str
        The caller's own W3C trace context, or "".
    stood_in : str
        Why it was the other model, or "".
    status : int
        0 until an answer begins.
    routing_s, upstream_s, total_s : float
        Of the decision, of the upstream until its last byte, of all.
    usage : Usage
        Of the call that gave the answer.
    also : list of Call
        The other calls that it took, where a policy asks more than once.
    usd, saved_usd : float or None
        Of all calls, and less than strong's answer; None where a price is not set.
    broken : str
        Why the answer ended before its end, or "": the client left, or the upstream broke off.
    """

    id: str
    endpoint: str
    at: datetime = field(default_factory=lambda: datetime.now(UTC))
    caller: Caller = field(default_factory=Caller)
    routed: Routed | None = None
    route: str = ""
    model: str = ""
    user: str = ""
    prompt: str | None = field(default=None, repr=False)
    pair: Mapping[str, str] | None = None
    traceparent: str = ""
    stood_in: str = ""
    status: int = 0
    streamed: bool = False
    routing_s: float = 0.0
    upstream_s: float = 0.0
    total_s: float = 0.0
    usage: Usage = field(default_factory=Usage)
    also: list[Call] = field(default_factory=list)
    usd: float | None = None
    saved_usd: float | None = None
    broken: str = ""
    began: float = field(default_factory=time.perf_counter)

    @property
    def also_usd(self) -> float | None:
        """Dollars of the other calls; None where a price is not set."""
        total = 0.0
        for call in self.also:
            if call.usd is None:
                return None
            total += call.usd
        return total


Observer = Callable[[Exchange], None]
