"""History replayed on SIMULATED streams: what it finds, must not see, and leaves when killed."""

import json
import statistics
import subprocess
import sys
import zlib
from datetime import UTC, datetime, timedelta

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows import backtest as flow
from flows import steps
from flows.backtest import alone, replay
from flows.then import Then
from registry import connect
from registry.backtest import log_backtest
from routellm import snapshots, training
from routellm.as_of import History, moment
from routellm.embeddings import get_encoder
from routellm.errors import BenchmarkError, UsageError
from routellm.ingest import stage
from routellm.settings import Settings
from routellm.snapshots import SnapshotStore
from routellm.sources.simulated import _DEMANDS, _TOPICS
from tests.support import words_endpoint as endpoint
from tests.support.killed_call import killed_at
from tests.test_docs import commands

pytestmark = pytest.mark.slow
DAY = timedelta(days=1)
SEEDS = (0, 1, 2, 3)


class ArenaWords:
    """An encoder for the arena: what its prompts show, topic and difficulty, and a little more."""

    identity = "test/arena-words@1"
    dimensions = 32
    known: dict = {}  # noqa: RUF012

    def encode(self, prompts, *, progress=None):
        for prompt in prompts:
            if prompt not in self.known:
                self.known[prompt] = self._one(prompt)
        return np.array([self.known[p] for p in prompts], np.float32).reshape(-1, self.dimensions)

    def _one(self, prompt):
        out = np.zeros(self.dimensions, np.float32)
        for i, (starts, _) in enumerate(_TOPICS.values()):
            out[i] = prompt.startswith(starts)
        for i, row in enumerate(_DEMANDS):
            out[8 + i] = any(words in prompt for words in row)
        for word in prompt.split():
            out[12 + zlib.crc32(word.encode()) % 20] += 0.05
        return out / np.linalg.norm(out)


@pytest.fixture(autouse=True)
def arena_words(monkeypatch):
    monkeypatch.setattr(flow, "get_encoder", lambda *_: ArenaWords())


def settings_at(home, evaluation=(), **training_settings):
    return Settings(
        home=home,
        evaluation={"bootstrap": 100, "contamination_similarity": 0.9999, **dict(evaluation)},
        training={"routers": ("knn",), "heldout_share": 0.2, **training_settings},
    )


def publish(settings, folder, *tables):
    """Publish battles without the expectations' leave: they are as they should be."""
    store = SnapshotStore(settings.snapshots_dir(simulated=True))
    folder.mkdir(exist_ok=True)
    for table in tables:
        path = folder / f"{len(list(folder.iterdir()))}.parquet"
        pq.write_table(table, path)
        store.commit(parts=[path], cursors={}, previous=store.latest(), quarantined_by_rule={},
                     validation={"passed": True, "rules": []}, simulated=True)  # fmt: skip
    return store


def changed(table, **columns):
    """Return battles with columns replaced."""
    for name, values in columns.items():
        field = table.schema.field(name)
        index = table.schema.get_field_index(name)
        table = table.set_column(index, field, pa.array(values, field.type))
    return table


def stream(tmp_path, spec):
    """Return the battles of a stream."""
    scratch = Settings(home=tmp_path / "scratch")
    store = SnapshotStore(tmp_path / "staged")
    staged = stage([f"simulated://arena?{spec}"], store, scratch)
    table = pa.concat_tables(pq.read_table(path) for path in staged.parts)
    staged.discard()
    return table


# --- what it finds ---------------------------------------------------------------------------


def gains(tmp_path, drift):
    """Return the pooled gains of two trainings in 15 days, by seed."""
    out = []
    for seed in SEEDS:
        settings = settings_at(
            tmp_path / f"{drift}-{seed}", {"contamination_ngram": 0}, heldout_share=0.1
        )
        table = stream(tmp_path, f"battles=9000&per_day=200&drift={drift}&seed={seed}")
        publish(settings, tmp_path / f"parts-{drift}-{seed}", table)
        found = replay(settings, moment("2026-01-30"), moment("2026-02-14"), 7.5 * DAY)
        assert [w.known for w in found.windows] == [6000, 7500]
        assert 550 < found.pooled.battles < 750
        assert found.windows[0].comparison.gain.apgr.value == 0.0  # both serve the same router
        out.append(found.pooled.gain)
    return out


def test_with_drift_retraining_gains_beyond_chance_and_without_it_no_gain_can_be_shown(tmp_path):
    drifting, still = gains(tmp_path, 1.5), gains(tmp_path, 0)
    for gain in drifting:  # each of the four seeds
        assert gain.apgr.low > 0
        assert gain.cross_entropy.low > 0
    # over the four seeds together, training's own chance included: Student's t, 3 degrees
    values = [gain.apgr.value for gain in still]
    half = 3.182 * statistics.stdev(values) / len(values) ** 0.5
    assert abs(statistics.fmean(values)) < half
    assert max(values) < min(gain.apgr.value for gain in drifting) / 2


