"""Moves that are cut short: kill -9 at every step, MLflow away before, during and after."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from registry import moves
from routellm.errors import RegistryError
from tests.support.bare import PROMOTE, bare_registry, bare_settings, promote, whole, works
from tests.support.servers import mlflow_over

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # on a busy machine

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("what", ["promote", "rollback", "revert"])
def test_a_move_that_is_killed_at_any_step_is_whole_or_mended_and_said(tmp_path, what):
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.killed_move", str(tmp_path / "home"), what],
        capture_output=True, text=True, cwd=REPOSITORY, timeout=840,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout.splitlines()[-1])
    steps = [one["step"] for one in reports]
    assert {"before the entry", "entry", "previous", "champion", "applied"} <= set(steps)
    there = {"promote": "3", "rollback": "1", "revert": "2"}[what]
    for i, one in enumerate(reports):
        before, after = one["before"], one["after"]
        begun = "entry" in steps[: i + 1]
        assert after["champion"] == after["replayed"][0] == (there if begun else "2"), one
        assert after["previous"] == (after["replayed"][1:] or [None])[0], one
        assert after["unsettled"] is None
        assert one["again"] is None  # mended once
        if begun:
            assert set(after["last"]["marks"]) >= {"applied", "written"}, one
        agree = before["unsettled"] is None and before["champion"] == after["champion"]
        assert agree or one["said"], one
        if before["unsettled"]:
            assert "finished what was cut short" in one["said"]


@pytest.fixture
def server(tmp_path):
    """An MLflow server on SQLite: what a machine without PostgreSQL can start."""
    home = tmp_path / "home"
    store = bare_settings(home).resolved_tracking_uri
    folder = tmp_path / "server"
    folder.mkdir()
    to = ("--artifacts-destination", str(folder / "artifacts"))
    with mlflow_over(store, folder, *to) as running:
        yield running


def test_mlflow_may_go_away_before_during_and_after_a_move(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    registry = bare_registry(tmp_path / "home", 4, lease_s=3.0, tracking_uri=server.url)
    promote(registry, "1")

    two = registry.get("2")
    server.kill()
    with pytest.raises(RegistryError, match="check that it runs"):
        registry.promote(two, PROMOTE, expected="1", smoke=works)
    server.start()
    assert registry.repair() is None
    assert whole(registry)

    for step, version in (("previous", "2"), ("applied", "3")):
        info = registry.get(version)

        def kill(name, step=step):
            if name == step:
                server.kill()

        with monkeypatch.context() as patch:
            patch.setattr(moves, "step", kill)
            if step == "applied":  # the move is made; what is left of it is said
                registry.promote(info, force_reason="test", smoke=works)
                assert any("lacks its mark smoke" in one for one in registry.notices)
            else:
                with pytest.raises(RegistryError, match=r"next command finishes it: MLflow at"):
                    registry.promote(info, force_reason="test", smoke=works)
        server.start()
        mended = registry.repair()
        assert step == "applied" or f"→ {version}" in mended
        assert registry.champion().version == version
        assert whole(registry)
    time.sleep(3)
    registry.repair()
    assert "written" in registry.history()[-1].marks
