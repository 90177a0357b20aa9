"""Log a trained router as a run, and register it as a version."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from registry import view
from registry.at_work import AT_WORK, at_work
from registry.calls import said
from registry.card import model_card, summary
from registry.client import Registry, VersionInfo
from registry.datasets import log_evaluation_counts, log_evaluation_set, log_snapshot
from registry.figures import log_figures, slice_table
from registry.predictions import EVALUATION_SETS, PREDICTIONS, about, write_table
from routellm import __version__
from routellm.bundle import Bundle, save_bundle
from routellm.evaluation.contamination import Contamination
from routellm.evaluation.evaluate import Evaluation
from routellm.routers.base import FitReport
from routellm.settings import EvaluationSettings
from routellm.snapshots import Manifest

MODEL_CODE = Path(__file__).with_name("model_code.py")


@contextlib.contextmanager
def retraining_run(
    registry: Registry,
    manifest: Manifest,
    data_docs: Path | None = None,
    label_weights: Mapping[str, float] | None = None,
    contamination: Contamination | None = None,
    *,
    what: str = "retrain",
    evaluation_sets: Mapping[str, pa.Table] | None = None,
) -> Iterator[str]:
    """Open the parent run of one retraining (or what else it is called); yields its id.

    It shows what the snapshot was held to (``validation.json`` as a table), links the Data Docs
    in its description, lists the prompts left out because training and evaluation share them
    (``contamination.json``, by digests), keeps what routers are measured on
    (``evaluation_sets/<benchmark>.parquet``), and samples the machine while they are trained.
    Where this process is killed, the next retraining ends the run (`registry.at_work`).
    """
    import mlflow

    label = f"{what} {manifest.digest[:12]}"
    with (
        at_work(registry.settings) as name,
        said(registry.settings),
        # the tag comes with the run: killed at any later point, it is known whose it was
        mlflow.start_run(run_name=label, log_system_metrics=True, tags={AT_WORK: name}) as run,
    ):
        tags = {
            "role": what,
            "snapshot": manifest.digest,
            "simulated": str(manifest.simulated).lower(),
        }
        told = f"Snapshot `{manifest.digest[:12]}`, {manifest.rows:,} battles"
        told += " (**SIMULATED**)." if manifest.simulated else "."
        if data_docs is not None:
            uri = data_docs.resolve().as_uri()
            tags["data_docs"] = uri
            told += f" What it was held to: [Data Docs]({uri}), or the artifact `validation.json`."
        here = view.address(run.info.experiment_id)
        told += f" Its routers are the runs inside it: [compare them]({here})."
        mlflow.set_tags({**tags, "mlflow.note.content": told})
        mlflow.log_params({f"label_weight.{kind}": w for kind, w in (label_weights or {}).items()})
        log_snapshot(manifest)
        _log_evaluation_sets(evaluation_sets or {}, run.info.run_id)
        rules = manifest.validation["rules"]
        if rules:
            columns = {name: [rule[name] for rule in rules] for name in rules[0]}
            mlflow.log_table(columns, "validation.json")
        if contamination is not None:
            _log_contamination(contamination, registry.settings.evaluation)
        yield run.info.run_id
        _sample_machine(run.info.run_id)


def _log_evaluation_sets(evaluation_sets: Mapping[str, pa.Table], run_id: str) -> None:
    _log_tables(evaluation_sets, EVALUATION_SETS)
    for name, table in evaluation_sets.items():
        told = about(table)
        counts = {"num_rows": len(table), **{k: told[k] for k in ("excluded", "simulated")}}
        log_evaluation_counts(name, told["benchmark_digest"], counts, run_id)


def _log_tables(tables: Mapping[str, pa.Table], folder: str) -> None:
    """Log Parquet tables on the open run, each as ``<folder>/<name>.parquet``."""
    import mlflow

    if not tables:
        return
    with tempfile.TemporaryDirectory() as local:
        for name, table in tables.items():
            write_table(table, Path(local) / f"{name}.parquet")
        mlflow.log_artifacts(local, folder)


def _sample_machine(run_id: str) -> None:
    """Take one last sample of the machine: a run shorter than MLflow's interval has no other."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    last = SystemMetricsMonitor(run_id, resume_logging=True)
    last.collect_metrics()
    last.publish_metrics(last.aggregate_metrics())
    last.mlflow_logger.flush()


def _log_contamination(contamination: Contamination, settings: EvaluationSettings) -> None:
    """Log on the open run how prompts were compared, how many match, and which."""
    import mlflow

    names = ("contamination", "contamination_similarity", "contamination_ngram")
    mlflow.log_params({name: getattr(settings, name) for name in names})
    rows: list[dict[str, Any]] = []
    metrics = {"contamination.battles_left_out": float(contamination.battles)}
    for benchmark, dropped in contamination.by_benchmark.items():
        for by in ("similarity", "ngram"):
            found = [one for one in dropped if one.matched_by in (by, "both")]
            metrics[f"{benchmark}.matched_by_{by}"] = float(len(found))
        rows += [
            {"benchmark": benchmark, "left_out": contamination.side, **asdict(one)}
            for one in dropped
        ]
    mlflow.log_metrics(metrics)
    if rows:
        mlflow.log_table({name: [r[name] for r in rows] for name in rows[0]}, "contamination.json")


