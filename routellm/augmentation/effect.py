"""What augmentation brings: the battles as they would be had it been left out, or been less.

Augmentation buys labels of the pair itself: known right answers (`golden`), a judge's verdicts
(`judge`). What people voted, and what was published of other models, is there without it. The
paper measures each router on its arena votes alone, with golden labels, and with a judge's (its
tables 1 to 3); so does this, on whatever data is at hand.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from routellm.errors import TrainingError
from routellm.kinship import family
from routellm.routers.base import TrainingBattles

# which labels of the pair itself are in
AUGMENTATIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "golden": ("golden",),
    "judge": ("judge",),
    "both": ("golden", "judge"),
}


def augmented(battles: TrainingBattles, augmentation: str) -> TrainingBattles:
    """Return the battles less the pair's own golden and judge labels that are not in.

    A model of the pair that then has no battle is one nobody has tried: its relatives' battles
    (`routellm.kinship`) stand in for its own.

    Raises
    ------
    TrainingError
        If such a model has no relatives either.
    """
    bought = {kind for kinds in AUGMENTATIONS.values() for kind in kinds}
    out = sorted(bought - set(AUGMENTATIONS[augmentation]))
    names = np.array(battles.models)
    pair = (battles.pair.strong, battles.pair.weak)
    own = np.isin(names[battles.model_a], pair) & np.isin(names[battles.model_b], pair)
    left = battles.where(~(own & np.isin(battles.label_kind, out)))
    for name in pair:
        if not ((names[left.model_a] == name) | (names[left.model_b] == name)).any():
            left = _stand_in(left, name)
    return left


def _stand_in(battles: TrainingBattles, name: str) -> TrainingBattles:
    """Return the battles with those of a model's relatives as its own.

    Those between two relatives say nothing of it and go.
    """
    pair = (battles.pair.strong, battles.pair.weak)
    kin = np.array([m not in pair and family(m) == family(name) for m in battles.models])
    a, b = kin[battles.model_a], kin[battles.model_b]
    if not (a ^ b).any():
        raise TrainingError(f"no battle of {name}, nor of a relative to stand in for it")
    me = battles.models.index(name)
    kept = battles.where(~(a & b))
    return replace(
        kept,
        model_a=np.where(kin[kept.model_a], me, kept.model_a),
        model_b=np.where(kin[kept.model_b], me, kept.model_b),
    )
