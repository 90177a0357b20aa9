import contextlib
import threading
import time

import httpx
import openai
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from routellm.bundle import Bundle, golden_predictions
from routellm.calibration import Calibration
from routellm.embeddings.memory import Encoders
from routellm.errors import RegistryError, UsageError
from routellm.gateway.app import create_app
from routellm.gateway.demo import demo_upstream
from routellm.gateway.follow import Follower
from routellm.gateway.server import check_port, running
from routellm.gateway.source import VersionRef
from routellm.routers.base import Pair
from routellm.routers.random import RandomRouter
from routellm.settings import EmbeddingSettings, GatewaySettings, Upstream
from tests.conftest import HashEncoder

pytestmark = pytest.mark.slow
ASK = [{"role": "user", "content": "Why is the sky blue?"}]


def bundle(seed, *, broken=False):
    router = RandomRouter(HashEncoder(), Pair("s", "w"))
    router.seed = seed
    prompts = [f"prompt {i}" for i in range(500)]
    golden = golden_predictions(router, prompts)
    if broken:
        golden = tuple((p, 1.0 - r) for p, r in golden)
    calibration = Calibration.of(router.win_rate(prompts), "test")
    return Bundle(router, EmbeddingSettings(), calibration, golden, "d", False, "0.1.0")


class Versions:
    """A registry in memory: real bundles behind an alias that the test moves."""

    def __init__(self, **bundles):
        self.bundles = {name.removeprefix("v"): b for name, b in bundles.items()}
        self.alias = "1"
        self.down = False

    def current(self):
        if self.down:
            raise RegistryError("MLflow does not answer: start it")
        return VersionRef("router", self.alias) if self.alias else None

    def load(self, ref):
        if self.down:
            raise RegistryError("MLflow does not answer: start it")
        return self.bundles[ref.version]


@pytest.fixture(scope="module")
def upstream():
    with running(demo_upstream()) as url:
        yield url


@contextlib.contextmanager
def gateway(source, strong, home, weak=None, **settings):
    both = {
        "strong": Upstream(base_url=f"{strong}/v1", model="big", api_key="sk-planted-secret"),
        "weak": Upstream(base_url=f"{weak or strong}/v1", model="small"),
    }
    options = GatewaySettings(**both, poll_s=0.1, **settings)
    with running(create_app(options, source, home=home)) as url:
        yield url


@pytest.fixture
def url(upstream, tmp_path):
    with gateway(Versions(v1=bundle(1)), upstream, tmp_path) as at:
        yield at


def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="anything", max_retries=0)


def test_the_official_client_gets_a_completion(url):
    raw = client(url).chat.completions.with_raw_response.create(model="router", messages=ASK)
    said = raw.parse().choices[0].message.content
    assert said.endswith("Why is the sky blue?")
    assert raw.headers["x-routellm-version"] == "1"
    assert raw.headers["x-routellm-kind"] == "random"
    rate, limit = (float(raw.headers[f"x-routellm-{n}"]) for n in ("win-rate", "threshold"))
    assert raw.headers["x-routellm-route"] == ("strong" if rate >= limit else "weak")
    assert f"by {raw.headers['x-routellm-model']}]" in said


def test_the_official_client_gets_a_stream(url):
    stream = client(url).chat.completions.create(model="router", messages=ASK, stream=True)
    pieces = [c.choices[0].delta.content or "" for c in stream]
    assert "".join(pieces).endswith("Why is the sky blue?")
    assert len(pieces) > 3


@pytest.mark.parametrize(
    ("ask", "route"),
    [
        ({"model": "router-random-0.0"}, "strong"),
        ({"model": "router-random-1.0"}, "weak"),
        ({"model": "router", "routing": {"threshold": 0.0}}, "strong"),
        ({"model": "router", "routing": {"strong_fraction": 0.0}}, "weak"),
        ({"model": "big"}, "strong"),
        ({"model": "small"}, "weak"),
    ],
)
def test_a_request_can_say_where_to_go(url, ask, route):
    answer = httpx.post(f"{url}/v1/route", json={**ask, "messages": ASK})
    assert answer.json()["route"] == route


def test_headers_can_say_where_to_go(url):
    headers = {"x-routellm-threshold": "0.0"}
    body = {"model": "router", "messages": ASK}
    assert httpx.post(f"{url}/v1/route", json=body, headers=headers).json()["route"] == "strong"


def test_a_strong_fraction_is_kept_over_many_queries(url):
    with httpx.Client() as http:
        routes = [
            http.post(
                f"{url}/v1/route",
                json={"model": "router", "routing": {"strong_fraction": 0.3},
                      "messages": [{"role": "user", "content": f"query {i}"}]},
            ).json()["route"]
            for i in range(300)
        ]  # fmt: skip
    assert routes.count("strong") / 300 == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"model": "gpt-99", "messages": ASK}, 404, "unknown model"),
        ({"model": "router-mf-0.5", "messages": ASK}, 400, "version 1 is random"),
        ({"model": "router-random-1.5", "messages": ASK}, 400, "not a number in"),
        ({"model": "router", "routing": {"threshold": "x"}, "messages": ASK}, 400, "not a number"),
        ({"model": "router", "routing": {"cost": 1}, "messages": ASK}, 400, "not ['cost']"),
        ({"model": "router"}, 400, "`messages`"),
        ({"model": "router", "messages": [{"role": "system", "content": "x"}]}, 400, "`user`"),
        ([1, 2], 400, "not a JSON object"),
    ],
)
def test_a_bad_request_gets_openais_error_shape(url, body, status, says):
    answer = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_over_the_limit_is_refused(upstream, tmp_path):
    with gateway(Versions(v1=bundle(1)), upstream, tmp_path, max_body_bytes=1000) as url:
        answer = httpx.post(f"{url}/v1/chat/completions", content=b"x" * 5000)
        assert answer.status_code == 413


