"""Who may use the gateway, and how much; and that no secret comes out of it."""

import logging

import httpx
import openai
import pytest

from routellm.gateway.key_file import add_key, revoke_key
from routellm.gateway.server import running
from tests.gateway.test_faithful import ASK, gateway
from tests.gateway.test_gateway import wait_for
from tests.support import upstream as scripted
from tests.support.upstream import CHAT, json_reply

pytestmark = pytest.mark.slow


@pytest.fixture
def served(tmp_path):
    """A gateway whose key file is empty, its home, and what reached the upstream."""
    up = scripted.Upstream(json_reply(CHAT))
    exchanges = []
    with (
        running(up.app) as behind,
        gateway(tmp_path / "home", behind, behind, seen=exchanges) as url,
    ):
        yield url, tmp_path / "home" / "keys.json", up, exchanges


def ask(url, key=None, header="authorization", **body):
    value = f"Bearer {key}" if header == "authorization" else key
    headers = {} if key is None else {header: value}
    doc = {"model": "router", "messages": ASK, **body}
    return httpx.post(f"{url}/v1/chat/completions", json=doc, headers=headers)


def test_the_first_key_closes_the_gateway_and_a_revoked_one_opens_nothing(served):
    url, path, up, _ = served
    assert ask(url).status_code == 200
    key, text = add_key(path, "team")
    assert ask(url).status_code == 401
    assert ask(url, "rlk_0123456789ab_" + "0" * 64).status_code == 401
    assert ask(url, text[:-1]).status_code == 401
    assert ask(url, text).status_code == 200
    assert ask(url, text, header="x-api-key").status_code == 200
    for path_of_all in ("/v1/models", "/v1/models/router"):
        assert httpx.get(f"{url}{path_of_all}").status_code == 401
    assert httpx.post(f"{url}/v1/route", json={"model": "router"}).status_code == 401
    asked = len(up.seen)
    revoke_key(path, key.id)
    assert ask(url, text).status_code == 401
    assert ask(url).status_code == 401
    assert len(up.seen) == asked
    assert text not in path.read_text()


def test_the_official_client_is_told_as_openai_tells_it(served):
    url, path, _, _ = served
    add_key(path, "team")
    with pytest.raises(openai.AuthenticationError) as raised:
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()
    assert raised.value.code == "invalid_api_key"


def test_a_keys_limits_hold(served):
    url, path, _, _ = served
    _, text = add_key(path, "slow", requests_per_minute=3)
    answers = [ask(url, text) for _ in range(5)]
    assert [a.status_code for a in answers] == [200, 200, 200, 429, 429]
    assert answers[-1].json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
    _, other = add_key(path, "other")
    assert ask(url, other).status_code == 200


def test_a_keys_budget_ends_and_what_was_spent_is_counted(served):
    url, path, _, exchanges = served
    # an answer of the strong model costs 100 tokens at $10 and 20 at $30 a million: 0.0016
    _, text = add_key(path, "poor", usd_per_day=0.004)
    answers = []
    for i in range(5):
        answers.append(ask(url, text, model="big"))
        wait_for(lambda n=i + 1: len(exchanges) == n)
    assert [a.status_code for a in answers] == [200, 200, 200, 429, 429]
    assert answers[-1].json()["error"]["code"] == "insufficient_quota"
    assert sum(e.usd or 0.0 for e in exchanges) == pytest.approx(0.0048)


@pytest.mark.parametrize(
    ("target", "route"),
    [
        ({"threshold": 0.0}, "strong"),
        ({"threshold": 1.0}, "weak"),
        ({"strong_fraction": 1.0}, "strong"),
        ({"strong_fraction": 0.0}, "weak"),
        ({"max_usd": 1.0}, "strong"),
        ({"max_usd": 0.0002}, "weak"),  # what weak costs: 100 tokens in, 100 out, at $1
    ],
)
def test_a_key_has_a_target_and_a_request_may_ask_for_another(served, target, route):
    url, path, _, _ = served
    _, text = add_key(path, "team", **target)
    assert ask(url, text).headers["x-routellm-route"] == route
    assert "by the key" in ask(url, text).headers["x-routellm-reason"]
    other = {"strong": 0.0, "weak": 1.0}[route]
    answer = ask(url, text, routing={"strong_fraction": other})
    assert answer.headers["x-routellm-route"] != route


def test_what_cannot_be_met_is_refused_where_it_was_asked_and_falls_back_where_it_was_set(served):
    url, path, _, _ = served
    asked = ask(url, routing={"quality": 0.8})
    assert asked.status_code == 400
    assert "carries no curve of quality" in asked.json()["error"]["message"]
    _, text = add_key(path, "team", quality=0.8)
    answer = ask(url, text)
    assert answer.status_code == 200
    assert answer.headers["x-routellm-reason"].startswith("fallback:")


def test_no_secret_is_in_any_log_error_or_answer(served, caplog):
    url, path, up, _ = served
    caplog.set_level(logging.DEBUG)
    _, text = add_key(path, "team")
    up.say(json_reply({"error": {"message": "no"}}, status=401), json_reply(CHAT))
    said = [
        ask(url, text), ask(url, text), ask(url, text, model="nobody"),
        ask(url, text, messages="not a list"), ask(url, "rlk_wrong"),
        httpx.get(f"{url}/metrics"), httpx.get(f"{url}/readyz"), httpx.get(f"{url}/openapi.json"),
    ]  # fmt: skip
    told = caplog.text + "".join(a.text + str(a.headers) for a in said)
    for secret in ("sk-strong", "sk-weak", text, text.rsplit("_", 1)[1], ASK[0]["content"]):
        assert secret not in told


def test_no_field_or_header_of_a_request_says_where_it_goes(served):
    url, _, up, _ = served
    inside = scripted.Upstream(json_reply(CHAT))
    with running(inside.app) as elsewhere:
        host = elsewhere.removeprefix("http://")
        body = {
            "model": "router", "api_base": elsewhere, "base_url": elsewhere, "api_key": "x",
            "proxy": elsewhere, "path": "/admin", "stream": False, "metadata": {"url": elsewhere},
            "messages": [{"role": "user", "content": [
                {"type": "text", "text": "look"},
                {"type": "image_url", "image_url": {"url": f"{elsewhere}/image.png"}},
            ]}],
        }  # fmt: skip
        headers = {"host": host, "x-forwarded-host": host, "x-original-url": elsewhere,
                   "proxy": elsewhere, "x-routellm-url": elsewhere}  # fmt: skip
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code == 200
        assert not inside.seen
    (seen,) = up.seen
    assert seen.path == "/v1/chat/completions"
    assert seen.headers["host"] != host


def test_metrics_can_be_closed_to_all_but_an_admin_key(tmp_path):
    away = "http://127.0.0.1:9"
    with gateway(tmp_path / "home", away, away, open_metrics=False) as url:
        assert httpx.get(f"{url}/metrics").status_code in (401, 403)
        _, text = add_key(tmp_path / "home" / "keys.json", "prometheus", admin=True)
        headers = {"authorization": f"Bearer {text}"}
        assert httpx.get(f"{url}/metrics", headers=headers).status_code == 200
        assert ask(url, text).status_code in (401, 403)  # it sends no queries
