import contextlib
import json
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest

import routellm.gateway.challenger
import routellm.gateway.evidence
from registry.online import forget_deleted, online
from routellm.bundle import Bundle, golden_predictions
from routellm.embeddings.cache import CachedEncoder
from routellm.errors import RegistryError, UsageError
from routellm.feedback.errors import FeedbackUnreachable
from routellm.feedback.store import FeedbackStore
from routellm.feedback.writer import Writer
from routellm.gateway.app import create_app
from routellm.gateway.decide import on_canary_side
from routellm.gateway.demo import demo_upstream
from routellm.gateway.evidence import BOUNDS_MS, Evidence, median_ms
from routellm.gateway.feedback import FeedbackParts
from routellm.gateway.lane import Lane
from routellm.gateway.server import running
from routellm.gateway.source import VersionRef
from routellm.routers.base import Pair
from routellm.routers.random import RandomRouter
from routellm.settings import FeedbackSettings, GatewaySettings, Settings, Upstream
from tests.conftest import REPOSITORY, HashEncoder
from tests.gateway.test_gateway import Versions, bundle, wait_for
from tests.support.databases import new_database, shared_postgres
from tests.support.servers import free_port

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def upstream():
    with running(demo_upstream()) as url:
        yield url


@contextlib.contextmanager
def gateway(
    upstream, home, champion, in_line, mode, *, ready=True, canary_fraction=0.5, store=None
):
    """A real gateway with two aliases; waits until the challenger stands beside the champion."""
    parts = None
    if store is not None:
        how = FeedbackSettings(enabled=True, store=store)
        parts = FeedbackParts(how, Writer(FeedbackStore(store), flush_s=0.05))
    options = GatewaySettings(
        strong=Upstream(base_url=f"{upstream}/v1", model="big"),
        weak=Upstream(base_url=f"{upstream}/v1", model="small"),
        poll_s=0.05,
        challenger=mode,
        canary_fraction=canary_fraction,
        pacer=False,  # thresholds are compared with the calibration's
    )
    app = create_app(options, champion, home=home, challenger=in_line, feedback=parts)
    with running(app) as url:
        if ready:
            wait_for(lambda: standing(url)["version"] is not None)
        yield url


def standing(url):
    return httpx.get(f"{url}/readyz").json()["challenger"]


def line_up(alias="2", **bundles):
    """The challenger's alias, over the same versions or others."""
    source = Versions(**bundles)
    source.alias = alias
    return source


def query(i, **more):
    return {"model": "router", "messages": [{"role": "user", "content": f"query {i}"}], **more}


def routes(url, n, *, start=0, **more):
    with httpx.Client() as http:
        asked = [query(i, **more) for i in range(start, start + n)]
        return [http.post(f"{url}/v1/route", json=body).json() for body in asked]


def says(url, line):
    return line in httpx.get(f"{url}/metrics").text


def scored(url):
    """How many prompts version 2 has scored in shadow, by the metrics."""
    name = 'routellm_scoring_seconds_count{mode="shadow",version="2"} '
    found = [m for m in httpx.get(f"{url}/metrics").text.splitlines() if m.startswith(name)]
    return float(found[0].removeprefix(name)) if found else 0.0


def of_class(router_class, *, seed=2, golden=()):
    """A version whose router is of another class."""
    one = bundle(seed)
    router = router_class(HashEncoder(), Pair("s", "w"))
    router.seed = seed
    return Bundle(router, one.embedding, one.calibration, golden, "d", False, "0.1.0")


class Raises(RandomRouter):
    def win_rate(self, prompts):
        raise RuntimeError("boom")


class NotANumber(RandomRouter):
    def win_rate(self, prompts):
        return np.full(len(prompts), np.nan)


class Hangs(RandomRouter):
    def win_rate(self, prompts):
        time.sleep(30)
        return super().win_rate(prompts)


class Slow(RandomRouter):
    def win_rate(self, prompts):
        time.sleep(0.05)
        return super().win_rate(prompts)


# --- shadow ------------------------------------------------------------------------------------


