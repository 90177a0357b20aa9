"""What a run, a version and the experiment show in the MLflow UI."""

import base64
import json
import threading
import zlib
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from registry import view
from registry.figures import flat_metrics, log_pareto, slice_table
from registry.log import log_version, retraining_run
from registry.predictions import evaluation_set, predictions_table, read_predictions
from routellm.bundle import Bundle, golden_predictions
from routellm.calibration import Calibration
from routellm.evaluation.benchmarks import Benchmark
from routellm.evaluation.evaluate import evaluate
from routellm.evaluation.metrics import upper_hull
from routellm.evaluation.plots import plot_pareto
from routellm.routers.base import Pair
from routellm.settings import EmbeddingSettings
from routellm.snapshots import Manifest
from routellm.training import train

PAIR = Pair("strong", "weak")
MANIFEST = Manifest(
    "d" * 64, "2026-01-01T00:00:00+00:00", "0.1.0", 4000, (), {"human": 3000, "judge": 1000},
    {"test": 4000}, {"strong": 4000}, {"tie": 4000}, {}, {}, {"passed": True, "rules": []}, False,
    None,
)  # fmt: skip


def benchmark(name="test", n=100, simulated=False):
    """Prompts on which strong is worth its price where the text says `hard`."""
    prompts = tuple(f"{'hard' if i % 2 else 'easy'} {name} question {i}" for i in range(n))
    weak = np.array([0.2 if "hard" in p else 0.9 for p in prompts])
    return Benchmark(name, prompts, {"strong": np.full(n, 0.95), "weak": weak}, 3, simulated)


def evaluated(table, rates, usd=(None, None)):
    return evaluate(
        rates, table, PAIR, rng=np.random.default_rng(0), resamples=100, usd_per_query=usd
    )


@pytest.fixture
def perfect():
    """A router's win rates that know where strong is worth its price."""

    def rates(table):
        gain = table.scores["strong"] - table.scores["weak"]
        return gain + np.linspace(0, 1e-3, len(table))

    return rates


def test_figures_of_no_benchmark_are_the_mean_without_heldout_and_the_primarys_cost(perfect):
    found = {
        "one": evaluated(benchmark("one"), perfect(benchmark("one")), (0.01, 0.001)),
        "two": evaluated(benchmark("two", 60), np.linspace(0, 1, 60), (0.02, 0.001)),
        "heldout": evaluated(benchmark("heldout", 400), np.linspace(1, 0, 400), (0.03, 0.001)),
    }
    flat = flat_metrics(found)
    assert flat["apgr"] == pytest.approx((flat["one.apgr"] + flat["two.apgr"]) / 2)
    assert flat["cost_usd_per_1k_queries"] == flat["one.cost_usd_per_1k_queries_cpt50"]  # widest
    chosen = flat_metrics(found, "two")
    assert chosen["cost_usd_per_1k_queries"] == flat["two.cost_usd_per_1k_queries_cpt50"]
    only = flat_metrics({"heldout": found["heldout"]})
    assert only["apgr"] == only["heldout.apgr"]
    assert flat_metrics({}) == {}


def test_without_prices_nothing_is_in_dollars(perfect):
    flat = flat_metrics({"test": evaluated(benchmark(), perfect(benchmark()))})
    assert not [name for name in flat if "usd" in name or "saved" in name]


def test_a_table_of_slices_says_who_is_served_worse_at_one_threshold():
    table = Benchmark(
        "test",
        ("write a python function", *[f"tell me of trees {i}" for i in range(9)]),
        {"strong": np.ones(10), "weak": np.array([1.0, *[0.0] * 9])},
    )
    rates = np.array([0.9, 0.8, *[0.1] * 8])  # the third place is drawn among eight equals
    columns = slice_table({"test": predictions_table(table, PAIR, rates)})
    found = zip(*columns.values(), strict=True)
    rows = {row[0]: dict(zip(columns, row, strict=True)) for row in found}
    assert set(rows) == {"test all", "test code=yes", "test code=no"}
    whole, code, other = (rows[f"test {name}"] for name in ("all", "code=yes", "code=no"))
    assert (whole["n"], code["n"], other["n"]) == (10, 1, 9)
    assert whole["strong_share_at_30"] == pytest.approx(0.3)
    assert whole["quality_at_30"] == pytest.approx(0.3)  # weak is right on one prompt
    assert code["apgr"] is code["cpt50"] is None  # both models are right: no gap
    assert (code["strong_share_at_30"], code["quality_at_30"]) == (1.0, 1.0)
    assert other["strong_share_at_30"] == pytest.approx(2 / 9, abs=1e-4)
    assert (other["quality_weak"], other["quality_strong"]) == (0.0, 1.0)
    assert other["apgr"] == 0.5  # all the same to gain
    assert (other["benchmark"], other["slice"], other["value"]) == ("test", "code", "no")


