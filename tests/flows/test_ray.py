"""A retraining on a Ray cluster, in threads, or on another machine gives what it gives alone.

SIMULATED battles, and words hashed for an encoder: routers need not be good, only the same.
"""

import json
import os
import re
import secrets
import sys
import threading
from contextlib import contextmanager, suppress

import psutil
import pytest

from flows.engine import configure
from routellm.errors import RouteLLMError, TrainingError, UsageError
from routellm.ingest import stage
from routellm.settings import Settings
from routellm.snapshots import snapshot_store
from routellm.storage import shared_folders
from tests.support.servers import free_port
from tests.support.words_endpoint import words_endpoint
from tests.unit.test_ingest import commit

SOURCES = ["simulated://arena?battles=3000"]


def settings_of(folder, name, **more):
    """A home and an experiment of its own; MLflow's file is made once for all."""
    return Settings(
        home=folder / name,
        tracking_uri=f"sqlite:///{folder}/mlflow.db", experiment=name, model=name,
        embedding={"provider": "openai", "base_url": os.environ["WORDS_URL"], "model": "words",
                   "batch_size": 1000},
        evaluation={"bootstrap": 100, "contamination_similarity": 1.0},
        training={"routers": ("random", "knn")},
        **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    configure(Settings(home=folder / "test"))
    with words_endpoint() as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORDS_URL", url)
        yield folder


@pytest.fixture(scope="module")
def token():
    """One token for all clusters here: a process remembers the first that it has used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_AUTH_MODE", "disabled")  # put back when all is done
        patch.delenv("RAY_AUTH_MODE")
        yield


@pytest.fixture(scope="module")
def cluster(place, token):
    """Two nodes of one processor each; the second has another home, as on a machine apart."""
    pytest.importorskip("prefect_ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        small = {"num_cpus": 1, "object_store_memory": 1 << 27}
        nodes = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
        nodes.add_node(**small, env_vars={"ROUTELLM_HOME": str(place / "apart")})
        yield nodes
        nodes.shutdown()


@pytest.fixture(scope="module")
def server(place):
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@contextmanager
def one_worker_killed(title):
    """Kill (-9) the first process of that title that turns up; yields a list that gets its id."""
    killed, stop = [], threading.Event()

    def look():
        while not stop.wait(0.02) and not killed:
            for one in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if one.cmdline()[:1] == [title]:
                        one.kill()
                        killed.append(one.pid)
                        return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield killed
    finally:
        stop.set()
        thread.join()


def retrain(settings):
    from flows.retrain import retrain

    return retrain(settings, SOURCES, move_alias=False, seeds=2)


@pytest.fixture(scope="module")
def expected(place, server):
    """What comes of doing one thing after the other."""
    return retrain(settings_of(place, "one"))


def gives(result, expected):
    """Compare all that does not depend on the clock."""
    assert result.manifest.digest == expected.manifest.digest
    for mine, theirs in zip(result.measured, expected.measured, strict=True):
        assert mine.kind == theirs.kind
        assert mine.version.tags["training_key"] == theirs.version.tags["training_key"]
        assert mine.evaluations == theirs.evaluations
    for mine, theirs in zip(result.trials, expected.trials, strict=True):
        assert (mine.label, mine.evaluations) == (theirs.label, theirs.evaluations)
    return True


@pytest.mark.slow
def test_a_retraining_on_two_nodes_gives_what_one_after_the_other_gives(
    place, cluster, expected, capsys
):
    settings = settings_of(
        place, "ray", storage=f"file://{place}/storage",
        workers={"runner": "ray", "ray_address": cluster.address},
    )  # fmt: skip
    with one_worker_killed("ray::make") as killed:
        result = retrain(settings)
    assert killed
    told = " ".join(capsys.readouterr().err.split())
    assert f"prompts embedded by 2 Ray nodes of the cluster at {cluster.address}" in told
    assert re.search(r"train 2 of 2 routers by \d Ray node", told)
    assert gives(result, expected)
    assert result.trained == expected.trained == ("random", "knn")
    numbers = [[(m.kind, m.version.version) for m in one.measured] for one in (result, expected)]
    assert numbers[0] == numbers[1]
    assert not list((place / "ray" / "trained").iterdir())
    assert shared_folders(settings) == []
    assert (place / "apart" / "embeddings.db").exists()
    assert not (place / "apart" / "mlflow.db").exists()


def raylets():
    return {p.pid for p in psutil.Process().children(recursive=True) if p.name() == "raylet"}


@pytest.mark.slow
def test_a_worker_of_a_cluster_that_a_run_starts_holds_a_device_under_the_servers_limit(
    place, server, token
):
    pytest.importorskip("prefect_ray")
    from prefect import flow, task
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate

    from flows.device import LIMIT
    from flows.runner import Workers

    @task
    def held():
        from flows.device import lease

        with lease(), get_client(sync_client=True) as client:
            return client.read_global_concurrency_limit_by_name(LIMIT).active_slots

    @flow
    def run(settings):
        with Workers(settings) as workers:
            with pytest.raises(UsageError, match="run `routellm deploy`, which makes it"):
                workers.submit(held).result()
            with get_client(sync_client=True) as client:
                client.create_global_concurrency_limit(
                    GlobalConcurrencyLimitCreate(name=LIMIT, limit=1)
                )
            return workers.submit(held).result()

    settings = Settings(home=place / "started", workers={"runner": "ray", "at_once": 1})
    before = raylets()
    assert run(settings) == 1
    assert raylets() == before  # it ends with the run
    assert os.environ["RAY_AUTH_MODE"] == "token"  # nobody else told it what to do


@pytest.mark.slow
def test_a_kind_that_fails_in_its_thread_holds_back_no_other_and_is_trained_the_next_time(
    place, expected, monkeypatch, capsys
):
    from flows import side_by_side

    settings = settings_of(place, "threads", workers={"at_once": 2})
    train = side_by_side.train_router

    def diverge(kind, *args):
        if kind == "random":
            raise TrainingError("random diverged in step 3")
        return train(kind, *args)

    with monkeypatch.context() as patch:
        patch.setattr(side_by_side, "train_router", diverge)
        with pytest.raises(TrainingError, match=r"random diverged in step 3\. The other 1 are reg"):
            retrain(settings)
    assert "train 1 of 2 routers by 2 threads" in " ".join(capsys.readouterr().err.split())
    result = retrain(settings)
    assert (result.trained, result.reused) == (("random",), ("knn",))
    assert gives(result, expected)


@pytest.mark.slow
def test_a_run_of_train_router_in_a_home_of_its_own_leaves_its_router_in_the_storage(
    place, expected, monkeypatch
):
    from flows import deployed, dispatch
    from flows.trained import evaluate_router
    from flows.work import plan_again

    asking = settings_of(place, "asking", storage=f"file://{place}/of-pools")
    store = snapshot_store(asking, simulated=True)
    manifest = commit(stage(SOURCES, store, asking), store)
    assert manifest.digest == expected.manifest.digest
    plan = plan_again(manifest.digest, simulated=True, sources=SOURCES, settings=asking)
    for name, value in {
        "HOME": str(place / "pool"), "STORAGE": asking.storage,
        "EMBEDDING": asking.embedding.model_dump_json(exclude_none=True),
    }.items():  # fmt: skip
        monkeypatch.setenv(f"ROUTELLM_{name}", value)
    deployed.train_router(**json.loads(json.dumps(dispatch.request("knn", plan, SOURCES, asking))))
    runs = dispatch._Runs(None, None, plan, SOURCES, asking, None)
    runs._take("knn")
    (trained,) = runs.trained
    assert trained.folder.is_relative_to(place / "asking")
    (theirs,) = [m for m in expected.measured if m.kind == "knn"]
    assert trained.key == theirs.version.tags["training_key"]
    assert evaluate_router(trained, plan, asking) == theirs.evaluations


# --- what is refused, before anything is done


def on_ray(tmp_path, address=None, **more):
    return Settings(home=tmp_path, workers={"runner": "ray", "ray_address": address}, **more)


def test_without_prefect_ray_it_is_said_what_to_install(tmp_path, monkeypatch):
    from flows.runner import Workers

    monkeypatch.setitem(sys.modules, "prefect_ray", None)
    with pytest.raises(UsageError, match=r"pip install 'routellm-mlops\[ray\]'"):
        Workers(on_ray(tmp_path))


@pytest.mark.parametrize("address", ["ray://192.0.2.255:10001", "192.0.2.255:6379"])
def test_a_cluster_elsewhere_needs_what_its_machines_reach(address, tmp_path, monkeypatch):
    pytest.importorskip("prefect_ray")
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows import runner
    from flows.runner import Workers

    with pytest.raises(UsageError, match=r"works on other machines \(192.0.2.255\).*set `storage`"):
        Workers(on_ray(tmp_path, address))
    shared = on_ray(tmp_path, address, storage="s3://bucket/x")
    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(UsageError, match=r"have no Prefect server .*set PREFECT_API_URL"),
    ):
        Workers(shared)
    monkeypatch.setattr(runner, "CONNECT_S", 0.2)
    with (
        temporary_settings({PREFECT_API_URL: "http://prefect.internal:4200/api"}),
        pytest.raises(RouteLLMError, match=r"cannot be reached .*versions of Python and Ray"),
    ):
        Workers(shared)


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:6379", ":6379", "ray://", "localhost", "h:x"]
)
def test_an_address_that_is_none_is_refused_in_a_sentence(address, tmp_path):
    pytest.importorskip("prefect_ray")
    from flows.runner import Workers

    with pytest.raises(UsageError, match="not where a cluster is: set it to host:6379"):
        Workers(on_ray(tmp_path, address))


def test_a_cluster_that_is_not_there_is_one_sentence_at_once(tmp_path):
    pytest.importorskip("prefect_ray")
    from flows.runner import Workers

    with pytest.raises(RouteLLMError, match=r"cannot be reached \(.*refused"):
        Workers(on_ray(tmp_path, f"127.0.0.1:{free_port()}"))
