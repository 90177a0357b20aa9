"""Our router inside the LiteLLM proxy, with LiteLLM's own types."""

import asyncio
import copy
import subprocess
import sys

import pytest

from routellm.errors import UsageError
from routellm.gateway.gateway import Gateway
from routellm.settings import GatewaySettings, Upstream
from tests.gateway.test_gateway import Versions, bundle, wait_for
from tests.support.litellm import needs_litellm

needs_litellm()
pytestmark = pytest.mark.slow

ASK = [{"role": "user", "content": "Why is the sky blue?"}]


@pytest.fixture
def versions():
    return Versions(v1=bundle(1), v2=bundle(2))


@pytest.fixture
def gateway(versions, tmp_path):
    ends = {"base_url": "http://127.0.0.1:9/v1"}
    settings = GatewaySettings(
        strong=Upstream(**ends, model="big"), weak=Upstream(**ends, model="small"),
        poll_s=0.05, pacer=False,
    )  # fmt: skip
    made = Gateway(settings, versions, tmp_path)
    yield made
    made.stop()


@pytest.fixture
def hook(gateway):
    from routellm.cli.litellm_hook import RouterHook

    gateway.start()
    return RouterHook(gateway)


def call(hook, data, call_type="acompletion"):
    """Call the hook as LiteLLM's proxy does; return what it made of the request."""
    from litellm.caching.caching import DualCache
    from litellm.proxy._types import UserAPIKeyAuth

    key = UserAPIKeyAuth(api_key="sk-callers")
    return asyncio.run(
        hook.async_pre_call_hook(
            user_api_key_dict=key, cache=DualCache(), data=data, call_type=call_type
        )
    )


@pytest.mark.parametrize(
    ("ask", "model"),
    [
        ({"model": "router-random-0.0"}, "big"),
        ({"model": "router-random-1.0"}, "small"),
        ({"model": "router", "routing": {"threshold": 0.0}}, "big"),
        ({"model": "router", "routing": {"strong_fraction": 0.0}}, "small"),
    ],
)
def test_a_request_for_the_router_goes_to_the_model_it_decides_for(hook, ask, model):
    data = {"messages": ASK, "temperature": 0.1, "metadata": {"theirs": 1}, **ask}
    out = call(hook, data)
    assert out["model"] == model
    assert out["messages"] == ASK
    assert out["temperature"] == 0.1
    assert "routing" not in out
    assert out["metadata"]["theirs"] == 1
    said = out["metadata"]["routellm"]
    assert (said["model"], said["version"], said["kind"]) == (model, "1", "random")
    assert "sky" not in str(said)


def test_headers_of_the_callers_request_are_heard(hook):
    for header, model in (("0.0", "big"), ("1.0", "small")):
        request = {"headers": {"X-RouteLLM-Threshold": header}}
        data = {"model": "router", "messages": ASK, "proxy_server_request": request}
        assert call(hook, data)["model"] == model


@pytest.mark.parametrize(
    ("call_type", "query"),
    [
        ("atext_completion", {"prompt": "Why?"}),
        ("aresponses", {"input": "Why?"}),
        ("anthropic_messages", {"messages": ASK}),
    ],
)
def test_other_endpoints_are_routed_too(hook, call_type, query):
    data = {"model": "router-random-1.0", "litellm_metadata": {}, "metadata": {"a": "b"}, **query}
    out = call(hook, data, call_type)
    assert out["model"] == "small"
    assert out["litellm_metadata"]["routellm"]["route"] == "weak"
    assert out["metadata"] == {"a": "b"}  # which a provider gets to see


@pytest.mark.parametrize(
    ("data", "call_type"),
    [
        ({"model": "gpt-4o", "messages": ASK, "routing": {"their": "own"}}, "acompletion"),
        ({"model": "big", "messages": ASK}, "acompletion"),
        ({"model": "router", "input": "x"}, "aembedding"),
        ({"messages": ASK}, "acompletion"),
    ],
)
def test_every_other_request_passes_untouched(hook, data, call_type):
    before = copy.deepcopy(data)
    assert call(hook, data, call_type) == before


def test_the_answer_says_what_was_decided(hook):
    data = call(hook, {"model": "router-random-0.0", "messages": ASK})
    headers = asyncio.run(
        hook.async_post_call_response_headers_hook(
            data=data, user_api_key_dict=None, response=None, request_headers={},
            litellm_call_info={},
        )
    )  # fmt: skip
    assert headers["x-routellm-model"] == "big"
    assert headers["x-routellm-version"] == "1"
    untouched = asyncio.run(
        hook.async_post_call_response_headers_hook(
            data={"model": "gpt-4o"}, user_api_key_dict=None, response=None
        )
    )
    assert untouched is None


def test_it_follows_the_alias(hook, versions):
    versions.alias = "2"

    def served():
        out = call(hook, {"model": "router", "messages": ASK})
        return out["metadata"]["routellm"]["version"] == "2"

    wait_for(served, 10)


@pytest.mark.parametrize(
    "ask",
    [
        {"model": "router-mf-0.5", "messages": ASK},  # another kind serves
        {"model": "router-nonsense", "messages": ASK},
        {"model": "router", "messages": "none"},
        {"model": "router", "messages": ASK, "routing": {"threshold": 7}},
        {"model": "router", "messages": ASK, "routing": {"policy": "automix"}},  # asks twice
    ],
)
def test_what_cannot_be_routed_goes_to_the_configured_model(hook, ask):
    out = call(hook, ask)
    assert out["model"] == "big"
    assert out["metadata"]["routellm"]["reason"].startswith("fallback")


def test_without_a_registry_the_configured_model_answers(gateway, versions):
    from routellm.cli.litellm_hook import RouterHook

    versions.down = True
    gateway.start()
    out = call(RouterHook(gateway), {"model": "router", "messages": ASK})
    assert out["model"] == "big"
    assert "no router to ask" in out["metadata"]["routellm"]["reason"]


def test_litellm_finds_the_instance_by_its_name_and_hears_what_is_not_set(tmp_path, monkeypatch):
    from litellm.proxy.types_utils.utils import get_instance_fn

    import routellm.cli.litellm_hook as module

    name = "routellm.cli.litellm_hook.proxy_handler_instance"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROUTELLM_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="no upstreams"):
        get_instance_fn(name, config_file_path=str(tmp_path / "config.yaml"))
    for route, model in (("STRONG", "big"), ("WEAK", "small")):
        monkeypatch.setenv(f"ROUTELLM_GATEWAY__{route}__MODEL", model)
        monkeypatch.setenv(f"ROUTELLM_GATEWAY__{route}__BASE_URL", "http://127.0.0.1:9/v1")
    try:
        found = get_instance_fn(name, config_file_path=str(tmp_path / "config.yaml"))
        assert get_instance_fn(name) is found
        # the registry of this home is empty
        out = call(found, {"model": "router", "messages": ASK})
        assert (out["model"], out["metadata"]["routellm"]["route"]) == ("big", "strong")
        wait_for(lambda: found.gateway.follower.problem, 60)
        found.gateway.stop()
    finally:
        vars(module).pop("proxy_handler_instance", None)


def test_importing_the_plugin_starts_nothing():
    code = (
        "import threading, routellm.cli.litellm_hook\n"
        "print([t.name for t in threading.enumerate()])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['MainThread']"
