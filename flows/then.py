"""One date of a replayed history: what was known, and the routers trained on it.

What they said is remembered by content, under ``<home>/backtest/trained/<training key>``.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flows.device import device
from flows.steps import Step
from flows.trained import Trained, evaluate_router, train_router
from flows.work import Plan, embedded, kinds_to_train, plan_of, training_key
from routellm.as_of import History
from routellm.bundle import content_key, load_bundle
from routellm.embeddings import Encoder
from routellm.errors import BenchmarkError
from routellm.evaluation.contamination import find_matches
from routellm.routers.base import Router
from routellm.settings import Settings
from routellm.snapshots import SnapshotStore, write_atomic

_ONCE = ("bundle", "checkpoint", "predictions", "figures.json", "report.json")

Rates = NDArray[np.float64]


def remembered(path: Path, make: Callable[[], Any]) -> Any:
    """Return the JSON value in a file, which `make` gives the first time."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        value = make()
        write_atomic(path, json.dumps(value))
        return value


class Then:
    """One date: what was known, and the routers trained on it when they are first needed."""

    def __init__(
        self, when: datetime, history: History, encoder: Encoder, settings: Settings
    ) -> None:
        # a home of its own: the loop's own trained routers are registered and cleared away
        alone = {"home": settings.home / "backtest", "storage": None}
        self.settings = settings.model_copy(update=alone)
        self.when, self.history = when, history
        self.known = int(history.known_by(when).sum())
        manifest = replace(history.manifest, digest=history.digest(when))
        plan = plan_of(manifest, history.store, encoder, (), settings)
        # benchmark tables bear no date: what is measured here is votes
        self.plan: Plan = replace(plan, benchmarks=(), primary="heldout")
        self.kinds = [k for k in kinds_to_train(self.plan, settings)[0] if k != "random"]
        self._routers: dict[str, Router] = {}

    def heldout_apgr(self, kind: str, line: Step) -> float:
        """Return what a router is chosen by: its APGR on held-out battles known by then."""

        def measure() -> float:
            trained = self._trained(kind, line)
            found = evaluate_router(trained, self.plan, self.settings, with_speed=False)
            return found["heldout"].exact.apgr.value

        return float(remembered(self._folder(kind) / "heldout_apgr.json", measure))

    def rates(self, kind: str, prompts: Sequence[str], line: Step) -> Rates:
        """Return a router's win rates (u,) on prompts."""

        def score() -> list[float]:
            if kind not in self._routers:
                bundle = self._trained(kind, line).bundle
                self._routers[kind] = load_bundle(bundle, encoder=self.plan.encoder).router
            router = self._routers[kind]
            rates: list[float] = router.rates(prompts, self.plan.encoder.encode(prompts)).tolist()
            return rates

        path = self._folder(kind) / f"rates-{content_key(*prompts)}.json"
        return np.array(remembered(path, score), np.float64)

    def seen(self, kind: str, prompts: Sequence[str], line: Step) -> NDArray[np.bool_]:
        """Return which prompts (u,) what a router was trained on has shown."""

        def find() -> list[int]:
            battles = embedded(self._prepared(line), self.settings).battles
            how = self.settings.evaluation
            found = find_matches(
                prompts,
                self.plan.encoder.encode(prompts),
                battles.prompts,
                battles.embeddings,
                similarity=how.contamination_similarity,
                ngram=how.contamination_ngram,
            )
            return [match.prompt for match in found.matches]

        path = self._folder(kind) / f"seen-{content_key(*prompts)}.json"
        mask = np.zeros(len(prompts), dtype=bool)
        mask[remembered(path, find)] = True
        return mask

    def clear(self, *, keep: str | None = None) -> None:
        """Let go of battles and routers, on disk too, but for one kind's."""
        self.plan.prepared = None
        self.plan.clean.clear()
        for kind in self.kinds:
            folder = self._folder(kind)
            gone = [*folder.glob(".*")]  # what a kill left half-written
            if kind != keep:
                self._routers.pop(kind, None)
                gone += [folder / name for name in _ONCE]
            for path in gone:
                shutil.rmtree(path, ignore_errors=True)
                if path.exists():
                    path.unlink()

    def _folder(self, kind: str) -> Path:
        return self.settings.home / "trained" / training_key(kind, self.plan, self.settings)

    def _trained(self, kind: str, line: Step) -> Trained:
        trained = Trained(kind, self._folder(kind).name, self._folder(kind))
        if trained.bundle.exists():
            return trained
        plan = self._prepared(line)
        with device(kind, plan, self.settings):
            return train_router(kind, plan, self.settings, line.advance)

    def _prepared(self, line: Step) -> Plan:
        """Read what was known, from a store that holds nothing else, and embed it."""
        if self.plan.prepared is not None:
            return self.plan
        staging = self.history.store.staging_dir  # where what a kill leaves is cleared away
        staging.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=staging, prefix="as-of-") as folder:
            store = SnapshotStore(Path(folder) / "snapshots")
            parts = [
                self.history.write(part, known, Path(folder))
                for part, known in self.history.pieces(self.when)
            ]
            manifest = store.commit(
                parts=parts,
                cursors={},
                previous=None,
                quarantined_by_rule={},
                validation={},
                simulated=self.history.manifest.simulated,
            )
            assert manifest.digest == self.plan.manifest.digest
            self.plan.store, self.plan.manifest = store, manifest
            try:
                embedded(self.plan, self.settings, line.advance)
            except BenchmarkError as error:
                raise BenchmarkError(
                    f"by {self.when:%Y-%m-%d} too few held-out battles of {self.plan.pair.strong} "
                    f"and {self.plan.pair.weak} were known to choose a router by: start later "
                    "(--from), or set training.heldout_share higher"
                ) from error
        return self.plan
