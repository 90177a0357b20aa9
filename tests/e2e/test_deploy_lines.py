"""The command lines of deploy/compose.yaml, as plain processes: the loop runs through them.

Each service starts when those that it waits for are healthy, by their own health checks, with its
own command, environment and secrets; only host names, ports and folders are another's. PostgreSQL
and Redis are Debian's; MinIO is not to be had, so moto's S3 server stands in for it. The proxy,
Prometheus and Grafana are not started.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psycopg
import pytest
import yaml

from routellm.gateway.server import running
from tests.conftest import REPOSITORY
from tests.e2e.shared import new_home
from tests.support.servers import NO_POSTGRES, free_port, moto_s3, postgres, postgres_programs
from tests.support.upstream import CHAT, Upstream, json_reply
from tests.support.words_endpoint import words_endpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DEPLOY = REPOSITORY / "deploy"
LISTENS = {"redis": 6379, "mlflow": 5000, "prefect-server": 4200, "gateway": 6060}
ELSEWHERE = {"postgres": 5432, "minio": 9000}  # stood in for
NOT_STARTED = {"worker-gpu", "proxy", "prometheus", "grafana"}
NO_REDIS = "no redis-server was found: install it (Debian: apt-get install redis-server)"


class Lines:
    """The services of the compose file on this machine, started as it says.

    Parameters
    ----------
    folder : Path
        Takes the place of the containers' folders.
    ports : dict
        By service, the port that takes the place of its own.
    """

    def __init__(self, folder, ports):
        self.folder = folder
        self.services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
        self.running = {}
        self.healthy = {"postgres", "minio"}
        self._instead = [
            *((f"{name}:{port}", f"127.0.0.1:{ports[name]}")
              for name, port in (LISTENS | ELSEWHERE).items()),
            *((f"127.0.0.1:{port}", f"127.0.0.1:{ports[name]}") for name, port in LISTENS.items()),
            ("0.0.0.0", "127.0.0.1"), ("127.0.0.1:8080", f"127.0.0.1:{ports['worker-cpu']}"),
            ("/run/secrets", f"{folder}/secrets"), ("/var/lib/routellm", f"{folder}/h"),
            ("/home/routellm", f"{folder}/user"), ("/settings", f"{folder}/settings"),
            ("/inbox", f"{folder}/inbox"), ("/data", f"{folder}/redis"),
        ]  # fmt: skip
        self._ports = {str(LISTENS[name]): str(ports[name]) for name in LISTENS}
        self._more = {
            "PREFECT_WORKER_WEBSERVER_PORT": str(ports["worker-cpu"]),
            # a process for each router costs half a minute; tests/flows/test_deployments.py has it
            "ROUTELLM_WORKERS__TRAIN": "here",
        }

    def here(self, text):
        """Return a text of the file with this machine's names in place of the containers'."""
        found = {re.escape(old): new for old, new in self._instead}
        pattern = "|".join(rf"(?<![\w.-]){old}(?!\w)" for old in found)
        return re.sub(pattern, lambda m: found[re.escape(m.group())], text)

    def environment(self, name):
        own = ("ROUTELLM_", "PREFECT_", "MLFLOW_", "AWS_", "PG")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(own)}
        given = self.services[name].get("environment", {})
        return {
            **kept,
            # as in the images
            "PATH": f"{DEPLOY / 'docker'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": f"{self.folder}/user",
            **{k: self.here(v) for k, v in given.items()},
            **self._more,
        }

    def command(self, name):
        words = [self._ports.get(word, self.here(word)) for word in self.services[name]["command"]]
        return ["with-secrets", *words] if "build" in self.services[name] else words

    def up(self, name):
        """Start a service, after those that it waits for, and wait until it is healthy."""
        if name in self.healthy:
            return
        one = self.services[name]
        for other in one.get("depends_on", {}):
            self.up(other)
        folder = self.folder / "run" / name
        folder.mkdir(parents=True)
        directory = self.here(one.get("working_dir", str(folder)))
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                self.command(name), cwd=directory, env=self.environment(name),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                # as in a container; a shell's background has it ignored, and its children too
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip
        self.running[name] = process
        if one["restart"] == "on-failure":
            assert process.wait(180) == 0, self.log(name)
            del self.running[name]
        elif "test" in one.get("healthcheck", {}):
            self._wait(name)
        self.healthy.add(name)

    def _wait(self, name):
        how, *check = self.services[name]["healthcheck"]["test"]
        assert how == "CMD"
        check = [self._ports.get(word, self.here(word)) for word in check]
        deadline = time.monotonic() + 180
        while subprocess.run(
            check, env=self.environment(name), capture_output=True, timeout=60
        ).returncode:
            assert self.running[name].poll() is None, self.log(name)
            assert time.monotonic() < deadline, self.log(name)
            time.sleep(0.5)

    def down(self):
        """Stop everything as compose does; return by service how many seconds it took."""
        took = {}
        for name, process in reversed(self.running.items()):
            began = time.monotonic()
            process.terminate()
            process.wait(int(self.services[name].get("stop_grace_period", "10s")[:-1]))
            took[name] = time.monotonic() - began
        self.running.clear()
        return took

    def kill(self):
        for process in self.running.values():
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()

    def log(self, name):
        return f"{name}:\n" + (self.folder / f"{name}.log").read_text()[-3000:]


@contextmanager
def database(secrets):
    """Run PostgreSQL, with what deploy/postgres makes at its first start; yields the server."""
    parts = ("prefect", "mlflow", "routellm")
    with postgres() as server:
        port = server.url.rpartition(":")[2].split("/")[0]
        # passwords count, as in the container
        rules = server.folder / "data" / "pg_hba.conf"
        asked = f"host all {','.join(parts)} 127.0.0.1/32 scram-sha-256\n"
        rules.write_text(asked + rules.read_text())
        with psycopg.connect(server.url) as connection:
            connection.execute("SELECT pg_reload_conf()")
        subprocess.run(
            [DEPLOY / "postgres" / "databases.sh"], check=True, timeout=60,
            env={"PATH": f"{postgres_programs()}:{os.environ['PATH']}", "SECRETS": str(secrets),
                 "POSTGRES_USER": "test", "PGHOST": "127.0.0.1", "PGPORT": port},
        )  # fmt: skip
        yield server


@pytest.fixture(scope="module")
def upstream():
    server = Upstream(json_reply(CHAT))
    with running(server.app) as url:
        server.url = url
        yield server


@pytest.fixture(scope="module")
def stack(tmp_path_factory, upstream):
    for missing in (
        NO_REDIS if shutil.which("redis-server") is None else None,
        NO_POSTGRES if postgres_programs() is None else None,
    ):
        if missing and os.environ.get("CI"):
            pytest.fail(missing)
        if missing:
            warnings.warn(f"deploy/compose.yaml was NOT started: {missing}", stacklevel=1)
            pytest.skip(missing)
    folder = tmp_path_factory.mktemp("lines")
    new_home(folder, tmp_path_factory)
    for name in ("secrets", "user", "inbox", "redis"):
        (folder / name).mkdir()
    for name in yaml.safe_load((DEPLOY / "compose.yaml").read_text())["secrets"]:
        (folder / "secrets" / name).write_text(f"{name}-0123456789\n")
    shutil.copytree(DEPLOY / "settings", folder / "settings")
    toml = folder / "settings" / "routellm.toml"
    text = re.sub(r"https://\w+\.example/v1", f"{upstream.url}/v1", toml.read_text())
    text = text.replace("/run/secrets", str(folder / "secrets"))
    with ExitStack() as around:
        words = around.enter_context(words_endpoint())  # no process loads an encoder of its own
        # small, and SIMULATED
        toml.write_text(
            f'sources = ["simulated://arena?battles=1000"]\n{text}\n'
            '[training]\nrouters = ["random", "knn"]\n'
            "[evaluation]\nbootstrap = 100\ncontamination_similarity = 1.0\n"
            f'[embedding]\nprovider = "openai"\nbase_url = "{words}"\nmodel = "words"\n'
        )
        assert set(tomllib.loads(toml.read_text())["gateway"]) == {"strong", "weak"}
        sql = around.enter_context(database(folder / "secrets"))
        s3 = around.enter_context(moto_s3())
        s3.client().delete_bucket(Bucket=s3.name)  # `bucket` makes it
        ports = {name: free_port() for name in (*LISTENS, "worker-cpu")}
        ports["postgres"] = sql.url.rpartition(":")[2].split("/")[0]
        ports["minio"] = s3.endpoint.rpartition(":")[2]
        lines = Lines(folder, ports)
        lines.s3, lines.ports = s3, ports
        lines.prefect = f"http://127.0.0.1:{ports['prefect-server']}/api"
        around.callback(lines.kill)
        for name in lines.services:
            if name not in NOT_STARTED:
                lines.up(name)
        yield lines


def retrain(stack):
    """Have a worker run the deployment; return the run once it is over."""
    with httpx.Client(base_url=stack.prefect, timeout=30) as client:
        deployment = client.get("/deployments/name/retrain/retrain").json()["id"]
        for other in client.post("/deployments/filter", json={}).json():
            if other["schedules"]:  # what falls due meanwhile would only take time
                client.patch(f"/deployments/{other['id']}", json={"paused": True})
        run = client.post(f"/deployments/{deployment}/create_flow_run", json={}).json()
        deadline = time.monotonic() + 400
        while run["state"]["type"] not in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            assert time.monotonic() < deadline, run["state"]
            time.sleep(1)
            run = client.get(f"/flow_runs/{run['id']}").json()
        return run


def test_the_loop_runs_through_the_lines_of_the_compose_file(stack, upstream):
    run = retrain(stack)
    assert run["state"]["type"] == "COMPLETED", (run["state"], stack.log("worker-cpu"))

    gateway = f"http://127.0.0.1:{stack.ports['gateway']}"
    asked_for = {"model": "router", "messages": [{"role": "user", "content": "Why so blue?"}]}
    deadline = time.monotonic() + 90
    while True:  # until both of its processes have the champion
        answer = httpx.post(f"{gateway}/v1/chat/completions", json=asked_for, timeout=30)
        if "x-routellm-version" in answer.headers:
            break
        assert time.monotonic() < deadline, (dict(answer.headers), stack.log("gateway"))
        time.sleep(0.5)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-routellm-kind"] in ("random", "knn")
    assert answer.json()["choices"] == CHAT["choices"]
    route = answer.headers["x-routellm-route"]
    assert upstream.seen[-1].headers["authorization"] == f"Bearer {route}_key-0123456789"

    # and each thing was kept where the file says
    host = f"host=127.0.0.1 port={stack.ports['postgres']}"

    def asked(name, query):
        password = (stack.folder / "secrets" / f"database_{name}").read_text().strip()
        with psycopg.connect(f"{host} user={name} dbname={name} password={password}") as found:
            return found.execute(query).fetchone()[0]

    assert asked("mlflow", "SELECT count(*) FROM model_versions WHERE name = 'router'") == 2
    # the retraining, and a run for each router that it had trained
    assert asked("prefect", f"SELECT state_name FROM flow_run WHERE id = '{run['id']}'") == (
        "Completed"
    )
    deadline = time.monotonic() + 30
    while asked("routellm", "SELECT count(*) FROM feedback_decisions") == 0:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    kept = stack.s3.client().list_objects_v2(Bucket="artifacts")["KeyCount"]
    assert kept > 10
    keys = subprocess.run(
        ["redis-cli", "-p", str(stack.ports["redis"]), "--scan"], capture_output=True, text=True
    ).stdout
    assert "events" in keys, "events went around Redis"


def test_limits_hold_over_all_api_processes(stack):
    """With leases in Redis a slot that one process gave is taken for the other too."""
    with httpx.Client(base_url=stack.prefect, timeout=30) as client:
        made = client.post("/v2/concurrency_limits/", json={"name": "lines", "limit": 1})
        assert made.status_code == 201
    take = {"names": ["lines"], "slots": 1, "mode": "concurrency", "lease_duration": 60}
    answers = []
    for _ in range(8):  # connections of their own, which either process may take
        with httpx.Client(base_url=stack.prefect, timeout=30) as client:
            answers.append(
                client.post("/v2/concurrency_limits/increment-with-lease", json=take).status_code
            )
    assert sorted(answers) == [200, *[423] * 7]


def test_everything_ends_when_it_is_told_to(stack):
    took = stack.down()
    assert {"gateway", "worker-cpu", "watch", "mlflow", "prefect-server", "redis"} <= set(took)


def test_a_wrong_password_does_not_get_in(stack):
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(
            f"host=127.0.0.1 port={stack.ports['postgres']} user=mlflow dbname=mlflow password=no"
        )
    with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
        psycopg.connect(
            f"host=127.0.0.1 port={stack.ports['postgres']} user=mlflow dbname=prefect "
            f"password={json.dumps('database_mlflow-0123456789')[1:-1]}"
        )
