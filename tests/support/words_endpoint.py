"""An OpenAI-compatible endpoint that hashes words: no process of a test loads anything heavy."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.conftest import HashEncoder


class Embeddings(BaseHTTPRequestHandler):
    """Answers ``POST /v1/embeddings``."""

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        vectors = HashEncoder().encode(body["input"]).tolist()
        data = [{"index": i, "embedding": vector} for i, vector in enumerate(vectors)]
        raw = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


@contextmanager
def words_endpoint() -> Iterator[str]:
    """Serve on a free port of this machine; yields the address, up to and including ``/v1``."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that was killed is no error of the server

    server = Server(("127.0.0.1", 0), Embeddings)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def as_environment(url: str) -> dict[str, str]:
    """Return what names the endpoint to a command as its encoder."""
    return {
        "ROUTELLM_EMBEDDING__PROVIDER": "openai",
        "ROUTELLM_EMBEDDING__BASE_URL": url,
        "ROUTELLM_EMBEDDING__MODEL": "words",
        "ROUTELLM_EMBEDDING__BATCH_SIZE": "1000",
    }
