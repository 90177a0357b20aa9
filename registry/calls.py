"""Calls of MLflow: its errors as one sentence, and another try where the database was busy."""

from __future__ import annotations

import contextlib
import random
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from routellm.errors import RegistryError
from routellm.settings import Settings

T = TypeVar("T")

# what SQLite, PostgreSQL and MLflow itself say when others write at the same time
_BUSY = (
    "database is locked",
    "database table is locked",
    "deadlock detected",
    "could not serialize",
    "too many clients",
    "Model Version creation error",
)
_PATIENCE_S = 30.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.02, 1.0
_PAGE = 1000  # versions at once


@contextlib.contextmanager
def said(settings: Settings) -> Iterator[None]:
    """Turn what MLflow raises into one sentence."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError, OSError) as error:
        # what the database itself said; around it SQLAlchemy says what it was asked
        cause = getattr(error, "orig", None) or getattr(error.__cause__, "orig", None) or error
        first = (str(cause).strip() or type(error).__name__).splitlines()[0]
        raise RegistryError(
            f"MLflow at {redacted(settings.resolved_tracking_uri)} did not do what was asked "
            f"({redacted(first)[:200]}): check that it runs and that `tracking_uri` is right"
        ) from error


def patient(settings: Settings, call: Callable[[], T]) -> T:
    """Call MLflow, and again after a growing random wait while its database is busy.

    For calls that do the same when they are made twice.

    Raises
    ------
    RegistryError
        If it stays busy for half a minute, or fails otherwise.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    end = time.monotonic() + _PATIENCE_S
    wait_s = _FIRST_WAIT_S
    with said(settings):
        while True:
            try:
                return call()
            except (MlflowException, SQLAlchemyError) as error:
                busy = any(words in str(error) for words in _BUSY)
                if not busy or time.monotonic() > end:
                    raise
            time.sleep(random.uniform(wait_s / 2, wait_s))
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


def versions_of(settings: Settings, client: Any, name: str) -> list[Any]:
    """Return all versions of a registered model, oldest first, as MLflow has them."""
    found: list[Any] = []
    token: str | None = ""
    while token is not None:
        page = patient(
            settings,
            partial(
                client.search_model_versions,
                f"name='{name}'",
                max_results=_PAGE,
                order_by=["version_number ASC"],
                page_token=token or None,
            ),
        )
        found += page
        token = page.token or None
    return sorted(found, key=lambda version: int(version.version))


def redacted(text: str) -> str:
    """Return text with the user and password of every address in it hidden."""
    return re.sub(r"//[^@/\s]*@", "//***@", text)
