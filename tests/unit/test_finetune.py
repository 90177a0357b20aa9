import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from routellm.errors import TrainingError
from routellm.routers.bert import BertOptions
from routellm.routers.checkpoint import fingerprint, resumable, resume
from routellm.routers.device import (
    computes_bfloat16,
    seeded,
    serving_device,
    torch_device,
    trains_on_cuda,
)
from routellm.routers.finetune import Course, Learner, epoch_batches, finetune, since_best
from routellm.routers.knn import KNearestOptions
from routellm.routers.outcomes import (
    Asked,
    Examples,
    class_weights,
    outcome_loss,
    outcome_targets,
    win_rates,
)
from tests.support.finetuned import Broken, flip_a_bit, stop_at
from tests.support.tiny_bert import hard_battles

RUN = "this run"


class Line:
    """A linear model with dropout on 40 points, five steps an epoch, each in two passes."""

    def __init__(self, *, dropout=0.3, losses=None, passes=2, fused=True):
        rng = np.random.default_rng(0)
        self.x = torch.from_numpy(rng.normal(size=(40, 6))).float()
        self.y = self.x @ torch.arange(6.0)
        self.module = torch.nn.Sequential(torch.nn.Dropout(dropout), torch.nn.Linear(6, 1))
        self.parameters = dict(self.module.named_parameters())
        with torch.no_grad():
            for p in self.parameters.values():
                p.fill_(0.1)
        # two groups, numbered in another order than the parameters are named
        groups = [{"params": [p]} for p in reversed(self.parameters.values())]
        self.learner = Learner(
            module=self.module,
            parameters=self.parameters,
            optimizer=torch.optim.AdamW(groups, lr=0.1, fused=fused),
            epoch=lambda rng: [
                np.array_split(some, passes) for some in rng.permutation(40).reshape(5, 8)
            ],
            loss=self.loss,
            validate=(lambda: next(losses)) if losses else self.validate,
        )

    def loss(self, rows):
        return ((self.module(self.x[rows])[:, 0] - self.y[rows]) ** 2).sum()

    def validate(self):
        assert not self.module.training
        with torch.inference_mode():
            return float(self.loss(np.arange(40))) / 40

    def train(self, run=RUN, checkpoint=None, progress=None, **changes):
        course = {
            "kind": "line",
            "setting": "options.line",
            "seed": 3,
            "steps": 12,
            "steps_an_epoch": 5,
            "learning_rate": 0.1,
            "rise": 3,
            "fall": 9,
            "clip_norm": 1.0,
            "evaluate_every": 5,
            "checkpoint_every": 3,
            "patience": 3,
        }
        with seeded(0, torch.device("cpu")):
            return finetune(
                self.learner,
                Course(**(course | changes)),
                run,
                checkpoint=checkpoint,
                progress=progress,
            )

    def optimizer_steps(self):
        states = self.learner.optimizer.state.values()
        return max((int(state["step"]) for state in states), default=0)

    def weights(self):
        return {name: p.detach().clone() for name, p in self.parameters.items()}


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# --- outcomes


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
    assert outcome_targets(preference, 0.05) == pytest.approx(np.array(expected), abs=1e-12)


@given(st.floats(0, 1), st.sampled_from([0.0, 0.05]))
def test_shares_give_the_preference_again_beyond_the_ties(preference, tie_band):
    ((win, tie, loss),) = outcome_targets(np.array([preference]), tie_band)
    assert min(win, tie, loss) >= 0
    assert win + tie + loss == pytest.approx(1)
    is_tie = abs(preference - 0.5) <= tie_band
    assert win + tie / 2 == pytest.approx(0.5 if is_tie else preference, abs=1e-8)


def test_battles_on_one_prompt_become_one_example_of_their_weight():
    battles = hard_battles()
    two = replace(
        battles,
        prompt=np.array([4, 7, 4]),
        model_a=np.array([0, 0, 1]),
        model_b=np.array([1, 1, 0]),
        weight=np.array([1.0, 2.0, 3.0]),
        preference_a=np.array([1.0, 0.5, 0.6]),
    )
    examples = Examples.of(two, *two.of_pair())
    assert examples.prompts == (battles.prompts[4], battles.prompts[7])
    assert examples.weight.tolist() == [4.0, 2.0]
    # a win, and a lean of 0.1 to the weak model that counts three times
    assert examples.targets == pytest.approx(np.array([[0.25, 0.6, 0.15], [0, 1, 0]]))


