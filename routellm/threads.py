"""One thread where the work is too small for two: a second one costs more than it brings.

Torch and BLAS keep their own pools, whose threads spin while they wait. On a machine with few
cores, or a busy one, a small product then takes ten times as long as on one thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch use one thread inside."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let numpy's and scipy's BLAS use one thread inside."""
    with _pools().limit(limits=1, user_api="blas"):
        yield


@cache
def _pools() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()  # finding the loaded libraries takes milliseconds: once
