"""What goes through the gateway comes out as it went in, in both directions."""

import contextlib
import json
import threading
import time

import httpx
import openai
import pytest

from routellm.gateway.app import create_app
from routellm.gateway.money import Money
from routellm.gateway.server import running
from routellm.settings import GatewaySettings, Price, Upstream
from tests.gateway.test_gateway import Versions, bundle, wait_for
from tests.support import upstream as scripted
from tests.support.upstream import CHAT, Reply, chat_chunk, events, json_reply, stream_reply

pytestmark = pytest.mark.slow
ASK = [{"role": "user", "content": "Why is the sky blue?"}]
BOTH = ("openai", "anthropic")


@contextlib.contextmanager
def gateway(home, strong, weak, *, speaks=BOTH, **more):
    ends = {
        "strong": Upstream(
            base_url=f"{strong}/v1", model="big", api_key="sk-strong", speaks=speaks
        ),
        "weak": Upstream(base_url=f"{weak}/v1", model="small", api_key="sk-weak", speaks=speaks),
    }
    with gateway_of(home, **ends, **more) as url:
        yield url


@contextlib.contextmanager
def gateway_of(home, *, source=None, seen=None, **settings):
    app = create_app(
        GatewaySettings(poll_s=0.1, **settings),
        source or Versions(v1=bundle(1)),
        home=home,
        money=Money(
            {"big": Price(input=10.0, output=30.0), "small": Price(input=1.0, output=1.0)},
            100.0,
            100.0,
        ),
        observers=[] if seen is None else [seen.append],
    )
    with running(app) as url:
        yield url


@pytest.fixture(scope="module")
def up():
    """One scripted upstream behind both models, and a gateway in front of it."""
    return scripted.Upstream(json_reply(CHAT))


@pytest.fixture(scope="module")
def exchanges():
    return []


@pytest.fixture(scope="module")
def url(up, exchanges, tmp_path_factory):
    with (
        running(up.app) as behind,
        gateway(tmp_path_factory.mktemp("gateway"), behind, behind, seen=exchanges) as at,
    ):
        yield at


@pytest.fixture(autouse=True)
def fresh(up, exchanges):
    up.say(json_reply(CHAT))
    up.seen.clear()
    exchanges.clear()


def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="the-callers-own", max_retries=0)


def told(exchanges):
    """Return the exchange of the one request; it is told a moment after its last byte."""
    wait_for(lambda: exchanges)
    (one,) = exchanges
    return one


# --- the request -------------------------------------------------------------------------------

RAW = (
    '{ "n":1,\t"model" : "router-random-0.0","temperature":0.10,"seed":12345678901234567890,\n'
    '"messages":[{"role":"user","content":[{"type":"text","text":"h\\u00e9 \\ud83d\\ude00 é"},'
    '{"type":"image_url","image_url":{"url":"data:image/png;base64,AAAA"}}]}],'
    '"vendor":{"x":1e3,"big":1.000000000000000000001},"routing":{"threshold":0.5},"stop":null}'
)


def test_every_byte_of_the_body_reaches_the_upstream_but_for_the_model(url, up):
    answer = httpx.post(f"{url}/v1/chat/completions", content=RAW.encode())
    assert answer.status_code == 200
    (seen,) = up.seen
    kept = seen.raw.decode()
    assert json.loads(kept)["model"] == "big"
    assert "routing" not in kept
    for part in ('"n":1', '"temperature":0.10', '"seed":12345678901234567890', '"stop":null',
                 '"text":"h\\u00e9 \\ud83d\\ude00 é"', '"big":1.000000000000000000001',
                 '"url":"data:image/png;base64,AAAA"', '"x":1e3'):  # fmt: skip
        assert part in kept