def test_a_shadow_serves_the_champions_routes_and_counts_its_own(upstream, tmp_path):
    one, two = bundle(1), bundle(2)
    with gateway(upstream, tmp_path / "alone", Versions(v1=one), None, "off", ready=False) as url:
        alone = routes(url, 200)
    with gateway(upstream, tmp_path, Versions(v1=one), line_up(v2=two), "shadow") as url:
        beside = []
        for i in range(0, 200, 40):  # fewer than may wait, so that none is dropped
            beside += routes(url, 40, start=i)
            wait_for(lambda n=i + 40: scored(url) == n)
        assert standing(url) == {"mode": "shadow", "version": "2", "kind": "random",
                                 "problem": None}  # fmt: skip
    assert beside == alone
    found = online(Settings(home=tmp_path), "2")
    prompts = [f"query {i}" for i in range(200)]
    strong = two.router.win_rate(prompts) >= two.thresholds(None, 0.5)
    agreed = strong == np.array([r["route"] == "strong" for r in alone])
    assert (found.requests, found.failures, found.dropped, found.shadow) == (200, 0, 0, 200)
    assert found.strong_fraction == pytest.approx(strong.mean())
    assert found.agreement == pytest.approx(agreed.mean())
    assert found.asked_fraction == pytest.approx(0.5)
    assert 0 < found.latency_ms_p50 < 50
    assert found.since <= found.until


def test_what_waits_for_a_shadow_when_the_gateway_stops_is_dropped(upstream, tmp_path, monkeypatch):
    monkeypatch.setattr(routellm.gateway.challenger, "_LAST_S", 0.0)
    source = line_up(v2=of_class(Slow))
    with gateway(upstream, tmp_path, Versions(v1=bundle(1)), source, "shadow") as url:
        routes(url, 30)
    found = online(Settings(home=tmp_path), "2")
    assert found.dropped > 0
    assert found.requests + found.dropped == 30


def test_what_a_threshold_asks_of_a_challenger_is_by_its_own_calibration(upstream, tmp_path):
    two = bundle(2)
    with gateway(upstream, tmp_path, Versions(v1=bundle(1)), line_up(v2=two), "shadow") as url:
        routes(url, 20, routing={"threshold": 0.8})
    found = online(Settings(home=tmp_path), "2")
    assert found.asked_fraction == pytest.approx(two.calibration.strong_fraction(0.8))


def test_a_shadow_that_is_behind_drops_and_counts(upstream, tmp_path, monkeypatch):
    monkeypatch.setattr(routellm.gateway.challenger, "_WAITING", 2)
    source = line_up(v2=of_class(Slow))
    with gateway(upstream, tmp_path, Versions(v1=bundle(1)), source, "shadow") as url:
        began = time.monotonic()
        answers = routes(url, 60)
        took = time.monotonic() - began
    assert {a["version"] for a in answers} == {"1"}
    assert took < 60 * 0.05  # nobody waited for the shadow
    found = online(Settings(home=tmp_path), "2")
    assert found.dropped > 10
    assert found.requests + found.dropped == 60
    assert found.failures == 0


# --- canary ------------------------------------------------------------------------------------


def test_a_canary_decides_for_about_the_share_asked_for(upstream, tmp_path):
    one, two = bundle(1), bundle(2)
    with gateway(
        upstream,
        tmp_path,
        Versions(v1=one),
        line_up(v2=two),
        "canary",
        canary_fraction=0.2,
    ) as url:
        answers = routes(url, 500)
        again = routes(url, 500)
    assert again == answers  # a conversation stays on its side
    share = sum(a["canary"] for a in answers) / 500
    assert share == pytest.approx(0.2, abs=0.07)
    for i, answer in enumerate(answers):
        by = two if answer["canary"] else one
        assert answer["version"] == ("2" if answer["canary"] else "1")
        assert answer["threshold"] == pytest.approx(by.calibration.threshold(0.5))
        assert answer["win_rate"] == pytest.approx(by.router.win_rate([f"query {i}"])[0])
    found = online(Settings(home=tmp_path), "2")
    assert found.requests == 2 * share * 500
    assert found.agreement is None  # the champion was not asked
    mine = [a["route"] == "strong" for a in answers if a["canary"]]
    assert found.strong_fraction == pytest.approx(np.mean(mine))


