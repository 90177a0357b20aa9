"""Several programs run as one, with real processes."""

import json
import os
import signal
import ssl
import subprocess
import sys
import time

import psutil
import pytest

from routellm.errors import UsageError
from routellm.supervise import Part, Supervisor, answers, end_leftovers, ends_within, recorded
from tests.support.servers import free_port

SLEEP = (sys.executable, "-c", "import time; time.sleep(600)")


def tick_until(supervisor, condition, within_s=30.0):
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, {n: p.state for n, p in supervisor.parts.items()}
        supervisor.tick()
        time.sleep(0.02)


@pytest.fixture
def run(tmp_path):
    made = []

    def start(*parts):
        supervisor = Supervisor(parts, tmp_path / "home")
        supervisor.start()
        made.append(supervisor)
        return supervisor

    yield start
    for supervisor in made:
        supervisor.stop()


def states(supervisor):
    return {name: one.state for name, one in supervisor.parts.items()}


def test_a_part_starts_when_those_it_needs_answer(run, tmp_path):
    port, gate = free_port(), tmp_path / "gate"
    slow = (
        "import http.server, pathlib, time\n"
        f"while not pathlib.Path({str(gate)!r}).exists(): time.sleep(0.02)\n"
        f"http.server.HTTPServer(('127.0.0.1', {port}), http.server.SimpleHTTPRequestHandler)"
        ".serve_forever()\n"
    )
    supervisor = run(
        Part("server", (sys.executable, "-c", slow), ready=f"http://127.0.0.1:{port}/"),
        Part("needs", SLEEP, after=("server",)),
    )
    tick_until(supervisor, lambda: supervisor.parts["server"].state == "starting")
    assert states(supervisor)["needs"] == "waiting"
    gate.touch()
    tick_until(supervisor, lambda: states(supervisor) == {"server": "running", "needs": "running"})


def test_what_runs_once_is_tried_until_it_ends_well(run, tmp_path):
    count = tmp_path / "count"
    code = (
        "import pathlib, sys\n"
        f"p = pathlib.Path({str(count)!r}); n = int(p.read_text()) if p.exists() else 0\n"
        "p.write_text(str(n + 1)); sys.exit(0 if n == 1 else 3)\n"
    )
    supervisor = run(
        Part("once", (sys.executable, "-c", code), once=True), Part("then", SLEEP, after=("once",))
    )
    tick_until(supervisor, lambda: supervisor.parts["once"].state == "ended")
    assert supervisor.parts["once"].last_status == 3
    assert states(supervisor)["then"] == "waiting"
    tick_until(supervisor, lambda: states(supervisor) == {"once": "done", "then": "running"})
    assert count.read_text() == "2"


def test_a_part_that_is_killed_is_started_again_after_a_growing_wait(run):
    supervisor = run(Part("one", SLEEP))
    one = supervisor.parts["one"]
    for starts in (1, 2):
        tick_until(supervisor, lambda starts=starts: one.process is not None)
        assert one.starts == starts
        os.kill(one.process.pid, signal.SIGKILL)
        one.process.wait()
        supervisor.tick()
        assert one.state == "ended"
        assert one.start_at - time.monotonic() == pytest.approx(2.0 ** (starts - 1), abs=0.5)


def test_a_folder_has_one_supervisor(run, tmp_path):
    run(Part("one", SLEEP))
    with pytest.raises(UsageError, match="routellm down"):
        Supervisor([Part("one", SLEEP)], tmp_path / "home").start()


def test_stopping_ends_the_last_first_and_what_parts_started_too(run, tmp_path):
    parent = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(600)"
    supervisor = run(Part("first", SLEEP), Part("parent", (sys.executable, "-c", parent, *SLEEP)))
    tick_until(supervisor, lambda: set(states(supervisor).values()) == {"running"})
    process = psutil.Process(supervisor.parts["parent"].process.pid)
    tick_until(supervisor, lambda: process.children())
    family = [process, *process.children()]
    order = []
    assert supervisor.stop(order.append) == []
    assert order == ["parent", "first"]
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    assert not (tmp_path / "home" / "up.json").exists()


def test_what_does_not_end_in_time_is_killed_and_named(run):
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('deaf', flush=True); time.sleep(600)"
    )
    supervisor = run(Part("deaf", (sys.executable, "-c", code), stop_s=0.2))
    log = supervisor.log("deaf")
    tick_until(supervisor, lambda: log.exists() and "deaf" in log.read_text())
    assert supervisor.stop() == ["deaf"]


def test_what_a_killed_supervisor_left_is_ended_and_nobody_elses_process_is(tmp_path):
    home = tmp_path / "home"
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from routellm.supervise import Part, Supervisor\n"
        f"s = Supervisor([Part('one', {SLEEP!r}), Part('two', {SLEEP!r})], Path({str(home)!r}))\n"
        "s.start()\n"
        "s.tick()\n"
        "print('up', flush=True)\n"
        "time.sleep(600)\n"
    )
    up = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert up.stdout.readline() == "up\n"
    left = recorded(home)
    assert set(left) == {"supervisor", "one", "two"}
    up.kill()
    up.wait()
    stranger = subprocess.Popen(SLEEP)
    try:
        entries = json.loads((home / "up.json").read_text())
        # a process that has the number of a part which is gone, but was made at another time
        entries.append({"name": "three", "pid": stranger.pid, "created": entries[0]["created"]})
        entries[-1]["created"] -= 1000
        (home / "up.json").write_text(json.dumps(entries))
        assert sorted(end_leftovers(home)) == ["one", "two"]
        psutil.wait_procs([left["one"], left["two"]], timeout=10)
        assert not recorded(home)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_process_that_nobody_asks_after_has_ended():
    child = subprocess.Popen([sys.executable, "-c", ""])
    try:
        assert ends_within(psutil.Process(child.pid), 30)
        assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE
        assert not ends_within(psutil.Process(), 0.1)
    finally:
        child.wait()


def test_certificates_are_not_read_anew_for_each_look_at_an_address(monkeypatch):
    nobody = f"http://127.0.0.1:{free_port()}/"
    assert not answers(nobody)
    monkeypatch.setattr(ssl, "create_default_context", None)
    assert not answers(nobody)
