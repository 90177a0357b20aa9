"""Run the gateway: check the port, start the demo upstreams if asked, serve until told to stop."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from routellm.errors import RouteLLMError, UsageError
from routellm.gateway.gateway import Gateway
from routellm.gateway.logs import write_logs
from routellm.gateway.money import Money
from routellm.gateway.source import RouterSource
from routellm.settings import GatewaySettings, Settings, Upstream

if TYPE_CHECKING:
    from routellm.gateway.feedback import FeedbackParts

_DRAIN_S = 30  # for requests in flight, once told to stop
# longer than clients and proxies keep an idle connection (most: a minute), so that it is they who
# close it: a request that is sent while the server closes is lost
_KEEP_ALIVE_S = 75


def serve(
    settings: Settings,
    source: RouterSource,
    challenger: RouterSource | None = None,
    *,
    demo: bool = False,
    worker: str | None = None,
) -> None:
    """Serve until interrupted; on SIGTERM requests in flight are finished first.

    Parameters
    ----------
    source, challenger : RouterSource
        What the champion's and the challenger's alias point at; the second is needed unless
        ``gateway.challenger`` is off.
    worker : str, optional
        ``module:function`` that returns the app in a process of its own, from the settings that it
        finds there; needed where ``gateway.workers`` is more than one.

    Raises
    ------
    UsageError
        If the port is taken, or there is no upstream and `demo` is off.
    """
    import uvicorn

    gateway = settings.gateway
    check_port(gateway.host, gateway.port)
    write_logs(gateway.log_format)
    with contextlib.ExitStack() as stack:
        if demo:
            url = stack.enter_context(running(_demo_app()))
            gateway = gateway.model_copy(
                update={
                    "strong": Upstream(base_url=f"{url}/v1", model="demo-strong"),
                    "weak": Upstream(base_url=f"{url}/v1", model="demo-weak"),
                }
            )
            settings = settings.model_copy(update={"gateway": gateway})
        if gateway.workers == 1:
            app = app_of(settings, source, challenger)
            uvicorn.Server(config_of(app, gateway)).run()
        else:
            # what is wrong with the settings is said once, here
            Gateway(gateway, source, settings.home, challenger)
            # a new SQLite registry is made by one process, not by all workers at once
            with contextlib.suppress(RouteLLMError):
                source.current()
            _serve_from_several(settings, worker)


def app_of(settings: Settings, source: RouterSource, challenger: RouterSource | None) -> Any:
    """Return the gateway's app with everything that settings can say of it."""
    from routellm.gateway.app import create_app

    return create_app(
        settings.gateway,
        source,
        home=settings.home,
        challenger=challenger,
        money=Money.of(settings),
        feedback=_feedback_of(settings) if settings.feedback.enabled else None,
    )


def _feedback_of(settings: Settings) -> FeedbackParts:
    from routellm.augmentation.judge import Judge
    from routellm.feedback import store_url
    from routellm.feedback.store import FeedbackStore
    from routellm.feedback.writer import Writer
    from routellm.gateway.feedback import FeedbackParts

    how = settings.feedback
    redact = None
    if how.store_prompts:
        from routellm.feedback.redact import Redactor

        redact = Redactor(
            cache_dir=settings.home / "gateway" / "redaction", phone_regions=how.phone_regions
        )
    judge = None
    if how.duel_fraction > 0:
        if settings.judge.base_url is None or not how.store_prompts:
            raise UsageError(
                "feedback.duel_fraction needs a judge (judge.base_url), and store_prompts, "
                "without which nothing is learnt from a duel: set both, or set it to 0"
            )
        judge = Judge(settings.judge, settings.verdicts_path)
    writer = Writer(
        FeedbackStore(store_url(settings)),
        capacity=how.queue,
        redact=redact,
        keep_days=how.keep_days,
    )
    return FeedbackParts(how, writer, judge, settings.judge.model)


def config_of(app: Any, gateway: GatewaySettings, **more: Any) -> Any:
    """Return how uvicorn serves the gateway, for whoever serves it: here, or in a test."""
    import uvicorn

    from routellm.gateway.http import BoundedProtocol

    return uvicorn.Config(
        app,
        host=gateway.host,
        port=gateway.port,
        log_level="warning",
        log_config=None,  # `write_logs` says how
        access_log=False,
        http=BoundedProtocol,
        loop="uvloop",
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_DRAIN_S,
        timeout_keep_alive=_KEEP_ALIVE_S,
        **more,
    )


def _serve_from_several(settings: Settings, worker: str | None) -> None:
    """Serve from several processes that accept from one socket; one that dies is replaced.

    They read the settings as this process did, so what was given to this one alone goes to them
    through the environment.
    """
    from uvicorn.supervisors import Multiprocess

    gateway = settings.gateway
    if worker is None:
        raise UsageError("gateway.workers is more than 1, and no worker was named: set it to 1")
    metrics = settings.home / "gateway" / "metrics"
    shutil.rmtree(metrics, ignore_errors=True)
    metrics.mkdir(parents=True)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(metrics.resolve())
    os.environ["ROUTELLM_GATEWAY__WORKERS"] = str(gateway.workers)
    os.environ["ROUTELLM_HOME"] = str(settings.home.resolve())
    for route, upstream in (("STRONG", gateway.strong), ("WEAK", gateway.weak)):
        assert upstream is not None
        if upstream.base_url is not None:
            os.environ[f"ROUTELLM_GATEWAY__{route}__BASE_URL"] = upstream.base_url
        os.environ[f"ROUTELLM_GATEWAY__{route}__MODEL"] = upstream.model
    config = config_of(
        worker, gateway, factory=True, workers=gateway.workers, timeout_worker_healthcheck=30
    )
    Multiprocess(config, sockets=[config.bind_socket()]).run()


def check_port(host: str, port: int, setting: str = "--port") -> None:
    """Refuse a port that something else listens on; `setting` chooses another."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageError(
                f"cannot listen on {host}:{port} ({error.strerror}): stop what listens there or "
                f"choose another with {setting}"
            ) from error


@contextlib.contextmanager
def running(app: Any, *, timeout_s: float = 60.0) -> Iterator[str]:
    """Serve an app on a free local port in a thread; yields its address."""
    import uvicorn

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host="127.0.0.1",
            port=port,
            log_level="warning",
            log_config=None,
            access_log=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
        )
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + timeout_s
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise RouteLLMError(f"a local server did not start on port {port}: try again")
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=35)


def _demo_app() -> Any:
    from routellm.gateway.demo import demo_upstream

    return demo_upstream()
