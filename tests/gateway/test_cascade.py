"""Policies that may ask twice: weak answers, its answer is looked at, strong is asked or not."""

import contextlib
import json
import re
import threading
import time
import tomllib
from dataclasses import dataclass, field

import httpx
import numpy as np
import openai
import pytest

from routellm.errors import UsageError
from routellm.gateway import cascade
from routellm.gateway.app import create_app
from routellm.gateway.key_file import add_key
from routellm.gateway.server import running
from routellm.policies.encoder_score import EncoderScore
from routellm.settings import AutoMixSettings, CascadeSettings, GatewaySettings, ScorerSettings
from routellm.settings import Upstream as UpstreamSettings
from tests.conftest import REPOSITORY
from tests.gateway.test_faithful import ASK, gateway
from tests.gateway.test_gateway import Versions, bundle, wait_for
from tests.support import upstream as scripted
from tests.support.tiny_bert import WORDS, save_tiny_bert
from tests.support.upstream import CHAT, json_reply

pytestmark = pytest.mark.slow
# what 100 tokens read and 20 written cost at the prices of test_faithful
WEAK_USD, STRONG_USD = 120e-6, 1600e-6


def said(text, **more):
    message = {"role": "assistant", "content": text}
    choice = {**CHAT["choices"][0], "message": message, **more}
    return json_reply({**CHAT, "choices": [choice]})


GOOD, BAD, BEST = said("tiger tiger"), said("river river"), said("of the strong one")
YES, NO = said("Checked.\nVerdict: correct"), said("Checked.\nVerdict: incorrect")


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    """A scorer that was trained on answers that are right where they say `tiger`."""
    folder = tmp_path_factory.mktemp("scorer")
    settings = ScorerSettings(
        model=str(save_tiny_bert(folder / "bert")), max_length=32, learning_rate=5e-3, epochs=4
    )
    rng = np.random.default_rng(0)
    right = rng.random(400) < 0.5
    texts = [(str(rng.choice(WORDS)), "tiger tiger" if r else "river river") for r in right]
    score = EncoderScore("the scorer", settings)
    score.fit(texts, right[:, None].astype(float), np.arange(400))
    score.save(folder / "saved")
    return folder / "saved"


@dataclass
class Served:
    url: str
    strong: scripted.Upstream
    weak: scripted.Upstream
    seen: list = field(default_factory=list)

    def ask(self, policy="cascade", headers=None, path="chat/completions", **body):
        routing = {"policy": policy, **body.pop("routing", {})}
        doc = {"model": "router", "messages": ASK, "routing": routing, **body}
        return httpx.post(f"{self.url}/v1/{path}", json=doc, headers=headers, timeout=30)

    def exchange(self):
        wait_for(lambda: self.seen)
        (one,) = self.seen
        return one


@contextlib.contextmanager
def served(home, scorer=None, *, samples=0, timeout_s=30.0, **settings):
    one = Served("", scripted.Upstream(BEST), scripted.Upstream(GOOD))
    policies = {
        "cascade": CascadeSettings(scorer=scorer, timeout_s=timeout_s),
        "automix": AutoMixSettings(samples=samples, timeout_s=timeout_s),
    }
    with (
        running(one.strong.app) as strong,
        running(one.weak.app) as weak,
        gateway(home, strong, weak, seen=one.seen, **policies, **settings) as one.url,
    ):
        yield one


@pytest.fixture(scope="module")
def _both(tmp_path_factory, scorer):
    with served(tmp_path_factory.mktemp("gateway"), scorer, samples=4) as one:
        yield one


@pytest.fixture
def both(_both):
    _both.strong.say(BEST)
    _both.weak.say(GOOD)
    for kept in (_both.strong.seen, _both.weak.seen, _both.seen):
        kept.clear()
    return _both


# --- a scorer looks ----------------------------------------------------------------------------


def test_an_answer_that_is_good_enough_comes_back_byte_for_byte(both):
    answer = both.ask()
    assert answer.content == GOOD.chunks[0]
    head = answer.headers
    assert (head["x-routellm-policy"], head["x-routellm-route"]) == ("cascade", "weak")
    assert float(head["x-routellm-confidence"]) >= float(head["x-routellm-threshold"]) == 0.5
    assert head["x-routellm-calls"] == "1"
    assert (len(both.weak.seen), len(both.strong.seen)) == (1, 0)
    one = both.exchange()
    assert (one.route, one.also) == ("weak", [])
    assert one.usd == pytest.approx(WEAK_USD)
    assert one.saved_usd == pytest.approx(STRONG_USD - WEAK_USD)


