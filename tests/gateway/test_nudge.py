"""The nudge: the gateway looks at its alias at once, for whoever may tell it to."""

import json
import time
import uuid

import httpx
import pytest
from mlflow.webhooks.delivery import _generate_hmac_signature as signed_by_mlflow

from benchmarks.mlflow_load import mlflow
from registry import connect
from registry.notify import notify, signature
from routellm.gateway.app import create_app
from routellm.gateway.key_file import add_key
from routellm.gateway.nudge import MOST_NUDGE_BYTES
from routellm.gateway.server import running
from routellm.settings import GatewaySettings, PromotionSettings, Settings, Upstream
from tests.gateway.test_gateway import Versions, bundle, version_at, wait_for
from tests.support.bare import PROMOTE, works
from tests.support.versions import add_version

pytestmark = pytest.mark.slow
SECRET = "s3cret of the nudges"
NOWHERE = "http://127.0.0.1:9/v1"  # no query is sent on here
ENTRY = {"n": 7, "from": "1", "to": "2", "by": "ada", "outcome": "promote"}


class Counted(Versions):
    looks = 0

    def current(self):
        self.looks += 1
        return super().current()


def app_of(source, home, challengers=None, **settings):
    both = {
        "strong": Upstream(base_url=NOWHERE, model="big"),
        "weak": Upstream(base_url=NOWHERE, model="small"),
    }
    options = {"poll_s": 60.0, "nudge_secret": SECRET, **both, **settings}
    return create_app(GatewaySettings(**options), source, home=home, challenger=challengers)


@pytest.fixture
def source():
    return Counted(v1=bundle(1), v2=bundle(2))


@pytest.fixture
def url(source, tmp_path):
    """A gateway that polls once a minute and takes signed nudges."""
    with running(app_of(source, tmp_path)) as at:
        yield at


def mlflow_headers(body, secret=SECRET, at=None):
    delivery, stamp = str(uuid.uuid4()), str(int(time.time()) if at is None else at)
    return {
        "X-MLflow-Delivery-Id": delivery,
        "X-MLflow-Timestamp": stamp,
        "X-MLflow-Signature": signed_by_mlflow(secret, delivery, stamp, body),
    }


def nudge(url, body="{}", headers=None):
    return httpx.post(f"{url}/admin/look", content=body, headers=headers)


def refused(answer, status, code):
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert SECRET not in answer.text
    return True


def test_what_mlflow_signs_has_it_serve_the_new_version_at_once(url, source):
    source.alias = "2"
    body = '{"entity": "model_version_alias", "action": "created", "data": {"alias": "é"}}'
    began = time.monotonic()
    answer = nudge(url, body.encode(), mlflow_headers(body))
    assert answer.status_code == 202
    assert time.monotonic() - began < 2.0
    wait_for(lambda: version_at(url) == "2")


def test_our_own_webhook_nudges_it(url, source):
    source.alias = "2"
    settings = PromotionSettings(webhook_url=f"{url}/admin/look", webhook_secret=SECRET)
    assert notify(settings, "routellm.promote", ENTRY) is None
    wait_for(lambda: version_at(url) == "2")


def test_an_admin_key_nudges_it_and_no_other_key_does(source, tmp_path):
    with running(app_of(source, tmp_path, nudge_secret=None)) as url:
        assert refused(nudge(url), 401, "invalid_api_key")
        _, team = add_key(tmp_path / "keys.json", "team")
        _, admin = add_key(tmp_path / "keys.json", "ops", admin=True)
        assert refused(nudge(url, headers={"x-api-key": team}), 403, "admin_only")
        source.alias = "2"
        time.sleep(0.3)
        assert source.looks == 1  # nothing of this was a nudge
        assert nudge(url, b"", {"authorization": f"Bearer {admin}"}).status_code == 202
        wait_for(lambda: version_at(url) == "2")
        assert refused(nudge(url, "{}", mlflow_headers("{}")), 401, "invalid_signature")


def test_a_signature_that_is_wrong_old_or_of_another_body_is_refused(url, source):
    body, now = json.dumps(ENTRY), int(time.time())
    ours = {"X-RouteLLM-Timestamp": str(now)}
    right = signature(SECRET, str(now), body.encode())
    bad = [
        ("{}", mlflow_headers(body)),
        (body, mlflow_headers(body, secret="another")),
        (body, mlflow_headers(body, at=now - 3600)),
        (body, mlflow_headers(body, at=now + 3600)),
        (body, mlflow_headers(body, at="soon")),
        (body, mlflow_headers(body) | {"X-MLflow-Delivery-Id": "another"}),
        (body, mlflow_headers(body) | {"X-MLflow-Signature": "v1,"}),
        (body, {"X-MLflow-Signature": "\xe9".encode("latin-1")}),
        (body, {"X-RouteLLM-Signature": right}),
        ("{}", ours | {"X-RouteLLM-Signature": right}),
        (body, {"X-RouteLLM-Timestamp": str(now - 1), "X-RouteLLM-Signature": right}),
    ]
    for text, headers in bad:
        assert refused(nudge(url, text, headers), 401, "invalid_signature"), headers
    assert refused(nudge(url, "x" * (MOST_NUDGE_BYTES + 1)), 413, "too_large")
    time.sleep(0.3)
    assert source.looks == 1
    assert nudge(url, body, ours | {"X-RouteLLM-Signature": right}).status_code == 202


