"""When an upstream fails: tried again, stood in for, left alone. Two scripted upstreams."""

import time

import httpx
import pytest

from routellm.gateway.server import running
from tests.gateway.test_faithful import ASK, gateway
from tests.support import upstream as scripted
from tests.support.upstream import CHAT, json_reply

pytestmark = pytest.mark.slow

FINE = json_reply(CHAT)
AWAY = "http://127.0.0.1:9"
SOON = {"retry_wait_s": 0.01, "retry_longest_s": 0.5}


def failing(status, **headers):
    return json_reply(
        {"error": {"message": f"as scripted {status}"}},
        status=status,
        headers={"content-type": "application/json", **headers},
    )


@pytest.fixture
def strong():
    up = scripted.Upstream(FINE)
    with running(up.app) as up.url:
        yield up


@pytest.fixture
def weak():
    up = scripted.Upstream(FINE)
    with running(up.app) as up.url:
        yield up


def ask(url, model="router-random-0.0", **body):
    """Ask for the strong model, by a threshold of 0."""
    return httpx.post(
        f"{url}/v1/chat/completions", json={"model": model, "messages": ASK, **body}, timeout=30
    )


def metric(url, name):
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))


@pytest.mark.parametrize("status", [429, 503, 529])
def test_what_was_not_worked_on_is_tried_again(strong, weak, tmp_path, status):
    strong.say(failing(status), failing(status, **{"retry-after": "0"}), FINE)
    with gateway(tmp_path, strong.url, weak.url, **SOON) as url:
        answer = ask(url)
        assert metric(url, "routellm_retries_total") == 2
    assert answer.status_code == 200
    assert "x-routellm-stood-in" not in answer.headers
    assert (len(strong.seen), len(weak.seen)) == (3, 0)


@pytest.mark.parametrize("status", [500, 502, 504])
def test_what_may_have_been_worked_on_is_not_tried_again_and_the_other_stands_in(
    strong, weak, tmp_path, status
):
    strong.say(failing(status))
    with gateway(tmp_path, strong.url, weak.url, **SOON) as url:
        answer = ask(url)
        assert metric(url, "routellm_stand_ins_total") == 1
    assert answer.status_code == 200
    assert answer.headers["x-routellm-stood-in"] == f"strong failed: upstream_{status}"
    assert answer.headers["x-routellm-answered-by"] == "small"
    assert answer.headers["x-routellm-route"] == "strong"  # what was decided
    assert (len(strong.seen), len(weak.seen)) == (1, 1)
    assert weak.seen[0].body["model"] == "small"


def test_an_upstream_that_asks_for_a_long_wait_is_stood_in_for_at_once(strong, weak, tmp_path):
    strong.say(failing(429, **{"retry-after": "60"}))
    with gateway(tmp_path, strong.url, weak.url, **SOON) as url:
        began = time.monotonic()
        answer = ask(url)
    assert answer.headers["x-routellm-answered-by"] == "small"
    assert time.monotonic() - began < 10
    assert len(strong.seen) == 1


def test_an_upstream_that_is_away_is_tried_again_and_stood_in_for(weak, tmp_path):
    with gateway(tmp_path, AWAY, weak.url, **SOON) as url:
        answer = ask(url)
        assert metric(url, "routellm_retries_total") == 2
    assert answer.status_code == 200
    assert answer.headers["x-routellm-stood-in"] == "strong failed: upstream_unreachable"


def test_an_upstream_that_is_too_slow_is_stood_in_for(strong, weak, tmp_path):
    strong.say(json_reply(CHAT, wait_s=20))
    with gateway(tmp_path, strong.url, weak.url, timeout_s=0.3) as url:
        answer = ask(url)
    assert answer.headers["x-routellm-stood-in"] == "strong failed: timeout"
    assert len(strong.seen) == 1


@pytest.mark.parametrize("how", [{"model": "big"}, {"stand_in": False}])
def test_a_model_that_was_named_or_a_setting_that_forbids_it_is_not_stood_in_for(
    strong, weak, tmp_path, how
):
    strong.say(failing(500))
    settings = {k: v for k, v in how.items() if k == "stand_in"}
    with gateway(tmp_path, strong.url, weak.url, **SOON, **settings) as url:
        answer = ask(url, **{k: v for k, v in how.items() if k == "model"})
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "as scripted 500"
    assert not weak.seen


def test_when_both_fail_the_first_ones_answer_comes_back(strong, weak, tmp_path):
    strong.say(failing(503))
    weak.say(failing(500))
    with gateway(tmp_path, strong.url, weak.url, **SOON) as url:
        answer = ask(url)
    assert answer.status_code == 503
    assert answer.json()["error"]["message"] == "as scripted 503"


def test_with_both_away_the_error_is_in_openais_shape(tmp_path):
    with gateway(tmp_path, AWAY, AWAY, **SOON) as url:
        answer = ask(url)
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "upstream_unreachable"
    assert answer.json()["error"]["message"].startswith("the strong model cannot be reached")


def test_an_upstream_that_keeps_failing_is_left_alone_and_taken_back(strong, weak, tmp_path):
    strong.say(failing(500))
    settings = {"breaker_failures": 3, "breaker_open_s": 1.0, "retries": 0}
    with gateway(tmp_path, strong.url, weak.url, **settings) as url:
        for _ in range(3):
            assert ask(url).headers["x-routellm-stood-in"] == "strong failed: upstream_500"
        strong.say(FINE)
        opened = time.monotonic()
        left_alone = ask(url)
        named = ask(url, model="big")
        assert time.monotonic() - opened < 0.9
        assert left_alone.headers["x-routellm-stood-in"] == "strong failed: upstream_left_alone"
        assert named.status_code == 503
        assert named.headers["retry-after"] == "1"
        assert len(strong.seen) == 3
        time.sleep(1.1)
        assert "x-routellm-stood-in" not in ask(url).headers
        assert len(strong.seen) == 4


def test_a_busy_upstream_is_not_one_that_fails(strong, weak, tmp_path):
    strong.say(failing(429, **{"retry-after": "60"}))
    with gateway(tmp_path, strong.url, weak.url, breaker_failures=2) as url:
        for _ in range(4):
            assert ask(url).headers["x-routellm-stood-in"] == "strong failed: upstream_429"
    assert len(strong.seen) == 4
