"""The whole retraining, disturbed: after it a plain re-run finishes, with the undisturbed result.

SIMULATED battles, words hashed for an encoder, and two cheap router kinds. FAULT_KILLS=100 kills
so often, and FAULT_SEED=1 draws other moments.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import psycopg
import pytest

from flows.engine import configure
from registry.database import make_database
from routellm.settings import Settings
from tests.support.databases import new_database, shared_postgres
from tests.support.prefect_server import client_of, prefect_server
from tests.support.retrained import result
from tests.support.retrainings import retrainings
from tests.support.s3_proxy import s3_proxy
from tests.support.servers import mlflow_over, moto_s3
from tests.support.words_endpoint import words_endpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KILLS = int(os.environ.get("FAULT_KILLS", "3"))
KILLS_A_HOME = 4
SEED = int(os.environ.get("FAULT_SEED", "0"))
RETRAIN = ("retrain", "--source", "simulated://arena?battles=3000", "--routers")
STEP = re.compile(r"^(✓ .*?) +[\d.]+ s$", re.MULTILINE)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A Prefect server, an encoder, and what retrainings are forked from."""
    folder = tmp_path_factory.mktemp("faults")
    with (
        prefect_server(folder / "server", tmp_path_factory) as server,
        words_endpoint() as words,
    ):
        settings = {
            "PREFECT_API_URL": server.url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "500",
            "ROUTELLM_EMBEDDING__PROVIDER": "openai",
            "ROUTELLM_EMBEDDING__BASE_URL": words,
            "ROUTELLM_EMBEDDING__BATCH_SIZE": "1000",
            "ROUTELLM_EVALUATION__BOOTSTRAP": "100",
            "ROUTELLM_EVALUATION__CONTAMINATION_SIMILARITY": "1.0",
            "ROUTELLM_PROMOTION__LEASE_S": "2",
        }
        with retrainings(folder / "forked", settings) as many:
            yield folder, many, words, server.url


@pytest.fixture
def alike(monkeypatch, place):
    """Read what was registered with the encoder that it was trained with."""
    monkeypatch.setenv("ROUTELLM_EMBEDDING__PROVIDER", "openai")
    monkeypatch.setenv("ROUTELLM_EMBEDDING__BASE_URL", place[2])


@dataclass
class Home:
    """A home in which retrainings run, one after the other."""

    place: tuple
    name: str
    tracking_uri: str | None = None
    storage: str | None = None
    environment: dict | None = None

    def __post_init__(self):
        self.disk = self.folder / "disk"
        self.home = self.disk / "home"

    def prepare(self, database):
        """Spare the home the making of MLflow's database."""
        self.home.mkdir(parents=True)
        shutil.copy(database, self.home / "mlflow.db")

    @property
    def folder(self):
        return self.place[0] / self.name

    def start(self, routers="random,knn", **constants):
        environment = dict(self.environment or {})
        if self.tracking_uri:
            environment["ROUTELLM_TRACKING_URI"] = self.tracking_uri
        if self.storage:
            environment["ROUTELLM_STORAGE"] = self.storage
        return self.place[1].start(
            "--home", str(self.home), *RETRAIN, routers,
            folder=self.folder, environment=environment, constants=constants,
        )  # fmt: skip

    def result(self, routers="random,knn"):
        """Re-run with nothing in its way, and return what there is then."""
        again = self.start(routers)
        assert again.wait() == 0, again.said
        return self.there()

    def there(self):
        given = {"home": self.home}
        if self.tracking_uri:
            given["tracking_uri"] = self.tracking_uri
        if self.storage:
            given["storage"] = self.storage
        return result(Settings(**given))


def ended_with_a_sentence(run):
    """Say whether a disturbed run failed: then it must say why in one sentence."""
    status = run.wait()
    if status == 0:
        return False
    assert status == 1, run.said
    last = run.said.strip().splitlines()[-1]
    assert last.startswith("error: "), run.said
    assert "error: unexpected" not in last
    assert "Traceback" not in run.said
    return True


@pytest.fixture(scope="module")
def database(place):
    """A new database of MLflow's, to be copied."""
    path = place[0] / "mlflow.db"
    make_database(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="module")
def undisturbed(place, database):
    """When each step was done where nothing disturbed it: seconds, by the line that says so."""
    home = Home(place, "undisturbed")
    home.prepare(database)
    began, run, steps = time.monotonic(), home.start(), {"": 0.0}
    while run.runs:
        for line in STEP.findall(run.said):
            steps.setdefault(line, time.monotonic() - began)
        time.sleep(0.02)
    assert run.wait() == 0, run.said
    steps.setdefault("the end", time.monotonic() - began)
    return steps


