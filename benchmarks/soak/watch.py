"""What a soak looks at all the time: requests, memory, runs, versions, and what was ingested."""

from __future__ import annotations

import itertools
import os
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable

import httpx
import psutil

from benchmarks.soak.place import Place
from flows.recent import recent_runs
from routellm.errors import SnapshotError
from routellm.sources.simulated import simulated_benchmark

REQUEST_EVERY_S = 0.5
TOLD_EVERY_S = 10.0
_PATIENCE_S = 20.0  # for one answer
_ENDED = ("Completed", "Failed", "Crashed", "Cancelled")


class _Thread(threading.Thread):
    """Calls `look` again and again until it is stopped; what it raises is an event."""

    every_s = 1.0

    def __init__(self, place: Place) -> None:
        super().__init__(daemon=True, name=type(self).__name__)
        self.place, self.log = place, place.log
        self._stopping = threading.Event()

    def look(self) -> None:
        raise NotImplementedError

    def run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.look()
            except Exception as error:
                self.log.write("watcher failed", watcher=self.name, why=repr(error))
            self._stopping.wait(self.every_s)

    def stop(self) -> None:
        self._stopping.set()
        self.join(60)


class Traffic(_Thread):
    """Asks the gateway again and again, each time on a new connection.

    It is an http address: `verify` spares the reading of certificates, 20 ms each time.

    Attributes
    ----------
    answered_at : list of float
        Seconds since the start at which good answers came.
    failed : Counter
        Why others did not.
    version : str or None
        What the last answer came from.
    """

    every_s = REQUEST_EVERY_S

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.answered_at: list[float] = []
        self.failed: Counter[str] = Counter()
        self._prompts = itertools.cycle(simulated_benchmark().prompts)
        self._took_ms: list[float] = []
        self._lately: Counter[str] = Counter()
        self.version: str | None = None
        self._told_at = 0.0

    def look(self) -> None:
        message = {"role": "user", "content": next(self._prompts)}
        ask = {"model": "router", "messages": [message]}
        began = time.perf_counter()
        try:
            url = f"{self.place.urls['gateway']}/v1/chat/completions"
            answer = httpx.post(url, json=ask, timeout=_PATIENCE_S, verify=False)
            why = "" if answer.status_code == 200 else f"status {answer.status_code}"
            if not why and not answer.json()["choices"][0]["message"]["content"]:
                why = "an empty answer"
        except (httpx.HTTPError, ValueError, KeyError) as error:
            why, answer = type(error).__name__, None
        if why or answer is None:
            self.failed[why] += 1
            self._lately[why] += 1
        else:
            self._took_ms.append(1000 * (time.perf_counter() - began))
            self.answered_at.append(self.log.now())
            version = answer.headers.get("x-routellm-version")
            if version != self.version:
                self.version = version
                self.log.write("served", version=version)
        if self.log.now() - self._told_at > TOLD_EVERY_S:
            self._tell()

    def _tell(self) -> None:
        took = sorted(self._took_ms) or [0.0]
        self.log.write(
            "requests", answered=len(self._took_ms), failed=dict(self._lately),
            p50_ms=round(statistics.median(took), 1), longest_ms=round(took[-1], 1),
        )  # fmt: skip
        self._took_ms, self._lately, self._told_at = [], Counter(), self.log.now()


class Memory(_Thread):
    """Measures each part's memory (resident, what processes share counted in each) and the disk."""

    every_s = 10.0

    def look(self) -> None:
        megabytes: Counter[str] = Counter()
        for pid, environment in self.place.processes().items():
            try:
                process = psutil.Process(pid)
                part = _part(environment, " ".join(process.cmdline()))
                megabytes[part] += process.memory_info().rss / 1e6
            except psutil.Error:
                continue
        supervisor = self.place.parts().get("supervisor")
        if supervisor is not None:
            megabytes["up"] += supervisor.memory_info().rss / 1e6
        disk = sum(_size(entry) for entry in _files(str(self.place.home)))
        free = psutil.virtual_memory().available / 1e6
        told = {name: round(mb) for name, mb in sorted(megabytes.items())}
        self.log.write("memory", mb=told, disk_mb=round(disk / 1e6, 1), free_mb=round(free),
                       load=round(os.getloadavg()[0], 2))  # fmt: skip


