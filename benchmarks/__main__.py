"""Run every measurement and print one table.

Speeds are ratios within one run, or come with what they were measured on: machines differ and
are shared. Data is SIMULATED: random battles of the right shape.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import numpy as np


def ingest(rows: int = 1_000_000) -> list[tuple[str, str]]:
    """Ingest battles from one JSON Lines file in a process of its own; peak memory is its own."""
    code = f"""
import json, resource, tempfile, time
from pathlib import Path
from routellm.ingest import stage
from routellm.settings import Settings
from routellm.snapshots import SnapshotStore
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "battles.jsonl"
    with path.open("w") as file:
        for i in range({rows}):
            file.write(json.dumps({{"prompt": f"question {{i}} " + "with some words " * 8,
                "model_a": f"m{{i % 40}}", "model_b": "other", "preference": 1 + i % 2}}) + "\\n")
    settings = Settings(home=Path(folder) / "home")
    store = SnapshotStore(settings.snapshots_dir())
    started = time.perf_counter()
    staged = stage([str(path)], store, settings)
    manifest = store.commit(parts=staged.parts, cursors=staged.cursors, previous=None,
        quarantined_by_rule={{}}, validation={{"passed": True}}, simulated=True)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([manifest.rows, seconds, peak]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    n, seconds, peak_mb = json.loads(done.stdout)
    return [
        (f"ingest {n:,} battles", f"{seconds:.0f} s, {n / seconds:,.0f} battles/s"),
        ("  peak memory (limit 2,000 MB)", f"{peak_mb:,.0f} MB"),
    ]


def ranking(battles: int = 50_000) -> list[tuple[str, str]]:
    """Time sw_ranking against a plain logistic regression over all battles for each query."""
    from sklearn.linear_model import LogisticRegression

    from routellm.routers.base import Pair, TrainingBattles
    from routellm.routers.sw_ranking import SWRankingRouter

    rng = np.random.default_rng(0)
    u, d, m = 25_000, 384, 60
    vectors = rng.normal(size=(u, d)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    a, b = rng.integers(m, size=(2, battles))
    b = np.where(a == b, (b + 1) % m, b)
    skill = np.linspace(1, -1, m)
    won = (rng.random(battles) < 1 / (1 + np.exp(skill[b] - skill[a]))).astype(float)
    data = TrainingBattles(
        prompts=tuple(str(i) for i in range(u)), embeddings=vectors,
        prompt=rng.integers(u, size=battles), models=tuple(f"m{i:02d}" for i in range(m)),
        model_a=a, model_b=b, preference_a=won, weight=np.ones(battles),
        label_kind=np.full(battles, "human"), validation=np.zeros(battles, bool),
        pair=Pair("m02", "m30"),
    )  # fmt: skip
    router = SWRankingRouter(None, data.pair)  # type: ignore[arg-type]
    router.fit(data, rng=rng)
    queries = vectors[:64]
    router.score([], queries[:2])
    started = time.perf_counter()
    fast = router.score([], queries)
    ours_ms = (time.perf_counter() - started) / len(queries) * 1000

    tier = np.array([router.tiers_[name] for name in data.models])
    rows = np.arange(battles)
    x = np.zeros((battles, router.n_tiers_))
    np.add.at(x, (rows, tier[a]), 1.0)
    np.add.at(x, (rows, tier[b]), -1.0)
    x = np.concatenate([x, -x])  # as RouteLLM's code: every battle twice
    y = np.concatenate([won, 1 - won])
    slow, started = [], time.perf_counter()
    for q in queries[:5]:
        similarity = (vectors @ q).astype(np.float64)
        omega = 10.0 ** (1.0 + similarity / similarity.max())
        omega *= len(omega) / omega.sum()
        w = np.concatenate([omega[data.prompt]] * 2) / 2
        beta = (
            LogisticRegression(C=1.0, fit_intercept=False, tol=1e-8, max_iter=1000)
            .fit(x, y, sample_weight=w)
            .coef_[0]
        )
        gap = beta[tier[2]] - beta[tier[30]]
        slow.append(1 / (1 + np.exp(-gap)))
    refit_ms = (time.perf_counter() - started) / len(slow) * 1000
    return [
        (f"sw_ranking, {battles:,} battles: ours", f"{ours_ms:.2f} ms a query, batch of 64"),
        ("  plain refit of a logistic regression", f"{refit_ms:.0f} ms a query"),
        ("  ours is faster (limit 30x)", f"{refit_ms / ours_ms:.0f}x"),
        ("  largest difference in win rate", f"{np.abs(fast[: len(slow)] - slow).max():.1e}"),
    ]


def embedding() -> list[tuple[str, str]]:
    """Time the default encoder, in a batch and for one query."""
    from routellm.embeddings import get_encoder
    from routellm.settings import EmbeddingSettings

    encoder = get_encoder(EmbeddingSettings())
    prompts = [f"Explain number {i} to me in a few words, with an example." for i in range(256)]
    encoder.encode(prompts[:8])
    started = time.perf_counter()
    encoder.encode(prompts)
    batch = len(prompts) / (time.perf_counter() - started)
    single = []
    for prompt in prompts[:30]:
        started = time.perf_counter()
        encoder.encode([prompt])
        single.append((time.perf_counter() - started) * 1000)
    return [
        ("embedding, prompts of 15 tokens, batches", f"{batch:.0f} prompts/s"),
        ("  one prompt (median)", f"{np.median(single):.1f} ms"),
    ]


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"SIMULATED data, {os.cpu_count()} cores", title_justify="left")
    table.add_column("measurement")
    table.add_column("result", justify="right")
    for measure in (ranking, embedding, ingest):
        for row in measure():
            table.add_row(*row)
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
