"""Prefect servers for tests, and this process as a client of one for a while."""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from tests.support.once import once
from tests.support.servers import Server, _get, free_port

_KEPT = "prefect.db"


@contextmanager
def prefect_server(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, **environment: str
) -> Iterator[Server]:
    """Run a Prefect server at home in a folder; its `url` is the API's.

    The first one of a test run builds its database, for ten seconds; the others get a copy.

    Parameters
    ----------
    **environment
        More variables, of Prefect's settings.
    """
    own = ("ROUTELLM_", "PREFECT_", "MLFLOW_")
    plain = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    folder.mkdir(parents=True, exist_ok=True)
    running = Server(
        [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1",
         "--port", str(port)],
        ready=lambda: _get(f"{url}/api/health"), url=f"{url}/api", folder=folder,
        environment=plain | environment | {
            "PREFECT_HOME": str(folder),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "OMP_NUM_THREADS": "1",
        },
    )  # fmt: skip
    with ExitStack() as around:

        def build(blank: Path) -> None:
            around.enter_context(running)
            with (
                closing(sqlite3.connect(folder / _KEPT)) as database,
                closing(sqlite3.connect(blank / _KEPT)) as copy,
            ):
                database.backup(copy)

        blank = once(tmp_path_factory, "blank-prefect", build)
        if not (folder / _KEPT).exists():
            shutil.copy(blank / _KEPT, folder)
            around.enter_context(running)
        yield running


@contextmanager
def client_of(api: str) -> Iterator[None]:
    """Point Prefect at a server, and send it all events before the block ends.

    Prefect keeps one sender of events a process, with the address that it began with: left behind,
    it would hold up whoever waits for events to be sent later by a minute for each.
    """
    from prefect.events.worker import EventsWorker
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: api}):
        try:
            yield
        finally:
            EventsWorker.drain_all()
