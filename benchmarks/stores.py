"""What stores take: bytes of a battle, a vector, a decision; rows a second; a request's limits.

``python -m benchmarks.stores`` measures what ``benchmarks.scale`` needs and no other benchmark
has. Prompts are SIMULATED: random words, 95 tokens each (the paper's average query), which compress
worse than what people write, so that bytes are bounds from above. Rates are of one writer.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np

PROMPT_TOKENS = 95
BATTLES = 50_000
DECISIONS = 20_000
REQUESTS = 3_000
BATCH = 500  # of `routellm.feedback.writer`


def prompts(n: int) -> list[str]:
    from benchmarks.encoder import model_folder, prompts_of

    return prompts_of(PROMPT_TOKENS, n, model_folder())


def battle_bytes(texts: list[str], folder: Path) -> float:
    """Return the bytes of a battle in a snapshot."""
    from benchmarks.ingest import ingest

    path = folder / "battles.jsonl"
    with path.open("w") as file:
        for i, text in enumerate(texts):
            battle = {"prompt": text, "model_a": f"m{i % 40}", "model_b": "other",
                      "preference": 1 + i % 2}  # fmt: skip
            file.write(json.dumps(battle) + "\n")
    rows, _ = ingest(path, folder / "home")
    kept = sum(p.stat().st_size for p in (folder / "home").rglob("*.parquet"))
    return kept / rows


def vector_bytes(texts: list[str], folder: Path) -> float:
    """Return the bytes of a prompt's vector in the cache of embeddings."""
    from benchmarks.simulated import DIMENSIONS
    from routellm.embeddings.cache import CachedEncoder

    class Drawn:
        identity, dimensions = "drawn", DIMENSIONS

        def encode(self, prompts: list[str], *, progress: object = None) -> object:
            rng = np.random.default_rng(0)
            return rng.standard_normal((len(prompts), DIMENSIONS), dtype=np.float32)

    CachedEncoder(Drawn(), folder / "embeddings.db").encode(texts)  # type: ignore[arg-type]
    return sqlite_bytes(folder / "embeddings.db") / len(texts)


def sqlite_bytes(path: Path) -> float:
    """Return the size of an SQLite file with its log written back."""
    if not path.exists():
        return 0.0
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return float(path.stat().st_size)


def decisions(url: str, texts: list[str | None], size: Callable[[], float]) -> tuple[float, float]:
    """Return the rows a second that a writer adds in the faster half, and the bytes of one."""
    from routellm.feedback.records import Decided
    from routellm.feedback.store import FeedbackStore

    store = FeedbackStore(url)
    store.open()
    now, before = datetime.now(UTC), size()
    rows = [
        Decided(
            f"chatcmpl-{i:024}", now + timedelta(microseconds=i), f"req-{i:032}", "3f9a0c51d2be",
            f"user-{i % 1000}", "3", "mf", "weak", "small", "large", 0.31, 0.5, 1.0,
            "win rate against the strong fraction 0.5, asked for by the settings", False,
            "chat/completions", 200, 95, 264, 0.0012, text,
        )
        for i, text in enumerate(texts)
    ]  # fmt: skip
    took = []
    for start in range(0, len(rows), BATCH):
        began = time.perf_counter()
        store.append(rows[start : start + BATCH])
        took.append(time.perf_counter() - began)
    store.close()
    # a machine that others use slows some batches down
    return BATCH / float(np.mean(sorted(took)[: len(took) // 2])), (size() - before) / len(rows)


def limits_per_s(folder: Path) -> float:
    """Return how many requests a second of a key with a budget get through its limits."""
    from routellm.gateway.key_file import add_key
    from routellm.gateway.keys import Caller
    from routellm.gateway.limits import Limits

    key, _ = add_key(
        folder / "keys.json", "team", usd_per_month=1e6, requests_per_minute=100_000_000
    )
    limits, caller = Limits(folder / "spend.db"), Caller(key)
    limits.open()
    began = time.perf_counter()
    for _ in range(REQUESTS):
        limits.enter(caller)
        limits.leave(caller, 0.001)
    took = time.perf_counter() - began
    limits.close()
    return REQUESTS / took


def main() -> None:
    import psycopg

    from tests.support.servers import postgres

    texts = prompts(BATTLES)
    told: list[str | None] = [*texts[:DECISIONS]]
    none: list[str | None] = [None] * DECISIONS
    with tempfile.TemporaryDirectory() as at, postgres() as server:
        folder = Path(at)
        print(f"a battle in a snapshot: {battle_bytes(texts, folder):.0f} bytes")
        print(f"a vector in the cache: {vector_bytes(texts, folder):.0f} bytes")

        def postgres_bytes() -> float:
            with psycopg.connect(server.url) as connection:
                found = connection.execute("SELECT pg_database_size(current_database())").fetchone()
            assert found is not None
            return float(found[0])

        for name, some in (("decisions", none), ("decisions with prompts", told)):
            path = folder / f"{name.replace(' ', '-')}.db"
            rate, each = decisions(f"sqlite:///{path}", some, partial(sqlite_bytes, path))
            print(f"{name}, SQLite: {rate:,.0f}/s, {each:.0f} bytes each")
            rate, each = decisions(server.url, some, postgres_bytes)
            print(f"{name}, PostgreSQL: {rate:,.0f}/s, {each:.0f} bytes each")
        print(f"limits of a key with a budget: {limits_per_s(folder):,.0f} requests/s")


if __name__ == "__main__":
    main()
