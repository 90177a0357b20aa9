"""The gateway's HTTP face: OpenAI's Chat Completions in, the chosen upstream's answer out."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from routellm import __version__
from routellm.errors import GatewayError, UsageError
from routellm.gateway.decide import Routed, Target, prompt_of, target_of
from routellm.gateway.follow import Follower
from routellm.gateway.source import RouterSource
from routellm.settings import GatewaySettings, Upstream

log = logging.getLogger("routellm.gateway")

# what belongs to one connection, or is set anew
_NOT_FORWARDED = frozenset(
    {"content-length", "transfer-encoding", "connection", "keep-alive", "server", "date"}
)


class Gateway:
    """One gateway: its follower, its upstreams, its counters."""

    def __init__(
        self,
        settings: GatewaySettings,
        source: RouterSource,
        home: Path,
        cache_path: Path | None = None,
    ) -> None:
        if settings.strong is None or settings.weak is None:
            raise UsageError(
                "no upstreams: set gateway.strong.base_url, gateway.strong.model and the same for "
                "gateway.weak (in routellm.toml or as ROUTELLM_GATEWAY__STRONG__BASE_URL), or try "
                "`routellm serve --demo`"
            )
        self.settings = settings
        self.upstreams: dict[str, Upstream] = {"strong": settings.strong, "weak": settings.weak}
        self.follower = Follower(source, home / "gateway", settings.poll_s, cache_path)
        # scoring holds the interpreter for milliseconds: off the event loop, one at a time
        self.scorers = ThreadPoolExecutor(1, thread_name_prefix="score")
        self.metrics = CollectorRegistry()
        self.requests = Counter(
            "routellm_requests",
            "Requests by route and status",
            ["route", "status"],
            registry=self.metrics,
        )
        self.fallbacks = Counter(
            "routellm_fallbacks", "Queries answered without a router", registry=self.metrics
        )
        version = Gauge("routellm_version", "Version that serves (0: none)", registry=self.metrics)
        version.set_function(lambda: float(s.ref.version) if (s := self.follower.serving) else 0.0)
        swaps = Gauge(
            "routellm_swaps", "Versions swapped in since the start", registry=self.metrics
        )
        swaps.set_function(lambda: float(self.follower.swaps))
        failures = Gauge(
            "routellm_follow_failures", "Looks at the alias that failed", registry=self.metrics
        )
        failures.set_function(lambda: float(self.follower.failures))

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
        threshold = serving.bundle.thresholds(target.threshold, target.strong_fraction)
        loop = asyncio.get_running_loop()
        try:
            rates = await loop.run_in_executor(
                self.scorers, serving.bundle.router.win_rate, [prompt]
            )
        except Exception as error:  # a broken router costs routing, never the answer
            log.error("version %s failed to score: %s", serving.ref.version, type(error).__name__)
            return self._fall_back(f"the router failed ({type(error).__name__})")
        route = "strong" if rates[0] >= threshold else "weak"
        return Routed(
            route,
            self.upstreams[route].model,
            _why(target),
            serving.ref.version,
            kind,
            float(rates[0]),
            threshold,
        )

    def _fall_back(self, why: str) -> Routed:
        self.fallbacks.inc()
        route = self.settings.fallback
        return Routed(route, self.upstreams[route].model, f"fallback: {why}")


def _why(target: Target) -> str:
    if target.threshold is not None:
        return "win rate against the threshold asked for"
    return f"win rate against the threshold for a strong fraction of {target.strong_fraction:g}"


def create_app(
    settings: GatewaySettings,
    source: RouterSource,
    *,
    home: Path,
    cache_path: Path | None = None,
) -> FastAPI:
    """Return the gateway as an ASGI app.

    Raises
    ------
    UsageError
        If an upstream is not set.
    """
    gateway = Gateway(settings, source, home, cache_path)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(gateway.follower.start)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        timeout = httpx.Timeout(settings.timeout_s, connect=10.0)
        async with httpx.AsyncClient(timeout=timeout, limits=limits) as client:
            app.state.client = client
            yield
        await asyncio.to_thread(gateway.follower.stop)
        gateway.scorers.shutdown(wait=False)

    app = FastAPI(title="RouteLLM gateway", version=__version__, lifespan=lifespan)
    app.state.gateway = gateway

    @app.exception_handler(GatewayError)
    async def refuse(_: Request, error: GatewayError) -> JSONResponse:
        gateway.requests.labels("refused", str(error.status)).inc()
        return _error(str(error), error.status, error.code)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        serving, problem = gateway.follower.serving, gateway.follower.problem
        doc = {
            "ready": True,
            "version": serving.ref.version if serving else None,
            "kind": serving.bundle.kind if serving else None,
            "fallback": None if serving else settings.fallback,
            "problem": problem or None,
        }
        return JSONResponse(doc)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(gateway.metrics), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        serving = gateway.follower.serving
        names = ["router", *(u.model for u in gateway.upstreams.values())]
        if serving is not None:
            half = serving.bundle.calibration.threshold(0.5)
            names.insert(1, f"router-{serving.bundle.kind}-{half:.4f}")
        return {
            "object": "list",
            "data": [
                {"id": n, "object": "model", "created": 0, "owned_by": "routellm"} for n in names
            ],
        }

    @app.post("/v1/route")
    async def route(request: Request) -> JSONResponse:
        routed = await gateway.decide(await _body(request, settings), request.headers)
        return JSONResponse(
            {
                "route": routed.route,
                "model": routed.model,
                "reason": routed.reason,
                "version": routed.version or None,
                "kind": routed.kind or None,
                "win_rate": routed.win_rate,
                "threshold": routed.threshold,
            }
        )

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await _body(request, settings)
        routed = await gateway.decide(body, request.headers)
        upstream = gateway.upstreams[routed.route]
        body.pop("routing", None)
        body["model"] = upstream.model
        headers = {"content-type": "application/json"}
        if upstream.api_key is not None:
            headers["authorization"] = f"Bearer {upstream.api_key.get_secret_value()}"
        client: httpx.AsyncClient = request.app.state.client
        sent = client.build_request(
            "POST",
            upstream.base_url.rstrip("/") + "/chat/completions",
            content=json.dumps(body).encode(),
            headers=headers,
        )
        try:
            answer = await client.send(sent, stream=True)
        except httpx.TimeoutException:
            gateway.requests.labels(routed.route, "504").inc()
            return _error("the model did not answer in time", 504, "timeout", routed)
        except httpx.HTTPError as error:
            gateway.requests.labels(routed.route, "502").inc()
            return _error(
                f"the {routed.route} model cannot be reached ({type(error).__name__})",
                502,
                "upstream_unreachable",
                routed,
            )
        gateway.requests.labels(routed.route, str(answer.status_code)).inc()
        kept = {k: v for k, v in answer.headers.items() if k.lower() not in _NOT_FORWARDED}

        async def pass_on() -> AsyncIterator[bytes]:
            # raw bytes as they arrive; closing it (a client that left) closes the upstream
            try:
                async for chunk in answer.aiter_raw():
                    yield chunk
            finally:
                await answer.aclose()

        return StreamingResponse(
            pass_on(), status_code=answer.status_code, headers={**kept, **routed.headers()}
        )

    return app


async def _body(request: Request, settings: GatewaySettings) -> dict[str, Any]:
    """Read a JSON object of bounded size."""
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > settings.max_body_bytes:
            raise GatewayError(
                f"the request is over {settings.max_body_bytes} bytes", status=413, code="too_large"
            )
    try:
        body = json.loads(bytes(raw))
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise GatewayError("the request body is not a JSON object")
    return body


def _error(message: str, status: int, code: str, routed: Routed | None = None) -> JSONResponse:
    """Return an error in OpenAI's shape."""
    kind = "invalid_request_error" if status < 500 else "api_error"
    return JSONResponse(
        {"error": {"message": message, "type": kind, "param": None, "code": code}},
        status_code=status,
        headers=routed.headers() if routed else None,
    )