# --- what it must not see --------------------------------------------------------------------


def test_nothing_voted_after_a_date_reaches_what_was_trained_then(tmp_path):
    when = datetime(2026, 1, 16, tzinfo=UTC)
    table = stream(tmp_path, "battles=6000&per_day=200&drift=1")
    known = table.filter(pa.compute.less_equal(table["voted_at"], pa.scalar(when)))
    # after the date every third vote is cast again the other way round, on the very same prompts:
    # a label weight, a validation battle, a calibration or a held-out vote that saw one would show
    third = known.take(list(range(0, len(known), 3)))
    turned = changed(third, preference_a=1.0 - third["preference_a"].to_numpy())
    turned = changed(turned, battle_id=[f"{i:032x}" for i in range(len(third))])

    def dated(at):
        return changed(turned, voted_at=[at] * len(third))

    trained = {}
    for name, tables in {
        "alone": [known],
        "voted later": [known, dated(when + timedelta(microseconds=1))],
        "in one part": [pa.concat_tables([dated(when + DAY), known])],
        "undated": [known, dated(None)],  # taken in now: known from now
        "leaked": [known, dated(when)],
    }.items():
        settings = settings_at(tmp_path / name)
        store = publish(settings, tmp_path / f"parts-{name}", *tables)
        then = Then(when, History.of(store, training.COLUMNS), ArenaWords(), settings)
        with steps.step("test") as line:
            apgr = then.heldout_apgr("knn", line)
            folder = then._trained("knn", line).folder
        router = json.loads((folder / "bundle" / "router.json").read_text())
        digests = json.loads((folder / "bundle" / "digests.json").read_text())
        report = json.loads((folder / "report.json").read_text())
        trained[name] = (folder.name, apgr, digests, router, report)
    alone_ = trained.pop("alone")
    leaked = trained.pop("leaked")
    for name, found in trained.items():
        assert found == alone_, name
    assert leaked[1] < alone_[1] - 0.05  # what it would look like


def test_votes_on_prompts_that_training_has_shown_measure_nothing(tmp_path):
    table = stream(tmp_path, "battles=6000&per_day=200&drift=0")
    settings = settings_at(tmp_path / "home")
    prompts = table["prompt"].to_pylist()
    prompts[4200:5000] = prompts[1000:1800]  # asked again, in the window
    publish(settings, tmp_path / "parts", changed(table, prompt=prompts))
    found = replay(settings, moment("2026-01-20"), moment("2026-01-25"), 5 * DAY)
    (window,) = found.windows
    # of the pair's 230 votes 184 are on prompts that are asked again, 8 in 10 of which were shown
    assert 120 < window.excluded < 180
    assert 50 < window.comparison.battles < 110


def test_too_little_to_go_by_is_refused_in_a_sentence(tmp_path):
    settings = settings_at(tmp_path / "home")
    table = stream(tmp_path, "battles=1500&per_day=200&drift=0")
    publish(settings, tmp_path / "parts", table)
    with pytest.raises(BenchmarkError, match=r"by 2026-01-03 too few held-out .*start later"):
        replay(settings, moment("2026-01-03"), None, 2 * DAY)
    with pytest.raises(UsageError, match="no battle was known by 2025-12-31"):
        replay(settings, moment("2025-12-31"), None, 5 * DAY)
    undated = settings_at(tmp_path / "undated")
    publish(undated, tmp_path / "parts-undated", changed(table, voted_at=[None] * len(table)))
    with pytest.raises(UsageError, match="says when it was voted: there is no history to replay"):
        replay(undated, moment("2026-01-03"), None, 5 * DAY)
    assert not list((tmp_path / "home").glob("snapshots-simulated/staging/*"))


# --- what a kill leaves ----------------------------------------------------------------------


@pytest.fixture
def past(tmp_path):
    """A home with a history of which ten days are to be replayed, and what that gives."""
    table = stream(tmp_path, "battles=6000&per_day=200&drift=1")
    homes = [settings_at(tmp_path / name) for name in ("whole", "killed")]
    for settings in homes:
        publish(settings, tmp_path / f"parts-{settings.home.name}", table)

    def run(settings, to="2026-01-30"):
        return replay(settings, moment("2026-01-20"), moment(to), 5 * DAY)

    return homes, run


def files(settings):
    folder = settings.home / "backtest" / "trained"
    return {str(p.relative_to(folder)) for p in folder.rglob("*.json")}


def test_a_backtest_killed_anywhere_goes_on_and_finds_what_an_unbroken_one_finds(past):
    (whole, killed), run = past
    expected = run(whole)
    deaths = 0
    for number in (1, 2, 3, 4, 6):
        deaths += killed_at(
            number, snapshots.Path, ["replace"], lambda: run(killed), done=number % 2 == 0
        )
    assert deaths == 5
    assert run(killed) == expected
    assert files(killed) == files(whole)


