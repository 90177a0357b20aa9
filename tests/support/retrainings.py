"""Retrainings as processes of their own, forked from one that has imported all of it.

Run as a program it takes a job a line (JSON: arguments of `routellm`, environment, folder, log),
prints the process id of its fork, then the fork's status. A fork leads a session of its own: who
kills its group kills all that it has started. What a test saves by it are the imports, each time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO

from flows.engine import configure
from routellm.settings import Settings
from tests.conftest import REPOSITORY

_IMPORTED = (
    "flows.retrain", "mlflow.pyfunc", "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_store", "great_expectations", "matplotlib.figure",
    "registry.smoke", "expectations.validate", "boto3", "psycopg", "git", "pyarrow.parquet",
)  # fmt: skip


@dataclass
class Retraining:
    """One that runs, or has ended: its output is in `log`."""

    pid: int
    log: Path
    _told: IO[str]
    _status: int | None = None

    def wait(self) -> int:
        """Return its exit status; -9 if it was killed."""
        if self._status is None:
            self._status = int(self._told.readline())
        return self._status

    def kill(self) -> None:
        """Kill its whole process group with signal 9."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    @property
    def runs(self) -> bool:
        """Whether it has not ended, or not been waited for."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, 0)
            return True
        return False

    @property
    def said(self) -> str:
        return self.log.read_text()


class Retrainings:
    """Starts them, one at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(
        self,
        *args: str,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        constants: Mapping[str, float] | None = None,
    ) -> Retraining:
        """Start `routellm` with these arguments in a folder, where its output goes to a new file.

        Parameters
        ----------
        constants : dict
            Other values for constants of modules: ``module.NAME`` -> value.
        """
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / f"{len(list(folder.glob('*.log'))):03d}.log"
        log.touch()
        job = {"args": args, "cwd": str(folder), "log": str(log),
               "environment": environment or {}, "constants": constants or {}}  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Retraining(int(self._process.stdout.readline()), log, self._process.stdout)


@contextmanager
def retrainings(home: Path, environment: Mapping[str, str]) -> Iterator[Retrainings]:
    """Run the program that they are forked from.

    Parameters
    ----------
    home : Path
        Prefect's files are there; it reads its settings before it is forked.
    environment : dict
        The only settings.
    """
    own = ("ROUTELLM_", "PREFECT_", "MLFLOW_", "AWS_")
    plain = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(home)], env=plain | dict(environment), cwd=REPOSITORY,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield Retrainings(process)
    finally:
        process.communicate(timeout=60)


def main(home: str) -> None:
    configure(Settings(home=Path(home)))
    for module in _IMPORTED:
        import_module(module)
    assert threading.active_count() == 1, threading.enumerate()
    while line := sys.stdin.readline():
        child = os.fork()
        if not child:
            sys.exit(_run(json.loads(line)))
        print(child, flush=True)  # noqa: T201
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)  # noqa: T201


def _run(job: dict[str, object]) -> int:
    from routellm.cli import main as routellm

    os.setsid()
    os.chdir(str(job["cwd"]))
    os.environ.update(job["environment"])  # type: ignore[arg-type]
    log = os.open(str(job["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name, value in job["constants"].items():  # type: ignore[attr-defined]
        module, _, constant = name.rpartition(".")
        setattr(import_module(module), constant, value)
    sys.argv = ["routellm", *job["args"]]  # type: ignore[misc]
    try:
        routellm()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


if __name__ == "__main__":
    main(sys.argv[1])
