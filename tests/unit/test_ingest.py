import json
import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from routellm.errors import SnapshotError, SourceError
from routellm.ingest import stage
from routellm.settings import IngestSettings, Settings
from routellm.snapshots import SnapshotStore
from tests.support.hub import COMMIT, hub
from tests.unit.test_sources import ALPACA, write_lines


def commit(staged, store):
    manifest = store.commit(
        parts=staged.parts, cursors=staged.cursors, previous=staged.previous,
        quarantined_by_rule={}, validation={"passed": True}, simulated=staged.simulated,
    )  # fmt: skip
    staged.discard()
    return manifest


def ingest(settings, *sources):
    store = SnapshotStore(settings.snapshots_dir())
    return commit(stage(sources, store, settings), store), store


def rows(n, start=0):
    return [ALPACA | {"prompt": f"prompt {i}"} for i in range(start, start + n)]


def test_duplicates_are_one_battle(tmp_path, settings):
    manifest, _ = ingest(settings, str(write_lines(tmp_path / "a.jsonl", rows(5) + rows(5))))
    assert manifest.rows == 5


def test_a_second_ingest_reads_nothing_and_a_grown_file_adds_what_is_new(tmp_path, settings):
    path = write_lines(tmp_path / "a.jsonl", rows(5))
    first, store = ingest(settings, str(path))
    again = stage([str(path)], store, settings)
    assert (again.read, again.new, again.unchanged) == (0, 0, (str(path.resolve()),))
    write_lines(path, rows(8))
    grown = stage([str(path)], store, settings)
    assert (grown.new, grown.duplicates) == (3, 5)
    second = commit(grown, store)
    assert second.rows == 8
    assert second.previous == first.digest
    assert store.get(first.digest[:10]).rows == 5  # the old one is still whole
    store.verify(store.get(first.digest))


def test_the_digest_is_of_the_battles_not_of_how_they_came(tmp_path, settings):
    one, _ = ingest(settings, str(write_lines(tmp_path / "a.jsonl", rows(6))))
    other = Settings(home=tmp_path / "other", ingest=IngestSettings(batch_rows=2))
    write_lines(tmp_path / "b.jsonl", rows(4, 2))
    two, _ = ingest(
        other, str(write_lines(tmp_path / "c.jsonl", rows(3))), str(tmp_path / "b.jsonl")
    )
    assert one.digest == two.digest
    assert len(two.parts) > len(one.parts)


def test_a_damaged_part_is_found(tmp_path, settings):
    manifest, store = ingest(settings, str(write_lines(tmp_path / "a.jsonl", rows(5))))
    part = store.parts_dir / manifest.parts[0].name
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(SnapshotError, match="damaged"):
        store.verify(manifest)


def test_the_slower_of_two_ingests_is_told_to_run_again(tmp_path, settings):
    store = SnapshotStore(settings.snapshots_dir())
    one = stage([str(write_lines(tmp_path / "a.jsonl", rows(3)))], store, settings)
    two = stage([str(write_lines(tmp_path / "b.jsonl", rows(3, 3)))], store, settings)
    first = commit(one, store)
    with pytest.raises(SnapshotError, match="run the ingest again"):
        commit(two, store)
    assert store.latest() == first


def test_a_bad_source_leaves_nothing_behind(tmp_path, settings):
    store = SnapshotStore(settings.snapshots_dir())
    good = write_lines(tmp_path / "a.jsonl", rows(3))
    bad = tmp_path / "b.jsonl"
    bad.write_text("{nope\n")
    with pytest.raises(SourceError):
        stage([str(good), str(bad)], store, settings)
    assert store.latest() is None
    assert not list(store.staging_dir.iterdir())


INGEST = """
import sys
from routellm.settings import Settings
from tests.unit.test_ingest import ingest
{before}
print(ingest(Settings(home=sys.argv[1]), sys.argv[2])[0].digest)
"""


def run(code, *args):
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip


@pytest.mark.slow
def test_a_kill_anywhere_leaves_the_previous_snapshot_and_a_rerun_finishes(tmp_path, settings):
    first, store = ingest(settings, str(write_lines(tmp_path / "a.jsonl", rows(10))))
    grown = write_lines(tmp_path / "a.jsonl", rows(60_000))
    for delay in (0.6, 0.9, 1.2, 1.5, 1.8):
        process = run(INGEST.format(before=""), settings.home, grown)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        latest = store.latest()
        assert latest.rows in (10, 60_000)
        store.verify(latest)
    final, _ = ingest(settings, str(grown))
    assert final.rows == 60_000
    assert first.digest in {m.digest for m in store.all()}


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_publishes_nothing(tmp_path, settings):
    first, store = ingest(settings, str(write_lines(tmp_path / "a.jsonl", rows(10))))
    big = write_lines(tmp_path / "a.jsonl", rows(20_000))
    limit = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    )
    process = run(INGEST.format(before=limit), settings.home, big)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "SnapshotError" in err.splitlines()[-1]
    assert "cannot write" in err
    assert store.latest() == first
    assert not list(store.staging_dir.iterdir())


def test_a_hub_dataset_is_read_at_its_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    body = "".join(json.dumps(r) + "\n" for r in rows(4)).encode()
    with hub("org/battles", {"data/train.jsonl": body, "README.md": b"# hi"}) as (url, asked):
        settings = Settings(home=tmp_path / "home", ingest=IngestSettings(hub_endpoint=url))
        manifest, store = ingest(settings, "org/battles")
        assert manifest.rows == 4
        assert manifest.cursors == {"hf://org/battles": {"revision": COMMIT}}
        before = len(asked)
        again = stage(["hf://org/battles"], store, settings)
        assert again.new == 0
        assert not any("resolve" in path for path in asked[before:])  # nothing fetched again


def test_a_hub_that_is_away_or_refuses_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    store = SnapshotStore(tmp_path / "s")
    away = Settings(ingest=IngestSettings(hub_endpoint="http://127.0.0.1:9"))
    with pytest.raises(SourceError, match="check the network"):
        stage(["org/battles"], store, away)
    with hub("org/battles", {}) as (url, _):
        there = Settings(ingest=IngestSettings(hub_endpoint=url))
        with pytest.raises(SourceError, match="hub refuses hf://org/other"):
            stage(["org/other"], store, there)


def test_real_tables_ingest_whole(real_data, settings):
    store = SnapshotStore(settings.snapshots_dir())
    staged = stage([str(real_data / "mmlu.parquet")], store, settings)
    assert staged.read == 1522
    assert sum(pq.ParquetFile(p).metadata.num_rows for p in staged.parts) == staged.new
