"""Run the gateway: check the port, start the demo upstreams if asked, serve until told to stop."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from routellm.errors import RouteLLMError, UsageError
from routellm.gateway.source import RouterSource
from routellm.settings import Settings, Upstream


def serve(
    settings: Settings,
    source: RouterSource,
    *,
    demo: bool = False,
    challenger: RouterSource | None = None,
) -> None:
    """Serve until interrupted; on SIGTERM requests in flight are finished first.

    Parameters
    ----------
    source, challenger : RouterSource
        What the champion's and the challenger's alias point at; the second is needed unless
        ``gateway.challenger`` is off.

    Raises
    ------
    UsageError
        If the port is taken, or there is no upstream and `demo` is off.
    """
    import uvicorn

    from routellm.gateway.app import create_app

    gateway = settings.gateway
    check_port(gateway.host, gateway.port)
    with contextlib.ExitStack() as stack:
        if demo:
            url = stack.enter_context(running(_demo_app()))
            gateway = gateway.model_copy(
                update={
                    "strong": Upstream(base_url=f"{url}/v1", model="demo-strong"),
                    "weak": Upstream(base_url=f"{url}/v1", model="demo-weak"),
                }
            )
        app = create_app(
            gateway,
            source,
            home=settings.home,
            cache_path=settings.embeddings_path,
            challenger=challenger,
        )
        config = uvicorn.Config(
            app,
            host=gateway.host,
            port=gateway.port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=30,
        )
        uvicorn.Server(config).run()


def check_port(host: str, port: int) -> None:
    """Refuse a port that something else listens on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageError(
                f"cannot listen on {host}:{port} ({error.strerror}): stop what listens there or "
                "choose another with --port"
            ) from error


@contextlib.contextmanager
def running(app: Any, *, timeout_s: float = 60.0) -> Iterator[str]:
    """Serve an app on a free local port in a thread; yields its address."""
    import uvicorn

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)
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
