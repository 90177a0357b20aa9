"""Whether there is reason to retrain before the hour it is due."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flows.send import send_event
from registry import VersionInfo
from registry.history import Entry
from routellm.lineup import MIN_MODEL_BATTLES
from routellm.snapshots import Manifest

EVENT = "routellm.retrain.wanted"

FIRST = "first"
FRESH = "fresh battles"
NEW_MODEL = "new model"

_VERDICTS = ("promote", "reject", "inconclusive")


@dataclass(frozen=True)
class Wanted:
    """Why a retraining is wanted.

    Attributes
    ----------
    reason : str
        `FIRST`, `FRESH` or `NEW_MODEL`; "" if it is not.
    why : str
        The same as a sentence.
    numbers : dict
        What it was decided by.
    """

    reason: str
    why: str
    numbers: dict[str, Any]

    def __bool__(self) -> bool:
        return bool(self.reason)


def retraining_wanted(
    newest: Manifest, trained: Sequence[Manifest], min_fresh_battles: int
) -> Wanted:
    """Say whether the newest snapshot asks for a retraining, and why.

    Parameters
    ----------
    trained : sequence of Manifest
        Snapshots that retrainings ended with, the newest version's first.
    min_fresh_battles : int
        So many battles since the first of them ask for one.
    """
    if not trained:
        return Wanted(FIRST, "no router has been trained on such battles yet", {})
    fresh = newest.rows - trained[0].rows
    known = {name for one in trained for name in _rated(one)}
    models = {name: n for name, n in _rated(newest).items() if name not in known}
    numbers: dict[str, Any] = {"fresh_battles": fresh, "new_models": models}
    if models:
        named = ", ".join(f"{name} ({n:,} battles)" for name, n in models.items())
        return Wanted(NEW_MODEL, f"no router has been trained with {named}", numbers)
    if fresh >= min_fresh_battles:
        return Wanted(
            FRESH,
            f"{fresh:,} battles have not been trained on (`workers.min_fresh_battles` is "
            f"{min_fresh_battles:,})",
            numbers,
        )
    why = f"{fresh:,} fresh battles are fewer than {min_fresh_battles:,}, and no model is new"
    return Wanted("", why, numbers)


def ask_for_first(model: str, sources: Sequence[str]) -> None:
    """Ask for a retraining because there is no router yet.

    Raises
    ------
    ServerAway
        If Prefect's server does not take the event.
    """
    told = {"reason": FIRST, "why": "no version is registered", "numbers": {}}
    send_event(EVENT, f"routellm.model.{model}", model, {**told, "sources": list(sources)})


def trained_snapshots(
    versions: Sequence[VersionInfo], history: Sequence[Entry], all_: Sequence[Manifest]
) -> list[Manifest]:
    """Return the snapshots that retrainings ended with, as far as they are still kept.

    A retraining ends with the gate's verdict on the best of its versions. One that was killed when
    only some of them were registered has not ended: the verdict is missing.

    Parameters
    ----------
    versions : sequence of VersionInfo
        Newest first.
    history : sequence of Entry
        Every decision and move.
    all_ : sequence of Manifest
        Every snapshot kept, of simulated or of real battles.
    """
    kept = {one.digest: one for one in all_}
    judged = {one.version for one in history if one.action in _VERDICTS}
    digests = dict.fromkeys(
        one.tags.get("snapshot", "") for one in versions if one.version in judged
    )
    return [kept[digest] for digest in digests if digest in kept]


def _rated(manifest: Manifest) -> dict[str, int]:
    """Return the models with battles enough to be rated, with their number."""
    return {name: n for name, n in manifest.by_model.items() if n >= MIN_MODEL_BATTLES}
