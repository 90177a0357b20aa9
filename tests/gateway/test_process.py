"""The gateway as a process: swapped under load, told to stop, killed."""

import asyncio
import signal
import threading
import time

import httpx
import pytest

from routellm.gateway.server import running
from tests.gateway.test_faithful import ASK, gateway
from tests.gateway.test_gateway import Versions, bundle, version_at, wait_for
from tests.support import upstream as scripted
from tests.support.gateway_process import gateway_process
from tests.support.upstream import CHAT, chat_chunk, json_reply, stream_reply

pytestmark = pytest.mark.slow
PER_S = 200


async def paced(url, seconds, statuses, versions):
    """Send `PER_S` requests a second, whether or not earlier ones are answered."""
    limits = httpx.Limits(max_connections=200, max_keepalive_connections=200)
    async with httpx.AsyncClient(limits=limits, timeout=60) as client:

        async def one(i):
            body = {"model": "router", "messages": [{"role": "user", "content": f"query {i}"}]}
            answer = await client.post(f"{url}/v1/chat/completions", json=body)
            statuses.append(answer.status_code)
            versions.append(answer.headers.get("x-routellm-version"))

        began, tasks = time.monotonic(), []
        for i in range(int(PER_S * seconds)):
            await asyncio.sleep(max(0.0, began + i / PER_S - time.monotonic()))
            tasks.append(asyncio.create_task(one(i)))
        await asyncio.gather(*tasks)


def test_swapping_under_200_requests_a_second_loses_none(tmp_path):
    up, source = scripted.Upstream(json_reply(CHAT)), Versions(v1=bundle(1), v2=bundle(2))
    statuses, versions = [], []
    with running(up.app) as behind, gateway(tmp_path, behind, behind, source=source) as url:
        done = threading.Event()

        def swap():
            while not done.is_set():
                for alias in ("2", "1"):
                    source.alias = alias
                    wait_for(lambda want=alias: version_at(url) == want, 30)

        swapper = threading.Thread(target=swap)
        swapper.start()
        asyncio.run(paced(url, 4.0, statuses, versions))
        done.set()
        swapper.join()
    assert len(statuses) == 4 * PER_S
    assert set(statuses) == {200}
    assert set(versions) == {"1", "2"}


def test_told_to_stop_it_finishes_what_it_has_begun(tmp_path):
    up = scripted.Upstream(stream_reply(*[chat_chunk(content="x")] * 8, pause_s=0.2))
    body = {"model": "big", "messages": ASK, "stream": True}
    with running(up.app) as behind:
        one = {"base_url": f"{behind}/v1", "model": "big"}
        with gateway_process(tmp_path / "home", strong=one) as (url, process):
            got = b""
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
                for chunk in answer.iter_raw():
                    if not got:
                        process.send_signal(signal.SIGTERM)
                    got += chunk
            assert got.endswith(b"data: [DONE]\n\n")
            assert process.wait(20) in (0, -signal.SIGTERM)
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/healthz")


def test_killed_and_started_again_it_serves_its_last_good_version(tmp_path):
    home = tmp_path / "home"
    with gateway_process(home) as (url, process):
        assert version_at(url) == "1"
        process.kill()
    with gateway_process(home) as (url, _):
        assert version_at(url) == "1"
        answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "router", "messages": ASK})
        assert answer.status_code == 200
