"""The two models' endpoints: pooled, tried again, left alone, stood in for.

What is tried again is what the upstream has surely not worked on: a connection that was refused,
and the statuses by which it says so (429, 503, 529). A timeout or another 5xx is not tried again,
since the query may have been answered and paid for; but the other model may stand in.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx

from routellm.errors import GatewayError
from routellm.gateway.body import Body
from routellm.gateway.breaker import Breaker
from routellm.gateway.connections import Connections
from routellm.gateway.endpoints import Endpoint
from routellm.gateway.litellm import NO_ADDRESS, LiteLLMTransport
from routellm.gateway.metrics import Metrics
from routellm.settings import GatewaySettings, Upstream

log = logging.getLogger("routellm.gateway")

Headers = Sequence[tuple[bytes, bytes]]  # names in lower case, as ASGI has them

_NOT_WORKED_ON = frozenset({429, 503, 529})  # 529: Anthropic's "overloaded"
_FAILED = _NOT_WORKED_ON | {500, 502, 504}

# of a request: what belongs to its connection, to this gateway, or is a secret for this gateway
_NOT_SENT = frozenset(
    name.encode()
    for name in (
        "host", "content-length", "transfer-encoding", "connection", "keep-alive", "upgrade", "te",
        "trailer", "expect", "proxy-authorization", "proxy-connection", "accept-encoding",
        "authorization", "x-api-key", "api-key", "cookie", "forwarded",
    )
)  # fmt: skip
_NOT_SENT_PREFIXES = (b"x-routellm-", b"x-forwarded-", b"x-real-", b"cf-", b"sec-")


@dataclass
class Answer:
    """What came back.

    Attributes
    ----------
    route : str
        Who answered: strong or weak.
    response : httpx.Response
        Its body is not read yet; close it.
    stood_in : str
        Why the other model answered, or "".
    """

    route: str
    model: str
    response: httpx.Response
    tries: int = 1
    stood_in: str = ""


class UpstreamFailed(GatewayError):
    """An upstream did not answer; `response` is what it said instead, if it said something."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str,
        response: httpx.Response | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, status=status, code=code, retry_after_s=retry_after_s)
        self.response = response


@dataclass
class _End:
    """One endpoint at run time."""

    route: str
    settings: Upstream
    breaker: Breaker
    headers: Headers = field(repr=False)  # its key
    connections: httpx.AsyncBaseTransport
    _addresses: dict[str, httpx.URL] = field(default_factory=dict)

    def address(self, path: str) -> httpx.URL:
        """Return where an endpoint is; reading an address takes longer than sending to it."""
        if path not in self._addresses:
            base = (self.settings.base_url or NO_ADDRESS).rstrip("/")
            self._addresses[path] = httpx.URL(f"{base}/{path}")
        return self._addresses[path]


