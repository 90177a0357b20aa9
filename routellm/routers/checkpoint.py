"""Where a long training stands, on disk, so that a killed one goes on from there.

A checkpoint is a safetensors file named after its step and a JSON document that names it, with
its digest. The document is replaced last and in one go, so a kill at any moment leaves either the
old checkpoint or the new one.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routellm.snapshots import file_sha256, write_atomic

log = logging.getLogger(__name__)

_DOCUMENT = "progress.json"


@dataclass(frozen=True)
class Checkpoint:
    """A training as it stood after a step.

    Attributes
    ----------
    run : str
        Digest of all that the training follows from: data, options, seed.
    step : int
        Steps done.
    history : dict
        Stepped metrics so far.
    tensors : dict of torch.Tensor
        Weights and the optimizer's state, on the CPU.
    """

    run: str
    step: int
    history: dict[str, list[float]]
    tensors: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Replace the checkpoint in a folder; where that fails, say so and keep the old one."""
        from safetensors import SafetensorError

        try:
            self._write(folder)
        except (OSError, SafetensorError) as error:  # a full disk shall not end the training
            log.warning("no checkpoint could be written to %s (%s)", folder, error)

    def _write(self, folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        weights = folder / f"step-{self.step}.safetensors"
        temporary = folder / f".{uuid.uuid4().hex}.safetensors"
        save_file(dict(self.tensors), temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(weights)
        doc = {
            "run": self.run,
            "step": self.step,
            "history": self.history,
            "weights": weights.name,
            "sha256": file_sha256(weights),
        }
        write_atomic(folder / _DOCUMENT, json.dumps(doc, indent=1))
        for old in folder.glob("*.safetensors"):  # of earlier steps and of killed writes
            if old != weights:
                old.unlink()

    @classmethod
    def read(cls, folder: Path, run: str) -> Checkpoint | None:
        """Return what was left for this very run; None, with a warning, where it is of no use."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not (folder / _DOCUMENT).exists():
            return None
        try:
            doc = json.loads((folder / _DOCUMENT).read_text())
            if doc["run"] != run:
                log.warning("the checkpoint in %s is another training's: starting anew", folder)
                return None
            weights = folder / doc["weights"]
            if file_sha256(weights) != doc["sha256"]:
                raise ValueError(f"the SHA-256 of {weights.name} differs")
            return cls(run, int(doc["step"]), doc["history"], load_file(weights))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            log.warning("the checkpoint in %s is damaged (%s): starting anew", folder, error)
            return None
