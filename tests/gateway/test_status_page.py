"""The status page, as it is sent and as a person sees it in a browser.

With ``SCREENSHOTS=<folder>`` in the environment it saves ``status.png`` and ``status-dark.png``
there.
"""

import contextlib
import json
import os
import re
from pathlib import Path

import httpx
import pytest

from routellm.gateway.app import create_app
from routellm.gateway.figures import Figures
from routellm.gateway.key_file import add_key
from routellm.gateway.money import Money
from routellm.gateway.server import running
from routellm.settings import GatewaySettings, Price, Upstream
from tests.gateway.test_gateway import Versions, bundle, version_at, wait_for
from tests.support import upstream as scripted
from tests.support.browser import browser
from tests.support.upstream import CHAT, json_reply

pytestmark = pytest.mark.slow
STRONG, WEAK = "gpt-4-1106-preview", "mixtral-8x7b-instruct-v0.1"
PRICES = {STRONG: Price(input=10, output=30), WEAK: Price(input=0.24, output=0.24)}
HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> & \"so on\""
# what the page's policy kept out, if there was anything
WATCH = """
window.kept_out = [];
document.addEventListener('securitypolicyviolation', e => kept_out.push(e.blockedURI || e.sample));
window.addEventListener('error', e => kept_out.push(e.message));
"""


@contextlib.contextmanager
def gateway(home, source, *, strong=STRONG, challenger=None, **settings):
    up = scripted.Upstream(json_reply(CHAT))
    with running(up.app) as behind:
        options = GatewaySettings(
            strong=Upstream(base_url=f"{behind}/v1", model=strong),
            weak=Upstream(base_url=f"{behind}/v1", model=WEAK),
            poll_s=0.1, strong_fraction=0.3,
            challenger="off" if challenger is None else "shadow", **settings,
        )  # fmt: skip
        app = create_app(options, source, home=home, challenger=challenger, money=Money(PRICES))
        with running(app) as url:
            yield url


def send(url, n, name="query", **body):
    with httpx.Client() as http:
        for i in range(n):
            messages = [{"role": "user", "content": f"{name} {i}"}]
            asked = {"model": "router", "messages": messages, **body}
            http.post(f"{url}/v1/chat/completions", json=asked)


def of_requests(url, n):
    """Return the figures once so many requests are counted; they are a moment after their end."""
    wait_for(lambda: httpx.get(f"{url}/status.json").json()["requests"] == n)
    return httpx.get(f"{url}/status.json").json()


def test_the_figures_are_those_that_prometheus_sees(tmp_path):
    with gateway(tmp_path, Versions(v1=bundle(1))) as url:
        send(url, 60)
        send(url, 1, model="nobody")
        status = of_requests(url, 61)
        figures = Figures.of(httpx.get(f"{url}/metrics").content)
        page = httpx.get(url).text
    decided = figures.by("routellm_decisions_total", "route")
    assert sum(decided.values()) == 60
    assert status["strong_fraction"] == decided["strong"] / 60
    assert status["refused"] == 1
    assert status["usd"] == figures.total("routellm_spent_usd_total") > 0
    assert status["saved_usd"] == figures.total("routellm_saved_usd_total") > 0
    assert sum(status["win_rates"]) == 60
    strong, weak = status["routes"]
    assert (strong["answered"], weak["answered"]) == (decided["strong"], decided["weak"])
    assert weak["input_tokens"] == 100 * weak["answered"]
    assert status["swaps"] == [
        {"at": status["since"], "version": "1", "kind": "random", "from_copy": False}
    ]
    # the page says the same before its script has run
    for place, text in status["shown"]["texts"].items():
        if place != "at":
            assert f'<span data-text="{place}">{text}</span>' in page


def test_it_needs_nothing_from_elsewhere_and_lets_nothing_in(tmp_path):
    with gateway(tmp_path, Versions(v1=bundle(1))) as url:
        answer = httpx.get(url)
        data = httpx.get(f"{url}/status.json")
    assert not re.search(r"(?:https?:)?//(?!www\.w3\.org)\w+\.", answer.text)
    assert not re.search(r"\bstyle=|\bon\w+=", answer.text)
    for one in (answer, data):
        policy = one.headers["content-security-policy"]
        assert policy.startswith("default-src 'none';")
        assert "unsafe" not in policy
        assert one.headers["x-content-type-options"] == "nosniff"
        assert one.headers["cache-control"] == "no-store"


def test_without_a_version_it_says_that_the_fallback_answers(tmp_path):
    source = Versions(v1=bundle(1))
    source.alias = ""
    with gateway(tmp_path, source) as url:
        send(url, 3)
        status = of_requests(url, 3)
        assert "No router" in httpx.get(url).text
    assert (status["state"], status["version"], status["fallbacks"]) == ("fallback", None, 3)
    assert status["problems"][0] == "No router serves: queries go to strong, the fallback."