class Observer(_Thread):
    """Sees what comes of it all: parts started again, files taken in, runs, versions, aliases."""

    every_s = 2.0

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.dropped: dict[str, float] = {}  # whole files, by when they were whole
        self.ingested: set[str] = set()
        self.when_completed: list[tuple[str, Callable[[], None]]] = []
        self._pids: dict[str, int] = {}
        self._runs: dict[str, str] = {}
        self._versions: set[str] = set()
        self._aliases: dict[str, str] = {}
        self._snapshot = ""

    def look(self) -> None:
        self._look_at_parts()
        self._look_at_data()
        try:
            self._look_at_runs()
            self._look_at_mlflow()
        except (httpx.HTTPError, ValueError, KeyError):
            pass  # away: its own event says so

    def under_way(self) -> list[str]:
        """Return the runs that have begun, or are about to, and not ended."""
        return [run for run in self._runs.values() if not run.endswith(_ENDED)]

    def _look_at_parts(self) -> None:
        for name, process in self.place.parts().items():
            if self._pids.get(name) != process.pid:
                again = name in self._pids
                self.log.write("part started again" if again else "part started",
                               part=name, pid=process.pid)  # fmt: skip
                self._pids[name] = process.pid

    def _look_at_data(self) -> None:
        try:
            manifest = self.place.store.latest()
        except SnapshotError:
            return
        if manifest is None or manifest.digest == self._snapshot:
            return
        self._snapshot = manifest.digest
        told = self.log.now()
        taken: set[str] = set().union(*(set(c) for c in manifest.cursors.values()))
        fresh = {name for name in taken & self.dropped.keys() if name not in self.ingested}
        self.log.write(
            "snapshot", digest=manifest.digest[:12], battles=manifest.rows,
            files={name: round(told - self.dropped[name], 1) for name in sorted(fresh)},
        )  # fmt: skip
        self.ingested |= fresh

    def _look_at_runs(self) -> None:
        for run in reversed(recent_runs(self.place.api, 40)):
            told = f"{run.name} {run.state}"
            if self._runs.get(run.id) == told:
                continue
            self._runs[run.id] = told
            self.log.write("run", id=run.id, run=run.name, state=run.state,
                           seconds=round(run.seconds, 1), message=run.message[:300])  # fmt: skip
            for waiting in list(self.when_completed):
                if run.state == "Completed" and waiting[0] == run.name:
                    self.when_completed.remove(waiting)
                    waiting[1]()

    def _look_at_mlflow(self) -> None:
        url = f"{self.place.urls['mlflow']}/api/2.0/mlflow"
        with httpx.Client(timeout=2.0, verify=False) as client:
            found = client.get(f"{url}/model-versions/search", params={"filter": "name='router'"})
            versions = found.json().get("model_versions", [])
            for one in sorted(versions, key=lambda v: int(v["version"])):
                if one["version"] not in self._versions:
                    self._versions.add(one["version"])
                    tags = {tag["key"]: tag["value"] for tag in one.get("tags", [])}
                    self.log.write("version", version=one["version"], kind=tags.get("kind"),
                                   snapshot=tags.get("snapshot", "")[:12])  # fmt: skip
            model = client.get(f"{url}/registered-models/get", params={"name": "router"}).json()
        listed = model.get("registered_model", {}).get("aliases", [])
        aliases = {one["alias"]: one["version"] for one in listed}
        if aliases != self._aliases:
            self._aliases = aliases
            self.log.write("aliases", **aliases)


def _part(environment: dict[str, str], command: str) -> str:
    if "PREFECT__FLOW_RUN_ID" in environment or "prefect.engine" in command:
        return "runs"
    for words, part in (
        ("worker start", "worker"), ("routellm.cli serve", "gateway"),
        ("routellm.cli watch", "watch"), ("routellm.cli deploy", "deploy"), ("mlflow", "mlflow"),
    ):  # fmt: skip
        if words in command:
            return part
    return "prefect"


def _files(folder: str) -> list[os.DirEntry[str]]:
    found: list[os.DirEntry[str]] = []
    try:
        with os.scandir(folder) as entries:
            for one in entries:
                found += _files(one.path) if one.is_dir(follow_symlinks=False) else [one]
    except OSError:
        pass
    return found


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except OSError:
        return 0
