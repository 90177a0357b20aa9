"""The registry on an MLflow server that stands on PostgreSQL and S3, and when parts of it fall."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from registry import connect
from routellm.errors import BundleError, RegistryError
from routellm.settings import PromotionSettings
from tests.support.bare import PROMOTE, works
from tests.support.race import check_race, race
from tests.support.versions import add_version

pytestmark = pytest.mark.slow


@pytest.fixture
def registry(server_settings, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # the first waits for nothing
    soon = PromotionSettings(lease_s=2.0)
    return connect(server_settings.model_copy(update={"promotion": soon}))


def stored(registry, bucket):
    """Return the keys of this test's objects."""
    experiment = registry.client.get_experiment_by_name(registry.settings.experiment)
    listed = bucket.client().list_objects_v2(
        Bucket=bucket.name, Prefix=f"{experiment.experiment_id}/"
    )
    return [one["Key"] for one in listed["Contents"]]


@pytest.fixture
def add(registry, planted, encoder):
    return lambda seed: add_version(registry, planted, encoder, seed)


def moves(registry):
    return [(entry.from_, entry.to) for entry in registry.history()]


def test_a_version_lives_on_postgres_and_s3(registry, servers, add):
    import mlflow
    import pandas as pd

    one, two = add(1), add(2)
    registry.promote(one, PROMOTE, smoke=works)
    registry.promote(two, PROMOTE, expected="1")  # with the real smoke check
    assert registry.rollback(smoke=works).version == "1"
    assert registry.champion().version == registry.state()["version"] == "1"

    assert moves(registry) == [(None, "1"), ("1", "2"), ("2", "1")]

    assert any("/artifacts/bundle/" in one for one in stored(registry, servers.bucket))
    bundle = registry.bundle(two)
    bundle.check_golden()
    model = mlflow.pyfunc.load_model(f"models:/{registry.model}/2")
    answers = model.predict(pd.DataFrame({"prompt": [prompt for prompt, _ in bundle.golden]}))
    assert answers["win_rate"].tolist() == pytest.approx([rate for _, rate in bundle.golden])


def test_a_database_that_is_down_before_a_move_stops_it_whole(registry, servers, add):
    one, two = add(1), add(2)
    registry.promote(one, PROMOTE, smoke=works)
    servers.database.kill()
    try:
        with pytest.raises(RegistryError, match="check that it runs") as raised:
            registry.promote(two, PROMOTE, expected="1", smoke=works)
    finally:
        servers.database.start()
    assert "\n" not in str(raised.value)
    assert registry.repair(smoke=works) is None
    assert registry.champion().version == registry.state()["version"] == "1"
    registry.promote(two, PROMOTE, expected="1", smoke=works)
    assert registry.champion().version == registry.state()["version"] == "2"


def test_a_server_that_dies_during_a_move_is_caught_up_with(registry, servers, add, monkeypatch):
    one, two = add(1), add(2)
    registry.promote(one, PROMOTE, smoke=works)

    def kill(name):
        if name == "before champion":
            servers.mlflow.kill()

    try:
        with monkeypatch.context() as patch:
            patch.setattr("registry.moves.step", kill)
            with pytest.raises(RegistryError, match="next command finishes it") as raised:
                registry.promote(two, PROMOTE, expected="1", smoke=works)
    finally:
        servers.mlflow.kill()
        servers.mlflow.start()
    assert "\n" not in str(raised.value)
    assert registry.champion().version == registry.state()["version"] == "1"
    assert "1 → 2" in registry.repair(smoke=works)
    assert registry.champion().version == registry.state()["version"] == "2"
    assert registry.get("previous").version == "1"
    assert moves(registry) == [(None, "1"), ("1", "2")]


def test_a_version_whose_artifacts_are_gone_from_s3_is_one_sentence(registry, servers, add):
    version = add(1)
    client, name = servers.bucket.client(), servers.bucket.name
    for one in stored(registry, servers.bucket):
        client.delete_object(Bucket=name, Key=one)
    with pytest.raises(BundleError, match="load another version") as raised:
        registry.bundle(version)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("reached", "processes", "force"), [("database", 20, True), ("mlflow", 8, False)]
)
def test_promoters_at_once_leave_one_chain(
    server_settings, servers, tmp_path, reached, processes, force
):
    url = getattr(servers, reached).url
    found = race(url, tmp_path, processes=processes, force=force, model=server_settings.model)
    check_race(found, processes=processes, force=force)


DIES = """
import os, signal
from tests.support.servers import postgres
with postgres() as server:
    print(server.url, server.folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_servers_end_with_tests_that_are_killed(servers):
    repository = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", DIES], cwd=repository, capture_output=True, text=True, timeout=60
    )
    url, folder = done.stdout.split()
    assert done.returncode == -9
    port = int(url.rpartition(":")[2].partition("/")[0])
    deadline = time.monotonic() + 20
    while Path(folder).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(folder).exists()
    with socket.socket() as one:
        assert one.connect_ex(("127.0.0.1", port)) != 0
