"""Deployments on a real Prefect server, with real workers: one server and one chain for the file.

What the chain is: files arrive (an event), so that ingest runs, publishes a snapshot and asks for
a retraining (an event), which trains its routers in runs of their own. SIMULATED battles, and
words hashed for an encoder: routers need not be good, only the same wherever they are trained.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from types import SimpleNamespace

import psutil
import pytest
import yaml

from flows.engine import configure
from flows.recent import recent_runs
from routellm.cli.screen import run_line
from routellm.errors import UsageError
from routellm.routers.base import Pair
from routellm.settings import Settings
from routellm.snapshots import SnapshotStore
from tests.conftest import HashEncoder
from tests.support.bare import bare_settings
from tests.support.prefect_server import client_of, prefect_server
from tests.support.servers import Server
from tests.support.words_endpoint import words_endpoint
from tests.unit.test_ingest import rows
from tests.unit.test_sources import write_lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PATIENCE_S = 180.0
SOURCE = "simulated://arena?battles=2000"
MORE = "simulated://arena?battles=2400"
TOML = """
home = "home"
sources = ["{source}"]
[embedding]
provider = "openai"
base_url = "{url}"
model = "words"
batch_size = 1000
[evaluation]
bootstrap = 100
contamination_similarity = 1.0
[training]
routers = ["knn", "mf"]
[workers]
train = "deployments"
gpu_kinds = ["mf"]
wait_s = 8
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with settings, and an encoder; Prefect is configured before it is imported."""
    folder = tmp_path_factory.mktemp("place")
    for home in ("home", "here"):  # MLflow would make two
        bare_settings(folder / home)
    with words_endpoint() as url:
        (folder / "routellm.toml").write_text(TOML.format(source=SOURCE, url=url))
        configure(Settings(home=folder / "test"))
        yield folder


def environment(place, **more):
    own = ("ROUTELLM_", "PREFECT_", "MLFLOW_")
    plain = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    return plain | {
        "PREFECT_HOME": str(place / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": "1",
        **more,
    }


@pytest.fixture(scope="module")
def server(place, tmp_path_factory):
    more = {"PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "2"}
    with (
        prefect_server(place / "server", tmp_path_factory, **more) as running,
        client_of(running.url),
    ):
        yield running


@pytest.fixture(scope="module")
def client(server):
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as one:
        yield one


@pytest.fixture(scope="module")
def applied(server, place):
    """The shipped deployments, that their schedules start nothing here, and no gate is passed."""
    from flows.apply import apply, prefect_yaml

    doc = yaml.safe_load(prefect_yaml().read_text())
    for one in doc["deployments"]:
        for schedule in one.get("schedules", []):
            schedule["active"] = False
        if one["name"] == "retrain":
            one["parameters"] = {"move_alias": False}
    (place / "prefect.yaml").write_text(yaml.safe_dump(doc))
    settings = Settings(home=place / "home")
    return SimpleNamespace(
        changed=apply(settings, place / "prefect.yaml"),
        again=lambda: apply(settings, place / "prefect.yaml"),
    )


@contextmanager
def worker(place, server, pool, **more):
    name = f"{pool}-{time.monotonic_ns()}"
    (place / name).mkdir()
    running = Server(
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--name", name,
         "--type", "process", "--limit", "4", "--install-policy", "never"],
        ready=lambda: None, url="", folder=place / name,
        environment=environment(
            place,
            PREFECT_API_URL=server.url,
            PREFECT_WORKER_QUERY_SECONDS="1",
            PREFECT_WORKER_HEARTBEAT_SECONDS="3",
            ROUTELLM_WORKERS__FOLDER=str(place),
            **more,
        ),
    )  # fmt: skip
    with running:
        yield running


def until(found, what, patience_s=PATIENCE_S):
    """Return what `found` returns once it is true."""
    give_up = time.monotonic() + patience_s
    while time.monotonic() < give_up:
        if one := found():
            return one
        time.sleep(1.0)
    raise AssertionError(f"{what} did not come about in {patience_s:.0f} s")


def runs_of(client, flow, *, deployment=None):
    """Return the runs of a flow, the first started first."""
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterName,
        FlowFilter,
        FlowFilterName,
    )

    of = DeploymentFilter(name=DeploymentFilterName(any_=[deployment])) if deployment else None
    found = client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=[flow])), deployment_filter=of
    )
    return sorted(found, key=lambda run: run.created)


def ended(client, run, patience_s=PATIENCE_S):
    def done():
        now = client.read_flow_run(run.id)
        return now if now.state.is_final() else None

    return until(done, f"the end of {run.name}", patience_s)


def logged(client, run, text):
    """Wait until a text is in the log of a run: lines arrive some seconds after its end."""
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

    of = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id]))
    until(
        lambda: any(text in one.message for one in client.read_logs(of, limit=200)),
        f"{text!r} in the log of {run.name}",
        30.0,
    )


def asked_for(name, **parameters):
    from prefect.deployments import run_deployment

    return run_deployment(name, parameters=parameters, timeout=0, as_subflow=False)


@pytest.fixture(scope="module")
def chain(applied, server, client, place):
    """From files that arrive to registered routers, by events alone; with more asked meanwhile."""
    from flows.send import send_event

    with worker(place, server, "cpu"):
        send_event("routellm.inbox.arrived", "routellm.inbox", "inbox", {"count": 1})
        (ingest,) = until(lambda: runs_of(client, "ingest", deployment="ingest"), "an ingest")
        ingest = ended(client, ingest)
        (retrain,) = until(lambda: runs_of(client, "retrain", deployment="retrain"), "a retraining")
        until(lambda: client.read_flow_run(retrain.id).state.is_running(), "its start")
        more = [asked_for("retrain/retrain") for _ in range(3)]
        yield SimpleNamespace(
            ingest=ingest,
            retrain=ended(client, retrain),
            more=[ended(client, run) for run in more],
        )


@pytest.fixture
def here(place, server, monkeypatch):
    """The same retraining in this process."""
    from flows.retrain import retrain

    monkeypatch.chdir(place)
    settings = Settings(home=place / "here")
    workers = settings.workers.model_copy(update={"train": "here"})
    settings = settings.model_copy(update={"workers": workers})
    return retrain(settings, [SOURCE], move_alias=False)


def registry_at(place, monkeypatch):
    from registry import connect

    monkeypatch.chdir(place)
    return connect(Settings(home=place / "home"))


# --- what is shipped


def test_what_is_shipped_names_flows_that_are_there_and_says_how_they_collide():
    import inspect

    from prefect.utilities.importtools import import_object

    from flows.apply import prefect_yaml

    found = {}
    for one in yaml.safe_load(prefect_yaml().read_text())["deployments"]:
        flow = import_object(one["entrypoint"])
        found[f"{flow.name}/{one['name']}"] = one
        known = set(inspect.signature(flow.fn).parameters)
        for given in (one, *one.get("triggers", [])):
            assert set(given.get("parameters", {})) <= known
        assert all(s["timezone"] == "UTC" and s["slug"] for s in one.get("schedules", []))
        if "limit" in one.get("concurrency_limit", {}):
            assert one["concurrency_limit"]["limit"] == 1
    strategy = {
        name: one["concurrency_limit"]["collision_strategy"]
        for name, one in found.items()
        if "concurrency_limit" in one
    }
    assert strategy == {
        "ingest/ingest": "ENQUEUE", "retrain/retrain": "ENQUEUE", "promote/promote": "ENQUEUE",
        "monitor/monitor": "CANCEL_NEW", "compact/compact": "CANCEL_NEW",
    }  # fmt: skip
    assert found.keys() - strategy.keys() == {
        "train-router/cpu", "train-router/gpu", "evaluate/evaluate",
    }  # fmt: skip
    crons = {
        n: [s["cron"] for s in one["schedules"]] for n, one in found.items() if "schedules" in one
    }
    assert crons == {
        "ingest/ingest": ["17 * * * *"], "retrain/retrain": ["30 3 * * *"],
        "monitor/monitor": ["*/5 * * * *"], "compact/compact": ["10 5 * * 0"],
    }  # fmt: skip


def test_a_second_apply_changes_nothing(applied, client):
    def state():
        deployments = [
            d.model_dump(mode="json", exclude={"status", "last_polled"})
            for d in client.read_deployments()
        ]
        pools = [p.model_dump(mode="json", exclude={"status"}) for p in client.read_work_pools()]
        limits = [one.model_dump(mode="json") for one in client.read_global_concurrency_limits()]
        automations = [one.model_dump(mode="json") for one in client.read_automations()]
        return [sorted(map(json.dumps, many)) for many in (deployments, pools, limits, automations)]

    assert len([line for line in applied.changed if line.startswith("deployment")]) == 8
    before = state()
    assert [len(many) for many in before] == [8, 2, 6, 4]
    assert applied.again() == []
    assert state() == before


def test_who_trains_on_a_cuda_device_holds_it_under_the_servers_limit(
    applied, client, tmp_path, monkeypatch
):
    from flows import device

    plan = SimpleNamespace(encoder=HashEncoder(), pair=Pair("strong", "weak"))
    settings = Settings(home=tmp_path)

    def held():
        return client.read_global_concurrency_limit_by_name(device.LIMIT).active_slots

    with device.device("bert", plan, settings):
        assert held() == 0  # on a CPU
    wanted = {"bert": 1}
    monkeypatch.setattr(device, "devices_of", lambda options, kind: wanted.get(kind, 0))
    with device.device("knn", plan, settings):
        assert held() == 0
    with device.device("bert", plan, settings):
        assert held() == 1
    assert held() == 0
    wanted["bert"] = 2
    with (
        pytest.raises(UsageError, match=r"bert\.devices is 2, and workers\.gpus .* 1 at once"),
        device.device("bert", plan, settings),
    ):
        raise AssertionError("nobody takes more than there are")
    wanted["bert"] = 1
    monkeypatch.setattr(device, "LIMIT", "no-such-limit")
    with (
        pytest.raises(UsageError, match=r"no CUDA device could be taken .* run `routellm deploy`"),
        device.device("bert", plan, settings),
    ):
        raise AssertionError("nothing is trained without a device")


def test_an_ingest_that_another_one_overtook_is_done_anew(server, tmp_path, monkeypatch):
    from prefect import flow

    from flows import retrain as loop
    from routellm.ingest import stage

    settings = Settings(home=tmp_path)
    store, validate, overtaken = SnapshotStore(tmp_path / "snapshots"), loop.validate, []

    def overtake(staged, store, settings):
        if not overtaken:
            other = stage(["simulated://arena?battles=120"], store, settings)
            overtaken.append(
                store.commit(
                    parts=other.parts, cursors=other.cursors, previous=other.previous,
                    quarantined_by_rule={}, validation={}, simulated=True,
                )
            )  # fmt: skip
        return validate(staged, store, settings)

    monkeypatch.setattr(loop, "validate", overtake)
    run = flow(validate_parameters=False, persist_result=False)(
        lambda: loop.take_in(["simulated://arena?battles=300"], store, settings)
    )
    staged, manifest, _, _ = run()
    assert manifest.previous == overtaken[0].digest
    assert (staged.new, manifest.rows) == (180, 300)


@pytest.fixture
def alone(server, tmp_path, monkeypatch):
    """A home of its own, for deployed flows that are run in this process."""
    monkeypatch.setenv("ROUTELLM_HOME", str(tmp_path))
    monkeypatch.setenv("ROUTELLM_SOURCES", "[]")
    monkeypatch.chdir(tmp_path)


def test_every_ingest_asks_for_a_retraining_until_there_is_one(alone, monkeypatch):
    from flows import deployed
    from flows.wanted import EVENT, FIRST

    sent, versions, source = [], [], ["simulated://arena?battles=300"]
    monkeypatch.setattr(deployed, "send_event", lambda event, *told: sent.append((event, *told)))
    history = []
    registry = SimpleNamespace(versions=lambda: versions, history=lambda: history)
    monkeypatch.setattr(deployed, "connect", lambda settings: registry)

    def asked():
        sent.clear()
        deployed.ingest(source)
        return [event for event, *_ in sent]

    assert asked() == [deployed.INGESTED, EVENT]
    assert asked() == [EVENT]  # nothing is new, and the retraining was killed
    told = sent[0][-1]
    assert (told["reason"], told["numbers"]["new_battles"]) == (FIRST, 0)
    snapshot = told["numbers"]["snapshot"]
    versions.append(SimpleNamespace(version="1", simulated=True, tags={"snapshot": snapshot}))
    assert asked() == [EVENT]  # it was killed with its work half done
    history.append(SimpleNamespace(version="1", action="promote"))
    assert asked() == []
    # and what was asked for twice is done once
    late = deployed.retrain(source, because=FIRST, return_state=True)
    assert late.message.startswith("another retraining came before: 0 fresh battles")


def test_a_file_that_cannot_be_read_is_told_of_and_the_others_are_ingested(
    alone, tmp_path, monkeypatch, client
):
    from flows import deployed
    from flows.wanted import EVENT

    monkeypatch.setenv("ROUTELLM_INBOX_SETTLE_S", "0")
    (tmp_path / "inbox").mkdir()
    for i in range(2):
        write_lines(tmp_path / "inbox" / f"{i}.jsonl", rows(120, 1000 * i))
    (tmp_path / "inbox" / "broken.jsonl").write_text('{"prompt": "half a li')
    sent = []
    monkeypatch.setattr(deployed, "send_event", lambda event, *told: sent.append((event, *told)))
    deployed.ingest()
    assert [event for event, *_ in sent] == [deployed.INGESTED, deployed.UNREADABLE, EVENT]
    (why,) = sent[1][-1]["passed_over"]
    assert "broken.jsonl line 1 is not JSON" in why
    assert sent[0][-1]["new_battles"] == 240
    (artifact,) = artifacts(client, "passed-over")
    assert json.loads(artifact.data) == [{"passed over": why}]


def test_a_deployed_retraining_looks_back_to_a_moment_that_has_passed(alone, monkeypatch):
    from flows import deployed

    given = []
    monkeypatch.setattr(deployed.loop.retrain, "fn", lambda *_, **more: given.append(more))
    deployed.retrain(as_of="2026-01-19T12:00")  # though there is no source
    assert given == [{"move_alias": True, "as_of": datetime(2026, 1, 19, 12, tzinfo=UTC)}]
    for wrong, why in (("someday", "'someday' is no date: give"), ("2999-01-01", "is not over")):
        with pytest.raises(UsageError, match=why):
            deployed.retrain.fn(as_of=wrong)


def test_a_retraining_that_was_killed_is_asked_for_again_once_an_hour(applied, client, monkeypatch):
    from prefect.states import Crashed

    from flows import deployed
    from flows.wanted import EVENT, FRESH

    sent = []
    monkeypatch.setattr(deployed, "send_event", lambda event, *told: sent.append((event, *told)))
    deployment = client.read_deployment_by_name("retrain/retrain")
    killed = []

    def kill(**parameters):
        given = {"move_alias": True, **parameters}
        run = client.create_flow_run_from_deployment(
            deployment.id, parameters=given, state=Crashed()
        )
        killed.append(run.id)
        deployed.ask_again(None, client.read_flow_run(run.id), None)

    kill(as_of="2026-01-19")  # nobody asks for that but a person
    client.delete_flow_run(killed.pop())
    assert sent == []
    kill(because=FRESH)
    (told,) = sent
    assert (told[0], told[-1]["reason"]) == (EVENT, FRESH)
    assert "was killed" in told[-1]["why"]
    kill(because=FRESH)
    assert len(sent) == 1  # what kills every one is not tried again at once
    for one in killed:
        client.delete_flow_run(one)


# --- the chain


def test_files_that_arrive_are_ingested_and_retrained_on_with_nobody_asking(chain, client):
    assert chain.ingest.state.is_completed()
    logged(client, chain.ingest, "2,000 new battles")
    assert chain.retrain.state.is_completed()
    assert chain.retrain.parameters["because"] == "first"
    assert chain.retrain.start_time > chain.ingest.start_time


def test_retraining_by_deployments_gives_the_routers_of_retraining_here(
    chain, here, place, monkeypatch
):
    registry = registry_at(place, monkeypatch)
    versions = {v.kind: v for v in registry.versions()}
    assert set(versions) == {"knn", "mf"}
    for measured in here.measured:
        version = versions[measured.kind]
        assert version.tags["training_key"] == measured.version.tags["training_key"]
        assert registry.evaluations(version) == dict(measured.evaluations)
    assert not list((place / "home" / "trained").iterdir())


def test_without_a_gpu_worker_a_gpu_kind_is_trained_on_a_cpu_and_it_is_said(chain, client):
    on = {run.name: run for run in runs_of(client, "train-router", deployment="cpu")}
    assert set(on) == {"knn", "mf"}
    assert runs_of(client, "train-router", deployment="gpu") == []
    told = "mf trained without a GPU: no worker of the work pool gpu is online"
    logged(client, chain.retrain, told)
    one, two = on.values()
    assert max(one.created, two.created) < min(one.start_time, two.start_time)  # at once


def test_retrainings_never_overlap_and_those_that_wait_alike_become_one(chain):
    states = sorted(run.state.name for run in chain.more)
    assert states == ["Cancelled", "Cancelled", "Completed"]
    (second,) = [run for run in chain.more if run.state.is_completed()]
    assert second.start_time >= chain.retrain.end_time
    for run in chain.more:
        if run.state.is_cancelled():
            assert run.state.message == f"run {second.name} reads all that this one was to read"


def test_a_version_is_shown_and_promoted_by_deployments_of_their_own(
    chain, client, place, monkeypatch
):
    from flows.report import figures_table

    registry = registry_at(place, monkeypatch)
    (knn,) = [v for v in registry.versions() if v.kind == "knn"]
    assert registry.champion() is None
    names = ("evaluate/evaluate", "promote/promote")
    runs = [ended(client, one) for one in [asked_for(n, version=knn.version) for n in names]]
    assert all(run.state.is_completed() for run in runs)

    (shown,) = artifacts(client, "evaluation")
    assert shown.description == f"Version {knn.version} (knn)"
    figures = registry.evaluations(knn)
    assert json.loads(shown.data) == figures_table([("knn", knn.version, figures)])
    metrics = registry.run_metrics(knn)
    assert {f"{name}.apgr" for name in figures} <= metrics.keys()

    assert registry.aliases() == {"champion": knn.version}
    (entry,) = registry.history()
    assert (entry.action, entry.from_, entry.to) == ("promote", None, knn.version)
    assert entry.decision["outcome"] == "promote"
    assert entry.applied
    logged(client, runs[1], f"promote: {entry.reason}")


def test_a_router_that_fails_loses_no_other_and_is_trained_by_the_command_that_is_named(
    chain, client, server, place, monkeypatch
):
    with worker(place, server, "gpu", ROUTELLM_EMBEDDING__MODEL="other") as one:
        until(lambda: online(client, "gpu"), "a worker of the pool gpu")
        run = ended(client, asked_for("retrain/retrain", sources=[MORE], routers=["mf", "random"]))
        one.kill()
    assert run.state.is_failed()
    registry = registry_at(place, monkeypatch)
    newest = registry.versions()[0]
    assert newest.kind == "random"
    snapshot = newest.tags["snapshot"]
    (artifact,) = artifacts(client, "retrain-failed")
    assert (
        "not trained: mf: this worker would train another mf router than the one that was asked "
        "for: its encoder would be another;" in artifact.description
    )
    assert "The other 1 are registered" in artifact.description
    command = f"prefect flow-run retry {run.id}"
    assert command in artifact.data
    logged(client, run, command)
    (shown,) = (one for one in recent_runs(server.url, 20) if one.id == str(run.id))
    assert run_line(shown).startswith("retrain: Failed (")
    assert "not trained: mf: this worker would train another mf" in run_line(shown)

    with worker(place, server, "gpu") as one:
        until(lambda: len(online(client, "gpu")) == 1, "the right worker of the pool gpu")
        subprocess.run(
            [sys.executable, "-m", *command.split()], check=True, capture_output=True,
            env=environment(place, PREFECT_API_URL=server.url),
        )  # fmt: skip
        killed = until(lambda: engine_of(one), "its run's process")
        killed.send_signal(signal.SIGKILL)
        until(lambda: client.read_flow_run(run.id).state.is_completed(), "the end of the retry")
    _, crashed, last = runs_of(client, "train-router", deployment="gpu")
    assert (crashed.state.name, last.state.name) == ("Crashed", "Completed")
    logged(client, run, "mf is started again, for its run crashed")
    told = [one.description for one in artifacts(client, "train-router-failed")]
    assert len(told) == 2
    assert any(one.startswith("this worker would train another mf router") for one in told)
    assert any("exited with status code: -9" in one for one in told)
    added = [v.kind for v in registry.versions() if v.tags["snapshot"] == snapshot]
    assert sorted(added) == ["mf", "random"]


def artifacts(client, key):
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    return client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))


def online(client, pool):
    from prefect.client.schemas.filters import WorkerFilter, WorkerFilterStatus

    there = WorkerFilter(status=WorkerFilterStatus(any_=["ONLINE"]))
    return client.read_workers_for_work_pool(pool, worker_filter=there)


def engine_of(worker):
    """Return the process of a run that a worker has started, once it is at work."""
    for child in psutil.Process(worker._process.pid).children(recursive=True):
        try:
            if "prefect.engine" in child.cmdline() and child.cpu_times().user > 0.5:
                return child
        except psutil.Error:
            continue
    return None
