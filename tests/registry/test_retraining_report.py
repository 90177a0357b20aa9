"""The report that a retraining ends with."""

from dataclasses import replace

import mlflow
import numpy as np
import pytest

from registry import connect
from registry.gate import CheckResult, Decision
from registry.log import retraining_run
from registry.retraining_report import RetrainingReport, html, log_report, markdown
from routellm.evaluation.benchmarks import Benchmark
from routellm.evaluation.evaluate import evaluate
from routellm.routers.base import Pair
from tests.support.versions import MANIFEST


def measured(name, simulated=False):
    prompts = [f"{'hard' if i % 2 else 'easy'} {i}" for i in range(100)]
    scores = {"strong": np.ones(100), "weak": (np.arange(100) % 2 == 0).astype(float)}
    table = Benchmark(name, prompts, scores, simulated=simulated)
    rates = np.array([0.9 if "hard" in p else 0.1 for p in prompts])
    return evaluate(
        rates, table, Pair("strong", "weak"), rng=np.random.default_rng(0), resamples=100,
        usd_per_query=(0.01, 0.001),
    )  # fmt: skip


@pytest.fixture
def report():
    check = CheckResult("gain", "pass", 0.04, threshold=0.0, n=100, detail="paired | bootstrap <b>")
    return RetrainingReport(
        at="2026-01-02T03:04:05+00:00",
        manifest=replace(MANIFEST, rows=310, by_label_kind={"human": 300, "judge": 10},
                         quarantined_by_rule={"known_winner": 7}),
        read=320, new_battles=30, duplicates=290, unchanged=("old.csv",),
        routers={"knn v7": {"a": measured("a"), "b": measured("b")}, "mf v6": {"b": measured("b")}},
        primary="b", trained=("knn",), reused=("mf",), left_out={"bert": "no encoder <here>"},
        decision=Decision("promote", "APGR 0.04 higher", checks=(check,)),
        standing="mf v6", champion="knn v7", champion_why="APGR 0.04 higher",
        label_weights={"human": 1.0, "judge": 0.25}, notes=("age is 40 days, expected 30",),
    )  # fmt: skip


def test_it_says_what_came_in_what_was_thrown_out_how_it_did_and_what_was_decided(report):
    text = markdown(report)
    assert "knn v7 is champion now, in place of mf v6: APGR 0.04 higher." in text
    assert "30 new battles of 320 read (290 known before)" in text
    assert "Unchanged since they were last read: old.csv." in text
    assert "| known_winner | 7 |" in text
    assert "| judge | 10 | 0.25 |" in text
    assert "- age is 40 days, expected 30" in text
    assert "| bert | no encoder <here> |" in text
    apgr = report.routers["knn v7"]["b"].exact.apgr
    assert f"| b | knn v7 | {apgr} |" in text
    assert text.index("| b | knn v7 |") < text.index("| a | knn v7 |")  # the primary one first
    assert "| gain | pass | 0.04 | 0 | paired \\| bootstrap <b> |" in text
    cost = report.routers["knn v7"]["b"].cost
    assert f"${cost.at_cpt50:.2f} a 1,000 queries, {cost.saved(cost.at_cpt50):.0%} less" in text


def test_the_page_needs_nothing_but_itself_and_shows_the_same(report):
    page = html(report)
    assert "knn v7 is champion now, in place of mf v6" in page
    assert "<svg" in page
    assert "known_winner" in page
    assert "no encoder &lt;here&gt;" in page
    assert "<b>" not in page.replace('<b style="color', "")
    for outside in ("<script", "src=", 'href="http'):
        assert outside not in page.replace('xlink:href="#', "")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"champion": "", "standing": ""}, "There is no champion yet"),
        ({"champion": "mf v6"}, "mf v6 stays champion: APGR 0.04 higher."),
        ({"champion": "mf v6", "decision": None}, "promotion was not asked for"),
        ({"standing": ""}, "knn v7 is champion now: APGR 0.04 higher."),
    ],
)
def test_the_first_sentence_says_who_is_champion_and_why(report, changes, says):
    changed = replace(report, **changes)
    assert says in markdown(changed)
    assert says in html(changed)


def test_simulated_battles_are_called_so(report):
    simulated = replace(report, manifest=replace(report.manifest, simulated=True))
    assert "(SIMULATED)" in markdown(simulated).splitlines()[0]
    assert "trained on SIMULATED battles" in html(simulated)


@pytest.mark.slow
def test_it_is_kept_with_the_retrainings_run(report, settings):
    registry = connect(settings)
    with retraining_run(registry, report.manifest) as run_id:
        log_report(registry, run_id, report)
    for name, made in (("report.md", markdown(report)), ("report.html", html(report))):
        assert mlflow.artifacts.load_text(f"runs:/{run_id}/{name}") == made