@pytest.fixture(scope="module")
def expected(place, undisturbed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROUTELLM_EMBEDDING__PROVIDER", "openai")
        patch.setenv("ROUTELLM_EMBEDDING__BASE_URL", place[2])
        return Home(place, "undisturbed").there()


def by_router(undisturbed):
    """Return the steps up to the first router's registering, and those of the second and after."""
    steps = list(undisturbed.items())
    second = next(i for i, (line, _) in enumerate(steps) if line.startswith("✓ train knn"))
    return dict(steps[:second]), dict(steps[second - 1 :])


def moments(undisturbed, n, rng, during=("",)):
    """Return n random moments, in order, spread over the steps: after which line, and how long.

    `during` are the steps that count, by how their lines begin; by default all.
    """
    lines, times = list(undisturbed), list(undisturbed.values())
    steps = [i for i in range(1, len(lines)) if lines[i].removeprefix("✓ ").startswith(during)]
    out = []
    for i in range(n):
        at = (i + rng.random()) * len(steps) / n
        step = steps[int(at)]
        out.append((lines[step - 1], (at % 1) * (times[step] - times[step - 1])))
        told = f"FAULT_SEED={SEED}: {out[-1][1]:.2f} s after {out[-1][0]!r}"
        print(told)  # noqa: T201  shown where a test fails
    return out


def at(run, moment):
    """Wait for a moment of a run, or for its end."""
    line, seconds = moment
    while line not in run.said and run.runs:
        time.sleep(0.02)
    end = time.monotonic() + seconds
    while time.monotonic() < end and run.runs:
        time.sleep(0.01)


def test_undisturbed_it_gives_what_the_others_are_compared_with(expected):
    assert expected.battles == 3000
    assert set(expected.keys) == {"random", "knn"}
    assert expected.champion == "knn"


def test_killed_again_and_again_anywhere_the_next_run_finishes_the_same(
    place, undisturbed, expected, alike
):
    rng, killed = random.Random(SEED), 0
    for number in range(0, KILLS, KILLS_A_HOME):
        home = Home(place, f"killed-{number}")
        for moment in moments(undisturbed, min(KILLS_A_HOME, KILLS - number), rng):
            run = home.start()
            at(run, moment)
            run.kill()
            killed += run.wait() == -signal.SIGKILL
        assert home.result() == expected
    assert killed > KILLS / 2


# --- the database


def cut(server, name, run, seconds):
    """End every connection to a database, again and again for a while, or until a run ends."""
    end = time.monotonic() + seconds
    with psycopg.connect(server.url, autocommit=True) as connection:
        while time.monotonic() < end and run.runs:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,)
            )
            time.sleep(0.02)


def test_the_database_cuts_connections_and_is_started_anew(place, undisturbed, expected, alike):
    server = shared_postgres("a retraining whose database goes away was")
    url = new_database(server)
    home, rng = Home(place, "database", tracking_uri=url), random.Random(SEED)
    first, second = by_router(undisturbed)
    run = home.start("random")
    at(run, *moments(first, 1, rng, ("augment", "register")))
    server.kill()
    time.sleep(1.0)
    server.start()
    ended_with_a_sentence(run)
    run = home.start()
    at(run, *moments(second, 1, rng, ("register", "promote")))
    cut(server, url.rpartition("/")[2], run, 1.0)
    ended_with_a_sentence(run)
    assert home.result() == expected


# --- the disk


@contextmanager
def small_disk(folder, megabytes):
    folder.mkdir(parents=True)
    size = f"size={megabytes}m"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        why = f"a full disk was NOT tested: no tmpfs can be mounted here ({done.stderr.strip()})"
        if os.environ.get("CI"):
            pytest.fail(why)
        warnings.warn(why, stacklevel=2)
        pytest.skip(why)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def full(folder):
    """Keep a disk full, also of what others free."""
    done = threading.Event()

    def fill():
        with (folder / "ballast").open("wb", buffering=0) as file:
            while not done.is_set():
                with suppress(OSError):
                    for size in (1 << 20, 1 << 12, 1):
                        while file.write(b"\0" * size) == size:
                            pass
                done.wait(0.02)

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        (folder / "ballast").unlink()


def test_a_full_disk_stops_it_in_a_sentence_and_with_room_it_goes_on(
    place, database, undisturbed, expected, alike
):
    home, rng = Home(place, "disk"), random.Random(SEED)
    with small_disk(home.disk, 64):
        home.prepare(database)
        failed = 0
        for moment in moments(by_router(undisturbed)[0], 2, rng):
            run = home.start("random")
            at(run, moment)
            with full(home.disk):
                failed += ended_with_a_sentence(run)
        assert failed
        assert home.result("random") == expected.of("random")


