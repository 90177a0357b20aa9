"""What a run of train-router is asked for, and what a failed run says: without a server."""

import json
from dataclasses import replace

import pytest

from flows.engine import configure
from flows.work import Plan, training_key
from routellm.errors import TrainingError, UsageError
from routellm.routers.base import Pair
from routellm.settings import Settings
from routellm.snapshots import SnapshotStore
from routellm.sources.simulated import SIM_STRONG, SIM_WEAK, simulated_benchmark
from tests.conftest import HashEncoder
from tests.flows.test_wanted import snapshot


@pytest.fixture(scope="module", autouse=True)
def configured(tmp_path_factory):
    configure(Settings(home=tmp_path_factory.mktemp("home")))


@pytest.fixture
def plan(tmp_path):
    benchmark = simulated_benchmark(n=20)
    store = SnapshotStore(tmp_path / "snapshots")
    pair = Pair(SIM_STRONG, SIM_WEAK)
    return Plan(snapshot(100), store, HashEncoder(), pair, (benchmark,), "simulated")


def asking(tmp_path):
    return Settings(
        home=tmp_path / "asking", strong="gpt-4", weak="llama",
        training={"seed": 3, "options": {"mf": {"dim": 8}}, "label_weights": {"human": 2.0}},
        evaluation={"bootstrap": 200, "benchmarks": "tables"},
        prices={"gpt-4": {"input": 1, "output": 2}},
        embedding={"api_key": "embedding-secret"}, judge={"api_key": "judge-secret"},
    )  # fmt: skip


def test_a_worker_makes_the_key_that_was_asked_for_from_json_without_secrets(plan, tmp_path):
    from flows.dispatch import as_asked, refuse_other_work, request

    settings = asking(tmp_path)
    text = json.dumps(request("mf", plan, ["simulated://arena"], settings))
    assert "secret" not in text
    sent = json.loads(text)
    worker = as_asked(Settings(home=tmp_path / "worker"), sent["asked"])
    assert worker.home == tmp_path / "worker"
    assert training_key("mf", plan, worker) == training_key("mf", plan, settings)
    refuse_other_work(sent["made_of"], "mf", plan, worker)


def test_what_a_worker_would_do_otherwise_is_named(plan, tmp_path):
    from flows.dispatch import refuse_other_work, request

    class Other(HashEncoder):
        identity = "other"

    settings = Settings(home=tmp_path / "home")
    asked = request("mf", plan, [], settings)["made_of"]
    there = replace(plan, encoder=Other(), pair=Pair(SIM_WEAK, SIM_STRONG))
    with pytest.raises(TrainingError, match="its encoder and pair of models would be another"):
        refuse_other_work(asked, "mf", there, settings)
    with pytest.raises(TrainingError, match="its code version would be another"):
        refuse_other_work(asked | {"code version": "older"}, "mf", plan, settings)


def test_settings_that_another_version_sent_are_refused_in_a_sentence(plan, tmp_path):
    from flows.dispatch import as_asked, request

    asked = request("mf", plan, [], Settings(home=tmp_path))["asked"]
    for changed in (
        asked | {"training": asked["training"] | {"invented_later": 1}},
        {name: value for name, value in asked.items() if name != "prices"},
    ):
        with pytest.raises(TrainingError, match="install the same version of routellm-mlops"):
            as_asked(Settings(home=tmp_path), changed)


def test_training_by_deployments_without_a_server_is_refused_in_a_sentence(plan, tmp_path):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.dispatch import train_on_pools

    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(UsageError, match=r"needs a Prefect server: set PREFECT_API_URL"),
    ):
        train_on_pools(["mf"], plan, [], Settings(home=tmp_path), None)


def test_a_run_that_failed_or_crashed_says_why_in_a_sentence():
    from prefect.states import Crashed, Failed

    from flows.worker import reason

    said = "Flow run encountered an exception: UsageError: no version '9': it has 1"
    assert reason(Failed(message=said + "\nand a traceback")) == "no version '9': it has 1."
    exited = "Flow run process exited with non-zero status code -9."
    assert reason(Crashed(message=exited)) == exited
    assert reason(Crashed()) == "it crashed and left no message."


def test_a_worker_without_a_place_of_its_own_is_refused(tmp_path, monkeypatch):
    from prefect import flow
    from prefect.logging import disable_run_logger

    from flows import worker

    assert flow  # Prefect is configured
    with disable_run_logger():
        with pytest.raises(UsageError, match="set ROUTELLM_WORKERS__FOLDER to the folder"):
            worker.worker_settings()
        monkeypatch.setenv("ROUTELLM_WORKERS__FOLDER", str(tmp_path / "nowhere"))
        with pytest.raises(UsageError, match=r"cannot be entered \(No such file"):
            worker.worker_settings()
        monkeypatch.setenv("ROUTELLM_WORKERS__FOLDER", str(tmp_path))
        (tmp_path / "routellm.toml").write_text('home = "h"\n[training]\nseed = 7\n')
        settings = worker.worker_settings(training={"routers": ("knn",)}, evaluation=None)
    assert settings.home == tmp_path / "h"
    assert (settings.training.seed, settings.training.routers) == (7, ("knn",))
