"""A registered version, trained, measured and logged as a retraining does, in about a second."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from registry import Registry, VersionInfo
from registry.log import log_version, retraining_run
from routellm.bundle import Bundle, golden_predictions
from routellm.calibration import Calibration
from routellm.embeddings.base import Encoder
from routellm.evaluation.benchmarks import Benchmark
from routellm.evaluation.evaluate import evaluate
from routellm.routers.base import TrainingBattles
from routellm.settings import EmbeddingSettings
from routellm.snapshots import Manifest
from routellm.training import train

MANIFEST = Manifest(
    "d" * 64, "2026-01-01T00:00:00+00:00", "0.1.0", 10, (), {"human": 10}, {"test": 10},
    {"strong": 10}, {"tie": 10}, {}, {}, {"passed": True, "rules": []}, False, None,
)  # fmt: skip


def add_version(
    registry: Registry,
    battles: TrainingBattles,
    encoder: Encoder,
    seed: int = 0,
    *,
    simulated: bool = False,
    training_key: str | None = None,
) -> VersionInfo:
    """Register a random router of this seed, measured on 100 prompts of the battles."""
    manifest = replace(MANIFEST, simulated=simulated)
    router, report = train("random", battles, encoder, seed=seed)
    prompts = battles.prompts[:100]
    win_rates = router.win_rate(prompts)
    table = Benchmark(
        "test", prompts, {"strong": np.ones(100), "weak": (np.arange(100) % 2).astype(float)}
    )
    measured = evaluate(win_rates, table, router.pair, rng=np.random.default_rng(0), resamples=100)
    bundle = Bundle(
        router, EmbeddingSettings(), Calibration.of(win_rates, "test"),
        golden_predictions(router, prompts), manifest.digest, simulated, "0.1.0",
    )  # fmt: skip
    with retraining_run(registry, manifest) as parent:
        return log_version(
            registry, bundle, report, {"test": measured}, manifest,
            training_key=training_key or f"key-{seed}", speed={"queries_per_s": 1.0},
            parent_run_id=parent,
        )  # fmt: skip
