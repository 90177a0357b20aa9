"""The registry on both of its backends: SQLite, and an MLflow server on PostgreSQL and S3."""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Iterator

import pytest

from registry import Registry, connect
from routellm.settings import Settings
from tests.support.servers import NO_POSTGRES, Stack, mlflow_stack, postgres_programs


@pytest.fixture(scope="session")
def servers() -> Iterator[Stack]:
    """An MLflow server on PostgreSQL and S3; started once, at the first test that asks for it."""
    if postgres_programs() is None:
        if os.environ.get("CI"):
            pytest.fail(NO_POSTGRES)
        warnings.warn(f"the registry was NOT tested on a server: {NO_POSTGRES}", stacklevel=1)
        pytest.skip(NO_POSTGRES)
    with mlflow_stack() as stack:
        yield stack


@pytest.fixture
def server_settings(settings: Settings, servers: Stack) -> Settings:
    """Settings with the server as tracking URI; the model and the experiment are this test's."""
    unique = uuid.uuid4().hex[:8]
    return settings.model_copy(
        update={
            "tracking_uri": servers.mlflow.url,
            "model": f"router-{unique}",
            "experiment": f"test-{unique}",
        }
    )


@pytest.fixture(params=["sqlite", "server"])
def registry(request: pytest.FixtureRequest) -> Registry:
    """A registry without versions, once on each backend."""
    name = {"sqlite": "settings", "server": "server_settings"}[request.param]
    return connect(request.getfixturevalue(name))
