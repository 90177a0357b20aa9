"""What the gate is given of versions that are really registered, and what it makes of it."""

import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import mlflow
import numpy as np
import pytest

from registry import Gate, VersionInfo, connect
from registry.evidence import gather
from registry.log import log_version, retraining_run
from registry.logged import MEASURED_AGAIN
from registry.predictions import EVALUATION_SETS, evaluation_set, predictions_table
from registry.smoke import Smoke
from routellm.bundle import Bundle, golden_predictions
from routellm.calibration import Calibration
from routellm.errors import RegistryError, UsageError
from routellm.evaluation.benchmarks import Benchmark
from routellm.evaluation.contamination import Contamination
from routellm.evaluation.evaluate import evaluate
from routellm.routers.base import Pair
from routellm.settings import EmbeddingSettings, Settings
from routellm.training import train
from tests.support.judged import GOOD
from tests.support.versions import MANIFEST

pytestmark = pytest.mark.slow

N = 400


def benchmark(name="test", n=N, *, first=0):
    """Prompts of which strong is better on those with an odd number, weak on a tenth."""
    number = np.arange(first, first + n)
    return Benchmark(
        name,
        tuple(f"question {i} about something" for i in number),
        {"strong": (number % 10 != 4).astype(float), "weak": (number % 2 == 0).astype(float)},
    )


def win_rates(table, noise, seed=0):
    """Win rates that know the scores, behind so much noise; with none they are perfect."""
    gain = table.scores["strong"] - table.scores["weak"]
    drawn = np.random.default_rng(seed).normal(size=len(table))
    return 1.0 / (1.0 + np.exp(-(gain + noise * drawn)))


@pytest.fixture
def add(planted, encoder):
    """Register a version that answered benchmarks with this much noise, as a retraining does."""

    def one(
        registry, noise, *, tables=None, seed=0, simulated=False, pair=None, predictions=True,
        sets=True, contamination=True,
    ):  # fmt: skip
        tables = tables or (benchmark(),)
        manifest = replace(MANIFEST, simulated=simulated, created_at=datetime.now(UTC).isoformat())
        router, report = train("random", planted, encoder, seed=seed)
        report = replace(report, metrics=report.metrics | {"calibration_ece_after": 0.03})
        rates = {t.name: win_rates(t, noise, seed) for t in tables}
        measured = {
            t.name: evaluate(
                rates[t.name], t, router.pair, rng=np.random.default_rng(0), resamples=100
            )
            for t in tables
        }
        told = {t.name: predictions_table(t, router.pair, rates[t.name]) for t in tables}
        if pair is not None:
            router.pair = pair
        bundle = Bundle(
            router, EmbeddingSettings(), Calibration.of(rates[tables[0].name], "test"),
            golden_predictions(router, tables[0].prompts), manifest.digest, simulated, "0.1.0",
        )  # fmt: skip
        kept = {t.name: evaluation_set(t) for t in tables} if sets else None
        compared = Contamination("evaluation", {}) if contamination else None
        with retraining_run(
            registry, manifest, contamination=compared, evaluation_sets=kept
        ) as parent:
            return log_version(
                registry, bundle, report, measured, manifest, training_key=f"{noise}-{seed}",
                speed={"queries_per_s": 1.0}, parent_run_id=parent,
                predictions=told if predictions else None,
            )  # fmt: skip

    return one


def decide(registry, champion, candidate, *, load=None, **options):
    """The gate's verdict, without the smoke check's process unless it is asked for."""
    found = gather(registry, champion, candidate, **options)
    if load is None:
        found = replace(found, load=lambda: GOOD)
    return Gate(registry.settings).decide(found)


def named(decision, name):
    (found,) = (one for one in decision.checks if one.name == name)
    return found


def artifacts(registry, run_id):
    """The local folder of a run's artifacts itself."""
    uri = registry.client.get_run(run_id).info.artifact_uri
    return Path(url2pathname(urlparse(uri).path))


@pytest.fixture
def local(settings):
    """A registry whose artifacts are files here, so that a test can damage them."""
    return connect(settings)


def test_predictions_logged_with_the_versions_are_compared(registry, add):
    champion, candidate = add(registry, 2.0), add(registry, 0.2)
    decision = decide(registry, champion, candidate)
    assert decision.outcome == "promote", decision.reason
    assert named(decision, "delta_apgr").n == N
    figures = registry.evaluations(candidate)["test"].exact.apgr
    assert decision.numbers["candidate_apgr"] == pytest.approx(figures.value)
    assert "measured again" not in named(decision, "delta_apgr").detail
    assert decide(registry, candidate, champion).outcome == "reject"
    assert not registry.client.list_artifacts(champion.run_id, MEASURED_AGAIN)


