"""How wide may the kernel of ``gaussian_process`` be? Its error on prompts unlike those it knows.

Run as ``python -m benchmarks.extrapolation FOLDER`` with a ``model_pool.parquet`` in the folder
(right answers of nine models on prompts of many tasks). For all 36 pairs of these models at once
the process is fitted on some prompts of one task, and its squared error is measured on the task's
other prompts and on all other tasks, in parts of what saying nothing (the mean) has there: above 1
it does harm. Noise and the features' scale are chosen as a router can choose them, by the error on
the same task. None of the pairs is one that benchmarks are about.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SHARPNESS = (0.5, 1.0, 2.0, 4.0)
FEATURE_SCALE = (0.0, 0.1, 0.2)
NOISE = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
KNOWN = 400  # prompts that the process is fitted on; tasks with fewer than `ASKED` more are skipped
ASKED = 20
SPLITS = 3  # of each task

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """Errors of one shape: of each task (t,), in parts of what saying nothing has."""

    sharpness: float
    feature_scale: float
    noise: float
    same: Floats
    others: Floats


def pool(folder: Path) -> tuple[list[str], NDArray[np.str_], Floats]:
    """Return prompts (n,), their tasks (n,), and half the difference of each pair's scores."""
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "model_pool.parquet").to_pandas()
    table = table.drop_duplicates("prompt")
    models = [c for c in table.columns if c not in ("prompt", "task")]
    score = table[models].to_numpy(np.float64)
    gap = [(score[:, a] - score[:, b]) / 2.0 for a, b in combinations(range(len(models)), 2)]
    return list(table.prompt), table.task.to_numpy(np.str_), np.stack(gap, axis=1)


def measure(
    embeddings: NDArray[np.float32],
    prompts: list[str],
    task: NDArray[np.str_],
    gap: Floats,
    *,
    progress: bool = False,
) -> list[Cell]:
    """Return the errors of every shape.

    Parameters
    ----------
    embeddings : ndarray float32 (n, d)
    gap : ndarray float64 (n, pairs)
    """
    from routellm.prompt_features import prompt_features, standardised

    features = prompt_features(prompts)
    # by all tasks' prompts, as a router has them of its other battles
    shown = standardised(features, features.mean(axis=0), features.std(axis=0))
    tasks = [t for t in np.unique(task) if (task == t).sum() >= KNOWN + ASKED]
    cells = []
    for scale in FEATURE_SCALE:
        x = np.hstack([embeddings.astype(np.float64), scale * shown])
        for sharpness in SHARPNESS:
            errors = np.array([_errors(x, task == t, gap, sharpness) for t in tasks])
            for i, noise in enumerate(NOISE):
                cells.append(Cell(sharpness, scale, noise, errors[:, 0, i], errors[:, 1, i]))
            if progress:
                print(f"feature scale {scale}, sharpness {sharpness}", file=sys.stderr, flush=True)
    return cells


def _errors(x: Floats, here: NDArray[np.bool_], gap: Floats, sharpness: float) -> Floats:
    """Return the errors (2, noises) on the same task and on the others, mean of the splits."""
    from routellm.routers.gaussian_process import kernel

    rng = np.random.default_rng(0)
    inside, others = np.flatnonzero(here), np.flatnonzero(~here)
    out = np.zeros((SPLITS, 2, len(NOISE)))
    for split in range(SPLITS):
        order = rng.permutation(inside)
        known, asked = order[:KNOWN], order[KNOWN:]
        between = kernel(x[known], x[known], sharpness)
        level = gap[known].mean(axis=0)
        towards = [kernel(x[rows], x[known], sharpness) for rows in (asked, others)]
        # a task's level is another matter than which of its prompts are hard
        truth = [gap[asked] - level, gap[others] - gap[others].mean(axis=0)]
        for i, noise in enumerate(NOISE):
            weights = np.linalg.solve(between + noise * np.eye(KNOWN), gap[known] - level)
            for j in range(2):
                error = ((towards[j] @ weights - truth[j]) ** 2).mean()
                out[split, j, i] = error / (truth[j] ** 2).mean()
    return out.mean(axis=0)


def best(cells: list[Cell], sharpness: float) -> Cell:
    """Return the cell of a sharpness with the least error on the same task."""
    return min((c for c in cells if c.sharpness == sharpness), key=lambda c: float(c.same.mean()))


def _shown(errors: Floats) -> str:
    return f"{errors.mean():.4f} ± {errors.std(ddof=1) / np.sqrt(len(errors)):.4f}"


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    from routellm.embeddings import get_encoder
    from routellm.settings import EmbeddingSettings

    parser = argparse.ArgumentParser(prog="python -m benchmarks.extrapolation", description=__doc__)
    parser.add_argument("folder", type=Path, help="with model_pool.parquet")
    parser.add_argument("--embeddings", type=Path, help="file that keeps them for the next time")
    asked = parser.parse_args()
    prompts, task, gap = pool(asked.folder)
    with tempfile.TemporaryDirectory() as folder:
        cache = asked.embeddings or Path(folder) / "embeddings.db"
        embeddings = get_encoder(EmbeddingSettings(), cache).encode(prompts)
    cells = measure(embeddings, prompts, task, gap, progress=True)
    table = Table(
        title=f"{gap.shape[1]} pairs of models; fitted on {KNOWN} prompts of one task "
        f"({len(cells[0].same)} tasks in turn, {SPLITS} splits each)",
        title_justify="left",
        caption="error relative to saying nothing (above 1 does harm): mean ± standard error over "
        "the tasks",
        caption_justify="left",
    )
    headings = (
        "sharpness",
        "feature scale",
        "noise",
        "same task",
        "other tasks",
        "harm is done by",
    )
    for name in headings:
        table.add_column(name, justify="right")
    for sharpness in SHARPNESS:
        c = best(cells, sharpness)
        harmful = f"{int((c.others > 1).sum())} of {len(c.others)} tasks"
        table.add_row(
            *map(str, (c.sharpness, c.feature_scale, c.noise)),
            _shown(c.same), _shown(c.others), harmful,
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 110).print(table)


if __name__ == "__main__":
    main()
