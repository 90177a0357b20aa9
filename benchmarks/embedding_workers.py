"""How fast prompts become vectors on 1, 2 and 4 Ray workers of one thread each.

Run as ``python -m benchmarks.embedding_workers``. It is what a retraining does with
`workers.runner` set to ray: shards of 1,024 prompts, each a task of Prefect's, encoded by the real
MiniLM and written into the home's cache. Prompts are SIMULATED. Workers are on one machine, so what
counts is the ratio to one worker, up to as many as there are free cores: where other programs keep
the cores busy, more workers also take more of them away. Clusters of each size take turns, and the
fastest of the turns counts.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

WORKERS, TURNS, SHARDS = (1, 2, 4), 3, 4


def measure() -> list[tuple[str, str]]:
    """Time each number of workers on the same number of prompts, the encoder loaded."""
    from flows.engine import configure
    from routellm.settings import Settings

    with tempfile.TemporaryDirectory() as folder:
        configure(Settings(home=Path(folder)))
        best = dict.fromkeys(WORKERS, 0.0)
        for turn in range(TURNS):
            for n in WORKERS:
                home = Path(folder) / f"{turn}-{n}"
                best[n] = max(best[n], prompts_a_second(home, n))
    return [
        (
            f"embedding, {n} Ray worker{'s' if n > 1 else ''} of one thread",
            f"{rate:.0f} prompts/s ({rate / best[1]:.2f}x)",
        )
        for n, rate in best.items()
    ]


def prompts_a_second(home: Path, n: int) -> float:
    """Return how many prompts a second n workers encode, on a cluster started for them."""
    from flows.runner import Workers
    from flows.side_by_side import SideBySide, embed
    from routellm.embeddings.cache import WRITE_EVERY
    from routellm.settings import Settings
    from routellm.sources.simulated import simulated_benchmark

    settings = Settings(home=home, workers={"runner": "ray", "at_once": n})
    prompts = simulated_benchmark(n=SHARDS * WRITE_EVERY).prompts
    with Workers(settings) as workers:
        beside = SideBySide(workers, tiny_plan(settings), ["simulated://arena"], settings)
        ready = [
            workers.submit(embed, number=i, prompts=(f"warm {i}",) * 2, recipe=beside.recipe)
            for i in range(2 * n)
        ]
        for one in ready:
            one.result()
        started = time.perf_counter()
        beside.embed(prompts)
        return len(prompts) / (time.perf_counter() - started)


def tiny_plan(settings: Any) -> Any:
    """Return the plan of a retraining on a snapshot of a few battles."""
    from flows.work import plan_again
    from routellm.ingest import stage
    from routellm.snapshots import snapshot_store

    store = snapshot_store(settings, simulated=True)
    staged = stage(["simulated://arena?battles=200"], store, settings)
    manifest = store.commit(
        parts=staged.parts,
        cursors=staged.cursors,
        previous=None,
        quarantined_by_rule={},
        validation={},
        simulated=True,
    )
    return plan_again(manifest.digest, simulated=True, sources=[], settings=settings)


if __name__ == "__main__":
    from benchmarks.__main__ import show

    show(f"SIMULATED prompts, {os.cpu_count()} cores", [measure()])
