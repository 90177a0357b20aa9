"""Connections to one upstream, kept open and used again, the latest first.

httpx's own pool looks at all of its connections for each request, and asks the kernel about those
that are idle: with fifty of them that costs more than everything else here. So each connection is
a transport of its own, which has a pool of one, and they lie on a stack.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator

import httpx

_ONE = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=60.0)


class Connections(httpx.AsyncBaseTransport):
    """A transport to one origin, with as many connections as requests at once.

    Parameters
    ----------
    context : ssl.SSLContext
        Shared: making one takes milliseconds.
    most_idle : int
        Connections that are kept open when nobody needs them.
    """

    def __init__(self, context: ssl.SSLContext, most_idle: int = 256) -> None:
        self._context = context
        self._most_idle = most_idle
        self._idle: list[httpx.AsyncHTTPTransport] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        one = (
            self._idle.pop()
            if self._idle
            # a proxy of this machine's user is not taken: where a query goes is in the settings
            else httpx.AsyncHTTPTransport(verify=self._context, limits=_ONE, trust_env=False)
        )
        try:
            response = await one.handle_async_request(request)
        except BaseException:
            await one.aclose()
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Borrowed(response.stream, self, one)
        return response

    async def give_back(self, one: httpx.AsyncHTTPTransport) -> None:
        if len(self._idle) < self._most_idle:
            self._idle.append(one)
        else:
            await one.aclose()

    async def aclose(self) -> None:
        while self._idle:
            await self._idle.pop().aclose()


class _Borrowed(httpx.AsyncByteStream):
    """An answer's bytes; when it is closed, its connection is free."""

    def __init__(
        self, stream: httpx.AsyncByteStream, pool: Connections, one: httpx.AsyncHTTPTransport
    ) -> None:
        self._stream = stream
        self._pool = pool
        self._one: httpx.AsyncHTTPTransport | None = one

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._stream:
            yield chunk

    async def aclose(self) -> None:
        one, self._one = self._one, None
        if one is None:
            return
        try:
            await self._stream.aclose()
        except BaseException:
            await one.aclose()
            raise
        await self._pool.give_back(one)