def test_however_often_it_is_nudged_it_looks_at_most_ten_times_a_second(url, source):
    began, before = time.monotonic(), source.looks
    with httpx.Client() as http:
        for _ in range(200):
            sent = http.post(f"{url}/admin/look", content="{}", headers=mlflow_headers("{}"))
            assert sent.status_code == 202
    wait_for(lambda: source.looks > before)
    time.sleep(0.3)
    looks, took = source.looks - before, time.monotonic() - began
    assert 1 <= looks <= took / 0.1 + 1


def test_every_process_that_serves_from_the_home_hears_it_and_so_does_the_challenger(tmp_path):
    sources = [Counted(v1=bundle(1), v2=bundle(2), v3=bundle(3)) for _ in range(4)]
    one, other, *challengers = sources
    with (
        running(app_of(one, tmp_path, challengers[0], challenger="shadow")) as url,
        running(app_of(other, tmp_path, challengers[1], challenger="shadow")),
    ):
        wait_for(lambda: all(source.looks == 1 for source in sources))
        assert nudge(url, "{}", mlflow_headers("{}")).status_code == 202
        wait_for(lambda: all(source.looks == 2 for source in sources))


def test_a_nudge_while_it_looks_has_it_look_again(tmp_path):
    class Moved(Counted):
        """Its alias moves, and a nudge comes, while a version is loaded."""

        def load(self, ref):
            if ref.version == "2":
                self.alias = "3"
                assert nudge(url, "{}", mlflow_headers("{}")).status_code == 202
                time.sleep(0.2)
            return super().load(ref)

    source = Moved(v1=bundle(1), v2=bundle(2), v3=bundle(3))
    with running(app_of(source, tmp_path)) as url:
        source.alias = "2"
        nudge(url, "{}", mlflow_headers("{}"))
        wait_for(lambda: version_at(url) == "3")


def test_jitter_spreads_the_looks(tmp_path):
    sources = [Counted(v1=bundle(1), v2=bundle(2)) for _ in range(8)]
    apps = [app_of(s, tmp_path, nudge_jitter_s=3.0) for s in sources]
    followers = [app.state.gateway.follower for app in apps]
    for follower in followers:
        follower.start()
    try:
        for source in sources:
            source.alias = "2"
        began = time.monotonic()
        (tmp_path / "gateway" / "nudged").touch()
        wait_for(lambda: all(f.serving.ref.version == "2" for f in followers))
        first, last = (
            pick(f.served[-1].at.timestamp() for f in followers) for pick in (min, max)
        )  # fmt: skip
        assert last - first > 0.3  # eight of them within that: less likely than one in a million
        assert time.monotonic() - began < 5.0
    finally:
        for follower in followers:
            follower.stop()


def test_an_alias_that_moves_on_a_real_server_is_served_within_seconds(planted, encoder, tmp_path):
    server = mlflow(
        MLFLOW_WEBHOOK_ALLOWED_SCHEMES="http,https", MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS="true"
    )
    with server as at:
        registry = connect(Settings(home=tmp_path / "home", tracking_uri=at.url))
        versions = [add_version(registry, planted, encoder, seed) for seed in (1, 2)]
        with running(app_of(registry, tmp_path / "gateway")) as url:
            hook = registry.client.create_webhook(
                "gateway", f"{url}/admin/look", ["model_version_alias.created"], secret=SECRET
            )
            registry.promote(versions[0], PROMOTE, smoke=works)
            wait_for(lambda: version_at(url) == "1")
            moved = time.monotonic()
            registry.promote(versions[1], PROMOTE, expected="1", smoke=works)
            wait_for(lambda: version_at(url) == "2")
            assert time.monotonic() - moved < 10.0  # and it polls once a minute

            registry.client.delete_webhook(hook.webhook_id)
            registry.rollback(smoke=works)
            settings = PromotionSettings(webhook_url=f"{url}/admin/look", webhook_secret=SECRET)
            assert notify(settings, "routellm.rollback", registry.history()[-1].to_dict()) is None
            wait_for(lambda: version_at(url) == "1")
