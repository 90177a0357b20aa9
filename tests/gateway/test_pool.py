"""The policy `pool`: one version chooses among three models, each weighed by its price."""

import contextlib
import re
import tomllib
from dataclasses import dataclass, field

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from routellm.bundle import Bundle, golden_predictions
from routellm.calibration import Calibration
from routellm.errors import UsageError
from routellm.feedback.store import FeedbackStore
from routellm.feedback.writer import Writer
from routellm.gateway.app import create_app
from routellm.gateway.feedback import FeedbackParts
from routellm.gateway.money import Money
from routellm.gateway.server import running
from routellm.policies import load_recorded
from routellm.policies.pair import battles_of
from routellm.routers.base import Pair
from routellm.routers.pool import Pool
from routellm.settings import (
    EmbeddingSettings,
    FeedbackSettings,
    GatewaySettings,
    PoolSettings,
    Price,
    Settings,
    Upstream,
)
from routellm.training import train
from tests.conftest import REPOSITORY, HashEncoder
from tests.gateway.test_gateway import Versions, wait_for
from tests.gateway.test_gateway import bundle as random_bundle
from tests.support import upstream as scripted
from tests.support.upstream import CHAT, chat_chunk, json_reply, stream_reply

pytestmark = pytest.mark.slow
PAIR = Pair("big", "small")
PRICES = {"big-1": Price(input=10.0, output=30.0), "mid-1": Price(input=4.0, output=12.0),
          "small-1": Price(input=0.1, output=0.3)}  # fmt: skip
# small answers easy prompts, mid those and code, big all
EASY, CODE, HARD = "easy easy easy", "code code code", "hard hard hard"


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    """A version that has learnt who can do what."""
    folder = tmp_path_factory.mktemp("pool")
    prompts = [f"{(EASY, CODE, HARD)[i % 3]} {i}" for i in range(900)]
    which = np.arange(900) % 3
    scores = {"small": which == 0, "mid": which <= 1, "big": which <= 2}
    pq.write_table(pa.table({"prompt": prompts, **scores}), folder / "gsm8k.parquet")
    priced = {name: PRICES[f"{name}-1"] for name in scores}

    def words(texts):
        return np.array([len(text.split()) for text in texts], dtype=np.int64)

    (split,) = load_recorded(folder, Settings(home=folder, prices=priced), words)
    encoder = HashEncoder()
    router, _ = train("knn", battles_of(split.train, PAIR, encoder, 0), encoder, seed=0)
    golden = golden_predictions(router, prompts)
    calibration = Calibration.of(router.win_rate(prompts), "test")
    return Bundle(router, EmbeddingSettings(), calibration, golden, "d", False, "0.1.0")


@dataclass
class Served:
    url: str
    ups: dict
    seen: list = field(default_factory=list)
    home: object = None

    def ask(self, prompt, path="chat/completions", headers=None, **body):
        routing = {"policy": "pool", **body.pop("routing", {})}
        messages = [{"role": "user", "content": prompt}]
        doc = {"model": "router", "messages": messages, "routing": routing, **body}
        return httpx.post(f"{self.url}/v1/{path}", json=doc, headers=headers, timeout=30)


@contextlib.contextmanager
def served(home, source, *, prices=PRICES, pool=("mid",), feedback=None, **settings):
    settings = {"routing_timeout_s": 60.0, **settings}  # the first look at a kind loads it
    ups = {name: scripted.Upstream(json_reply({**CHAT, "model": name}))
           for name in ("big", "mid", "small")}  # fmt: skip
    with contextlib.ExitStack() as stack:
        ends = {
            name: Upstream(base_url=f"{stack.enter_context(running(up.app))}/v1", model=f"{name}-1")
            for name, up in ups.items()
        }
        options = GatewaySettings(
            strong=ends["big"], weak=ends["small"], poll_s=0.1,
            pool=PoolSettings(models=dict.fromkeys(pool, ends["mid"]), cost_weight=80.0),
            **settings,
        )  # fmt: skip
        one = Served("", ups, home=home)
        app = create_app(options, source, home=home, money=Money(prices, 100, 100),
                         observers=[one.seen.append], feedback=feedback)  # fmt: skip
        one.url = stack.enter_context(running(app))
        yield one


@pytest.fixture(scope="module")
def _pool(tmp_path_factory, version):
    with served(tmp_path_factory.mktemp("gateway"), Versions(v1=version)) as one:
        yield one


@pytest.fixture
def pool(_pool):
    for up in _pool.ups.values():
        up.seen.clear()
    _pool.seen.clear()
    return _pool


def test_quality_is_against_the_first_and_a_pair_is_the_case_of_two(version):
    found = Pool(version.router, ("small", "mid", "big")).quality([EASY, CODE, HARD])
    assert found[:, 0].tolist() == [0, 0, 0]
    can = np.array([[0, 0, 0], [0, 1, 1], [0, 0, 1]])  # more than small
    assert np.abs(found - can).max() < 0.3
    two = Pool(version.router, ("small", "big")).quality([EASY, HARD])
    assert two[:, 1].tolist() == (2 * version.router.win_rate([EASY, HARD]) - 1).tolist()


