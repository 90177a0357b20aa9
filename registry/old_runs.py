"""Runs, logged models and artifacts in MLflow that no version needs: which they are, and their end.

Files go before the record that names them, so that what is killed halfway is found again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from registry.calls import patient, said
from registry.client import Registry, VersionInfo
from registry.logged import or_none
from routellm.errors import RegistryError
from routellm.retention import Removal

_PAGE = 1000
_PARENTS = ("retrain", "compare")  # roles of runs that hold others


def plan_runs(
    registry: Registry, versions: Sequence[VersionInfo], kept: Collection[str], now: datetime
) -> list[Removal]:
    """Return the models and runs that go, in the order in which they go.

    Parameters
    ----------
    kept : collection of str
        Those of `versions` that stay.
    """
    old_ms = (now - timedelta(days=registry.settings.retention.run_days)).timestamp() * 1000
    client = registry.client
    with said(registry.settings):
        experiment = client.get_experiment_by_name(registry.settings.experiment)
        if experiment is None:
            return []
        here = [experiment.experiment_id]
        runs = {run.info.run_id: run for run in _pages(partial(client.search_runs, here))}
        models = list(_pages(partial(client.search_logged_models, here)))
    of_going = {v.run_id: v.version for v in versions if v.version not in kept}
    of_kept = {v.run_id for v in versions if v.version in kept}
    going: dict[str, str] = {}
    for run_id, run in runs.items():
        role, old = run.data.tags.get("role"), run.info.start_time < old_ms
        if run_id in of_going:
            going[run_id] = f"of version {of_going[run_id]}"
        elif role == "trial" and old:
            going[run_id] = "an old trial"
        elif role == "version" and old and run_id not in of_kept:
            going[run_id] = "of a version that is gone, or never came to be"
    for run_id in [r for r in going if r not in of_going]:
        if _is_registered(registry, run_id):  # as a version of another registered model
            del going[run_id]
    parents = {
        run.data.tags.get("mlflow.parentRunId")
        for run_id, run in runs.items()
        if run_id not in going
    }
    emptied = {
        run_id: "no run inside it is left"
        for run_id, run in runs.items()
        if run.data.tags.get("role") in _PARENTS
        and run_id not in parents
        and run.info.start_time < old_ms
    }
    unowned = {
        model.model_id
        for model in models
        if model.source_run_id not in runs
        and model.creation_timestamp < old_ms
        and not _is_registered(registry, model.source_run_id)
    }
    return [
        Removal("model", model.model_id, "of a run that goes", _bytes(model.artifact_location))
        for model in models
        if model.source_run_id in going or model.model_id in unowned
    ] + [
        Removal("run", run_id, why, _bytes(runs[run_id].info.artifact_uri))
        for run_id, why in (going | emptied).items()
    ]


def delete_model(registry: Registry, model_id: str) -> None:
    """Remove a logged model and its files, unless a version is made of it.

    Raises
    ------
    RegistryError
        If MLflow, or the store of its artifacts, does not do it.
    """
    client = registry.client
    model = _or_gone(registry, partial(client.get_logged_model, model_id))
    if model is None or _is_registered(registry, model.source_run_id):
        return
    _delete_artifacts(model.artifact_location)
    _or_gone(registry, partial(client.delete_logged_model, model_id))


def delete_run(registry: Registry, run_id: str) -> None:
    """Remove a run's files, then the run, unless it is a version's.

    MLflow keeps the record of a removed run until `mlflow gc` takes it out of its database.

    Raises
    ------
    RegistryError
        As `delete_model`.
    """
    client = registry.client
    run = _or_gone(registry, partial(client.get_run, run_id))
    if run is None or run.info.lifecycle_stage == "deleted" or _is_registered(registry, run_id):
        return
    _delete_artifacts(run.info.artifact_uri)
    _or_gone(registry, partial(client.delete_run, run_id))


def _is_registered(registry: Registry, run_id: str | None) -> bool:
    """Return whether a version of any registered model is of this run."""
    if not run_id:
        return False
    ask = partial(registry.client.search_model_versions, f"run_id='{run_id}'", max_results=1)
    return bool(patient(registry.settings, ask))


def _delete_artifacts(uri: str) -> None:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    try:
        get_artifact_repository(uri).delete_artifacts()
    except Exception as error:  # artifact stores raise what they like
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise RegistryError(
            f"artifacts at {uri} were not removed ({first}): see that the store can be reached, "
            "and compact again"
        ) from error


def _or_gone(registry: Registry, ask: Callable[[], Any]) -> Any:
    return patient(registry.settings, lambda: or_none(ask))


def _pages(ask: Callable[..., Any]) -> Iterator[Any]:
    token: str | None = ""
    while token is not None:
        page = ask(max_results=_PAGE, page_token=token or None)
        yield from page
        token = page.token or None


def _bytes(uri: str) -> int | None:
    """Return how large artifacts are, where they are files of this machine."""
    parsed = urlparse(uri)
    if parsed.scheme not in ("", "file"):
        return None
    folder = Path(unquote(parsed.path))
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file())
