"""Run several programs as one: start them in order, start again what ends, stop all.

Each program is a process in a session of its own, so that Ctrl-C in a terminal reaches only who
supervises. What runs stands in ``<folder>/up.json``, by process id and time of creation, so that
what a killed supervisor left behind can be ended by the next one, and nobody else's process is.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import signal
import ssl
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import httpx
import psutil

from routellm.errors import UsageError

State = Literal["waiting", "starting", "running", "silent", "done", "ended"]

ANSWERS_WITHIN_S = 2.0  # of one look at a part's address
LOOK_EVERY_S = 3.0
SILENT_S = 120.0  # after so long without an answer a part is started again
STEADY_S = 60.0  # after so long of running, an end is a first one again
LONGEST_WAIT_S = 60.0  # before a part that ended is started again
_LOG_BYTES = 10_000_000


@dataclass(frozen=True)
class Part:
    """A program to run.

    Parameters
    ----------
    ready : str or None
        Address that answers with a status below 400 once the part can be used; None: at once.
    url : str
        Address that a person opens.
    after : tuple of str
        Parts that must run, or be done, before this one starts.
    once : bool
        Whether it ends by itself; it is started again until it has ended well.
    stop_s : float
        Seconds that it has to end before it is killed.
    """

    name: str
    command: tuple[str, ...]
    ready: str | None = None
    url: str = ""
    after: tuple[str, ...] = ()
    once: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_s: float = 30.0


@dataclass
class Running:
    """A part, and how it is."""

    part: Part
    state: State = "waiting"
    process: subprocess.Popen[bytes] | None = None
    since: float = 0.0
    starts: int = 0
    failures: int = 0  # ends in a row
    start_at: float = 0.0
    looked_at: float = 0.0
    answered_at: float = 0.0
    last_status: int | None = None


class Supervisor:
    """Runs parts until it is told to stop.

    Parameters
    ----------
    folder : Path
        Where the record of what runs, and the logs (``logs/<part>.log``), are written.

    Raises
    ------
    UsageError
        On `start`, if another supervisor of this folder runs.
    """

    def __init__(self, parts: Sequence[Part], folder: Path) -> None:
        self.folder = folder
        self.parts = {part.name: Running(part) for part in parts}
        self._lock: IO[str] | None = None

    def start(self) -> list[str]:
        """Become the one supervisor of the folder; return the names of leftovers it ended."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = (self.folder / "up.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise UsageError(
                f"`routellm up` runs already for {self.folder}: stop it with `routellm down`"
            ) from None
        self._lock = lock
        ended = end_leftovers(self.folder)
        self._record()
        return ended

    def tick(self) -> None:
        """Look at every part once, and start what is to be started."""
        for one in self.parts.values():
            if one.process is None:
                self._start_if_due(one)
            elif one.process.poll() is not None:
                self._ended(one)
            else:
                self._look(one)

    def log(self, name: str) -> Path:
        """Return the file that a part's output goes to."""
        return self.folder / "logs" / f"{name}.log"

    def stop(self, said: Callable[[str], None] | None = None) -> list[str]:
        """End all parts, the last started first; return those that had to be killed."""
        killed = []
        for one in reversed(self.parts.values()):
            process = one.process
            if process is None or process.poll() is not None:
                continue
            if said:
                said(one.part.name)
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(one.part.stop_s)
            except subprocess.TimeoutExpired:
                killed.append(one.part.name)
            _end_group(process.pid)  # what it had started and left
            process.wait()
            one.process, one.state = None, "ended"
        (self.folder / "up.json").unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.close()
        return killed

    def _start_if_due(self, one: Running) -> None:
        if one.state == "done" or time.monotonic() < one.start_at:
            return
        if any(self.parts[name].state not in ("running", "done") for name in one.part.after):
            return
        log = self.log(one.part.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists() and log.stat().st_size > _LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))
        with log.open("ab") as file:
            one.process = subprocess.Popen(
                one.part.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **one.part.environment},
                start_new_session=True,
            )
        self._record()
        one.starts += 1
        one.since = one.answered_at = time.monotonic()
        one.state = "starting" if one.part.ready or one.part.once else "running"

    def _ended(self, one: Running) -> None:
        assert one.process is not None
        _end_group(one.process.pid)
        one.last_status = one.process.returncode
        one.process = None
        if one.part.once and one.last_status == 0:
            one.state = "done"
        else:
            steady = one.state == "running" and time.monotonic() - one.since > STEADY_S
            one.failures = 1 if steady else one.failures + 1
            one.start_at = time.monotonic() + min(2.0 ** (one.failures - 1), LONGEST_WAIT_S)
            one.state = "ended"
        self._record()

    def _look(self, one: Running) -> None:
        now = time.monotonic()
        every = LOOK_EVERY_S if one.state == "running" else 0.5
        if one.part.ready is None or now - one.looked_at < every:
            return
        one.looked_at = now
        if answers(one.part.ready):
            one.answered_at = time.monotonic()
            one.state = "running"
        elif one.state != "starting":
            one.state = "silent"
        if time.monotonic() - one.answered_at > SILENT_S:
            assert one.process is not None
            _end_group(one.process.pid)  # the next tick finds it ended

    def _record(self) -> None:
        """Write down what runs; a process is in it from just after its start on."""
        from routellm.snapshots import write_atomic  # pyarrow: not for who asks for `--help`

        mine = [os.getpid(), *(p.process.pid for p in self.parts.values() if p.process)]
        names = ["supervisor", *(n for n, p in self.parts.items() if p.process)]
        entries = []
        for name, pid in zip(names, mine, strict=True):
            with suppress(psutil.Error):
                entries.append(
                    {"name": name, "pid": pid, "created": psutil.Process(pid).create_time()}
                )
        write_atomic(self.folder / "up.json", json.dumps(entries, indent=1))


def answers(url: str) -> bool:
    """Say whether an address answers, and with success."""
    try:
        return httpx.get(url, timeout=ANSWERS_WITHIN_S, verify=tls()).status_code < 400
    except httpx.HTTPError:
        return False


@functools.cache
def tls() -> ssl.SSLContext:
    """Return what servers' certificates are checked by.

    Made once: reading it takes 50 ms of CPU, and who supervises asks several addresses a second.
    """
    return httpx.create_ssl_context()


def recorded(folder: Path) -> dict[str, psutil.Process]:
    """Return the recorded processes that still run, by name."""
    try:
        entries: list[dict[str, Any]] = json.loads((folder / "up.json").read_text())
    except FileNotFoundError:
        return {}
    found = {}
    for entry in entries:
        with suppress(psutil.Error):
            process = psutil.Process(entry["pid"])
            same = abs(process.create_time() - entry["created"]) < 1.0
            if same and process.status() != psutil.STATUS_ZOMBIE:
                found[str(entry["name"])] = process
    return found


def end_leftovers(folder: Path) -> list[str]:
    """End what a killed supervisor left running; return the parts' names."""
    ended = []
    for name, process in reversed(recorded(folder).items()):
        if name == "supervisor" or process.pid == os.getpid():
            continue
        with suppress(psutil.Error):
            process.terminate()
            ends_within(process, 30)
            _end_group(process.pid)
            ended.append(name)
    return ended


def ends_within(process: psutil.Process, seconds: float) -> bool:
    """Wait for a process to end; say whether it did.

    One that has ended and that its parent does not ask after, as where a container's first process
    asks after none, is there for good (a zombie): it has ended.
    """
    end = time.monotonic() + seconds
    with suppress(psutil.NoSuchProcess):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
    return True


def _end_group(pid: int) -> None:
    """Kill what is left of the session that a part led."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