def test_rare_outcomes_count_more_within_bounds():
    def of(targets):
        return Examples(("x",) * len(targets), np.array(targets), np.ones(len(targets)))

    assert class_weights(of([[1, 0, 0]] * 6 + [[0, 1, 0]] * 3 + [[0, 0, 1]])) == pytest.approx(
        [5 / 9, 10 / 9, 10 / 3]
    )
    assert class_weights(of([[1.0, 0.0, 0.0]])) == pytest.approx([1 / 3, 4, 4])


def test_a_row_of_targets_counts_as_much_as_its_sum():
    logits = torch.tensor([[2.0, 0.5, -1.0], [0.0, 0.0, 0.0]])
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2]), reduction="none")
    targets = np.array([[3.0, 0, 0], [0, 0, 0.5]])
    assert outcome_loss(logits, targets) == pytest.approx(float(expected @ torch.tensor([3, 0.5])))


def test_a_tie_counts_half_and_each_prompt_gets_its_own_win_rate():
    logits = torch.log(torch.tensor([[0.8, 0.2, 0.0], [0.0, 1.0, 0.0], [0.1, 0.2, 0.7]]))
    rates = win_rates(lambda rows: logits[rows], [5, 9, 7], batch_size=2)
    assert rates == pytest.approx([0.9, 0.5, 0.2], abs=1e-6)


def test_of_many_prompts_a_validation_reads_some_with_all_their_battles():
    battles = hard_battles()
    rows = np.array([8, 3, 8, 5, 3, 9])
    preference = np.array([1.0, 0.0, 0.5, 0.2, 1.0, 0.7])
    every = Asked.of(battles, rows, preference)
    assert every.prompts == tuple(battles.prompts[i] for i in (3, 5, 8, 9))
    assert every.prompt.tolist() == [2, 0, 2, 1, 0, 3]
    some = Asked.of(battles, rows, preference, most=2, seed=1)
    assert len(some.prompts) == 2
    for prompt, truth in zip(some.prompt, some.preference, strict=True):
        assert truth in preference[[battles.prompts[i] == some.prompts[prompt] for i in rows]]
    assert len(some.prompt) == sum(battles.prompts[i] in some.prompts for i in rows)
    assert Asked.of(battles, rows, preference, most=4).prompts == every.prompts


# --- how it trains