def test_what_was_trained_before_is_not_trained_again_and_more_history_trains_only_its_own(
    past, monkeypatch
):
    (settings, _), run = past
    expected = run(settings, "2026-01-25")
    real, trained = training.train, []

    def counted(kind, battles, *args, **kwargs):
        trained.append(len(battles))
        return real(kind, battles, *args, **kwargs)

    monkeypatch.setattr(training, "train", counted)
    assert run(settings, "2026-01-25") == expected
    assert trained == []
    longer = run(settings)
    assert longer.windows[0] == expected.windows[0]
    assert len(trained) == 1  # of the second date; the never retrained router was kept
    bundles = list((settings.home / "backtest" / "trained").glob("*/bundle"))
    assert len(bundles) == 1


def test_two_backtests_of_one_home_do_not_run_at_once(tmp_path):
    refused = pytest.raises(UsageError, match="another backtest is under way")
    with alone(tmp_path / "b"), refused, alone(tmp_path / "b"):
        pass
    with alone(tmp_path / "b"):
        pass


# --- docs/backtest.md, as written, with fewer battles ------------------------------------------


# in one process, which spares two of them Prefect's start
ONE_AFTER_ANOTHER = """
import shlex, sys
from routellm.cli import main
for line in sys.argv[1:]:
    sys.argv = shlex.split(line)
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
"""


@pytest.fixture(scope="module")
def words_endpoint():
    with endpoint.words_endpoint() as url:
        yield url


def test_the_page_leads_from_an_ingest_to_the_figure_and_moves_no_champion(
    tmp_path, monkeypatch, words_endpoint
):
    for name, value in {
        "ROUTELLM_EMBEDDING__PROVIDER": "openai",
        "ROUTELLM_EMBEDDING__BASE_URL": words_endpoint,
        "ROUTELLM_EMBEDDING__BATCH_SIZE": "1000",
        "ROUTELLM_EVALUATION__BOOTSTRAP": "100",
        "ROUTELLM_EVALUATION__CONTAMINATION_SIMILARITY": "1.0",
        "OMP_NUM_THREADS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    lines = [line for page, line in commands(run=False) if page == "backtest.md"]
    assert [line.split()[-1] for line in lines if line.startswith("export")] == [
        "ROUTELLM_TRAINING__HELDOUT_SHARE=0.2"
    ]
    monkeypatch.setenv("ROUTELLM_TRAINING__HELDOUT_SHARE", "0.2")
    ours = []
    for line in lines:
        for old, new in (
            ("battles=11400", "battles=4500"), ("2026-03-16", "2026-01-29"),
            ("--every 7d", "--every 5d"), ("--routers mf,knn", "--routers knn,random"),
        ):  # fmt: skip
            line = line.replace(old, new)
        ours += [line] if line.startswith("routellm ") else []
    assert [line.split()[1] for line in ours] == ["ingest", "backtest", "retrain"]
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_ANOTHER, *ours], cwd=tmp_path, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.split())
    assert "SIMULATED" in told
    assert "etraining every 5 days" in told
    home = tmp_path / ".routellm"
    assert (home / "backtest" / "backtest.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (tmp_path / "backtest.html").read_text()

    uri = f"sqlite:///{home / 'mlflow.db'}"
    client = mlflow.MlflowClient(uri, uri)  # else the registry that another test has set
    (experiment,) = (e for e in client.search_experiments() if e.name == "routellm")
    runs = client.search_runs([experiment.experiment_id], "tags.role = 'backtest'")
    assert len(runs) == 1
    curve = client.get_metric_history(runs[0].info.run_id, "window.retrained.apgr")
    assert [point.step for point in curve] == [5, 10]
    assert {"backtest.png", "backtest.html", "backtest.json"} <= {
        f.path for f in client.list_artifacts(runs[0].info.run_id)
    }
    assert runs[0].data.tags["simulated"] == "true"
    # asked for again, it is the same, and is logged once
    monkeypatch.setattr(flow, "get_encoder", get_encoder)
    settings = Settings(home=home)
    settings = settings.model_copy(
        update={"training": settings.training.model_copy(update={"routers": ("knn", "random")})}
    )
    again = replay(settings, moment("2026-01-19"), moment("2026-01-29"), 5 * DAY)
    assert again.verdict in told
    assert log_backtest(connect(settings), again) == runs[0].info.run_id
    # the only versions are those that looked back; none was promoted
    versions = client.search_model_versions("name='router'")
    assert {v.tags["kind"] for v in versions} == {"knn", "random"}
    assert {v.tags["as_of"][:10] for v in versions} == {"2026-01-19"}
    assert {v.tags["snapshot_created_at"][:10] for v in versions} == {"2026-01-19"}
    assert client.get_registered_model("router").aliases == {}
    assert "the champion stays" in told
    store = SnapshotStore(home / "snapshots-simulated")
    aside = store.get(versions[0].tags["snapshot"])
    assert aside.validation["passed"]
    assert aside.rows == 150 * 19
    assert store.latest().rows == 4500
