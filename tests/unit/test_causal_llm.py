import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from routellm.bundle import Bundle, golden_predictions, load_bundle, save_bundle
from routellm.calibration import Calibration
from routellm.errors import BundleError, TrainingError, UsageError
from routellm.routers import Pair, make_router
from routellm.routers.base import cross_entropy
from routellm.routers.instruction import AFTER, CLOSE
from routellm.routers.outcomes import OUTCOMES
from routellm.settings import EmbeddingSettings
from tests.conftest import REPOSITORY
from tests.support.finetuned import (  # noqa: F401  one_thread is a fixture
    Broken,
    one_thread,
    same_bytes,
    stop_at,
    train,
)
from tests.support.tiny_lm import COMMIT, model_hub, rule_battles, rule_prompts, save_tiny_lm

pytestmark = pytest.mark.slow  # it trains, again and again

PAIR = Pair("strong", "weak")
QUICK = {
    "batch_size": 16,
    "score_batch_size": 64,
    "validate_every": 20,
    "gradient_checkpointing": False,
}
SHORT = QUICK | {"max_steps": 6, "validate_every": 2, "validation_prompts": 16}
LORA = {"lora": True, "learning_rate": 6e-3, "lora_rank": 8, "lora_alpha": 16}
FULL = {"lora": False, "learning_rate": 4e-3}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_lm(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def battles():
    return rule_battles()


@pytest.fixture(scope="module")
def learnt(base, battles):
    """A LoRA router that was trained to the end, and its report."""
    options = (
        QUICK | LORA | {"model": str(base), "max_steps": 100, "patience": 1, "lora_dropout": 0.0}
    )
    return train("causal_llm", battles, None, seed=0, options=options)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def short(base, battles, seed=0, checkpoint=None, progress=None, **options):
    router, report = train(
        "causal_llm",
        battles,
        None,
        seed=seed,
        options=SHORT | LORA | {"model": str(base)} | options,
        checkpoint=checkpoint,
        progress=progress,
    )
    return router, report


def loaded(router, **options):
    again = make_router("causal_llm", None, PAIR, SHORT | options)
    again.load_state(*router.state())
    return again


def accuracy(router):
    prompts, hard = rule_prompts(200, seed=99)
    return ((router.win_rate(prompts) > 0.5) == hard).mean()


# --- what it learns


def test_lora_learns_a_rule_and_holds_to_it_on_unseen_prompts(learnt):
    router, report = learnt
    assert accuracy(router) >= 0.9
    losses = report.history["validation_loss"]
    assert report.metrics["validation_loss"] == min(losses) < losses[0]


def test_full_training_learns_the_rule_too(base, battles):
    options = QUICK | FULL | {"model": str(base), "max_steps": 80, "patience": 1}
    router, report = train("causal_llm", battles, None, seed=0, options=options)
    assert accuracy(router) >= 0.9
    assert report.params["lora_rank"] == 0


def test_a_tie_counts_half(learnt):
    easy = [p for p, h in zip(*rule_prompts(50, seed=5), strict=True) if not h]
    # easy prompts tie or are lost as often: P(win) + P(tie) / 2 is a quarter
    assert learnt[0].win_rate(easy).mean() == pytest.approx(0.25, abs=0.1)


def test_training_stops_early_and_keeps_the_best_weights(base, battles):
    deaf = replace(battles, preference_a=np.random.default_rng(0).choice([0.0, 1.0], len(battles)))
    options = {"patience": 2, "learning_rate": 0.02, "validation_prompts": 50, "max_steps": 60}
    router, report = short(base, deaf, **options)
    losses = report.history["validation_loss"]
    best = int(np.argmin(losses))
    assert len(losses) == best + 3 < 30
    assert report.metrics["best_step"] == 2 * (best + 1)
    held, preference = deaf.pair_validation()
    rates = router.win_rate([deaf.prompts[i] for i in deaf.prompt[held]])
    assert cross_entropy(rates, preference) == pytest.approx(losses[best], abs=1e-6)


def test_validation_is_by_the_label_kind_that_is_trusted_most(base, battles):
    kind = np.where(np.arange(len(battles)) % 16 < 8, "golden", "judge")
    mixed = replace(battles, label_kind=kind, validation=np.arange(len(battles)) % 4 == 0)
    router, report = short(base, mixed, max_steps=2, validation_prompts=500)
    held, preference = mixed.pair_validation()
    assert len(held) == 50  # of 100
    rates = router.win_rate([mixed.prompts[i] for i in mixed.prompt[held]])
    assert cross_entropy(rates, preference) == pytest.approx(
        report.metrics["validation_loss"], abs=1e-6
    )


# --- the same again


def test_the_same_battles_and_seed_give_the_same_bytes_whatever_torch_drew_before(base, battles):
    import torch

    one, first = short(base, battles, seed=3)
    torch.manual_seed(99)
    drawn = torch.rand(1)
    torch.manual_seed(99)
    two, second = short(base, battles, seed=3)
    assert torch.equal(torch.rand(1), drawn)  # and leaves the caller's randomness alone
    assert same_bytes(one, two)
    assert first == second
    assert not same_bytes(one, short(base, battles, seed=4)[0])


def test_a_step_in_parts_or_with_activations_computed_twice_is_the_same_step(base, battles):
    options = {"max_steps": 2, "lora_dropout": 0.0}
    plain, _ = short(base, battles, **options)
    parts, _ = short(base, battles, gradient_accumulation=3, **options)
    twice, _ = short(base, battles, gradient_checkpointing=True, **options)
    for name, array in plain.state()[0].items():
        assert parts.state()[0][name] == pytest.approx(array, abs=1e-4), name
        assert twice.state()[0][name] == pytest.approx(array, abs=1e-4), name


def saved_step(folder):
    document = folder / "progress.json"
    return json.loads(document.read_text())["step"] if document.exists() else 0


@pytest.mark.parametrize("lora", [True, False])
def test_a_broken_training_goes_on_to_the_weights_of_an_unbroken_one(lora, base, battles, tmp_path):
    whole, report = short(base, battles, lora=lora)
    for step in (3, 5):  # broken twice, each time off a checkpoint
        with pytest.raises(Broken):
            short(base, battles, checkpoint=tmp_path / "c", progress=stop_at(step), lora=lora)
        assert saved_step(tmp_path / "c") == step - 1
        assert len(list((tmp_path / "c").iterdir())) == 2
    steps = []
    resumed, again = short(
        base, battles, checkpoint=tmp_path / "c", progress=lambda d, t: steps.append(d), lora=lora
    )
    assert steps[0] == 5
    assert same_bytes(resumed, whole)
    assert again == report


@pytest.mark.parametrize("which", ["seed", "validation battles"])
def test_a_checkpoint_of_another_training_is_left_aside(which, base, battles, tmp_path, caplog):
    with pytest.raises(Broken):
        short(base, battles, checkpoint=tmp_path / "c", progress=stop_at(3))
    if which == "validation battles":  # the trusted kind's are half of them
        kind = np.where(np.arange(len(battles)) % 16 < 8, "human", "judge")
        battles = replace(battles, label_kind=kind)
    steps = []
    with caplog.at_level(logging.WARNING):
        short(
            base,
            battles,
            seed=1 if which == "seed" else 0,
            checkpoint=tmp_path / "c",
            progress=lambda d, t: steps.append(d),
        )
    assert "starting anew" in caplog.text
    assert steps[0] == 1


@pytest.mark.slow
def test_a_training_killed_with_signal_9_ends_with_the_weights_of_an_unbroken_one(
    base, battles, tmp_path
):
    options = SHORT | LORA | {"model": str(base), "max_steps": 40}
    folder = tmp_path / "c"
    code = (
        "import json, sys, pathlib, torch\n"
        "from routellm.training import train\n"
        "from tests.support.tiny_lm import rule_battles\n"
        "torch.set_num_threads(1)\n"
        "train('causal_llm', rule_battles(), None, seed=0, options=json.loads(sys.argv[1]),\n"
        "      checkpoint=pathlib.Path(sys.argv[2]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(options), str(folder)], cwd=REPOSITORY
    )
    deadline = time.monotonic() + 120
    try:
        while time.monotonic() < deadline and process.poll() is None:
            if saved_step(folder) >= 6:
                break
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    steps = []
    resumed, _ = train(
        "causal_llm",
        battles,
        None,
        seed=0,
        options=options,
        checkpoint=folder,
        progress=lambda d, t: steps.append(d),
    )
    whole, _ = train("causal_llm", battles, None, seed=0, options=options)
    assert 6 < steps[0] <= 40
    assert same_bytes(resumed, whole)


# --- what is kept


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lora", [True, False])
def test_state_rebuilds_the_router(lora, tied, battles, tmp_path):
    base = save_tiny_lm(tmp_path / "a" / "tiny", tied=tied)
    router, _ = short(base, battles, lora=lora)
    arrays, doc = router.state()
    assert arrays["labels"].shape == (len(OUTCOMES), 64)
    assert all(array.dtype == np.float32 for array in arrays.values())
    assert doc["base"]["model"] == "tiny"
    assert str(tmp_path) not in json.dumps(doc)
    if lora:  # only what was trained, and not a copy of the base
        assert all("lora_" in name or name == "labels" for name in arrays)
    prompts, _ = rule_prompts(20, seed=3)
    moved = shutil.copytree(base, tmp_path / "b" / "elsewhere")
    again = loaded(router, model=str(moved), max_length=128, lora_rank=3)
    assert again.win_rate(prompts) == pytest.approx(router.win_rate(prompts), abs=1e-9)
    assert again.state()[1]["options"] == doc["options"]


def test_a_bundle_holds_it(learnt, tmp_path):
    router, _ = learnt
    prompts, _ = rule_prompts(20, seed=4)
    named = replace_encoder(router)
    bundle = Bundle(
        router=named,
        embedding=EmbeddingSettings(),
        calibration=Calibration.of(router.win_rate(prompts), "rule"),
        golden=golden_predictions(named, prompts),
        snapshot="0" * 64,
        simulated=True,
        code_version="test",
    )
    save_bundle(bundle, tmp_path / "bundle")
    assert (tmp_path / "bundle/weights.safetensors").stat().st_size < 200_000
    again = load_bundle(tmp_path / "bundle")
    again.check_golden()


def replace_encoder(router):
    from routellm.embeddings import get_encoder

    router.encoder = get_encoder(EmbeddingSettings(), None)
    return router


def test_another_base_is_refused(base, learnt, tmp_path):
    router, _ = learnt
    other = save_tiny_lm(tmp_path / "other", seed=1)
    digest = router.state()[1]["base"]["sha256"]
    says = rf"was trained on tiny \(SHA-256 {digest}\), and .*other has SHA-256 .* or a link to it"
    with pytest.raises(BundleError, match=says):
        loaded(router, model=str(other))
    with pytest.raises(BundleError, match=r"Meta-Llama-3-8B is not here: put that model"):
        loaded(router, model="meta-llama/Meta-Llama-3-8B")
    broken = shutil.copytree(base, tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    with pytest.raises(BundleError, match=r"needs its base model.*has no model\.safetensors"):
        loaded(router, model=str(broken))


def test_a_relative_folder_is_found_from_elsewhere(base, battles, tmp_path, monkeypatch):
    monkeypatch.chdir(base.parent)
    router, _ = short("tiny", battles, max_steps=1)
    monkeypatch.chdir(tmp_path)
    again = make_router("causal_llm", None, PAIR, router.options.model_dump())
    again.load_state(*router.state())
    assert again.win_rate(["prove"]) == router.win_rate(["prove"])


def test_a_base_that_lies_elsewhere_is_found_by_its_name_where_it_is_served(
    battles, tmp_path, monkeypatch
):
    base = save_tiny_lm(tmp_path / "here" / "tiny")
    router, _ = short(base, battles, max_steps=1)
    base.rename(tmp_path / "moved")
    served = tmp_path / "served"
    served.mkdir()
    monkeypatch.chdir(served)
    with pytest.raises(BundleError, match=rf"{base} is not here: .* at {base} or {served}/tiny"):
        loaded(router, model=router.options.model)
    save_tiny_lm(served / "tiny", seed=1)
    with pytest.raises(BundleError, match=r"served/tiny has SHA-256"):
        loaded(router, model=router.options.model)
    shutil.rmtree(served / "tiny")
    (served / "tiny").symlink_to(tmp_path / "moved")
    again = loaded(router, model=router.options.model)
    assert again.win_rate(["prove"]) == router.win_rate(["prove"])
    assert again.state()[1] == router.state()[1]


def test_loading_leaves_the_callers_randomness_alone(base, learnt):
    import torch

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    loaded(learnt[0], model=str(base))
    assert torch.equal(torch.rand(3), expected)


def test_weights_that_do_not_fit_are_refused(base, learnt):
    arrays, doc = learnt[0].state()
    router = make_router("causal_llm", None, PAIR, {"model": str(base)})
    with pytest.raises(BundleError, match="do not fit tiny"):
        router.load_state({k: v for k, v in arrays.items() if k != "labels"}, doc)
    with pytest.raises(BundleError, match="another instruction"):
        router.load_state(arrays, doc | {"prompt": ["", ""]})


# --- how it reads


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("gpt2", [False, True])
def test_one_prompt_is_a_batch_of_one(gpt2, battles, tmp_path):
    base = save_tiny_lm(tmp_path / "tiny", gpt2=gpt2)
    router, _ = short(base, battles, max_steps=1)
    prompts = ["prove", "a " * 40, "hello river", ""]
    together = router.win_rate(prompts)
    alone = np.array([router.win_rate([p])[0] for p in prompts])
    assert together == pytest.approx(alone, abs=1e-5)
    assert np.ptp(together) > 1e-5  # it does read the prompts


def test_one_prompt_is_a_batch_of_one_once_it_is_trained(learnt):
    prompts, _ = rule_prompts(10, seed=8)
    prompts = [p + " river" * i for i, p in enumerate(prompts)]
    alone = np.array([learnt[0].win_rate([p])[0] for p in prompts])
    assert learnt[0].win_rate(prompts) == pytest.approx(alone, abs=1e-5)


def test_threads_may_score_at_once(learnt):
    prompts, _ = rule_prompts(8, seed=9)
    expected = learnt[0].win_rate(prompts)
    with ThreadPoolExecutor(4) as pool:
        for rates in pool.map(learnt[0].win_rate, [prompts] * 12):
            assert rates == pytest.approx(expected, abs=1e-9)


def test_win_rates_are_probabilities_whatever_the_prompt(learnt):
    rates = learnt[0].win_rate(["", "unseen \ud800 words", "\x00", CLOSE, "</s>" * 10])
    assert rates.dtype == np.float64
    assert ((rates >= 0) & (rates <= 1)).all()
    assert learnt[0].win_rate([]).shape == (0,)


def test_a_long_query_loses_its_middle_and_nothing_else_is_lost(learnt):
    instruction = learnt[0].instruction_
    long = " ".join(["prove", *["river"] * 5000, "theorem"])
    (ids,) = instruction.encode([long])
    assert len(ids) == instruction.max_length == 256
    assert ids[: len(instruction.before)] == instruction.before
    assert ids[-len(instruction.after) :] == instruction.after
    query = ids[len(instruction.before) : -len(instruction.after)]
    vocabulary = instruction.tokenizer.get_vocab()
    assert query[0] == vocabulary["prove"]
    assert query[-1] == vocabulary["theorem"]
    assert set(query[1:-1]) == {vocabulary["river"]}
    started = time.monotonic()
    assert np.isfinite(learnt[0].win_rate(["river " * 2_000_000])).all()
    assert time.monotonic() - started < 5


def test_a_query_cannot_end_itself_or_speak_in_special_tokens(learnt):
    instruction = learnt[0].instruction_
    (plain,) = instruction.encode(["river"])
    (ids,) = instruction.encode([f"river{AFTER} win </s> {CLOSE}"])
    assert instruction.tokenizer.eos_token_id not in ids
    end = instruction.tokenizer(CLOSE, add_special_tokens=False)["input_ids"]
    ends = [i for i in range(len(ids)) if ids[i : i + len(end)] == end]
    assert ends == [len(ids) - len(instruction.after)]
    assert plain[0] == instruction.tokenizer.bos_token_id


def test_no_room_for_a_query_is_said_before_training(base, battles):
    with pytest.raises(TrainingError, match=r"takes \d+ tokens of 64.*raise .*max_length"):
        short(base, battles, max_length=64)


@pytest.mark.parametrize("lora", [True, False])
def test_it_computes_in_bfloat16_and_keeps_float32(lora, base, battles):
    router, report = short(base, battles, dtype="bfloat16", lora=lora, max_steps=2)
    assert report.params["dtype"] == "bfloat16"
    assert all(array.dtype == np.float32 for array in router.state()[0].values())
    assert np.isfinite(router.win_rate(["prove", "hello river"])).all()


# --- what it refuses


def test_too_few_battles_are_refused(base, battles):
    few = replace(battles, validation=np.arange(len(battles)) >= 19)
    with pytest.raises(TrainingError, match=r"needs 20 battles.*found 19 and 381"):
        short(base, few)
    none = replace(battles, validation=np.zeros(len(battles), bool))
    with pytest.raises(TrainingError, match="found 400 and 0"):
        short(base, none)


def test_a_training_that_diverges_says_so(base, battles):
    with pytest.raises(TrainingError, match=r"diverged in step \d+.*learning_rate"):
        short(base, battles, learning_rate=1e30, max_steps=20)


def test_options_that_do_not_exist_are_refused():
    with pytest.raises(UsageError, match=r"training\.options\.causal_llm\.rank.*lora_rank"):
        make_router("causal_llm", None, PAIR, {"rank": 4})


# --- where the base comes from


def why_not(**options):
    started = time.monotonic()
    answer = make_router("causal_llm", None, PAIR, options).unavailable()
    assert time.monotonic() - started < 10
    return answer


def test_a_local_folder_is_available_if_it_is_whole(base, tmp_path):
    assert why_not(model=str(base)) == ""
    part = shutil.copytree(base, tmp_path / "part")
    (part / "tokenizer.json").unlink()
    answer = why_not(model=str(part))
    assert "has no tokenizer.json" in answer
    assert "`training.options.causal_llm.model`" in answer
    (part / "tokenizer.json").write_text("{}")
    (part / "model.safetensors").unlink()
    (part / "model.safetensors.index.json").write_text('{"weight_map": {"x": "m-1.safetensors"}}')
    assert "has no m-1.safetensors" in why_not(model=str(part))
    (part / "model.safetensors.index.json").write_text("[]")
    assert "does not say where the weights are" in why_not(model=str(part))


@pytest.mark.parametrize(
    ("refuses", "says"),
    [
        ("", ""),
        ("GatedRepo", "is gated: accept its terms on the hub and set HF_TOKEN"),
        ("RepoNotFound", "no model that the hub shows us"),
        ("RevisionNotFound", r"has no revision main: set `training.options.causal_llm.revision`"),
        ("EntryNotFound", "has no config.json"),
    ],
)
def test_the_hub_is_asked(refuses, says, base, hub_cache):
    with model_hub("org/tiny", base, refuses=refuses) as (endpoint, asked):
        answer = why_not(model="org/tiny", hub_endpoint=endpoint)
        assert len(asked) == 1
    assert says in answer
    assert bool(answer) == bool(refuses)
    assert not answer or "`training.options.causal_llm.model`" in answer


def test_a_hub_that_cannot_be_reached_is_said_within_seconds(hub_cache, monkeypatch):
    import huggingface_hub

    nowhere = {"model": "org/tiny", "hub_endpoint": "http://127.0.0.1:9"}
    expected = "neither a local folder nor in the hub's cache, and the hub cannot be reached"
    assert expected in why_not(**nowhere)
    assert "no local folder and no model" in why_not(model="/no/such/folder")
    started = time.monotonic()
    with pytest.raises(TrainingError, match=expected):
        short("org/tiny", rule_battles(), hub_endpoint=nowhere["hub_endpoint"], revision=COMMIT)
    assert time.monotonic() - started < 10
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "cannot be reached (OfflineModeIsEnabled)" in why_not(model="org/other")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    # a name server that does not answer
    monkeypatch.setattr("routellm.routers.pretrained._HUB_TIMEOUT_S", 0.1)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *a, **k: time.sleep(2))
    started = time.monotonic()
    assert expected in why_not(**nowhere)
    assert time.monotonic() - started < 1


def test_a_device_that_is_not_there_is_said(base):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "causal_llm.device" in why_not(model=str(base), device="cuda")


def test_a_hub_model_is_fetched_once_and_named_by_its_commit(base, battles, hub_cache):
    with model_hub("org/tiny", base) as (endpoint, asked):
        options = {"model": "org/tiny", "hub_endpoint": endpoint}
        router, _ = short("org/tiny", battles, hub_endpoint=endpoint, max_steps=2)
        assert asked
    doc = router.state()[1]
    assert doc["base"] == {"model": "org/tiny", "revision": COMMIT, "sha256": ""}
    # from here on the hub is gone and the cache serves
    assert why_not(**options) == ""
    again = loaded(router, **options)
    assert again.win_rate(["prove"]) == pytest.approx(router.win_rate(["prove"]), abs=1e-9)
    with pytest.raises(BundleError, match=r"was trained on org/tiny \(0123456789ab\)"):
        loaded(router, model=str(base))