@pytest.mark.parametrize(
    ("prompt", "route"), [(EASY, "weak"), (CODE, "mid"), (HARD, "strong")]
)  # fmt: skip
def test_each_prompt_goes_to_the_cheapest_that_can_do_it(pool, prompt, route):
    answer = pool.ask(prompt)
    model = {"weak": "small-1", "mid": "mid-1", "strong": "big-1"}[route]
    assert answer.json()["model"] == model.removesuffix("-1")
    head = answer.headers
    assert (head["x-routellm-policy"], head["x-routellm-route"]) == ("pool", route)
    assert (head["x-routellm-model"], head["x-routellm-version"]) == (model, "1")
    assert "of 3 models" in head["x-routellm-reason"]
    (seen,) = pool.ups[model.removesuffix("-1")].seen
    assert seen.body == {"model": model, "messages": [{"role": "user", "content": prompt}]}
    wait_for(lambda: pool.seen)
    (one,) = pool.seen
    assert one.usd == pytest.approx((PRICES[model].input * 100 + PRICES[model].output * 20) / 1e6)
    spent = f'routellm_spent_usd_total{{route="{route}"}}'
    assert spent in httpx.get(f"{pool.url}/metrics").text


@pytest.mark.parametrize(("weight", "route"), [(0.0, "strong"), (1e6, "weak")])
def test_a_request_may_weigh_a_dollar_itself(pool, weight, route):
    by_body = pool.ask(HARD, routing={"cost_weight": weight})
    by_header = pool.ask(HARD, headers={"x-routellm-cost-weight": str(weight)})
    assert by_body.headers["x-routellm-route"] == by_header.headers["x-routellm-route"] == route


def test_a_stream_comes_from_a_model_of_the_pool(pool):
    up = pool.ups["mid"]
    reply = stream_reply(chat_chunk(content="a"), chat_chunk(content="b"))
    up.say(reply)
    try:
        assert pool.ask(CODE, stream=True).content == b"".join(reply.chunks)
    finally:
        up.say(json_reply({**CHAT, "model": "mid"}))


def test_the_decision_alone_a_named_model_and_the_list_of_models(pool):
    assert pool.ask(CODE, path="route").json()["model"] == "mid-1"
    body = {"model": "mid-1", "messages": [{"role": "user", "content": HARD}]}
    named = httpx.post(f"{pool.url}/v1/chat/completions", json=body)
    assert named.headers["x-routellm-route"] == "mid"
    listed = {one["id"] for one in httpx.get(f"{pool.url}/v1/models").json()["data"]}
    assert {"router", "big-1", "mid-1", "small-1"} <= listed
    status = httpx.get(f"{pool.url}/status.json").json()
    assert [one["route"] for one in status["routes"]] == ["strong", "weak", "mid"]


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        ({"routing": {"cost_weight": -1}}, "not a number of 0 or more"),
        ({"routing": {"strong_fraction": 0.3}}, "takes a cost_weight"),
        ({"routing": {"policy": "cascade"}}, "there is pool"),
        ({"routing": {"policy": None, "cost_weight": 1}}, "goes with the policy `pool`"),
        ({"model": "mid-9"}, "unknown model"),
    ],
)
def test_a_request_that_asks_for_what_cannot_be_is_one_sentence(pool, ask, told):
    answer = pool.ask(EASY, **ask)
    assert answer.status_code in (400, 404)
    assert told in answer.json()["error"]["message"]
    assert not any(up.seen for up in pool.ups.values())


def test_where_a_model_of_the_pool_fails_strong_stands_in(pool):
    pool.ups["mid"].say(json_reply({}, status=500))
    try:
        answer = pool.ask(CODE)
    finally:
        pool.ups["mid"].say(json_reply({**CHAT, "model": "mid"}))
    assert answer.json()["model"] == "big"
    assert answer.headers["x-routellm-stood-in"] == "mid failed: upstream_500"


def test_a_version_that_knows_its_pair_alone_leaves_it_to_the_fallback(tmp_path):
    with served(tmp_path, Versions(v1=random_bundle(1))) as one:
        head = one.ask(EASY).headers
        assert head["x-routellm-route"] == "strong"
        assert "knows only the pair it was trained for" in head["x-routellm-reason"]
        assert "routellm_fallbacks_total 1.0" in httpx.get(f"{one.url}/metrics").text


def test_a_model_that_the_version_has_not_met_is_named(tmp_path, version):
    with served(tmp_path, Versions(v1=version), pool=("nobody",)) as one:
        assert "nobody" in one.ask(EASY).headers["x-routellm-reason"]


def test_without_a_price_it_does_not_start(tmp_path, version):
    prices = {name: one for name, one in PRICES.items() if name != "mid-1"}
    with (
        pytest.raises(UsageError, match=r"mid-1 \(mid\) has no price"),
        served(tmp_path, Versions(v1=version), prices=prices),
    ):
        pass
    with pytest.raises(ValueError, match="cannot be called strong"):
        PoolSettings(models={"strong": {"model": "x", "base_url": "http://127.0.0.1:9/v1"}})


def test_feedback_keeps_what_the_pair_answered_and_no_more(tmp_path, version):
    store = FeedbackStore(f"sqlite:///{tmp_path / 'feedback.db'}")
    parts = FeedbackParts(FeedbackSettings(enabled=True), Writer(store, flush_s=0.05))
    with served(tmp_path, Versions(v1=version), feedback=parts) as one:
        for prompt in (CODE, HARD):
            one.ask(prompt, headers={"x-request-id": prompt[:4]})
        wait_for(lambda: store.find("hard") is not None)
        assert store.find("code") is None
        assert store.find("hard").route == "strong"


def test_the_pages_settings_are_settings():
    page = (REPOSITORY / "docs" / "gateway.md").read_text()
    section = page.split("## More than two models\n")[1].split("\n## ")[0]
    (given,) = re.findall(r"```toml\n(.*?)```", section, re.DOTALL)
    settings = Settings(**tomllib.loads(given))
    assert list(settings.gateway.routes) == ["claude-2.0"]
    assert settings.gateway.pool.models["claude-2.0"].model in settings.prices