def test_every_turn_of_a_conversation_is_decided_by_one_version(upstream, tmp_path):
    with gateway(
        upstream, tmp_path, Versions(v1=bundle(1)), line_up(v2=bundle(2)), "canary"
    ) as url:
        for i in range(20):
            first = query(i, user="u")["messages"]
            later = [*first, {"role": "assistant", "content": "a"},
                     {"role": "user", "content": f"and {i}?"}]  # fmt: skip
            told = {
                httpx.post(
                    f"{url}/v1/chat/completions",
                    json={"model": "router", "user": "u", "messages": messages},
                ).headers["x-routellm-version"]
                for messages in (first, later)
            }
            assert len(told) == 1


def test_the_share_holds_for_many_users_who_ask_the_same():
    sides = [on_canary_side("7", f"user {i}", "hello", 0.1) for i in range(4000)]
    assert np.mean(sides) == pytest.approx(0.1, abs=0.02)
    other = [on_canary_side("8", f"user {i}", "hello", 0.1) for i in range(4000)]
    assert np.mean(np.logical_and(sides, other)) == pytest.approx(0.01, abs=0.006)


def test_a_canarys_answer_says_so_in_its_headers(upstream, tmp_path):
    with gateway(
        upstream, tmp_path, Versions(v1=bundle(1)), line_up(v2=bundle(2)), "canary"
    ) as url:
        told = [httpx.post(f"{url}/v1/chat/completions", json=query(i)).headers for i in range(20)]
    canary = [h for h in told if h.get("x-routellm-canary") == "true"]
    assert 0 < len(canary) < 20
    for headers in told:
        assert headers["x-routellm-version"] == ("2" if headers in canary else "1")


@pytest.mark.parametrize("router_class", [Raises, NotANumber])
@pytest.mark.parametrize("mode", ["shadow", "canary"])
def test_a_challenger_that_breaks_never_fails_a_request(upstream, tmp_path, mode, router_class):
    source = line_up(v2=of_class(router_class))
    with gateway(upstream, tmp_path, Versions(v1=bundle(1)), source, mode) as url:
        answers = [httpx.post(f"{url}/v1/chat/completions", json=query(i)) for i in range(30)]
    assert {a.status_code for a in answers} == {200}
    assert {a.headers["x-routellm-version"] for a in answers} == {"1"}
    assert not any("fallback" in a.headers["x-routellm-reason"] for a in answers)
    found = online(Settings(home=tmp_path), "2")
    assert found.error_share == 1.0
    assert found.requests + found.dropped == (30 if mode == "shadow" else pytest.approx(15, abs=12))
    assert found.latency_ms_p50 is None


def test_a_canary_that_hangs_holds_one_request_up_and_no_stop(upstream, tmp_path, monkeypatch):
    monkeypatch.setitem(routellm.gateway.challenger.PATIENCE_S, "canary", 0.3)
    source = line_up(v2=of_class(Hangs), v3=bundle(3))
    with gateway(upstream, tmp_path, Versions(v1=bundle(1)), source, "canary") as url:
        began = time.monotonic()
        answers = routes(url, 60)
        assert time.monotonic() - began < 5.0
        assert {a["version"] for a in answers} == {"1"}
        source.alias = "3"  # the next in line is not held up by the one before
        wait_for(lambda: standing(url)["version"] == "3")
        assert {a["version"] for a in routes(url, 30)} == {"1", "3"}
        began = time.monotonic()
    assert time.monotonic() - began < 10.0
    assert online(Settings(home=tmp_path), "2").error_share == 1.0
    assert online(Settings(home=tmp_path), "3").failures == 0


def test_a_request_that_insists_on_a_kind_is_not_for_a_challenger_of_another(upstream, tmp_path):
    class Other(RandomRouter):
        kind = "other"

    with gateway(
        upstream, tmp_path, Versions(v1=bundle(1)), line_up(v2=of_class(Other)), "canary"
    ) as url:
        named = routes(url, 30, model="router-random-0.5")
        plain = routes(url, 30)
    assert {a["kind"] for a in named} == {"random"}
    assert {a["kind"] for a in plain} == {"random", "other"}


