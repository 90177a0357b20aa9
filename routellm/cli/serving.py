"""The verb that serves, and what a process of it starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from routellm.cli.context import load_settings, out, print_json, registry_of
from routellm.cli.options import Json
from routellm.errors import UsageError

if TYPE_CHECKING:
    from routellm.settings import Settings

SERVE = "Example: routellm serve --demo; routellm serve --workers 4"


def serve(
    demo: Annotated[bool, typer.Option(help="Two built-in echo upstreams.")] = False,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that serve.")] = None,
    json: Json = False,
) -> None:
    """Run the gateway: it speaks OpenAI's protocols, and follows the champion."""
    from routellm.gateway.server import serve as run
    from routellm.settings import GatewaySettings

    settings = load_settings()
    given = {"host": host, "port": port, "workers": workers}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        gateway = GatewaySettings.model_validate({**settings.gateway.model_dump(), **given})
    except ValueError as error:
        raise UsageError(f"--host, --port or --workers is not allowed: {given}") from error
    settings = settings.model_copy(update={"gateway": gateway})
    url = f"http://{gateway.host}:{gateway.port}/v1"
    if json:
        print_json({"url": url, "alias": gateway.alias, "demo": demo})
    else:
        out.print(
            f"gateway on [bold]{url}[/], following {settings.model}@{gateway.alias}"
            + (", DEMO upstreams" if demo else "")
            + (f", {gateway.workers} processes" if gateway.workers > 1 else "")
            + ("" if gateway.challenger == "off" else f", challenger in {gateway.challenger}")
        )
    run(settings, *sources(settings), demo=demo, worker="routellm.cli.serving:worker")


def worker() -> Any:
    """Return the app of one of several processes, from the settings that it finds."""
    from routellm.gateway.logs import write_logs
    from routellm.gateway.server import app_of

    settings = load_settings()
    write_logs(settings.gateway.log_format)
    return app_of(settings, *sources(settings))


def sources(settings: Settings) -> tuple[_LazySource, _LazySource]:
    """Return what the champion's and the challenger's alias point at."""
    beside = settings.gateway.model_copy(update={"alias": "challenger"})
    return _LazySource(settings), _LazySource(settings.model_copy(update={"gateway": beside}))


class _LazySource:
    """The registry as the gateway's source, connected at each look until it answers once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._registry: Any = None

    def _connected(self) -> Any:
        if self._registry is None:
            self._registry = registry_of(self._settings)
        return self._registry

    def current(self) -> Any:
        return self._connected().current()

    def load(self, ref: Any) -> Any:
        return self._connected().load(ref)
