"""``routellm up`` and ``routellm down``: the whole of it on one machine."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live

from routellm.cli.context import load_settings, out, print_json
from routellm.cli.options import Json
from routellm.errors import RouteLLMError
from routellm.supervise import Part, Supervisor, end_leftovers, ends_within, recorded

if TYPE_CHECKING:
    from routellm.settings import Settings

UP = "Example: routellm up; routellm up --demo"
DOWN = "Example: routellm down"

TICK_S = 0.5
_DOWN_S = 150.0  # for all parts to end


def up(
    demo: Annotated[
        bool, typer.Option(help="Serve through two built-in echo upstreams (SIMULATED answers).")
    ] = False,
) -> None:
    """Run all of it here: Prefect's server, a worker, MLflow, the inbox's watch, the gateway.

    Ctrl-C (or `routellm down` elsewhere) stops it; what was under way goes on at the next start.
    """
    from routellm.cli.screen import Screen

    settings = load_settings()
    demo = demo or settings.gateway.strong is None or settings.gateway.weak is None
    _refuse_taken_ports(settings)
    supervisor = Supervisor(parts_of(settings, demo=demo), settings.home)
    stopping = _Stopping()
    settings.inbox_dir.mkdir(parents=True, exist_ok=True)
    for leftover in supervisor.start():
        out.print(f"[yellow]ended {leftover}, which an `up` that was killed had left running[/]")
    screen = Screen(supervisor, settings, demo=demo)
    try:
        if out.is_terminal:
            with Live(console=out, auto_refresh=False, screen=False) as live:
                while not stopping.asked:
                    supervisor.tick()
                    live.update(screen.render(), refresh=True)
                    stopping.wait(TICK_S)
        else:
            while not stopping.asked:
                supervisor.tick()
                for line in screen.news():
                    out.print(line, markup=False, soft_wrap=True)
                stopping.wait(TICK_S)
    finally:
        out.print("stopping (a second Ctrl-C does not hurry it):", end=" ")
        killed = supervisor.stop(lambda name: out.print(name, end=" "))
        out.print()
        for name in killed:
            out.print(f"[yellow]{name} did not end in time and was killed[/]")
    out.print("Stopped. `routellm up` goes on where this was.")


def down(json: Json = False) -> None:
    """Stop what `routellm up` runs, also what one that was killed left behind."""
    settings = load_settings()
    running = recorded(settings.home)
    supervisor = running.get("supervisor")
    if supervisor is not None:
        supervisor.send_signal(signal.SIGTERM)
        if not ends_within(supervisor, _DOWN_S):
            raise RouteLLMError(
                f"`routellm up` (process {supervisor.pid}) has not stopped within {_DOWN_S:.0f} s: "
                "look at its screen, or end it with kill -9 and run `routellm down` again"
            )
        ended = [name for name in running if name != "supervisor"]
    else:
        ended = end_leftovers(settings.home)
        (settings.home / "up.json").unlink(missing_ok=True)
    if json:
        print_json({"stopped": ended})
    elif ended:
        out.print(f"stopped: {', '.join(ended)}")
    else:
        out.print(f"nothing runs for {settings.home}")


def parts_of(settings: Settings, *, demo: bool) -> list[Part]:
    """Return the parts of one machine; what the settings place elsewhere is left out."""
    python, home = sys.executable, settings.home.resolve()
    api, parts = prefect_api(settings), []
    shared = {
        "ROUTELLM_HOME": str(home),
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_API_URL": api,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONUNBUFFERED": "1",
        # runs of a worker start elsewhere: routellm.toml and relative sources are here
        "ROUTELLM_WORKERS__FOLDER": str(settings.workers.folder or Path.cwd()),
    }
    here = "PREFECT_API_URL" not in os.environ
    if here:
        host, port = settings.up.host, str(settings.up.prefect_port)
        parts.append(
            Part(
                "prefect",
                (python, "-m", "prefect", "server", "start", "--host", host, "--port", port),
                ready=f"{api}/health",
                url=api.removesuffix("/api"),
                # the server must not ask itself, nor need telemetry to be told off twice
                environment={k: v for k, v in shared.items() if k != "PREFECT_API_URL"},
            )
        )
    after = ("prefect",) if here else ()
    if settings.tracking_uri is None:
        root = f"http://{settings.up.host}:{settings.up.mlflow_port}"
        parts.append(
            Part(
                "mlflow",
                (python, "-m", "registry.database", settings.resolved_tracking_uri,
                 python, "-m", "mlflow", "server", "--host", settings.up.host,
                 "--port", str(settings.up.mlflow_port), "--workers", "1",
                 "--backend-store-uri", settings.resolved_tracking_uri),
                ready=f"{root}/health",
                url=root,
                after=after,  # two servers that build their databases at once take twice as long
                environment={**shared, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )
        )  # fmt: skip
    command = (python, "-m", "routellm.cli")
    parts.append(
        Part(
            "deploy",
            # a server of others may have workers elsewhere
            (*command, "deploy", "--first-retraining", *(["--resume"] if here else [])),
            after=after,
            once=True,
            environment=shared,
        )
    )
    train = {"ROUTELLM_WORKERS__TRAIN": os.environ.get("ROUTELLM_WORKERS__TRAIN", "deployments")}
    pools = [settings.workers.cpu_pool]
    if Path("/dev/nvidiactl").exists():
        pools.append(settings.workers.gpu_pool)
    for pool in pools:
        name = f"{pool}-{socket.gethostname()}"
        parts.append(
            Part(
                f"worker-{pool}",
                (python, "-m", "prefect", "worker", "start", "--pool", pool, "--name", name,
                 "--type", "process", "--limit", str(settings.up.runs_at_once),
                 "--install-policy", "never"),
                after=("deploy",),
                environment={**shared, **train},
            )
        )  # fmt: skip
    parts.append(Part("watch", (*command, "watch"), after=("deploy",), environment=shared))
    gateway = settings.gateway.url
    parts.append(
        Part(
            "gateway",
            (*command, "serve", *(["--demo"] if demo else [])),
            # 503 while no router serves; the fallback answers, so the part is up
            ready=f"{gateway}/healthz",
            url=gateway,
            environment=shared,
            stop_s=45.0,  # it drains for 30
        )
    )
    return parts


def prefect_api(settings: Settings) -> str:
    """Return the address of Prefect's API: one that is set, or the one that `up` starts."""
    own = f"http://{settings.up.host}:{settings.up.prefect_port}/api"
    return os.environ.get("PREFECT_API_URL", own)


def _refuse_taken_ports(settings: Settings) -> None:
    from routellm.gateway.server import check_port

    wanted = {"gateway.port": (settings.gateway.host, settings.gateway.port)}
    if "PREFECT_API_URL" not in os.environ:
        wanted["up.prefect_port"] = (settings.up.host, settings.up.prefect_port)
    if settings.tracking_uri is None:
        wanted["up.mlflow_port"] = (settings.up.host, settings.up.mlflow_port)
    leftovers = [p for p in recorded(settings.home).values() if p.pid != os.getpid()]
    if leftovers:
        return  # theirs: they are ended first, or the running `up` is named
    for name, (host, port) in wanted.items():
        check_port(host, port, f"the setting `{name}`")


class _Stopping:
    """Whether Ctrl-C or SIGTERM asked for the end."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.asked and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
