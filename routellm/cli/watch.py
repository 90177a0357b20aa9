"""The verb ``routellm watch``: tell Prefect's server of files that arrive in the inbox."""

from __future__ import annotations

import json as json_text
import os
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING

from routellm.cli.context import load_settings, out
from routellm.cli.options import Json

if TYPE_CHECKING:
    from routellm.sources.inbox import Dropped

WATCH = "Example: routellm watch"


def watch(json: Json = False) -> None:
    """Tell Prefect's server of new files in the inbox, until it is stopped."""
    settings = load_settings()
    from flows.engine import configure

    configure(settings)
    from flows.send import server_url
    from flows.watch import payload
    from flows.watch import watch as run

    url = server_url()
    # nothing is half-done at any time: there is nothing to wait for
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))

    def said(what: str) -> None:
        if json:
            _line({"said": what})
        else:
            out.print(f"[yellow]{what}[/]", soft_wrap=True)

    def told(files: Sequence[Dropped]) -> None:
        if json:
            _line({"told": payload(files)})
        else:
            names = ", ".join(one.name for one in files[:5]) + (" …" if len(files) > 5 else "")
            size = sum(one.size_bytes for one in files) / 1e6
            out.print(f"arrived: {names} ({size:,.1f} MB)", soft_wrap=True, markup=False)

    if json:
        _line({"inbox": str(settings.inbox_dir), "server": url})
    else:
        out.print(f"watching {settings.inbox_dir} for {url}", soft_wrap=True)
    run(settings, said, told)


def _line(doc: object) -> None:
    print(json_text.dumps(doc), flush=True)  # noqa: T201
