"""What gateways say of themselves over HTTP, and whether they serve what they should."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from routellm.gateway.figures import Figures
from routellm.monitoring.finding import ORDER, Check, Finding, Outcome, Unknown
from routellm.settings import Settings

if TYPE_CHECKING:
    from routellm.monitoring.seen import Seen


@dataclass(frozen=True)
class GatewaySeen:
    """One gateway.

    Attributes
    ----------
    ready : dict or None
        What ``/readyz`` answered; None if it did not.
    why : str
        Why it did not.
    figures : Figures or None
        Its metrics; None if it shows them to nobody without a key.
    """

    url: str
    ready: dict[str, Any] | None
    why: str = ""
    figures: Figures | None = None


def urls(settings: Settings) -> tuple[str, ...]:
    """Return the addresses of the gateways that are looked at."""
    if settings.monitor.gateways:
        return tuple(url.rstrip("/") for url in settings.monitor.gateways)
    return (settings.gateway.url,)


def ask(url: str, timeout_s: float) -> GatewaySeen:
    """Ask a gateway how it is; never raises."""
    try:
        with httpx.Client(base_url=url, timeout=timeout_s) as client:
            reply = client.get("/readyz")
            reply.raise_for_status()
            ready = reply.json()
            if not isinstance(ready, dict) or "version" not in ready:
                return GatewaySeen(url, None, "what answers is no gateway of ours")
            metrics = client.get("/metrics")
            figures = Figures.of(metrics.content) if metrics.status_code == 200 else None
            return GatewaySeen(url, ready, figures=figures)
    except httpx.ConnectError:
        return GatewaySeen(url, None, "nothing listens there")
    except httpx.HTTPStatusError as error:
        return GatewaySeen(url, None, f"it answers {error.response.status_code}")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        return GatewaySeen(url, None, f"it does not answer ({type(error).__name__})")


class GatewayHealth(Check):
    """Gateways answer, serve what the alias points at, and say of nothing that it is wrong."""

    name = "gateway"

    def look(self, seen: Seen) -> Finding:
        found = seen.gateways()
        how = seen.settings.gateway
        asked_for = seen.settings.monitor.gateways or how.strong or how.weak
        if not asked_for and all(one.ready is None for one in found):
            raise Unknown(f"no gateway is set, and none answers at {found[0].url}")
        told = [self._of(one, seen) for one in found]
        outcome = min((outcome for outcome, _ in told), key=ORDER.index)
        wrong = [detail for o, detail in told if o == outcome]
        healthy = sum(o == "ok" for o, _ in told)
        detail = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        return Finding(self.name, outcome, float(len(told) - healthy), 0.0, detail)

    def _of(self, one: GatewaySeen, seen: Seen) -> tuple[Outcome, str]:
        if one.ready is None:
            return "fail", f"{one.url} is down: {one.why}"
        version, problem = one.ready["version"], one.ready.get("problem")
        if version is None:
            fallback = one.ready.get("fallback")
            return "fail", f"{one.url} has no router and answers with {fallback} ({problem})"
        try:
            champion = seen.champion()
        except Unknown as why:
            return "unknown", f"{one.url} serves version {version}, but whether it should: {why}"
        if version != champion.version and seen.settings.gateway.alias == "champion":
            since = champion.since
            late_s = (seen.at - since).total_seconds() if since else float("inf")
            told = f"{one.url} serves version {version}, and the champion is {champion.version}"
            if late_s > seen.settings.monitor.follow_s:
                return "fail", told + (f" ({problem})" if problem else "")
            return "ok", f"{told} since {late_s:.0f} s"
        if problem:
            return "warn", f"{one.url} serves version {version}, and says: {problem}"
        return "ok", f"{one.url} serves version {version}"
