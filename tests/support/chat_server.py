"""A local model: an HTTP server that speaks OpenAI's chat completions and does as a test says.

It refuses what the real one refuses (a wrong key, path or body), counts usage, and keeps what it
was asked. A `script` of answers is used up first; then the `rule` answers.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_PART = r"----- {name} (\w+) -----\n(.*?)\n----- END OF {name} \1 -----"


@dataclass(frozen=True)
class Asked:
    """One call, as the server understood it; the answers are a judge's two."""

    prompt: str
    first: str
    second: str
    body: dict[str, Any]
    authorization: str | None
    at: float

    def part(self, name: str) -> str:
        """Return what stands between the marker lines of a name, or nothing."""
        return part(self.body["messages"][1]["content"], name)


@dataclass(frozen=True)
class Answer:
    """One answer; by default a completion that stops by itself and reports usage."""

    text: str | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    code: str | None = None
    param: str | None = None
    refusal: str | None = None
    finish: str = "stop"
    usage: bool = True
    delay_s: float = 0.0
    hang_up: bool = False


def part(user: str, name: str) -> str:
    """Return what stands between the marker lines of a name in a user message, or nothing."""
    found = re.search(_PART.format(name=name), user, re.DOTALL)
    return found.group(2) if found else ""


def better(asked: Asked) -> Answer:
    """Answer by the planted rule: the answer that names the higher quality is better."""
    a, b = (int(re.search(r"quality (\d+)", t).group(1)) for t in (asked.first, asked.second))
    verdict = "A" if a > b else "B" if b > a else "C"
    return Answer(f"One says more than the other.\n[[{verdict}]]")


def tokens(text: str) -> int:
    """Count tokens as this server bills them: a word or a punctuation mark is one."""
    return len(re.findall(r"\w{1,6}|[^\w\s]", text))


class ChatServer:
    """What a test sets and sees; see the module."""

    def __init__(self, key: str | None) -> None:
        self.key = key
        self.rule: Callable[[Asked], Answer] = better
        self.script: list[Answer] = []
        self.count: Callable[[str], int] = tokens
        self.fixed_output_tokens: int | None = None
        self.asked: list[Asked] = []
        self.input_tokens = 0
        self.output_tokens = 0
        self.most_at_once = 0
        self.url = ""
        self._at_once = 0
        self._lock = threading.Lock()

    def orders(self) -> list[tuple[str, str, str]]:
        """Return (prompt, first, second) of every call."""
        return [(a.prompt, a.first, a.second) for a in self.asked]

    def answer(self, asked: Asked) -> tuple[Answer, bytes]:
        """Return the next answer and its body."""
        with self._lock:
            self.asked.append(asked)
            given = self.script.pop(0) if self.script else None
        if self.key is not None and asked.authorization != f"Bearer {self.key}":
            given = Answer(status=401, code="invalid_api_key", text=f"Bad key {self.key}")
        given = given or self.rule(asked)
        if given.raw is not None:
            return given, given.raw
        if given.status != 200:
            error = {"message": given.text, "code": given.code, "param": given.param}
            return given, json.dumps({"error": error | {"type": "an_error"}}).encode()
        message = {"role": "assistant", "content": given.text, "refusal": given.refusal}
        doc: dict[str, Any] = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "model": asked.body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": given.finish}],
        }
        if given.usage:
            into = self.count("".join(m["content"] for m in asked.body["messages"]))
            out = self.fixed_output_tokens or self.count(given.text or given.refusal or "")
            doc["usage"] = {
                "prompt_tokens": into,
                "completion_tokens": out,
                "total_tokens": into + out,
            }
            with self._lock:
                self.input_tokens += into
                self.output_tokens += out
        return given, json.dumps(doc).encode()

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count a call as in flight."""
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self._lock:
                self._at_once -= 1


@contextlib.contextmanager
def chat_server(key: str | None = None) -> Iterator[ChatServer]:
    """Serve on a free port of this machine until the block ends."""
    state = ChatServer(key)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept, as the real ones are
        disable_nagle_algorithm = True  # else a reply waits 40 ms for an acknowledgement

        def log_message(self, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            with state.counted():
                asked = self.understood(raw)
                if asked is None:
                    self.send(Answer(status=404), b'{"error": {"code": "not_found"}}')
                    return
                given, body = state.answer(asked)
                time.sleep(given.delay_s)
            if given.hang_up:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.send(given, body)

        def understood(self, raw: bytes) -> Asked | None:
            body = json.loads(raw)
            if self.path != "/v1/chat/completions":
                return None
            system, user = (m["content"] for m in body["messages"])
            assert system
            parts = [part(user, name) for name in ("QUESTION", "ANSWER A", "ANSWER B")]
            return Asked(*parts, body, self.headers["Authorization"], time.monotonic())

        def send(self, given: Answer, body: bytes) -> None:
            with contextlib.suppress(ConnectionError):  # the client may have given up
                self.send_response(given.status)
                for name, value in given.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that was killed is no error of the server

    server = Server(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