# --- following ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("challenger", "reason"),
    [
        (line_up(alias=None), "points at no version"),
        (line_up(v2=bundle(2, broken=True)), "golden"),
        (line_up(alias="1", v1=bundle(1)), "version 1 is the champion already"),
        (line_up(alias="9"), "9"),  # not there: the source raises
    ],
)
def test_no_challenger_is_said_and_costs_nothing(upstream, tmp_path, challenger, reason):
    with gateway(
        upstream, tmp_path, Versions(v1=bundle(1)), challenger, "canary", ready=False
    ) as url:
        wait_for(lambda: reason in (standing(url)["problem"] or ""))
        assert standing(url)["version"] is None
        assert says(url, "routellm_challenger_version 0.0")
        ready = httpx.get(f"{url}/readyz").json()
        assert (ready["ready"], ready["version"], ready["problem"]) == (True, "1", None)
        assert {a["version"] for a in routes(url, 20)} == {"1"}
    assert online(Settings(home=tmp_path), "2") is None


def test_a_challenger_of_another_pair_is_refused(upstream, tmp_path):
    one = bundle(2)
    router = RandomRouter(HashEncoder(), Pair("s", "tiny"))
    other = Bundle(router, one.embedding, one.calibration, (), "d", False, "0.1.0")
    source = line_up(v2=other, v3=bundle(3))
    with gateway(upstream, tmp_path, Versions(v1=bundle(1)), source, "canary", ready=False) as url:
        wait_for(lambda: "between s and tiny" in (standing(url)["problem"] or ""))
        assert {a["version"] for a in routes(url, 20)} == {"1"}
        source.alias = "3"
        wait_for(lambda: standing(url)["version"] == "3")
        assert standing(url)["problem"] is None


def test_a_registry_that_goes_down_leaves_the_challenger(upstream, tmp_path):
    source = line_up(v2=bundle(2))
    with gateway(upstream, tmp_path, Versions(v1=bundle(1)), source, "shadow") as url:
        source.down = True
        wait_for(lambda: "does not answer" in (standing(url)["problem"] or ""))
        assert standing(url)["version"] == "2"


def test_a_gateway_starts_without_waiting_for_its_challenger(upstream, tmp_path):
    class Late(Versions):
        arrived = threading.Event()

        def load(self, ref):
            assert self.arrived.wait(30)
            return super().load(ref)

    source = Late(v2=bundle(2))
    source.alias = "2"
    with gateway(upstream, tmp_path, Versions(v1=bundle(1)), source, "shadow", ready=False) as url:
        assert standing(url)["problem"] == "the challenger is being loaded"
        assert routes(url, 1)[0]["version"] == "1"
        source.arrived.set()
        wait_for(lambda: standing(url)["version"] == "2")


def test_an_encoder_is_loaded_before_its_version_is_asked(upstream, tmp_path):
    class Loads(HashEncoder):
        asked = 0

        def encode(self, prompts, *, progress=None):
            self.asked += 1
            return super().encode(prompts)

    class Reads(RandomRouter):
        reads_embeddings = True

    encoder, one = Loads(), bundle(2)
    cached = CachedEncoder(encoder, tmp_path / "embeddings.db")
    golden = golden_predictions(Reads(cached, Pair("s", "w")), ["a", "b"])
    before = encoder.asked  # from here on the cache knows the golden prompts
    router = Reads(cached, Pair("s", "w"))
    version = Bundle(router, one.embedding, one.calibration, golden, "d", False, "0.1.0")
    source = line_up(v2=version)
    with gateway(upstream, tmp_path, Versions(v1=bundle(1)), source, "shadow"):
        assert encoder.asked > before