def test_where_metrics_are_closed_an_admins_key_opens_it_also_as_a_browsers_password(tmp_path):
    tmp_path.mkdir(exist_ok=True)
    _, admin = add_key(tmp_path / "keys.json", "operator", admin=True)
    _, other = add_key(tmp_path / "keys.json", "team")
    with gateway(tmp_path, Versions(v1=bundle(1)), open_metrics=False) as url:
        for path in ("/", "/status.json"):
            refused = httpx.get(f"{url}{path}")
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"].startswith("Basic ")
            assert "random" not in refused.text
            assert httpx.get(f"{url}{path}", auth=("", admin[:-1] + "x")).status_code == 401
            assert httpx.get(f"{url}{path}", auth=("", other)).status_code == 403
            assert httpx.get(f"{url}{path}", auth=("anyone", admin)).status_code == 200
            bearer = {"authorization": f"Bearer {admin}"}
            assert httpx.get(f"{url}{path}", headers=bearer).status_code == 200
            for odd in ("Basic", "Basic ???", "Basic /w==", "Basic é"):
                headers = [(b"authorization", odd.encode())]
                assert httpx.get(f"{url}{path}", headers=headers).status_code == 401


# --- in a browser ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page():
    with browser(1240, 1000) as page:
        page.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        yield page


def shows(page, text):
    return page.wait(f"document.body.innerText.includes({json.dumps(text)})", repr(text), 20)


def picture(page, name):
    if "SCREENSHOTS" in os.environ:
        page.picture(Path(os.environ["SCREENSHOTS"]) / name)


def test_it_follows_what_happens_without_being_opened_again(page, tmp_path):
    source, beside = Versions(v1=bundle(1), v2=bundle(2)), Versions(v3=bundle(3))
    beside.alias = "3"
    with gateway(tmp_path, source, challenger=beside) as url:
        page.open(url)
        page.ask("window.same = 1")
        shows(page, "Version 1 · random")
        shows(page, "of 0 decisions")
        send(url, 250)
        shows(page, "of 250 decisions")
        source.alias = "2"
        wait_for(lambda: version_at(url) == "2")
        send(url, 150, "another query")
        shows(page, "Version 2 · random")
        shows(page, "of 400 decisions")
        shows(page, "Challenger in shadow: version 3")
        swaps = page.ask("document.querySelector('[data-rows=swaps]').innerText")
        assert [row.split("\t")[1:3] for row in swaps.splitlines()] == [
            ["2", "random"], ["1", "random"]
        ]  # fmt: skip
        status = of_requests(url, 400)
        ours = [v for v in status["versions"] if v["mode"] == "champion"]
        strong = sum(v["strong_fraction"] * v["decisions"] for v in ours)
        assert status["strong_fraction"] == pytest.approx(strong / 400)  # not the shadow's
        drawn = page.ask(
            "[...document.querySelectorAll('[data-height]')].map(e => e.getBoundingClientRect())"
            ".map(r => r.height)"
        )
        assert len(drawn) == 20
        tallest = max(range(20), key=status["win_rates"].__getitem__)
        assert drawn[tallest] == max(drawn) > 100
        picture(page, "status.png")
        source.down = True
        shows(page, "Serving, with a problem")
        shows(page, "MLflow does not answer")
        source.down = False
        page.wait("document.documentElement.dataset.state === 'serving'", "an end of it", 20)
        assert page.ask("document.querySelector('.problems').hidden")
        assert page.ask("window.same") == 1
        assert page.ask("window.kept_out") == []
    shows(page, "Not reached")


def test_whatever_a_text_holds_it_is_only_a_text(page, tmp_path):
    source = Versions(v1=bundle(1))
    with gateway(tmp_path, source, strong=HOSTILE) as url:

        def load(ref):
            raise ValueError(HOSTILE)

        source.load, source.alias = load, "2"
        wait_for(lambda: HOSTILE in "".join(httpx.get(f"{url}/status.json").json()["problems"]))
        page.open(url)
        first = page.ask("document.body.innerText")
        at = page.ask("document.querySelector('[data-text=at]').innerText")
        page.wait(f"document.querySelector('[data-text=at]').innerText !== {at!r}", "news", 20)
        for text in (first, page.ask("document.body.innerText")):
            assert text.count(HOSTILE) == 2  # the model, the problem
        assert page.ask("window.hacked === undefined && !document.querySelector('img')")
        assert page.ask("window.kept_out") == []


def test_it_is_light_or_dark_as_its_reader_likes_and_fits_a_phone(page, tmp_path):
    def scheme(value):
        features = [{"name": "prefers-color-scheme", "value": value}]
        page.call("Emulation.setEmulatedMedia", features=features)
        return [
            sum(map(int, re.findall(r"\d+", page.ask(f"getComputedStyle(document.body).{name}"))))
            for name in ("backgroundColor", "color")
        ]

    with gateway(tmp_path, Versions(v1=bundle(1))) as url:
        send(url, 30)
        page.open(url)
        ground, ink = scheme("light")
        assert ground > 600 > 200 > ink
        ground, ink = scheme("dark")
        assert ground < 200 < 600 < ink
        shows(page, "of 30 decisions")
        picture(page, "status-dark.png")
        try:
            page.size(360, 740)
            assert page.ask("document.documentElement.scrollWidth") <= 360
        finally:
            page.size(1240, 1000)
