"""docs/operations.md: the whole of it on one machine, and a file that is dropped into the inbox."""

import csv
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import httpx
import psutil
import pytest

from routellm.supervise import recorded
from tests.e2e.shared import asked, new_home, routellm
from tests.support.servers import free_port
from tests.support.words_endpoint import words_endpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STRONG, WEAK = "gpt-4-1106-preview", "mixtral-8x7b-instruct-v0.1"
WHO = ("baker", "teacher", "sailor", "nurse", "farmer", "painter", "judge", "tailor", "pilot",
       "cook", "gardener", "drummer", "librarian", "carpenter", "fisherman", "dentist")  # fmt: skip
WHAT = ("lemons", "stamps", "candles", "umbrellas", "marbles", "violins", "bricks", "tulips",
        "teapots", "postcards", "hammers", "pillows", "clocks", "sandwiches", "kites")  # fmt: skip


def write_battles(path):
    """Write battles in which strong is better at sums, and weak at small talk."""
    pairs = list(itertools.product(WHO, WHAT))
    asked = [
        (f"A {who} owns {7 * i + 12} {what} and loses {3 * i + 5}: how many {what} are left?", 1)
        for i, (who, what) in enumerate(pairs)
    ]
    asked += [(f"My {who} is fond of {what}, say something nice", 0) for who, what in pairs[::2]]
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["question_id", "model_a", "model_b", "winner", "conversation_a"])
        for i, (prompt, hard) in enumerate(asked * 3):
            winner = "tie" if i % 7 == 0 else "model_a" if hard else "model_b"
            turns = json.dumps([{"role": "user", "content": prompt}])
            out.writerow([i, STRONG, WEAK, winner, turns])


def wait_until(condition, up, log, within_s=420):
    deadline = time.monotonic() + within_s
    while not (found := condition()):
        assert up.poll() is None, log.read_text()
        assert "Failed" not in log.read_text(), log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
    return found


@pytest.fixture
def words():
    with words_endpoint() as url:
        yield url


def test_a_file_in_the_inbox_becomes_a_served_router(tmp_path, tmp_path_factory, words):
    home, log = new_home(tmp_path, tmp_path_factory), tmp_path / "up.log"
    port, prefect = free_port(), free_port()
    (tmp_path / "routellm.toml").write_text(
        f"""
        home = "{home}"
        sources = []
        inbox_settle_s = 1
        [training]
        routers = ["random", "knn"]
        heldout_share = 0.35
        [embedding]  # eight processes would load the package's own for half a minute of CPU
        provider = "openai"
        base_url = "{words}"
        model = "words"
        [evaluation]
        bootstrap = 100
        [gateway]
        port = {port}
        poll_s = 0.5
        [up]
        prefect_port = {prefect}
        mlflow_port = {free_port()}
        """
    )
    with log.open("w") as file:
        up = subprocess.Popen(
            [sys.executable, "-m", "routellm.cli", "up"],
            cwd=tmp_path, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: "watch is running" in log.read_text(), up, log)
        wait_until(lambda: "gateway is running" in log.read_text(), up, log)
        ask = {"model": "router", "messages": [{"role": "user", "content": "How many lemons?"}]}
        before = httpx.post(f"{url}/v1/chat/completions", json=ask)
        assert before.status_code == 200  # from the fallback, and a header says so
        assert "x-routellm-version" not in before.headers

        second = routellm("up", cwd=tmp_path)
        assert second.returncode == 2
        assert "runs already" in second.stderr

        write_battles(tmp_path / "new.csv")
        (tmp_path / "new.csv").rename(home / "inbox" / "new.csv")

        def version():
            answer = httpx.post(f"{url}/v1/chat/completions", json=ask)
            assert answer.status_code == 200
            return answer.headers.get("x-routellm-version")

        wait_until(lambda: "retrain: Completed" in log.read_text(), up, log)
        assert asked(home, "history", cwd=tmp_path)[0]["action"] == "promote"
        served = wait_until(version, up, log, 60)
        champion = asked(home, "status", cwd=tmp_path)["champion"]
        assert champion["version"] == served
        assert champion["kind"] == "knn"
        assert not champion["simulated"]
        versions = asked(home, "versions", cwd=tmp_path)
        assert sorted(v["kind"] for v in versions) == ["knn", "random"]

        def done():
            said = log.read_text()
            return all(
                re.search(rf"{name}: Completed", said)
                for name in ("ingest", "retrain", "train-router/cpu")
            )

        wait_until(done, up, log, 60)
        found = asked(home, "doctor", "--quick", cwd=tmp_path)
        seen = {(one["part"], one["outcome"]) for one in found}
        assert {("prefect", "ok"), ("workers", "ok"), ("gateway", "ok"), ("snapshot", "ok")} <= seen

        worker = recorded(home)["worker-cpu"]
        worker.kill()
        wait_until(lambda: "worker-cpu is running (started 2 times)" in log.read_text(), up, log)

        running = list(recorded(home).values())
        assert len(running) == 6  # itself, prefect, mlflow, the worker, the watch, the gateway
        ended = asked(home, "down", cwd=tmp_path)["stopped"]
        assert "gateway" in ended
        assert up.wait(60) == 0, log.read_text()
        _, alive = psutil.wait_procs(running, timeout=10)
        assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
        assert "killed" not in log.read_text()
        assert asked(home, "down", cwd=tmp_path)["stopped"] == []
    finally:
        if up.poll() is None:
            os.kill(up.pid, signal.SIGTERM)
            up.wait(120)
