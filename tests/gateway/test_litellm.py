"""An upstream that is asked through LiteLLM behaves like any other."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import time

import httpx
import openai
import pytest

from routellm.errors import GatewayError, UsageError
from routellm.gateway.litellm import LiteLLMTransport
from routellm.gateway.litellm_errors import failed, transport_error
from routellm.gateway.server import running
from routellm.settings import Upstream
from tests.conftest import REPOSITORY
from tests.gateway.test_faithful import ASK, RESPONSE, client, gateway_of, told
from tests.gateway.test_gateway import wait_for
from tests.support import upstream as scripted
from tests.support.litellm import needs_litellm
from tests.support.upstream import CHAT, Reply, chat_chunk, json_reply, stream_reply

needs_litellm()
pytestmark = pytest.mark.slow

ENDED = {**chat_chunk(), "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
BIG, SMALL = "openai/gpt-4o", "openai/small"
CLAUDE = "anthropic/claude-sonnet-4-5"


@contextlib.contextmanager
def gateway(home, strong, weak, *, big=BIG, small=SMALL, seen=None, **settings):
    ends = {
        "strong": Upstream(via="litellm", base_url=strong, model=big, api_key="sk-planted-strong"),
        "weak": Upstream(via="litellm", base_url=weak, model=small, api_key="sk-planted-weak"),
    }
    with gateway_of(home, seen=seen, retry_wait_s=0.01, **ends, **settings) as url:
        yield url


@pytest.fixture(scope="module")
def up():
    return scripted.Upstream(json_reply(CHAT))


@pytest.fixture(scope="module")
def exchanges():
    return []


@pytest.fixture(scope="module")
def behind(up):
    with running(up.app) as at:
        yield at


@pytest.fixture(scope="module")
def url(behind, exchanges, tmp_path_factory):
    home = tmp_path_factory.mktemp("gateway")
    with gateway(home, f"{behind}/v1", f"{behind}/v1", seen=exchanges) as at:
        yield at


@pytest.fixture(autouse=True)
def fresh(up, exchanges):
    up.say(json_reply(CHAT))
    up.seen.clear()
    exchanges.clear()


def chat(url, model="router-random-0.0", **more):
    body = {"model": model, "messages": ASK, **more}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)


# --- requests and answers ----------------------------------------------------------------------


def test_a_chat_is_answered_with_its_token_counts(url, up, exchanges):
    said = client(url).chat.completions.create(model="router-random-0.0", messages=ASK)
    assert said.choices[0].message.content == "forty-two"
    assert said.vendor == {"kept": [1, None]}
    (seen,) = up.seen
    assert (seen.path, seen.body["model"]) == ("/v1/chat/completions", "gpt-4o")
    assert seen.headers["authorization"] == "Bearer sk-planted-strong"
    assert "the-callers-own" not in str(seen.headers)
    one = told(exchanges)
    assert (one.usage.input_tokens, one.usage.output_tokens) == (100, 20)
    assert one.model == BIG


def test_fields_that_litellm_does_not_know_reach_the_upstream(url, up):
    fields = {"seed": 7, "temperature": 0.1, "metadata": {"a": "b"}, "vendor": {"x": [1, None]}}
    assert chat(url, **fields).status_code == 200
    assert {name: up.seen[0].body[name] for name in fields} == fields


def test_a_request_cannot_set_litellms_own_options(url, up):
    options = {
        "api_base": "http://127.0.0.1:9", "base_url": "http://127.0.0.1:9", "api_key": "theirs",
        "custom_llm_provider": "ollama", "mock_response": "made up", "fallbacks": ["gpt-3.5"],
        "num_retries": 5, "extra_headers": {"x-made-up": "1"}, "model_list": [],
        "success_callback": ["langfuse"], "callbacks": ["langfuse"],
    }  # fmt: skip
    answer = chat(url, **options)
    assert answer.json()["choices"][0]["message"]["content"] == "forty-two"
    (seen,) = up.seen
    assert seen.headers["authorization"] == "Bearer sk-planted-strong"
    assert "x-made-up" not in seen.headers


def test_only_the_models_of_the_settings_are_answered_for(url, up):
    body = {"model": "huggingface/somebody-elses", "input": "x"}
    answer = httpx.post(f"{url}/v1/embeddings", json=body)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert not up.seen


def test_an_image_on_a_private_address_is_not_fetched(behind, up, tmp_path):
    image = {"type": "image_url", "image_url": {"url": f"{behind}/secret.png"}}
    messages = [{"role": "user", "content": [image]}]
    with gateway(tmp_path, behind, behind, big=CLAUDE) as url:
        answer = chat(url, messages=messages)
    assert answer.status_code == 400
    assert not up.seen


def test_a_provider_with_a_protocol_of_its_own_answers_in_openais(behind, up, tmp_path):
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m",
               "content": [{"type": "text", "text": "blue"}], "stop_reason": "end_turn",
               "usage": {"input_tokens": 11, "output_tokens": 5}}  # fmt: skip
    with gateway(tmp_path, behind, behind, big=CLAUDE) as url:
        up.say(json_reply(message))
        said = client(url).chat.completions.create(model="router-random-0.0", messages=ASK)
        assert said.choices[0].message.content == "blue"
        assert said.usage.prompt_tokens == 11
        assert up.seen[0].path == "/v1/messages"
        assert up.seen[0].headers["x-api-key"] == "sk-planted-strong"
        up.say(
            json_reply({"type": "error", "error": {"type": "overloaded_error", "message": "busy"}},
                       status=529),
        )  # fmt: skip
        answer = chat(url, model=CLAUDE)
        assert answer.status_code == 529
        assert answer.json()["error"] | {"param": None, "code": None} == answer.json()["error"]
        assert answer.json()["error"]["message"] == "busy"
        assert chat(url, logit_bias={"1": 2}).status_code == 400


def test_completions_and_responses(url, up, exchanges):
    up.say(json_reply({"id": "c", "object": "text_completion", "created": 1, "model": "m",
                       "choices": [{"index": 0, "text": "blue", "finish_reason": "stop",
                                    "logprobs": None}],
                       "usage": {"prompt_tokens": 1, "completion_tokens": 2,
                                 "total_tokens": 3}}))  # fmt: skip
    said = client(url).completions.create(model="router", prompt="The sky is")
    assert said.choices[0].text == "blue"
    up.say(json_reply(RESPONSE))
    said = client(url).responses.create(model="router-random-0.0", input="Why is the sky blue?")
    assert said.output_text == "blue"
    assert up.seen[-1].path == "/v1/responses"
    begun = {"type": "response.created", "sequence_number": 0, "response": RESPONSE}
    piece = {"type": "response.output_text.delta", "sequence_number": 1, "item_id": "msg_1",
             "output_index": 0, "content_index": 0, "delta": "blue", "logprobs": []}  # fmt: skip
    ended = {"type": "response.completed", "sequence_number": 2, "response": RESPONSE}
    up.say(stream_reply(begun, piece, ended))
    got = list(client(url).responses.create(model="router-random-0.0", input="x", stream=True))
    assert [event.type for event in got][1] == "response.output_text.delta"


def test_embeddings_of_the_model_that_is_set(url, up):
    vector = {"object": "list", "model": "e", "usage": {"prompt_tokens": 1, "total_tokens": 1},
              "data": [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}]}  # fmt: skip
    up.say(json_reply(vector))
    made = client(url).embeddings.create(model=SMALL, input="x")
    assert made.data[0].embedding == [0.5, 0.25]
    assert up.seen[0].headers["authorization"] == "Bearer sk-planted-weak"


# --- streams -----------------------------------------------------------------------------------


def test_a_stream_comes_chunk_by_chunk_and_ends_as_openais_does(url, up, exchanges):
    usage = {**chat_chunk(), "choices": [],
             "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}}  # fmt: skip
    pieces = [chat_chunk(content=f"{i} ") for i in range(5)]
    up.say(stream_reply(*pieces, ENDED, usage, pause_s=0.2))
    body = {"model": "router-random-0.0", "messages": ASK, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    began, arrived, raw = time.perf_counter(), [], b""
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=30) as answer:
        for chunk in answer.iter_raw():
            arrived.append(time.perf_counter() - began)
            raw += chunk
    assert arrived[0] < 0.7 < arrived[-1]
    assert raw.endswith(b"data: [DONE]\n\n")
    docs = [
        json.loads(line[6:]) for line in raw.decode().split("\n\n") if line.startswith("data: {")
    ]
    assert "".join(d["choices"][0]["delta"].get("content", "") for d in docs if d["choices"]) == (
        "0 1 2 3 4 "
    )
    one = told(exchanges)
    assert (one.usage.input_tokens, one.usage.output_tokens) == (9, 4)


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
    with pytest.raises(httpx.RemoteProtocolError):
        chat(url, stream=True)
    assert told(exchanges).broken == "upstream_broke_off"


# --- failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422])
def test_what_an_upstream_refuses_comes_back_as_it_said_it(url, up, status):
    error = {"error": {"message": "as scripted", "type": "t", "param": "p", "code": "c"}}
    up.say(json_reply(error, status=status))
    with pytest.raises(openai.APIStatusError) as raised:
        client(url).chat.completions.create(model="router", messages=ASK)
    assert raised.value.status_code == status
    assert raised.value.body == error["error"]
    assert len(up.seen) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_upstream_that_is_busy_is_asked_again_when_it_says(url, up, stream):
    busy = {"content-type": "application/json", "retry-after": "0"}
    good = stream_reply(chat_chunk(content="x"), ENDED) if stream else json_reply(CHAT)
    up.say(json_reply({"error": {"message": "busy"}}, status=429, headers=busy), good)
    assert chat(url, BIG, stream=stream).status_code == 200
    assert len(up.seen) == 2
    later = busy | {"retry-after": "40"}
    up.say(json_reply({"error": {"message": "busy"}}, status=429, headers=later))
    answer = chat(url, BIG, stream=stream)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "40")


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_the_other_model_stands_in_for_one_that_fails(up, tmp_path, status):
    other = scripted.Upstream(json_reply(CHAT))
    up.say(json_reply({"error": {"message": "down"}}, status=status))
    with (
        running(up.app) as behind,
        running(other.app) as beside,
        gateway(tmp_path, f"{behind}/v1", f"{beside}/v1") as url,
    ):
        answer = chat(url)
        named = chat(url, BIG)
    assert answer.status_code == 200
    assert answer.headers["x-routellm-stood-in"] == f"strong failed: upstream_{status}"
    assert other.seen[0].body["model"] == "small"
    assert named.status_code == status


def test_an_upstream_that_is_away_is_tried_again_then_stood_in_for(behind, tmp_path):
    with gateway(tmp_path, "http://127.0.0.1:9/v1", f"{behind}/v1", breaker_failures=9) as url:
        answer = chat(url)
        named = chat(url, BIG)
        metrics = httpx.get(f"{url}/metrics").text
    assert answer.headers["x-routellm-stood-in"] == "strong failed: upstream_unreachable"
    assert named.json()["error"]["code"] == "upstream_unreachable"
    assert 'routellm_retries_total{route="strong"} 4.0' in metrics


def test_a_stand_ins_own_error_is_not_taken_for_the_first_ones(behind, up, tmp_path):
    with gateway(tmp_path, "http://127.0.0.1:9/v1", behind, small=CLAUDE) as url:
        answer = chat(url, logit_bias={"1": 2})  # which Anthropic does not have
    assert answer.status_code == 400
    assert "logit_bias" in answer.json()["error"]["message"]
    assert not up.seen


def test_what_a_request_failed_on_before_is_not_a_cause_of_its_own_error():
    error = None
    try:
        raise httpx.ConnectError("the strong model's")
    except httpx.ConnectError as first:
        try:
            raise GatewayError("the strong model cannot be reached") from first
        except GatewayError:
            try:
                raise TypeError("LiteLLM's, of the stand-in")
            except TypeError as second:
                error = second
    assert transport_error(error) is None
    assert failed(error, None, handed_over=False).status_code == 400


def test_an_upstream_that_is_slow_is_given_up(behind, up, tmp_path):
    up.say(json_reply(CHAT, wait_s=20))
    with gateway(tmp_path, f"{behind}/v1", f"{behind}/v1", timeout_s=0.5) as url:
        answer = chat(url, BIG)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert len(up.seen) == 1


@pytest.mark.parametrize("wrong", [{"tools": 5}, {"response_format": 3}, {"messages": [1, *ASK]}])
def test_a_request_that_litellm_cannot_read_is_the_callers_mistake(url, up, wrong):
    for _ in range(6):  # more than open the breaker
        assert chat(url, BIG, **wrong).status_code == 400
    assert chat(url, BIG).status_code == 200


def test_an_answer_that_is_none_is_the_upstreams_fault(url, up):
    up.say(Reply([b"not json"]))
    assert chat(url, BIG).status_code == 502


# --- what is not said, and not done ------------------------------------------------------------


def test_neither_prompts_nor_keys_are_logged(url, up, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    error = {"error": {"message": "wrong key sk-planted-strong", "type": "t"}}
    for reply in (
        json_reply(CHAT),
        stream_reply(chat_chunk(content="x"), ENDED),
        json_reply(error, status=401),
        json_reply(error, status=500),
        Reply([b"not json"]),
        stream_reply(chat_chunk(content="half"), breaks_off=True),
    ):
        up.say(reply)
        stream = reply.headers["content-type"] == "text/event-stream"
        with contextlib.suppress(httpx.RemoteProtocolError):
            assert "sk-planted" not in chat(url, BIG, stream=stream).text
    out = "".join([caplog.text, *capfd.readouterr()])
    assert "strong model" in out or "uvicorn" in out or "asyncio" in out  # something is logged
    assert "sky blue" not in out
    assert "sk-planted" not in out


def test_loading_litellm_calls_nobody_and_reads_no_env_file(tmp_path):
    (tmp_path / ".env").write_text("PLANTED=1\n")
    code = (
        "import os, socket, sys\n"
        "calls = []\n"
        "socket.getaddrinfo = lambda *a, **k: calls.append(a)\n"
        "socket.socket.connect = lambda *a: calls.append(a)\n"
        "from routellm.gateway import litellm\n"
        "assert 'litellm' not in sys.modules\n"
        "litellm.LiteLLMTransport('openai/x', api_key='k')\n"
        "print(calls, os.environ.get('PLANTED'))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["[]", "None"]


def test_a_model_of_no_provider_is_said_at_the_start():
    with pytest.raises(UsageError, match="PROVIDER/MODEL"):
        LiteLLMTransport("some-model")


def test_litellm_that_is_not_installed_is_said_at_the_start(monkeypatch):
    monkeypatch.setitem(sys.modules, "litellm", None)
    with pytest.raises(UsageError, match="pip install"):
        LiteLLMTransport(BIG)
