"""Runs that a killed process left: which are ended, and which never."""

from datetime import UTC, datetime, timedelta

import mlflow
import pytest

from registry import connect, log, retention
from registry.at_work import end_left
from registry.log import retraining_run
from tests.support.bare import bare_registry, bare_settings
from tests.support.killed_call import killed_at
from tests.support.versions import MANIFEST

pytestmark = pytest.mark.slow


def running(registry):
    experiment = registry.client.get_experiment_by_name(registry.settings.experiment)
    which = "attributes.status = 'RUNNING'"
    found = registry.client.search_runs([experiment.experiment_id], which)
    return {run.info.run_id for run in found}


def status(registry, run_id):
    return registry.client.get_run(run_id).info.status


def test_a_killed_retrainings_runs_are_ended_and_those_of_one_that_is_at_work_are_not(tmp_path):
    settings = bare_settings(tmp_path / "home")

    def work():
        with retraining_run(connect(settings), MANIFEST):
            mlflow.start_run(nested=True)

    assert killed_at(1, log, ["_sample_machine"], work, done=False)
    registry = connect(settings)
    left = running(registry)
    assert len(left) == 2
    with retraining_run(registry, MANIFEST) as living:
        assert running(registry) == {*left, living}
        assert set(end_left(registry)) == left
        assert {status(registry, run_id) for run_id in left} == {"KILLED"}
        assert running(registry) == {living}
        assert end_left(registry, datetime.now(UTC) + timedelta(days=60)) == []
    assert status(registry, living) == "FINISHED"
    assert end_left(registry) == []
    assert list((settings.home / "locks").iterdir()) == []


def test_a_run_that_mlflow_could_not_be_told_the_end_of_is_ended_by_the_next(tmp_path, monkeypatch):
    registry = bare_registry(tmp_path / "home")
    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "set_terminated", lambda *_, **__: None)
        with retraining_run(registry, MANIFEST) as left:
            pass
    assert status(registry, left) == "RUNNING"
    assert end_left(registry) == [left]
    assert status(registry, left) == "KILLED"


def test_a_run_of_another_machine_is_ended_once_it_is_old(tmp_path):
    registry = bare_registry(tmp_path / "home")
    experiment = registry.client.get_experiment_by_name(registry.settings.experiment)
    left = registry.client.create_run(experiment.experiment_id).info.run_id
    assert end_left(registry) == []
    now = datetime.now(UTC)
    for when, expected in ((now, "RUNNING"), (now + timedelta(days=31), "KILLED")):
        retention.carry_out(retention.plan(registry, when), registry)
        assert status(registry, left) == expected
    (told,) = registry.notices
    assert told.startswith("1 run was still called running in MLflow, and nobody works on it")
