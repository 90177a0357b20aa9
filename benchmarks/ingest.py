"""How fast battles are ingested, and in how much memory. SIMULATED battles.

Ingest runs in a process of its own, whose peak memory is then its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BATTLES = 1_000_000
LIMIT_MB = 2_000


def write_battles(path: Path, battles: int) -> None:
    """Write distinct battles as JSON Lines."""
    with path.open("w") as file:
        for i in range(battles):
            line = {
                "prompt": f"question {i} " + "with some words " * 8,
                "model_a": f"m{i % 40}",
                "model_b": "other",
                "preference": 1 + i % 2,
            }
            file.write(json.dumps(line) + "\n")


def ingest(path: Path, home: Path) -> tuple[int, float]:
    """Ingest a file into a new snapshot; return its rows and the seconds it took."""
    from routellm.ingest import stage
    from routellm.settings import Settings
    from routellm.snapshots import SnapshotStore

    settings = Settings(home=home)
    store = SnapshotStore(settings.snapshots_dir())
    started = time.perf_counter()
    staged = stage([str(path)], store, settings)
    manifest = store.commit(
        parts=staged.parts, cursors=staged.cursors, previous=None, quarantined_by_rule={},
        validation={"passed": True}, simulated=True,
    )  # fmt: skip
    return manifest.rows, time.perf_counter() - started


def measure(battles: int = BATTLES) -> list[tuple[str, str]]:
    """Return the table's rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "battles.jsonl"
        write_battles(path, battles)
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.ingest", str(path), str(Path(folder) / "home")],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    rows, seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return [
        (f"ingest {rows:,} battles", f"{seconds:.0f} s, {rows / seconds:,.0f} battles/s"),
        (f"  peak memory (limit {LIMIT_MB:,} MB)", f"{peak:,.0f} MB"),
    ]


if __name__ == "__main__":
    from benchmarks.growth import peak_mb

    print(json.dumps([*ingest(Path(sys.argv[1]), Path(sys.argv[2])), peak_mb()]))
