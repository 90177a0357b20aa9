"""Which router kind is best, asked of the training data alone: cross-validation by prompt.

Run as ``python -m benchmarks.validation FOLDER`` on a folder of real preference data. No benchmark
is looked at, so what is chosen by these figures can still be measured on one.

The prompts on which the pair has battles of the most trusted label kind are dealt into five folds.
Each kind is trained as `routellm retrain` does (weights of label kinds chosen anew, epochs and the
like chosen on validation battles, calibrated) on all battles whose prompt is not in the fold, and
gives win rates for the fold. Cross-entropy and Brier score are of these, AUC and APGR of their
places within the fold: five routers differ in level, and lowest is the one whose fold was highest,
since it was trained on what was left. Options of a kind are those of the settings
(``ROUTELLM_TRAINING__OPTIONS='{"knn": {"kinship": 0}}'``).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from routellm.embeddings.base import Encoder
    from routellm.evaluation.evaluate import Interval
    from routellm.routers.base import Pair
    from routellm.settings import Settings
    from routellm.training import Prepared

FOLDS = 5
KINDS = ("random", "sw_ranking", "mf", "knn", "gaussian_process")
REFERENCE = "gaussian_process"  # which the others are compared with
STRONG, WEAK = "gpt-4-1106-preview", "mixtral-8x7b-instruct-v0.1"  # the paper's pair

Floats = NDArray[np.float64]
# of win rates (n,), their places within the fold (n,), preferences (n,), weights (n,)
Metric = Callable[[Floats, Floats, Floats, Floats], float]


def _cross_entropy(rate: Floats, place: Floats, preference: Floats, weight: Floats) -> float:
    p = np.clip(rate, 1e-6, 1.0 - 1e-6)
    loss = -(preference * np.log(p) + (1.0 - preference) * np.log1p(-p))
    return float(np.average(loss, weights=weight))


def _brier(rate: Floats, place: Floats, preference: Floats, weight: Floats) -> float:
    return float(np.average((rate - preference) ** 2, weights=weight))


def _auc(rate: Floats, place: Floats, preference: Floats, weight: Floats) -> float:
    from routellm.evaluation.metrics import auc

    return auc(place, preference, 1.0 - preference, weight)


def _apgr(rate: Floats, place: Floats, preference: Floats, weight: Floats) -> float:
    from routellm.evaluation.metrics import exact_curve

    return exact_curve(place, preference, 1.0 - preference, weight).apgr()


METRICS: dict[str, Metric] = {
    "cross-entropy": _cross_entropy, "Brier": _brier, "AUC": _auc, "APGR": _apgr,
}  # fmt: skip


@dataclass(frozen=True)
class Held:
    """Battles of the pair that routers are scored on, each by one that has not met its prompt.

    Attributes
    ----------
    label_kind : str
    prompt : ndarray int64 (n,)
        Row of each battle's prompt among the k that are scored.
    preference : ndarray float64 (n,)
        P(strong preferred).
    fold : ndarray int64 (k,)
    rates : dict of ndarray float64 (k,)
        Win rates by router kind.
    """

    label_kind: str
    prompt: NDArray[np.int64]
    preference: Floats
    fold: NDArray[np.int64]
    rates: dict[str, Floats]

    def places(self, kind: str) -> Floats:
        """Return each prompt's place (k,) within its fold, 0 the lowest and 1 the highest rate."""
        from scipy.stats import rankdata

        out = np.empty(len(self.fold))
        for k in range(FOLDS):
            inside = self.fold == k
            ranks = rankdata(self.rates[kind][inside])  # equal rates share a place
            out[inside] = (ranks - 0.5) / len(ranks)
        return out


@dataclass(frozen=True)
class Figure:
    """One metric of one kind, and how much it is above the reference's on the same resamples."""

    value: Interval
    above_reference: Interval


def prepared(folder: str, settings: Settings, encoder: Encoder, pair: Pair) -> Prepared:
    """Return the training battles of a folder, without those held out."""
    from routellm.ingest import stage
    from routellm.snapshots import SnapshotStore
    from routellm.training import prepare

    store = SnapshotStore(settings.snapshots_dir())
    staged = stage([folder], store, settings)
    manifest = store.commit(
        parts=staged.parts, cursors=staged.cursors, previous=None, quarantined_by_rule={},
        validation={}, simulated=staged.simulated,
    )  # fmt: skip
    return prepare(store, manifest, encoder, settings, pair)


