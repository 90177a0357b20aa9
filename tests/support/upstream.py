"""An OpenAI-compatible upstream that does what a test tells it, and keeps what reached it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route


@dataclass
class Reply:
    """What to answer, once.

    Attributes
    ----------
    chunks : list of bytes
        Sent one by one, `pause_s` apart.
    breaks_off : bool
        Whether the connection ends after them without an end of the body.
    wait_s : float
        Before the answer begins.
    """

    chunks: list[bytes]
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    pause_s: float = 0.0
    breaks_off: bool = False
    wait_s: float = 0.0


@dataclass
class Seen:
    """A request that came."""

    path: str
    raw: bytes
    headers: dict[str, str]
    cancelled: bool = False

    @property
    def body(self) -> Any:
        return json.loads(self.raw)


class Upstream:
    """A scripted upstream; replies are used up one by one, then the last stays.

    Attributes
    ----------
    seen : list of Seen
    """

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.seen: list[Seen] = []
        self.app = Starlette(routes=[Route("/{path:path}", self._answer, methods=["POST"])])

    def say(self, *replies: Reply) -> None:
        self.replies = list(replies)

    async def _answer(self, request: Request) -> Response:
        seen = Seen(request.url.path, await request.body(), dict(request.headers))
        self.seen.append(seen)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        try:
            await self._wait(request, reply.wait_s)
        except asyncio.CancelledError:
            seen.cancelled = True
            raise

        async def body():
            try:
                for chunk in reply.chunks:
                    yield chunk
                    await asyncio.sleep(reply.pause_s)
            except (asyncio.CancelledError, GeneratorExit):
                seen.cancelled = True
                raise
            if reply.breaks_off:
                raise ConnectionAbortedError("as scripted")

        return StreamingResponse(body(), reply.status, reply.headers)

    async def _wait(self, request: Request, wait_s: float) -> None:
        """Wait, unless the other side leaves."""
        end = asyncio.get_running_loop().time() + wait_s
        while asyncio.get_running_loop().time() < end:
            if await request.is_disconnected():
                raise asyncio.CancelledError
            await asyncio.sleep(0.02)


def json_reply(doc: Any, **more: Any) -> Reply:
    return Reply([json.dumps(doc).encode()], **more)


def events(*docs: Any, done: bool = True) -> list[bytes]:
    """Return server-sent events, one a chunk."""
    out = [f"data: {json.dumps(doc)}\n\n".encode() for doc in docs]
    return [*out, b"data: [DONE]\n\n"] if done else out


def stream_reply(*docs: Any, **more: Any) -> Reply:
    return Reply(events(*docs), headers={"content-type": "text/event-stream"}, **more)


CHAT = {
    "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "what-answered",
    "choices": [{"index": 0, "finish_reason": "stop",
                 "message": {"role": "assistant", "content": "forty-two"}}],
    "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
    "vendor": {"kept": [1, None]},
}  # fmt: skip


def chat_chunk(**delta: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m",
        "choices": [{"index": 0, "delta": delta, "finish_reason": None}],
    }  # fmt: skip
