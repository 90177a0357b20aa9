"""One PostgreSQL for all tests of a process; each test that needs an empty one makes a database."""

from __future__ import annotations

import atexit
import functools
import os
import uuid
import warnings
from contextlib import ExitStack

import pytest

from tests.support.servers import NO_POSTGRES, Server, postgres, postgres_programs


def shared_postgres(what: str) -> Server:
    """Return this process's PostgreSQL, started when it is first asked for.

    Where its programs are missing, the test fails in CI; elsewhere it is skipped, and a warning
    says so: `what` is its beginning, such as "feedback was". Who kills the server starts it again.
    """
    if postgres_programs() is None:
        if os.environ.get("CI"):
            pytest.fail(NO_POSTGRES)
        warnings.warn(f"{what} NOT tested on PostgreSQL: {NO_POSTGRES}", stacklevel=2)
        pytest.skip(NO_POSTGRES)
    return _started()


@functools.cache
def _started() -> Server:
    running = ExitStack()
    atexit.register(running.close)  # and its guard ends it where this process is killed
    return running.enter_context(postgres())


def new_database(server: Server) -> str:
    """Return the address of an empty database."""
    import psycopg

    name = f"test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return server.url.rsplit("/", 1)[0] + f"/{name}"
