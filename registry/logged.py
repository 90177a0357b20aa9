"""What MLflow holds of a version: its run, its parent run, and what they carry."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from registry.calls import said
from registry.client import Registry, VersionInfo
from registry.predictions import (
    EVALUATION_SETS,
    PREDICTIONS,
    predictions_table,
    read_evaluation_set,
    read_predictions,
    write_table,
)
from routellm.errors import BenchmarkError, RouteLLMError
from routellm.evaluation.benchmarks import Benchmark
from routellm.evaluation.evaluate import Evaluation
from routellm.routers.base import Pair, Router

T = TypeVar("T")

MEASURED_AGAIN = "measured_again"  # folder of artifacts on the run of a version


class Incomparable(Exception):
    """Two versions cannot be compared on a benchmark; the message says why."""


class Logged:
    """What MLflow holds of a version: its run, its parent run, and their artifacts."""

    def __init__(self, registry: Registry, info: VersionInfo) -> None:
        self.registry, self.info = registry, info
        client = registry.client
        with said(registry.settings):
            run = or_none(lambda: client.get_run(info.run_id))
            self.parent_id = run.data.tags.get("mlflow.parentRunId") if run else None
            parent = or_none(lambda: client.get_run(self.parent_id)) if self.parent_id else None
        self.metrics: dict[str, float] = dict(run.data.metrics) if run else {}
        self.parent_params: dict[str, str] = dict(parent.data.params) if parent else {}

    def evaluations(self) -> dict[str, Evaluation]:
        """Return its evaluations by benchmark; none if they are gone."""
        if not self._has(self.info.run_id, "evaluations.json"):
            return {}
        return self.registry.evaluations(self.info)

    def predictions(self, name: str) -> pa.Table | None:
        """Return what it answered when it was trained; None if that is not there, or damaged."""
        return self._table(f"{PREDICTIONS}/{name}.parquet")

    def evaluation_set(self, name: str) -> Benchmark:
        """Return the prompts and scores that its retraining measured on."""
        path = f"{EVALUATION_SETS}/{name}.parquet"
        if self.parent_id is None or not self._has(self.parent_id, path):
            raise Incomparable(
                f"versions were not measured on the same prompts of {name}, and the retraining of "
                f"version {self.info.version} has kept no evaluation set to measure on again: "
                "retrain, or promote with --force --reason"
            )
        try:
            return self._read(self.parent_id, path, read_evaluation_set)
        except BenchmarkError as error:
            raise Incomparable(str(error)) from error

    def measured_again(self, benchmark: Benchmark) -> pa.Table:
        """Return what it answers to a benchmark now, or did the last time it was asked."""
        path = f"{MEASURED_AGAIN}/{benchmark.name}-{benchmark.digest[:16]}.parquet"
        known = self._table(path)
        if known is not None:
            return known
        tags = self.info.tags
        try:
            rates = self._router.win_rate(benchmark.prompts)
            pair = Pair(tags.get("strong", ""), tags.get("weak", ""))
            table = predictions_table(benchmark, pair, rates)
        except RouteLLMError as error:
            self.registry.versions()  # raises if it is MLflow that is away
            raise Incomparable(
                f"version {self.info.version} cannot be measured again ({error})"
            ) from error
        with tempfile.TemporaryDirectory() as folder, said(self.registry.settings):
            file = Path(folder) / Path(path).name
            write_table(table, file)
            self.registry.client.log_artifact(self.info.run_id, str(file), MEASURED_AGAIN)
        return table

    @cached_property
    def _router(self) -> Router:
        cache_path = self.registry.settings.embeddings_path
        return self.registry.bundle(self.info, cache_path=cache_path).router

    def _table(self, path: str) -> pa.Table | None:
        if not self._has(self.info.run_id, path):
            return None
        try:
            return self._read(self.info.run_id, path, read_predictions)
        except BenchmarkError:  # the router is asked again, and the check says so
            return None

    def _has(self, run_id: str, path: str) -> bool:
        folder = path.rpartition("/")[0]
        with said(self.registry.settings):
            listed = or_none(lambda: self.registry.client.list_artifacts(run_id, folder or None))
        return any(one.path == path for one in listed or ())

    def _read(self, run_id: str, path: str, reader: Callable[[Path], T]) -> T:
        import mlflow

        with tempfile.TemporaryDirectory() as folder:
            with said(self.registry.settings):
                local = mlflow.artifacts.download_artifacts(
                    run_id=run_id, artifact_path=path, dst_path=folder
                )
            return reader(Path(local))


def or_none(ask: Callable[[], Any]) -> Any:
    """Return what MLflow answers, or None where it has no such thing."""
    from mlflow.exceptions import MlflowException

    try:
        return ask()
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