points = hnp.arrays(
    np.float64, st.tuples(st.integers(2, 30), st.just(2)),
    elements=st.integers(0, 20).map(float),
)  # fmt: skip


@given(points)
def test_a_hull_lies_on_or_above_all_points_and_bends_down(found):
    hull = upper_hull(found)
    assert {tuple(p) for p in hull} <= {tuple(p) for p in found}
    if found[:, 0].min() == found[:, 0].max():
        return
    keep = np.r_[True, np.diff(hull[:, 0]) > 0]  # of one cost, the best is last
    x, y = hull[:, 0], hull[:, 1]
    upper = {v: max(y[x == v]) for v in x}
    over = np.interp(found[:, 0], list(upper), list(upper.values()))
    assert (over >= found[:, 1] - 1e-9).all()
    slopes = np.diff(y[keep][1:]) / np.diff(x[keep][1:])
    assert (np.diff(slopes) <= 1e-9).all()


def texts(figure):
    (axes,) = figure.axes
    return " ".join([axes.get_title(loc="left"), *(t.get_text() for t in axes.texts)]), axes


def test_a_pareto_figure_names_every_router_and_both_ends(perfect):
    table = benchmark()
    usd = (0.01, 0.001)
    found = {
        "knn": evaluated(table, perfect(table), usd),
        "mf": evaluated(table, np.linspace(0, 1, 100), usd),
        "random": evaluated(table, np.linspace(1, 0, 100), usd),
    }
    said, axes = texts(plot_pareto(found))
    for word in ("knn", "mf", "hull", "any mix at random", "all to strong\n$10.00", "$1.00"):
        assert word in said
    assert "random  0.4" not in said  # its own draw says nothing
    assert "SIMULATED" not in said
    assert axes.get_xlabel() == "dollars per 1,000 queries"
    hull = max(axes.lines, key=lambda line: line.get_linewidth()).get_xydata()
    assert tuple(hull[0]) == (1.0, pytest.approx(table.scores["weak"].mean()))
    best = np.interp(5.0, *hull.T)
    assert best == pytest.approx(0.95, abs=0.07)  # at half the calls, nearly all of the quality


def test_a_pareto_figure_says_what_is_simulated_and_what_has_no_price(perfect):
    table = benchmark(simulated=True)
    said, axes = texts(plot_pareto({"random": evaluated(table, perfect(table))}))
    assert said.startswith("SIMULATED")
    assert axes.get_xlabel() == "queries sent to the strong model, % (no prices)"


@pytest.fixture
def logged(registry, planted, encoder):
    """A retraining with one version, logged with all that it can be; on both backends."""
    table = benchmark()
    router, report = train("random", planted, encoder, seed=0)
    rates = router.win_rate(table.prompts)

    def log(manifest=MANIFEST, priced=True):
        bundle = Bundle(
            router, EmbeddingSettings(), Calibration.of(rates, "test"),
            golden_predictions(router, table.prompts), manifest.digest, manifest.simulated, "0.1.0",
        )  # fmt: skip
        shown = replace(table, simulated=manifest.simulated)
        one = evaluated(shown, rates, (0.01, 0.001) if priced else (None, None))
        with retraining_run(
            registry, manifest, evaluation_sets={"test": evaluation_set(shown)}
        ) as parent:
            log_pareto({"random": one})
            version = log_version(
                registry, bundle, report, {"test": one}, manifest, training_key="key",
                speed={"latency_ms_p50": 1.0}, parent_run_id=parent,
                predictions={"test": predictions_table(shown, PAIR, rates)}, primary="test",
            )  # fmt: skip
        return registry, version, parent, one

    return log


def artifact(run_id, path):
    return Path(mlflow.artifacts.download_artifacts(f"runs:/{run_id}/{path}"))


def datasets(run):
    return {
        one.dataset.name: (one.dataset.digest, one.tags[0].value, json.loads(one.dataset.profile))
        for one in run.inputs.dataset_inputs
    }


