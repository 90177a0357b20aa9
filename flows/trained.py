"""Trained routers between training and registering: made, measured, kept, and registered.

One is a folder named by its training key, ``<home>/trained/<key>``: a run that is killed goes on
where it was. With a storage, its checkpoints go there as they are written, and the whole of it
once it is measured, so that another machine goes on where one was lost, or registers what one made.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from flows.work import Plan, embedded, measure, training_key
from registry import Registry, VersionInfo
from registry.figures import log_pareto
from registry.log import log_version
from registry.predictions import predictions_table, read_predictions, write_table
from routellm import __version__, training
from routellm.bundle import (
    Bundle,
    QualityCurve,
    golden_predictions,
    load_bundle,
    save_bundle,
)
from routellm.calibration import Calibration
from routellm.embeddings import Progress
from routellm.evaluation.evaluate import Evaluation
from routellm.evaluation.plots import plot_curves
from routellm.routers.base import FitReport, Router
from routellm.settings import Settings
from routellm.snapshots import write_atomic
from routellm.storage import (
    SharedCheckpoint,
    fetch_folder,
    remove_folder,
    share_folder,
    shared_about,
)

SPEED_QUERIES = 64


@dataclass(frozen=True)
class Trained:
    """A trained router on disk: what one task hands to the next, and what a killed run left.

    The folder is named by the training key, so whatever it holds was made from the same battles,
    settings and code, and need not be made again.
    """

    kind: str
    key: str
    folder: Path

    @classmethod
    def of(cls, kind: str, key: str, settings: Settings) -> Trained:
        """Return where this machine keeps the router of a training key."""
        return cls(kind, key, settings.home / "trained" / key)

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    @property
    def figures(self) -> Path:
        return self.folder / "figures.json"

    @property
    def predictions(self) -> Path:
        return self.folder / "predictions"

    def fetch(self, settings: Settings) -> None:
        """Bring it from the storage if another machine made and measured it.

        Raises
        ------
        StorageError, StorageUnreachable
            If it is damaged or cannot be read.
        """
        if not self.figures.exists():
            fetch_folder(self._name, self.folder, settings)

    def share(self, settings: Settings) -> None:
        """Put it into the storage, once it is measured; then its checkpoint is of no more use.

        Raises
        ------
        StorageError, StorageUnreachable
            If it cannot be put; it is kept here, and the next run shares it.
        """
        if settings.storage and shared_about(self._name, settings) is None:
            share_folder(self.folder, self._name, settings)
        self.checkpoint(settings).done()

    def clear(self, settings: Settings) -> None:
        """Remove it, here last: who is killed or refused in between finds it, and asks again."""
        remove_folder(self._name, settings)
        self.checkpoint(settings).done()
        shutil.rmtree(self.folder, ignore_errors=True)

    def checkpoint(self, settings: Settings) -> SharedCheckpoint:
        """Return the checkpoint that its training keeps, here and in the storage."""
        return SharedCheckpoint(self.folder / "checkpoint", f"checkpoints/{self.key}", settings)

    @property
    def _name(self) -> str:
        return f"trained/{self.key}"


@dataclass(frozen=True)
class Measured:
    """A registered router and how it did."""

    kind: str
    version: VersionInfo
    evaluations: Mapping[str, Evaluation]
    queries_per_s: float
    latency_ms: float


def train_router(
    kind: str, plan: Plan, settings: Settings, progress: Progress | None = None
) -> Trained:
    """Train one router and keep it, with its calibration and golden predictions, as files."""
    trained = Trained.of(kind, training_key(kind, plan, settings), settings)
    trained.fetch(settings)
    checkpoint = trained.checkpoint(settings)
    if not trained.bundle.exists():  # it is made whole or not at all
        checkpoint.bring()

        def advance(done: int, total: int) -> None:
            checkpoint.written()
            if progress:
                progress(done, total)

        router, report = training.train(
            kind,
            embedded(plan, settings).battles,
            plan.encoder,
            seed=settings.training.seed,
            options=settings.training.options.get(kind),
            progress=advance,
            checkpoint=checkpoint.folder,
        )
        sample = plan.clean[plan.primary]
        bundle = Bundle(
            router=router,
            embedding=settings.embedding,
            calibration=Calibration.of(
                router.rates(sample.benchmark.prompts, sample.embeddings),
                f"the prompts of {plan.primary}",
            ),
            golden=golden_predictions(router, sample.benchmark.prompts),
            snapshot=plan.manifest.digest,
            simulated=plan.manifest.simulated,
            code_version=__version__,
        )
        write_atomic(trained.folder / "report.json", json.dumps(asdict(report)))
        save_bundle(bundle, trained.bundle)
    shutil.rmtree(checkpoint.folder, ignore_errors=True)
    return trained


def evaluate_router(
    trained: Trained, plan: Plan, settings: Settings, *, with_speed: bool = True
) -> dict[str, Evaluation]:
    """Measure a trained router on every clean benchmark, and its speed; keep the figures."""
    if not trained.figures.exists():
        embedded(plan, settings)
        router = load_bundle(trained.bundle, encoder=plan.encoder).router
        rates = {
            name: router.rates(clean.benchmark.prompts, clean.embeddings)
            for name, clean in plan.clean.items()
        }
        evaluations = measure(rates, plan, settings)
        for name, clean in plan.clean.items():
            table = predictions_table(clean.benchmark, plan.pair, rates[name])
            write_table(table, trained.predictions / f"{name}.parquet")
        measured_speed = {}
        if with_speed:
            queries_per_s, latency_ms = speed(router, plan.clean[plan.primary].benchmark.prompts)
            measured_speed = {"queries_per_s": queries_per_s, "latency_ms_p50": latency_ms}
        document = {
            "evaluations": {name: one.to_dict() for name, one in evaluations.items()},
            "speed": measured_speed,
        }
        write_atomic(trained.figures, json.dumps(document))
    trained.share(settings)
    return _figures(trained)[0]


def register_router(trained: Trained, plan: Plan, registry: Registry, parent: str) -> Measured:
    """Register a trained and measured router as a version, once, and clear its folder."""
    evaluations, measured_speed = _figures(trained)
    version = registry.find_trained(trained.key)
    if version is None:
        on = evaluations[plan.primary]
        version = log_version(
            registry,
            replace(
                load_bundle(trained.bundle, encoder=plan.encoder),
                curve=QualityCurve(on.benchmark, on.n, on.pgr_by_percent),
            ),
            fit_report(trained),
            evaluations,
            plan.manifest,
            training_key=trained.key,
            speed=measured_speed,
            parent_run_id=parent,
            predictions={
                name: read_predictions(trained.predictions / f"{name}.parquet")
                for name in evaluations
            },
            primary=plan.primary,
        )
    trained.clear(registry.settings)
    return Measured(
        trained.kind,
        version,
        evaluations,
        measured_speed["queries_per_s"],
        measured_speed["latency_ms_p50"],
    )


def measured_version(version: VersionInfo, registry: Registry) -> Measured:
    """Return what was measured of a version when it was trained."""
    metrics = registry.run_metrics(version)
    return Measured(
        version.kind,
        version,
        registry.evaluations(version),
        metrics["queries_per_s"],
        metrics["latency_ms_p50"],
    )


def fit_report(trained: Trained) -> FitReport:
    """Return what the training of a router came to."""
    return FitReport(**json.loads((trained.folder / "report.json").read_text()))


def _figures(trained: Trained) -> tuple[dict[str, Evaluation], dict[str, float]]:
    document = json.loads(trained.figures.read_text())
    found = document["evaluations"].items()
    return {name: Evaluation.from_dict(one) for name, one in found}, document["speed"]


def speed(router: Router, prompts: Sequence[str]) -> tuple[float, float]:
    """Return (queries/s in a batch, median ms for one query), the embedding included.

    The cache is left out: a new query is what a gateway meets.
    """
    cached = router.encoder
    router.encoder = getattr(cached, "encoder", cached)
    try:
        some = list(prompts[:SPEED_QUERIES])
        router.win_rate(some[:2])  # loads the encoder
        started = time.perf_counter()
        router.win_rate(some)
        batch_s = time.perf_counter() - started
        single = []
        for prompt in some[:15]:
            started = time.perf_counter()
            router.win_rate([prompt])
            single.append(time.perf_counter() - started)
        return len(some) / batch_s, statistics.median(single) * 1000
    finally:
        router.encoder = cached


def log_plots(measured: Sequence[Measured], registry: Registry) -> None:
    """Log on the open run, for each benchmark, the routers' curves and what quality costs."""
    import mlflow

    for name in measured[0].evaluations:
        by_kind = {m.kind: m.evaluations[name] for m in measured}
        mlflow.log_figure(plot_curves(by_kind), f"curves/{name}.png")
        log_pareto(by_kind)
