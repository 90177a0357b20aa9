"""How the end-to-end tests run the command, and the one retraining that most of them look at."""

import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import chdir, closing, contextmanager, redirect_stderr, redirect_stdout
from unittest import mock

import httpx

from routellm.cli import main
from tests.support.once import once, together

ARENA = "simulated://arena?battles=6000"


def routellm(*args, cwd=None, timeout=800):
    """Run the command as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "routellm.cli", *map(str, args)],
        capture_output=True, text=True, timeout=timeout, cwd=cwd,
    )  # fmt: skip


def inside(*args, cwd=None):
    """Run the command's `main` in this process, which saves it two seconds of imports.

    For what does not start Prefect: that reads its settings once a process. What the command keeps
    for the time of its process, the tests after it must not find.
    """
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["routellm", *map(str, args)]),
        mock.patch.dict(os.environ),
        chdir(cwd or os.curdir), redirect_stdout(out), redirect_stderr(err),
    ):  # fmt: skip
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
    return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())


def asked(home, *args, cwd=None):
    """Return what a verb prints as JSON."""
    done = inside("--home", home, *args, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@contextmanager
def served(home, port, *args, cwd=None, env=None, folder=None):
    """Run `routellm serve` until the block ends; yields its address and its process.

    Its output goes to a file: a pipe that nobody reads would fill up and stop it.
    """
    log = (folder or home) / f"serve-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "routellm.cli", "--home", str(home), "serve",
             "--port", str(port), *args],
            stdout=output, stderr=output, cwd=cwd, env={**os.environ, **(env or {})},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"the gateway did not start: {log.read_text()}"
            try:
                if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        try:
            process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def new_home(folder, tmp_path_factory):
    """Return a home whose embeddings are cached with those of all other homes of this test run."""
    home = folder / "h"
    home.mkdir()
    (home / "embeddings.db").symlink_to(together(tmp_path_factory) / "embeddings.db")
    return home


def retrained(tmp_path_factory):
    """Return the home of one retraining on a small simulated arena, to be copied only.

    The worker that comes first makes it; others wait until it is there.
    """

    def make(folder):
        home = new_home(folder, tmp_path_factory)
        done = routellm("--home", home, "retrain", "--source", ARENA, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert "SIMULATED" in done.stdout
        assert "Champion: version" in done.stdout
        assert "serve --demo" in done.stdout

    return once(tmp_path_factory, "retrained", make) / "h"


def copied(home, to):
    """Copy a home; what MLflow and the history keep of its place names the copy's."""
    shutil.copytree(home, to, symlinks=True)
    old, new = str(home), str(to)
    with closing(sqlite3.connect(to / "mlflow.db")) as database, database:
        tables = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for (table,) in tables:
            for _, column, kind, *_ in database.execute(f"PRAGMA table_info({table})").fetchall():
                if kind.startswith(("VARCHAR", "TEXT")):
                    database.execute(
                        f"UPDATE {table} SET {column} = replace({column}, ?, ?) "
                        f"WHERE instr({column}, ?)",
                        (old, new, old),
                    )
    for file in (to / "history.jsonl", *to.rglob("MLmodel")):
        file.write_text(file.read_text().replace(old, new))
    return to
