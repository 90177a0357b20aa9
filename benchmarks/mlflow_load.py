"""What following an alias costs an MLflow server: a lookup, a new version, a webhook; real pollers.

Everything here is real: ``mlflow server`` over SQLite or PostgreSQL, asked over HTTP. The versions
are trained on SIMULATED battles. ``python -m benchmarks.fleet`` uses it for its simulation.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.request import urlopen

import numpy as np
import psutil
from numpy.typing import NDArray

from tests.support.servers import Server, free_port, postgres

BATTLES = 20_000
MODEL = "router"
_LOADS = 5
_KEPT_S = 4.0  # uvicorn closes a connection that was idle for five
_LOOKUP = f"/api/2.0/mlflow/registered-models/get?name={MODEL}"  # what `Registry.current` asks

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Load:
    """What a replica costs when it takes a new version.

    Attributes
    ----------
    requests, records : int
        HTTP requests to MLflow, and how many of them are for records rather than files.
    mb : float
        Megabytes (10**6) that the answers carry.
    server_s, own_s : float
        CPU seconds of the server, and of the replica (encoder loaded, golden predictions checked).
    """

    requests: int
    records: int
    mb: float
    server_s: float
    own_s: float


@dataclass(frozen=True)
class Polled:
    """What real pollers saw: seconds of each answer (m,); seconds from the move to seeing it (n,).

    Attributes
    ----------
    per_s : float
        Lookups a second.
    """

    response_s: Floats
    seen_s: Floats
    per_s: float


@contextlib.contextmanager
def mlflow(backend: str = "sqlite", *, workers: int = 1, **environment: str) -> Iterator[Server]:
    """Run `mlflow server` over SQLite or PostgreSQL, with artifacts in a folder that it serves."""
    own = ("MLFLOW_", "ROUTELLM_", "PREFECT_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    off = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="routellm-")))
        uri = f"sqlite:///{folder / 'mlflow.db'}"
        if backend == "postgresql":
            uri = stack.enter_context(postgres()).url
        url = f"http://127.0.0.1:{(port := free_port())}"
        yield stack.enter_context(
            Server(
                [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1",
                 "--port", str(port), "--workers", str(workers), "--backend-store-uri", uri,
                 "--serve-artifacts", "--artifacts-destination", str(folder / "artifacts")],
                ready=lambda: urlopen(f"{url}/health", timeout=5).close(),
                url=url, folder=folder, environment=kept | off | environment,
            )
        )  # fmt: skip


def registered(url: str, home: Path, kinds: tuple[str, ...]) -> Any:
    """Register a version of each kind, trained on SIMULATED battles; returns the registry."""
    from benchmarks.simulated import draw_battles
    from registry import connect
    from registry.log import log_version, retraining_run
    from routellm.bundle import Bundle, golden_predictions
    from routellm.calibration import Calibration
    from routellm.embeddings import get_encoder
    from routellm.evaluation.benchmarks import Benchmark
    from routellm.evaluation.evaluate import evaluate
    from routellm.settings import EmbeddingSettings, Settings
    from routellm.training import train
    from tests.support.versions import MANIFEST

    registry = connect(Settings(home=home, tracking_uri=url, model=MODEL))
    encoder, battles = get_encoder(EmbeddingSettings()), draw_battles(BATTLES)
    prompts = battles.prompts[:100]
    with retraining_run(registry, MANIFEST) as parent:
        for kind in kinds:
            router, report = train(kind, battles, encoder, seed=0)
            rates = router.win_rate(prompts)
            table = Benchmark("test", prompts, {
                battles.pair.strong: np.ones(100),
                battles.pair.weak: (np.arange(100) % 2).astype(float),
            })  # fmt: skip
            rng = np.random.default_rng(0)
            log_version(
                registry,
                Bundle(router, EmbeddingSettings(), Calibration.of(rates, "test"),
                       golden_predictions(router, prompts), MANIFEST.digest, True, "benchmark"),
                report, {"test": evaluate(rates, table, router.pair, rng=rng, resamples=100)},
                MANIFEST, training_key=kind, speed={}, parent_run_id=parent,
            )  # fmt: skip
    return registry


def load_of(registry: Any, server: Server, version: str) -> Load:
    """Load a version as a gateway does, once for nothing and then to measure."""
    from requests.adapters import HTTPAdapter

    from routellm.gateway.source import VersionRef

    requests, records, mb, send = 0, 0, 0.0, HTTPAdapter.send
    counting = threading.Lock()

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal requests, records, mb
        answer = send(*args, **kwargs)
        with counting:
            requests += 1
            records += "/mlflow-artifacts/" not in answer.url
            mb += int(answer.headers.get("content-length", 0)) / 1e6
        return answer

    def load() -> None:
        bundle = registry.load(VersionRef(MODEL, version))
        bundle.check_golden()

    load()
    with mock.patch.object(HTTPAdapter, "send", counted):
        server_cpu, own_cpu = cpu_s(server), time.process_time()
        for _ in range(_LOADS):
            load()
        own_s = (time.process_time() - own_cpu) / _LOADS
    server_s = (cpu_s(server) - server_cpu) / _LOADS
    return Load(requests // _LOADS, records // _LOADS, mb / _LOADS, server_s, own_s)


def cpu_s(server: Server) -> float:
    """Return the CPU seconds that a server and its children have taken."""
    assert server._process is not None
    root = psutil.Process(server._process.pid)
    return float(sum(sum(p.cpu_times()[:2]) for p in [root, *root.children(recursive=True)]))


def lookup_s(server: Server, n: int = 400) -> tuple[Floats, float]:
    """Return the seconds of n lookups, one at a time (n,), and the server's CPU seconds for one."""
    ask = _asker(server.url)
    for _ in range(30):
        ask()
    took = np.empty(n)
    cpu = cpu_s(server)
    for i in range(n):
        began = time.perf_counter()
        ask()
        took[i] = time.perf_counter() - began
    return took, (cpu_s(server) - cpu) / n


