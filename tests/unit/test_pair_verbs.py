"""``--strong`` and ``--weak`` of the verbs, on a version that was trained and registered."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from routellm.bundle import Bundle, golden_predictions
from routellm.calibration import Calibration
from routellm.cli.app import app
from routellm.embeddings import get_encoder
from routellm.errors import BenchmarkError, UsageError
from routellm.evaluation.benchmarks import Benchmark
from routellm.evaluation.evaluate import evaluate
from routellm.routers import Pair
from routellm.settings import EmbeddingSettings, Settings
from routellm.snapshots import Manifest
from routellm.training import train

pytestmark = pytest.mark.slow
PROMPT = "apple river hard 9"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A registry with a version of mf (1) and one of random (2), for the pair strong, weak."""
    from registry import connect
    from registry.log import log_version, retraining_run
    from tests.conftest import HashEncoder, planted

    folder = tmp_path_factory.mktemp("pair")
    made = planted.__wrapped__(HashEncoder())
    encoder = get_encoder(EmbeddingSettings(), folder / "embeddings.db")
    battles = replace(made, embeddings=encoder.encode(made.prompts))
    manifest = Manifest(
        "d" * 64, "2026-01-01T00:00:00+00:00", "0.1.0", 10, (), {"human": 10}, {"test": 10},
        {"strong": 10}, {"tie": 10}, {}, {}, {"passed": True, "rules": []}, False, None,
    )  # fmt: skip
    registry = connect(Settings(home=folder))
    prompts = battles.prompts[:60]
    table = Benchmark("test", prompts, {"strong": np.ones(60), "weak": np.arange(60) % 2.0})
    with retraining_run(registry, manifest) as parent:
        for kind in ("mf", "random"):
            router, report = train(kind, battles, encoder, seed=0)
            rates = router.win_rate(prompts)
            bundle = Bundle(
                router, EmbeddingSettings(), Calibration.of(rates, "the prompts of test"),
                golden_predictions(router, prompts), "d" * 64, False, "0.1.0",
            )  # fmt: skip
            found = evaluate(rates, table, router.pair, rng=np.random.default_rng(0), resamples=100)
            log_version(
                registry, bundle, report, {"test": found}, manifest, training_key=kind, speed={},
                parent_run_id=parent,
            )  # fmt: skip
    return folder


@pytest.fixture
def asked(home):
    def run(*args):
        done = CliRunner().invoke(app, ["--home", str(home), *map(str, args)])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done

    return run


@pytest.fixture
def queries(tmp_path):
    path = tmp_path / "queries.txt"
    path.write_text("".join(f"apple river {w} {i}\n" for i in range(10) for w in ("hard", "easy")))
    return path


OTHER = ("--strong", "Strong", "--weak", "other")


def test_a_prompt_is_routed_between_the_models_that_were_named(asked):
    ask = ("route", PROMPT, "--version", "1", "--threshold", "0", "--json")
    own, other = (json.loads(asked(*ask, *pair).stdout) for pair in ((), OTHER))
    assert (own["model"], other["model"]) == ("strong", "strong")
    assert own["win_rate"] != other["win_rate"]
    weak = json.loads(asked(*ask[:-3], "--threshold", "1", "--json", *OTHER).stdout)
    assert (weak["route"], weak["model"]) == ("weak", "other")


def test_the_versions_own_pair_may_be_named(asked):
    ask = ("route", PROMPT, "--version", "1", "--json")
    named = asked(*ask, "--strong", "strong", "--weak", "weak")
    assert named.stdout == asked(*ask).stdout
    assert named.stderr == ""


@pytest.mark.parametrize("target", [[], ["--strong-fraction", "0.3"]])
def test_another_pair_is_not_routed_by_the_versions_thresholds(asked, target):
    with pytest.raises(UsageError, match="for strong or weak: give a --threshold for strong or ot"):
        asked("route", PROMPT, "--version", "1", *OTHER, *target)


def test_another_pair_is_calibrated_on_queries_of_ones_own_only(asked, queries):
    with pytest.raises(UsageError, match="on the prompts of test: give --queries FILE"):
        asked("calibrate", "--version", "1", *OTHER)
    ask = ("calibrate", "--version", "1", "--queries", queries, "--strong-fraction", "0.5")
    own, other = (json.loads(asked(*ask, "--json", *pair).stdout) for pair in ((), OTHER))
    assert (other["strong"], other["weak"], other["n"]) == ("strong", "other", 20)
    assert own["threshold"] != other["threshold"]
    told = asked(*ask, *OTHER).stdout
    assert "else other" in told
    assert "model name" not in told  # a gateway serves the version's own pair
    assert "model name" in asked(*ask).stdout
    limit = str(other["threshold"])
    ways = [
        json.loads(asked("route", f"apple river {w} 3", "--version", "1", "--threshold", limit,
                         "--json", *OTHER).stdout)["route"] for w in ("hard", "easy")
    ]  # fmt: skip
    assert ways == ["strong", "weak"]


def test_another_pair_is_measured_on_tables_that_have_both_models(asked, tmp_path):
    rows = [(f"apple river {'hard' if i % 2 else 'easy'} {i}", i % 2) for i in range(40)]
    tables = tmp_path / "tables"
    tables.mkdir()
    for name, weak in (("here", "other"), ("there", "weak")):
        lines = [f"{prompt},1,{1 - hard}" for prompt, hard in rows]
        (tables / f"{name}.benchmark.csv").write_text(
            "\n".join([f"prompt,strong,{weak}", *lines]) + "\n"
        )
    ask = ("evaluate", "1", "--json", *OTHER)
    done = asked(*ask, "--benchmarks", tables)
    found = json.loads(done.stdout)
    assert list(found) == ["here"]
    assert (found["here"]["strong"], found["here"]["weak"]) == ("strong", "other")
    assert found["here"]["exact"]["apgr"]["value"] > 0.6
    assert "without scores of both models: there" in done.stderr
    with pytest.raises(UsageError, match="give --benchmarks with --strong and --weak"):
        asked(*ask)
    (tables / "here.benchmark.csv").unlink()
    with pytest.raises(BenchmarkError, match=r"scores of both strong and other \(looked at there"):
        asked(*ask, "--benchmarks", tables)


def test_swapped_models_are_doubted_on_standard_error(asked):
    done = asked("route", PROMPT, "--version", "1", "--threshold", "0.5", "--json",
                 "--strong", "weak", "--weak", "strong")  # fmt: skip
    assert json.loads(done.stdout)["model"] in ("strong", "weak")
    assert "warning: weak is rated below strong by human labels" in done.stderr


@pytest.mark.parametrize(
    ("version", "pair", "says"),
    [
        ("1", ["--strong", "strong"], "give both --strong and --weak"),
        ("1", ["--strong", "strong", "--weak", "nobody"], "no battle of 'nobody'.*other"),
        ("2", ["--strong", "strong", "--weak", "other"], "random router knows only"),
    ],
)
def test_a_pair_that_cannot_be_routed_is_refused(asked, version, pair, says):
    with pytest.raises(UsageError, match=says):
        asked("route", PROMPT, "--version", version, "--threshold", "0.5", *pair)


def test_the_pair_of_the_versions_is_as_it_was(home):
    from registry import connect

    registry = connect(Settings(home=home))
    bundle = registry.bundle(registry.get("1"))
    bundle.check_golden()
    assert bundle.pair == Pair("strong", "weak")
