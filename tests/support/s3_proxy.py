"""A proxy in front of an S3 server that does what networks and busy services do.

It also lets one write through at a time: moto looks whether a name is taken and puts the object in
two steps, where S3 promises one.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_ERROR = (
    '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code>'
    "<Message>{message}</Message></Error>"
)


@dataclass
class S3Proxy:
    """What the proxy does, and what it has seen.

    Attributes
    ----------
    refuse : list of (status, code)
        Answers to the next requests, used up one by one, which reach nobody.
    away : (status, code) or None
        The answer to all requests, as long as it is set.
    lose_answers : int
        So many of the next writes are done, and answered with 500.
    break_off : int
        So many of the next answers with a body end in its middle.
    seen : list of (method, path)
        All requests, in order.
    """

    url: str = ""
    refuse: list[tuple[int, str]] = field(default_factory=list)
    away: tuple[int, str] | None = None
    lose_answers: int = 0
    break_off: int = 0
    seen: list[tuple[str, str]] = field(default_factory=list)

    def count(self, method: str, part: str = "") -> int:
        """Return how many requests of a method there were whose path holds `part`."""
        return sum(m == method and part in path for m, path in list(self.seen))


@contextlib.contextmanager
def s3_proxy(endpoint: str) -> Iterator[S3Proxy]:
    """Run a proxy in front of an S3 endpoint, on a free port of this machine."""
    to = urlsplit(endpoint)
    proxy, writing = S3Proxy(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self) -> None:
            body = self._body()
            proxy.seen.append((self.command, self.path))
            refusal = proxy.refuse.pop(0) if proxy.refuse else proxy.away
            if refusal is not None:
                self._refuse(*refusal)
                return
            writes = self.command in ("PUT", "POST", "DELETE")
            with writing if writes else contextlib.nullcontext():
                status, headers, answer = self._forward(body)
            if writes and proxy.lose_answers:
                proxy.lose_answers -= 1
                self._refuse(500, "InternalError")
                return
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            if self.command == "GET" and proxy.break_off and len(answer) > 1:
                proxy.break_off -= 1
                self.wfile.write(answer[: len(answer) // 2])
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.wfile.write(answer)

        def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            connection = http.client.HTTPConnection(to.hostname, to.port, timeout=30)
            try:
                headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
                connection.request(self.command, self.path, body, headers)
                response = connection.getresponse()
                return response.status, response.getheaders(), response.read()
            finally:
                connection.close()

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _refuse(self, status: int, code: str) -> None:
            raw = _ERROR.format(code=code, message=self.headers.get("Authorization", "")).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(raw)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()


def back_after(proxy: S3Proxy, seconds: float) -> None:
    """Let what is away come back after a while."""

    def wait() -> None:
        time.sleep(seconds)
        proxy.away = None

    threading.Thread(target=wait, daemon=True).start()
