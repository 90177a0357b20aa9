"""The gateway's HTTP face: OpenAI's Chat Completions in, the chosen upstream's answer out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import generate_latest

from routellm import __version__
from routellm.errors import GatewayError
from routellm.gateway.decide import Routed
from routellm.gateway.gateway import Gateway
from routellm.gateway.source import RouterSource
from routellm.settings import GatewaySettings

# what belongs to one connection, or is set anew
_NOT_FORWARDED = frozenset(
    {"content-length", "transfer-encoding", "connection", "keep-alive", "server", "date"}
)


def create_app(
    settings: GatewaySettings,
    source: RouterSource,
    *,
    home: Path,
    cache_path: Path | None = None,
    challenger: RouterSource | None = None,
) -> FastAPI:
    """Return the gateway as an ASGI app.

    Parameters
    ----------
    source, challenger : RouterSource
        What the champion's and the challenger's alias point at; the second is needed unless
        ``settings.challenger`` is off.
    home : Path
        Where the last good copy and the online evidence are kept.

    Raises
    ------
    UsageError
        If an upstream is not set, or a challenger is wanted and has no source.
    """
    gateway = Gateway(settings, source, home, cache_path, challenger)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(gateway.start)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        timeout = httpx.Timeout(settings.timeout_s, connect=10.0)
        async with httpx.AsyncClient(timeout=timeout, limits=limits) as client:
            app.state.client = client
            yield
        await asyncio.to_thread(gateway.stop)

    app = FastAPI(title="RouteLLM gateway", version=__version__, lifespan=lifespan)
    app.state.gateway = gateway

    @app.exception_handler(GatewayError)
    async def refuse(_: Request, error: GatewayError) -> JSONResponse:
        gateway.metrics.requests.labels("refused", str(error.status)).inc()
        return _error(str(error), error.status, error.code)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        return JSONResponse(gateway.ready())

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(
            generate_latest(gateway.metrics.registry), media_type="text/plain; version=0.0.4"
        )

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
                "canary": routed.canary,
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
            gateway.metrics.requests.labels(routed.route, "504").inc()
            return _error("the model did not answer in time", 504, "timeout", routed)
        except httpx.HTTPError as error:
            gateway.metrics.requests.labels(routed.route, "502").inc()
            return _error(
                f"the {routed.route} model cannot be reached ({type(error).__name__})",
                502,
                "upstream_unreachable",
                routed,
            )
        gateway.metrics.requests.labels(routed.route, str(answer.status_code)).inc()
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