def cross_validated(
    given: Prepared, kinds: Sequence[str], encoder: Encoder, settings: Settings, seed: int
) -> Held:
    """Return the trusted battles of the pair with win rates by routers that did not meet them."""
    from routellm.training import train, without_prompts

    battles = given.battles
    rows, preference = battles.of_pair()
    trusted = battles.trusted_kind()
    judged = battles.label_kind[rows] == trusted
    prompts, where = np.unique(battles.prompt[rows[judged]], return_inverse=True)
    fold = np.random.default_rng(seed).permutation(len(prompts)) % FOLDS
    rates = {kind: np.empty(len(prompts)) for kind in kinds}
    for k in range(FOLDS):
        inside = prompts[fold == k]
        out = np.zeros(len(battles.prompts), dtype=bool)
        out[inside] = True
        left = without_prompts(given, out, settings)
        print(f"fold {k + 1} of {FOLDS}: {len(inside)} prompts, label kinds weigh "
              f"{left.label_weights.weights}", file=sys.stderr, flush=True)  # fmt: skip
        for kind in kinds:
            started = time.perf_counter()
            router, _ = train(
                kind, left.battles, encoder, seed=seed, options=settings.training.options.get(kind)
            )
            texts = [battles.prompts[i] for i in inside]
            rates[kind][fold == k] = router.rates(texts, battles.embeddings[inside])
            print(f"  {kind}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return Held(trusted, where, preference[judged], fold, rates)


def figures(held: Held, reference: str, resamples: int, seed: int) -> dict[str, dict[str, Figure]]:
    """Return each kind's metrics with bootstrap intervals over prompts, and against `reference`.

    As in `routellm.evaluation.evaluate`, a resample in which strong is no better than weak has no
    gap to recover and is drawn again.
    """
    rng = np.random.default_rng(seed)
    k, won = len(held.fold), 2.0 * held.preference - 1.0
    weights = [np.ones(len(held.prompt))]
    while len(weights) <= resamples:
        weight = np.bincount(rng.integers(k, size=k), minlength=k).astype(np.float64)[held.prompt]
        if (weight * won).sum() > 0:
            weights.append(weight)
    out: dict[str, dict[str, Figure]] = {}
    for name, metric in METRICS.items():
        drawn = {}  # (1 + resamples,), the first over all prompts once
        for kind, rate in held.rates.items():
            shown = rate[held.prompt], held.places(kind)[held.prompt]
            drawn[kind] = np.array([metric(*shown, held.preference, w) for w in weights])
        for kind, values in drawn.items():
            above = values - drawn[reference]
            out.setdefault(kind, {})[name] = Figure(_interval(values), _interval(above))
    return out


def _interval(values: Floats) -> Interval:
    from routellm.evaluation.evaluate import CONFIDENCE, Interval

    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(values[1:], [tail, 1.0 - tail])
    return Interval(float(values[0]), float(low), float(high))


def show(found: dict[str, dict[str, Figure]], reference: str, title: str) -> None:
    """Print one table; a kind's second line is its difference to the reference."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption_justify="left",
                  caption=f"second lines: less {reference}'s, on the same resamples")  # fmt: skip
    table.add_column("kind")
    for name in METRICS:
        table.add_column(name, justify="right")
    for kind, by_metric in found.items():
        table.add_section()
        table.add_row(kind, *(_shown(f.value, ".4f") for f in by_metric.values()))
        if kind != reference:
            table.add_row("", *(_shown(f.above_reference, "+.4f") for f in by_metric.values()))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _shown(i: Interval, form: str) -> str:
    return f"{i.value:{form}} [{i.low:{form}}, {i.high:{form}}]"


def main() -> None:
    from routellm.embeddings import get_encoder
    from routellm.routers.base import Pair
    from routellm.settings import Settings

    parser = argparse.ArgumentParser(prog="python -m benchmarks.validation", description=__doc__)
    parser.add_argument("folder", help="preference data, as `routellm ingest` takes it")
    parser.add_argument("--kinds", default=",".join(KINDS), help="default: %(default)s")
    parser.add_argument("--strong", default=STRONG, help="default: %(default)s")
    parser.add_argument("--weak", default=WEAK, help="default: %(default)s")
    parser.add_argument("--embeddings", type=Path, help="file that keeps them for the next time")
    parser.add_argument("--resamples", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="figures instead of the table")
    asked = parser.parse_args()
    kinds = asked.kinds.split(",")
    with tempfile.TemporaryDirectory() as home:
        settings = Settings(home=Path(home))
        encoder = get_encoder(settings.embedding, asked.embeddings or Path(home) / "embeddings.db")
        given = prepared(asked.folder, settings, encoder, Pair(asked.strong, asked.weak))
        held = cross_validated(given, kinds, encoder, settings, asked.seed)
    reference = REFERENCE if REFERENCE in kinds else kinds[-1]
    found = figures(held, reference, asked.resamples, asked.seed)
    size = {"battles": len(held.prompt), "prompts": len(held.fold), "label_kind": held.label_kind}
    if asked.json:
        doc = {k: {m: asdict(f) for m, f in by.items()} for k, by in found.items()}
        print(json.dumps(size | {"reference": reference, "kinds": doc}, indent=2))
        return
    title = (f"{size['battles']:,} {held.label_kind} battles of {asked.strong} and {asked.weak} "
             f"on {size['prompts']:,} prompts, {FOLDS} folds by prompt")  # fmt: skip
    show(found, reference, title)


if __name__ == "__main__":
    main()
