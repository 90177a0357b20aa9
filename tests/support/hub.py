"""A local server that speaks enough of the Hugging Face hub's protocol to serve one dataset."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def hub(repo: str, files: dict[str, bytes]):
    """Serve a dataset repository; yields (endpoint, list of paths asked for)."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            asked.append(f"{self.command} {self.path}")
            path = self.path.split("?")[0]
            if path.startswith(f"/api/datasets/{repo}"):
                doc = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
                self.answer(json.dumps(doc).encode(), {"Content-Type": "application/json"})
                return
            prefix = f"/datasets/{repo}/resolve/{COMMIT}/"
            if path.startswith(prefix) and path[len(prefix) :] in files:
                body = files[path[len(prefix) :]]
                etag = hashlib.sha256(body).hexdigest()
                self.answer(body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
                return
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def answer(self, body, headers):
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
