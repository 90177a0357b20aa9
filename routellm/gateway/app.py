"""The gateway's HTTP face: OpenAI's and Anthropic's protocols in, a chosen model's answer out."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route

from routellm import __version__
from routellm.errors import GatewayError
from routellm.gateway.body import Body
from routellm.gateway.cascade import Cascade
from routellm.gateway.endpoints import CHAT, ENDPOINTS, Endpoint
from routellm.gateway.exchange import Observer
from routellm.gateway.feedback import Feedback, FeedbackParts
from routellm.gateway.gateway import Gateway
from routellm.gateway.keys import Keys
from routellm.gateway.limits import Limits
from routellm.gateway.logs import RequestLog, flush_logs
from routellm.gateway.money import Money
from routellm.gateway.nudge import MOST_NUDGE_BYTES, Nudge
from routellm.gateway.openapi import ERRORS, FEEDBACK, PASSED_ON, request_of
from routellm.gateway.proxy import ClientLeft, Proxy, read
from routellm.gateway.source import RouterSource
from routellm.gateway.status_page import add_routes
from routellm.gateway.traces import Traces
from routellm.gateway.upstreams import Upstreams
from routellm.settings import GatewaySettings

log = logging.getLogger("routellm.gateway")

_MOST_FEEDBACK_BYTES = 10_000


def create_app(
    settings: GatewaySettings,
    source: RouterSource,
    *,
    home: Path,
    challenger: RouterSource | None = None,
    money: Money | None = None,
    observers: Sequence[Observer] = (),
    feedback: FeedbackParts | None = None,
) -> FastAPI:
    """Return the gateway as an ASGI app.

    Parameters
    ----------
    source, challenger : RouterSource
        What the champion's and the challenger's alias point at; the second is needed unless
        ``settings.challenger`` is off.
    home : Path
        Where the last good copy and the online evidence are kept; evidence goes to the feedback
        store too, where that is a server's.
    money : Money, optional
        Prices; without them no dollars are told.
    observers : sequence of Observer
        Told of every request once it is over.
    feedback : FeedbackParts, optional
        Records decisions and takes judgements; without it there is no ``/v1/feedback``.

    Raises
    ------
    UsageError
        If an upstream is not set, a challenger is wanted and has no source, traces cannot be sent,
        or a scorer cannot be read.
    """
    store = feedback.writer.store if feedback is not None else None
    shared = store if store is not None and store.is_shared else None
    gateway = Gateway(settings, source, home, challenger, money, shared)
    upstreams = Upstreams(settings, gateway.metrics)
    keys, limits = Keys(home / "keys.json"), Limits(home / "spend.db")
    told = [gateway.metrics.seen, *observers]
    if settings.log_format != "off":
        told.append(RequestLog(prompts=settings.log_prompts).seen)
    traces = Traces.to(settings.otlp_endpoint)
    if traces is not None:
        told.append(traces.seen)
    takes = None
    if feedback is not None:
        takes = Feedback(feedback, upstreams, gateway.metrics, gateway.money)
        told.append(takes.seen)
    cascade = Cascade(settings, upstreams, gateway.money)
    proxy = Proxy(gateway, upstreams, keys, limits, told, cascade, takes)
    nudge = Nudge(home / "gateway" / "nudged", settings.nudge_secret, keys)
    gateway.follower.hear(nudge.given, settings.nudge_jitter_s)
    if gateway.challenger is not None:
        gateway.challenger.follower.hear(nudge.given, settings.nudge_jitter_s)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        limits.open()  # here: SQLite ties a connection to its thread
        await asyncio.to_thread(gateway.start)
        if takes is not None:
            await asyncio.to_thread(takes.writer.start)
        yield
        await asyncio.to_thread(gateway.stop)  # its last counts may go to the feedback store
        if takes is not None:
            await takes.end()
        await asyncio.to_thread(cascade.close)
        await upstreams.close()
        limits.close()
        if traces is not None:
            await asyncio.to_thread(traces.stop)
        await asyncio.to_thread(flush_logs)

    app = FastAPI(
        title="RouteLLM gateway",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.gateway = gateway
    app.state.proxy = proxy

    @app.exception_handler(GatewayError)
    async def refuse(request: Request, error: GatewayError) -> JSONResponse:
        return _error(error, anthropic=request.url.path == "/v1/messages")

    @app.exception_handler(ClientLeft)
    async def nobody(request: Request, error: ClientLeft) -> Response:
        return Response(status_code=499)  # which nobody reads

    @app.exception_handler(HTTPException)
    async def refuse_path(request: Request, error: HTTPException) -> JSONResponse:
        told = {404: "there is nothing at this address", 405: "this address takes another method"}
        message = told.get(error.status_code, "the request cannot be served")
        refused = GatewayError(message, status=error.status_code, code="not_found")
        answer = await refuse(request, refused)
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def broke(request: Request, error: Exception) -> JSONResponse:
        log.error("%s failed: %s", request.url.path[:100], type(error).__name__)
        return await refuse(
            request, GatewayError("the gateway failed on it", status=500, code="internal")
        )

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        return JSONResponse(gateway.ready())

    def let_in(headers: Mapping[str, str]) -> None:
        if not settings.open_metrics:
            keys.admin(headers)

    def problems() -> list[str]:
        away = [route for route, end in upstreams.ends.items() if end.breaker.is_open]
        return [keys.problem, *(f"The {r} model keeps failing and is left alone." for r in away)]

    add_routes(app, gateway, let_in, problems)

    @app.get("/metrics", responses=ERRORS, response_class=PlainTextResponse)
    def metrics(request: Request) -> Response:  # in a thread: it takes milliseconds
        let_in(request.headers)
        return PlainTextResponse(
            gateway.metrics.exposition(), media_type="text/plain; version=0.0.4"
        )

    @app.post("/admin/look", status_code=202, responses=ERRORS)
    async def look(request: Request) -> dict[str, str]:
        body = await read(request, MOST_NUDGE_BYTES)
        nudge.let_in(request.headers, body)
        nudge.give()
        return {"status": "the alias is looked at soon"}

    def models_here() -> list[dict[str, Any]]:
        serving = gateway.follower.serving
        names = ["router", *(u.model for u in gateway.upstreams.values())]
        if serving is not None:
            half = serving.bundle.calibration.threshold(0.5)
            names.insert(1, f"router-{serving.bundle.kind}-{half:.4f}")
        return [{"id": n, "object": "model", "created": 0, "owned_by": "routellm"} for n in names]

    @app.get("/v1/models", responses=ERRORS)
    async def models(request: Request) -> dict[str, Any]:
        keys.caller(request.headers)
        return {"object": "list", "data": models_here()}

    @app.get("/v1/models/{model:path}", responses=ERRORS)
    async def one_model(model: str, request: Request) -> dict[str, Any]:
        keys.caller(request.headers)
        for found in models_here():
            if found["id"] == model:
                return found
        raise GatewayError(
            f"there is no model {model[:80]!r} here: GET /v1/models lists them",
            status=404,
            code="model_not_found",
        )

    @app.post("/v1/route", responses=ERRORS, openapi_extra=request_of(CHAT.path))
    async def route(request: Request) -> JSONResponse:
        body = Body.parse(await read(request, settings.max_body_bytes))
        caller = keys.caller(request.headers)
        routed = await gateway.decide(CHAT, body.fields, request.headers, caller, only_look=True)
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

    if takes is not None:

        @app.post("/v1/feedback", responses=ERRORS, openapi_extra=FEEDBACK)
        async def judge(request: Request) -> JSONResponse:
            caller = keys.caller(request.headers)
            body = Body.parse(await read(request, _MOST_FEEDBACK_BYTES))
            return JSONResponse(await takes.take(body.fields, caller.id))

    def add(endpoint: Endpoint) -> None:
        @app.post(
            f"/v1/{endpoint.path}",
            name=endpoint.path,
            responses=PASSED_ON,
            openapi_extra=request_of(endpoint.path),
        )
        async def passed_on(request: Request) -> Response:
            return await proxy.answer(endpoint, request)

        # FastAPI's route is for the document: it takes a tenth of a millisecond to find out that
        # there is nothing to parse. Starlette's own, which stands before it, answers
        app.router.routes.insert(0, Route(f"/v1/{endpoint.path}", passed_on, methods=["POST"]))

    for endpoint in reversed(ENDPOINTS):
        add(endpoint)
    return app


def _error(error: GatewayError, *, anthropic: bool) -> JSONResponse:
    """Return an error in the shape of the protocol that was spoken."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    kind = "invalid_request_error" if error.status < 500 else "api_error"
    doc: dict[str, Any] = {
        "error": {"message": str(error), "type": kind, "param": None, "code": error.code}
    }
    if anthropic:
        doc = {"type": "error", "error": {"type": kind, "message": str(error)}}
    return JSONResponse(doc, status_code=error.status, headers=headers)
