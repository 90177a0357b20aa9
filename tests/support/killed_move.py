"""Kills a move with signal 9 at each of its steps, lets another process mend it, and prints both.

A program of its own, because what is killed is a fork of it: MLflow is imported once. Prints a
JSON list: an object a step, with what was found before and after mending.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow.store.model_registry.sqlalchemy_store  # before forking
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
import pytest

from registry import Registry, moves
from registry.history import replay
from routellm.errors import RegistryError
from tests.support.bare import bare_registry, fails, works

LEASE_S = 0.3


def forked(work: Callable[[Callable[[Any], None]], None]) -> tuple[list[Any], bool]:
    """Run `work` in a fork; returns what it told, and whether it was killed."""
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        os.close(told)
        status = 1
        try:
            work(lambda value: os.write(tell, json.dumps(value).encode() + b"\n") and None)
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    os.close(tell)
    with os.fdopen(told) as lines:
        found = [json.loads(line) for line in lines]
    status = os.waitpid(child, 0)[1]
    killed = os.WIFSIGNALED(status)
    assert killed or status == 0, "the fork failed: see above"
    return found, killed


def die_at(nth: int, tell: Callable[[Any], None], *, entry: int) -> None:
    """Be killed at the nth step that follows the start of so many entries."""
    left, begun = nth, 0

    def step(name: str) -> None:
        nonlocal left, begun
        begun += name == "before the entry"
        if begun < entry:
            return
        left -= 1
        if not left:
            tell(name)
            os.kill(os.getpid(), signal.SIGKILL)

    moves.step = step  # type: ignore[assignment]


def seen(registry: Registry) -> dict[str, Any]:
    chain = registry.entries.read()
    standing = replay(chain.entries)
    aliases = registry.aliases()
    last = chain.last
    return {
        "champion": aliases.get("champion"),
        "previous": aliases.get("previous"),
        "replayed": [standing.champion, *standing.before],
        "unsettled": registry.unsettled(),
        "last": last and {**last.to_dict(), "marks": dict(last.marks)},
    }


def move(registry: Registry, what: str) -> None:
    if what == "rollback":
        registry.rollback(smoke=works)
    elif what == "promote":
        registry.promote(registry.get("3"), force_reason="killed", smoke=works)
    else:
        with pytest.raises(RegistryError, match="was taken back"):
            registry.promote(registry.get("3"), force_reason="killed", smoke=fails)


def main(home: Path, what: str) -> list[dict[str, Any]]:
    """Return what each killed move left, and what mending made of it."""

    def killed_at(nth: int) -> Callable[[Callable[[Any], None]], None]:
        """Mend what the kill before this one left, begin as always, and be killed at a step."""

        def work(tell: Callable[[Any], None]) -> None:
            registry = bare_registry(home, 0 if nth > 1 else 3, lease_s=LEASE_S)
            if nth > 1:
                moves._SMOKE_S = 0.0
                time.sleep(LEASE_S)
                before = seen(registry)
                said = registry.repair(smoke=fails if what == "revert" else works)
                again = registry.repair(smoke=works)
                tell({"before": before, "said": said, "again": again, "after": seen(registry)})
            # only a rollback asks where version 2 came from
            for version in ("1", "2") if nth == 1 or what == "rollback" else ("2",):
                if registry.aliases().get("champion") != version:
                    registry.promote(registry.get(version), force_reason="begin", smoke=works)
            # up to its second entry a revert is a promotion
            die_at(nth, tell, entry=2 if what == "revert" else 1)
            move(registry, what)

        return work

    reports: list[dict[str, Any]] = []
    step = None
    for nth in range(1, 100):
        told, killed = forked(killed_at(nth))
        if nth > 1:
            reports.append({"step": step, **told.pop(0)})
        if not killed:
            break
        (step,) = told
    return reports


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), sys.argv[2])) + "\n")
