"""The gateway between a client and upstreams that answer at once: what it adds, what it carries.

Everything is local: a stub upstream in a process of its own, the gateway as it is served, and a
client that keeps so many requests on their way at any time (a closed loop). The client and the
stub share the cores with the gateway, so the figures are lower bounds of what it can do.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ANSWER = json.dumps(
    {
        "id": "chatcmpl-stub", "object": "chat.completion", "created": 1, "model": "stub",
        "choices": [{"index": 0, "finish_reason": "stop",
                     "message": {"role": "assistant", "content": "All right."}}],
        "usage": {"prompt_tokens": 20, "completion_tokens": 3, "total_tokens": 23},
    }
).encode()  # fmt: skip
CONCURRENT = (1, 10, 50, 100)
PER_S = 300
SECONDS = 6.0
WARM_UP_S = 1.5
BATTLES = 20_000
_NUMBERS = itertools.count()  # a prompt is new in the whole run


@dataclass(frozen=True)
class Load:
    """What a closed loop measured: latencies in milliseconds, requests a second."""

    p50_ms: float
    p99_ms: float
    per_s: float
    failed: int
    n: int


class _Stub(asyncio.Protocol):
    """An upstream that answers whatever comes, at once."""

    _REPLY = (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: "
        + str(len(ANSWER)).encode() + b"\r\n\r\n" + ANSWER
    )  # fmt: skip

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.left = b""

    def data_received(self, data: bytes) -> None:
        self.left += data
        while (end := self.left.find(b"\r\n\r\n")) >= 0:
            head = self.left[:end].lower()
            at = head.find(b"content-length:")
            size = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.left) < end + 4 + size:
                return
            self.left = self.left[end + 4 + size :]
            self.transport.write(self._REPLY)


def _stub(port: int) -> None:
    import uvloop

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(_Stub, "127.0.0.1", port)
        await server.serve_forever()

    uvloop.run(run())


def _gateway(port: int, stub: int, home: str, kind: str) -> None:
    """Serve with a router that is trained here: `random` reads no embedding, `knn` does."""
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    import uvicorn

    from routellm.gateway.server import app_of, config_of
    from routellm.settings import GatewaySettings, Settings, Upstream

    url = f"http://127.0.0.1:{stub}/v1"
    gateway = GatewaySettings(
        port=port,
        strong=Upstream(base_url=url, model="big"),
        weak=Upstream(base_url=url, model="small"),
        max_concurrent=1000,
    )
    settings = Settings(home=Path(home), gateway=gateway)
    uvicorn.Server(config_of(app_of(settings, _Trained(kind), None), gateway)).run()


class _Trained:
    """A source with one version, trained on SIMULATED battles when it is loaded."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def current(self) -> Any:
        from routellm.gateway.source import VersionRef

        return VersionRef("benchmark", "1")

    def load(self, ref: Any) -> Any:
        from benchmarks.simulated import draw_battles
        from routellm.bundle import Bundle
        from routellm.calibration import Calibration
        from routellm.embeddings import get_encoder
        from routellm.settings import EmbeddingSettings
        from routellm.training import train

        # vectors are drawn, so what is learnt means nothing; answering takes as long as ever
        router, _ = train(
            self.kind, draw_battles(BATTLES), get_encoder(EmbeddingSettings()), seed=0
        )
        sample = router.win_rate([f"What is {i}?" for i in range(50)])
        return Bundle(
            router=router, embedding=EmbeddingSettings(), calibration=Calibration.of(sample, "-"),
            golden=(), snapshot="simulated", simulated=True, code_version="benchmark",
        )  # fmt: skip


