"""The webhook: what it is sent, and that it can never be in the way."""

import hashlib
import hmac
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from registry.notify import notify
from routellm.settings import PromotionSettings

ENTRY = {"n": 7, "from": "3", "to": "4", "by": "ada", "outcome": "promote"}


@pytest.fixture
def receiver():
    """Yields (address, list of received (headers, body), list of statuses to answer first)."""
    received, first = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((dict(self.headers), body))
            self.send_response(first.pop(0) if first else 204)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook?token=hush", received, first
    server.shutdown()
    server.server_close()


def test_it_is_sent_the_entry_signed_with_the_time(receiver):
    url, received, _ = receiver
    settings = PromotionSettings(webhook_url=url, webhook_secret="s3cret")
    assert notify(settings, "routellm.promote", ENTRY) is None
    ((headers, body),) = received
    assert json.loads(body) == {"event": "routellm.promote", **ENTRY}
    signed = headers["X-RouteLLM-Timestamp"].encode() + b"." + body
    expected = hmac.new(b"s3cret", signed, hashlib.sha256).hexdigest()
    assert headers["X-RouteLLM-Signature"] == f"sha256={expected}"


def test_what_can_pass_is_tried_again_with_growing_waits(receiver):
    url, received, first = receiver
    first += [503, 429]
    waits = []
    settings = PromotionSettings(webhook_url=url)
    assert notify(settings, "routellm.promote", ENTRY, wait=waits.append) is None
    assert len(received) == 3
    assert 0.25 <= waits[0] <= 0.5 <= waits[1] <= 1.0
    assert "X-RouteLLM-Signature" not in received[0][0]


def test_a_refusal_is_not_repeated_and_is_told_without_the_address_secrets(receiver):
    url, received, first = receiver
    first += [403]
    said = notify(PromotionSettings(webhook_url=url), "routellm.promote", ENTRY)
    assert len(received) == 1
    assert "answered 403" in said
    assert "hush" not in said


def test_one_that_never_answers_is_given_up_without_an_error():
    settings = PromotionSettings(webhook_url="http://127.0.0.1:9/hook", webhook_attempts=3)
    waits = []
    said = notify(settings, "routellm.promote", ENTRY, wait=waits.append)
    assert "ConnectError" in said
    assert len(waits) == 2


def test_without_an_address_nothing_is_sent():
    assert notify(PromotionSettings(), "routellm.promote", ENTRY) is None
