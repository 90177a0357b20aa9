"""Log a trained router as a run, and register it as a version."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from registry.card import model_card
from registry.client import Registry, VersionInfo, _said
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
) -> Iterator[str]:
    """Open the parent run of one retraining (or what else it is called); yields its id.

    It shows what the snapshot was held to (``validation.json`` as a table), links the Data Docs
    in its description, and lists the prompts left out because training and evaluation share them
    (``contamination.json``, by digests).
    """
    import mlflow

    label = f"{what} {manifest.digest[:12]}"
    with _said(registry.settings), mlflow.start_run(run_name=label) as run:
        tags = {"snapshot": manifest.digest, "simulated": str(manifest.simulated).lower()}
        told = f"Snapshot `{manifest.digest[:12]}`, {manifest.rows:,} battles."
        if data_docs is not None:
            uri = data_docs.resolve().as_uri()
            tags["data_docs"] = uri
            told += f" What it was held to: [Data Docs]({uri}), or the artifact `validation.json`."
        mlflow.set_tags({**tags, "mlflow.note.content": told})
        mlflow.log_params({f"label_weight.{kind}": w for kind, w in (label_weights or {}).items()})
        rules = manifest.validation["rules"]
        if rules:
            columns = {name: [rule[name] for rule in rules] for name in rules[0]}
            mlflow.log_table(columns, "validation.json")
        if contamination is not None:
            _log_contamination(contamination, registry.settings.evaluation)
        yield run.info.run_id


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
) -> VersionInfo:
    """Log a router in a child run, then register it: the version is the last thing made.

    Raises
    ------
    RegistryError
        If MLflow fails in between; there is then a run, and no version.
    """
    import mlflow
    import pandas as pd
    from mlflow.models import infer_signature

    with _said(registry.settings), tempfile.TemporaryDirectory() as folder:
        save_bundle(bundle, Path(folder) / "bundle")
        with mlflow.start_run(
            run_name=bundle.kind, nested=True, parent_run_id=parent_run_id
        ) as run:
            mlflow.set_tags({"kind": bundle.kind, "simulated": str(bundle.simulated).lower()})
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
            with warnings.catch_warnings():  # counts have no missing values
                warnings.simplefilter("ignore", UserWarning)
                mlflow.log_input(_dataset(manifest), context="training")
            mlflow.log_metrics(speed)
            _log_figures(report, evaluations)
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
            description=model_card(bundle, evaluations, manifest, registry.model, report),
            tags={
                "kind": bundle.kind,
                "training_key": training_key,
                "snapshot": manifest.digest,
                "simulated": str(bundle.simulated).lower(),
                "strong": bundle.pair.strong,
                "weak": bundle.pair.weak,
            },
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
) -> None:
    """Log a router that was trained to be compared: a child run, and no version."""
    import mlflow

    label = f"{kind}, labels {augmentation}, seed {seed}"
    with (
        _said(registry.settings),
        mlflow.start_run(run_name=label, nested=True, parent_run_id=parent_run_id),
    ):
        mlflow.set_tags(
            {
                "kind": kind,
                "trial": "true",
                "augmentation": augmentation,
                "training_key": training_key,
                "simulated": str(simulated).lower(),
            }
        )
        mlflow.log_params({"augmentation": augmentation, "training_seed": seed, "kind": kind})
        mlflow.log_params(report.params)
        _log_figures(report, evaluations)


def _log_figures(report: FitReport, evaluations: Mapping[str, Evaluation]) -> None:
    """Log on the open run what training and measuring gave: metrics, curves, and all of it."""
    import mlflow

    mlflow.log_metrics({**flat_metrics(evaluations), **report.metrics})
    for name, values in report.history.items():
        for step, value in enumerate(values, 1):
            mlflow.log_metric(name, value, step=step)
    for name, one in evaluations.items():
        for percent in range(0, 101, 2):
            mlflow.log_metric(f"{name}.pgr", one.pgr_by_percent[percent], step=percent)
    mlflow.log_dict({name: one.to_dict() for name, one in evaluations.items()}, "evaluations.json")


def flat_metrics(evaluations: Mapping[str, Evaluation]) -> dict[str, float]:
    """Return evaluations as flat metric names, the same on every run."""
    out: dict[str, float] = {}
    for name, one in evaluations.items():
        figures: dict[str, Any] = {
            "apgr": one.exact.apgr.value,
            "apgr_low": one.exact.apgr.low,
            "apgr_high": one.exact.apgr.high,
            "cpt20": one.exact.cpt20.value,
            "cpt50": one.exact.cpt50.value,
            "cpt80": one.exact.cpt80.value,
            "paper_apgr": one.paper.apgr.value,
            "paper_cpt50": one.paper.cpt50.value,
            "paper_cpt80": one.paper.cpt80.value,
            "auc": one.auc.value,
            "n": one.n,
            "excluded": one.excluded,
            "perfect_apgr": one.perfect_apgr,
            "random_apgr": 0.5,
            "similarity": one.similarity,
        }
        if one.cost is not None:
            figures["cost_usd_per_1k_queries_all_strong"] = one.cost.strong
            figures["cost_usd_per_1k_queries_all_weak"] = one.cost.weak
            for reached in ("cpt50", "cpt80"):
                cost = getattr(one.cost, f"at_{reached}")
                figures[f"cost_usd_per_1k_queries_{reached}"] = cost
                figures[f"saved_{reached}"] = one.cost.saved(cost)
        out |= {f"{name}.{k}": float(v) for k, v in figures.items() if v is not None}
    return out


def _dataset(manifest: Manifest) -> Any:
    """Return the snapshot as an MLflow dataset: its counts, and its digest as identity."""
    import pandas as pd
    from mlflow.data.pandas_dataset import from_pandas

    counts = pd.DataFrame(
        [
            {"by": by, "name": name, "battles": n}
            for by in ("label_kind", "source", "winner")
            for name, n in getattr(manifest, f"by_{by}").items()
        ]
    )
    return from_pandas(counts, name=f"snapshot-{manifest.digest[:12]}", digest=manifest.digest[:36])
