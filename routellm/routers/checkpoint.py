"""Where a long training stands, on disk, so that a killed one goes on from there.

A checkpoint is a safetensors file named after its step and a JSON document that names it, with
its digest. The document is replaced last and in one go, so a kill at any moment leaves either the
old checkpoint or the new one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


# --- what is in one ------------------------------------------------------------------------------


def fingerprint(doc: list[Any], arrays: Iterable[NDArray[Any]], prompts: Iterable[str]) -> str:
    """Return a digest of all that the trained weights follow from.

    Parameters
    ----------
    doc : list
        JSON-serialisable: options, base, seed, device.
    arrays, prompts : iterable
        What is learnt and validated on, in order.
    """
    import torch

    doc = [*doc, str(torch.__version__)]
    digest = hashlib.sha256(json.dumps(doc, sort_keys=True).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    for prompt in prompts:
        digest.update(hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()


def resumable(
    parameters: Mapping[str, Any], best: Mapping[str, Any], optimizer: Any
) -> dict[str, Any]:
    """Return all tensors that a training goes on from, on the CPU."""
    out = copied(parameters, "now.") | {f"best.{k}": t for k, t in best.items()}
    for name, p in parameters.items():
        out |= copied(optimizer.state[p], f"optimizer.{name}.")
    return out


def resume(
    tensors: Mapping[str, Any], parameters: Mapping[str, Any], optimizer: Any
) -> dict[str, Any]:
    """Put parameters and optimizer where they stood, and return the best weights so far."""
    import torch

    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[f"now.{name}"])
    # the optimizer numbers its weights group by group, and knows on which device each moment lies
    names = {id(p): name for name, p in parameters.items()}
    numbered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    state = {
        i: {key: tensors[f"optimizer.{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        for i, name in enumerate(numbered)
        if f"optimizer.{name}.step" in tensors  # a weight out of use has no state
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return {k.removeprefix("best."): t for k, t in tensors.items() if k.startswith("best.")}


def copied(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return copies on the CPU, which training does not go on to change."""
    return {f"{prefix}{k}": t.detach().to("cpu", copy=True) for k, t in tensors.items()}
