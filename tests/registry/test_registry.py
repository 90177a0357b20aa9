"""What the registry offers, on SQLite and on a server with PostgreSQL and S3 (see conftest.py)."""

import json
import sqlite3
import subprocess
import sys
import threading

import pytest

from registry import Decision, connect
from routellm.errors import RegistryError, UsageError
from routellm.settings import Settings
from tests.support.bare import works
from tests.support.versions import add_version

pytestmark = pytest.mark.slow


@pytest.fixture
def add(registry, planted, encoder):
    def one(seed=0, **more):
        return add_version(registry, planted, encoder, seed, **more)

    return one


PROMOTE = Decision("promote", "better")


def test_a_version_carries_its_figures_card_and_key(registry, add):
    info = add()
    assert (info.version, info.kind, info.aliases) == ("1", "random", ())
    assert registry.find_trained("key-0") == info
    assert registry.find_trained("other") is None
    metrics = registry.run_metrics(info)
    assert metrics["test.apgr"] == registry.evaluations(info)["test"].exact.apgr.value
    card = registry.client.get_model_version(registry.model, "1").description
    assert "strong fraction" in card
    assert "threshold" in card
    run = registry.client.get_run(info.run_id)
    assert run.inputs.dataset_inputs[0].dataset.digest == "d" * 36
    assert run.data.tags["mlflow.parentRunId"]
    assert len(registry.client.get_metric_history(info.run_id, "test.pgr")) == 51


def test_promote_then_rollback_ends_where_it_began(registry, add):
    one, two, three = add(1), add(2), add(3)
    registry.promote(one, PROMOTE, smoke=works)
    registry.promote(two, PROMOTE, expected="1", smoke=works)
    registry.promote(three, PROMOTE, expected="2", smoke=works)
    assert registry.get("previous").version == "2"
    assert registry.rollback(smoke=works).version == "2"
    assert registry.rollback(smoke=works).version == "1"
    assert registry.champion().version == "1"
    assert "previous" not in registry.aliases()
    with pytest.raises(UsageError, match="nothing to roll back to"):
        registry.rollback()
    assert registry.rollback("3", smoke=works).version == "3"
    assert [e.to for e in registry.history()] == ["1", "2", "3", "2", "1", "3"]
    assert registry.state()["why"] == "rollback"


def test_only_a_verdict_or_a_reason_moves_the_alias(registry, add):
    one = add(1)
    with pytest.raises(UsageError, match="not promoted: worse"):
        registry.promote(one, Decision("reject", "worse"))
    assert registry.champion() is None
    registry.promote(one, force_reason="hotfix", smoke=works)
    assert registry.state()["why"] == "forced: hotfix"


def test_a_champion_that_moved_during_judgement_stops_the_promotion(registry, add):
    one, two = add(1), add(2)
    registry.promote(one, PROMOTE, smoke=works)
    with pytest.raises(RegistryError, match="moved from none to 1"):
        registry.promote(two, PROMOTE, expected=None)
    assert registry.champion().version == "1"


def test_promoters_at_once_do_not_interleave(registry, add):
    infos = [add(seed) for seed in range(4)]
    errors = []

    def force(info):
        try:
            connect(registry.settings).promote(info, force_reason="race", smoke=works)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=force, args=(i,)) for i in infos]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    moves = registry.history()
    assert [m.from_ for m in moves[1:]] == [m.to for m in moves[:-1]]
    assert registry.champion().version == moves[-1].to == registry.state()["version"]


def test_unknown_versions_are_refused(registry, add):
    add()
    with pytest.raises(UsageError, match="it has versions 1"):
        registry.get("9")
    with pytest.raises(UsageError, match="no version or alias 'champion'"):
        registry.get("champion")


def test_a_server_that_does_not_answer_is_one_sentence(tmp_path):
    away = Settings(home=tmp_path, tracking_uri="http://user:secret@127.0.0.1:9")
    with pytest.raises(RegistryError, match=r"http://\*\*\*@127\.0\.0\.1:9") as raised:
        connect(away)
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_failure_before_the_end_leaves_no_version(registry, add, monkeypatch):
    import mlflow

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mlflow.pyfunc, "log_model", full)
    with pytest.raises(RegistryError, match="No space left"):
        add()
    assert registry.versions() == []


def test_the_bundle_comes_back_from_the_registry(registry, add):
    bundle = registry.bundle(add())
    bundle.check_golden()
    assert bundle.kind == "random"


PREDICT = """
import json, sys, mlflow, pandas as pd
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(f"models:/{sys.argv[2]}@champion")
frame = pd.DataFrame({"prompt": [f"prompt {i}" for i in range(200)]})
shares = {}
for params in ({"strong_fraction": 0.3}, {"threshold": 0.9}, {}):
    shares[str(params)] = (model.predict(frame, params=params)["route"] == "strong").mean()
print(json.dumps(shares))
"""


def test_the_model_works_from_anywhere(registry, add, tmp_path):
    registry.promote(add(), PROMOTE)  # with the real smoke check
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PREDICT, registry.settings.resolved_tracking_uri, registry.model],
        capture_output=True, text=True, cwd=elsewhere, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shares = list(json.loads(done.stdout.splitlines()[-1]).values())
    assert shares == pytest.approx([0.3, 0.1, 0.5], abs=0.12)


def test_a_database_that_is_locked_for_a_moment_is_waited_for(tmp_path):
    def at(timeout_s):  # which is SQLite's own patience; each address is opened anew
        uri = f"sqlite:///{tmp_path / 'mlflow.db'}?timeout={timeout_s}"
        return Settings(home=tmp_path / "home", tracking_uri=uri)

    connect(at(0.1))
    locking = sqlite3.connect(tmp_path / "mlflow.db", check_same_thread=False)
    locking.execute("BEGIN EXCLUSIVE")
    let_go = threading.Timer(1.0, locking.rollback)
    let_go.start()
    assert connect(at(0.2)).versions() == []
    assert let_go.finished.is_set()
