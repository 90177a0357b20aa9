"""Requests that are wrong in every way: none is a 500, none says a secret, the gateway lives."""

import asyncio
import json
import os
import random

import httpx
import pytest

from tests.support.gateway_process import SECRET, gateway_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

REQUESTS = int(os.environ.get("ROUTELLM_FUZZ_REQUESTS", "2000"))  # 100,000 take minutes
AT_ONCE = 16
PATHS = ["chat/completions", "responses", "completions", "messages", "embeddings", "route",
         "models/x", "nothing", "chat/completions/../../metrics", "%00", "x" * 3000]  # fmt: skip
MODELS = ["router", "big", "router-random-0.5", "router-random-nan", "router-random-1e999", "",
          "router-mf-0.5", "x\r\nset-cookie: a=b", "é\ud800", "router-" + "9" * 500]  # fmt: skip
ODD = [None, True, 0, -1, 1e308, float("nan"), "", "\x00", "\ud800", "a" * 5000, [], {}, [[]],
       {"text": 3}, [{"role": "user"}], [{"role": "user", "content": {"a": 1}}], [None, 7],
       [{"role": ["user"], "content": "x"}], [{"role": "user", "content": [{"type": "text"}]}],
       [{"role": "user", "content": "hello"}]]  # fmt: skip
FIELDS = ["messages", "input", "prompt", "model", "routing", "user", "stream", "n",
          "previous_response_id", "max_tokens", "tools"]  # fmt: skip
HEADERS = [b"x-routellm-threshold", b"x-routellm-strong-fraction", b"x-request-id", b"expect",
           b"authorization", b"content-encoding", b"cookie"]  # fmt: skip
ROUTING = [{"threshold": x} for x in ODD] + [{"strong_fraction": 2}, {"other": 1}, {"threshold": 0}]


def request(rng):
    """Return one request's bytes, wrong in one way or several."""
    doc = {"model": rng.choice(MODELS), "messages": rng.choice(ODD)}
    for _ in range(rng.randrange(4)):
        doc[rng.choice(FIELDS)] = rng.choice(ODD)
    if rng.random() < 0.4:
        doc["routing"] = rng.choice(ROUTING)
    body = json.dumps(doc).encode()
    broken = rng.random()
    if broken < 0.15:
        body = body[: rng.randrange(len(body))]
    elif broken < 0.3:
        at = rng.randrange(len(body))
        body = body[:at] + rng.randbytes(rng.randrange(1, 6)) + body[at:]
    elif broken < 0.35:
        body = b"[" * rng.randrange(1, 50_000)
    elif broken < 0.4:
        body = rng.randbytes(rng.randrange(200))
    headers = [b"host: gateway", b"content-type: application/json"]
    if rng.random() < 0.3:
        name = rng.choice(HEADERS)
        value = rng.choice([b"nan", b"1e400", b"-1", b"\xff\xfe", b"a" * 3000, b"../..", b"0.5"])
        headers.append(name + b": " + value)
    framing = rng.random()
    if framing < 0.75:
        headers.append(b"content-length: %d" % len(body))
    elif framing < 0.85:
        headers.append(b"transfer-encoding: chunked")
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    elif framing < 0.9:
        headers.append(rng.choice([b"content-length: -1", b"content-length: x", b"bad header",
                                   b"content-length: 99999999999", b": empty"]))  # fmt: skip
    elif framing < 0.95:
        headers += [b"x-%d: %s" % (i, b"y" * 1000) for i in range(100)]
    method = rng.choice([b"POST"] * 8 + [b"GET", b"DELETE", b"P\xffST"])
    path = b"/v1/" + rng.choice(PATHS).encode()
    raw = method + b" " + path + b" HTTP/1.1\r\n" + b"\r\n".join(headers) + b"\r\n\r\n" + body
    if rng.random() < 0.05:
        raw = rng.randbytes(rng.randrange(1, 400))
    return raw


async def sent(port, raw):
    """Send bytes on a connection of their own; returns what comes back, in a second at most."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    got = b""
    try:
        writer.write(raw)
        async with asyncio.timeout(1.0):
            got = await reader.readuntil(b"\r\n\r\n")
            async with asyncio.timeout(0.05):
                got += await reader.read(100_000)
    except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
        pass
    finally:
        writer.close()
    return got


async def fuzz(port, n):
    """Return how often each status came, and every answer that should not have."""
    statuses, bad, numbers = {}, [], iter(range(n))

    async def client():
        for i in numbers:
            raw = request(random.Random(i))
            got = await sent(port, raw)
            status = int(got[9:12]) if got.startswith(b"HTTP/1.1 ") else 0
            statuses[status] = statuses.get(status, 0) + 1
            if status >= 500 or SECRET.encode() in got or b"Traceback" in got:
                bad.append((i, raw[:300], got[:300]))
            if b"\nset-cookie" in got.split(b"\r\n\r\n")[0].lower():
                bad.append((i, raw[:300], got[:300]))

    await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    return statuses, bad


def test_no_bad_request_is_a_500_says_a_secret_or_ends_the_process(tmp_path):
    with gateway_process(tmp_path / "home", max_body_bytes=100_000) as (url, process):
        statuses, bad = asyncio.run(fuzz(int(url.rsplit(":", 1)[1]), REQUESTS))
        assert not bad, bad[:3]
        assert process.poll() is None
        fine = {"model": "router", "messages": [{"role": "user", "content": "hello"}]}
        assert httpx.post(f"{url}/v1/chat/completions", json=fine).status_code == 200
        assert httpx.get(f"{url}/readyz").json()["ready"]
    assert {200, 400, 404} <= set(statuses)
    assert sum(statuses.values()) == REQUESTS
    said = (tmp_path / "home" / "stderr").read_text()
    assert SECRET not in said
    assert "Traceback" not in said


def test_a_head_that_has_no_end_is_refused(tmp_path):
    with gateway_process(tmp_path / "home") as (url, _):
        port = int(url.rsplit(":", 1)[1])

        async def pour():
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nx: ")
            poured = 0
            try:
                while poured < 50_000_000:
                    writer.write(b"y" * 65_536)
                    await writer.drain()
                    poured += 65_536
            except OSError:
                pass
            return poured

        assert asyncio.run(pour()) < 20_000_000
        assert httpx.get(f"{url}/healthz").status_code == 200
