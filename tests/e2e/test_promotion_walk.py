"""docs/promotion.md as written: its commands, in order, in one home."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from tests.conftest import REPOSITORY
from tests.e2e.shared import asked, new_home, routellm

pytestmark = pytest.mark.slow

PAGE = (REPOSITORY / "docs" / "promotion.md").read_text()
LINES = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    for line in block.splitlines()
    if line.strip()
]


def serve(home, folder, line):
    """Run the page's gateway, ask it forty times, and stop it."""
    assignments, words = [], shlex.split(line)
    while "=" in words[0]:
        assignments.append(words.pop(0).split("=", 1))
    assert words[0] == "routellm"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "routellm.cli", "--home", str(home), *words[1:]]
    gateway = subprocess.Popen(
        [*command, "--port", str(port)], cwd=folder, env={**os.environ, **dict(assignments)}
    )
    decided = []
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                ready = httpx.get(f"{url}/readyz", timeout=5).json()
                if json.dumps(ready).count('"version"') > 1:  # champion and challenger
                    break
            except (httpx.HTTPError, ValueError):
                pass
            time.sleep(0.5)
        for i in range(60):
            reply = httpx.post(
                f"{url}/v1/chat/completions",
                json={
                    "model": "router",
                    "messages": [{"role": "user", "content": f"What is {i} times {i}?"}],
                },
                timeout=60,
            )
            assert reply.status_code == 200, reply.text
            decided.append(reply.headers["x-routellm-version"])
    finally:
        gateway.send_signal(signal.SIGTERM)
        assert gateway.wait(timeout=60) is not None
    return decided


def test_the_walk_through_the_page_works_as_written(tmp_path, tmp_path_factory):
    home, said = new_home(tmp_path, tmp_path_factory), {}
    assert len(LINES) == 11
    for line in LINES:
        if "routellm serve" in line:
            decided = serve(home, tmp_path, line)
            assert set(decided) == {"1", "2"}, decided
            assert 1 <= decided.count("2") <= 30, decided
            continue
        words = shlex.split(line)
        done = routellm("--home", home, *words[1:], cwd=tmp_path)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        said[line] = done.stdout
    said = list(said.values())
    assert "first version" in said[0]
    assert "delta_apgr" in said[2]
    assert "<svg" in (tmp_path / "compare.html").read_text()
    assert any(verdict in said[3] for verdict in ("promote", "reject", "inconclusive"))
    assert asked(home, "versions")[0]["version"] == "2"
    assert "is challenger" in said[5]
    assert re.search(r"\d+ requests seen", said[5])
    assert "champion is version 2: forced: the walk through this page" in said[6].replace("\n", " ")
    assert "champion is version 1" in said[7]
    history = asked(home, "history")
    assert [one["to"] for one in history][-2:] == ["2", "1"]
    assert "whole" in said[8]
    assert "nothing was serving" in said[9]
    assert "version 1 was serving" in routellm(
        "--home", home, "history", "--at", "2999-01-01"
    ).stdout.replace("\n", " ")
