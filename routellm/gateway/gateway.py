"""One gateway: which version decides a request, and where that sends it."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from routellm.errors import GatewayError, UsageError
from routellm.gateway.challenger import Challenger
from routellm.gateway.decide import Routed, Scored, Target, prompt_of, target_of, user_of
from routellm.gateway.follow import Follower, Serving
from routellm.gateway.metrics import Metrics
from routellm.gateway.source import RouterSource
from routellm.settings import GatewaySettings, Upstream

log = logging.getLogger("routellm.gateway")


class Gateway:
    """One gateway: its follower, its challenger, its upstreams, its counters."""

    def __init__(
        self,
        settings: GatewaySettings,
        source: RouterSource,
        home: Path,
        cache_path: Path | None = None,
        challenger: RouterSource | None = None,
    ) -> None:
        if settings.strong is None or settings.weak is None:
            raise UsageError(
                "no upstreams: set gateway.strong.base_url, gateway.strong.model and the same for "
                "gateway.weak (in routellm.toml or as ROUTELLM_GATEWAY__STRONG__BASE_URL), or try "
                "`routellm serve --demo`"
            )
        self.settings = settings
        self.upstreams: dict[str, Upstream] = {"strong": settings.strong, "weak": settings.weak}
        self.metrics = Metrics()
        self.follower = Follower(source, home / "gateway", settings.poll_s, cache_path)
        self.challenger: Challenger | None = None
        if settings.challenger != "off":
            if challenger is None:
                raise UsageError(
                    f"gateway.challenger is {settings.challenger}, and no source of challengers "
                    "was given: set it to off, or give one to create_app"
                )
            self.challenger = Challenger(settings, challenger, home, self.metrics)
        # scoring holds the interpreter for milliseconds: off the event loop, one at a time
        self.scorers = ThreadPoolExecutor(1, thread_name_prefix="score")
        self._add_gauges()

    def _add_gauges(self) -> None:
        gauge, follower, challenger = self.metrics.gauge, self.follower, self.challenger
        gauge(
            "routellm_version",
            "Version that serves (0: none)",
            lambda: float(s.ref.version) if (s := follower.serving) else 0.0,
        )
        gauge(
            "routellm_swaps",
            "Versions swapped in since the start",
            lambda: float(follower.swaps),
        )
        gauge(
            "routellm_follow_failures",
            "Looks at the alias that failed",
            lambda: float(follower.failures),
        )
        if challenger is not None:
            gauge(
                "routellm_challenger_version",
                "Version that stands beside the champion (0: none)",
                lambda: float(c.ref.version) if (c := self._challenger()[0]) else 0.0,
            )
            gauge(
                "routellm_challenger_follow_failures",
                "Looks at the challenger's alias that failed",
                lambda: float(challenger.follower.failures),
            )
            gauge(
                "routellm_evidence_failures",
                "Writes of online evidence that failed",
                lambda: float(challenger.evidence.unwritten),
            )

    def start(self) -> None:
        """Load the champion, and begin to follow it and the challenger."""
        self.follower.start()
        if self.challenger is not None:
            self.challenger.start()

    def stop(self) -> None:
        self.follower.stop()
        if self.challenger is not None:
            self.challenger.stop()
        self.scorers.shutdown(wait=False)

    def _challenger(self) -> tuple[Serving | None, str]:
        if self.challenger is None:
            return None, ""
        return self.challenger.standing(self.follower.serving)

    def ready(self) -> dict[str, Any]:
        """Return what serves, what stands beside it, and what is wrong."""
        serving, problem = self.follower.serving, self.follower.problem
        doc: dict[str, Any] = {
            "ready": True,
            "version": serving.ref.version if serving else None,
            "kind": serving.bundle.kind if serving else None,
            "fallback": None if serving else self.settings.fallback,
            "problem": problem or None,
            "challenger": None,
        }
        if self.challenger is not None:
            one, why = self._challenger()
            doc["challenger"] = {
                "mode": self.challenger.mode,
                "version": one.ref.version if one else None,
                "kind": one.bundle.kind if one else None,
                "problem": why or None,
            }
        return doc

    async def decide(self, body: dict[str, Any], headers: Any) -> Routed:
        """Return where a request goes."""
        model = str(body.get("model", ""))
        for route, upstream in self.upstreams.items():
            if model == upstream.model:
                return Routed(route, upstream.model, "the model was named")
        target = target_of(body, headers, self.settings)
        if model != "router" and target.kind is None:
            raise GatewayError(
                f"unknown model {model[:80]!r}: use `router`, `router-KIND-THRESHOLD`, "
                f"{self.upstreams['strong'].model!r} or {self.upstreams['weak'].model!r}",
                status=404,
                code="model_not_found",
            )
        prompt = prompt_of(body)
        serving = self.follower.serving  # one read: this request stays with this version
        if serving is None:
            return self._fall_back("there is no router to ask")
        kind = serving.bundle.kind
        if target.kind is not None and target.kind != kind:
            raise GatewayError(
                f"model {model[:80]!r} asks for a {target.kind} router, and version "
                f"{serving.ref.version} is {kind}: use `router` or `router-{kind}-THRESHOLD`"
            )
        if self.challenger is not None:
            canary = await self.challenger.decide(serving, target, user_of(body), prompt)
            if canary is not None:
                return self._routed(*canary, target, canary=True)
        loop = asyncio.get_running_loop()
        try:
            scored = await loop.run_in_executor(self.scorers, serving.score, prompt, target)
        except Exception as error:  # a broken router costs routing, never the answer
            log.error("version %s failed to score: %s", serving.ref.version, type(error).__name__)
            self.metrics.failed(serving.ref, "champion")
            return self._fall_back(f"the router failed ({type(error).__name__})")
        self.metrics.answered(serving.ref, "champion", scored)
        if self.challenger is not None:
            self.challenger.watch(serving, target, prompt, scored.route)
        return self._routed(serving, scored, target)

    def _routed(
        self, by: Serving, scored: Scored, target: Target, *, canary: bool = False
    ) -> Routed:
        return Routed(
            scored.route,
            self.upstreams[scored.route].model,
            _why(target),
            by.ref.version,
            by.bundle.kind,
            scored.win_rate,
            scored.threshold,
            canary,
        )

    def _fall_back(self, why: str) -> Routed:
        self.metrics.fallbacks.inc()
        route = self.settings.fallback
        return Routed(route, self.upstreams[route].model, f"fallback: {why}")


def _why(target: Target) -> str:
    if target.threshold is not None:
        return "win rate against the threshold asked for"
    return f"win rate against the threshold for a strong fraction of {target.strong_fraction:g}"
