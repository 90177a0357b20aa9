"""A local repository, and a server that gives it out over git's smart HTTP protocol."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ALONE = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
SOMEONE = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (
        ("NAME", "Someone"), ("EMAIL", "someone@example.org"), ("DATE", "2024-07-01T00:00:00Z")
    )
}  # fmt: skip


def git(repository, *arguments, stdin=b"", **variables):
    """Run git on a bare repository and return the line it prints."""
    done = subprocess.run(
        ["git", f"--git-dir={repository}", *arguments],
        input=stdin, env=os.environ | ALONE | SOMEONE | variables, check=True, capture_output=True,
    )  # fmt: skip
    return done.stdout.decode().strip()


def can_serve():
    """Say whether git is here, with the program that serves repositories over HTTP."""
    if shutil.which("git") is None:
        return False
    where = subprocess.run(["git", "--exec-path"], capture_output=True, text=True, check=True)
    return Path(where.stdout.strip(), "git-http-backend").exists()


def commit_files(repository: Path, files: dict[str, bytes]) -> str:
    """Commit these files, and no others, to a bare repository, made if missing; returns the id."""
    if not repository.exists():
        git(repository, "init", "--quiet", "--bare", "--template=", str(repository))
    tree = repository.with_suffix(".tree")
    for path, content in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(content)
    git(repository, f"--work-tree={tree}", "add", "--all", "--force", ".")
    git(repository, f"--work-tree={tree}", "commit", "--quiet", "--message=tables")
    shutil.rmtree(tree)
    return git(repository, "rev-parse", "HEAD")


@dataclass
class GitServer:
    """What a running server was asked, and how it is to misbehave.

    Attributes
    ----------
    asked : list of str
        The requests, as ``GET /…`` and ``POST /…``.
    sent : int
        Bytes of the answers' bodies.
    spoil : bool
        Whether to change one byte in the middle of each long answer.
    hold_first : threading.Event, optional
        The first request is answered only when this is set.
    """

    url: str = ""
    asked: list[str] = field(default_factory=list)
    sent: int = 0
    spoil: bool = False
    hold_first: threading.Event | None = None
    arrived: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def git_server(repository: Path, *, filters: bool = True):
    """Serve a bare repository on 127.0.0.1; yields a GitServer."""
    git(repository, "config", "uploadpack.allowAnySHA1InWant", "true")
    git(repository, "config", "uploadpack.allowFilter", "true" if filters else "false")
    state = GitServer()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            state.asked.append(f"{self.command} {self.path}")
            if len(state.asked) == 1 and state.hold_first is not None:
                state.arrived.set()
                state.hold_first.wait(60)
            path, _, query = self.path.partition("?")
            length = self.headers.get("Content-Length", "0")
            variables = {
                "GIT_PROJECT_ROOT": str(repository.parent),
                "GIT_HTTP_EXPORT_ALL": "1",
                "REQUEST_METHOD": self.command,
                "PATH_INFO": path,
                "QUERY_STRING": query,
                "CONTENT_TYPE": self.headers.get("Content-Type", ""),
                "CONTENT_LENGTH": length,
                "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
                "HTTP_GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
                "REMOTE_ADDR": "127.0.0.1",
            }
            done = subprocess.run(
                ["git", "http-backend"],
                input=self.rfile.read(int(length)), env=os.environ | ALONE | variables,
                capture_output=True, check=False,
            )  # fmt: skip
            head, _, body = done.stdout.partition(b"\r\n\r\n")
            headers = dict(line.split(": ", 1) for line in head.decode().splitlines())
            if state.spoil and len(body) > 1000:
                middle = len(body) // 2
                body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
            self.send_response(int(headers.pop("Status", "200").split()[0]))
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # the client may be gone
                self.wfile.write(body)
            state.sent += len(body)

        do_POST = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}/{repository.name}"
    try:
        yield state
    finally:
        if state.hold_first is not None:
            state.hold_first.set()
        server.shutdown()
        server.server_close()
