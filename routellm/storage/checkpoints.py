"""A training's checkpoint in a storage, so that another machine goes on where one was lost."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from routellm.errors import StorageError
from routellm.settings import Settings
from routellm.storage.folders import fetch_folder, remove_folder, share_folder, shared_about

log = logging.getLogger(__name__)

_MOST_SHARE = 0.1  # of a training's time that may go into sharing its checkpoints


@dataclass
class SharedCheckpoint:
    """The checkpoint that a training keeps in `folder`, under a name that says which training.

    Call `bring` before the training, `written` after each step, `done` once its result is kept
    elsewhere. Without `storage` none of them does anything.
    """

    folder: Path
    name: str
    settings: Settings
    _next_s: float = field(default=0.0, init=False)
    _shared: dict[str, Any] = field(default_factory=dict, init=False)

    def bring(self) -> bool:
        """Fetch the checkpoint, if it is further than what this machine has; say whether it was.

        Raises
        ------
        StorageError, StorageUnreachable
            If it is damaged or cannot be read: to begin anew without a word would cost hours.
        """
        theirs, mine = shared_about(self.name, self.settings), _progress(self.folder)
        if theirs is None or (
            theirs.get("run") == mine.get("run") and theirs.get("step", -1) <= mine.get("step", -1)
        ):
            return False
        return fetch_folder(self.name, self.folder, self.settings)

    def written(self) -> None:
        """Share the checkpoint if there is a new one, unless that would hold up the training.

        Where it cannot be shared, that is said and the training goes on.
        """
        started = time.monotonic()
        if self.settings.storage is None or started < self._next_s:
            return
        about = _progress(self.folder)
        if about == self._shared:
            return
        try:
            share_folder(self.folder, self.name, self.settings, about=about)
            self._shared = about
        except StorageError as error:
            log.warning("checkpoint %s was not shared: %s", about.get("step"), error)
        took_s = time.monotonic() - started
        self._next_s = time.monotonic() + took_s * (1 / _MOST_SHARE - 1)

    def done(self) -> None:
        """Remove it from the storage: it is of no more use."""
        remove_folder(self.name, self.settings)


def _progress(folder: Path) -> dict[str, Any]:
    """Return which run a checkpoint is of, and how far it is (`routellm.routers.checkpoint`)."""
    try:
        doc = json.loads((folder / "progress.json").read_text())
        return {"run": doc["run"], "step": int(doc["step"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
