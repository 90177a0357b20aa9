"""Two tiny DEMO upstreams that echo, so that the gateway can be tried with nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse


def demo_upstream() -> FastAPI:
    """Return an app that answers Chat Completions with an echo of the last message."""
    app = FastAPI(title="demo upstream")

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> JSONResponse | StreamingResponse:
        body: dict[str, Any] = await request.json()
        try:
            last = body["messages"][-1]["content"]
        except (LookupError, TypeError):
            error = {"message": "no last message", "type": "invalid_request_error"}
            return JSONResponse({"error": error}, 400)
        said = last if isinstance(last, str) else "(parts)"
        said = said.encode(errors="replace").decode()  # JSON may name half a character
        words = f"[demo echo by {body['model']}] {said}".split(" ")
        head = {"id": "chatcmpl-demo", "created": int(time.time()), "model": body["model"]}
        if body.get("stream"):
            return StreamingResponse(_chunks(head, words), media_type="text/event-stream")
        message = {"role": "assistant", "content": " ".join(words)}
        return JSONResponse(
            {
                **head,
                "object": "chat.completion",
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
            }
        )

    return app


def _chunks(head: dict[str, Any], words: list[str]) -> Iterator[str]:
    for i, word in enumerate(words):
        delta = {"role": "assistant", "content": word if i == 0 else f" {word}"}
        choice = {"index": 0, "delta": delta, "finish_reason": None}
        yield _event({**head, "object": "chat.completion.chunk", "choices": [choice]})
    choice = {"index": 0, "delta": {}, "finish_reason": "stop"}
    yield _event({**head, "object": "chat.completion.chunk", "choices": [choice]})
    yield "data: [DONE]\n\n"


def _event(doc: dict[str, Any]) -> str:
    return f"data: {json.dumps(doc)}\n\n"