@given(st.lists(st.integers(1, 64), min_size=1, max_size=300), st.integers(1, 16))
def test_an_epoch_has_every_row_once(lengths, size):
    batches = epoch_batches(np.array(lengths), size, np.random.default_rng(0))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert max(map(len, batches)) <= size
    assert len(batches) == -(-len(lengths) // size)


def test_batches_are_alike_in_length_and_differ_between_epochs():
    lengths = np.random.default_rng(0).integers(1, 500, 1000)

    def padding(batches):
        return sum(lengths[b].max() * len(b) - lengths[b].sum() for b in batches) / lengths.sum()

    one, two = (epoch_batches(lengths, 16, np.random.default_rng([0, e])) for e in (0, 1))
    assert padding(one) < 0.1
    assert padding(np.array_split(np.arange(1000), 63)) > 0.7
    assert {tuple(b) for b in one}.isdisjoint(tuple(b) for b in two)
    assert np.std([lengths[b].mean() for b in one[:8]]) > 50  # short and long take turns


@given(st.integers(1, 60), st.floats(0, 0.99))
def test_the_learning_rate_rises_in_a_line_and_falls_in_one(steps, warmup_share):
    warmup = round(warmup_share * steps)
    course = Course(
        "x", "options.x", 0, steps, 1, 2.0, warmup + 1, max(1, steps - warmup), 1.0, 1, 1, 1
    )
    rates = np.array([course.rate(step) for step in range(steps)])
    assert ((rates > 0) & (rates <= 2.0)).all()
    highest = int(rates.argmax())
    assert highest == min(warmup, steps - 1)
    slopes = np.diff(rates)
    assert slopes[:highest] == pytest.approx(2.0 / (warmup + 1))
    assert slopes[highest:] == pytest.approx(-2.0 / max(1, steps - warmup))


def test_passes_add_up_to_one_step():
    one, many = Line(dropout=0.0, passes=1), Line(dropout=0.0, passes=3)
    first, second = one.train(), many.train()
    for name, weight in one.weights().items():
        assert many.weights()[name] == pytest.approx(weight, abs=1e-5)
    assert first.history["train_loss"] == pytest.approx(second.history["train_loss"])


def of_little_memory(line, fits, from_step=1):
    """Let passes of more rows than `fits` fail as on a CUDA device whose memory is full."""
    whole, passes = line.loss, []

    def loss(rows):
        if len(rows) > fits and line.optimizer_steps() + 1 >= from_step:
            raise torch.OutOfMemoryError("CUDA out of memory")
        passes.append(len(rows))
        return whole(rows)

    line.learner = replace(line.learner, loss=loss)
    return passes


def test_a_step_that_does_not_fit_a_devices_memory_is_cut_and_stays_the_same(caplog):
    whole, little = Line(dropout=0.0, passes=1), Line(dropout=0.0, passes=1)
    passes = of_little_memory(little, fits=2)
    expected = whole.train()
    with caplog.at_level(logging.WARNING):
        training = little.train()
    assert passes == [2] * 4 * 12  # steps of 8 rows; found once, and kept
    assert len(caplog.records) == 2
    assert "no memory for 8 examples at once; from now on they are computed 4" in caplog.text
    for name, weight in whole.weights().items():
        assert little.weights()[name] == pytest.approx(weight, abs=1e-5)
    assert training.history["train_loss"] == pytest.approx(expected.history["train_loss"])


def test_no_memory_for_one_example_is_an_error():
    line = Line()
    of_little_memory(line, fits=0)
    with pytest.raises(TrainingError, match=r"no memory for one example of line: .*max_length"):
        line.train()


def test_a_training_cut_to_fit_and_broken_off_goes_on_to_the_bytes_of_an_unbroken_one(tmp_path):
    whole = Line()
    of_little_memory(whole, fits=3, from_step=2)
    whole.train()
    broken = Line()
    of_little_memory(broken, fits=3, from_step=2)
    with pytest.raises(Broken):
        broken.train(checkpoint=tmp_path, progress=stop_at(7))
    again = Line()  # on a device with room: it goes on as it was
    again.train(checkpoint=tmp_path)
    assert equal(again.weights(), whole.weights())


def test_it_stops_when_validation_no_longer_gains_and_keeps_the_best(tmp_path):
    stopped = Line(losses=iter([0.6, 0.5, 0.7, 0.8, 0.1]))
    training = stopped.train(patience=2, evaluate_every=2)
    assert training.history["validation_loss"] == [0.6, 0.5, 0.7, 0.8]
    assert (training.best_step, training.steps, training.validation_loss) == (4, 8, 0.5)
    with pytest.raises(Broken):
        Line(losses=iter([0.6, 0.5])).train(
            patience=2, evaluate_every=2, checkpoint=tmp_path, progress=stop_at(4)
        )
    (weights,) = tmp_path.glob("*.safetensors")
    then = load_file(weights)
    assert all(torch.equal(then[f"now.{k}"], v) for k, v in stopped.weights().items())


def test_the_last_step_is_validated_however_the_steps_fall():
    training = Line().train(steps=7, evaluate_every=5)
    assert len(training.history["validation_loss"]) == len(training.history["train_loss"]) == 2
    assert training.best_step == 7


@pytest.mark.parametrize("which", ["training", "validation"])
def test_a_loss_that_is_not_finite_is_an_error(which):
    line = Line(losses=iter([np.nan])) if which == "validation" else Line()
    if which == "training":
        line.y[:] = torch.inf
    step = 1 if which == "training" else 5
    with pytest.raises(
        TrainingError, match=rf"line diverged in step {step}: the {which} loss is .*learning_rate"
    ):
        line.train()


def test_validations_since_the_best_are_counted():
    assert [since_best(x) for x in ([], [1.0], [1.0, 0.5], [1.0, 0.5, 0.5, 0.7])] == [0, 0, 0, 2]


# --- broken off, and gone on with


@pytest.mark.parametrize("fused", [True, False])
def test_a_training_broken_at_any_step_goes_on_to_the_bytes_of_an_unbroken_one(fused, tmp_path):
    whole = Line(fused=fused)
    expected = whole.train()
    for step in range(1, 13):
        folder = tmp_path / str(step)
        with pytest.raises(Broken):
            Line(fused=fused).train(checkpoint=folder, progress=stop_at(step))
        again, steps = Line(fused=fused), []
        training = again.train(checkpoint=folder, progress=lambda d, t, to=steps: to.append(d))
        assert steps[0] == max(s for s in (0, 3, 5, 6, 9, 10, 12) if s <= step) + (step < 12)
        assert equal(again.weights(), whole.weights())
        assert training.history == expected.history


@pytest.mark.parametrize("damage", ["weights", "document", "missing", "other run"])
def test_a_checkpoint_of_no_use_is_left_aside_with_a_warning(damage, tmp_path, caplog):
    with pytest.raises(Broken):
        Line().train(checkpoint=tmp_path, progress=stop_at(4))
    (weights,) = tmp_path.glob("*.safetensors")
    (document,) = tmp_path.glob("*.json")
    if damage == "weights":
        flip_a_bit(weights)
    if damage == "document":
        document.write_text(document.read_text()[:40])
    if damage == "missing":
        weights.unlink()
    steps = []
    with caplog.at_level(logging.WARNING):
        Line().train(
            run="another run" if damage == "other run" else RUN,
            checkpoint=tmp_path,
            progress=lambda d, t: steps.append(d),
        )
    assert "starting anew" in caplog.text
    assert steps[0] == 1


def test_a_weight_without_a_gradient_yet_does_not_hinder_going_on():
    def make():
        parameters = {name: torch.nn.Parameter(torch.ones(2)) for name in ("used", "expert")}
        return parameters, torch.optim.AdamW(parameters.values())

    parameters, optimizer = make()
    parameters["used"].sum().backward()
    optimizer.step()
    tensors = resumable(parameters, parameters, optimizer)
    again, resumed = make()
    best = resume(tensors, again, resumed)
    assert equal(best, parameters)
    assert torch.equal(again["used"], parameters["used"])
    assert resumed.state[again["used"]]["step"] == 1
    assert again["expert"] not in resumed.state


def test_a_fingerprint_differs_with_all_that_it_is_of():
    x, y = np.array([1.0, 2.0]), np.array([3, 4])
    prints = [
        fingerprint(["a", 1], (x, y), ("p", "q")),
        fingerprint(["a", 2], (x, y), ("p", "q")),
        fingerprint(["a", 1], (y, x), ("p", "q")),
        fingerprint(["a", 1], (x, y), ("pq", "")),
        fingerprint(["a", 1], (x, y), ("p", "\ud800")),
    ]
    assert len(set(prints)) == 5
    assert fingerprint(["a", 1], (x, y), ("p", "q")) == prints[0]


# --- where it is computed


def test_a_gpu_that_is_not_there_is_an_error_in_training_but_not_in_serving(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(TrainingError, match=r"finds no CUDA device here.*options\.x\.device"):
        torch_device("cuda", "x")
    assert [str(torch_device(w, "x")) for w in ("auto", "cpu")] == ["cpu", "cpu"]
    assert str(serving_device("cuda:1", "x")) == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(TrainingError, match=r"no cuda:2 here, the last CUDA device is cuda:1"):
        torch_device("cuda:2", "x")
    given = ("auto", "cpu", "cuda", "cuda:1", "cuda:2")
    assert [str(serving_device(w, "x")) for w in given] == ["cuda", "cpu", "cuda", "cuda:1", "cuda"]


def test_only_a_training_that_is_put_on_a_gpu_takes_one(monkeypatch):
    def taken():
        devices = ("auto", "cpu", "cuda", "cuda:7")
        return [trains_on_cuda(BertOptions(device=one), "bert") for one in devices]

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert taken() == [False] * 4
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert taken() == [True, False, True, False]
    assert not trains_on_cuda(KNearestOptions(), "knn")


def test_a_cpu_is_not_asked_for_bfloat16():
    assert not computes_bfloat16(torch.device("cpu"))