def scripted():
    """An upstream that records what reaches it and does what the prompt says."""
    app = FastAPI()
    app.state.seen, app.state.closed = [], threading.Event()

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        body = await request.json()
        app.state.seen.append((body, dict(request.headers)))
        said = body["messages"][0]["content"]
        if said in ("429", "500"):
            error = {"error": {"message": f"as scripted {said}", "type": "t"}}
            return JSONResponse(error, int(said), headers={"retry-after": "7"})

        async def endless():
            import asyncio

            try:
                while True:
                    yield b"data: {}\n\n"
                    await asyncio.sleep(0.05)
            finally:
                app.state.closed.set()

        if said == "endless":
            return StreamingResponse(endless(), media_type="text/event-stream")
        return {"id": "x", "echo": body}

    return app


@pytest.fixture
def script(tmp_path):
    app = scripted()
    with running(app) as up, gateway(Versions(v1=bundle(1)), up, tmp_path) as url:
        yield app, url


def test_every_field_reaches_the_upstream_but_for_the_model(script):
    app, url = script
    body = {
        "model": "router-random-0.0", "messages": [*ASK, {"role": "assistant", "content": None}],
        "tools": [{"type": "function", "function": {"name": "f"}}], "seed": 7,
        "vendor_extension": {"deep": [1, None, "é"]}, "routing": {"threshold": 0.5},
    }  # fmt: skip
    headers = {"authorization": "Bearer the-callers-own"}
    httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers)
    seen, sent = app.state.seen[0]
    want = {k: v for k, v in body.items() if k != "routing"} | {"model": "big"}
    assert seen == want
    assert sent["authorization"] == "Bearer sk-planted-secret"


@pytest.mark.parametrize("status", ["429", "500"])
def test_an_upstreams_error_comes_through(script, status):
    _, url = script
    body = {"model": "router", "messages": [{"role": "user", "content": status}]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert answer.status_code == int(status)
    assert answer.json()["error"]["message"] == f"as scripted {status}"
    assert answer.headers["retry-after"] == "7"


def test_a_client_that_leaves_ends_the_upstreams_stream(script):
    app, url = script
    body = {"model": "router", "messages": [{"role": "user", "content": "endless"}]}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        next(answer.iter_bytes())
    assert app.state.closed.wait(5)


def test_an_upstream_that_is_away_is_said(tmp_path):
    with gateway(Versions(v1=bundle(1)), "http://127.0.0.1:9", tmp_path) as url:
        answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "big", "messages": ASK})
    assert answer.status_code == 502
    assert "cannot be reached" in answer.json()["error"]["message"]


def version_at(url):
    return httpx.get(f"{url}/readyz").json()["version"]


def wait_for(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def test_moving_the_alias_swaps_the_version_and_loses_no_request(upstream, tmp_path):
    source = Versions(v1=bundle(1), v2=bundle(2))
    with gateway(source, upstream, tmp_path) as url:
        statuses, versions, stop = [], set(), threading.Event()

        def load():
            with httpx.Client() as http:
                while not stop.is_set():
                    answer = http.post(
                        f"{url}/v1/chat/completions", json={"model": "router", "messages": ASK}
                    )
                    statuses.append(answer.status_code)
                    versions.add(answer.headers["x-routellm-version"])

        threads = [threading.Thread(target=load) for _ in range(4)]
        for t in threads:
            t.start()
        for alias in ("2", "1", "2"):
            source.alias = alias
            wait_for(lambda want=alias: version_at(url) == want)
            enough = len(statuses) + 8
            wait_for(lambda want=enough: len(statuses) >= want)
        stop.set()
        for t in threads:
            t.join()
    assert len(statuses) > 20
    assert set(statuses) == {200}
    assert versions == {"1", "2"}


def test_a_version_with_other_golden_predictions_is_not_swapped_in(upstream, tmp_path):
    source = Versions(v1=bundle(1), v2=bundle(2, broken=True))
    with gateway(source, upstream, tmp_path) as url:
        source.alias = "2"
        wait_for(lambda: "golden" in (httpx.get(f"{url}/readyz").json()["problem"] or ""))
        assert version_at(url) == "1"
        assert "routellm_follow_failures 1.0" in httpx.get(f"{url}/metrics").text


@pytest.mark.parametrize("what", ["alias gone", "artifact corrupted"])
def test_what_is_lost_or_broken_leaves_the_last_good_version_in_place(upstream, tmp_path, what):
    source = Versions(v1=bundle(1))  # there is no version 2 to load
    with gateway(source, upstream, tmp_path) as url:
        source.alias = None if what == "alias gone" else "2"
        wait_for(lambda: httpx.get(f"{url}/readyz").json()["problem"])
        answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "router", "messages": ASK})
        assert answer.headers["x-routellm-version"] == "1"
        problem = httpx.get(f"{url}/readyz").json()["problem"]
        assert ("points at no version" in problem) == (what == "alias gone")


