"""The gateway's Prometheus metrics, by version and mode (champion, shadow, canary)."""

from __future__ import annotations

import os
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from routellm.gateway.decide import Scored
from routellm.gateway.exchange import Exchange
from routellm.gateway.source import VersionRef
from routellm.gateway.usage import Usage

_SECONDS = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
)


class Metrics:
    """Counters that requests raise, and gauges that are read when asked."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._own = CollectorRegistry()
        self.requests = self._counter(
            "routellm_requests", "Requests by route and status", "route", "status"
        )
        self.fallbacks = self._counter("routellm_fallbacks", "Queries answered without a router")
        self.stand_ins = self._counter(
            "routellm_stand_ins", "Queries that the other model answered", "route", "why"
        )
        self.retries = self._counter("routellm_retries", "Further tries of an upstream", "route")
        self.first_byte = self._seconds_of(
            "routellm_upstream_first_byte_seconds", "Until an upstream's answer began", "route"
        )
        self.upstream = self._seconds_of(
            "routellm_upstream_seconds", "Until an upstream's answer ended", "route"
        )
        self.routing = self._seconds_of("routellm_routing_seconds", "Of a decision")
        self.tokens = self._counter(
            "routellm_tokens", "Tokens, as upstreams count them", "route", "direction"
        )
        self.spent = self._counter("routellm_spent_usd", "Dollars spent", "route")
        self.saved = self._counter("routellm_saved_usd", "Dollars that strong would have cost more")
        self.policies = self._counter(
            "routellm_policy_answers",
            "Answers by policies that requests asked for",
            "policy",
            "route",
        )
        self.judged = self._counter("routellm_judgements", "Judgements of answers", "kind")
        self.duels = self._counter("routellm_duels", "Both models' answers judged", "winner")
        self.broken = self._counter(
            "routellm_broken_answers", "Answers that ended before their end", "why"
        )
        self._decisions = self._counter(
            "routellm_decisions", "Prompts that a version scored", "version", "mode", "route"
        )
        self._failures = self._counter(
            "routellm_scoring_failures", "Prompts that a version failed on", "version", "mode"
        )
        self._dropped = self._counter(
            "routellm_challenger_dropped",
            "Prompts that the challenger was not asked about because it was behind",
            "version",
            "mode",
        )
        self._agreements = self._counter(
            "routellm_challenger_agreements", "Shadow decisions that were the champion's", "version"
        )
        self._seconds = self._seconds_of(
            "routellm_scoring_seconds", "Time to score a prompt", "version", "mode"
        )
        self._win_rates = Histogram(
            "routellm_win_rate",
            "Win rates of the prompts that a version scored",
            ["version", "mode"],
            buckets=[i / 20 for i in range(1, 20)] + [1.0],
            registry=self.registry,
        )

    def exposition(self) -> bytes:
        """Return all figures as Prometheus reads them.

        Where several processes serve, counts are of all of them, and gauges of the one that is
        asked.
        """
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self.registry) + generate_latest(self._own)
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together) + generate_latest(self._own)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(name, meaning, labels, registry=self.registry)

    def _seconds_of(self, name: str, meaning: str, *labels: str) -> Histogram:
        return Histogram(name, meaning, labels, buckets=_SECONDS, registry=self.registry)

    def gauge(self, name: str, meaning: str, value: Callable[[], float]) -> None:
        """Add a gauge that is read when asked."""
        Gauge(name, meaning, registry=self._own).set_function(value)

    def answered(self, ref: VersionRef, mode: str, scored: Scored, *, agreed: bool = False) -> None:
        """Count what a version made of a prompt."""
        self._decisions.labels(ref.version, mode, scored.route).inc()
        self._seconds.labels(ref.version, mode).observe(scored.latency_ms / 1000.0)
        self._win_rates.labels(ref.version, mode).observe(scored.win_rate)
        if agreed:
            self._agreements.labels(ref.version).inc()

    def seen(self, one: Exchange) -> None:
        """Count what came of a request; an observer of exchanges."""
        self.requests.labels(one.route or "none", str(one.status)).inc()
        if one.routed is not None:
            self.routing.observe(one.routing_s)
        if one.route:
            self.upstream.labels(one.route).observe(one.upstream_s)
        self._used(one.route, one.usage)
        for call in one.also:
            self._used(call.route, call.usage)
            if call.usd is not None:
                self.spent.labels(call.route).inc(call.usd)
        if one.usd is not None:
            self.spent.labels(one.route).inc(max(0.0, one.usd - (one.also_usd or 0.0)))
        if one.routed is not None and one.routed.policy and 200 <= one.status < 300:
            self.policies.labels(one.routed.policy, one.route).inc()
        if one.saved_usd is not None and one.saved_usd > 0:
            self.saved.inc(one.saved_usd)
        if one.broken:
            self.broken.labels(one.broken).inc()

    def _used(self, route: str, usage: Usage) -> None:
        for direction, count in (("input", usage.input_tokens), ("output", usage.output_tokens)):
            if count:
                self.tokens.labels(route, direction).inc(count)

    def failed(self, ref: VersionRef, mode: str) -> None:
        self._failures.labels(ref.version, mode).inc()

    def dropped(self, ref: VersionRef, mode: str) -> None:
        self._dropped.labels(ref.version, mode).inc()
