"""What a person sees who compares routers in the MLflow UI, in a real browser.

With ``SCREENSHOTS=<folder>`` in the environment it saves ``compare.png`` there, which is in the
README.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import mlflow
import pytest

from registry import view
from tests.support.browser import browser
from tests.support.servers import mlflow_over

# the one retraining that they look at may be long in the making, on a busy machine
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
COMPARED = ("gaussian_process", "sw_ranking", "knn")

# the panel that MLflow opens for a first visitor covers a third of the page
SECOND_VISIT = """
localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
"""
# the lines that Plotly has drawn, by the name in the legend: what it was given, and its SVG path
DRAWN = """
[...document.querySelectorAll('.js-plotly-plot')].flatMap(plot => {
  const paths = [...plot.querySelectorAll('.scatterlayer .trace path.js-line')];
  return plot.data.filter(one => one.x && one.x.length > 2 && one.name).map((one, i) => ({
    name: one.name, x: [...one.x], y: [...one.y], path: paths[i] && paths[i].getAttribute('d')}));
})
"""


@pytest.fixture(scope="module")
def store(home):
    """The MLflow store of one retraining: its client, and its versions' runs by router kind."""
    uri = f"sqlite:///{home / 'mlflow.db'}"
    client = mlflow.MlflowClient(uri, uri)  # else the registry that another test has set
    experiment = client.get_experiment_by_name("routellm").experiment_id
    runs = client.search_runs([experiment], "tags.role = 'version'")
    return client, experiment, {run.data.tags["kind"]: run for run in runs}


@pytest.fixture(scope="module")
def url(home, tmp_path_factory):
    """An MLflow server over that store, as `mlflow ui` starts it."""
    folder = tmp_path_factory.mktemp("ui")
    with mlflow_over(f"sqlite:///{home / 'mlflow.db'}", folder) as server:
        yield server.url


@pytest.fixture(scope="module")
def page():
    with browser(1400, 1150) as page:
        page.call("Page.addScriptToEvaluateOnNewDocument", source=SECOND_VISIT)
        yield page


def compare_address(experiment, runs):
    ids = json.dumps([runs[kind].info.run_id for kind in COMPARED])
    return f"/#/compare-runs?runs={quote(ids)}&experiments={quote(json.dumps([experiment]))}"


def curve(client, run):
    """Return the quality-against-cost curve as logged: (steps, values)."""
    logged = sorted(
        client.get_metric_history(run.info.run_id, "simulated.pgr"), key=lambda m: m.step
    )
    return [m.step for m in logged], [m.value for m in logged]


def same(drawn, logged):
    return drawn["x"] == logged[0] and drawn["y"] == pytest.approx(logged[1])


def test_the_compare_page_has_every_figure_of_three_versions_and_draws_their_curves(
    page, url, store
):
    client, experiment, runs = store
    page.open(url + compare_address(experiment, runs))
    page.wait("document.body.innerText.includes('Comparing 3 Runs')", "three runs")
    for kind in COMPARED:
        assert page.ask(f"document.body.innerText.includes({json.dumps(kind + ' v')})")
    # the table keeps only the rows in sight in the page: read it while scrolling through
    rows = page.wait(
        """(async () => {
          const link = [...document.querySelectorAll('a[href*="#/metric"]')][0];
          if (!link) return null;
          const grid = link.closest('[role=grid]');
          const found = {};
          for (let at = 0; at <= grid.scrollHeight; at += 150) {
            grid.scrollTop = at;
            await new Promise(done => setTimeout(done, 60));
            for (const a of grid.querySelectorAll('a[href*="#/metric"]'))
              found[a.innerText.trim()] = a.href;
          }
          return found;
        })()""",
        "the table of metrics",
    )
    assert set(rows) == set().union(*(runs[kind].data.metrics for kind in COMPARED))
    assert {
        "apgr", "simulated.apgr", "simulated.cpt50", "simulated.pgr", "latency_ms_p50"
    } <= set(rows)  # fmt: skip
    page.open(rows["simulated.pgr"])
    drawn = page.wait(f"(d => d.length >= 3 && d.every(l => l.path) && d)({DRAWN})", "three curves")
    for kind in COMPARED:
        assert any(same(line, curve(client, runs[kind])) for line in drawn)


def test_our_view_draws_the_curves_of_all_versions_over_each_other_best_first(page, url, store):
    client, experiment, runs = store
    page.open(f"{url}/{view.address(experiment)}")
    drawn = page.wait(
        f"(d => d.length >= {len(runs)} && d.every(l => l.path) && d)({DRAWN})", "every curve"
    )
    for run in runs.values():
        lines = [line for line in drawn if same(line, curve(client, run))]
        assert {line["name"] for line in lines} == {run.info.run_name}
    text = page.ask("document.body.innerText")
    for said in (
        "Compare routers", "Quality against cost", "Figures, best first", "simulated.pgr",
        "simulated.cpt50", "latency_ms_p50", "To choose a router",
    ):  # fmt: skip
        assert said in text
    best = sorted(runs.values(), key=lambda run: -run.data.metrics["apgr"])
    places = [text.index(run.info.run_name) for run in best]
    assert places == sorted(places)
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        page.picture(Path(folder) / "compare.png")


def test_a_versions_page_shows_its_card_with_tables(page, url, store):
    client, _, _ = store
    version = client.get_model_version_by_alias("router", "champion").version
    page.open(f"{url}/#/models/router/versions/{version}")
    page.wait("document.querySelectorAll('table td').length > 10", "the card's tables")
    cells = page.ask("[...document.querySelectorAll('th, td')].map(e => e.innerText.trim())")
    for said in ("benchmark", "simulated (SIMULATED)", "strong fraction", "threshold", "30%"):
        assert said in cells
    text = page.ask("document.body.innerText")
    for said in ("SIMULATED", "Figures", "Limits", "How to use it", "routellm serve"):
        assert said in text


def test_the_retrainings_page_leads_to_its_routers_and_shows_the_machine(page, url, store):
    _, experiment, runs = store
    parent = runs["knn"].data.tags["mlflow.parentRunId"]
    page.open(f"{url}/#/experiments/{experiment}/runs/{parent}")
    page.wait("document.body.innerText.includes('system/cpu_utilization')", "system metrics")
    text = page.wait(
        "(t => t.includes('Child runs') && t.includes('knn v') && t)(document.body.innerText)",
        "the routers' runs",
    )
    assert f"snapshot-{runs['knn'].data.params['snapshot']}" in text
    assert "compare them" in text
    page.open(f"{url}/#/experiments/{experiment}/runs/{parent}/artifacts/pareto/simulated.png")
    page.wait(
        "[...document.querySelectorAll('img')].some(i => i.naturalWidth > 800)",
        "the Pareto figure",
    )


def test_without_chromium_ci_fails_and_a_person_is_told(tmp_path):
    code = (
        "import pytest\n"
        "from tests.support.browser import browser\n"
        "try:\n"
        "    with browser(): pass\n"
        "except BaseException as error:\n"
        "    print(type(error).__name__, error)\n"
    )

    def told(**environment):
        repository = str(Path(__file__).resolve().parents[2])
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
            env={"PATH": str(tmp_path), "PYTHONPATH": repository, **environment},
        ).stdout  # fmt: skip

    assert told().startswith("Skipped no Chromium here (on Debian: apt install chromium)")
    assert told(CI="true").startswith("Failed no Chromium here")
