"""The feedback store on both of its backends: an SQLite file, and a real PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from routellm.feedback.store import FeedbackStore
from tests.support.databases import new_database, shared_postgres


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store's address, once on each backend."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'feedback.db'}"
    return new_database(shared_postgres("feedback was"))


@pytest.fixture
def store(url: str) -> Iterator[FeedbackStore]:
    store = FeedbackStore(url)
    yield store
    store.close()
