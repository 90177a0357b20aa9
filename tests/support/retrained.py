"""What a retraining has left in its home: compared with another's, and held to what must be so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from registry import connect
from routellm.settings import Settings
from routellm.snapshots import snapshot_store
from tests.support.half_registered import half_registered


@dataclass(frozen=True)
class Retrained:
    """The result of a retraining, less what no two have in common: times, and numbers of versions.

    Attributes
    ----------
    evaluations, keys : dict
        By router kind: every figure of every benchmark, and the training key.
    champion : str or None
        Its kind.
    """

    snapshot: str
    battles: int
    evaluations: Mapping[str, Mapping[str, Any]]
    keys: Mapping[str, str]
    champion: str | None

    def of(self, kind: str) -> Retrained:
        """Return what there would be, had only one kind been trained, which none promotes."""
        return replace(
            self, evaluations={kind: self.evaluations[kind]}, keys={kind: self.keys[kind]},
            champion=None,
        )  # fmt: skip


def result(settings: Settings, *, simulated: bool = True) -> Retrained:
    """Return what was retrained, having made sure that nothing is left half-done.

    Every version is whole, and there is one of each kind; no run is called running; every battle is
    there once; the history is one chain of finished moves that ends at the champion.
    """
    registry = connect(settings)
    versions = registry.versions()
    assert half_registered(registry) == []
    kinds = {v.kind: v for v in versions}
    assert len(kinds) == len(versions), [v.kind for v in versions]
    experiment = registry.client.get_experiment_by_name(settings.experiment)
    running = "attributes.status = 'RUNNING'"
    assert list(registry.client.search_runs([experiment.experiment_id], running)) == []

    store = snapshot_store(settings, simulated=simulated)
    newest = store.latest()
    assert newest is not None
    store.verify(newest)
    ids = store.read(newest, ["battle_id"])["battle_id"].to_pylist()
    assert len(ids) == len(set(ids)) == newest.rows
    assert {v.tags["snapshot"] for v in versions} == {newest.digest}

    moves = [e for e in registry.history() if e.from_ != e.to]
    champion = registry.champion()
    assert [e.from_ for e in moves] == [None, *(e.to for e in moves)][: len(moves)]
    assert registry.unsettled() is None
    assert (moves[-1].to if moves else None) == (champion.version if champion else None)
    return Retrained(
        snapshot=newest.digest,
        battles=newest.rows,
        evaluations={
            kind: {name: one.to_dict() for name, one in registry.evaluations(version).items()}
            for kind, version in kinds.items()
        },
        keys={kind: version.tags["training_key"] for kind, version in kinds.items()},
        champion=champion.kind if champion else None,
    )