def test_for_one_that_is_not_strong_is_asked_and_both_are_paid_for(both):
    both.weak.say(BAD)
    answer = both.ask(seed=7)
    assert answer.content == BEST.chunks[0]
    head = answer.headers
    assert (head["x-routellm-model"], head["x-routellm-calls"]) == ("big", "2")
    assert float(head["x-routellm-confidence"]) < 0.5
    asked = [both.weak.seen[0].body, both.strong.seen[0].body]
    assert [one.pop("model") for one in asked] == ["small", "big"]
    assert asked == [{"messages": ASK, "seed": 7}] * 2
    one = both.exchange()
    assert [(call.route, call.usd) for call in one.also] == [("weak", pytest.approx(WEAK_USD))]
    assert one.usd == pytest.approx(WEAK_USD + STRONG_USD)
    assert one.saved_usd == pytest.approx(-WEAK_USD)


def test_dollars_tokens_and_answers_are_counted_by_who_gave_them(both):
    def counted():
        lines = httpx.get(f"{both.url}/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def more(name):
        return after.get(name, 0.0) - before.get(name, 0.0)

    before = counted()
    both.weak.say(BAD)
    both.ask()
    both.exchange()
    after = counted()
    assert more('routellm_spent_usd_total{route="weak"}') == pytest.approx(WEAK_USD)
    assert more('routellm_spent_usd_total{route="strong"}') == pytest.approx(STRONG_USD)
    assert more('routellm_tokens_total{direction="input",route="weak"}') == 100
    assert more('routellm_tokens_total{direction="input",route="strong"}') == 100
    assert more('routellm_policy_answers_total{policy="cascade",route="strong"}') == 1
    assert more('routellm_requests_total{route="strong",status="200"}') == 1


@pytest.mark.parametrize(("threshold", "route"), [(0.0, "weak"), (1.0, "strong")])
def test_a_request_may_bring_its_own_threshold(both, threshold, route):
    head = both.ask(routing={"threshold": threshold}).headers
    assert head["x-routellm-route"] == route
    assert float(head["x-routellm-threshold"]) == threshold


def test_the_official_client_asks_for_it_by_header(both):
    client = openai.OpenAI(base_url=f"{both.url}/v1", api_key="any", max_retries=0)
    raw = client.chat.completions.with_raw_response.create(
        model="router", messages=ASK, extra_headers={"x-routellm-policy": "cascade"}
    )
    assert raw.parse().choices[0].message.content == "tiger tiger"
    assert raw.headers["x-routellm-policy"] == "cascade"
    assert "x-routellm-policy" not in both.weak.seen[0].headers


def test_the_decision_alone_says_who_is_asked_first(both):
    found = both.ask(path="route").json()
    assert (found["route"], found["model"]) == ("weak", "small")
    assert "cascade" in found["reason"]
    assert not both.weak.seen


def test_requests_that_ask_for_none_are_routed_as_ever(both):
    answer = httpx.post(
        f"{both.url}/v1/chat/completions", json={"model": "router", "messages": ASK}
    )
    assert answer.headers["x-routellm-version"] == "1"
    assert "x-routellm-policy" not in answer.headers
    assert "x-routellm-calls" not in answer.headers


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        ({"stream": True}, "cannot be streamed"),
        ({"n": 2}, "leave `n` out"),
        ({"policy": "guess"}, "no policy 'guess' here: there is cascade, automix"),
        ({"routing": {"strong_fraction": 0.3}}, "a threshold of confidence"),
        ({"routing": {"threshold": 2}}, "not a number in [0, 1]"),
        ({"model": "router-random-0.5"}, "goes with the model `router`"),
        ({"path": "completions", "prompt": "x"}, "only chat completions"),
        ({"policy": 7}, "must be a policy's name"),
    ],
)  # fmt: skip
def test_a_request_that_cannot_have_it_is_one_sentence_and_costs_nothing(both, ask, told):
    answer = both.ask(**ask)
    assert answer.status_code == 400
    assert told in answer.json()["error"]["message"]
    assert not both.weak.seen
    assert not both.strong.seen


def test_a_policy_that_is_not_set_is_refused(tmp_path):
    with served(tmp_path) as one:
        answer = one.ask()
    assert answer.status_code == 400
    assert "none (settings gateway.pool, gateway.cascade and gateway.automix)" in answer.text


