import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from routellm.errors import BundleError, TrainingError, UsageError
from routellm.routers import bert, make_router
from routellm.routers.bert import Examples, class_weights, epoch_batches, outcome_targets
from routellm.training import train
from tests.conftest import REPOSITORY
from tests.support.tiny_bert import hard_battles, save_tiny_bert

pytestmark = pytest.mark.slow  # it trains, again and again

HARD, EASY = "apple river hard 9", "apple river easy 8"
# 15 batches of 16 an epoch, so that validations and checkpoints fall apart
SHORT = {"learning_rate": 2e-3, "max_steps": 12, "evaluate_every": 5, "checkpoint_every": 3}


class Broken(Exception):
    pass


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small lose more time to handing work out than they win."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def stop_at(step):
    def progress(done, total):
        if done == step:
            raise Broken

    return progress


def same_bytes(one, two):
    one, two = one.state()[0], two.state()[0]
    return one.keys() == two.keys() and all(one[k].tobytes() == two[k].tobytes() for k in one)


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


def test_preferences_become_shares_of_win_tie_and_loss():
    preference = np.array([1.0, 0.5, 0.0, 0.54, 0.45, 0.56, 0.8, 0.1])
    expected = [
        [1, 0, 0],
        [0, 1, 0],
        [0, 0, 1],
        [0, 1, 0],
        [0, 1, 0],
        [0.12, 0.88, 0],
        [0.6, 0.4, 0],
        [0, 0.2, 0.8],
    ]
    assert outcome_targets(preference) == pytest.approx(np.array(expected), abs=1e-12)


@given(st.floats(0, 1))
def test_shares_give_the_preference_again_beyond_the_ties(preference):
    ((win, tie, loss),) = outcome_targets(np.array([preference]))
    assert min(win, tie, loss) >= 0
    assert win + tie + loss == pytest.approx(1)
    is_tie = abs(preference - 0.5) <= 0.05
    assert win + tie / 2 == pytest.approx(0.5 if is_tie else preference, abs=1e-8)


def test_battles_on_one_prompt_become_one_example_of_their_weight(battles):
    two = replace(
        battles,
        prompt=np.array([4, 7, 4]),
        model_a=np.array([0, 0, 1]),
        model_b=np.array([1, 1, 0]),
        weight=np.array([1.0, 2.0, 3.0]),
        preference_a=np.array([1.0, 0.5, 0.6]),
    )
    rows, preference = two.of_pair()
    examples = Examples.of(two, rows, preference)
    assert examples.prompts == (battles.prompts[4], battles.prompts[7])
    assert examples.weight.tolist() == [4.0, 2.0]
    # a win, and a lean of 0.1 to the weak model that counts three times
    assert examples.targets == pytest.approx(np.array([[0.25, 0.6, 0.15], [0, 1, 0]]))
    assert examples.prompt.tolist() == [0, 1, 0]


def test_rare_outcomes_count_more_within_bounds():
    def of(targets):
        n = len(targets)
        return Examples(("x",) * n, np.array(targets), np.ones(n), np.arange(n), np.ones(n))

    assert class_weights(of([[1, 0, 0]] * 6 + [[0, 1, 0]] * 3 + [[0, 0, 1]])) == pytest.approx(
        [5 / 9, 10 / 9, 10 / 3]
    )
    assert class_weights(of([[1.0, 0.0, 0.0]])) == pytest.approx([1 / 3, 4, 4])


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


@given(st.lists(st.integers(1, 64), min_size=1, max_size=300), st.integers(1, 16))
def test_an_epoch_has_every_row_once(lengths, size):
    batches = epoch_batches(np.array(lengths), size, np.random.default_rng(0))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert max(map(len, batches)) <= size


def test_batches_are_alike_in_length_and_differ_between_epochs():
    lengths = np.random.default_rng(0).integers(1, 500, 1000)

    def padding(batches):
        return sum(lengths[b].max() * len(b) - lengths[b].sum() for b in batches) / lengths.sum()

    one, two = (epoch_batches(lengths, 16, np.random.default_rng([0, e])) for e in (0, 1))
    assert padding(one) < 0.1
    assert padding(np.array_split(np.arange(1000), 63)) > 0.7
    assert {tuple(b) for b in one}.isdisjoint(tuple(b) for b in two)


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


def test_it_stops_when_validation_no_longer_gains_and_keeps_the_best(
    base, battles, tmp_path, monkeypatch
):
    losses = iter([0.6, 0.5, 0.7, 0.8, 0.1])
    monkeypatch.setattr(bert, "cross_entropy", lambda rates, preference: next(losses))
    options = {"patience": 2, "evaluate_every": 2}
    stopped, report = short(base, battles, **options)
    assert report.history["validation_loss"] == [0.6, 0.5, 0.7, 0.8]
    assert (report.metrics["best_step"], report.metrics["steps_done"]) == (4, 8)
    losses = iter([0.6, 0.5])
    with pytest.raises(Broken):
        short(base, battles, checkpoint=tmp_path / "c", progress=stop_at(4), **options)
    (weights,) = (tmp_path / "c").glob("*.safetensors")
    then = load_file(weights)
    assert all((then[f"now.{k}"] == v).all() for k, v in stopped.state()[0].items())


@pytest.mark.parametrize("which", ["training", "validation"])
def test_a_loss_that_is_not_finite_is_an_error(which, base, battles, monkeypatch):
    rate = 1e30 if which == "training" else 1e-3
    if which == "validation":
        monkeypatch.setattr(bert, "cross_entropy", lambda rates, preference: float("nan"))
    with pytest.raises(TrainingError, match=rf"the {which} loss is nan; lower .*learning_rate"):
        short(base, battles, learning_rate=rate)


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


@pytest.mark.parametrize("damage", ["weights", "document", "missing", "other training"])
def test_a_checkpoint_of_no_use_is_left_aside_with_a_warning(
    damage, base, battles, learnt, tmp_path, caplog
):
    folder = tmp_path / "c"
    with pytest.raises(Broken):
        short(base, battles, checkpoint=folder, progress=stop_at(4))
    (weights,) = folder.glob("*.safetensors")
    (document,) = folder.glob("*.json")
    if damage == "weights":
        raw = bytearray(weights.read_bytes())
        raw[-5] ^= 1
        weights.write_bytes(raw)
    if damage == "document":
        document.write_text(document.read_text()[:40])
    if damage == "missing":
        weights.unlink()
    if damage == "other training":
        other = battles.preference_a.copy()
        other[50] = 0.3
        with pytest.raises(Broken):
            short(
                base, replace(battles, preference_a=other), checkpoint=folder, progress=stop_at(4)
            )
    steps = []
    with caplog.at_level(logging.WARNING):
        router, _ = short(base, battles, checkpoint=folder, progress=lambda d, t: steps.append(d))
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
    monkeypatch.setattr(bert, "MINILM_SHA256", "0" * 64)
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
