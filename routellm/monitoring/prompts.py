"""Prompts in counts: how long, in which script, with code, with how many numbers.

Only counts are kept, never a prompt. Those of a snapshot are taken from an even sample of its
battles, once for each snapshot.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from routellm.evaluation.slices import script
from routellm.prompt_features import FEATURES, prompt_features
from routellm.snapshots import Manifest, SnapshotStore, write_atomic

_FORMAT = 1  # of the file; raised where what is counted changes
_SAMPLE = 20_000  # battles of a snapshot that are looked at
_CHARS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_NUMBERS = (1, 2, 4, 8)

Counts = dict[str, dict[str, int]]  # by what is looked at, value -> prompts


@dataclass(frozen=True)
class Baseline:
    """A snapshot's prompts, counted."""

    snapshot: str
    n: int
    counts: Counts


def counted(prompts: Sequence[str]) -> Counts:
    """Return how many prompts are how long, in which script, with code, with numbers."""
    features = prompt_features(prompts)
    code = features[:, FEATURES.index("code_word")] > 0
    numbers = np.rint(np.expm1(features[:, FEATURES.index("log_numbers")]))
    return {
        "prompt_length": _binned([len(p) for p in prompts], _CHARS),
        "language": dict(Counter(script(p) for p in prompts)),
        "code": {"yes": int(code.sum()), "no": int((~code).sum())},
        "numbers": _binned(numbers, _NUMBERS),
    }


def baseline(store: SnapshotStore, manifest: Manifest, folder: Path) -> Baseline:
    """Return a snapshot's prompts, counted; from `folder` where that was done before.

    Raises
    ------
    SnapshotError
        If a part of it is missing or damaged.
    """
    path = folder / f"snapshot-{manifest.digest[:16]}.json"
    try:
        doc = json.loads(path.read_text())
        if doc.pop("format") == _FORMAT and doc["snapshot"] == manifest.digest:
            return Baseline(**doc)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or not ours: it is made again
    prompts = list(_sampled(store, manifest))
    made = Baseline(manifest.digest, len(prompts), counted(prompts))
    write_atomic(path, json.dumps({"format": _FORMAT, **asdict(made)}, indent=1))
    for other in folder.glob("snapshot-*.json"):
        if other != path:
            other.unlink(missing_ok=True)
    return made


def _sampled(store: SnapshotStore, manifest: Manifest) -> Iterator[str]:
    """Yield prompts of battles spread over the parts, by their size, of each from its beginning."""
    share = min(1.0, _SAMPLE / max(manifest.rows, 1))
    owed = 0.0
    for part in manifest.parts:
        owed += share * part.rows
        if owed < 1:
            continue
        with_part = replace(manifest, parts=(part,))
        batch = next(store.iter_batches(with_part, ["prompt"]), None)
        if batch is None:
            continue
        wanted = min(int(owed), len(batch))
        owed -= int(owed)
        rows = np.unique(np.linspace(0, len(batch) - 1, wanted).astype(int))
        yield from batch.column(0).take(rows).to_pylist()


def _binned(values: Sequence[float] | np.ndarray, edges: Sequence[int]) -> dict[str, int]:
    """Return how many values are from each edge on, and under the first (``0``)."""
    bins = np.bincount(np.searchsorted(edges, values, "right"), minlength=len(edges) + 1)
    return {str(low): int(n) for low, n in zip((0, *edges), bins, strict=True)}