@pytest.mark.parametrize("mode", ["shadow", "canary"])
def test_swapping_the_challenger_under_load_loses_no_request(upstream, tmp_path, mode):
    challenger = line_up(v2=bundle(2), v3=bundle(3))
    with gateway(upstream, tmp_path, Versions(v1=bundle(1)), challenger, mode) as url:
        told, stop = [], threading.Event()

        def load(worker):
            with httpx.Client() as http:
                i = 0
                while not stop.is_set():
                    answer = http.post(f"{url}/v1/chat/completions", json=query(f"{worker} {i}"))
                    told.append((answer.status_code, answer.headers["x-routellm-version"]))
                    i += 1

        threads = [threading.Thread(target=load, args=(w,)) for w in range(4)]
        for t in threads:
            t.start()
        for alias in ("3", "2", None, "3"):
            challenger.alias = alias
            wait_for(lambda want=alias: standing(url)["version"] == want)
            time.sleep(0.3)
        stop.set()
        for t in threads:
            t.join()
    assert {status for status, _ in told} == {200}
    settings = Settings(home=tmp_path)
    two, three = online(settings, "2"), online(settings, "3")
    assert two.failures == three.failures == 0
    seen = two.requests + three.requests + two.dropped + three.dropped
    if mode == "shadow":
        assert {version for _, version in told} == {"1"}
        assert two.requests > 0
        assert three.requests > 0
        assert seen <= len(told)  # fewer: for a while there was none in line
    else:
        assert {version for _, version in told} == {"1", "2", "3"}
        canary = sum(version != "1" for _, version in told)
        assert canary == two.requests + three.requests


def test_a_promoted_challenger_is_followed(upstream, tmp_path):
    both = {"v1": bundle(1), "v2": bundle(2)}
    champion, challenger = Versions(**both), line_up(**both)
    with gateway(upstream, tmp_path, champion, challenger, "shadow") as url:
        champion.alias = "2"
        wait_for(lambda: httpx.get(f"{url}/readyz").json()["version"] == "2")
        assert "is the champion already" in standing(url)["problem"]
        challenger.alias = None
        wait_for(lambda: "no version" in standing(url)["problem"])
        assert {a["version"] for a in routes(url, 10)} == {"2"}


def test_a_challenger_without_a_source_is_one_sentence(tmp_path):
    settings = GatewaySettings(
        strong=Upstream(base_url="http://x/v1", model="big"),
        weak=Upstream(base_url="http://x/v1", model="small"),
        challenger="shadow",
    )
    with pytest.raises(UsageError, match="no source of challengers"):
        create_app(settings, Versions(v1=bundle(1)), home=tmp_path)


# --- evidence ----------------------------------------------------------------------------------


