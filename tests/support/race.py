"""Processes that promote at the same time, on any MLflow.

`race` runs this as a program, since what races are forks of it: MLflow is imported once, and
connected to in each fork. Every process has a home of its own, as machines do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow.store.model_registry.sqlalchemy_store  # before forking
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

from registry import connect
from registry.chain import History
from routellm.errors import RouteLLMError
from routellm.settings import Settings
from tests.support.bare import PROMOTE, bare_version, works


@dataclass(frozen=True)
class Race:
    """What came of a race.

    Attributes
    ----------
    won : list of str
        Versions whose process was told that it promoted them.
    lost : list of str
        What the others were told.
    champion, previous : str or None
        Where the aliases point afterwards.
    history : list of dict
        The verified chain afterwards, as `Entry.to_dict`.
    void : int
        Entries of writers that were not the fastest.
    """

    won: list[str]
    lost: list[str]
    champion: str | None
    previous: str | None
    history: list[dict[str, Any]]
    void: int


def race(
    tracking_uri: str,
    folder: Path,
    *,
    processes: int = 20,
    force: bool = False,
    model: str = "race",
) -> Race:
    """Let processes promote a version each at once, all judged against version 1 (or forced).

    The model must be new in that MLflow.
    """
    program = [sys.executable, "-m", "tests.support.race", tracking_uri, str(folder), model]
    done = subprocess.run(
        [*program, str(processes), "force" if force else "judged"],
        capture_output=True,
        text=True,
        timeout=840,
        cwd=folder,  # MLflow without a server leaves artifacts where it runs
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert done.returncode == 0, done.stderr
    return Race(**json.loads(done.stdout.splitlines()[-1]))


def check_race(found: Race, *, processes: int, force: bool = False) -> None:
    """Assert what must hold after a race, whatever the database."""
    moves = [e for e in found.history if e["from"] != e["to"]]
    assert [e["from"] for e in moves] == [None, *(e["to"] for e in moves[:-1])]
    assert [e["prev"] for e in found.history[1:]] == [e["sha256"] for e in found.history[:-1]]
    assert all(e["applied_at"] for e in found.history)
    assert found.champion == moves[-1]["to"]
    assert found.previous == moves[-1]["from"]
    assert len(found.won) + len(found.lost) == processes
    assert sorted(found.won) == sorted(e["to"] for e in moves[1:])
    if force:
        assert not found.lost
    else:
        assert len(found.won) == 1
        for told in found.lost:
            assert told.startswith("the champion moved from 1 to ")
            assert "\n" not in told


def _settings(uri: str, home: Path, model: str) -> Settings:
    return Settings(home=home, tracking_uri=uri, model=model)


def _forked(work: Callable[[], Any]) -> int:
    """Let a fork do the work; returns the pipe that its answer comes through."""
    receive, send = os.pipe()
    if os.fork():
        os.close(send)
        return receive
    os.close(receive)
    try:
        got = {"got": work()}
    except BaseException:
        got = {"error": traceback.format_exc()}
    os.write(send, json.dumps(got).encode())
    os._exit(0)


def _received(pipe: int) -> Any:
    with os.fdopen(pipe, "rb") as file:
        doc = json.loads(file.read())
    if "error" in doc:
        sys.exit(doc["error"])
    return doc["got"]


def main(uri: str, folder: Path, model: str, processes: int, force: bool) -> dict[str, Any]:
    """Set up, race, and read what is left, each in forks of this process."""

    def set_up() -> None:
        registry = connect(_settings(uri, folder / "home", model))
        for _ in range(processes + 1):
            bare_version(registry)
        registry.promote(registry.get("1"), PROMOTE, smoke=works)

    _received(_forked(set_up))
    ready_here, ready_there = os.pipe()
    gate_here, gate_there = os.pipe()

    def promote(number: str) -> list[str | bool]:
        registry = connect(_settings(uri, folder / f"home-{number}", model))
        version = registry.get(number)
        os.write(ready_there, b".")
        os.close(gate_there)
        os.read(gate_here, 1)  # ends when the parent closes its side
        try:
            if force:
                registry.promote(version, force_reason="race", smoke=works)
            else:
                registry.promote(version, PROMOTE, expected="1", smoke=works)
        except RouteLLMError as error:
            return [False, str(error)]
        return [True, number]

    pipes = [_forked(lambda n=str(i + 2): promote(n)) for i in range(processes)]
    for _ in range(processes):
        os.read(ready_here, 1)
    os.close(gate_there)
    outcomes = [_received(pipe) for pipe in pipes]

    def left() -> dict[str, Any]:
        registry = connect(_settings(uri, folder / "home", model))
        chain = History(registry.settings, registry.client).read()
        aliases = registry.aliases()
        return {
            "champion": aliases.get("champion"),
            "previous": aliases.get("previous"),
            "history": [e.to_dict() for e in chain.entries],
            "void": sum(e.void for e in chain.written),
        }

    return {
        "won": [said for won, said in outcomes if won],
        "lost": [said for won, said in outcomes if not won],
        **_received(_forked(left)),
    }


if __name__ == "__main__":
    uri, folder, model, processes, how = sys.argv[1:]
    report = main(uri, Path(folder), model, int(processes), how == "force")
    sys.stdout.write(json.dumps(report) + "\n")
