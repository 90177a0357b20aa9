"""The writer: off the request path, bounded, and nothing lost that need not be."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest

from routellm.feedback import schema
from routellm.feedback.errors import FeedbackError, FeedbackUnreachable
from routellm.feedback.store import FeedbackStore
from routellm.feedback.writer import Writer
from tests.conftest import REPOSITORY
from tests.feedback.records import decided, dueled, judged, rows
from tests.support.servers import free_port, postgres, postgres_programs


@contextmanager
def writing(store, **options):
    writer = Writer(store, **{"redact": str, "flush_s": 0.05, **options})
    writer.start()
    try:
        yield writer
    finally:
        writer.stop()


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.02)


def test_what_is_put_is_in_the_store_within_a_second(store):
    writer = Writer(store, redact=str)
    writer.start()
    began = time.monotonic()
    assert all(writer.put(r) for r in (decided(), judged("j1"), dueled()))
    until(lambda: writer.written == 3)
    assert time.monotonic() - began < 1.0
    writer.stop()
    assert store.count() == {"decisions": 1, "prompts": 1, "judgements": 1, "duels": 1}


def test_a_record_is_found_before_it_is_written(store):
    writer = Writer(store, flush_s=60.0)
    writer.start()
    writer.put(decided("waits"))
    assert writer.find("req-waits").id == "waits"
    assert writer.find("waits").user is writer.find("waits").prompt is None
    assert writer.find("unknown") is None
    writer.stop()
    assert writer.find("waits").route == "weak"


def test_stopping_writes_all_that_waits(store):
    writer = Writer(store, flush_s=60.0, redact=str)
    writer.start()
    for i in range(2500):
        assert writer.put(decided(str(i)))
    writer.stop()
    assert (writer.written, writer.dropped) == (2500, 0)
    assert store.count()["decisions"] == 2500
    assert not writer.put(decided("late"))
    assert writer.dropped == 1


def test_a_full_queue_drops_new_records_and_counts_them(store, monkeypatch):
    gate = threading.Event()
    append = store.append
    monkeypatch.setattr(store, "append", lambda records: gate.wait(30) and append(records))
    with writing(store, capacity=10, flush_s=0.01) as writer:
        began = time.monotonic()
        kept = [writer.put(decided(str(i))) for i in range(100)]
        assert time.monotonic() - began < 1.0
        assert kept == [True] * 10 + [False] * 90
        assert (writer.dropped, writer.waiting()) == (90, 10)
        gate.set()
        until(lambda: writer.written == 10)
        assert writer.put(decided("again"))


def test_putting_costs_a_request_microseconds(store):
    with writing(store, capacity=100_000, redact=None) as writer:
        one = decided()
        began = time.perf_counter()
        for _ in range(10_000):
            writer.put(one)
        assert (time.perf_counter() - began) / 10_000 < 100e-6


def test_a_record_that_the_store_refuses_costs_no_other(store, url, caplog):
    bad = decided("bad", probability=None, prompt="do not log me")
    with writing(store, flush_s=60.0) as writer:
        for record in (decided("a"), bad, decided("b"), judged("j1", of="b")):
            writer.put(record)
    assert (writer.written, writer.dropped) == (3, 1)
    assert {r["id"] for r in rows(url, "feedback_decisions")} == {"a", "b"}
    assert "refused a record (Decided)" in caplog.text
    assert "do not log me" not in caplog.text


def test_without_redaction_no_prompt_is_stored(store):
    with writing(store, redact=None) as writer:
        writer.put(decided())
    assert store.count()["decisions"] == 1
    assert store.count()["prompts"] == 0


def test_prompts_are_redacted_before_they_are_written(store, url):
    with writing(store, redact=lambda text: text.replace("sky", "<X>")) as writer:
        writer.put(decided())
    assert [r["prompt"] for r in rows(url, "feedback_prompts")] == ["Why is the <X> blue?"]


def test_a_prompt_that_cannot_be_redacted_or_is_too_long_is_not_stored(store, caplog):
    def fails(text):
        raise ValueError(text)

    with writing(store, redact=fails) as writer:
        writer.put(decided("a", prompt="do not log me"))
    assert writer.unredacted == 1
    with writing(store, most_prompt_chars=10) as writer:
        writer.put(decided("b", prompt="x" * 11))
        writer.put(decided("c", prompt="x" * 10))
    assert store.count() == {"decisions": 3, "prompts": 1, "judgements": 0, "duels": 0}
    assert "ValueError" in caplog.text
    assert "do not log me" not in caplog.text


def test_old_prompts_are_removed_at_the_start(store):
    old = datetime.now(UTC) - timedelta(days=31)
    store.append([decided("old", at=old), decided("new", at=datetime.now(UTC))])
    with writing(store, keep_days=30):
        until(lambda: store.count()["prompts"] == 1)
    assert store.count()["decisions"] == 2


def test_a_store_of_a_later_schema_is_said_at_the_start(store, monkeypatch, url):
    store.open()
    monkeypatch.setattr(schema, "STEPS", ())
    with pytest.raises(FeedbackError, match="a later version has used it"):
        Writer(FeedbackStore(url)).start()


@pytest.mark.skipif(postgres_programs() is None, reason="no PostgreSQL")
@pytest.mark.slow
def test_while_the_store_is_down_records_wait_and_none_is_lost(caplog):
    caplog.set_level(logging.WARNING)
    with postgres() as server:
        store = FeedbackStore(server.url)
        with writing(store, flush_s=0.1) as writer:
            writer.put(decided("before"))
            until(lambda: writer.written == 1)
            server.kill()
            for i in range(50):
                writer.put(decided(str(i)))
            until(lambda: writer.unwritten >= 3)
            assert (writer.waiting(), writer.dropped) == (50, 0)
            server.start()
            until(lambda: writer.written == 51)
            assert store.count()["decisions"] == 51
    assert caplog.text.count("records wait and are tried again") == 1
    assert "sky" not in caplog.text


def test_a_store_that_is_down_at_the_start_stops_neither_start_nor_end(caplog):
    store = FeedbackStore(f"postgresql://u:hunter2@127.0.0.1:{free_port()}/x")
    writer = Writer(store, flush_s=0.05)
    writer.start()
    for i in range(5):
        assert writer.put(decided(str(i)))
    until(lambda: writer.unwritten >= 2)
    began = time.monotonic()
    writer.stop(within_s=0.5)
    assert time.monotonic() - began < 5.0
    assert (writer.written, writer.dropped) == (0, 5)
    assert "5 feedback records were not written" in caplog.text
    assert "hunter2" not in caplog.text
    with pytest.raises(FeedbackUnreachable):
        store.count()


def started(url, who):
    # unbuffered: what is read ahead here would be missing below
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.feedback.writing_process", url, who],
        stdout=subprocess.PIPE, bufsize=0, cwd=REPOSITORY,
    )  # fmt: skip
    assert process.stdout.readline()
    return process


@pytest.mark.slow
def test_a_process_that_is_told_to_stop_loses_nothing(url):
    """Two of them, that write to one store."""
    processes = [started(url, who) for who in ("a", "b")]
    time.sleep(1.5)
    queued = 2  # the lines read above
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        *lines, last = process.communicate(timeout=60)[0].decode().splitlines()
        assert process.returncode == 0
        assert last == f"written {2 * (len(lines) + 1)} dropped 0"
        queued += len(lines)
    store = FeedbackStore(url)
    count = store.count()
    assert count["decisions"] == count["prompts"] == count["judgements"] == queued > 100
    assert {r["prompt"] for r in rows(url, "feedback_prompts")} == {"WHY IS THE SKY BLUE?"}
    assert store.outcomes_seen()["outcomes"] == queued


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.3, 1.15, 2.0])
def test_a_process_that_is_killed_loses_no_more_than_its_last_second(url, after_s):
    process = started(url, "k")
    time.sleep(after_s)
    process.kill()
    killed = time.time()
    told = process.communicate(timeout=60)[0].decode()
    lines = [line.split() for line in told.splitlines() if line.count(" ") == 1]
    store = FeedbackStore(url)
    kept = {r["id"] for r in rows(url, "feedback_decisions")}
    older = {name for name, at in lines if float(at) < killed - 1.0}
    assert older <= kept
    if after_s > 1.0:
        assert older
    count = store.count()  # whole: no half of a batch
    assert count["decisions"] == count["prompts"]
    store.append([decided("after")])
    assert store.find("after")
