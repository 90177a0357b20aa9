"""What happens in a soak, and when: files of SIMULATED battles, and faults, drawn from a seed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from routellm.sources.simulated import SimulatedArena

FIRST, EACH = 600, 400  # battles of the first file, and of each other
EVERY_S = (110.0, 190.0)  # between two files
BROKEN_EVERY_S = 900.0
ROUND_S = 1500.0  # in which each fault comes once

# what is done, and to what
FAULTS = (
    "kill worker", "kill training", "kill gateway", "kill mlflow", "kill prefect", "kill watch",
    "kill up", "freeze mlflow", "lock mlflow.db", "lock embeddings.db",
)  # fmt: skip
FROZEN_S = 10.0


@dataclass(frozen=True)
class Drop:
    """A file that is put into the inbox.

    Attributes
    ----------
    how : str
        ``renamed`` (written to a hidden name first), ``slow`` (in pieces, under its own name),
        ``half`` (half of it, and the rest minutes later), or ``broken`` (never to be read).
    """

    at_s: float
    name: str
    how: str
    start: int = 0
    battles: int = 0


@dataclass(frozen=True)
class Fault:
    """Something that is done to the running system."""

    at_s: float
    what: str


def plan(minutes: float, seed: int) -> tuple[list[Drop], list[Fault]]:
    """Return the files and the faults of so many minutes, each in order of time.

    The first file comes before the clock starts, so that a router serves when faults begin; the
    last two minutes are quiet.
    """
    rng, end = np.random.default_rng(seed), minutes * 60 - 120
    drops = [Drop(0.0, "battles-000.parquet", "renamed", 0, FIRST)]
    at, start = rng.uniform(20, 60), FIRST
    hows: list[str] = []
    while at < end:
        hows = hows or [str(how) for how in rng.permutation(["renamed", "slow", "half"])]
        how = hows.pop()
        ending = "jsonl" if how == "half" else ("parquet", "jsonl", "csv")[len(drops) % 3]
        drops.append(Drop(at, f"battles-{len(drops):03d}.{ending}", how, start, EACH))
        start += EACH
        at += rng.uniform(*EVERY_S)
    broken = max(1, round(end / BROKEN_EVERY_S))
    for i in range(broken):
        when = (i + rng.uniform(0.2, 0.8)) * end / broken
        drops.append(Drop(when, f"broken-{i}.{('parquet', 'jsonl')[i % 2]}", "broken"))
    wanted: list[str] = []
    for _ in range(max(1, round(end / ROUND_S))):
        wanted += [FAULTS[i] for i in rng.permutation(len(FAULTS))]
    slot = end / len(wanted)
    faults = [Fault((i + rng.uniform(0.1, 0.9)) * slot, what) for i, what in enumerate(wanted)]
    return sorted(drops, key=lambda one: one.at_s), faults


def arena(battles: int, seed: int) -> pa.Table:
    """Return the arena's first battles, in the battle schema."""
    source = SimulatedArena(f"simulated://arena?battles={battles}&seed={seed}")
    return pa.Table.from_batches(list(source.batches(None)))


def file_of(table: pa.Table, name: str) -> bytes:
    """Return battles as a file: Parquet as we have them, CSV and JSON Lines as others do."""
    if name.endswith(".parquet"):
        out = io.BytesIO()
        pq.write_table(table, out)
        return out.getvalue()
    rows = list(_as_others_have_them(table))
    if name.endswith(".jsonl"):
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    text = io.StringIO()
    lines = csv.DictWriter(text, list(rows[0]))
    lines.writeheader()
    for row in rows:
        lines.writerow(row | {"conversation_a": json.dumps(row["conversation_a"])})
    return text.getvalue().encode()


def _as_others_have_them(table: pa.Table) -> Iterator[dict[str, Any]]:
    for row in table.to_pylist():
        yield {
            "question_id": row["battle_id"],
            "model_a": row["model_a"],
            "model_b": row["model_b"],
            "winner": row["winner"],
            "conversation_a": [{"role": "user", "content": row["prompt"]}],
            "tstamp": row["voted_at"].timestamp(),
        }


def broken_file(name: str, seed: int) -> bytes:
    """Return what no reader takes: noise, or lines with other columns."""
    if name.endswith(".parquet"):
        return b"PAR1" + np.random.default_rng(seed).bytes(4000)
    return b'{"colour": "red", "size": 3}\n' * 50


def write_benchmark(folder: Path) -> None:
    """Write the arena's prompts with their true qualities as a benchmark table."""
    from routellm.sources.simulated import simulated_benchmark

    one = simulated_benchmark()
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"prompt": list(one.prompts)}
    columns |= {model: scores.tolist() for model, scores in one.scores.items()}
    pq.write_table(pa.table(columns), folder / "simulated.benchmark.parquet")
