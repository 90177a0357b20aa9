"""One request passed on: read, decided, sent, and its answer handed back byte by byte."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from routellm.errors import GatewayError
from routellm.gateway.body import Body
from routellm.gateway.cascade import Cascade
from routellm.gateway.decide import Routed, user_of
from routellm.gateway.endpoints import Endpoint
from routellm.gateway.exchange import Exchange, Observer
from routellm.gateway.feedback import Feedback
from routellm.gateway.gateway import Gateway
from routellm.gateway.keys import Keys
from routellm.gateway.limits import Limits
from routellm.gateway.upstreams import Answer, Headers, UpstreamFailed, Upstreams
from routellm.gateway.usage import UsageReader

log = logging.getLogger("routellm.gateway")
T = TypeVar("T")

# of an answer: what belongs to its connection, or is this server's own to say
_NOT_RETURNED = frozenset(
    {"transfer-encoding", "connection", "keep-alive", "server", "date", "proxy-authenticate",
     "set-cookie", "alt-svc", "strict-transport-security"}
)  # fmt: skip
_NOT_PLAIN = re.compile(r"[^ -~]")  # a model's name may come from the request
_GIVEN_ID = re.compile(r"[\w.:-]{1,100}")


class ClientLeft(Exception):
    """The client hung up before its answer began."""


class Proxy:
    """Passes requests on, at most so many at once.

    Parameters
    ----------
    observers : sequence of Observer
        Told of each request once its last byte is out; they must not wait or raise.
    """

    def __init__(
        self,
        gateway: Gateway,
        upstreams: Upstreams,
        keys: Keys,
        limits: Limits,
        observers: Sequence[Observer],
        cascade: Cascade,
        feedback: Feedback | None = None,
    ) -> None:
        self.cascade = cascade
        self.feedback = feedback
        self.gateway = gateway
        self.upstreams = upstreams
        self.keys = keys
        self.limits = limits
        self.money = gateway.money
        self.observers = observers
        self.at_once = 0

    async def answer(self, endpoint: Endpoint, request: Request) -> Response:
        """Return the answer to a request.

        Raises
        ------
        GatewayError
            If the request is refused, or no upstream answers.
        """
        exchange = Exchange(_id_of(request.headers), endpoint.path)
        exchange.traceparent = request.headers.get("traceparent", "")[:100]
        try:
            self._let_in(exchange, request.headers)
        except GatewayError as error:
            exchange.status = error.status
            self._tell(exchange)
            raise
        try:
            return await self._answered(exchange, endpoint, request)
        except GatewayError as error:
            exchange.status = error.status
            self.finish(exchange)
            raise
        except ClientLeft:
            exchange.broken = "client_left"
            self.finish(exchange)
            return Response(status_code=499)  # nobody reads it
        except BaseException:
            exchange.status = 500
            exchange.broken = exchange.broken or "error"
            self.finish(exchange)
            raise

    def _let_in(self, exchange: Exchange, headers: Mapping[str, str]) -> None:
        most = self.gateway.settings.max_concurrent
        exchange.caller = self.keys.caller(headers)
        if self.at_once >= most:
            raise GatewayError(
                f"{most} requests are being answered: try again in a moment",
                status=429,
                code="overloaded",
                retry_after_s=1.0,
            )
        self.limits.enter(exchange.caller)
        self.at_once += 1

    async def _answered(self, exchange: Exchange, endpoint: Endpoint, request: Request) -> Response:
        body = Body.parse(await read(request, self.gateway.settings.max_body_bytes))
        began = time.perf_counter()
        routed = await self.gateway.decide(endpoint, body.fields, request.headers, exchange.caller)
        exchange.routed, exchange.routing_s = routed, time.perf_counter() - began
        exchange.prompt, exchange.user = routed.prompt, user_of(body.fields)
        if routed.pair is not None:
            exchange.pair = {"strong": routed.pair.strong, "weak": routed.pair.weak}
        left = asyncio.create_task(_left(request.receive))
        try:
            began = time.perf_counter()
            try:
                answer = await _unless(
                    left, self._sent(exchange, endpoint, body, request.headers.raw)
                )
            except UpstreamFailed as failed:
                decided = exchange.routed
                exchange.route = decided.route
                if failed.response is None:
                    raise
                answer = Answer(decided.route, decided.model, failed.response)
            exchange.route, exchange.model = answer.route, answer.model
            exchange.stood_in = answer.stood_in
            exchange.status = answer.response.status_code
        except BaseException:
            exchange.upstream_s = time.perf_counter() - began
            left.cancel()
            raise
        headers = [
            (name.lower(), value)
            for name, value in answer.response.headers.raw
            if name.lower().decode("latin-1") not in _NOT_RETURNED
        ]
        for name, text in self._said(exchange, exchange.routed).items():
            headers.append((name.encode(), _NOT_PLAIN.sub("?", text)[:500].encode()))
        passed = _PassedOn(self, exchange, answer.response, headers, left, began)
        if self.feedback is not None and self.feedback.drawn(endpoint.path, exchange):
            passed.duel = body, request.headers.raw
        return passed

    async def _sent(
        self, exchange: Exchange, endpoint: Endpoint, body: Body, headers: Headers
    ) -> Answer:
        """Return what the models answer; a policy may change the decision in the exchange."""
        routed = exchange.routed
        assert routed is not None
        if self.cascade.knows(routed.policy):
            return await self.cascade.answer(exchange, body, headers)
        return await self.upstreams.send(
            routed.route,
            routed.model,
            endpoint,
            body,
            headers,
            may_stand_in=self.gateway.settings.stand_in and not routed.named,
        )

    def _said(self, exchange: Exchange, routed: Routed) -> dict[str, str]:
        """Return the headers that say what was decided, who answered, and what that saves."""
        out = {"x-routellm-id": exchange.id, **routed.headers()}
        if exchange.stood_in:
            out["x-routellm-stood-in"] = exchange.stood_in
            out["x-routellm-answered-by"] = exchange.model
        strong = self.upstreams.ends["strong"].settings.model
        saved = self.money.saved_usd(strong, exchange.model)
        also = exchange.also_usd
        if saved is not None and also is not None:
            out["x-routellm-saved-usd"] = f"{saved - also:.6f}"
        if routed.policy:
            out["x-routellm-calls"] = str(1 + len(exchange.also))
        return out

    def finish(self, exchange: Exchange) -> None:
        """Count a request that is over."""
        self.at_once -= 1
        paid = also = exchange.also_usd  # nothing, unless somebody answered
        exchange.usd = also if exchange.also else None
        if exchange.route and 200 <= exchange.status < 300:
            counted = exchange.usage.input_tokens, exchange.usage.output_tokens
            strong = self.upstreams.ends["strong"].settings.model
            own = self.money.usd(exchange.model, *counted)
            saved = self.money.saved_usd(strong, exchange.model, *counted)
            exchange.usd = paid = None if own is None or also is None else own + also
            exchange.saved_usd = None if saved is None or also is None else saved - also
        self.limits.leave(exchange.caller, paid)
        self._tell(exchange)

    def _tell(self, exchange: Exchange) -> None:
        exchange.total_s = time.perf_counter() - exchange.began
        for observer in self.observers:
            try:
                observer(exchange)
            except Exception as error:
                log.error("request %s was not counted: %s", exchange.id, type(error).__name__)


class _PassedOn(Response):
    """An upstream's answer on its way: raw bytes as they arrive."""

    def __init__(
        self,
        proxy: Proxy,
        exchange: Exchange,
        response: httpx.Response,
        headers: list[tuple[bytes, bytes]],
        left: asyncio.Task[None],
        began: float,
    ) -> None:
        self.status_code = response.status_code
        self.raw_headers = headers
        self.background = None
        self.body = b""
        self._proxy = proxy
        self._exchange = exchange
        self._response = response
        self._left = left
        self._began = began
        self.duel: tuple[Body, Headers] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = self._exchange
        kind = self._response.headers.get("content-type", "")
        reader = UsageReader(kind, text=self.duel is not None)
        exchange.streamed = kind.startswith("text/event")
        try:
            await _unless(self._left, self._pass_on(send, reader))
        except (ClientLeft, OSError):
            exchange.broken = "client_left"
        except httpx.HTTPError as error:
            # the status is out: only a connection that ends early says that this is not all
            exchange.broken = "upstream_broke_off"
            log.warning("an answer of the %s model broke off (%s)", exchange.route,
                        type(error).__name__)  # fmt: skip
        except asyncio.CancelledError:
            exchange.broken = "stopped"
            raise
        finally:
            self._left.cancel()
            with suppress(Exception):
                await self._response.aclose()
            exchange.usage = reader.end()
            exchange.upstream_s = time.perf_counter() - self._began
            self._proxy.finish(exchange)
            if self.duel is not None and self._proxy.feedback is not None:
                self._proxy.feedback.duel(exchange, *self.duel, reader.text)

    async def _pass_on(self, send: Send, reader: UsageReader) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        async for chunk in self._response.aiter_raw():
            reader.feed(chunk)
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        # before the client can know that it has all: its next request may go on from this answer
        self._exchange.usage = reader.end()
        if self._exchange.endpoint == "responses" and self._exchange.usage.id:
            self._proxy.gateway.remember(self._exchange.usage.id, self._exchange.route)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def read(request: Request, most_bytes: int) -> bytearray:
    """Read a request's body.

    Raises
    ------
    GatewayError
        If it is too large; as soon as that is known.
    ClientLeft
        If the client hangs up before its end.
    """
    too_large = GatewayError(
        f"the request is over {most_bytes} bytes", status=413, code="too_large"
    )
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > most_bytes:
        raise too_large
    raw = bytearray()
    try:
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > most_bytes:
                raise too_large
    except ClientDisconnect:
        raise ClientLeft from None
    return raw


async def _left(receive: Receive) -> None:
    """Return once the client has hung up."""
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()


async def _unless(left: asyncio.Task[None], work: Coroutine[Any, Any, T]) -> T:
    """Do the work; stop it, and raise ClientLeft, if the client leaves before it is done."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
    except BaseException:
        await _stopped(task)
        raise
    if not task.done():
        await _stopped(task)
        raise ClientLeft
    return task.result()


async def _stopped(task: asyncio.Future[Any]) -> None:
    task.cancel()
    with suppress(BaseException):
        await task


def _id_of(headers: Mapping[str, str]) -> str:
    given = headers.get("x-request-id", "")
    return given if _GIVEN_ID.fullmatch(given) else uuid.uuid4().hex
