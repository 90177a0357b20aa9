"""What the tasks do, as plain functions over library and registry."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from registry import Registry, VersionInfo
from registry.figures import log_pareto
from registry.log import log_version
from registry.predictions import (
    evaluation_set,
    predictions_table,
    read_predictions,
    write_table,
)
from routellm import __version__, training
from routellm.bundle import Bundle, content_key, golden_predictions, load_bundle, save_bundle
from routellm.calibration import Calibration
from routellm.embeddings import Encoder, Progress
from routellm.errors import BenchmarkError, UsageError
from routellm.evaluation.benchmarks import Benchmark, load_benchmarks
from routellm.evaluation.contamination import (
    Contamination,
    Side,
    find_matches,
    listed,
    nearest,
)
from routellm.evaluation.evaluate import Evaluation, evaluate
from routellm.evaluation.fetch import fetch_published
from routellm.evaluation.plots import plot_curves
from routellm.routers.base import FitReport, Pair, Router, make_router, router_kinds
from routellm.settings import PAPER_STRONG, PAPER_WEAK, Settings
from routellm.snapshots import Manifest, SnapshotStore, write_atomic

SPEED_QUERIES = 64


@dataclass
class Plan:
    """One retraining's inputs, and the battles once they are embedded.

    Attributes
    ----------
    benchmarks : tuple of Benchmark
        As published; `clean` holds them less what the training prompts may have shown.
    primary : str
        The benchmark that promotion looks at.
    contamination : Contamination or None
        What was left out because training and evaluation share it, once embedded.
    augmentation : str
        Which labels of the pair itself are trained on (`routellm.augmentation.effect`).
    """

    manifest: Manifest
    store: SnapshotStore
    encoder: Encoder
    pair: Pair
    benchmarks: tuple[Benchmark, ...]
    primary: str
    prepared: training.Prepared | None = None
    clean: dict[str, Clean] = field(default_factory=dict)
    contamination: Contamination | None = None
    augmentation: str = "both"

    @property
    def label_weights(self) -> dict[str, float]:
        """How much each label kind counts, once the battles are embedded."""
        return dict(self.prepared.label_weights.weights) if self.prepared else {}


@dataclass(frozen=True)
class Clean:
    """A benchmark less its contaminated prompts, with the rest's embeddings.

    Attributes
    ----------
    similarity : float
        The paper's S(B, D): of the whole benchmark to the battles trained on.
    """

    benchmark: Benchmark
    embeddings: np.ndarray[Any, Any]
    similarity: float


@dataclass(frozen=True)
class Measured:
    """A registered router and how it did."""

    kind: str
    version: VersionInfo
    evaluations: Mapping[str, Evaluation]
    queries_per_s: float
    latency_ms: float


def plan_of(
    manifest: Manifest,
    store: SnapshotStore,
    encoder: Encoder,
    sources: Sequence[str],
    settings: Settings,
) -> Plan:
    """Settle the pair and the benchmarks of a retraining."""
    if settings.strong is not None and settings.weak is not None:
        pair = Pair(settings.strong, settings.weak)
    elif manifest.simulated:
        from routellm.sources.simulated import SIM_STRONG, SIM_WEAK

        pair = Pair(SIM_STRONG, SIM_WEAK)
    else:
        pair = Pair(PAPER_STRONG, PAPER_WEAK)
    benchmarks = tuple(_benchmarks(manifest, sources, settings))
    for one in benchmarks:
        one.of_pair(pair)  # refuses a benchmark without the pair before any work is done
    primary = settings.evaluation.primary
    if primary == "auto":
        primary = max(benchmarks, key=len).name if benchmarks else "heldout"
    elif primary != "heldout" and primary not in {b.name for b in benchmarks}:
        have = ", ".join(b.name for b in benchmarks) or "heldout"
        raise UsageError(f"no benchmark {primary!r} (`evaluation.primary`): there are {have}")
    return Plan(manifest, store, encoder, pair, benchmarks, primary)


def _benchmarks(manifest: Manifest, sources: Sequence[str], settings: Settings) -> list[Benchmark]:
    if settings.evaluation.benchmarks:
        return named_benchmarks(settings.evaluation.benchmarks, settings.home)
    if manifest.simulated:
        from routellm.sources.simulated import simulated_benchmark

        return [simulated_benchmark()]
    folders = [Path(s) for s in sources if Path(s).is_dir()]
    return [b for folder in folders for b in load_benchmarks(folder)]


def named_benchmarks(folder: str, home: Path) -> list[Benchmark]:
    """Return the benchmarks in a folder that a person named, or the paper's own (`routellm`).

    Raises
    ------
    BenchmarkError
        If there are none, or they cannot be fetched.
    """
    path = fetch_published(home / "benchmarks") if folder == "routellm" else Path(folder)
    found = load_benchmarks(path)
    if not found:
        raise BenchmarkError(
            f"no benchmark tables in {folder}: expected mmlu.parquet, gsm8k.parquet, "
            "mt_bench_questions.parquet or NAME.benchmark.parquet"
        )
    return found


def training_key(kind: str, plan: Plan, settings: Settings) -> str:
    """Return what a trained and measured router is known by: all that went into it."""
    return content_key(
        kind,
        plan.manifest.digest,
        settings.training.model_dump_json(exclude={"routers", "options"}),
        json.dumps(settings.training.options.get(kind, {}), sort_keys=True),
        settings.evaluation.model_dump_json(exclude={"benchmarks", "primary"}),
        json.dumps([settings.usd_per_query(m) for m in (plan.pair.strong, plan.pair.weak)]),
        plan.encoder.identity,
        json.dumps([plan.pair.strong, plan.pair.weak]),
        json.dumps([b.digest for b in plan.benchmarks]),
        plan.augmentation,
        __version__,
    )


def find_done(
    kinds: Sequence[str], plan: Plan, registry: Registry, settings: Settings
) -> dict[str, VersionInfo]:
    """Return the versions that this retraining would make again, by kind."""
    keys = {training_key(kind, plan, settings): kind for kind in kinds}
    done: dict[str, VersionInfo] = {}
    for version in registry.versions():
        kind = keys.get(version.tags.get("training_key", ""))
        if kind is not None:
            done.setdefault(kind, version)
    return {kind: done[kind] for kind in kinds if kind in done}


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


def embedded(plan: Plan, settings: Settings, progress: Progress | None = None) -> training.Prepared:
    """Read, augment and embed the battles, and clean the benchmarks of what they show."""
    if plan.prepared is not None:
        return plan.prepared
    prepared = training.prepare(
        plan.store, plan.manifest, plan.encoder, settings, plan.pair, progress
    )
    benchmarks = list(plan.benchmarks) + ([prepared.heldout] if prepared.heldout else [])
    if not benchmarks:
        raise BenchmarkError(
            f"nothing to measure on: fewer than {training.MIN_HELDOUT} held-out battles of "
            f"{plan.pair.strong} and {plan.pair.weak}, and no benchmark tables; give --benchmarks"
        )
    how = settings.evaluation
    side: Side = "training" if how.contamination == "drop_training" else "evaluation"
    prompts = prepared.battles.prompts
    vectors = {b.name: plan.encoder.encode(b.prompts, progress=progress) for b in benchmarks}
    found = {
        b.name: find_matches(
            b.prompts,
            vectors[b.name],
            prompts,
            prepared.battles.embeddings,
            similarity=how.contamination_similarity,
            ngram=how.contamination_ngram,
            side=side,
        )
        for b in benchmarks
    }
    shown = {b.name: listed(found[b.name].matches, b.prompts, prompts) for b in benchmarks}
    if side == "training":
        out = np.zeros(len(prompts), dtype=bool)
        out[[m.training for f in found.values() for m in f.matches]] = True
        prepared = training.without_prompts(prepared, out, settings)
    for one in benchmarks:
        mine, similarity = vectors[one.name], found[one.name].similarity
        seen = np.zeros(len(one), dtype=bool)
        if side == "evaluation":
            seen[[m.prompt for m in found[one.name].matches]] = True
        else:  # to what is left to train on
            similarity = nearest(mine, prepared.battles.embeddings)[1]
        if seen.all():
            raise BenchmarkError(
                f"every prompt of benchmark {one.name} is among the training prompts: measure on "
                "another benchmark"
            )
        plan.clean[one.name] = Clean(one.without(seen), mine[~seen], float(similarity.mean()))
    if plan.primary not in plan.clean:
        raise BenchmarkError(f"there are too few held-out battles to promote on {plan.primary!r}")
    plan.contamination = Contamination(side, shown, prepared.left_out)
    plan.prepared = prepared
    return prepared


@dataclass(frozen=True)
class Trained:
    """A trained router on disk: what one task hands to the next, and what a killed run left.

    The folder is named by the training key, so whatever it holds was made from the same battles,
    settings and code, and need not be made again.
    """

    kind: str
    key: str
    folder: Path

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    @property
    def figures(self) -> Path:
        return self.folder / "figures.json"

    @property
    def predictions(self) -> Path:
        return self.folder / "predictions"


def train_router(
    kind: str, plan: Plan, settings: Settings, progress: Progress | None = None
) -> Trained:
    """Train one router and keep it, with its calibration and golden predictions, as files."""
    key = training_key(kind, plan, settings)
    trained = Trained(kind, key, settings.home / "trained" / key)
    prepared = embedded(plan, settings)
    if trained.bundle.exists():  # made whole or not at all: a run was killed after it
        return trained
    router, report = training.train(
        kind,
        prepared.battles,
        plan.encoder,
        seed=settings.training.seed,
        options=settings.training.options.get(kind),
        progress=progress,
        checkpoint=trained.folder / "checkpoint",
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
    shutil.rmtree(trained.folder / "checkpoint", ignore_errors=True)
    return trained


def evaluate_router(
    trained: Trained, plan: Plan, settings: Settings, *, with_speed: bool = True
) -> dict[str, Evaluation]:
    """Measure a trained router on every clean benchmark, and its speed; keep the figures."""
    embedded(plan, settings)
    if trained.figures.exists():
        return _figures(trained)[0]
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
    return evaluations


def register_router(trained: Trained, plan: Plan, registry: Registry, parent: str) -> Measured:
    """Register a trained and measured router as a version, once, and clear its folder."""
    evaluations, measured_speed = _figures(trained)
    version = registry.find_trained(trained.key)
    if version is None:
        version = log_version(
            registry,
            load_bundle(trained.bundle, encoder=plan.encoder),
            FitReport(**json.loads((trained.folder / "report.json").read_text())),
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
    shutil.rmtree(trained.folder, ignore_errors=True)
    return Measured(
        trained.kind,
        version,
        evaluations,
        measured_speed["queries_per_s"],
        measured_speed["latency_ms_p50"],
    )


def _figures(trained: Trained) -> tuple[dict[str, Evaluation], dict[str, float]]:
    document = json.loads(trained.figures.read_text())
    found = document["evaluations"].items()
    return {name: Evaluation.from_dict(one) for name, one in found}, document["speed"]


def kinds_to_train(plan: Plan, settings: Settings) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the router kinds to train, and why others cannot be trained on this machine.

    Raises
    ------
    UsageError
        If a kind that was asked for by name is unknown or cannot be trained here.
    """
    asked = settings.training.routers
    kinds = router_kinds() if "all" in asked else asked
    skipped = {}
    for kind in kinds:
        options = settings.training.options.get(kind)
        why = make_router(kind, plan.encoder, plan.pair, options).unavailable()
        if why and kind in asked:
            raise UsageError(f"router kind {kind} cannot be trained here: {why}")
        if why:
            skipped[kind] = why
    return tuple(k for k in kinds if k not in skipped), skipped


def measure(
    rates: Mapping[str, np.ndarray[Any, Any]], plan: Plan, settings: Settings
) -> dict[str, Evaluation]:
    """Measure win rates (n,) on every clean benchmark, held-out battles last."""
    out = {}
    for name, clean in sorted(plan.clean.items(), key=lambda item: item[0] == "heldout"):
        out[name] = evaluate(
            rates[name],
            clean.benchmark,
            plan.pair,
            rng=np.random.default_rng(settings.training.seed),
            resamples=settings.evaluation.bootstrap,
            similarity=clean.similarity,
            usd_per_query=(
                settings.usd_per_query(plan.pair.strong),
                settings.usd_per_query(plan.pair.weak),
            ),
        )
    return out


def evaluation_sets(plan: Plan) -> dict[str, Any]:
    """Return the clean benchmarks as the tables that later versions' rivals are measured on."""
    return {name: evaluation_set(clean.benchmark) for name, clean in plan.clean.items()}


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
