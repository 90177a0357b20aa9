"""A process that is killed (-9) at a call of something, before it is made or once it is done."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any


def killed_at(
    number: int, kind: type, methods: Sequence[str], act: Callable[[], Any], *, done: bool
) -> bool:
    """Run `act` in a fork that dies at its n-th call of the methods, and say whether it did."""
    child = os.fork()
    if not child:
        try:
            _wrap(number, kind, methods, done)
            act()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def _wrap(number: int, kind: type, methods: Sequence[str], done: bool) -> None:
    left = number

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            last = left == 0
            if last and not done:
                os.kill(os.getpid(), signal.SIGKILL)
            out = call(*args, **kwargs)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)
            return out

        return wrapped

    for method in methods:
        setattr(kind, method, dying(getattr(kind, method)))
