"""The registry on both of its backends: SQLite, and an MLflow server on PostgreSQL and S3."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry import Registry, connect
from routellm.settings import Settings
from tests.support.bare import bare_settings
from tests.support.databases import shared_postgres
from tests.support.servers import Stack, mlflow_stack


@pytest.fixture(scope="session")
def servers() -> Iterator[Stack]:
    """An MLflow server on PostgreSQL and S3; started once, at the first test that asks for it."""
    with mlflow_stack(shared_postgres("the registry was")) as stack:
        yield stack


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return bare_settings(tmp_path / "home")


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
