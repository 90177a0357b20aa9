"""What is trained on without the pair's labels, and the table that shows what they bring."""

from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from routellm.augmentation.effect import AUGMENTATIONS, augmented
from routellm.cli.comparison import augmentation_table, seeds_table
from routellm.errors import TrainingError
from routellm.evaluation.benchmarks import Benchmark
from routellm.evaluation.evaluate import evaluate
from routellm.evaluation.published import PAIR, PUBLISHED, best_published, published
from routellm.routers.base import Pair, TrainingBattles

MODELS = ("gpt-4", "mistral-7b", "mixtral-8x7b", "llama-2")


def battles(*rows):
    """Battles from (model_a, model_b, label kind), a prompt each."""
    n = len(rows)
    at = {name: i for i, name in enumerate(MODELS)}
    return TrainingBattles(
        prompts=tuple(f"prompt {i}" for i in range(n)),
        embeddings=np.eye(n, dtype=np.float32),
        prompt=np.arange(n),
        models=MODELS,
        model_a=np.array([at[a] for a, _, _ in rows]),
        model_b=np.array([at[b] for _, b, _ in rows]),
        preference_a=np.linspace(0, 1, n),
        weight=np.ones(n),
        label_kind=np.array([kind for *_, kind in rows]),
        validation=np.zeros(n, bool),
        pair=Pair("gpt-4", "mixtral-8x7b"),
    )


def told(found):
    return [
        (found.models[a], found.models[b], str(kind), found.prompts[p])
        for a, b, kind, p in zip(
            found.model_a, found.model_b, found.label_kind, found.prompt, strict=True
        )
    ]


ROWS = (
    ("gpt-4", "mixtral-8x7b", "golden"),
    ("mixtral-8x7b", "gpt-4", "judge"),
    ("gpt-4", "mixtral-8x7b", "human"),
    ("gpt-4", "llama-2", "judge"),
    ("mixtral-8x7b", "llama-2", "golden"),
)


@pytest.mark.parametrize(
    ("augmentation", "left"),
    [("none", [2, 3, 4]), ("golden", [0, 2, 3, 4]), ("judge", [1, 2, 3, 4]), ("both", range(5))],
)
def test_only_the_pairs_own_bought_labels_are_left_out(augmentation, left):
    found = augmented(battles(*ROWS), augmentation)
    assert told(found) == [(*ROWS[i], f"prompt {i}") for i in left]
    assert np.array_equal(found.preference_a, battles(*ROWS).preference_a[list(left)])
    assert np.array_equal(found.embeddings, np.eye(5, dtype=np.float32)[list(left)])


def test_relatives_stand_in_for_a_model_that_has_no_battle_left():
    rows = (
        ("gpt-4", "mixtral-8x7b", "golden"),
        ("gpt-4", "mistral-7b", "judge"),
        ("llama-2", "mistral-7b", "golden"),
        ("llama-2", "gpt-4", "human"),
    )
    assert told(augmented(battles(*rows), "none")) == [
        ("gpt-4", "mixtral-8x7b", "judge", "prompt 1"),
        ("llama-2", "mixtral-8x7b", "golden", "prompt 2"),
        ("llama-2", "gpt-4", "human", "prompt 3"),
    ]
    # with a battle of its own it needs no stand-in
    assert ("gpt-4", "mistral-7b", "judge", "prompt 1") in told(augmented(battles(*rows), "golden"))


def test_battles_between_two_stand_ins_go():
    alone = battles(
        ("gpt-4", "mixtral-8x7b", "golden"),
        ("mistral-7b", "llama-2", "human"),
        ("mistral-7b", "mistral-7b", "human"),
        ("gpt-4", "llama-2", "human"),
    )
    assert told(augmented(alone, "none")) == [
        ("mixtral-8x7b", "llama-2", "human", "prompt 1"),
        ("gpt-4", "llama-2", "human", "prompt 3"),
    ]


def test_a_model_without_battles_or_relatives_cannot_be_trained_for():
    rows = (("gpt-4", "mixtral-8x7b", "golden"), ("gpt-4", "llama-2", "human"))
    with pytest.raises(TrainingError, match="no battle of mixtral-8x7b, nor of a relative"):
        augmented(battles(*rows), "none")


def test_the_papers_figures_are_the_papers():
    # its best of any router and data (tables 1 to 3)
    best = {name: best_published(PAIR, name) for name in PUBLISHED}
    assert {name: (kind, labels, row.apgr) for name, (kind, labels, row) in best.items()} == {
        "mmlu": ("sw_ranking", "golden", 0.603),
        "gsm8k": ("causal_llm", "judge", 0.622),
        "mt_bench": ("mf", "judge", 0.802),
    }
    assert all(0 < row.cpt50 < row.cpt80 < 1 for t in PUBLISHED.values() for r in t.values()
               for row in r.values())  # fmt: skip
    assert published(PAIR, "mmlu", "judge", "mf") is None
    assert published(Pair("a", "b"), "mmlu", "golden", "mf") is None
    assert best_published(Pair("a", "b"), "mmlu") is None


def shown(table):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def measured(pair, **options):
    rng = np.random.default_rng(0)
    strong, weak = rng.random(50), 0.5 * rng.random(50)
    table = Benchmark("mmlu", tuple(map(str, range(50))), {pair.strong: strong, pair.weak: weak})
    return evaluate(strong - weak, table, pair, rng=rng, resamples=100, **options)


def test_the_table_of_labels_fits_a_terminal_and_shows_dollars_and_the_papers_rows():
    one = measured(PAIR, usd_per_query=(0.01, 0.0001))
    rows = [("random", "", {"mmlu": one})]
    rows += [
        (kind, labels, {"mmlu": one})
        for kind in ("mf", "gaussian_process")
        for labels in AUGMENTATIONS
    ]
    text = shown(augmentation_table(rows))
    assert "…" not in text
    golden = next(line for line in text.splitlines() if line.strip().startswith("golden"))
    assert f"{one.exact.apgr.value:.3f} [" in golden
    assert "0.597" in golden  # the paper's mf with golden labels
    assert f"{one.cost.strong - one.cost.at_cpt50:.2f}/" in golden
    assert text.count("0.597") == 1
    assert "paper's best" in text
    other = replace(one, strong="a", weak="b", simulated=True, cost=None)
    plain = shown(augmentation_table([("mf", "golden", {"mmlu": other})]))
    assert "paper's best" not in plain
    assert "SIMULATED" in plain


def test_the_table_of_seeds_has_mean_and_spread():
    text = shown(seeds_table([("mf", "mmlu", [0.5, 0.6, 0.7]), ("knn", "mmlu", [0.6, 0.6, 0.6])]))
    assert "over 3 seeds" in text
    assert "0.600  0.100  0.500    0.700" in text
    assert "0.600  0.000  0.600    0.600" in text
