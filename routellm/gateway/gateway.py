"""One gateway: which version decides a request, and where that sends it."""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routellm.embeddings.memory import Encoders
from routellm.errors import GatewayError, UsageError
from routellm.gateway.cascade import asked_first
from routellm.gateway.challenger import Challenger
from routellm.gateway.decide import Routed, Scored, user_of
from routellm.gateway.endpoints import Endpoint, scored_text
from routellm.gateway.follow import Follower, Serving
from routellm.gateway.keys import Caller
from routellm.gateway.metrics import Metrics
from routellm.gateway.money import Money
from routellm.gateway.pacer import Pacers
from routellm.gateway.pool import PoolPolicy, cost_weight_of
from routellm.gateway.scoring import Scorer
from routellm.gateway.source import RouterSource
from routellm.gateway.targets import QueryPrices, Target, policy_of, target_of
from routellm.settings import GatewaySettings, Upstream

if TYPE_CHECKING:
    from routellm.feedback.store import FeedbackStore

log = logging.getLogger("routellm.gateway")

_STORED = 50_000  # answers whose upstream is remembered


class Gateway:
    """One gateway: its follower, its challenger, its upstreams, its counters."""

    def __init__(
        self,
        settings: GatewaySettings,
        source: RouterSource,
        home: Path,
        challenger: RouterSource | None = None,
        money: Money | None = None,
        store: FeedbackStore | None = None,
    ) -> None:
        if settings.strong is None or settings.weak is None:
            raise UsageError(
                "no upstreams: set gateway.strong.base_url, gateway.strong.model and the same for "
                "gateway.weak (in routellm.toml or as ROUTELLM_GATEWAY__STRONG__BASE_URL), or try "
                "`routellm serve --demo`"
            )
        self.settings = settings
        self.upstreams: dict[str, Upstream] = settings.routes
        self.target = Target.of_settings(
            threshold=settings.threshold,
            strong_fraction=settings.strong_fraction,
            quality=settings.quality,
            max_usd=settings.max_usd,
        )
        self.money = money or Money()
        self.prices = QueryPrices.of(self.money, settings.strong.model, settings.weak.model)
        self.pool = PoolPolicy(settings, self.money) if settings.pool.models else None
        self.pacers = Pacers(window=settings.pacer_window, most_odds=settings.pacer_most_odds)
        self.metrics = Metrics()
        encoders = Encoders()
        self.follower = Follower(source, home / "gateway", settings.poll_s, encoders)
        self.challenger: Challenger | None = None
        if settings.challenger != "off":
            if challenger is None:
                raise UsageError(
                    f"gateway.challenger is {settings.challenger}, and no source of challengers "
                    "was given: set it to off, or give one to create_app"
                )
            self.challenger = Challenger(
                settings, challenger, home, self.metrics, encoders, self.prices, store
            )
        self._scorers: deque[Scorer] = deque()
        self._stored: OrderedDict[str, str] = OrderedDict()
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
        for scorer in self._scorers:
            scorer.close()
        if self.pool is not None:
            self.pool.close()

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

    async def decide(
        self,
        endpoint: Endpoint,
        fields: Mapping[str, Any],
        headers: Mapping[str, str],
        caller: Caller,
        *,
        only_look: bool = False,
    ) -> Routed:
        """Return where a request goes; one that is only a look counts for no pacer.

        Raises
        ------
        GatewayError
            If it asks for a model that is not here, for what no version can do, or has no query.
        """
        model = str(fields.get("model", ""))
        if not endpoint.routed:
            return self._not_routed(model)
        for route, upstream in self.upstreams.items():
            if model == upstream.model:
                return Routed(route, upstream.model, "the model was named", named=True)
        target = target_of(fields, headers, caller.target, self.target)
        if model != "router" and target.kind is None:
            raise GatewayError(
                f"unknown model {model[:80]!r}: use `router`, `router-KIND-THRESHOLD` or one of "
                f"{', '.join(one.model for one in self.upstreams.values())}",
                status=404,
                code="model_not_found",
            )
        policy, weight = policy_of(fields, headers), cost_weight_of(fields, headers)
        if policy and model != "router":
            raise GatewayError(f"a policy goes with the model `router`, not {model[:80]!r}")
        if weight is not None and policy != "pool":
            raise GatewayError("`cost_weight` goes with the policy `pool`: name that, too")
        if policy == "pool" and self.pool is not None:
            return await self._by_pool(self.pool, endpoint, fields, target, weight)
        if policy:
            return asked_first(policy, self.settings, endpoint, fields, target)
        turns = endpoint.turns(fields)
        earlier = fields.get("previous_response_id")
        if isinstance(earlier, str):  # only who gave that answer has it
            return self._continued(earlier)
        serving = self.follower.serving  # one read: this request stays with this version
        if serving is None:
            return self._fall_back("there is no router to ask")
        kind = serving.bundle.kind
        if target.kind is not None and target.kind != kind:
            raise GatewayError(
                f"model {model[:80]!r} asks for a {target.kind} router, and version "
                f"{serving.ref.version} is {kind}: use `router` or `router-{kind}-THRESHOLD`"
            )
        try:
            threshold = target.threshold_on(serving.bundle, self.prices)
        except GatewayError as error:
            if target.by_request:
                raise
            return self._fall_back(str(error))
        prompt = scored_text(turns, self.settings.scored, self.settings.scored_tokens)
        share = 0.0
        if self.challenger is not None:
            share = self.challenger.share(serving, target)
            canary = await self.challenger.decide(
                serving, target, user_of(fields), turns[0], prompt
            )
            if canary is not None:
                return self._routed(*canary, target, prompt, share, canary=True)
        try:
            rate, latency_ms = await self._scorer(serving).rate(prompt)
        except Exception as error:  # a broken or slow router costs routing, never the answer
            log.error("version %s failed to score: %s", serving.ref.version, type(error).__name__)
            self.metrics.failed(serving.ref, "champion")
            return self._fall_back(f"the router failed ({type(error).__name__})")
        if self.settings.pacer and target.paced:
            pacer = self.pacers.of(
                caller.id,
                serving.ref.version,
                serving.bundle.calibration,
                target.fraction_on(serving.bundle, self.prices),
            )
            threshold = pacer.threshold(rate) if only_look else pacer.decide(rate)
        scored = serving.scored(rate, threshold, latency_ms)
        self.metrics.answered(serving.ref, "champion", scored)
        if self.challenger is not None:
            self.challenger.watch(serving, target, prompt, scored.route)
        return self._routed(serving, scored, target, prompt, 1.0 - share)

    async def _by_pool(
        self,
        pool: PoolPolicy,
        endpoint: Endpoint,
        fields: Mapping[str, Any],
        target: Target,
        weight: float | None,
    ) -> Routed:
        if target.by_request:
            raise GatewayError(f"the policy `pool` takes a cost_weight, not {target}")
        turns = endpoint.turns(fields)
        earlier = fields.get("previous_response_id")
        if isinstance(earlier, str):
            return self._continued(earlier)
        serving = self.follower.serving
        if serving is None:
            return self._fall_back("there is no router to ask")
        prompt = scored_text(turns, self.settings.scored, self.settings.scored_tokens)
        try:
            return await pool.decide(serving, prompt, weight)
        except Exception as error:
            why = str(error) if isinstance(error, UsageError) else type(error).__name__
            log.error("version %s failed on the pool: %s", serving.ref.version, why)
            return self._fall_back(f"the policy pool failed ({why})")

    def _not_routed(self, model: str) -> Routed:
        """Return where embeddings go: to the model that is named, at the endpoint for them."""
        own = self.settings.embeddings
        if model == "router" and own is None:
            raise GatewayError(
                "embeddings are not routed: name the model (or set gateway.embeddings)",
                status=404,
                code="model_not_found",
            )
        named = own.model if own is not None and model == "router" else model
        return Routed("embeddings", named, "embeddings are not routed", named=True)

    def _scorer(self, serving: Serving) -> Scorer:
        """Return the scorer of the version that serves; the one before ends once it is done."""
        for scorer in self._scorers:
            if scorer.serving is serving:
                return scorer
        self._scorers.append(Scorer(serving, self.settings.routing_timeout_s))
        if len(self._scorers) > 2:  # requests in flight may still be with the one before
            self._scorers.popleft().close()
        return self._scorers[-1]

    def remember(self, answer_id: str, route: str) -> None:
        """Remember whose a stored answer is, for the request that goes on from it."""
        self._stored[answer_id] = route
        if len(self._stored) > _STORED:
            self._stored.popitem(last=False)

    def _continued(self, answer_id: str) -> Routed:
        route = self._stored.get(answer_id)
        if route is None:
            return self._fall_back("the answer it goes on from is not known here")
        return Routed(route, self.upstreams[route].model, "who gave the answer before", named=True)

    def _routed(
        self,
        by: Serving,
        scored: Scored,
        target: Target,
        prompt: str,
        probability: float = 1.0,
        *,
        canary: bool = False,
    ) -> Routed:
        return Routed(
            scored.route,
            self.upstreams[scored.route].model,
            _why(target),
            by.ref.version,
            by.bundle.kind,
            scored.win_rate,
            scored.threshold,
            canary=canary,
            probability=probability,
            prompt=prompt,
            pair=by.bundle.pair,
        )

    def _fall_back(self, why: str) -> Routed:
        self.metrics.fallbacks.inc()
        route = self.settings.fallback
        return Routed(route, self.upstreams[route].model, f"fallback: {why}")


def _why(target: Target) -> str:
    return f"win rate against {target}, asked for by the {target.asked_by}"
