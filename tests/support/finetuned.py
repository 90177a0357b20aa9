"""What the tests of fine-tuned kinds share: breaking a training off, comparing what was learnt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from routellm import training
from routellm.calibration import IDENTITY
from routellm.routers.base import Router


class Broken(BaseException):
    pass


def stop_at(step: int) -> Callable[[int, int], None]:
    """Return a progress callback that breaks a training off after a step."""

    def progress(done: int, total: int) -> None:
        if done == step:
            raise Broken

    return progress


def same_bytes(one: Router, two: Router) -> bool:
    a, b = one.state()[0], two.state()[0]
    return a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)


def flip_a_bit(weights: Path) -> None:
    raw = bytearray(weights.read_bytes())
    raw[-5] ^= 1
    weights.write_bytes(raw)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose more time to handing work out than they win."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(*args, **options):
    """Return a router trained as a retraining does, but for its calibration, and the report.

    What a kind itself learns and keeps is asked for before its win rates are mapped.
    """
    router, report = training.train(*args, **options)
    router.platt = IDENTITY
    return router, report