# --- S3


def test_s3_answers_500(place, database, undisturbed, expected, alike, monkeypatch):
    rng = random.Random(SEED)
    with moto_s3() as bucket, s3_proxy(bucket.endpoint) as proxy:
        environment = bucket.environment | {"AWS_ENDPOINT_URL_S3": proxy.url}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        home = Home(place, "s3", storage=f"s3://{bucket.name}/faults", environment=environment)
        home.prepare(database)
        during = ("validate", "augment", "train", "evaluate", "register")
        run = home.start("random", **{"routellm.storage.s3.PATIENCE_S": 3.0})
        at(run, *moments(by_router(undisturbed)[0], 1, rng, during))
        proxy.away = (500, "InternalError")
        ended_with_a_sentence(run)
        proxy.away = None
        proxy.refuse = [(500, "InternalError")] * 3  # which a plain run does not mind
        proxy.lose_answers = 2
        assert home.result("random") == expected.of("random")


# --- MLflow


def test_mlflow_stands_still_for_ten_seconds(place, database, undisturbed, expected, alike):
    rng = random.Random(SEED)
    folder = place[0] / "mlflow"
    folder.mkdir()
    shutil.copy(database, folder / "mlflow.db")
    server = mlflow_over(
        f"sqlite:///{folder}/mlflow.db", folder,
        "--artifacts-destination", str(folder / "artifacts"),
    )  # fmt: skip
    with server:
        home = Home(place, "frozen", tracking_uri=server.url)
        run = home.start("random")
        at(run, *moments(by_router(undisturbed)[0], 1, rng, ("augment", "register")))
        os.killpg(server._process.pid, signal.SIGSTOP)
        time.sleep(10)
        os.killpg(server._process.pid, signal.SIGCONT)
        ended_with_a_sentence(run)
        assert home.result("random") == expected.of("random")


# --- a worker


def test_a_run_that_its_worker_took_and_never_began_makes_room_and_is_started_again(
    place, monkeypatch
):
    configure(Settings(home=place[0] / "client"))
    from prefect.client.orchestration import get_client
    from prefect.states import Pending

    from flows import apply

    monkeypatch.setattr(apply, "UNSTARTED_AFTER", timedelta(seconds=10))
    with (
        client_of(place[3]),
        get_client(sync_client=True) as client,
    ):
        apply._make_pools(client, Settings())
        assert len(apply.watch_starts(client)) == 1
        assert apply.watch_starts(client) == []
        deployment = client.create_deployment(
            client.create_flow_from_name("ingest"), "ingest", work_pool_name="cpu",
            concurrency_limit=1, concurrency_options={"collision_strategy": "ENQUEUE"},
        )  # fmt: skip
        one, other = (client.create_flow_run_from_deployment(deployment) for _ in range(2))

        def take(run):
            """Do what a worker does first; say whether it may go on."""
            return client.set_flow_run_state(run.id, Pending()).state.is_pending()

        assert take(one)
        assert not take(other)  # there is one place
        while (state := client.read_flow_run(one.id).state).is_pending():
            time.sleep(0.5)
        assert state.is_scheduled()
        assert state.message.startswith("no worker began it")
        assert take(other)


def test_a_run_whose_machine_is_gone_is_ended_after_its_last_heartbeat(place, monkeypatch):
    configure(Settings(home=place[0] / "client"))
    from prefect.client.orchestration import get_client
    from prefect.states import Running

    from flows import apply
    from flows.send import send_event

    monkeypatch.setattr(apply, "GONE_AFTER", timedelta(seconds=12))
    with (
        client_of(place[3]),
        get_client(sync_client=True) as client,
    ):
        assert len(apply._watch_heartbeats(client)) == 1
        assert apply._watch_heartbeats(client) == []
        deployment = client.create_deployment(client.create_flow_from_name("silent"), "silent")
        silent, sound = (client.create_flow_run_from_deployment(deployment) for _ in range(2))

        def beat(*runs):
            for run in runs:
                send_event("prefect.flow-run.heartbeat", f"prefect.flow-run.{run.id}", run.name)

        def state(run):
            return client.read_flow_run(run.id).state

        for run in (silent, sound):
            client.set_flow_run_state(run.id, Running(), force=True)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            beat(silent, sound)
            time.sleep(2)
        assert state(silent).is_running()  # longer than it may be silent
        while state(silent).is_running():
            beat(sound)
            time.sleep(2)
        assert state(silent).is_crashed()
        assert "its machine is gone" in state(silent).message
        assert state(sound).is_running()
