"""One small retraining, shared by the end-to-end tests."""

import json
import os
import subprocess
import sys

import pytest


def routellm(*args, cwd=None, timeout=420):
    return subprocess.run(
        [sys.executable, "-m", "routellm.cli", *map(str, args)],
        capture_output=True, text=True, timeout=timeout, cwd=cwd,
    )  # fmt: skip


def new_home(folder, tmp_path_factory):
    """Return a home whose embeddings are cached with those of all other homes of this test run."""
    base = tmp_path_factory.getbasetemp()
    together = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    home = folder / "h"
    home.mkdir()
    (home / "embeddings.db").symlink_to(together / "embeddings.db")
    return home


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """One retraining on a small simulated arena, shared by these tests."""
    folder = tmp_path_factory.mktemp("e2e")
    new_home(folder, tmp_path_factory)
    done = routellm(
        "--home", folder / "h", "retrain", "--source", "simulated://arena?battles=6000", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    assert "SIMULATED" in done.stdout
    assert "Champion: version" in done.stdout
    assert "serve --demo" in done.stdout
    return folder / "h"


def asked(home, *args):
    done = routellm("--home", home, *args, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