def test_an_answer_without_text_cannot_be_looked_at(both):
    both.weak.say(said(None, finish_reason="tool_calls"))
    head = both.ask().headers
    assert (head["x-routellm-route"], head["x-routellm-calls"]) == ("strong", "2")
    assert "no text" in head["x-routellm-reason"]
    assert "x-routellm-confidence" not in head


# --- what fails --------------------------------------------------------------------------------

FAILS = json_reply({"error": {"message": "broken"}}, status=500)


def test_where_strong_fails_weaks_answer_stands_in(both):
    both.weak.say(BAD)
    both.strong.say(FAILS)
    answer = both.ask()
    assert answer.content == BAD.chunks[0]
    assert answer.headers["x-routellm-stood-in"] == "strong failed: upstream_500"
    assert answer.headers["x-routellm-answered-by"] == "small"
    one = both.exchange()
    assert (one.route, one.also, one.usd) == ("weak", [], pytest.approx(WEAK_USD))


def test_where_nobody_may_stand_in_strongs_error_comes_back_and_weak_is_paid_for(tmp_path, scorer):
    with served(tmp_path, scorer, stand_in=False) as one:
        one.weak.say(BAD)
        one.strong.say(FAILS)
        answer = one.ask()
        assert (answer.status_code, answer.content) == (500, FAILS.chunks[0])
        assert answer.headers["x-routellm-route"] == "strong"
        found = one.exchange()
    assert (found.route, found.usd) == ("strong", pytest.approx(WEAK_USD))


def test_where_weak_fails_strong_answers(both):
    both.weak.say(FAILS)
    answer = both.ask()
    assert answer.content == BEST.chunks[0]
    assert answer.headers["x-routellm-stood-in"] == "weak failed: upstream_500"


def test_where_weaks_answer_breaks_off_or_is_too_long_strong_is_asked(both, monkeypatch):
    half = GOOD.chunks[0][:40]
    headers = {"content-type": "application/json", "content-length": str(len(GOOD.chunks[0]))}
    both.weak.say(scripted.Reply([half], headers=headers, breaks_off=True))
    answer = both.ask()
    assert answer.content == BEST.chunks[0]
    assert "no text to look at" in answer.headers["x-routellm-reason"]
    monkeypatch.setattr(cascade, "_MOST_BYTES", 50)
    both.weak.say(GOOD)
    assert both.ask().content == BEST.chunks[0]
    both.strong.say(FAILS)  # half an answer never stands in
    assert both.ask().status_code == 500


def test_what_weak_refuses_is_the_callers_to_hear(both):
    refused = json_reply({"error": {"message": "no such tool"}}, status=422)
    both.weak.say(refused)
    answer = both.ask()
    assert (answer.status_code, answer.content) == (422, refused.chunks[0])
    assert not both.strong.seen


@pytest.mark.parametrize("fallback", ["strong", "weak"])
def test_a_look_that_takes_too_long_costs_the_choice_alone(tmp_path, scorer, fallback, monkeypatch):
    monkeypatch.setattr(EncoderScore, "score", EncoderScore.score)  # put back at the end
    with served(tmp_path, scorer, timeout_s=0.2, fallback=fallback) as one:
        monkeypatch.setattr(EncoderScore, "score", lambda *_: time.sleep(1.0))
        head = one.ask().headers
        assert head["x-routellm-route"] == fallback
        assert "fallback: the policy cascade failed (TimeoutError)" in head["x-routellm-reason"]
        assert "routellm_fallbacks_total 1.0" in httpx.get(f"{one.url}/metrics").text


def test_a_client_that_leaves_while_strong_answers_is_counted_with_what_was_paid(both):
    both.weak.say(BAD)
    both.strong.say(scripted.Reply(BEST.chunks, wait_s=20))
    with contextlib.suppress(httpx.ReadTimeout):
        doc = {"model": "router", "messages": ASK, "routing": {"policy": "cascade"}}
        httpx.post(f"{both.url}/v1/chat/completions", json=doc, timeout=1.5)
    one = both.exchange()
    assert (one.broken, one.usd) == ("client_left", pytest.approx(WEAK_USD))
    wait_for(lambda: both.strong.seen[0].cancelled)