def test_a_router_that_hangs_costs_routing_and_no_more_time_than_is_set(upstream, tmp_path):
    class Hangs(RandomRouter):
        def win_rate(self, prompts):
            time.sleep(5)
            return super().win_rate(prompts)

    one = bundle(1)
    slow = Bundle(Hangs(HashEncoder(), Pair("s", "w")), one.embedding, one.calibration, (), "d",
                  False, "0.1.0")  # fmt: skip
    settings = {"routing_timeout_s": 0.3, "fallback": "weak"}
    with gateway(Versions(v1=slow), upstream, tmp_path, **settings) as url:
        began = time.monotonic()
        answers = [
            httpx.post(f"{url}/v1/chat/completions", json={"model": "router", "messages": ASK})
            for _ in range(3)
        ]
        assert time.monotonic() - began < 3.0
        assert {a.headers["x-routellm-model"] for a in answers} == {"small"}
        assert all("TimeoutError" in a.headers["x-routellm-reason"] for a in answers)
        assert "routellm_fallbacks_total 3.0" in httpx.get(f"{url}/metrics").text


def test_a_registry_that_goes_down_changes_nothing(upstream, tmp_path):
    source = Versions(v1=bundle(1))
    with gateway(source, upstream, tmp_path) as url:
        source.down = True
        wait_for(lambda: httpx.get(f"{url}/readyz").json()["problem"])
        answer = httpx.post(f"{url}/v1/route", json={"model": "router", "messages": ASK})
        assert answer.json()["version"] == "1"


def test_a_gateway_starts_from_its_last_good_copy(upstream, tmp_path):
    source = Versions(v1=bundle(1))
    with gateway(source, upstream, tmp_path):
        pass
    source.down = True
    with gateway(source, upstream, tmp_path) as url:
        ready = httpx.get(f"{url}/readyz").json()
    assert ready["version"] == "1"
    assert "does not answer" in ready["problem"]


def test_without_a_champion_the_fallback_answers_and_says_so(upstream, tmp_path):
    source = Versions()
    source.alias = None
    with gateway(source, upstream, tmp_path, fallback="weak") as url:
        raw = client(url).chat.completions.with_raw_response.create(model="router", messages=ASK)
        assert raw.headers["x-routellm-model"] == "small"
        assert raw.headers["x-routellm-reason"].startswith("fallback:")
        assert "routellm_fallbacks_total 1.0" in httpx.get(f"{url}/metrics").text


def test_the_models_are_listed(url):
    names = [m.id for m in client(url).models.list()]
    assert names[0] == "router"
    assert names[1].startswith("router-random-0.")
    assert names[2:] == ["big", "small"]
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}


def test_a_router_that_breaks_costs_routing_not_the_answer(upstream, tmp_path):
    class Broken(RandomRouter):
        def win_rate(self, prompts):
            raise RuntimeError("boom")

    one = bundle(1)
    bad = Bundle(Broken(HashEncoder(), Pair("s", "w")), one.embedding, one.calibration, (), "d",
                 False, "0.1.0")  # fmt: skip
    with gateway(Versions(v1=bad), upstream, tmp_path) as url:
        raw = client(url).chat.completions.with_raw_response.create(model="router", messages=ASK)
        assert "RuntimeError" in raw.headers["x-routellm-reason"]
        assert raw.headers["x-routellm-model"] == "big"


def test_neither_keys_nor_prompts_are_logged(upstream, tmp_path, caplog):
    caplog.set_level("DEBUG", logger="routellm")
    with gateway(Versions(v1=bundle(1)), upstream, tmp_path) as url:
        client(url).chat.completions.create(model="router", messages=ASK)
    assert "sk-planted-secret" not in caplog.text
    assert "sky" not in caplog.text


def test_a_taken_port_is_one_sentence():
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="choose another with --port"):
            check_port("127.0.0.1", taken.getsockname()[1])


def test_no_upstreams_is_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="--demo"):
        create_app(GatewaySettings(), Versions(v1=bundle(1)), home=tmp_path)


def test_a_follower_that_is_stopped_while_it_starts_ends(tmp_path):
    looking, go_on = threading.Event(), threading.Event()

    class Slow(Versions):
        def current(self):
            looking.set()
            assert go_on.wait(30)
            return super().current()

    follower = Follower(Slow(v1=bundle(1)), tmp_path, 0.01, Encoders())
    starting = threading.Thread(target=follower.start)
    starting.start()
    assert looking.wait(30)
    follower.stop()
    go_on.set()
    starting.join(30)
    wait_for(lambda: not any(t.name == "follow-alias" for t in threading.enumerate()), 30)