def test_the_first_version_is_held_to_the_rest(local, add):
    first = add(local, 0.5)
    decision = decide(local, None, first)
    assert decision.outcome == "promote"
    assert decision.reason.startswith("first version; APGR")
    careless = add(local, 0.5, seed=1, contamination=False)
    assert decide(local, None, careless).outcome == "inconclusive"


def test_it_is_known_among_how_many_of_the_same_battles_a_candidate_was_chosen(local, add):
    def tagged(seed, **tags):
        version = add(local, 0.5, seed=seed)
        for name, value in tags.items():
            local.client.set_model_version_tag(local.model, version.version, name, value)
        return local.get(version.version)

    candidate = tagged(0, kind="knn")
    assert gather(local, None, candidate).chosen_among == 1
    tagged(1, kind="mf")
    tagged(2, kind="random")  # nobody promotes it: it is there to be compared with
    tagged(3, kind="mf", snapshot="e" * 64)
    tagged(4, kind="mf", strong="another")
    assert gather(local, None, candidate).chosen_among == 2


def test_a_version_is_not_held_against_itself(local, add):
    version = add(local, 0.5)
    decision = decide(local, version, version)
    assert (decision.outcome, decision.checks) == ("reject", ())


def test_simulated_never_replaces_real_and_real_need_not_beat_simulated(local, add):
    real, simulated = add(local, 2.0), add(local, 0.1, simulated=True)
    assert "SIMULATED" in decide(local, real, simulated).reason
    decision = decide(local, simulated, real)
    assert decision.outcome == "promote"
    assert named(decision, "delta_apgr").outcome == "skipped"


def test_another_pair_needs_force(local, add):
    champion, candidate = add(local, 1.0), add(local, 0.1, pair=Pair("other", "weak"))
    decision = decide(local, champion, candidate)
    assert decision.outcome == "reject"
    assert "the champion routes strong/weak, the candidate other/weak" in decision.reason


def test_a_champion_that_was_deleted_is_nothing_to_compare_with(registry, add):
    champion, candidate = add(registry, 0.1), add(registry, 1.0)
    registry.client.delete_model_version(registry.model, champion.version)
    decision = decide(registry, champion, candidate)
    assert decision.outcome == "promote"
    assert f"version {champion.version}, or its alias, was deleted" in decision.reason


def test_a_champion_that_was_deleted_before_is_remembered(local, add):
    from registry import Decision

    champion, candidate = add(local, 0.1), add(local, 1.0)
    local.promote(champion, Decision("promote", "better"), smoke=lambda uri: None)
    local.client.delete_model_version(local.model, champion.version)
    assert local.champion() is None
    decision = decide(local, None, candidate)
    assert f"version {champion.version}, or its alias, was deleted" in decision.reason


def test_where_the_benchmark_changed_the_champion_is_measured_again_once(registry, add):
    champion = add(registry, 0.0, tables=(benchmark(n=300, first=1000),))
    candidate = add(registry, 0.3, seed=1)
    decision = decide(registry, champion, candidate)
    # its logged figures were perfect; asked now, it is the random router that it really is
    assert decision.outcome == "promote", decision.reason
    assert "measured again: the benchmark has changed" in named(decision, "delta_apgr").detail
    assert decision.numbers["champion_apgr"] == pytest.approx(0.5, abs=0.1)
    assert len(registry.client.list_artifacts(champion.run_id, MEASURED_AGAIN)) == 1
    registry.bundle = lambda *args, **kwargs: pytest.fail("measured twice")
    again = decide(registry, champion, candidate)
    assert again.numbers == decision.numbers
    assert named(again, "delta_apgr") == named(decision, "delta_apgr")


def test_scores_that_changed_are_another_benchmark(local, add):
    table = benchmark()
    mended = replace(table, scores=table.scores | {"weak": np.roll(table.scores["weak"], 3)})
    champion, candidate = add(local, 0.0), add(local, 0.3, tables=(mended,), seed=1)
    assert (
        "the benchmark has changed"
        in named(decide(local, champion, candidate), "delta_apgr").detail
    )


def test_prompts_that_one_has_and_the_other_left_out_do_not_make_it_another(local, add):
    table = benchmark()
    few = np.arange(N) < 20
    champion = add(local, 2.0, tables=(table.without(few),))
    candidate = add(local, 0.2, tables=(table.without(few[::-1]),))
    gain = named(decide(local, champion, candidate), "delta_apgr")
    assert gain.n == N - 40
    assert "measured again" not in gain.detail


def test_versions_from_before_predictions_are_measured_on_the_candidates_set(local, add):
    champion = add(local, 0.0, predictions=False, sets=False)
    candidate = add(local, 0.3, seed=1)
    decision = decide(local, champion, candidate)
    assert "it has no predictions of its own" in named(decision, "delta_apgr").detail
    assert decision.outcome == "promote"