@contextlib.contextmanager
def process(home, mode):
    """A gateway in a process of its own: its address, and the process."""
    program = subprocess.Popen(
        [sys.executable, "-m", "tests.gateway.canary_process", str(home), mode],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    try:
        url = program.stdout.readline().strip()
        wait_for(lambda: standing(url)["version"] == "2", 60)
        yield url, program
        program.stdin.close()
        program.wait(timeout=40)
    finally:
        if program.poll() is None:
            program.kill()
            program.wait()
        program.stdout.close()


def test_evidence_sums_over_processes_and_a_kill_keeps_what_was_written(tmp_path):
    home = tmp_path / "shared"
    settings = Settings(home=home)
    with process(home, "shadow") as (one, ends), process(home, "canary") as (two, killed):
        routes(one, 40)
        canaries = sum(a["canary"] for a in routes(two, 60))
        wait_for(lambda: (found := online(settings, "2")) and found.requests == 40 + canaries)
        before = online(settings, "2")
        killed.kill()
        killed.wait()
        routes(one, 5)
        ends.stdin.close()
        ends.wait(timeout=40)  # ended as it should: the last five are written
        after = online(settings, "2")
    assert 0 < canaries < 60
    assert before.processes == after.processes == 2
    assert (before.shadow, after.shadow + after.dropped) == (40, 45)
    assert after.requests - after.shadow == canaries
    assert after.failures == 0
    assert after.agreement is not None


def test_evidence_holds_counts_and_no_prompt(upstream, tmp_path):
    secret = "how do I hide my tax returns"
    body = {"model": "router", "user": "someone", "messages": [{"role": "user", "content": secret}]}
    with gateway(
        upstream, tmp_path, Versions(v1=bundle(1)), line_up(v2=bundle(2)), "shadow"
    ) as url:
        assert httpx.post(f"{url}/v1/route", json=body).status_code == 200
    (path,) = (tmp_path / "online").glob("*.json")
    text = path.read_text()
    assert secret not in text
    assert "someone" not in text
    assert json.loads(text)["counts"]["requests"] == 1


def test_a_file_that_cannot_be_written_costs_no_request(upstream, tmp_path, monkeypatch):
    monkeypatch.setattr(routellm.gateway.evidence, "EVERY_S", 0.05)
    (tmp_path / "online").write_text("a file where the folder should be")
    with gateway(
        upstream, tmp_path, Versions(v1=bundle(1)), line_up(v2=bundle(2)), "shadow"
    ) as url:
        assert {a["version"] for a in routes(url, 10)} == {"1"}
        wait_for(lambda: not says(url, "routellm_evidence_failures 0.0"))
        (tmp_path / "online").unlink()
        wait_for(lambda: online(Settings(home=tmp_path), "2") is not None)
    assert online(Settings(home=tmp_path), "2").requests == 10


def reads(home, store, **more):
    """The settings of whoever asks what gateways saw, and has this feedback store."""
    return Settings(home=home, feedback=FeedbackSettings(store=store), **more)


def test_gateways_that_share_no_home_are_seen_together_through_the_store(
    upstream, tmp_path, monkeypatch
):
    monkeypatch.setattr(routellm.gateway.evidence, "EVERY_S", 0.05)
    monkeypatch.setattr(routellm.gateway.evidence, "SHARED_EVERY_S", 0.1)
    store = new_database(shared_postgres("the challenger's counts were"))
    elsewhere = reads(tmp_path / "elsewhere", store)
    with contextlib.ExitStack() as both:
        urls = [
            both.enter_context(
                gateway(
                    upstream, tmp_path / name, Versions(v1=bundle(1)), line_up(v2=bundle(2)),
                    "shadow", store=store,
                )
            )
            for name in ("one", "two")
        ]  # fmt: skip
        for url, n in zip(urls, (20, 12), strict=True):
            routes(url, n)
        wait_for(lambda: (found := online(elsewhere, "2")) and found.requests == 32)
        routes(urls[0], 3)  # and written at the end, whenever that is
    found = online(elsewhere, "2")
    assert (found.requests + found.dropped, found.processes) == (35, 2)
    assert online(reads(tmp_path / "one", store), "2") == found  # its own file is not counted twice
    assert forget_deleted(elsewhere, ["1", "2"]) == 0
    assert forget_deleted(elsewhere, ["1"]) == 2
    assert online(elsewhere, "2") is None


def test_a_store_that_does_not_answer_costs_no_request_and_no_count(
    upstream, tmp_path, monkeypatch
):
    monkeypatch.setattr(routellm.gateway.evidence, "EVERY_S", 0.05)
    monkeypatch.setattr(routellm.gateway.evidence, "SHARED_EVERY_S", 0.1)
    store = f"postgresql://nobody@127.0.0.1:{free_port()}/none"
    with gateway(
        upstream, tmp_path, Versions(v1=bundle(1)), line_up(v2=bundle(2)), "shadow", store=store
    ) as url:
        assert {a["version"] for a in routes(url, 10)} == {"1"}
        wait_for(lambda: not says(url, "routellm_evidence_failures 0.0"))
    assert online(Settings(home=tmp_path), "2").requests == 10
    with pytest.raises(FeedbackUnreachable, match="does not answer"):
        online(reads(tmp_path, store), "2")


def counted(home, version, n, *, model="router", store=None):
    evidence = Evidence(home / "online", "shadow", store)
    for _ in range(n):
        evidence.failed(VersionRef(model, version))
    evidence.write()
    evidence.share()


def test_a_damaged_document_in_the_store_is_one_sentence(tmp_path):
    address = new_database(shared_postgres("the challenger's counts were"))
    with contextlib.closing(FeedbackStore(address)) as store:
        counted(tmp_path / "one", "2", 3, store=store)
        assert online(reads(tmp_path, address), "2").failures == 3
        (name,) = store.online()
        store.keep_online({name: "{}"})
    with pytest.raises(RegistryError, match=r"in the feedback store .* holds no online counts"):
        online(reads(tmp_path, address), "2")


def test_files_go_with_their_version_and_not_before(tmp_path):
    settings = Settings(home=tmp_path)
    for version in ("1", "2", "2", "22"):
        counted(tmp_path, version, 3)
    counted(tmp_path, "2", 5, model="another")
    assert online(settings, "2").requests == 6
    assert online(Settings(home=tmp_path, model="another"), "2").requests == 5
    assert forget_deleted(settings, ["1", "2", "22"]) == 0
    assert forget_deleted(settings, ["1", "22"]) == 2
    assert online(settings, "2") is None
    assert online(settings, "22").requests == 3
    assert online(Settings(home=tmp_path, model="another"), "2").requests == 5


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"format": 1}', '{"counts": {"x": 1}}'])
def test_a_damaged_file_of_counts_is_one_sentence(tmp_path, text):
    counted(tmp_path, "2", 1)
    (path,) = (tmp_path / "online").glob("*.json")
    path.write_text(text)
    with pytest.raises(RegistryError, match="delete it"):
        online(Settings(home=tmp_path), "2")


