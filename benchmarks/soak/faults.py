"""Doing what a soak's plan says: dropping files, killing and freezing parts, locking databases."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial

import httpx
import numpy as np
import psutil

from benchmarks.soak.place import SETTLE_S, Place
from benchmarks.soak.plan import FROZEN_S, Drop, Fault, broken_file
from benchmarks.soak.watch import Observer
from flows.recent import recent_runs
from routellm.sources.inbox import unreadable

LOCKED_S = 8.0
_NOTED_WITHIN_S = 300.0  # until an ingest has met a broken file
HALF_S = 45.0  # until the rest of a half-written file comes
_PIECES = 6
_WAIT_FOR_RUN_S = 420.0
_WELL_WITHIN_S = 300.0


class Doer:
    """Carries out drops and faults, each in a thread of its own, and logs what follows."""

    def __init__(self, place: Place, observer: Observer, seed: int) -> None:
        self.place, self.observer, self.log = place, observer, place.log
        self.rng = np.random.default_rng([seed, 1])
        self._one_up = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._count = 0
        self._began: dict[int, float] = {}

    def do(self, one: Drop | Fault, data: bytes = b"") -> None:
        """Begin with one of the plan."""
        self._count += 1
        if isinstance(one, Drop):
            work = partial(self._drop, one, data)
        else:
            work = partial(self._disturb, one.what, self._count)
        thread = threading.Thread(target=self._logged, args=(one, work), daemon=True)
        thread.start()
        self._threads.append(thread)

    def finish(self, timeout_s: float) -> None:
        """Wait for all that was begun."""
        end = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    # --- files ----------------------------------------------------------------------------------

    def _drop(self, one: Drop, data: bytes) -> None:
        path = self.place.inbox / one.name
        self.log.write("file", name=one.name, how=one.how, battles=one.battles, bytes=len(data))
        if one.how == "broken":
            path.write_bytes(broken_file(one.name, self._count))
            end = time.monotonic() + _NOTED_WITHIN_S
            while one.name not in unreadable(self.place.inbox) and time.monotonic() < end:
                time.sleep(1)
            if one.name in unreadable(self.place.inbox):
                self.log.write("file passed over", name=one.name)
            return  # and stays: nobody is there at night
        if one.how == "renamed":
            hidden = path.with_name(f".{path.name}")
            hidden.write_bytes(data)
            hidden.rename(path)
        elif one.how == "slow":
            step = -(-len(data) // _PIECES)
            with path.open("wb", buffering=0) as file:
                for start in range(0, len(data), step):
                    file.write(data[start : start + step])
                    time.sleep(SETTLE_S / 2)
        else:
            with path.open("wb", buffering=0) as file:
                file.write(data[: len(data) // 2])
                time.sleep(HALF_S)
                file.write(data[len(data) // 2 :])
        self.observer.dropped[one.name] = self.log.now()
        if one.how != "renamed":
            self.log.write("file whole", name=one.name)

    # --- faults ---------------------------------------------------------------------------------

    def _disturb(self, fault: str, number: int) -> None:
        verb, _, what = fault.partition(" ")
        if fault == "kill training":
            self._kill_training(number)
            return
        if fault == "kill up":
            self._kill_up(number)
        elif verb == "kill":
            self._kill_part(number, "worker-cpu" if what == "worker" else what)
        elif verb == "freeze":
            self._freeze(number, what)
        else:
            self._hold_locked(number, what)
        self._wait_until_well(number, fault)

    def _logged(self, one: Drop | Fault, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # the soak goes on, and the log says so
            self.log.write("not done", what=str(one), why=repr(error))

    def _begun(self, number: int, what: str, **told: object) -> None:
        self._began[number] = self.log.now()
        self.log.write("fault", n=number, what=what, **told)

    def _kill_part(self, number: int, part: str) -> None:
        with self._one_up:
            process = self._running(part)
            process.kill()
        self._begun(number, f"kill {part}", pid=process.pid)

    def _kill_up(self, number: int) -> None:
        with self._one_up:
            self._begun(number, "kill up", pid=self.place.kill())
            time.sleep(5.0)  # its parts go on meanwhile
            self.place.start()
            end = time.monotonic() + _WELL_WITHIN_S
            while "supervisor" not in self.place.parts() and time.monotonic() < end:
                time.sleep(0.5)

    def _kill_training(self, number: int) -> None:
        """Kill the process of a run that retrains or trains, once there is one at work."""
        wanted = ("retrain", "train-router/cpu")
        end = time.monotonic() + _WAIT_FOR_RUN_S
        while time.monotonic() < end:
            try:
                names = {run.id: run.name for run in recent_runs(self.place.api, 20)}
            except (httpx.HTTPError, ValueError, KeyError):
                names = {}
            for pid, environment in self.place.processes().items():
                name = names.get(environment.get("PREFECT__FLOW_RUN_ID", ""))
                if name in wanted:
                    time.sleep(float(self.rng.uniform(0, 15)))
                    if self._killed(pid):
                        self._begun(number, "kill training", run=name, pid=pid)
                        told = partial(self._well, number, "kill training")
                        self.observer.when_completed.append(("retrain", told))
                        return
            time.sleep(1.0)
        self.log.write("fault left out", n=number, what="kill training", why="nothing trained")

    def _killed(self, pid: int) -> bool:
        try:
            process = psutil.Process(pid)
            for one in (*process.children(recursive=True), process):
                one.kill()
        except psutil.Error:
            return False
        return True

    def _freeze(self, number: int, part: str) -> None:
        """Stop all processes of a part, and let them go on."""
        leader = self._running(part)
        group = os.getpgid(leader.pid)
        os.killpg(group, signal.SIGSTOP)
        self._begun(number, f"freeze {part}", pid=leader.pid, seconds=FROZEN_S)
        time.sleep(FROZEN_S)
        os.killpg(group, signal.SIGCONT)

    def _hold_locked(self, number: int, name: str) -> None:
        with closing(sqlite3.connect(self.place.home / name, timeout=30)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            self._begun(number, f"lock {name}", seconds=LOCKED_S)
            time.sleep(LOCKED_S)
            connection.rollback()

    def _running(self, part: str) -> psutil.Process:
        end = time.monotonic() + _WELL_WITHIN_S
        while time.monotonic() < end:
            if (process := self.place.parts().get(part)) is not None:
                return process
            time.sleep(0.5)
        raise RuntimeError(f"{part} does not run")

    def _wait_until_well(self, number: int, what: str) -> None:
        end = time.monotonic() + _WELL_WITHIN_S
        while time.monotonic() < end:
            time.sleep(0.5)
            if self.place.well():
                self._well(number, what)
                return
        self.log.write("not well", n=number, what=what, after_s=_WELL_WITHIN_S)

    def _well(self, number: int, what: str) -> None:
        after_s = round(self.log.now() - self._began[number], 1)
        self.log.write("well", n=number, what=what, after_s=after_s)
