"""Do relatives err alike? Correlations of models' standings, within families and across.

Run as ``python -m benchmarks.kinship FOLDER`` on a folder of real preference data, e.g. one with
alpaca_eval's judgements: it is what the kinship prior of ``knn`` rests on.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

MIN_SHARED = 200  # prompts both models fought on


def correlations(source: str) -> dict[str, tuple[list[float], list[float]]]:
    """Return for each label kind the correlations of (kin, other) pairs of models."""
    from routellm.ingest import stage
    from routellm.kinship import family
    from routellm.routers.base import Pair, TrainingBattles
    from routellm.settings import Settings
    from routellm.snapshots import SnapshotStore
    from routellm.standings import standings

    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(home=Path(folder))
        store = SnapshotStore(settings.snapshots_dir())
        staged = stage([source], store, settings)
        manifest = store.commit(
            parts=staged.parts, cursors=staged.cursors, previous=None, quarantined_by_rule={},
            validation={}, simulated=staged.simulated,
        )  # fmt: skip
        table = store.read(manifest).to_pandas()
    table = table[table.model_a != table.model_b]
    prompts = {p: i for i, p in enumerate(table.prompt.unique())}
    names = tuple(sorted({*table.model_a, *table.model_b}))
    row = {name: i for i, name in enumerate(names)}
    battles = TrainingBattles(
        prompts=tuple(prompts), embeddings=np.zeros((len(prompts), 1), np.float32),
        prompt=table.prompt.map(prompts).to_numpy(), models=names,
        model_a=table.model_a.map(row).to_numpy(), model_b=table.model_b.map(row).to_numpy(),
        preference_a=table.preference_a.to_numpy(), weight=np.ones(len(table)),
        label_kind=table.label_kind.to_numpy().astype(str),
        validation=np.zeros(len(table), bool), pair=Pair(names[0], names[1]),
    )  # fmt: skip
    out: dict[str, tuple[list[float], list[float]]] = {}
    for kind in battles.kinds_by_trust():
        stood = standings(battles, only=kind)
        weight = stood.weight.toarray()
        mean = np.where(weight > 0, stood.residual.toarray() / np.maximum(weight, 1e-9), np.nan)
        # what all models share on a prompt is its difficulty, not kinship
        mean -= np.nanmean(mean, axis=1, keepdims=True)
        kin: list[float] = []
        other: list[float] = []
        for i in range(len(names)):
            for j in range(i):
                both = np.isfinite(mean[:, i]) & np.isfinite(mean[:, j])
                if both.sum() < MIN_SHARED:
                    continue
                r = float(np.corrcoef(mean[both, i], mean[both, j])[0, 1])
                (kin if family(names[i]) == family(names[j]) else other).append(r)
        out[kind] = (kin, other)
    return out


def main() -> None:
    for kind, (kin, other) in correlations(sys.argv[1]).items():
        for what, values in (("kin", kin), ("others", other)):
            low, high = np.quantile(values, [0.25, 0.75]) if values else (np.nan, np.nan)
            mean = np.mean(values) if values else np.nan
            print(f"{kind:8s} {what:7s} {len(values):5d} pairs, mean correlation {mean:+.3f} "
                  f"(middle half {low:+.3f} to {high:+.3f})")  # fmt: skip


if __name__ == "__main__":
    main()
