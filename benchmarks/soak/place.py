"""The place of a soak: a folder with settings, `routellm up` in it, and the log of what happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.soak.plan import EACH, write_benchmark
from routellm.settings import Settings
from routellm.snapshots import SnapshotStore
from routellm.sources.simulated import SIM_STRONG, SIM_WEAK
from routellm.supervise import recorded
from tests.support.servers import free_port

SETTLE_S = 4.0
FRESH = 2 * EACH  # battles that ask for a retraining
_TOML = """
home = "{home}"
sources = []
inbox_settle_s = {settle}
strong = "{strong}"
weak = "{weak}"
[training]
routers = ["sw_ranking", "mf", "knn", "gaussian_process"]
heldout_share = 0.2
[evaluation]
benchmarks = "{benchmarks}"
[workers]
min_fresh_battles = {fresh}
[gateway]
port = {gateway}
poll_s = 1.0
[up]
prefect_port = {prefect}
mlflow_port = {mlflow}
"""


class Log:
    """Events as JSON lines, each with seconds since the start; written by several threads."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")
        self._lock = threading.Lock()
        self._since = time.monotonic()

    def now(self) -> float:
        return time.monotonic() - self._since

    def write(self, event: str, **fields: Any) -> None:
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._lock:
            doc = {"t": round(self.now(), 2), "at": at, "event": event, **fields}
            self._file.write(json.dumps(doc, default=str) + "\n")
            self._file.flush()


class Place:
    """One home, and how its parts are reached."""

    def __init__(self, folder: Path, log: Log) -> None:
        self.folder, self.log = folder, log
        self.home = folder / "home"
        self.inbox = self.home / "inbox"
        self.inbox.mkdir(parents=True)
        ports = {name: free_port() for name in ("gateway", "prefect", "mlflow")}
        write_benchmark(folder / "benchmarks")
        (folder / "routellm.toml").write_text(
            _TOML.format(
                home=self.home, settle=SETTLE_S, fresh=FRESH, strong=SIM_STRONG, weak=SIM_WEAK,
                benchmarks=folder / "benchmarks", **ports,
            )
        )  # fmt: skip
        self.urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
        self.api = f"{self.urls['prefect']}/api"
        self.health = {
            "prefect": f"{self.api}/health",
            "mlflow": f"{self.urls['mlflow']}/health",
            "gateway": f"{self.urls['gateway']}/healthz",
        }
        self.store = SnapshotStore(self.home / "snapshots")
        self._up: subprocess.Popen[bytes] | None = None

    @property
    def settings(self) -> Settings:
        return Settings(home=self.home)

    def command(self, *args: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Run `routellm` here."""
        return subprocess.run(
            [sys.executable, "-m", "routellm.cli", *args], cwd=self.folder, env=self._environment(),
            capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip

    def start(self) -> None:
        """Start `routellm up`; its lines go to the file ``up.log``."""
        with (self.folder / "up.log").open("ab") as output:
            self._up = subprocess.Popen(
                [sys.executable, "-m", "routellm.cli", "up", "--demo"], cwd=self.folder,
                env=self._environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip

    def kill(self) -> int:
        """Kill `up` itself with signal 9: its parts go on with nobody to look after them."""
        assert self._up is not None
        self._up.kill()
        self._up.wait()
        return self._up.pid

    def down(self) -> str:
        """Stop all of it as a person does; returns what it said."""
        done = self.command("down")
        if self._up is not None:
            self._up.wait(180)
        return (done.stdout + done.stderr).strip()

    def parts(self) -> dict[str, psutil.Process]:
        """Return what is recorded as running, by part."""
        try:
            return recorded(self.home)
        except (ValueError, OSError):  # being written anew
            return {}

    def answers(self, part: str, timeout_s: float = 2.0) -> bool:
        try:
            return httpx.get(self.health[part], timeout=timeout_s, verify=False).status_code < 400
        except httpx.HTTPError:
            return False

    def well(self) -> bool:
        """Say whether all parts run, and those with an address answer."""
        wanted = {"supervisor", "prefect", "mlflow", "worker-cpu", "watch", "gateway"}
        return wanted <= set(self.parts()) and all(map(self.answers, self.health))

    def processes(self) -> dict[int, dict[str, str]]:
        """Return the environments of all processes that work for this home, by process id."""
        found = {}
        for process in psutil.process_iter():
            try:
                environment = process.environ()
            except psutil.Error:
                continue
            if environment.get("ROUTELLM_HOME") == str(self.home):
                found[process.pid] = environment
        return found

    def _environment(self) -> dict[str, str]:
        own = ("ROUTELLM_", "PREFECT_", "MLFLOW_")
        plain = {k: v for k, v in os.environ.items() if not k.startswith(own)}
        return plain | {"COLUMNS": "400"}
