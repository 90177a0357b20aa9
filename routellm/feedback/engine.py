"""The database behind a feedback store: its address, and how it is connected to."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import Connection, Engine
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from routellm import sqlite
from routellm.errors import UsageError

_FORMS = "give sqlite:///path or postgresql://user@host/database"


def parse_url(url: str) -> URL:
    """Return an address in parts; a path alone is SQLite.

    Raises
    ------
    UsageError
        If it is of no database that a feedback store can be in.
    """
    if "://" not in url:
        return URL.create("sqlite", database=str(Path(url).expanduser().resolve()))
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise UsageError("the feedback store's address cannot be read: " + _FORMS) from error
    driver = parsed.drivername.split("+")[0]
    if driver == "sqlite" and parsed.database:
        path = Path(parsed.database).expanduser().resolve()
        return URL.create("sqlite", database=str(path))
    if driver in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    raise UsageError(f"no feedback store {driver}: " + _FORMS)


def engine_of(url: URL) -> Engine:
    """Return what connects to a database.

    Raises
    ------
    UsageError
        If PostgreSQL's client is not installed.
    """
    if url.drivername == "sqlite":
        path = Path(str(url.database))

        def connect() -> sqlite3.Connection:
            connection = sqlite.connect(path)
            connection.isolation_level = None  # transactions begin where we say so
            connection.execute("PRAGMA secure_delete=ON")  # what is deleted is overwritten
            return connection

        engine = sa.create_engine(
            "sqlite://", creator=connect, poolclass=sa.NullPool, hide_parameters=True
        )

        @sa.event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

        return engine
    try:
        return sa.create_engine(
            url,
            pool_size=1,
            max_overflow=2,
            pool_pre_ping=True,
            hide_parameters=True,  # an error's text must not hold a prompt
            connect_args={"connect_timeout": 5, "application_name": "routellm-feedback"},
        )
    except ModuleNotFoundError as error:
        raise UsageError(
            f"a feedback store in PostgreSQL needs {error.name}: pip install "
            "'routellm-mlops[postgres]'"
        ) from error
