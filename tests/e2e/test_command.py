"""The command as a person meets it: its output, its exit status.

What starts Prefect, and one verb and one error of the others, is run as a process; the rest is
the same `main` in this process.
"""

import json
import re
import shlex
import sqlite3
import time
from contextlib import closing, contextmanager

import httpx
import openai
import pytest

from routellm.gateway.server import running
from tests.conftest import REPOSITORY
from tests.e2e.shared import ARENA, asked, inside, routellm, served
from tests.support.servers import free_port
from tests.support.upstream import CHAT, Upstream, json_reply
from tests.test_docs import commands

# the one retraining that they look at may be long in the making, on a busy machine
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_status_names_what_is_live(home):
    done = routellm("--home", home, "status", "--json")
    assert done.returncode == 0, done.stderr
    doc = json.loads(done.stdout)
    assert doc["tracking_uri"].startswith("sqlite:///")
    assert doc["model"] == "router"
    assert set(doc["champion"]) >= {"version", "kind", "since", "why"}
    assert doc["champion"]["why"].startswith("first version")
    assert doc["snapshot"]["rows"] == 6000
    assert doc["snapshot"]["simulated"]


def test_a_second_run_with_nothing_new_does_no_work_twice(home):
    before = asked(home, "versions")
    done = routellm("--home", home, "retrain", "--source", ARENA)
    assert done.returncode == 0, done.stderr
    assert "Nothing new" in done.stdout
    assert "nothing new" in done.stderr
    assert "trained before on the same content" in done.stderr
    assert asked(home, "versions") == before