def test_headers_go_through_but_for_secrets_and_the_connections_own(url, up):
    headers = {
        "authorization": "Bearer the-callers-own", "x-api-key": "callers-too", "cookie": "a=b",
        "openai-beta": "assistants=v2", "traceparent": "00-abc", "x-request-id": "req-7",
        "x-routellm-strong-fraction": "1", "x-forwarded-for": "10.0.0.1",
    }  # fmt: skip
    answer = httpx.post(
        f"{url}/v1/chat/completions", json={"model": "router", "messages": ASK}, headers=headers
    )
    (seen,) = up.seen
    assert seen.headers["authorization"] == "Bearer sk-strong"
    assert seen.headers["x-api-key"] == "sk-strong"
    assert seen.headers["openai-beta"] == "assistants=v2"
    assert seen.headers["traceparent"] == "00-abc"
    assert not {"cookie", "x-forwarded-for", "x-routellm-strong-fraction"} & set(seen.headers)
    assert "callers" not in json.dumps(seen.headers)
    assert answer.headers["x-routellm-id"] == "req-7"


@pytest.mark.parametrize("how", ["user_turns", "last_user_turn", "first_user_turn"])
def test_the_conversation_is_scored_as_the_setting_says(up, tmp_path, how):
    turns = ["first question", "second question"]
    messages = [
        {"role": "system", "content": "never scored"},
        {"role": "user", "content": turns[0]},
        {"role": "assistant", "content": "an answer"},
        {"role": "user", "content": [{"type": "text", "text": turns[1]},
                                     {"type": "image_url", "image_url": {"url": "http://x/"}}]},
    ]  # fmt: skip
    scored = {"user_turns": "\n".join(turns), "last_user_turn": turns[1],
              "first_user_turn": turns[0]}[how]  # fmt: skip
    (want,) = bundle(1).router.win_rate([scored])
    with gateway(tmp_path, "http://127.0.0.1:9", "http://127.0.0.1:9", scored=how) as url:
        body = {"model": "router", "messages": messages}
        decided = httpx.post(f"{url}/v1/route", json=body).json()
    assert decided["win_rate"] == pytest.approx(want)


# --- the answer --------------------------------------------------------------------------------


def test_every_byte_of_an_answer_comes_back(url, up, exchanges):
    raw = b'{"id" : "x",\n "choices":[], "usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n'
    headers = {"content-type": "application/json", "openai-processing-ms": "5", "x-request-id": "u"}
    up.say(Reply([raw[:20], raw[20:]], headers=headers))
    answer = httpx.post(
        f"{url}/v1/chat/completions",
        json={"model": "router", "messages": ASK, "routing": {"threshold": 0.0}},
    )
    assert answer.content == raw
    assert answer.headers["openai-processing-ms"] == "5"
    assert answer.headers["x-request-id"] == "u"
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-routellm-saved-usd"] == "0.000000"
    one = told(exchanges)
    assert (one.usage.input_tokens, one.usage.output_tokens, one.usage.id) == (7, 3, "x")
    assert one.usd == pytest.approx((7 * 10.0 + 3 * 30.0) / 1e6)


def test_a_stream_comes_chunk_by_chunk_as_it_arrives(url, up, exchanges):
    usage = {**chat_chunk(), "choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}}
    parts = [chat_chunk(content=f"piece {i}") for i in range(4)]
    up.say(stream_reply(*parts, usage, pause_s=0.15))
    arrived, got = [], b""
    body = {"model": "router-random-1.0", "messages": ASK, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        for chunk in answer.iter_raw():
            arrived.append(time.monotonic())
            got += chunk
    assert got == b"".join(events(*parts, usage))
    assert len(arrived) >= 5
    assert arrived[-1] - arrived[0] > 0.4  # not held back until the end
    one = told(exchanges)
    assert one.streamed
    assert (one.usage.input_tokens, one.usage.output_tokens) == (9, 4)
    assert one.saved_usd == pytest.approx((9 * 9.0 + 4 * 29.0) / 1e6)


@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_leaves_ends_the_upstreams_work(url, up, exchanges, begun):
    pieces = [chat_chunk(content="x")] * 500
    up.say(stream_reply(*pieces, pause_s=0.05, wait_s=0.0 if begun else 30.0))
    body = {"model": "router", "messages": ASK, "stream": True}
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=1.0) as answer,
    ):
        next(answer.iter_raw())
    wait_for(lambda: up.seen and up.seen[0].cancelled, 5)
    assert told(exchanges).broken == "client_left"


