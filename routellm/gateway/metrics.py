"""The gateway's Prometheus metrics, by version and mode (champion, shadow, canary)."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from routellm.gateway.decide import Scored
from routellm.gateway.source import VersionRef

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """Counters that requests raise, and gauges that are read when asked."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter(
            "routellm_requests", "Requests by route and status", "route", "status"
        )
        self.fallbacks = self._counter("routellm_fallbacks", "Queries answered without a router")
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
        self._seconds = Histogram(
            "routellm_scoring_seconds",
            "Time to score a prompt",
            ["version", "mode"],
            buckets=_SECONDS,
            registry=self.registry,
        )

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(name, meaning, labels, registry=self.registry)

    def gauge(self, name: str, meaning: str, value: Callable[[], float]) -> None:
        """Add a gauge that is read when asked."""
        Gauge(name, meaning, registry=self.registry).set_function(value)

    def answered(self, ref: VersionRef, mode: str, scored: Scored, *, agreed: bool = False) -> None:
        """Count what a version made of a prompt."""
        self._decisions.labels(ref.version, mode, scored.route).inc()
        self._seconds.labels(ref.version, mode).observe(scored.latency_ms / 1000.0)
        if agreed:
            self._agreements.labels(ref.version).inc()

    def failed(self, ref: VersionRef, mode: str) -> None:
        self._failures.labels(ref.version, mode).inc()

    def dropped(self, ref: VersionRef, mode: str) -> None:
        self._dropped.labels(ref.version, mode).inc()
