"""Feedback through the gateway: recorded, taken, and never at a request's cost."""

from contextlib import contextmanager

import httpx
import pytest

from routellm.augmentation.judge import Judge
from routellm.feedback.store import FeedbackStore
from routellm.feedback.writer import Writer
from routellm.gateway.app import create_app
from routellm.gateway.feedback import FeedbackParts
from routellm.gateway.key_file import add_key
from routellm.gateway.server import running
from routellm.settings import FeedbackSettings, GatewaySettings, JudgeSettings, Upstream
from tests.gateway.test_gateway import Versions, bundle, wait_for
from tests.support import upstream as scripted
from tests.support.upstream import CHAT, chat_chunk, json_reply, stream_reply

pytestmark = pytest.mark.slow
ASK = [{"role": "user", "content": "Why is the sky blue?"}]


@contextmanager
def gateway(home, up, *, judge=None, **how):
    url = f"sqlite:///{home / 'feedback.db'}"
    settings = FeedbackSettings(enabled=True, store_prompts=True, **how)
    home.mkdir(exist_ok=True)
    writer = Writer(FeedbackStore(url), flush_s=0.05, redact=str.upper)
    options = GatewaySettings(
        strong=Upstream(base_url=f"{up}/v1", model="big"),
        weak=Upstream(base_url=f"{up}/v1", model="small"),
    )
    parts = FeedbackParts(settings, writer, judge, "the judge")
    app = create_app(options, Versions(v1=bundle(1)), home=home, feedback=parts)
    with running(app) as at:
        yield at, home


@pytest.fixture
def up():
    one = scripted.Upstream(json_reply(CHAT))
    with running(one.app) as one.url:
        yield one


@pytest.fixture
def served(up, tmp_path):
    with gateway(tmp_path / "home", up.url) as both:
        yield both


def ask(url, key=None, **body):
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    doc = {"model": "router-random-1.0", "messages": ASK, "user": "ada", **body}
    return httpx.post(f"{url}/v1/chat/completions", json=doc, headers=headers)


def judge(url, key=None, **said):
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return httpx.post(f"{url}/v1/feedback", json=said, headers=headers)


def decisions(home):
    store = FeedbackStore(f"sqlite:///{home / 'feedback.db'}")
    store.open()
    return store.count()["decisions"]


def outcomes(home):
    store = FeedbackStore(f"sqlite:///{home / 'feedback.db'}")
    store.open()
    return list(store.outcomes())


@pytest.mark.parametrize(
    "said",
    [{"thumbs": "down"}, {"rating": 2}, {"other_was_better": True}, {"vote": "strong"}],
)
def test_an_answer_is_judged_by_its_own_id_or_the_gateways(served, said):
    url, home = served
    answer = ask(url)
    for quoted in (answer.json()["id"], answer.headers["x-routellm-id"]):
        taken = judge(url, id=quoted, **said)
        assert taken.status_code == 200, taken.text
    wait_for(lambda: len(outcomes(home)) == 2)
    for one in outcomes(home):
        assert (one.kind, one.route) == (next(iter(said)), "weak")
        assert (one.model, one.other_model) == ("w", "s")  # as the router's battles name them
        assert one.prompt == ASK[0]["content"].upper()  # what the redaction made of it
    assert 'routellm_judgements_total{kind="' in httpx.get(f"{url}/metrics").text


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ({}, 400),
        ({"id": "x"}, 400),
        ({"id": 7, "thumbs": "up"}, 400),
        ({"id": "chatcmpl-1", "thumbs": "sideways"}, 400),
        ({"id": "chatcmpl-1", "thumbs": "up", "rating": 3}, 400),
        ({"id": "chatcmpl-1", "rating": 9}, 400),
        ({"id": "chatcmpl-1", "judge": "strong"}, 400),  # that is for the judge to say
        ({"id": "nobody", "thumbs": "up"}, 404),
    ],
)
def test_what_is_no_judgement_is_refused(served, said, status):
    url, home = served
    ask(url)
    answer = judge(url, **said)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert outcomes(home) == []


def test_nobody_judges_anothers_answers(served):
    url, home = served
    _, one = add_key(home / "keys.json", "one")
    _, two = add_key(home / "keys.json", "two")
    quoted = ask(url, one).headers["x-routellm-id"]
    assert judge(url, two, id=quoted, thumbs="up").status_code == 404
    assert judge(url, id=quoted, thumbs="up").status_code == 401
    assert judge(url, one, id=quoted, thumbs="up").status_code == 200


def test_a_failed_or_broken_answer_is_no_decision_to_judge(served, up):
    url, _ = served
    up.say(json_reply({"error": {"message": "no"}}, status=400))
    failed = ask(url)
    assert judge(url, id=failed.headers["x-routellm-id"], thumbs="down").status_code == 404


def test_a_store_that_goes_away_costs_no_answer(up, tmp_path):
    home = tmp_path / "home"
    with gateway(home, up.url) as (url, _):
        ask(url)
        wait_for(lambda: decisions(home))
        (home / "feedback.db").rename(home / "away.db")
        (home / "feedback.db").mkdir()
        assert {ask(url).status_code for _ in range(5)} == {200}


def test_without_feedback_there_is_no_address_for_it(up, tmp_path):
    options = GatewaySettings(
        strong=Upstream(base_url=f"{up.url}/v1", model="big"),
        weak=Upstream(base_url=f"{up.url}/v1", model="small"),
    )
    with running(create_app(options, Versions(v1=bundle(1)), home=tmp_path)) as url:
        assert judge(url, id="x", thumbs="up").status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_in_a_duel_both_models_answer_and_a_judge_compares_them(up, tmp_path, stream):
    """The judge is a scripted model that says in both orders that the same answer is better."""

    class Better(scripted.Upstream):
        async def _answer(self, request):
            seen = (await request.body()).decode()
            first = seen.index("strong says") < seen.index("weak says")
            said = f"one is better\n[[{'A' if first else 'B'}]]"
            self.say(json_reply({**CHAT, "choices": [{"message": {"content": said}}]}))
            return await super()._answer(request)

    class Both(scripted.Upstream):
        async def _answer(self, request):
            route = "strong" if b'"big"' in await request.body() else "weak"
            if b'"stream":true' in (await request.body()).replace(b" ", b""):
                self.say(stream_reply(*[chat_chunk(content=w) for w in (route, " ", "says")]))
            else:
                message = {"role": "assistant", "content": f"{route} says"}
                self.say(json_reply({**CHAT, "choices": [{"index": 0, "message": message}]}))
            return await super()._answer(request)

    both, better, home = Both(), Better(), tmp_path / "home"
    with running(both.app) as models, running(better.app) as judges:
        settings = JudgeSettings(base_url=f"{judges}/v1", model="the judge")
        home.mkdir()
        with gateway(
            home, models, judge=Judge(settings, home / "verdicts.db"), duel_fraction=1.0
        ) as (url, _):
            assert ask(url, stream=stream).status_code == 200
            wait_for(lambda: len(outcomes(home)) == 1, 20)
            (one,) = outcomes(home)
    assert (one.kind, one.value, one.route, one.by) == ("duel", "strong", "weak", "the judge")
    assert sorted(s.body["model"] for s in both.seen) == ["big", "small"]
    assert len(better.seen) == 2  # both orders
