"""One retraining's plan: its pair, benchmarks and battles, and what of it was done before."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from registry import Registry, VersionInfo
from registry.predictions import evaluation_set
from routellm import __version__, training
from routellm.bundle import content_key
from routellm.embeddings import Encoder, Progress, get_encoder
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
from routellm.routers.base import Pair, make_router, router_kinds
from routellm.settings import PAPER_STRONG, PAPER_WEAK, Settings
from routellm.snapshots import Manifest, SnapshotStore, snapshot_store


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


def plan_again(
    snapshot: str, *, simulated: bool, sources: Sequence[str], settings: Settings
) -> Plan:
    """Make the plan of a retraining again where it is not at hand: in another process.

    Parameters
    ----------
    snapshot : str
        Digest.
    sources : list of str
        Folders among them may hold benchmarks.
    """
    store = snapshot_store(settings, simulated=simulated)
    encoder = get_encoder(settings.embedding, settings.embeddings_path, settings.storage)
    return plan_of(store.get(snapshot), store, encoder, sources, settings)


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
    return content_key(*key_parts(kind, plan, settings).values())


def key_parts(kind: str, plan: Plan, settings: Settings) -> dict[str, str]:
    """Return what a router's training key is made of, in order, by names that a person knows."""
    return {
        "router kind": kind,
        "snapshot": plan.manifest.digest,
        "training settings": settings.training.model_dump_json(exclude={"routers", "options"}),
        "router options": json.dumps(settings.training.options.get(kind, {}), sort_keys=True),
        "evaluation settings": settings.evaluation.model_dump_json(
            exclude={"benchmarks", "primary"}
        ),
        "prices": json.dumps(
            [settings.usd_per_query(m) for m in (plan.pair.strong, plan.pair.weak)]
        ),
        "encoder": plan.encoder.identity,
        "pair of models": json.dumps([plan.pair.strong, plan.pair.weak]),
        "benchmarks": json.dumps([b.digest for b in plan.benchmarks]),
        "augmentation": plan.augmentation,
        "code version": __version__,
    }


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


def embedded(
    plan: Plan,
    settings: Settings,
    progress: Progress | None = None,
    *,
    encoder: Encoder | None = None,
) -> training.Prepared:
    """Read, augment and embed the battles, and clean the benchmarks of what they show.

    `encoder` is used in place of the plan's, whose vectors it gives.
    """
    if plan.prepared is not None:
        return plan.prepared
    encoder = encoder or plan.encoder
    prepared = training.prepare(plan.store, plan.manifest, encoder, settings, plan.pair, progress)
    benchmarks = list(plan.benchmarks) + ([prepared.heldout] if prepared.heldout else [])
    if not benchmarks:
        raise BenchmarkError(
            f"nothing to measure on: fewer than {training.MIN_HELDOUT} held-out battles of "
            f"{plan.pair.strong} and {plan.pair.weak} (`training.heldout_share` keeps "
            f"{settings.training.heldout_share:.0%} of prompts aside), and no benchmark tables; "
            f"give --benchmarks"
        )
    how = settings.evaluation
    side: Side = "training" if how.contamination == "drop_training" else "evaluation"
    prompts = prepared.battles.prompts
    vectors = {b.name: encoder.encode(b.prompts, progress=progress) for b in benchmarks}
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


def measure_version(
    version: VersionInfo, benchmarks: str, registry: Registry, settings: Settings
) -> dict[str, Evaluation]:
    """Measure a registered router on a folder of benchmark tables that it was not measured on.

    What training may have seen of them is not left out.
    """
    router = registry.bundle(version, cache_path=settings.embeddings_path).router
    tables = named_benchmarks(benchmarks, settings.home)
    for one in tables:
        one.of_pair(router.pair)  # refused before anything is embedded
    return {
        one.name: evaluate(
            router.win_rate(one.prompts),
            one,
            router.pair,
            rng=np.random.default_rng(settings.training.seed),
            resamples=settings.evaluation.bootstrap,
            usd_per_query=(
                settings.usd_per_query(router.pair.strong),
                settings.usd_per_query(router.pair.weak),
            ),
        )
        for one in tables
    }


def evaluation_sets(plan: Plan) -> dict[str, Any]:
    """Return the clean benchmarks as the tables that later versions' rivals are measured on."""
    return {name: evaluation_set(clean.benchmark) for name, clean in plan.clean.items()}
