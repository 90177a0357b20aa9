"""A training that several processes share, here on processors: the same steps, the same weights."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from routellm.errors import TrainingError
from routellm.routers import Pair, make_router, several_devices
from tests.conftest import REPOSITORY
from tests.support.finetuned import Broken, one_thread, same_bytes, stop_at  # noqa: F401
from tests.support.tiny_bert import hard_battles, save_tiny_bert
from tests.support.tiny_lm import rule_battles, save_tiny_lm

pytestmark = pytest.mark.slow  # each process loads torch

HARD, EASY = "apple river hard 9", "apple river easy 8"
BERT = {"learning_rate": 2e-3, "max_steps": 40, "evaluate_every": 20, "checkpoint_every": 3}
# without dropout nothing hangs on who draws it: two processes do what one does
LM = {"lora_dropout": 0.0, "learning_rate": 6e-3, "max_steps": 6, "validate_every": 3,
      "batch_size": 15, "gradient_checkpointing": False}  # fmt: skip


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def battles():
    return hard_battles()


def fitted(kind, battles, options, processes, seed=0, **more):
    router = make_router(kind, None, battles.pair, options)
    rng = np.random.default_rng(seed)
    report = several_devices.fit(router, battles, rng=rng, processes=processes, **more)
    return router, report


def test_two_processes_take_the_steps_that_one_takes(tmp_path):
    battles = rule_battles()
    options = {"model": str(save_tiny_lm(tmp_path / "lm")), **LM}
    one, alone = fitted("causal_llm", battles, options, 1)
    two, shared = fitted("causal_llm", battles, options, 2)
    assert shared.params == alone.params
    for name in ("train_loss", "validation_loss"):
        assert shared.history[name] == pytest.approx(alone.history[name], abs=1e-5)
    a, b = one.state()[0], two.state()[0]
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(
            a[name].astype(np.float32), b[name].astype(np.float32), atol=2e-4
        )


def test_they_learn_and_tell_how_far_they_are(bert, battles):
    options = {"model": str(bert), **BERT, "max_steps": 80, "epochs": 10, "learning_rate": 4e-3}
    seen = []
    router, report = fitted("bert", battles, options, 2, progress=lambda *at: seen.append(at))
    assert seen[-1] == (80, 80)
    assert [done for done, _ in seen[:3]] == [1, 2, 3]
    hard, easy = router.win_rate([HARD, EASY])
    assert hard > 0.9 > 0.6 > easy
    assert report.history["validation_loss"][-1] < report.history["validation_loss"][0]


def test_one_that_was_broken_off_goes_on_to_the_same_weights(bert, battles, tmp_path):
    options = {"model": str(bert), **BERT, "max_steps": 12}
    whole, _ = fitted("bert", battles, options, 2)
    folder = tmp_path / "checkpoint"
    with pytest.raises(Broken):
        fitted("bert", battles, options, 2, checkpoint=folder, progress=stop_at(7))
    at = json.loads((folder / "progress.json").read_text())["step"]
    assert 6 <= at < 12
    began = []
    rest, _ = fitted(
        "bert", battles, options, 2, checkpoint=folder, progress=lambda *at: began.append(at[0])
    )
    assert began[0] == at + 1
    assert same_bytes(rest, whole)


def test_more_processes_than_rows_change_nothing_but_the_time(bert, battles):
    options = {"model": str(bert), **BERT, "max_steps": 3, "batch_size": 1}
    router, _ = fitted("bert", battles, options, 2)
    assert np.isfinite(router.win_rate([HARD])).all()


def test_what_goes_wrong_in_a_process_is_the_sentence_it_is_alone(bert, battles):
    options = {"model": str(bert), **BERT, "learning_rate": 1e30}
    with pytest.raises(TrainingError, match=r"bert diverged in step \d+.*lower"):
        fitted("bert", battles, options, 2)


KILLED = """
import sys
import numpy as np
from routellm.routers import make_router, several_devices
from tests.support.tiny_bert import hard_battles
if __name__ == "__main__":
    battles = hard_battles()
    options = {"model": sys.argv[1], "max_steps": 100000, "epochs": 100000}
    router = make_router("bert", None, battles.pair, options)
    several_devices.fit(router, battles, rng=np.random.default_rng(0), processes=2,
                        progress=lambda *at: print(at, flush=True))
"""


def test_no_process_outlives_the_one_that_started_them(bert, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(KILLED)
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    parent = subprocess.Popen(
        [sys.executable, str(script), str(bert)], stdout=subprocess.PIPE, env=env, cwd=REPOSITORY
    )
    try:
        assert parent.stdout.readline().startswith(b"(1, ")
        parts = [
            one for one in psutil.Process(parent.pid).children(recursive=True)
            if "spawn_main" in " ".join(one.cmdline())
        ]  # fmt: skip
        assert len(parts) == 2
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 30
    while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in parts):
        assert time.monotonic() < deadline, "a process trains on for nobody"
        time.sleep(0.2)


def test_a_training_takes_as_many_gpus_as_there_are(monkeypatch, caplog):
    import torch

    def options(**given):
        return make_router("bert", None, Pair("s", "w"), given).options

    assert several_devices.devices_of(options(devices=4), "bert") == 0  # no GPU here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert several_devices.devices_of(options(), "bert") == 1
    assert several_devices.devices_of(options(devices=2), "bert") == 2
    assert not caplog.text
    assert several_devices.devices_of(options(devices=4), "bert") == 2
    assert "devices is 4, and this machine has 2" in caplog.text
    assert several_devices.devices_of(options(devices=2, device="cuda:1"), "bert") == 1
    assert several_devices.devices_of(options(devices=2, device="cpu"), "bert") == 0