def test_an_answer_that_breaks_off_is_not_passed_off_as_whole(url, up, exchanges):
    up.say(stream_reply(chat_chunk(content="half"), breaks_off=True))
    body = {"model": "router", "messages": ASK, "stream": True}
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.post(f"{url}/v1/chat/completions", json=body)
    assert told(exchanges).broken == "upstream_broke_off"


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_what_an_upstream_refuses_comes_back_as_it_said_it(url, up, status):
    error = {"error": {"message": "as scripted", "type": "t", "param": "p", "code": "c"}}
    up.say(json_reply(error, status=status))
    with pytest.raises(openai.APIStatusError) as raised:
        client(url).chat.completions.create(model="router", messages=ASK)
    assert raised.value.status_code == status
    assert raised.value.body == error["error"]
    assert len(up.seen) == 1


# --- the official client, endpoint by endpoint --------------------------------------------------

RESPONSE = {
    "id": "resp_1", "object": "response", "created_at": 1, "model": "m", "status": "completed",
    "output": [{"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
                "content": [{"type": "output_text", "text": "blue", "annotations": []}]}],
    "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
    "usage": {"input_tokens": 5, "output_tokens": 2, "total_tokens": 7,
              "input_tokens_details": {"cached_tokens": 0},
              "output_tokens_details": {"reasoning_tokens": 0}},
}  # fmt: skip


def test_chat_completions_with_tools(url, up):
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    doc = json.loads(json.dumps(CHAT))
    doc["choices"][0]["message"] = {"role": "assistant", "content": None, "tool_calls": [call]}
    up.say(json_reply(doc))
    said = client(url).chat.completions.create(
        model="router", messages=ASK, tools=[{"type": "function", "function": {"name": "f"}}],
        response_format={"type": "json_object"}, stream_options=None, seed=3,
        extra_body={"routing": {"strong_fraction": 0.0}, "vendor": 1},
    )  # fmt: skip
    assert said.choices[0].message.tool_calls[0].function.name == "f"
    assert said.vendor == {"kept": [1, None]}
    assert up.seen[0].body["model"] == "small"
    assert up.seen[0].body["vendor"] == 1


def test_responses_plain_and_streaming(url, up, exchanges):
    up.say(json_reply(RESPONSE))
    said = client(url).responses.create(model="router", input="Why is the sky blue?")
    assert said.output_text == "blue"
    assert up.seen[0].path == "/v1/responses"
    one = told(exchanges)
    assert (one.usage.input_tokens, one.usage.output_tokens) == (5, 2)
    begun = {"type": "response.created", "sequence_number": 0, "response": RESPONSE}
    piece = {"type": "response.output_text.delta", "sequence_number": 1, "item_id": "msg_1",
             "output_index": 0, "content_index": 0, "delta": "blue", "logprobs": []}  # fmt: skip
    ended = {"type": "response.completed", "sequence_number": 2, "response": RESPONSE}
    up.say(stream_reply(begun, piece, ended))
    got = list(client(url).responses.create(model="router", input="x", stream=True))
    assert [event.type for event in got][1] == "response.output_text.delta"


def test_a_response_goes_on_with_whoever_gave_the_one_before(url, up):
    for route, model in (("0.0", "big"), ("1.0", "small")):
        up.say(json_reply({**RESPONSE, "id": f"resp_{model}"}))
        body = {"model": f"router-random-{route}", "input": "begin"}
        httpx.post(f"{url}/v1/responses", json=body)
    up.say(json_reply({**RESPONSE, "id": "resp_next"}))
    for model in ("small", "big", "small"):
        body = {"model": "router", "input": "go on", "previous_response_id": f"resp_{model}"}
        answer = httpx.post(f"{url}/v1/responses", json=body)
        assert answer.headers["x-routellm-model"] == up.seen[-1].body["model"] == model
    body = {"model": "router", "input": "go on", "previous_response_id": "resp_elsewhere"}
    answer = httpx.post(f"{url}/v1/responses", json=body)
    assert "not known here" in answer.headers["x-routellm-reason"]


