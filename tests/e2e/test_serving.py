"""The champion served: by `routellm serve`, one process and several, and by MLflow's own server."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import httpx
import mlflow
import openai
import psutil
import pytest

from tests.e2e.shared import asked, routellm, served
from tests.support.servers import free_port

# the one retraining that they look at may be long in the making, on a busy machine
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def demo(home):
    with served(home, free_port(), "--demo") as (url, _):
        yield url


def test_serve_demo_answers_the_official_client_and_follows_the_alias(home, demo):
    client = openai.OpenAI(base_url=f"{demo}/v1", api_key="none", max_retries=0)
    ask = {"model": "router", "messages": [{"role": "user", "content": "Tell me a joke"}]}
    raw = client.chat.completions.with_raw_response.create(**ask)
    assert "demo echo" in raw.parse().choices[0].message.content
    stream = client.chat.completions.create(**ask, stream=True)
    assert "joke" in "".join(c.choices[0].delta.content or "" for c in stream)
    first = raw.headers["x-routellm-version"]
    other = next(v["version"] for v in asked(home, "versions") if v["version"] != first)
    asked(home, "promote", other, "--force", "--reason", "watch it move")
    deadline = time.monotonic() + 20
    seen = first
    while seen != other:
        assert time.monotonic() < deadline, "the gateway did not follow the alias"
        seen = client.chat.completions.with_raw_response.create(**ask).headers["x-routellm-version"]


def alias_points_at(home, version):
    """Move the champion as anyone may who has the MLflow UI."""
    uri = f"sqlite:///{home / 'mlflow.db'}"
    mlflow.MlflowClient(uri, uri).set_registered_model_alias("router", "champion", version)


def test_several_processes_serve_as_one(home):
    with served(home, free_port(), "--demo", "--workers", "2") as (url, process):
        ask = {"model": "router", "messages": [{"role": "user", "content": "Tell me a joke"}]}

        def asked_well():
            with contextlib.suppress(httpx.TransportError):  # of the one that is being killed
                return httpx.post(f"{url}/v1/chat/completions", json=ask).status_code == 200
            return False

        def counted():
            lines = httpx.get(f"{url}/metrics").text.splitlines()
            return sum(
                float(x.split()[-1]) for x in lines if x.startswith("routellm_requests_total{")
            )

        def workers():
            found = []
            for child in psutil.Process(process.pid).children():
                with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile, or a zombie
                    if not any("resource_tracker" in word for word in child.cmdline()):
                        found.append(child.pid)
            return found

        assert all(asked_well() for _ in range(20))
        assert [counted() for _ in range(4)] == [20.0] * 4
        before = workers()
        assert len(before) == 2
        os.kill(before[0], signal.SIGKILL)
        deadline = time.monotonic() + 60
        while len(set(workers()) - set(before)) < 1:
            assert time.monotonic() < deadline, "a worker that was killed was not replaced"
            time.sleep(0.2)
        while not all(asked_well() for _ in range(10)):
            assert time.monotonic() < deadline, "the workers do not serve"
        assert counted() >= 30

        def served_by():  # each on a connection of its own, so by either process
            answers = [httpx.post(f"{url}/v1/chat/completions", json=ask) for _ in range(20)]
            return {answer.headers["x-routellm-version"] for answer in answers}

        (champion,) = served_by()
        other = next(v["version"] for v in asked(home, "versions") if v["version"] != champion)
        alias_points_at(home, other)
        deadline = time.monotonic() + 60
        while served_by() != {other}:
            assert time.monotonic() < deadline, "a worker does not follow the alias"


def test_a_taken_port_is_one_sentence(home, demo):
    port = demo.rsplit(":", 1)[1]
    done = routellm("--home", home, "serve", "--demo", "--port", port)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr


def test_mlflow_serves_the_champion(home, tmp_path):
    """`mlflow models serve` on what the run left, outside the repository's folder."""
    port = free_port()
    # mlflow starts uvicorn by name: the environment it is installed in must be active
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    uri = asked(home, "status")["tracking_uri"]
    env = {**os.environ, "MLFLOW_TRACKING_URI": uri, "PATH": path}
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/router@champion",
         "--env-manager", "local", "-p", str(port)],
        cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 180
        while True:
            assert process.poll() is None, "mlflow models serve stopped"
            assert time.monotonic() < deadline, "mlflow models serve did not start"
            try:
                if httpx.get(f"http://127.0.0.1:{port}/ping").status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        answer = httpx.post(
            f"http://127.0.0.1:{port}/invocations",
            json={"dataframe_split": {"columns": ["prompt"], "data": [["Tell me a joke"]]},
                  "params": {"strong_fraction": 1.0}},
            timeout=120,
        )  # fmt: skip
        assert answer.status_code == 200, answer.text
        (row,) = answer.json()["predictions"]
        assert row["route"] == "strong"
        assert 0 <= row["win_rate"] <= 1
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)