def test_a_version_that_was_never_in_line_has_no_evidence(tmp_path):
    assert online(Settings(home=tmp_path), "1") is None
    assert forget_deleted(Settings(home=tmp_path), []) == 0


def test_the_median_of_the_histogram_is_right_to_a_quarter():
    rng = np.random.default_rng(0)
    times = rng.lognormal(2.0, 1.0, 5000)
    bins = np.bincount(np.searchsorted(BOUNDS_MS, times), minlength=len(BOUNDS_MS) + 1)
    assert median_ms(list(bins)) == pytest.approx(np.median(times), rel=0.1)
    assert median_ms([0] * len(bins)) is None
    assert median_ms([0] * len(BOUNDS_MS) + [3]) == BOUNDS_MS[-1]


def test_a_lane_refuses_what_it_cannot_hold_and_ends_when_it_is_done():
    lane, free = Lane("test", 1, 0.2), threading.Event()
    first = lane.submit(free.wait)
    wait_for(first.running)
    second = lane.submit(lambda: "done")
    with pytest.raises(Exception, match=r"^$") as full:
        lane.submit(free.wait)
    assert full.typename == "Full"
    time.sleep(0.3)
    with pytest.raises(TimeoutError):
        lane.submit(free.wait)
    lane.close()  # with a full queue
    free.set()
    assert second.result(5) == "done"
    lane.end(5)
    assert not lane._thread.is_alive()


def test_a_lane_that_ends_cancels_what_it_has_no_time_for():
    lane, began = Lane("test", 8, 5.0), threading.Event()
    first = lane.submit(lambda: began.set() or time.sleep(0.3))
    assert began.wait(5)
    rest = [lane.submit(lambda: time.sleep(0.3)) for _ in range(8)]
    lane.end(0.1)
    assert not lane._thread.is_alive()
    assert first.done()
    assert all(work.cancelled() for work in rest)


def test_each_decision_knows_how_likely_its_version_was_to_make_it(upstream, tmp_path):
    seen, challenger = [], line_up(v2=bundle(2))
    settings = GatewaySettings(
        strong=Upstream(base_url=f"{upstream}/v1", model="big"),
        weak=Upstream(base_url=f"{upstream}/v1", model="small"),
        poll_s=0.05, challenger="canary", canary_fraction=0.3,
    )  # fmt: skip
    app = create_app(
        settings, Versions(v1=bundle(1)), home=tmp_path, challenger=challenger,
        observers=[seen.append],
    )  # fmt: skip
    with running(app) as url:
        wait_for(lambda: standing(url)["version"] == "2")
        for i in range(30):
            httpx.post(f"{url}/v1/chat/completions", json=query(f"query {i}"))
        wait_for(lambda: len(seen) == 30)
        assert {(e.routed.canary, e.routed.probability) for e in seen} == {
            (True, 0.3),
            (False, 0.7),
        }
        challenger.alias = None
        wait_for(lambda: standing(url)["version"] is None)
        httpx.post(f"{url}/v1/chat/completions", json=query("one more"))
        wait_for(lambda: len(seen) == 31)
    assert seen[-1].routed.probability == 1.0
