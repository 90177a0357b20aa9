"""The flows monitor and compact, and the watch on the inbox, on a real Prefect server."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pytest

from flows.engine import configure
from routellm.errors import UsageError
from routellm.feedback.store import FeedbackStore
from routellm.monitoring.report import read_report
from routellm.settings import Settings
from tests.conftest import REPOSITORY
from tests.feedback.records import decided
from tests.gateway.test_gateway import wait_for
from tests.support.bare import bare_registry, promote
from tests.support.prefect_server import client_of, prefect_server
from tests.support.versions import add_version
from tests.unit.test_retention import age

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A Prefect server; Prefect is configured before it is imported."""
    folder = tmp_path_factory.mktemp("server")
    configure(Settings(home=folder / "home"))
    with (
        prefect_server(folder / "prefect", tmp_path_factory) as running,
        client_of(running.url),
    ):
        yield running


def events(name):
    """Return the payloads of the events of a name that the server has, oldest first."""
    from prefect.client.orchestration import get_client
    from prefect.events.filters import EventFilter, EventNameFilter, EventOrder

    wanted = EventFilter(event=EventNameFilter(name=[name]), order=EventOrder.ASC)
    with get_client(sync_client=True) as client:
        return [one.payload for one in client.read_events(wanted, limit=50).events]


def arrived(name, n):
    """Wait until the server has so many events of a name, and return their payloads."""
    wait_for(lambda: len(events(name)) >= n, 60)  # it stores them a moment later
    return events(name)


def artifact(key):
    from prefect.artifacts import Artifact

    return Artifact.get(key=key)


@pytest.fixture
def home(server, tmp_path, monkeypatch):
    """An absolute home, as a worker's is."""
    monkeypatch.setenv("ROUTELLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ROUTELLM_GATEWAY__PORT", "9")
    return tmp_path / "home"


def test_what_changed_is_told_once_and_a_drift_asks_for_one_retraining(
    home, planted, encoder, monkeypatch
):
    from flows import monitor as flow

    monkeypatch.setenv("ROUTELLM_FEEDBACK__ENABLED", "true")
    registry = bare_registry(home)
    add_version(registry, planted, encoder, 1)
    promote(registry, "1")
    store = FeedbackStore(f"sqlite:///{home / 'feedback.db'}")
    one = decided(at=datetime.now(UTC) - timedelta(minutes=5), version="1", prompt=None)
    rates = np.random.default_rng(0).beta(9, 1, 600)  # a random router's are spread evenly
    store.append([replace(one, id=str(i), uid=f"u{i}", win_rate=r) for i, r in enumerate(rates)])
    store.close()

    state = flow.monitor(return_state=True)
    assert state.is_completed()
    assert state.message == "fail: drift_win_rate"
    (told,) = arrived("routellm.monitor.drift_win_rate", 1)
    assert (told["was"], told["outcome"], told["champion"]) == (None, "fail", "1")
    (wanted,) = arrived(flow.WANTED, 1)
    assert wanted["reason"] == "drift"
    assert wanted["numbers"]["drift_win_rate"] > 0.25
    assert "600 decisions" in wanted["why"]
    rows = json.loads(artifact("monitor").data)
    assert {row["name"]: row["outcome"] for row in rows}["drift_win_rate"] == "fail"
    assert artifact("monitor-summary").data.startswith("**1 fail, ")
    assert read_report(home).asked_for == "1"

    flow.monitor()  # nothing has changed

    # killed after it told, and before it could remember: it tells once more, never too little
    def killed(report, home):
        raise KeyboardInterrupt

    (home / "monitor.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(flow, "write_report", killed)
        with pytest.raises(KeyboardInterrupt):
            flow.monitor()
    flow.monitor()
    assert len(arrived(flow.WANTED, 3)) == 3
    assert len(arrived("routellm.monitor.drift_win_rate", 3)) == 3
    assert read_report(home).asked_for == "1"


def test_compact_says_what_goes_and_removes_it(home):
    from flows.compact import compact

    bare_registry(home, 1)
    left = home / "trained" / "key"
    left.mkdir(parents=True)
    (left / "report.json").write_text("{}")
    age(left, 30)
    state = compact(return_state=True)
    assert state.message == "1 removed, 0 versions among them"
    assert not left.exists()
    (row,) = json.loads(artifact("compaction").data)
    assert (row["what"], row["which"], row["bytes"]) == ("leftover", "trained/key", 2)


def test_a_watch_without_a_server_to_tell_is_refused(server):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.send import server_url

    with (
        temporary_settings({PREFECT_API_URL: None}),
        pytest.raises(UsageError, match="set PREFECT_API_URL"),
    ):
        server_url()


@pytest.fixture
def watching(server, home):
    """The verb `watch` at work; `read` returns what it has said."""
    said = home.parent / "said"
    with said.open("w") as stdout:
        process = subprocess.Popen(
            [sys.executable, "-m", "routellm.cli", "watch", "--json"],
            stdout=stdout, cwd=home.parent,
            env={**os.environ, "PREFECT_API_URL": server.url, "ROUTELLM_INBOX_SETTLE_S": "0.3",
                 "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip

    def read():
        whole = said.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    wait_for(read, 60)
    yield SimpleNamespace(process=process, read=read, inbox=home / "inbox")
    process.kill()
    process.wait()


def test_files_that_arrive_are_told_of_also_where_the_server_was_away(server, watching):
    """The last of the file: it stops the server."""
    from flows.watch import ARRIVED

    watching.inbox.joinpath("first.csv").write_text("a")
    watching.inbox.joinpath("first.csv.part").write_text("a")
    assert arrived(ARRIVED, 1)[0] == {
        "files": [{"name": "first.csv", "bytes": 1}], "count": 1, "bytes": 1
    }  # fmt: skip

    server.kill()
    watching.inbox.joinpath("second.csv").write_text("ab")
    wait_for(lambda: any("said" in line for line in watching.read()), 60)
    watching.inbox.joinpath("third.csv").write_text("abc")
    time.sleep(3)  # it has tried again, and does not say so again
    assert sum("said" in line for line in watching.read()) == 1
    assert "trying on" in watching.read()[-1]["said"]
    server.start()
    names = {one["name"] for payload in arrived(ARRIVED, 2)[1:] for one in payload["files"]}
    assert names == {"second.csv", "third.csv"}
    wait_for(lambda: watching.read()[-1] == {"said": "it works again"}, 30)

    # a frozen server: a try is under way, and SIGTERM does not wait for it
    watching.inbox.joinpath("fourth.csv").write_text("abcd")
    os.killpg(server._process.pid, signal.SIGSTOP)
    time.sleep(2)
    began = time.monotonic()
    watching.process.send_signal(signal.SIGTERM)
    assert watching.process.wait(20) == 0
    assert time.monotonic() - began < 5.0  # a try waits for half a minute