class Upstreams:
    """Sends requests to the strong and the weak model, and to those of the pool."""

    def __init__(self, settings: GatewaySettings, metrics: Metrics) -> None:
        assert settings.strong is not None
        assert settings.weak is not None
        self.settings = settings
        self.metrics = metrics
        context = httpx.create_ssl_context()
        self.ends = {
            route: _End(
                route,
                upstream,
                Breaker(settings.breaker_failures, settings.breaker_open_s),
                _key_headers(upstream),
                _transport(upstream, context),
            )
            for route, upstream in {
                **settings.routes,
                "embeddings": settings.embeddings or settings.weak,
            }.items()
        }
        timeout = httpx.Timeout(settings.timeout_s, connect=settings.connect_timeout_s)
        self._extensions = {"timeout": timeout.as_dict()}

    async def close(self) -> None:
        for end in self.ends.values():
            await end.connections.aclose()

    async def send(
        self,
        route: str,
        model: str,
        endpoint: Endpoint,
        body: Body,
        headers: Headers,
        *,
        may_stand_in: bool,
    ) -> Answer:
        """Ask a route's model; if that fails and may be stood in for strong, or weak for strong.

        Raises
        ------
        UpstreamFailed
            If none answers: the first one's failure.
        """
        try:
            return await self._ask(self.ends[route], model, endpoint, body, headers)
        except UpstreamFailed as failed:
            if not may_stand_in:
                raise
            other = self.ends["weak" if route == "strong" else "strong"]
            log.warning("the %s model failed (%s): the other one is asked", route, failed.code)
            try:
                answer = await self._ask(other, other.settings.model, endpoint, body, headers)
            except GatewayError as also:
                if isinstance(also, UpstreamFailed):
                    await _close(also.response)
                raise failed from None
            except BaseException:
                await _close(failed.response)
                raise
            await _close(failed.response)
            self.metrics.stand_ins.labels(route, failed.code).inc()
            answer.stood_in = f"{route} failed: {failed.code}"
            return answer

    async def _ask(
        self, end: _End, model: str, endpoint: Endpoint, body: Body, headers: Headers
    ) -> Answer:
        if endpoint.dialect not in end.settings.speaks:
            raise GatewayError(
                f"the {end.route} model's endpoint does not speak {endpoint.dialect.title()}'s "
                f"protocol (setting gateway.{end.route}.speaks)",
                status=404,
                code="not_supported",
            )
        request = httpx.Request(
            "POST",
            end.address(endpoint.path),
            content=body.rewritten(model),
            headers=[*sent_headers(headers), *end.headers],
            extensions=self._extensions,
        )
        tries = 0
        while True:
            left_s = end.breaker.wait_s()
            if left_s > 0:
                raise UpstreamFailed(
                    f"the {end.route} model keeps failing and is left alone for a moment: try "
                    "again",
                    status=503,
                    code="upstream_left_alone",
                    retry_after_s=left_s,
                )
            tries += 1
            try:
                response = await self._once(end, request)
            except UpstreamFailed as error:
                again = error.code == "upstream_unreachable" or (
                    error.response is not None and error.response.status_code in _NOT_WORKED_ON
                )
                wait_s = self._wait_s(tries, error.response)
                if not again or wait_s is None:
                    raise
                await _close(error.response)
                self.metrics.retries.labels(end.route).inc()
                await asyncio.sleep(wait_s)
                continue
            return Answer(end.route, model, response, tries)

    async def _once(self, end: _End, request: httpx.Request) -> httpx.Response:
        began = time.perf_counter()
        try:
            response = await end.connections.handle_async_request(request)
        except httpx.ConnectError as error:
            end.breaker.failed()
            raise self._unreachable(end, error) from error
        except httpx.TimeoutException as error:
            end.breaker.failed()
            if isinstance(error, httpx.ConnectTimeout):
                raise self._unreachable(end, error) from error
            raise UpstreamFailed(
                f"the {end.route} model did not answer in time", status=504, code="timeout"
            ) from error
        except httpx.HTTPError as error:
            end.breaker.failed()
            raise UpstreamFailed(
                f"the {end.route} model broke off ({type(error).__name__})",
                status=502,
                code="upstream_broke_off",
            ) from error
        except BaseException:
            # the client left: this says nothing of the upstream, but a try must not stay open
            end.breaker.succeeded()
            raise
        self.metrics.first_byte.labels(end.route).observe(time.perf_counter() - began)
        status = response.status_code
        if status in _FAILED:
            if status == 429:  # it lives, and is busy
                end.breaker.succeeded()
            else:
                end.breaker.failed()
            raise UpstreamFailed(
                f"the {end.route} model answered {status}",
                status=status,
                code=f"upstream_{status}",
                response=response,
            )
        end.breaker.succeeded()
        return response

    def _unreachable(self, end: _End, error: Exception) -> UpstreamFailed:
        return UpstreamFailed(
            f"the {end.route} model cannot be reached ({type(error).__name__})",
            status=502,
            code="upstream_unreachable",
        )

    def _wait_s(self, tries: int, response: httpx.Response | None) -> float | None:
        """Return how long to wait before trying again; None if that is over.

        Full jitter over a doubling span (Brooker, "Exponential Backoff and Jitter", AWS 2015); an
        upstream that names a time is believed, up to ``retry_longest_s``.
        """
        how = self.settings
        if tries > how.retries:
            return None
        asked = _retry_after(response)
        if asked is not None:
            return asked if asked <= how.retry_longest_s else None
        return random.uniform(0.0, min(how.retry_longest_s, how.retry_wait_s * 2 ** (tries - 1)))


def sent_headers(headers: Headers) -> list[tuple[bytes, bytes]]:
    """Return the caller's headers that an upstream gets to see, as the bytes that came.

    Encodings are not asked for: the gateway reads token counts in passing.
    """
    return [
        *(
            (name, value)
            for name, value in headers
            if name not in _NOT_SENT and not name.startswith(_NOT_SENT_PREFIXES)
        ),
        (b"accept-encoding", b"identity"),
    ]


def _transport(upstream: Upstream, context: ssl.SSLContext) -> httpx.AsyncBaseTransport:
    if upstream.via == "http":
        return Connections(context)
    return LiteLLMTransport(upstream.model, api_base=upstream.base_url, api_key=upstream.key())


def _key_headers(upstream: Upstream) -> Headers:
    key = upstream.key()
    if key is None or upstream.via == "litellm":
        return []
    out = [(b"authorization", f"Bearer {key}".encode())]
    if "anthropic" in upstream.speaks:
        out.append((b"x-api-key", key.encode()))
    return out


def _retry_after(response: httpx.Response | None) -> float | None:
    """Return the seconds that an upstream asks to wait; None if it names none (or a date)."""
    if response is None:
        return None
    try:
        seconds = float(response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


async def _close(response: httpx.Response | None) -> None:
    if response is not None:
        await response.aclose()