def test_a_key_pays_for_both_calls(tmp_path, scorer):
    with served(tmp_path, scorer) as one:
        _, key = add_key(tmp_path / "keys.json", "team", usd_per_month=WEAK_USD + STRONG_USD - 1e-6)
        one.weak.say(BAD)
        headers = {"authorization": f"Bearer {key}"}
        assert one.ask(headers=headers).status_code == 200
        wait_for(lambda: one.seen)
        assert one.ask(headers=headers).status_code == 429


def test_a_scorer_that_is_damaged_stops_the_start_in_a_sentence(tmp_path, scorer):
    upstream = {"base_url": "http://127.0.0.1:9/v1"}

    def start(folder):
        settings = GatewaySettings(
            strong=UpstreamSettings(model="big", **upstream),
            weak=UpstreamSettings(model="small", **upstream),
            cascade=CascadeSettings(scorer=folder),
        )
        create_app(settings, Versions(v1=bundle(1)), home=tmp_path)

    with pytest.raises(UsageError, match=r"gateway\.cascade\.scorer: no whole scorer in"):
        start(tmp_path / "nowhere")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in scorer.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    doc = json.loads((copy / "scorer.json").read_text())
    (copy / "scorer.json").write_text(json.dumps({**doc, "outputs": 2}))
    with pytest.raises(UsageError, match=r"scorer\.json is not what was saved"):
        start(copy)


# --- the weak model looks itself ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("votes", "confidence", "route"),
    [([YES, YES, NO, NO], 0.5, "weak"), ([YES, NO, NO, NO], 0.25, "strong"),
     ([YES, said("I cannot say."), said("Verdict: incorrect", finish_reason="length"), FAILS],
      1.0, "weak")],
)  # fmt: skip
def test_the_weak_model_votes_on_its_own_answer(both, votes, confidence, route):
    both.weak.say(said("river river"), *votes)
    answer = both.ask("automix")
    head = answer.headers
    assert float(head["x-routellm-confidence"]) == confidence
    assert head["x-routellm-route"] == route
    read = sum(vote is not FAILS for vote in votes)
    assert int(head["x-routellm-calls"]) == 1 + read + (route == "strong")
    checks = [seen.body for seen in both.weak.seen[1:]]
    assert len(checks) == 4
    for check in checks:
        assert check["model"] == "small"
        assert "river river" in check["messages"][1]["content"]
    one = both.exchange()
    calls = [WEAK_USD] * read + ([WEAK_USD, STRONG_USD] if route == "strong" else [WEAK_USD])
    assert one.usd == pytest.approx(sum(calls))


def test_votes_that_nobody_can_read_leave_it_to_the_fallback(both):
    both.weak.say(GOOD, said("Well."))
    head = both.ask("automix").headers
    assert head["x-routellm-route"] == "strong"
    assert head["x-routellm-reason"].startswith("fallback: the policy automix failed")


def test_many_at_once_each_get_their_own(both):
    both.weak.say(GOOD)
    answers = []

    def ask(i):
        answers.append(both.ask(routing={"threshold": i % 2}, headers={"x-request-id": f"r{i}"}))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 24
    for answer in answers:
        strong = int(answer.headers["x-routellm-id"][1:]) % 2
        assert answer.headers["x-routellm-route"] == ("strong" if strong else "weak")
        assert answer.content == (BEST if strong else GOOD).chunks[0]


# --- docs/gateway.md, "Asking twice", as written -----------------------------------------------


def test_the_pages_settings_and_client_work(tmp_path, scorer, capfd):
    page = (REPOSITORY / "docs" / "gateway.md").read_text()
    section = page.split("## Asking twice\n")[1].split("\n## ")[0]
    (settings,) = re.findall(r"```toml\n(.*?)```", section, re.DOTALL)
    (client,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    given = tomllib.loads(settings)["gateway"]
    given["cascade"]["scorer"] = scorer
    policies = {"cascade": CascadeSettings(**given["cascade"]),
                "automix": AutoMixSettings(**given["automix"])}  # fmt: skip
    up = scripted.Upstream(GOOD)
    with running(up.app) as behind, gateway(tmp_path, behind, behind, **policies) as url:
        exec(compile(client.replace("http://127.0.0.1:6060", url), "docs/gateway.md", "exec"), {})
        assert re.fullmatch(r"weak 0\.\d{4}\n", capfd.readouterr().out)
        raw = httpx.post(
            f"{url}/v1/chat/completions",
            json={"model": "router", "messages": ASK, "routing": {"policy": "automix"}},
        )
        assert raw.headers["x-routellm-policy"] == "automix"