def test_without_an_evaluation_set_it_is_inconclusive_and_says_why(local, add):
    champion = add(local, 0.0, predictions=False)
    candidate = add(local, 0.3, seed=1, sets=False)
    decision = decide(local, champion, candidate)
    assert decision.outcome == "inconclusive"
    assert "has kept no evaluation set" in decision.reason
    assert "--force" in decision.reason


def test_every_benchmark_of_the_candidate_is_compared_and_the_widest_decides(local, add):
    wide, narrow, third = benchmark("wide"), benchmark("narrow", n=200), benchmark("third")
    champion = add(local, 2.0, tables=(wide, narrow, third))
    candidate = add(local, 0.2, tables=(wide, narrow))
    decision = decide(local, champion, candidate)
    assert decision.numbers["benchmark"] == "wide"
    assert named(decision, "benchmark narrow").outcome == "pass"
    assert "not measured on it" in named(decision, "benchmark third").detail
    decision = decide(local, champion, candidate, primary="narrow")
    assert named(decision, "delta_apgr").n == 200
    set_by_name = Settings(home=local.settings.home, evaluation={"primary": "narrow"})
    assert gather(connect(set_by_name), champion, candidate).primary == "narrow"


def test_a_candidate_whose_artifacts_are_gone_is_rejected(local, add):
    champion, candidate = add(local, 2.0), add(local, 0.2)
    shutil.rmtree(artifacts(local, candidate.run_id))
    model = Path(mlflow.artifacts.download_artifacts(f"models:/{local.model}/{candidate.version}"))
    shutil.rmtree(model)
    decision = decide(local, champion, candidate, load=True)
    assert decision.outcome == "reject"
    assert "does not load" in named(decision, "reproduces").detail
    assert named(decision, "delta_apgr").outcome == "unsure"


def test_a_champion_whose_artifacts_are_gone_leaves_it_open(local, add):
    champion, candidate = add(local, 2.0), add(local, 0.2)
    shutil.rmtree(artifacts(local, champion.run_id))
    model = Path(mlflow.artifacts.download_artifacts(f"models:/{local.model}/{champion.version}"))
    shutil.rmtree(model)
    decision = decide(local, champion, candidate)
    assert decision.outcome == "inconclusive"
    assert f"version {champion.version} cannot be measured again" in decision.reason


def test_damaged_predictions_are_made_again(local, add):
    champion, candidate = add(local, 0.0), add(local, 0.3, seed=1)
    (artifacts(local, champion.run_id) / "predictions" / "test.parquet").write_bytes(
        b"PAR1 nonsense"
    )
    decision = decide(local, champion, candidate)
    assert "champion was measured again" in named(decision, "delta_apgr").detail
    parent = local.client.get_run(candidate.run_id).data.tags["mlflow.parentRunId"]
    (artifacts(local, parent) / EVALUATION_SETS / "test.parquet").write_bytes(b"")
    shutil.rmtree(artifacts(local, champion.run_id) / MEASURED_AGAIN)
    decision = decide(local, champion, candidate)
    assert decision.outcome == "inconclusive"
    assert "damaged" in decision.reason


def test_a_version_of_another_model_is_refused(local, add):
    candidate = add(local, 0.5)
    other = connect(local.settings.model_copy(update={"model": "other"}))
    theirs = [add(other, 0.5) for _ in range(2)]
    with pytest.raises(UsageError, match="is not a version of router"):
        gather(local, None, theirs[0])
    unknown = VersionInfo("99", candidate.run_id, "random", (), "", {})
    with pytest.raises(UsageError, match="is not a version of router"):
        gather(local, None, unknown)


def test_a_server_that_is_away_is_no_verdict(local, add, tmp_path):
    champion, candidate = add(local, 2.0), add(local, 0.2)
    away = connect(local.settings)
    away.client = mlflow.MlflowClient("http://127.0.0.1:9", "http://127.0.0.1:9")
    with pytest.raises(RegistryError, match="did not do what was asked"):
        gather(away, champion, candidate)


def test_a_candidate_is_loaded_in_a_clean_process_before_it_is_promoted(registry, add):
    champion, candidate = add(registry, 2.0), add(registry, 0.2)
    decision = decide(registry, champion, candidate, load=True)
    assert decision.outcome == "promote", decision.reason
    assert named(decision, "reproduces").value == 0.0
    assert named(decision, "latency").value > 0


def test_a_corrupted_weight_file_is_found_by_loading_it(local, add):
    champion, candidate = add(local, 2.0), add(local, 0.2)
    model = Path(mlflow.artifacts.download_artifacts(f"models:/{local.model}/{candidate.version}"))
    weights = model / "artifacts" / "bundle" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    decision = decide(local, champion, candidate, load=True)
    assert decision.outcome == "reject"
    assert "SHA-256 differs" in decision.reason
    assert isinstance(gather(local, champion, candidate).smoked, Smoke)
