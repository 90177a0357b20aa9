"""The command as a person meets it: a process, its output, its exit status."""

import json
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, contextmanager

import httpx
import openai
import pytest

from tests.e2e.shared import asked, routellm

pytestmark = pytest.mark.slow


def test_status_names_what_is_live(home):
    doc = asked(home, "status")
    assert doc["tracking_uri"].startswith("sqlite:///")
    assert doc["model"] == "router"
    assert set(doc["champion"]) >= {"version", "kind", "since", "why"}
    assert doc["champion"]["why"].startswith("first version")
    assert doc["snapshot"]["rows"] == 6000
    assert doc["snapshot"]["simulated"]


def test_a_second_run_with_nothing_new_does_no_work_twice(home):
    before = asked(home, "versions")
    done = routellm("--home", home, "retrain", "--source", "simulated://arena?battles=6000")
    assert done.returncode == 0, done.stderr
    assert "Nothing new" in done.stdout
    assert "nothing new" in done.stderr
    assert "trained before on the same content" in done.stderr
    assert asked(home, "versions") == before


def test_what_labels_and_seeds_bring_is_shown_and_done_once(home):
    before = len(asked(home, "versions"))
    command = (
        "--home", home, "retrain", "--source", "simulated://arena?battles=6000",
        "--routers", "knn,mf", "--seeds", "2", "--compare-augmentation",
    )  # fmt: skip
    done = routellm(*command)
    assert done.returncode == 0, done.stderr
    assert "What the pair's golden and judge labels bring" in done.stdout
    assert "APGR over 2 seeds" in done.stdout
    assert "trial of mf, seed 1" in done.stderr
    again = routellm(*command, "--json")
    assert again.returncode == 0, again.stderr
    assert "trial of" not in again.stderr
    trials = json.loads(again.stdout)["trials"]
    assert {(t["kind"], t["augmentation"], t["seed"]) for t in trials} == {
        (kind, *what)
        for kind in ("knn", "mf")
        for what in (("both", 1), ("none", 0), ("golden", 0), ("judge", 0))
    }
    assert all(t["evaluations"] for t in trials)
    assert len(asked(home, "versions")) == before


def test_every_verb_answers_on_what_the_run_left(home, tmp_path):
    assert asked(home, "validate")["passed"]
    champion = asked(home, "status")["champion"]
    other = next(v["version"] for v in asked(home, "versions") if v["kind"] == "random")
    assert asked(home, "evaluate", "champion")["simulated"]["exact"]["apgr"]["value"] > 0.5
    compared = asked(home, "compare", "champion", other)
    assert compared["decision"]["outcome"] == "reject"
    assert compared["metrics"]["simulated.apgr"]["delta"] < 0
    routed = asked(home, "route", "Tell me a joke about coffee", "--threshold", "0")
    assert routed["route"] == "strong"
    queries = tmp_path / "queries.txt"
    queries.write_text("Tell me a joke\nProve it rigorously\nWhat is the capital of Peru\n")
    found = asked(home, "calibrate", "--queries", queries, "--strong-fraction", "0.3")
    assert 0 <= found["threshold"] <= 1
    assert found["n"] == 3
    refused = routellm("--home", home, "promote", other)
    assert refused.returncode == 2
    assert "not promoted" in refused.stderr
    forced = asked(home, "promote", other, "--force", "--reason", "a test")
    assert forced["version"] == other
    assert asked(home, "rollback")["version"] == champion["version"]
    assert asked(home, "ingest", "simulated://arena?battles=6000")["new"] == 0


def state(home):
    """What a failed command must leave alone: snapshots, and the moves of the alias."""
    published = {p.name: p.read_bytes() for p in home.glob("snapshots*/[!.]*") if p.is_file()}
    return published, (home / "history.jsonl").read_text()


@pytest.mark.parametrize(
    ("args", "status", "says"),
    [
        (["ingest", "nowhere.csv"], 2, "no source 'nowhere.csv'"),
        (["ingest", "empty.csv"], 1, "empty"),
        (["ingest", "winners.csv"], 1, "quarantine_share"),
        (["retrain", "--routers", "gpt"], 2, "unknown router kind 'gpt'"),
        (["retrain", "--benchmarks", "nowhere"], 1, "no folder nowhere"),
        (["route", "x", "--version", "99"], 2, "no version or alias '99'"),
        (["route", "x", "--threshold", "1.5"], 2, "outside [0, 1]"),
        (["route", "x", "--strong-fraction", "-1"], 2, "outside [0, 1]"),
        (["calibrate", "--strong-fraction", "2"], 2, "outside [0, 1]"),
        (["calibrate", "--queries", "nowhere.txt"], 2, "cannot read nowhere.txt"),
        (["promote", "1", "--force"], 2, "--reason"),
        (["validate", "abc"], 2, "no snapshot starts with 'abc'"),
        (["nonsense"], 2, "No such command"),
        (["serve"], 2, "no upstreams"),
    ],
)
def test_bad_input_is_one_sentence(home, tmp_path, args, status, says):
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "winners.csv").write_text(
        "question_id,model_a,model_b,winner,conversation_a\n"
        + "".join(
            f'{i},a,b,modela,"[{{""role"": ""user"", ""content"": ""hi {i}""}}]"\n'
            for i in range(200)
        )
    )
    before = state(home)
    done = routellm("--home", home, *args, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in done.stderr
    assert state(home) == before


def test_a_wrong_setting_is_one_sentence(home, tmp_path):
    (tmp_path / "routellm.toml").write_text("[gateway]\nport = 99999999\n")
    done = routellm("--home", home, "status", cwd=tmp_path)
    assert done.returncode == 2
    assert "the setting gateway.port is not allowed" in done.stderr


def test_an_mlflow_that_does_not_answer_is_one_sentence(tmp_path):
    (tmp_path / "routellm.toml").write_text('tracking_uri = "http://127.0.0.1:9"\n')
    done = routellm("status", cwd=tmp_path)
    assert done.returncode == 1
    assert "MLflow at http://127.0.0.1:9 did not do what was asked" in done.stderr
    assert "Traceback" not in done.stderr


@contextmanager
def served(home, port, *args):
    process = subprocess.Popen(
        [sys.executable, "-m", "routellm.cli", "--home", str(home), "serve", "--port", str(port),
         *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while True:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline, "the gateway did not start"
            try:
                if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=40)


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_serve_demo_answers_the_official_client_and_follows_the_alias(home):
    with served(home, free_port(), "--demo") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
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
            seen = client.chat.completions.with_raw_response.create(**ask).headers[
                "x-routellm-version"
            ]
        asked(home, "rollback")


def test_a_taken_port_is_one_sentence(home):
    port = free_port()
    with served(home, port, "--demo"):
        done = routellm("--home", home, "serve", "--demo", "--port", port)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr


def test_mlflow_serves_the_champion(home, tmp_path):
    """`mlflow models serve` on what the run left, outside the repository's folder."""
    import os
    import signal

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


def test_a_retraining_tells_prefect_what_was_decided(home):
    champion = asked(home, "history")[0]
    with closing(sqlite3.connect(home / "prefect" / "prefect.db")) as prefect:
        kept = prefect.execute("SELECT data FROM artifact WHERE key = 'decision'").fetchall()
        events = prefect.execute(
            "SELECT payload FROM events WHERE event = 'routellm.promote'"
        ).fetchall()
    first = f"version {champion['version']}: first version"
    (told,) = (text for (text,) in kept if first in text)
    assert "| reproduces | pass |" in told
    assert [json.loads(p)["sha256"] for (p,) in events] == [champion["sha256"]]
