"""Trains bert with a checkpoint, killing it with signal 9 again and again, and prints the end.

A program of its own, because what is killed is a fork of it: torch is imported once, and has not
yet computed anything that would not survive a fork. Prints a JSON object: how many were killed,
and the SHA-256 of the weights of the resumed training and of an unbroken one.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from transformers import BertModel, PreTrainedTokenizerFast  # noqa: F401  imported before forking

from routellm.training import train
from tests.support.tiny_bert import hard_battles

OPTIONS = {"learning_rate": 2e-3, "max_steps": 30, "evaluate_every": 7, "checkpoint_every": 3}


def forked(model: str, checkpoint: Path | None, *, at_step: int = 0, at_rename: int = 0) -> str:
    """Train in a fork and return its weights' digest, or "" if it was killed.

    It is killed some milliseconds after a step, or before one of its renames.
    """
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        os.close(told)
        if at_rename:
            kill_before_rename(at_rename)
        router, _ = train(
            "bert",
            hard_battles(),
            None,
            seed=0,
            options=OPTIONS | {"model": model},
            checkpoint=checkpoint,
            progress=lambda done, total: os.write(tell, f"{done}\n".encode()) and None,
        )
        arrays = router.state()[0]
        digest = hashlib.sha256(b"".join(arrays[k].tobytes() for k in sorted(arrays)))
        os.write(tell, digest.hexdigest().encode())
        os._exit(0)
    os.close(tell)
    last = ""
    with os.fdopen(told) as lines:
        for line in lines:
            last = line.strip()
            if at_step and last == str(at_step):
                time.sleep(random.uniform(0, 0.02))
                os.kill(child, signal.SIGKILL)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    return "" if killed else last


def kill_before_rename(nth: int) -> None:
    rename, left = Path.replace, nth

    def replace(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)

    Path.replace = replace  # type: ignore[method-assign]


if __name__ == "__main__":
    model, folder, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    random.seed(seed)
    torch.set_num_threads(1)
    killed = 0
    kills: list[dict[str, int]] = [{"at_rename": random.randint(1, 8)}, {"at_rename": 1}]
    kills += [{"at_step": step} for step in sorted(random.sample(range(8, 29), 3))]
    for kill in kills:
        killed += not forked(model, folder, **kill)
    resumed = forked(model, folder)
    report = {"killed": killed, "resumed": resumed, "whole": forked(model, None)}
    sys.stdout.write(json.dumps(report))
