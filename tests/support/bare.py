"""Registered versions with nothing in them: enough to move aliases by, and made in a moment."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

from registry import Decision, Registry, VersionInfo, connect
from registry.history import replay
from routellm.settings import Settings

PROMOTE = Decision("promote", "better")


def works(uri: str) -> None:
    """A smoke check that passes."""


def fails(uri: str) -> str:
    return "golden predictions differ by 0.2"


def bare_settings(home: Path, *, lease_s: float = 2.0, **changes: Any) -> Settings:
    """Settings whose SQLite file is there already: making one takes MLflow seconds."""
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "mlflow.db").exists():
        shutil.copy(_blank_store(), home / "mlflow.db")
    settings = Settings(home=home)
    return settings.model_copy(
        update={"promotion": settings.promotion.model_copy(update={"lease_s": lease_s}), **changes}
    )


@functools.cache
def _blank_store() -> Path:
    import mlflow

    folder = tempfile.mkdtemp(prefix="routellm-test-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "blank.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def bare_version(registry: Registry, **tags: str) -> VersionInfo:
    """Register a version that has a run and no model."""
    client = registry.client
    experiment = client.get_experiment_by_name(registry.settings.experiment)
    run = client.create_run(experiment.experiment_id)
    client.set_terminated(run.info.run_id)
    made = client.create_model_version(
        registry.model,
        source="routellm:/test",
        run_id=run.info.run_id,
        tags={"kind": "random", "snapshot": "d" * 64, **tags},
    )
    return registry.get(str(made.version))


def bare_registry(home: Path, versions: int = 0, **changes: Any) -> Registry:
    """A registry on SQLite with so many bare versions; `changes` go to its settings."""
    registry = connect(bare_settings(home, **changes))
    for _ in range(versions):
        bare_version(registry)
    return registry


def promote(registry, *versions, smoke=works):
    for version in versions:
        registry.promote(registry.get(version), force_reason="test", smoke=smoke)


def whole(registry):
    """The aliases are where the history says, and nothing is left to mend."""
    standing = replay(registry.history())
    aliases = registry.aliases()
    assert aliases.get("champion") == standing.champion
    assert aliases.get("previous") == (standing.before[0] if standing.before else None)
    assert registry.unsettled() is None
    assert all(entry.applied for entry in registry.history())
    return True
