"""docs/promotion.md as written: its commands, in order, in one home; with words hashed to embed."""

import re
import shlex
import time

import httpx
import pytest

from tests.conftest import REPOSITORY
from tests.e2e.shared import asked, inside, new_home, routellm, served
from tests.support.servers import free_port
from tests.support.words_endpoint import as_environment, words_endpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

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
    assert words[:2] == ["routellm", "serve"]
    decided = []
    with served(home, free_port(), *words[2:], cwd=folder, env=dict(assignments)) as (url, _):
        deadline = time.monotonic() + 120
        while httpx.get(f"{url}/readyz").json()["challenger"]["version"] is None:
            assert time.monotonic() < deadline, "the challenger is not loaded"
            time.sleep(0.2)
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
    return decided


@pytest.fixture(autouse=True)
def words(monkeypatch):
    with words_endpoint() as url:
        for name, value in as_environment(url).items():
            monkeypatch.setenv(name, value)
        yield


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
        run = routellm if words[1] == "retrain" else inside
        done = run("--home", home, *words[1:], cwd=tmp_path)
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
    assert "none is missing" in said[8]
    assert "nothing was serving" in said[9]
    assert "version 1 was serving" in inside(
        "--home", home, "history", "--at", "2999-01-01"
    ).stdout.replace("\n", " ")
