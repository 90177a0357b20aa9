"""The loop closed: traffic, feedback, retraining, promotion, and another decision."""

import csv
import itertools
import json
import time
from contextlib import contextmanager

import httpx
import pytest

from routellm.gateway.server import running
from tests.e2e.shared import asked, new_home, routellm, served
from tests.gateway.test_gateway import wait_for
from tests.support.servers import free_port
from tests.support.upstream import CHAT, Upstream, json_reply

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TOPICS = ("autumn", "the sea", "a lost key", "old friends", "a night train", "snow", "bread",
          "my grandmother", "a harbour", "silence", "two cats", "the moon", "a garden", "rust",
          "a letter", "rain", "salt", "a bridge", "smoke", "an orchard")  # fmt: skip
FORMS = (
    "Write a short poem about {}",
    "Compose a few verses on {}",
    "Some rhymes about {}, please",
)
WHO = ("baker", "teacher", "sailor", "nurse", "farmer", "painter", "judge", "tailor", "pilot",
       "cook", "gardener", "drummer", "librarian", "carpenter", "fisherman", "dentist")  # fmt: skip
WHAT = ("lemons", "stamps", "candles", "umbrellas", "marbles", "violins", "bricks", "tulips",
        "teapots", "postcards", "hammers", "pillows", "clocks", "sandwiches", "kites")  # fmt: skip
POEMS = [form.format(topic) for form in FORMS for topic in TOPICS]
SUMS = [
    f"A {who} owns {7 * i + 12} {what} and loses {3 * i + 5}: how many {what} are left?"
    for i, (who, what) in enumerate(itertools.product(WHO, WHAT))
]
SMALL_TALK = [
    f"My {who} is fond of {what}, say something nice" for who in WHO for what in WHAT[::2]
]
NEW = "Compose a poem about a lighthouse"


def people_say(path):
    """Write battles in which big is better at sums and the few poems, and small at small talk."""
    asked = [(p, "model_a") for p in SUMS + POEMS[::6]] + [(p, "model_b") for p in SMALL_TALK]
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["question_id", "model_a", "model_b", "winner", "conversation_a"])
        for i, (prompt, winner) in enumerate(asked):
            turns = json.dumps([{"role": "user", "content": prompt}])
            out.writerow([i, "big", "small", "tie" if i % 7 == 0 else winner, turns])


def test_feedback_on_todays_traffic_changes_tomorrows_decision(tmp_path, tmp_path_factory):
    home = new_home(tmp_path, tmp_path_factory)
    people_say(tmp_path / "votes.csv")
    models = Upstream(json_reply(CHAT))
    with running(models.app) as url:
        (tmp_path / "routellm.toml").write_text(
            f"""
            strong = "big"
            weak = "small"
            [training]
            heldout_share = 0.35
            [gateway]
            pacer = false
            poll_s = 0.3
            [gateway.strong]
            base_url = "{url}/v1"
            model = "big"
            [gateway.weak]
            base_url = "{url}/v1"
            model = "small"
            [feedback]
            enabled = true
            store_prompts = true
            """
        )

        def run(*args, **more):
            done = routellm("--home", home, *args, cwd=tmp_path, **more)
            assert done.returncode == 0, done.stderr
            return done

        run("retrain", "--source", "votes.csv", "--routers", "knn")
        with gateway(home, tmp_path) as at:
            before = decided(at, NEW)
            assert before["version"] == "1"
            assert before["route"] == "strong"
            give_feedback(at, models)
        # the store is written when the gateway stops; nothing is lost
        read = asked(home, "ingest", "gateway://", cwd=tmp_path)
        assert read["new"] == len(POEMS)
        again = asked(home, "ingest", "gateway://", cwd=tmp_path)
        assert again["new"] == 0

        with gateway(home, tmp_path) as at:
            assert decided(at, NEW) == before
            run("retrain", "--source", "votes.csv", "--source", "gateway://", "--routers", "knn")
            status = asked(home, "status", cwd=tmp_path)
            assert status["champion"]["version"] == "2"  # the gate found it better
            wait_for(lambda: decided(at, NEW)["version"] == "2", 30)
            after = decided(at, NEW)
            sums = decided(at, "A tailor owns 97 lemons and loses 15: how many lemons are left?")
        assert after["win_rate"] < before["win_rate"] - 0.05, (before, after, sums)
        assert after["route"] == "weak"
        assert sums["route"] == "strong"


@contextmanager
def gateway(home, folder):
    with served(home, free_port(), cwd=folder) as (url, _):
        yield url


def decided(at, prompt):
    body = {"model": "router", "messages": [{"role": "user", "content": prompt}]}
    return httpx.post(f"{at}/v1/route", json={**body, "routing": {"threshold": 0.62}}).json()


def give_feedback(at, models):
    """Ask for each poem, of either model, and say of each that small's answer is the better."""
    with httpx.Client(base_url=at) as client:
        for i, poem in enumerate(POEMS):
            models.say(json_reply({**CHAT, "id": f"chatcmpl-{i}"}))
            body = {"model": "router", "messages": [{"role": "user", "content": poem}]}
            route = ("strong", "weak")[i % 2]
            body["routing"] = {"strong_fraction": 1.0 if route == "strong" else 0.0}
            answer = client.post("/v1/chat/completions", json=body)
            assert answer.headers["x-routellm-route"] == route, answer.headers
            said = {"id": answer.json()["id"], "vote": "weak"}
            deadline = time.monotonic() + 10
            while (taken := client.post("/v1/feedback", json=said)).status_code == 404:
                assert time.monotonic() < deadline, taken.text
            assert taken.status_code == 200, taken.text
