"""OpenTelemetry traces: a span a request, with one for the decision and one for the upstream.

Spans are made once a request is over, from the times in its exchange, so the request path knows
nothing of them. One thread makes them (which takes longer than the rest of the gateway's work on a
request) and another sends them, each out of a queue that has an end. A caller's W3C
``traceparent`` makes the request a part of its trace, and its sampling flag is kept. What is not
set here can be by OpenTelemetry's own variables: ``OTEL_EXPORTER_OTLP_HEADERS``,
``OTEL_EXPORTER_OTLP_TIMEOUT`` (seconds for a batch, tries included; 10 if not set),
``OTEL_TRACES_SAMPLER``, ``OTEL_SERVICE_NAME`` and the like.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from routellm import __version__
from routellm.errors import UsageError
from routellm.gateway.exchange import Exchange

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

log = logging.getLogger("routellm.gateway")

_PATH = "/v1/traces"  # OTLP/HTTP's own
_LAST_S = 5.0  # for what is not sent yet when the gateway stops
_WAITING = 2048  # requests that may wait to become spans; then new ones are left out
_UNSENT = 8192  # spans that may wait to be sent; then the oldest go
_MOST_TEXT = 300  # characters of a text
# names that OpenTelemetry's conventions give to what is asked of a model
_OPERATIONS = {
    "chat/completions": "chat",
    "responses": "chat",
    "messages": "chat",
    "completions": "text_completion",
    "embeddings": "embeddings",
}


class Traces:
    """Makes a trace of each request; an observer of exchanges.

    Parameters
    ----------
    exporter : SpanExporter
        Where spans go.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        name = os.environ.get("OTEL_SERVICE_NAME") or "routellm-gateway"
        resource = Resource.create({"service.name": name, "service.version": __version__})
        # of its own, not the process's: whoever else traces here goes on as before
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._processor = BatchSpanProcessor(exporter, max_queue_size=_UNSENT)
        self._provider.add_span_processor(self._processor)
        self._tracer = self._provider.get_tracer("routellm.gateway", __version__)
        self._kinds = SpanKind
        self._error = Status(StatusCode.ERROR)
        self._propagator = TraceContextTextMapPropagator()
        self._queue: queue.SimpleQueue[Exchange | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="make-spans", daemon=True)
        self._thread.start()

    @classmethod
    def to(cls, endpoint: str | None) -> Traces | None:
        """Return traces that go to an OTLP/HTTP endpoint; None if there is none.

        Raises
        ------
        UsageError
            If the endpoint is no address, or the exporter is not installed.
        """
        if endpoint is None:
            return None
        at = urlsplit(endpoint)
        if at.scheme not in ("http", "https") or not at.hostname or at.username or at.password:
            raise UsageError(
                "gateway.otlp_endpoint must be an http(s) address without user or password, such "
                "as http://127.0.0.1:4318 (a key goes into OTEL_EXPORTER_OTLP_HEADERS)"
            )
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise UsageError(
                "gateway.otlp_endpoint is set, and the exporter is not installed: "
                "pip install 'routellm-mlops[otlp]'"
            ) from error
        whole = endpoint if at.path.strip("/") else endpoint.rstrip("/") + _PATH
        return cls(OTLPSpanExporter(endpoint=whole))

    def stop(self) -> None:
        """Send what waits, for a moment."""
        self._queue.put(None)
        # in a thread, since the provider itself would wait for half a minute
        last = threading.Thread(target=self._end, name="last-spans", daemon=True)
        last.start()
        last.join(_LAST_S)

    def seen(self, one: Exchange) -> None:
        if self._queue.qsize() < _WAITING:
            self._queue.put(one)

    def _end(self) -> None:
        self._thread.join()
        self._provider.shutdown()

    def _run(self) -> None:
        while (one := self._queue.get()) is not None:
            try:
                self._make(one)
            except Exception as error:
                log.error("request %s has no trace: %s", one.id, type(error).__name__)

    def _make(self, one: Exchange) -> None:
        """Make the spans of a request that is over."""
        began = int(one.at.timestamp() * 1e9)
        ended = began + int(one.total_s * 1e9)
        span = self._tracer.start_span(
            f"POST /v1/{one.endpoint}",
            context=self._parent(one),
            kind=self._kinds.SERVER,
            start_time=began,
            attributes=_known(_of_request(one)),
        )
        if one.status >= 500 or one.broken not in ("", "client_left"):
            span.set_status(self._error)
        if span.is_recording():
            self._parts(one, span, ended)
        span.end(ended)

    def _parent(self, one: Exchange) -> Any:
        return self._propagator.extract({"traceparent": one.traceparent})

    def _parts(self, one: Exchange, whole: Any, ended: int) -> None:
        """Make the spans of the decision and of the upstream, which came one after the other."""
        from opentelemetry.trace import set_span_in_context

        if one.routed is None:
            return
        inside = set_span_in_context(whole)
        asked = ended - int(one.upstream_s * 1e9)
        decision = self._tracer.start_span(
            "decide",
            context=inside,
            start_time=asked - int(one.routing_s * 1e9),
            attributes=_known(_of_decision(one)),
        )
        decision.end(asked)
        if not one.route:
            return
        operation = _OPERATIONS.get(one.endpoint, one.endpoint)
        upstream = self._tracer.start_span(
            f"{operation} {one.model or one.routed.model}"[:_MOST_TEXT],
            context=inside,
            kind=self._kinds.CLIENT,
            start_time=asked,
            attributes=_known(_of_upstream(one, operation)),
        )
        if one.status >= 500 or one.broken == "upstream_broke_off":
            upstream.set_status(self._error)
        upstream.end(ended)


def _of_request(one: Exchange) -> dict[str, Any]:
    return {
        "http.request.method": "POST",
        "http.route": f"/v1/{one.endpoint}",
        "http.response.status_code": one.status or None,
        "routellm.request_id": one.id,
        "routellm.key_id": one.caller.id or None,
        "routellm.route": one.route or None,
        "routellm.stood_in": one.stood_in or None,
        "routellm.broken": one.broken or None,
        "routellm.other_calls": len(one.also) or None,
        "routellm.streamed": one.streamed,
        "routellm.usd": one.usd,
        "routellm.saved_usd": one.saved_usd,
    }


def _of_decision(one: Exchange) -> dict[str, Any]:
    routed = one.routed
    assert routed is not None
    return {
        "routellm.route": routed.route,
        "routellm.version": routed.version or None,
        "routellm.kind": routed.kind or None,
        "routellm.win_rate": routed.win_rate,
        "routellm.threshold": routed.threshold,
        "routellm.policy": routed.policy or None,
        "routellm.confidence": routed.confidence,
        "routellm.canary": routed.canary,
        "routellm.reason": routed.reason,
    }


def _of_upstream(one: Exchange, operation: str) -> dict[str, Any]:
    assert one.routed is not None
    return {
        "gen_ai.operation.name": operation,
        "gen_ai.request.model": one.model or one.routed.model,
        "gen_ai.response.id": one.usage.id,
        "gen_ai.usage.input_tokens": one.usage.input_tokens,
        "gen_ai.usage.output_tokens": one.usage.output_tokens,
        "http.response.status_code": one.status or None,
        "routellm.route": one.route,
    }


def _known(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes that have a value, texts cut."""
    return {
        name: value[:_MOST_TEXT] if isinstance(value, str) else value
        for name, value in attributes.items()
        if value is not None
    }
