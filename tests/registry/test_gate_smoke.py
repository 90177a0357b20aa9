"""Loading a registered version in a clean process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from registry import connect
from registry.smoke import TIMED, Smoke, failure, smoke
from routellm.settings import Settings
from tests.support.versions import add_version

pytestmark = pytest.mark.slow


@pytest.fixture
def version(settings, planted, encoder):
    return add_version(connect(settings), planted, encoder)


def bundle(settings, version):
    uri = f"models:/{settings.model}/{version.version}"
    return Path(mlflow.artifacts.download_artifacts(uri)) / "artifacts" / "bundle"


def rewritten(settings, version, change):
    """Change a version's router.json as its writer would, digests and all."""
    from routellm.snapshots import file_sha256

    folder = bundle(settings, version)
    document = json.loads((folder / "router.json").read_text())
    change(document)
    (folder / "router.json").write_text(json.dumps(document))
    sums = json.loads((folder / "digests.json").read_text())
    sums["router.json"] = file_sha256(folder / "router.json")
    (folder / "digests.json").write_text(json.dumps(sums))
    return document


def test_a_good_version_reproduces_its_golden_predictions(settings, version):
    found = smoke(settings, f"models:/{settings.model}/{version.version}")
    assert (found.ok, found.why, found.worst) == (True, None, 0.0)
    assert 0 < found.latency_ms < 1000
    assert TIMED == 15
    assert failure(settings)(f"models:/{settings.model}/{version.version}") is None


def test_other_predictions_than_the_logged_ones_fail_and_are_measured(settings, version):
    def change(document):
        document["golden"][0][1] += 0.25

    document = rewritten(settings, version, change)
    found = smoke(settings, f"models:/{settings.model}/{version.version}")
    assert not found.ok
    assert found.worst == pytest.approx(0.25)
    assert "0.2500 off" in found.why
    assert document["golden"][0][0] not in found.why
    assert failure(settings)(f"models:/{settings.model}/{version.version}") == found.why


def test_a_version_without_golden_predictions_has_nothing_to_vouch_for_it(settings, version):
    rewritten(settings, version, lambda document: document.update(golden=[]))
    found = smoke(settings, f"models:/{settings.model}/{version.version}")
    assert found == Smoke(False, "it carries no golden predictions to be held to")


@pytest.mark.parametrize("uri", ["models:/router/99", "models:/router@champion", "nonsense"])
def test_what_is_not_there_does_not_load(settings, version, uri):
    found = smoke(settings, uri)
    assert not found.ok
    assert found.why.startswith("it does not load: ")
    assert "\n" not in found.why


def test_a_process_that_takes_too_long_is_given_up(settings, version):
    found = smoke(settings, f"models:/{settings.model}/{version.version}", timeout_s=0.2)
    assert found == Smoke(False, "it did not load and answer within 0.2 s")


def test_a_process_that_dies_is_told_from_one_that_answers(settings, version, monkeypatch):
    monkeypatch.setenv("PYTHONHOME", "/nowhere")  # the interpreter cannot even start
    found = smoke(settings, f"models:/{settings.model}/{version.version}")
    assert not found.ok
    assert "ended with status 1 and no answer" in found.why


def test_what_it_prints_is_one_line_without_prompts_or_passwords(settings, version):
    environment = {**os.environ, "MLFLOW_TRACKING_URI": settings.resolved_tracking_uri}
    uri = f"models:/{settings.model}/{version.version}"
    done = subprocess.run(
        [sys.executable, "-m", "registry.smoke", uri],
        capture_output=True, text=True, env=environment, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["ok"] is True
    prompts = [
        p for p, _ in json.loads((bundle(settings, version) / "router.json").read_text())["golden"]
    ]
    assert not any(p in done.stdout + done.stderr for p in prompts)
    away = Settings(home=settings.home, tracking_uri="http://user:secret@127.0.0.1:9")
    found = smoke(away, uri)
    assert not found.ok
    assert "secret" not in found.why
