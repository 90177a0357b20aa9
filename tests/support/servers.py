"""Real servers for tests: PostgreSQL, an S3 endpoint, and an MLflow server that stands on both.

Each runs on 127.0.0.1, on a free port, with its files in a temporary folder, and ends with the
tests however they end: a guard process reads from a pipe, and when that closes, be it that the
tests are done or that they were killed with signal 9, it ends the server and removes its folder.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# $1 process group, $2 signal, $3 folder. A line that is read says that somebody else cleans up
_GUARD = """
read -r line && exit
kill -s "$2" -- "-$1"
sleep 1
kill -s KILL -- "-$1"
rm -rf -- "$3"
"""
_PORTS = range(20_000, 32_000)  # the kernel gives none of these to outgoing connections


@dataclass
class Server:
    """A server and all processes that it starts.

    Attributes
    ----------
    command : list of str
    ready : callable
        Returns if the server answers; raises OSError if not.
    url : str
        What clients connect to.
    folder : Path
        Where it runs; its output goes to the file ``log`` there.
    environment : dict, optional
        All of its environment variables; by default those of this process.
    user : str, optional
        Whom it runs as, if not as the user of this process.
    stop : signal.Signals
        What ends it.
    """

    command: list[str]
    ready: Callable[[], Any]
    url: str
    folder: Path
    environment: dict[str, str] | None = None
    user: str | None = None
    stop: signal.Signals = signal.SIGKILL
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _guard: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self, *, timeout_s: float = 120.0) -> None:
        """Start the server and wait until it answers.

        Raises
        ------
        RuntimeError
            If it ends, or does not answer in time; with the last lines of its log.
        """
        log = self.folder / "log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                cwd=self.folder, env=self.environment, start_new_session=True,
                **_as_user(self.user),
            )  # fmt: skip
        group, stop = str(self._process.pid), self.stop.name.removeprefix("SIG")
        self._guard = subprocess.Popen(
            ["sh", "-c", _GUARD, "guard", group, stop, str(self.folder)],
            stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/", start_new_session=True,
        )  # fmt: skip
        give_up = time.monotonic() + timeout_s
        while True:
            try:
                self.ready()
                return
            except OSError as error:
                if self._process.poll() is not None or time.monotonic() > give_up:
                    self.kill()
                    lines = log.read_text(errors="replace").splitlines()[-30:]
                    raise RuntimeError(
                        f"{' '.join(self.command)} does not answer ({error}). Its log ends:\n"
                        + "\n".join(lines)
                    ) from error
            time.sleep(0.1)

    def kill(self) -> None:
        """End the server and wait until it is gone; its files stay, and it can start again."""
        if self._process is None or self._guard is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, self.stop)
        self._process.wait(30)
        self._guard.communicate(b"done\n")
        self._process = self._guard = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


@contextlib.contextmanager
def postgres() -> Iterator[Server]:
    """Run an empty PostgreSQL that keeps nothing if the machine stops (no fsync).

    Its `url` names its only database. As root it runs as the user ``postgres``, whom Debian's
    package makes, because PostgreSQL refuses to run as root.

    Raises
    ------
    FileNotFoundError
        If there are no PostgreSQL server programs on this machine.
    """
    programs = postgres_programs()
    if programs is None:
        raise FileNotFoundError(NO_POSTGRES)
    user = "postgres" if os.geteuid() == 0 else None
    with _temporary_folder() as folder:
        if user is not None:
            shutil.chown(folder, user, user)
        subprocess.run(
            [programs / "initdb", "--pgdata=data", "--username=test", "--auth=trust",
             "--encoding=UTF8", "--no-locale", "--no-sync"],
            check=True, capture_output=True, cwd=folder, **_as_user(user),
        )  # fmt: skip
        port = free_port()
        options = {"fsync": "off", "full_page_writes": "off", "max_connections": "200"}
        server = Server(
            [str(programs / "postgres"), "-D", "data", "-h", "127.0.0.1", "-p", str(port),
             "-k", str(folder), *(f"--{name}={value}" for name, value in options.items())],
            ready=lambda: _answers_sql(port),
            url=f"postgresql://test@127.0.0.1:{port}/postgres",
            folder=folder, user=user, stop=signal.SIGQUIT,
        )  # fmt: skip
        with server:
            yield server


@dataclass(frozen=True)
class Bucket:
    """A bucket of an S3-compatible store, which takes any key for right."""

    name: str
    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        """What MLflow's server, and whoever else speaks S3, reads from the environment."""
        return {
            "MLFLOW_S3_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def client(self) -> Any:
        """Return a boto3 client of the store."""
        import boto3

        return boto3.client(
            "s3", endpoint_url=self.endpoint, region_name="us-east-1",
            aws_access_key_id="test", aws_secret_access_key="test",
        )  # fmt: skip


@contextlib.contextmanager
def moto_s3() -> Iterator[Bucket]:
    """Run moto's S3 server, which keeps all in memory; yields an empty bucket."""
    with _temporary_folder() as folder:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        server = Server(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            ready=lambda: _get(url), url=url, folder=folder,
        )  # fmt: skip
        with server:
            bucket = Bucket("artifacts", url)
            bucket.client().create_bucket(Bucket=bucket.name)
            yield bucket


def mlflow_over(
    store: str, folder: Path, *options: str, environment: Mapping[str, str] | None = None
) -> Server:
    """Return `mlflow server` over a store, to be started; `folder` holds its log.

    Parameters
    ----------
    options : str
        Further words of the command line.
    environment : dict, optional
        By default this process's.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    return Server(
        [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
         "--workers", "1", "--backend-store-uri", store, *options],
        ready=lambda: _get(f"{url}/health"), url=url, folder=folder,
        environment={
            **(os.environ if environment is None else environment),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        },
    )  # fmt: skip


@contextlib.contextmanager
def mlflow_server(backend_uri: str, artifacts: Bucket) -> Iterator[Server]:
    """Run `mlflow server` over a database and a bucket; clients reach artifacts through it."""
    own = ("MLFLOW_", "AWS_", "ROUTELLM_", "PREFECT_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    options = ("--serve-artifacts", "--artifacts-destination", f"s3://{artifacts.name}")
    with _temporary_folder() as folder:
        both = environment | artifacts.environment
        with mlflow_over(backend_uri, folder, *options, environment=both) as server:
            yield server


@dataclass(frozen=True)
class Stack:
    """An MLflow server and what it keeps its records and its artifacts in."""

    mlflow: Server
    database: Server
    bucket: Bucket


@contextlib.contextmanager
def mlflow_stack(database: Server) -> Iterator[Stack]:
    """Run MLflow as a company would: a server over a PostgreSQL and an S3 bucket."""
    with (
        moto_s3() as bucket,
        mlflow_server(database.url, bucket) as mlflow,
    ):
        yield Stack(mlflow, database, bucket)


NO_POSTGRES = (
    "no PostgreSQL server was found in /usr/lib/postgresql or on the PATH: install it "
    "(Debian: apt-get install postgresql)"
)


def postgres_programs() -> Path | None:
    """Return the folder with PostgreSQL's server programs, or None if it is not installed."""
    debian = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: float(p.parts[-3])
    )
    if debian:
        return debian[-1].parent
    found = shutil.which("initdb")
    return Path(found).resolve().parent if found else None


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on."""
    for port in random.SystemRandom().sample(_PORTS, 100):
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no free port among 100 of {_PORTS.start} to {_PORTS.stop}")


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    # directly under the system's: a test's own folder may be closed to the user `postgres`, and
    # the path of a Unix socket has a bound of about 100 bytes
    folder = Path(tempfile.mkdtemp(prefix="routellm-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _as_user(user: str | None) -> dict[str, Any]:
    return {} if user is None else {"user": user, "group": user, "extra_groups": []}


def _get(url: str) -> None:
    urllib.request.urlopen(url, timeout=5).close()


def _answers_sql(port: int) -> None:
    import psycopg

    try:
        psycopg.connect(f"host=127.0.0.1 port={port} user=test dbname=postgres").close()
    except psycopg.OperationalError as error:
        raise OSError(str(error).strip()) from error
