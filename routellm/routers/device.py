"""Where the fine-tuned kinds are computed, on a GPU or without, and with whose randomness."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from routellm.errors import TrainingError

_DRAWING = threading.RLock()


def torch_device(wanted: str, kind: str) -> Any:
    """Return the torch device that `wanted` (auto, cpu, cuda or cuda:N) means here.

    Raises
    ------
    TrainingError
        If a CUDA device is asked for that is not there.
    """
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        wanted = "cuda" if found else "cpu"
    device = torch.device(wanted)
    if device.type == "cuda" and not found:
        raise TrainingError(
            "torch finds no CUDA device here: install its CUDA build on a machine with a GPU, or "
            f"leave `training.options.{kind}.device` at auto"
        )
    if device.type == "cuda" and (device.index or 0) >= found:
        raise TrainingError(
            f"torch finds no {wanted} here, the last CUDA device is cuda:{found - 1}: name "
            f"another in `training.options.{kind}.device`, or leave it at auto"
        )
    return device


def serving_device(trained_on: str, kind: str) -> Any:
    """Return the device a router is served on: the one its options name, or else what there is.

    A GPU was asked for to train on; the router may be served on another one, or without.
    """
    try:
        return torch_device(trained_on, kind)
    except TrainingError:
        return torch_device("auto", kind)


def trains_on_cuda(options: Any, kind: str) -> bool:
    """Say whether a router with these options takes a CUDA device for its training here.

    A device that is asked for and is not there is `fit`'s to refuse.
    """
    wanted = getattr(options, "device", "cpu")
    if wanted == "cpu":
        return False
    try:
        return bool(torch_device(wanted, kind).type == "cuda")
    except TrainingError:
        return False


def computes_bfloat16(device: Any) -> bool:
    """Return whether a device is a GPU that computes in bfloat16 itself.

    GPUs older than Ampere only emulate it, which is slower than float32.
    """
    import torch

    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def moved(tensor: Any, device: Any) -> Any:
    """Return a CPU tensor on a device; to a GPU from pinned memory, so that nothing waits."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@contextmanager
def own_draws(device: Any = None) -> Iterator[None]:
    """Let torch draw; afterwards the caller's own randomness goes on as if nothing had been drawn.

    Torch has one source of randomness for all threads, so one of them at a time is in here.
    """
    import torch

    devices = [device] if device is not None and device.type == "cuda" else []
    with _DRAWING, torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def seeded(seed: int, device: Any) -> Iterator[None]:
    """Let torch draw as `own_draws` does, what follows from a seed."""
    import torch

    with own_draws(device):
        torch.manual_seed(seed)
        yield