def test_what_labels_and_seeds_bring_is_shown_and_done_once(home):
    before = asked(home, "versions")
    command = (  # it moves no alias: the gate would look at knn each time
        "--home", home, "retrain", "--source", ARENA, "--no-promote",
        "--routers", "knn", "--seeds", "2", "--compare-augmentation",
    )  # fmt: skip
    done = routellm(*command)
    assert done.returncode == 0, done.stderr
    assert "What the pair's golden and judge labels bring" in done.stdout
    assert "APGR over 2 seeds" in done.stdout
    assert "trial of knn, seed 1" in done.stderr
    again = routellm(*command, "--json")
    assert again.returncode == 0, again.stderr
    assert "trial of" not in again.stderr
    trials = json.loads(again.stdout)["trials"]
    assert {(t["kind"], t["augmentation"], t["seed"]) for t in trials} == {
        ("knn", *what) for what in (("both", 1), ("none", 0), ("golden", 0), ("judge", 0))
    }
    assert all(t["evaluations"] for t in trials)
    assert asked(home, "versions") == before


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
    refused = inside("--home", home, "promote", other)
    assert refused.returncode == 2
    assert "not promoted" in refused.stderr
    forced = asked(home, "promote", other, "--force", "--reason", "a test")
    assert forced["version"] == other
    assert asked(home, "rollback")["version"] == champion["version"]
    assert asked(home, "ingest", ARENA)["new"] == 0


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
    run = routellm if args[0] in ("nonsense", "retrain") else inside
    done = run("--home", home, *args, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in done.stderr
    assert state(home) == before


def test_a_wrong_setting_is_one_sentence(home, tmp_path):
    (tmp_path / "routellm.toml").write_text("[gateway]\nport = 99999999\n")
    done = inside("--home", home, "status", cwd=tmp_path)
    assert done.returncode == 2
    assert "the setting gateway.port is not allowed" in done.stderr


def test_an_mlflow_that_does_not_answer_is_one_sentence(tmp_path):
    (tmp_path / "routellm.toml").write_text('tracking_uri = "http://127.0.0.1:9"\n')
    done = routellm("status", cwd=tmp_path)
    assert done.returncode == 1
    assert "MLflow at http://127.0.0.1:9 did not do what was asked" in done.stderr
    assert "Traceback" not in done.stderr


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


# what neither starts Prefect nor ends processes
READS = {"calibrate", "compare", "evaluate", "ingest", "route", "status", "validate", "versions"}


@pytest.mark.parametrize(
    ("line", "page"), {line: page for page, line in commands(run=True)}.items()
)
def test_a_documented_command_works(home, page, line):
    words = shlex.split(line)
    assert words[0] == "routellm", f"{page}: mark it as not run, or let it be run here: {line}"
    run = inside if words[1] in READS else routellm
    done = run("--home", home, *words[1:])
    assert done.returncode == 0, (line, done.stderr)


# --- docs/gateway.md, as written -------------------------------------------------------------

GATEWAY_PAGE = (REPOSITORY / "docs" / "gateway.md").read_text()
STEPS = re.findall(
    r"```(bash|toml|python)\n(.*?)```",
    GATEWAY_PAGE.split("## From the demo")[1].split("\n## ")[0],
    re.S,
)


@contextmanager
def running_line(home, folder, line, ports):
    """Run a line of the page that serves, until the block ends."""
    assignments, words = [], shlex.split(line)
    while "=" in words[0]:
        assignments.append(words.pop(0).split("=", 1))
    assert words[:2] == ["routellm", "serve"]
    with served(home, ports["6060"], *words[2:], cwd=folder, env=dict(assignments)) as (url, _):
        yield url


def test_the_gateways_page_leads_from_the_demo_to_two_real_upstreams(home, tmp_path, capfd):
    strong, weak = Upstream(json_reply(CHAT)), Upstream(json_reply(CHAT))
    (tmp_path / "strong.key").write_text("sk-of-the-strong-model\n")
    with running(strong.app) as strong_url, running(weak.app) as weak_url:
        ports = {"6060": free_port(), "8001": port_of(strong_url), "8002": port_of(weak_url)}

        def local(text):
            for named, real in ports.items():
                text = text.replace(f":{named}", f":{real}")
            return text

        (demo, client, settings, keys, canary, look) = (local(text) for _, text in STEPS)
        assert [kind for kind, _ in STEPS] == ["bash", "python", "toml", "bash", "bash", "python"]
        with running_line(home, tmp_path, demo, ports):
            exec(compile(client, "docs/gateway.md", "exec"), {})
        said = capfd.readouterr().out
        assert "demo echo" in said
        assert "x-routellm-win-rate" in said

        (tmp_path / "routellm.toml").write_text(settings)
        made = []
        for line in keys.splitlines():
            done = inside("--home", home, *shlex.split(line)[1:], cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            made.append(done.stdout)
        (key,) = re.findall(r"rlk_\w+", made[0])
        assert key not in made[1]
        assert "search-team" in made[1]

        put_in_line, serve_canary = canary.splitlines()
        other = next(
            v["version"] for v in asked(home, "versions") if "champion" not in v["aliases"]
        )
        line = put_in_line.replace(" 2 ", f" {other} ")
        done = inside("--home", home, *shlex.split(line)[1:], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        with running_line(home, tmp_path, serve_canary, ports) as url:
            deadline = time.monotonic() + 60
            while httpx.get(f"{url}/readyz").json()["challenger"]["version"] != other:
                assert time.monotonic() < deadline, "the challenger is not loaded"
                time.sleep(0.2)
            asks = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
            versions, models = set(), set()
            for i in range(40):
                task = ("Prove a statement about", "Tell me a joke about")[i % 2]
                ask = [{"role": "user", "content": f"{task} the number {i}"}]
                raw = asks.chat.completions.with_raw_response.create(model="router", messages=ask)
                versions.add(raw.headers["x-routellm-version"])
                models.add(raw.headers["x-routellm-model"])
            with pytest.raises(openai.AuthenticationError):
                openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0).models.list()
            exec(compile(look, "docs/gateway.md", "exec"), {})
            assert f'version="{other}"' in capfd.readouterr().out
            assert f"Version {asked(home, 'status')['champion']['version']}" in httpx.get(url).text
        assert other in versions
        assert len(versions) == 2
        assert models == {"gpt-4-1106-preview", "mixtral-8x7b-instruct-v0.1"}
        assert {s.headers["authorization"] for s in strong.seen} == {
            "Bearer sk-of-the-strong-model"
        }
        assert not any("authorization" in s.headers for s in weak.seen)


def port_of(url):
    return int(url.rsplit(":", 1)[1])