def poll(
    server: Server, move: Any, *, pollers: int, poll_s: float, seconds: float, nudged: bool
) -> Polled:
    """Poll from so many threads; move the alias when the time is up, and wait until all saw it.

    Parameters
    ----------
    move : callable
        Moves the alias; every answer must then differ from those before.
    nudged : bool
        Wake all pollers at once when the alias has moved.
    """
    began = time.perf_counter()
    took: list[float] = []
    moved_at, seen = [np.inf], [0.0] * pollers
    phase = np.random.default_rng(0).uniform(0.0, poll_s, pollers)
    wake, adding = threading.Event(), threading.Lock()

    def poller(i: int) -> None:
        ask = _asker(server.url)
        first, wait_s = None, phase[i]
        while not seen[i]:
            (wake if not wake.is_set() else threading.Event()).wait(wait_s)
            sent = time.perf_counter()
            answer = ask()
            now, wait_s = time.perf_counter(), poll_s
            first = first or answer
            if answer != first:
                seen[i] = now
            elif sent > began + poll_s and now < moved_at[0]:
                with adding:
                    took.append(now - sent)

    threads = [threading.Thread(target=poller, args=(i,), daemon=True) for i in range(pollers)]
    for one in threads:
        one.start()
    time.sleep(seconds)
    moved_at[0] = time.perf_counter()
    move()
    if nudged:
        wake.set()
    for one in threads:
        one.join(60)
    if not all(seen):
        raise RuntimeError(f"{seen.count(0.0)} of {pollers} pollers did not see the move")
    return Polled(
        np.array(took), np.array(seen) - moved_at[0], len(took) / (seconds - poll_s)
    )  # fmt: skip


def webhooks_per_s(client: Any, n: int = 100) -> float:
    """Return how many of n webhooks MLflow posts a second, when an alias moves."""
    arrived: list[float] = []

    class Receiver(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            arrived.append(time.perf_counter())
            self.send_response(202)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    receiver = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{receiver.server_port}/"
    made = [
        client.create_webhook(f"w{i}", url, ["model_version_alias.created"], secret="s")
        for i in range(n)
    ]
    client.set_registered_model_alias(MODEL, "other", "1")
    end = time.monotonic() + 60
    while len(arrived) < n and time.monotonic() < end:
        time.sleep(0.05)
    receiver.shutdown()
    receiver.server_close()
    for one in made:
        client.delete_webhook(one.webhook_id)
    if len(arrived) < n:
        raise RuntimeError(f"{len(arrived)} of {n} webhooks arrived in a minute")
    return (n - 1) / (arrived[-1] - arrived[0])


def _asker(url: str) -> Any:
    """Return a function that looks the alias up over a connection that it keeps."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    used = 0.0

    def ask() -> bytes:
        nonlocal used
        if time.monotonic() - used > _KEPT_S:
            connection.close()  # the next request opens it again
        connection.request("GET", _LOOKUP)
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"MLflow answered {answer.status}")
        used = time.monotonic()
        return body

    return ask
