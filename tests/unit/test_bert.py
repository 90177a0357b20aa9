import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from routellm.errors import BundleError, TrainingError, UsageError
from routellm.routers import bert, encoder_head, make_router
from tests.conftest import REPOSITORY
from tests.support.finetuned import (  # noqa: F401  one_thread is a fixture
    Broken,
    one_thread,
    same_bytes,
    stop_at,
    train,
)
from tests.support.tiny_bert import hard_battles, save_tiny_bert

pytestmark = pytest.mark.slow  # it trains, again and again

HARD, EASY = "apple river hard 9", "apple river easy 8"
# 15 batches of 16 an epoch, so that validations and checkpoints fall apart
SHORT = {"learning_rate": 2e-3, "max_steps": 12, "evaluate_every": 5, "checkpoint_every": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def battles():
    return hard_battles()


@pytest.fixture(scope="module")
def learnt(base, battles):
    return short(base, battles)[0]


def short(base, battles, seed=0, checkpoint=None, progress=None, **options):
    return train(
        "bert",
        battles,
        None,
        seed=seed,
        options=SHORT | {"model": str(base)} | options,
        checkpoint=checkpoint,
        progress=progress,
    )


# --- what it learns


def test_it_learns_which_prompts_need_the_strong_model(base, planted):
    router, report = train(
        "bert",
        planted,
        None,
        seed=0,
        options={"model": str(base), "learning_rate": 2e-3, "epochs": 4},
    )
    hard, easy = (router.win_rate(planted.prompts[i::2]).mean() for i in (1, 0))
    assert hard == pytest.approx(0.88, abs=0.06)  # as planted
    assert easy == pytest.approx(0.55, abs=0.06)
    assert report.metrics["validation_loss"] == min(report.history["validation_loss"])
    assert len(report.history["train_loss"]) == len(report.history["validation_loss"]) == 4
    assert all(isinstance(v, str | int | float) for v in report.params.values())


@pytest.mark.slow
def test_the_packaged_encoder_learns_it_too(planted):
    router, report = train("bert", planted, None, seed=0, options={"max_steps": 40})
    hard, easy = router.win_rate([HARD, EASY])
    assert hard > easy + 0.1
    assert report.params["model"] == "sentence-transformers/all-MiniLM-L6-v2"


def test_class_weights_raise_the_rare_outcome(base, battles):
    outcome = np.where(np.arange(300) % 20 == 4, 0.0, 1.0)
    rare = replace(battles, preference_a=np.where(battles.model_a == 0, outcome, 1 - outcome))
    plain, _ = short(base, rare)
    raised, report = short(base, rare, class_weights=True)
    assert raised.win_rate(rare.prompts).mean() < plain.win_rate(rare.prompts).mean() - 0.05
    assert report.params["class_weights"] == 1


# --- how it trains


def test_the_same_battles_options_and_seed_give_the_same_bytes(base, battles, learnt):
    import torch

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again, _ = short(base, battles)
    assert torch.equal(torch.rand(3), expected)  # the caller's randomness is left alone
    assert same_bytes(again, learnt)
    assert again.state()[1] == learnt.state()[1]
    assert not same_bytes(short(base, battles, seed=1)[0], learnt)


def test_accumulated_passes_make_one_step(base, battles):
    steps = []
    options = {"epochs": 1, "max_steps": 100, "batch_size": 8}
    short(base, battles, progress=lambda d, t: steps.append((d, t)), **options)
    assert steps[-2:] == [(30, 30), (30, 30)]
    steps.clear()
    options["accumulation_steps"] = 4
    _, report = short(base, battles, progress=lambda d, t: steps.append((d, t)), **options)
    assert steps[-1] == (8, 8)  # the last of two passes
    assert report.params["steps"] == 8


@pytest.mark.parametrize("lacking", ["training", "validation"])
def test_too_few_battles_are_refused(lacking, base, battles):
    validation = np.arange(300) >= 19 if lacking == "training" else np.zeros(300, bool)
    found = "19 and 281" if lacking == "training" else "300 and 0"
    with pytest.raises(TrainingError, match=f"found {found}: ingest more battles"):
        short(base, replace(battles, validation=validation))


def test_validation_is_by_the_label_kind_that_is_trusted_most(base, battles):
    kind = np.where(np.arange(300) % 20 < 10, "golden", "judge")
    _, report = short(base, replace(battles, label_kind=kind), max_steps=1)
    assert (report.params["train_prompts"], report.params["validation_prompts"]) == (240, 30)


# --- broken off, and gone on with


def test_a_broken_training_goes_on_to_the_bytes_of_an_unbroken_one(base, battles, tmp_path):
    whole, report = short(base, battles)
    folder = tmp_path / "c"
    for step in (5, 8, 11):
        with pytest.raises(Broken):
            short(base, battles, checkpoint=folder, progress=stop_at(step))
    steps = []
    options = {"checkpoint": folder, "progress": lambda d, t: steps.append(d)}
    resumed, again = short(base, battles, **options)
    assert steps[0] == 11
    assert same_bytes(resumed, whole)
    assert again.history == report.history
    steps.clear()
    done, _ = short(base, battles, **options)  # killed after its last step: nothing is left to do
    assert steps == [12]
    assert same_bytes(done, whole)


def test_a_checkpoint_of_other_battles_is_left_aside_with_a_warning(
    base, battles, learnt, tmp_path, caplog
):
    preference = battles.preference_a.copy()
    preference[50] = 0.3
    other = replace(battles, preference_a=preference)
    with pytest.raises(Broken):
        short(base, other, checkpoint=tmp_path / "c", progress=stop_at(4))
    steps = []
    with caplog.at_level(logging.WARNING):
        router, _ = short(
            base, battles, checkpoint=tmp_path / "c", progress=lambda d, t: steps.append(d)
        )
    assert "starting anew" in caplog.text
    assert steps[0] == 1
    assert same_bytes(router, learnt)


@pytest.mark.slow
def test_a_training_killed_with_signal_9_ends_with_the_weights_of_an_unbroken_one(base, tmp_path):
    seed = int(np.random.default_rng().integers(2**31))  # other moments in every run
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.killed", str(base), str(tmp_path / "c"), str(seed)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["killed"] >= 3, (seed, report)  # a fast machine may be done before its last kill
    assert report["resumed"] == report["whole"], seed


# --- what is kept, and what it says


def test_state_rebuilds_the_router_with_nothing_but_itself(battles, tmp_path):
    base = save_tiny_bert(tmp_path / "gone")
    router, _ = short(base, battles)
    arrays, doc = router.state()
    shutil.rmtree(base)
    assert all(array.dtype == np.float32 for array in arrays.values())
    assert {"head.weight", "head.bias"} < set(arrays)
    text = json.dumps(doc)
    assert str(tmp_path) not in text
    assert json.loads(doc["tokenizer"])["model"]["type"] == "WordPiece"
    again = make_router("bert", None, router.pair)  # with other options than it was trained with
    again.load_state(arrays, json.loads(text))
    prompts = [*battles.prompts[:40], "", "unseen \ud800 words"]
    assert (again.win_rate(prompts) == router.win_rate(prompts)).all()
    assert same_bytes(again, router)
    assert again.state()[1] == doc


@pytest.mark.parametrize("damage", ["lacks a weight", "other shape", "config", "tokenizer"])
def test_a_damaged_state_is_refused(damage, learnt):
    arrays, doc = learnt.state()
    if damage == "lacks a weight":
        del arrays["head.bias"]
    if damage == "other shape":
        arrays["head.weight"] = arrays["head.weight"][:2]
    if damage == "config":
        doc["config"]["model_type"] = "nothing"
    if damage == "tokenizer":
        doc["tokenizer"] = doc["tokenizer"][:100]
    with pytest.raises(BundleError, match=r"do not make one .*: load another version"):
        make_router("bert", None, learnt.pair).load_state(arrays, doc)


def test_a_prompt_scores_alike_alone_and_among_longer_ones(learnt, battles):
    prompts = [*battles.prompts[:70], "apple " * 300, "", " ", "unseen \ud800 words", HARD]
    together = learnt.win_rate(prompts)
    alone = [learnt.win_rate([p])[0] for p in prompts]
    assert together == pytest.approx(alone, abs=1e-6)
    assert ((together >= 0) & (together <= 1)).all()
    assert learnt.win_rate([]).shape == (0,)
    assert learnt.win_rate(["apple " * 400]) == learnt.win_rate(["apple " * 300])  # 64 are read


# --- which model it is built on


def test_a_model_that_is_here_is_available(base):
    assert make_router("bert", None, None).unavailable() == ""
    assert make_router("bert", None, None, {"model": str(base)}).unavailable() == ""


def test_a_hub_model_out_of_reach_is_said_to_be(battles, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    router = make_router("bert", None, None, {"model": "nobody/nothing"})
    assert "the hub cannot be reached" in router.unavailable()
    with pytest.raises(TrainingError, match=r"nobody/nothing .* `training.options.bert.model`"):
        short("nobody/nothing", battles)


def test_weights_other_than_the_published_are_refused(battles, monkeypatch):
    monkeypatch.setattr(encoder_head, "MINILM_SHA256", "0" * 64)
    with pytest.raises(TrainingError, match=r"have SHA-256 53aa51172d14.*: reinstall"):
        short(bert.MINILM, battles)


@pytest.mark.parametrize("damage", ["no config", "weights", "no folder"])
def test_a_model_that_cannot_be_loaded_is_an_error(damage, battles, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    base = save_tiny_bert(tmp_path / "m")
    if damage == "no config":
        (base / "config.json").unlink()
    if damage == "weights":
        (base / "model.safetensors").write_bytes(b"not weights")
    if damage == "no folder":
        base = tmp_path / "elsewhere"
    if damage != "weights":
        router = make_router("bert", None, None, {"model": str(base)})
        assert "`training.options.bert.model`" in router.unavailable()
    with pytest.raises(TrainingError, match=r"`training.options.bert.model`"):
        short(base, battles)


def test_a_gpu_that_is_not_there_is_an_error_in_training_but_not_in_serving(
    base, battles, learnt, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(TrainingError, match="torch finds no CUDA device"):
        short(base, battles, device="cuda")
    assert "no CUDA" in make_router("bert", None, None, {"device": "cuda"}).unavailable()
    served = make_router("bert", None, learnt.pair, {"device": "cuda:1"})
    served.load_state(*learnt.state())
    assert served.win_rate([HARD]) == learnt.win_rate([HARD])


@pytest.mark.parametrize("wrong", [{"device": "tpu"}, {"batch_size": 0}, {"learning_rat": 1e-5}])
def test_wrong_options_are_refused_by_name(wrong):
    with pytest.raises(UsageError, match=f"training.options.bert.{next(iter(wrong))}"):
        make_router("bert", None, None, wrong)