def log_version(
    registry: Registry,
    bundle: Bundle,
    report: FitReport,
    evaluations: Mapping[str, Evaluation],
    manifest: Manifest,
    *,
    training_key: str,
    speed: Mapping[str, float],
    parent_run_id: str,
    predictions: Mapping[str, pa.Table] | None = None,
    primary: str | None = None,
) -> VersionInfo:
    """Log a router in a child run, then register it: the version is the last thing made.

    Parameters
    ----------
    predictions : dict of pyarrow.Table, optional
        By benchmark, what the router answered prompt by prompt
        (`registry.predictions.predictions_table`): logged as ``predictions/<benchmark>.parquet``,
        and by slices in the table ``slices.json``.
    primary : str, optional
        The benchmark that ``cost_usd_per_1k_queries`` is of; by default the widest.

    Raises
    ------
    RegistryError
        If MLflow fails in between; there is then a run, and no version.
    """
    import mlflow
    import pandas as pd
    from mlflow.models import infer_signature

    with said(registry.settings), tempfile.TemporaryDirectory() as folder:
        save_bundle(bundle, Path(folder) / "bundle")
        with mlflow.start_run(
            run_name=bundle.kind, nested=True, parent_run_id=parent_run_id
        ) as run:
            mlflow.set_tags(
                {
                    "role": "version",
                    "kind": bundle.kind,
                    "simulated": str(bundle.simulated).lower(),
                    "mlflow.note.content": summary(bundle, manifest),
                }
            )
            mlflow.log_params(
                {
                    "kind": bundle.kind,
                    "strong": bundle.pair.strong,
                    "weak": bundle.pair.weak,
                    "encoder": bundle.router.encoder.identity,
                    "snapshot": manifest.digest[:12],
                    **report.params,
                }
            )
            log_snapshot(manifest)
            for one in evaluations.values():
                log_evaluation_set(one, parent_run_id)
            mlflow.log_metrics(speed)
            log_figures(report, evaluations, primary)
            _log_tables(predictions or {}, PREDICTIONS)
            if predictions:
                mlflow.log_table(slice_table(predictions), "slices.json")
            example = pd.DataFrame({"prompt": [p for p, _ in bundle.golden[:2]]})
            answer = pd.DataFrame({"win_rate": [0.5], "route": ["strong"]})
            with warnings.catch_warnings():
                # it asks for type hints, which would drop `params`, and an input example, which
                # would be run through the encoder again; the signature is given in full instead
                warnings.simplefilter("ignore", UserWarning)
                logged = mlflow.pyfunc.log_model(
                    name="router",
                    python_model=str(MODEL_CODE),
                    artifacts={"bundle": str(Path(folder) / "bundle")},
                    signature=infer_signature(
                        example, answer, params={"strong_fraction": 0.5, "threshold": -1.0}
                    ),
                    pip_requirements=[f"routellm-mlops=={__version__}"],
                )
        version = registry.client.create_model_version(
            registry.model,
            source=logged.model_uri,
            run_id=run.info.run_id,
            model_id=logged.model_id,  # a server refuses a source that it cannot tell whose it is
            description=model_card(bundle, evaluations, manifest, registry.model, report, primary),
            tags={
                "kind": bundle.kind,
                "training_key": training_key,
                "snapshot": manifest.digest,
                "simulated": str(bundle.simulated).lower(),
                "strong": bundle.pair.strong,
                "weak": bundle.pair.weak,
                # a router of old battles is as old as these, whenever they were put together
                "snapshot_created_at": manifest.as_of or manifest.created_at,
                **({"as_of": manifest.as_of} if manifest.as_of else {}),
                "snapshot_validated": str(bool(manifest.validation.get("passed"))).lower(),
            },
        )
        view.name_run(registry.client, run.info.run_id, bundle.kind, int(version.version))
        view.show(
            registry.client,
            run.info.experiment_id,
            evaluations,
            priced=any(one.cost for one in evaluations.values()),
        )
    return registry.get(str(version.version))


def log_trial(
    registry: Registry,
    *,
    kind: str,
    augmentation: str,
    seed: int,
    training_key: str,
    report: FitReport,
    evaluations: Mapping[str, Evaluation],
    simulated: bool,
    parent_run_id: str,
    primary: str | None = None,
) -> None:
    """Log a router that was trained to be compared: a child run, and no version."""
    import mlflow

    label = f"{kind}, labels {augmentation}, seed {seed}"
    with (
        said(registry.settings),
        mlflow.start_run(run_name=label, nested=True, parent_run_id=parent_run_id),
    ):
        mlflow.set_tags(
            {
                "role": "trial",
                "kind": kind,
                "trial": "true",
                "augmentation": augmentation,
                "training_key": training_key,
                "simulated": str(simulated).lower(),
            }
        )
        mlflow.log_params({"augmentation": augmentation, "training_seed": seed, "kind": kind})
        mlflow.log_params(report.params)
        log_figures(report, evaluations, primary)