async def load(
    port: int,
    concurrent: int,
    seconds: float,
    *,
    repeated: bool = False,
    per_s: float | None = None,
) -> Load:
    """Keep `concurrent` requests on their way; every prompt is new unless `repeated`.

    With `per_s` the clients together send so many requests a second instead, evenly.
    """
    took: list[float] = []
    failed = 0
    began = time.perf_counter()
    measured_from, end = began + WARM_UP_S, began + WARM_UP_S + seconds

    async def client(i: int) -> None:
        nonlocal failed
        turn = began + (i / per_s if per_s else 0.0)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() < end:
            if per_s:
                await asyncio.sleep(max(0.0, turn - time.perf_counter()))
                turn += concurrent / per_s
            n = next(_NUMBERS) % 50 if repeated else next(_NUMBERS)
            prompt = f"What is the {n}th thing that one should know of the number {n * 7919}?"
            body = json.dumps(
                {"model": "router", "messages": [{"role": "user", "content": prompt}]}
            ).encode()
            sent = time.perf_counter()
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\ncontent-type: "
                b"application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
            )
            head = await reader.readuntil(b"\r\n\r\n")
            at = head.lower().find(b"content-length:")
            size = int(head[at + 15 :].split(b"\r\n", 1)[0])
            await reader.readexactly(size)
            if not head.startswith(b"HTTP/1.1 200"):
                failed += 1
            if sent >= measured_from:
                took.append(1000.0 * (time.perf_counter() - sent))
        writer.close()

    await asyncio.gather(*(client(i) for i in range(concurrent)))
    cuts = statistics.quantiles(took, n=100)
    return Load(cuts[49], cuts[98], len(took) / seconds, failed, len(took))


@contextmanager
def served(kind: str) -> Iterator[tuple[int, int, psutil.Process]]:
    """Run a stub and a gateway in front of it; yields their ports and the gateway's process."""
    context = multiprocessing.get_context("spawn")
    stub, port = _free_port(), _free_port()
    with tempfile.TemporaryDirectory() as home:
        processes = [
            context.Process(target=_stub, args=(stub,), daemon=True),
            context.Process(target=_gateway, args=(port, stub, home, kind), daemon=True),
        ]
        for process in processes:
            process.start()
        try:
            _wait(port)
            _wait(stub)
            yield port, stub, psutil.Process(processes[1].pid)
        finally:
            for process in processes:
                process.terminate()
                process.join(20)


def measure() -> list[tuple[str, str]]:
    """Return the rows of the table."""
    rows = []
    for kind, label in (("random", "without the encoder"), ("knn", "with it, every prompt new")):
        with served(kind) as (port, stub, _):
            for concurrent in CONCURRENT:
                direct = asyncio.run(load(stub, concurrent, SECONDS / 2))
                through = asyncio.run(load(port, concurrent, SECONDS))
                rows.append((f"gateway {label}, {concurrent} at once", _told(direct, through)))
            if kind == "random":
                direct = asyncio.run(load(stub, 50, SECONDS / 2, per_s=PER_S))
                through = asyncio.run(load(port, 50, SECONDS, per_s=PER_S))
                rows.append((f"gateway {label}, 50 clients that send {PER_S} a second together",
                             _told(direct, through)))  # fmt: skip
            else:
                direct = asyncio.run(load(stub, 50, SECONDS / 2))
                through = asyncio.run(load(port, 50, SECONDS, repeated=True))
                rows.append(("gateway with it, 50 prompts again and again, 50 at once",
                             _told(direct, through)))  # fmt: skip
    return rows


def memory(requests: int = 100_000, kind: str = "random") -> list[tuple[str, str]]:
    """Return the gateway's memory as requests go by."""
    rows = []
    with served(kind) as (port, _, process):
        done = 0
        at = {5_000: 0.0, requests // 2: 0.0, requests: 0.0}
        for mark in at:
            while done < mark:
                done += asyncio.run(load(port, 20, 2.0)).n
            at[mark] = process.memory_info().rss / 1e6
            rows.append((f"gateway's memory after {done:,} requests", f"{at[mark]:.0f} MB"))
    return rows


def _told(direct: Load, through: Load) -> str:
    added_50, added_99 = through.p50_ms - direct.p50_ms, through.p99_ms - direct.p99_ms
    carried = f"{through.per_s:,.0f} requests/s"
    failed = f", {through.failed} FAILED" if through.failed else ""
    return f"adds {added_50:.1f} ms p50, {added_99:.1f} ms p99; {carried}{failed}"


def _wait(port: int, timeout_s: float = 120.0) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise SystemExit(f"nothing listens on port {port}")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


if __name__ == "__main__":
    for name, value in memory() if "memory" in sys.argv else measure():
        print(f"{name:70} {value}")