@pytest.mark.slow
def test_a_version_shows_what_it_is_by_tags_tables_and_datasets(logged):
    registry, version, parent, one = logged()
    assert version.tags["snapshot_created_at"] == MANIFEST.created_at
    assert version.tags["snapshot_validated"] == "true"
    run = registry.client.get_run(version.run_id)
    assert run.info.run_name == "random v1"
    assert run.data.tags["role"] == "version"
    assert run.data.metrics["cost_usd_per_1k_queries"] == one.cost.at_cpt50
    expected = {
        "snapshot-" + "d" * 12: ("d" * 36, "training", 4000),
        "test": (one.benchmark_digest[:36], "evaluation", 100),
    }
    for found in (run, registry.client.get_run(parent)):
        shown = {k: (d, c, p["num_rows"]) for k, (d, c, p) in datasets(found).items()}
        assert shown == expected
    kept = read_predictions(artifact(version.run_id, "predictions/test.parquet"))
    assert len(kept) == 100
    table = mlflow.artifacts.load_dict(f"runs:/{version.run_id}/slices.json")
    assert table["columns"][:2] == ["part", "apgr"]
    assert table["data"][0][0] == "test all"
    for path in ("evaluation_sets/test.parquet", "pareto/test.png"):
        assert artifact(parent, path).stat().st_size > 0


@pytest.mark.slow
def test_a_snapshot_that_did_not_pass_says_so(logged):
    failed = replace(MANIFEST, validation={"passed": False, "rules": []})
    registry, version, _, _ = logged(failed)
    assert version.tags["snapshot_validated"] == "false"
    card = registry.client.get_model_version(registry.model, version.version).description
    assert "did not pass validation" in card


@pytest.mark.slow
def test_even_a_short_retraining_samples_the_machine_and_leaves_no_thread(logged):
    registry, _, parent, _ = logged()
    metrics = registry.client.get_run(parent).data.metrics
    assert metrics["system/system_memory_usage_megabytes"] > 0
    assert "system/cpu_utilization_percentage" in metrics
    assert "SystemMetricsMonitor" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.slow
def test_a_card_says_what_it_is_its_figures_limits_thresholds_and_use(logged):
    registry, _, _, one = logged()
    card = registry.client.get_model_version(registry.model, "1").description
    assert "SIMULATED" not in card
    for said in (
        "**random** router between `strong` (strong) and `weak` (weak)",
        "3,000 human, 1,000 judge",
        "The snapshot passed validation",
        str(one.exact.apgr),
        "Few prompts, so wide intervals: test (100)",
        "random routing on test",  # worse than, or not surely better
        "dollars per 1,000 queries",
        "mlflow.pyfunc.load_model",
        "routellm serve",
        f"mlflow models serve -m models:/{registry.model}@champion",
    ):
        assert said in card
    shares = [line for line in card.splitlines() if line.startswith(("| 10%", "| 50%"))]
    assert [line.split("|")[-2].strip() for line in shares] == ["1.90", "5.50"]  # of $1 to $10


@pytest.mark.slow
def test_a_card_of_simulated_battles_opens_by_saying_so(logged):
    registry, _, parent, _ = logged(replace(MANIFEST, simulated=True), priced=False)
    card = registry.client.get_model_version(registry.model, "1").description
    assert card.startswith("> **SIMULATED**")
    assert "test (SIMULATED)" in card
    assert "No prices are set" in card
    assert "dollars per" not in card
    assert "SIMULATED" in registry.client.get_run(parent).data.tags["mlflow.note.content"]


def state(tags):
    saved = json.loads(tags["mlflow.sharedViewState.routers"])
    packed = saved["state"].removeprefix("deflate;")
    return saved, json.loads(zlib.decompress(base64.b64decode(packed)))


@pytest.mark.slow
def test_the_experiment_keeps_a_view_to_compare_by_and_what_a_person_wrote(logged):
    registry, version, _, _ = logged()
    experiment = registry.client.get_run(version.run_id).info.experiment_id

    def tags():
        return registry.client.get_experiment(experiment).tags

    saved, shown = state(tags())
    assert saved["name"] == "Compare routers"
    assert shown["searchFilter"] == "tags.role = 'version'"
    assert "test.pgr" in [chart.get("metricKey") for chart in shown["compareRunCharts"]]
    sections = {section["uuid"] for section in shown["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in shown["compareRunCharts"]} <= sections
    assert view.address(experiment) in tags()["mlflow.note.content"]

    registry.client.set_experiment_tag(experiment, "mlflow.note.content", "ours")
    view.show(registry.client, experiment, ["test"])
    assert state(tags())[0] == saved  # nothing new: not written again
    view.show(registry.client, experiment, ["test", "other"])
    again, shown = state(tags())
    costs = [chart["xaxis"]["key"] for chart in shown["compareRunCharts"] if "xaxis" in chart]
    assert costs == ["cost_usd_per_1k_queries", "latency_ms_p50"]
    assert "other.pgr" in [chart.get("metricKey") for chart in shown["compareRunCharts"]]
    assert again["createdAt"] == saved["createdAt"]
    assert tags()["mlflow.note.content"] == "ours"
    view.show(registry.client, experiment, ["test"], priced=False)
    assert "cost_usd_per_1k_queries" not in str(
        [chart.get("xaxis") for chart in state(tags())[1]["compareRunCharts"]]
    )