def test_completions_and_embeddings(url, up):
    up.say(json_reply({"id": "c", "object": "text_completion", "created": 1, "model": "m",
                       "choices": [{"index": 0, "text": "blue", "finish_reason": "stop",
                                    "logprobs": None}]}))  # fmt: skip
    said = client(url).completions.create(model="router", prompt="The sky is")
    assert said.choices[0].text == "blue"
    vector = {"object": "list", "model": "e", "usage": {"prompt_tokens": 1, "total_tokens": 1},
              "data": [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}]}  # fmt: skip
    up.say(json_reply(vector))
    made = client(url).embeddings.create(model="text-embedding-3-small", input="x")
    assert made.data[0].embedding == [0.5, 0.25]
    assert up.seen[-1].body["model"] == "text-embedding-3-small"
    assert up.seen[-1].headers["authorization"] == "Bearer sk-weak"
    with pytest.raises(openai.NotFoundError, match="not routed"):
        client(url).embeddings.create(model="router", input="x")


def test_embeddings_have_an_endpoint_of_their_own_if_it_is_set(up, tmp_path):
    up.say(json_reply({"data": []}))
    with running(up.app) as behind:
        own = Upstream(base_url=f"{behind}/other/v1", model="vectors", api_key="sk-vectors")
        with gateway(tmp_path, behind, behind, embeddings=own) as url:
            httpx.post(f"{url}/v1/embeddings", json={"model": "router", "input": "x"})
    (seen,) = up.seen
    assert seen.path == "/other/v1/embeddings"
    assert seen.body["model"] == "vectors"
    assert seen.headers["authorization"] == "Bearer sk-vectors"


def test_anthropics_messages_in_its_own_shapes(url, up, exchanges):
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m",
               "content": [{"type": "text", "text": "blue"}], "stop_reason": "end_turn",
               "usage": {"input_tokens": 11, "output_tokens": 5}}  # fmt: skip
    up.say(json_reply(message))
    turn = {"role": "user", "content": [{"type": "text", "text": "sky?"}]}
    body = {"model": "router", "max_tokens": 100, "system": "be brief", "messages": [turn]}
    headers = {"x-api-key": "callers", "anthropic-version": "2023-06-01"}
    answer = httpx.post(f"{url}/v1/messages", json=body, headers=headers)
    assert answer.json() == message
    assert up.seen[0].headers["anthropic-version"] == "2023-06-01"
    assert up.seen[0].headers["x-api-key"] in ("sk-strong", "sk-weak")
    assert told(exchanges).usage.input_tokens == 11
    refused = httpx.post(f"{url}/v1/messages", json={"model": "nobody", "messages": ASK})
    assert refused.status_code == 404
    assert refused.json()["type"] == "error"
    assert "unknown model" in refused.json()["error"]["message"]


def test_an_upstream_that_does_not_speak_anthropics_protocol_is_said(up, tmp_path):
    with gateway(tmp_path, "http://127.0.0.1:9", "http://127.0.0.1:9", speaks=("openai",)) as url:
        answer = httpx.post(f"{url}/v1/messages", json={"model": "router", "messages": ASK})
    assert answer.status_code == 404
    assert "does not speak Anthropic's protocol" in answer.json()["error"]["message"]


def test_models_can_be_looked_up(url):
    assert client(url).models.retrieve("router").id == "router"
    with pytest.raises(openai.NotFoundError):
        client(url).models.retrieve("org/nobody")


def test_many_at_once_are_all_answered_and_the_gateway_says_when_it_is_full(up, tmp_path):
    up.say(json_reply(CHAT, wait_s=0.5))
    with running(up.app) as behind, gateway(tmp_path, behind, behind, max_concurrent=3) as url:
        answers = []

        def ask():
            body = {"model": "router", "messages": ASK}
            answers.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=20))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        statuses = sorted(a.status_code for a in answers)
        assert statuses.count(200) >= 3
        refused = [a for a in answers if a.status_code == 429]
        assert refused
        assert all(a.headers["retry-after"] == "1" for a in refused)
        assert set(statuses) == {200, 429}
        assert httpx.post(f"{url}/v1/chat/completions",
                          json={"model": "router", "messages": ASK}).status_code == 200  # fmt: skip
