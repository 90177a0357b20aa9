"""The soak's plan and its report; `docs/soak.md` has the log of a whole one."""

import pytest

from benchmarks.soak.plan import EACH, FAULTS, FIRST, arena, broken_file, file_of, plan
from benchmarks.soak.report import draw, summary
from routellm.errors import SourceError
from routellm.settings import IngestSettings
from routellm.sources.files import read_file


def test_a_plan_is_the_seeds_and_has_every_fault_and_every_battle_once():
    drops, faults = plan(60, 3)
    assert (drops, faults) == plan(60, 3)
    assert plan(60, 4) != (drops, faults)
    assert sorted({one.what for one in faults}) == sorted(FAULTS)
    assert {one.how for one in drops} == {"renamed", "slow", "half", "broken"}
    good = [one for one in drops if one.battles]
    assert good[0].battles == FIRST
    assert [one.start for one in good[1:]] == [FIRST + i * EACH for i in range(len(good) - 1)]
    assert all(0 <= one.at_s <= 60 * 58 for one in (*drops, *faults))


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
def test_each_file_holds_its_battles_and_a_broken_or_half_one_is_refused(tmp_path, ending):
    path = tmp_path / f"battles.{ending}"

    def read():
        tables = [list(batches) for _, batches in read_file(path, IngestSettings())]
        return {
            one for table in tables for batch in table for one in batch["battle_id"].to_pylist()
        }

    data = file_of(arena(1200, 0).slice(700, 500), path.name)
    path.write_bytes(data)
    assert len(read()) == 500
    if ending != "csv":  # of which a half may end with a row
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(SourceError):
            read()
        path.write_bytes(broken_file(path.name, 0))
        with pytest.raises(SourceError):
            read()


def test_a_log_becomes_tables_and_a_figure(tmp_path):
    run = {"event": "run", "id": "a", "run": "retrain", "seconds": 0.0, "message": ""}
    events = [
        {"t": 0.0, "event": "start", "seed": 0, "minutes": 6.0, "cores": 2},
        {"t": 5.0, "event": "file", "name": "a.csv", "how": "slow", "battles": 400},
        {"t": 9.0, "event": "snapshot", "digest": "d" * 9, "battles": 400, "files": {"a.csv": 4.0}},
        {"t": 10.0, **run, "state": "Running"},
        {"t": 60.0, "event": "version", "version": "1", "kind": "knn", "snapshot": "d" * 12},
        {"t": 61.0, "event": "aliases", "champion": "1"},
        {"t": 62.0, "event": "served", "version": "1"},
        {"t": 62.5, "event": "begin"},
        {"t": 70.0, "event": "fault", "n": 1, "what": "kill gateway", "pid": 1},
        {"t": 71.0, "event": "requests", "answered": 18, "failed": {"ConnectError": 2},
         "p50_ms": 20.0, "longest_ms": 90.0},
        {"t": 75.0, "event": "well", "n": 1, "what": "kill gateway", "after_s": 5.0},
        {"t": 80.0, **run, "state": "Completed", "seconds": 70.0},
        {"t": 81.0, "event": "memory", "mb": {"gateway": 500}, "disk_mb": 5.0, "free_mb": 9000},
        {"t": 90.0, "event": "end"},
        {"t": 95.0, "event": "check", "name": "all is well", "ok": False, "told": "it is not"},
    ]  # fmt: skip
    told = summary(events)
    assert "| all is well | **FAILS** | it is not |" in told
    assert "| kill gateway | 1 | 5 / 5 | 2 |" in told
    assert "| slow | 1 | 400 | 4 / 4 |" in told
    assert "   0:07  FAULT  1 kill gateway" in told
    draw(events, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").read_bytes()[:4] == b"\x89PNG"
