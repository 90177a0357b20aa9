"""What compaction takes from the snapshot store and from the home, and what it never takes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from routellm import retention
from routellm.errors import SnapshotError
from routellm.ingest import stage
from routellm.settings import RetentionSettings, Settings
from routellm.snapshots import SnapshotStore, write_atomic
from tests.conftest import REPOSITORY
from tests.unit.test_ingest import commit, rows
from tests.unit.test_sources import write_lines

NOW = datetime.now(UTC)


def keeping(settings, **how):
    return settings.model_copy(update={"retention": RetentionSettings(**how)})


def grown(settings, folder, n):
    """Publish n snapshots, each with ten battles more; returns the store and them, oldest first."""
    store = SnapshotStore(settings.snapshots_dir())
    return store, [one_more(settings, store, folder, i) for i in range(n)]


def one_more(settings, store, folder, i):
    path = str(write_lines(folder / f"{i}.jsonl", rows(10, 10 * i)))
    return commit(stage([path], store, settings), store)


def aged(store, manifest, days):
    """Make a snapshot older than it is."""
    created = (NOW - timedelta(days=days)).isoformat(timespec="seconds")
    older = replace(manifest, created_at=created)
    write_atomic(store.directory / f"{manifest.digest}.json", older.to_json())
    return older


def aside(store, folder, i):
    """Publish a snapshot with a part of its own beside the newest, as one of an earlier time is."""
    one = SnapshotStore(folder / f"aside-{i}")
    made = one_more(Settings(home=folder / f"home-{i}"), one, folder, 1000 + i)
    (part,) = made.parts
    store.parts_dir.mkdir(parents=True, exist_ok=True)
    (one.parts_dir / part.name).rename(store.parts_dir / part.name)
    write_atomic(store.directory / f"{made.digest}.json", made.to_json())
    return made


def compact(store, settings, named=None, now=NOW):
    store.remove({r.name for r in retention.plan_snapshots(store, named or {}, settings, now)})


def whole(store):
    """Every snapshot that is there has all of its parts, and no part is there for nothing."""
    for manifest in store.all():
        store.verify(manifest)
    assert store.only_in(set()) == {}
    return {m.digest for m in store.all()}


def test_the_newest_the_young_and_the_named_stay_and_the_others_go(settings, tmp_path):
    settings = keeping(settings, snapshots=2, snapshot_days=30)
    store, made = grown(settings, tmp_path, 6)
    for manifest, days in zip(made, (90, 80, 70, 60, 50, 40), strict=True):
        aged(store, manifest, days)
    aged(store, made[2], 29)  # as a snapshot of what was known earlier would be
    named = {made[0].digest: "version 3"}
    planned = retention.plan_snapshots(store, named, settings, NOW)
    assert [(one.what, one.name) for one in planned] == [
        ("snapshot", made[1].digest), ("snapshot", made[3].digest)
    ]  # fmt: skip
    assert whole(store) == {m.digest for m in made}  # planning removes nothing
    compact(store, settings, named)
    assert whole(store) == {made[i].digest for i in (0, 2, 4, 5)}
    assert store.latest() == replace(made[5], created_at=store.latest().created_at)
    assert store.read(store.latest()).num_rows == 60


def test_the_newest_snapshot_is_not_removed_even_when_asked_to(settings, tmp_path):
    store, made = grown(settings, tmp_path, 2)
    store.remove({m.digest for m in made})
    assert whole(store) == {made[1].digest}


def test_when_a_part_was_taken_in_is_known_after_its_first_snapshot_is_gone(settings, tmp_path):
    settings = keeping(settings, snapshots=1)
    store, made = grown(settings, tmp_path, 3)
    made = [aged(store, m, days) for m, days in zip(made, (70, 60, 50), strict=True)]
    before = store.taken_in()
    assert [before[p.name] for p in made[2].parts] == [m.created_at for m in made]
    compact(store, settings)
    assert len(store.all()) == 1
    assert store.taken_in() == before
    one_more(settings, store, tmp_path, 9)
    assert before.items() < store.taken_in().items()


def test_parts_of_a_publish_that_was_killed_go_and_a_damaged_manifest_stops_it(settings, tmp_path):
    store, made = grown(settings, tmp_path, 2)
    orphan = store.parts_dir / ("f" * 32 + ".parquet")
    orphan.write_bytes(b"left")
    (planned,) = retention.plan_snapshots(store, {}, settings, NOW)
    assert (planned.what, planned.name, planned.size_bytes) == ("part", orphan.name, 4)
    (store.directory / f"{made[0].digest}.json").write_text("{")
    with pytest.raises(SnapshotError, match="cannot be read"):
        store.remove(set())
    assert orphan.exists()


def test_a_compaction_waits_for_a_publish_and_takes_none_of_its_parts(
    settings, tmp_path, monkeypatch
):
    settings = keeping(settings, snapshots=1)
    store, made = grown(settings, tmp_path, 2)
    aged(store, made[0], 90)
    staged = stage([str(write_lines(tmp_path / "n.jsonl", rows(5, 100)))], store, settings)
    copied, go_on = threading.Event(), threading.Event()
    build = SnapshotStore._build

    def slow(*args):
        built = build(*args)  # the parts are there, and no manifest names them
        copied.set()
        assert go_on.wait(30)
        return built

    monkeypatch.setattr(SnapshotStore, "_build", slow)
    publish = threading.Thread(target=commit, args=(staged, store))
    publish.start()
    assert copied.wait(30)
    removal = threading.Thread(target=compact, args=(SnapshotStore(store.directory), settings))
    removal.start()
    time.sleep(0.2)
    assert removal.is_alive()
    go_on.set()
    publish.join(30)
    removal.join(30)
    assert store.latest().rows == 25
    assert made[0].digest not in whole(store)


@given(st.data())
@hypothesis_settings(max_examples=30)
def test_no_sequence_of_ingests_promotions_compactions_and_kills_loses_a_needed_part(
    tmp_path_factory, data
):
    folder = tmp_path_factory.mktemp("sequence")
    settings = Settings(
        home=folder / "home", retention={"snapshots": data.draw(st.integers(1, 3), "keep")}
    )
    store = SnapshotStore(settings.snapshots_dir())
    named, battles = {}, 0
    steps = st.sampled_from(["ingest", "ingest", "aside", "promote", "compact", "kill"])
    for i, step in enumerate(data.draw(st.lists(steps, max_size=10), "steps")):
        if step == "ingest":
            one_more(settings, store, folder, battles // 10)
            battles += 10
        elif step == "aside":
            aside(store, folder, i)
        elif step == "promote" and store.all():
            chosen = data.draw(st.sampled_from(store.all()), "champion").digest
            named = {chosen: "champion"} | dict(list(named.items())[:1])  # and previous
        elif step in ("compact", "kill"):
            later = NOW + timedelta(days=data.draw(st.sampled_from([0, 40]), "days later"))
            removals = retention.plan_snapshots(store, named, settings, later)
            going = {one.name for one in removals}
            if step == "kill":
                unlinks = data.draw(st.integers(0, 6), "killed after")
                _killed_removal(store.directory, going, unlinks)
            else:
                store.remove(going)
                whole(store)
        for manifest in store.all():
            store.verify(manifest)
        assert set(named) <= {m.digest for m in store.all()}
        latest = store.latest()
        assert (latest.rows if latest else 0) == battles
        assert len(store.ids(latest) if latest else ()) == battles


def test_killed_before_any_file_that_it_removes_it_leaves_only_whole_snapshots(settings, tmp_path):
    store, _ = grown(settings, tmp_path, 2)
    later = NOW + timedelta(days=40)
    for killed_after in range(7):
        for i in range(2):
            aside(store, tmp_path, 10 * killed_after + i)
        going = {r.name for r in retention.plan_snapshots(store, {}, settings, later)}
        assert len(going) >= 4  # two snapshots, and their parts
        _killed_removal(store.directory, going, killed_after)
        for manifest in store.all():
            store.verify(manifest)
        compact(store, settings, now=later)
        assert len(whole(store)) == 2


def _killed_removal(directory, going, unlinks):
    """Remove snapshots in a fork that is killed (-9) before it removes another file."""
    child = os.fork()
    if not child:
        left, unlink = unlinks, os.unlink

        def dying(*args, **kwargs):
            nonlocal left
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return unlink(*args, **kwargs)

        os.unlink = dying
        SnapshotStore(directory).remove(going)
        os._exit(0)
    os.waitpid(child, 0)


def age(path, days):
    when = NOW.timestamp() - 86_400 * days
    for one in (path, *path.rglob("*")) if path.is_dir() else (path,):
        os.utime(one, (when, when))


def test_old_leftovers_go_and_what_somebody_may_come_back_for_stays(settings):
    settings = keeping(settings, leftover_days=7, quarantine_days=90)
    home = settings.home
    files = {
        "trained/old/bundle/router.json": 8,
        "trained/resumed/report.json": 8,
        "trained/young/report.json": 6,
        "quarantine/old.parquet": 91,
        "quarantine/young.parquet": 89,
        "snapshots/staging/old/part-00000.parquet": 8,
        "snapshots-simulated/staging/young/part-00000.parquet": 1,
        "gateway/version-1/router.json": 30,
        "gateway/version-2/router.json": 30,
        f".monitor.json.{'a' * 32}": 8,
        "embeddings.db": 400,
        "feedback.db": 400,
        "history.jsonl": 400,
    }
    for name in files:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("x")
    for name, days in files.items():
        top = home / "/".join(name.split("/")[: 3 if "staging" in name else 2])
        age(top, days)
    (home / "trained/resumed/checkpoint").write_text("a second ago")
    (home / "gateway/last_good.json").write_text(json.dumps({"model": "router", "version": "2"}))
    planned = retention.plan_leftovers(settings, NOW)
    assert {one.name for one in planned} == {
        "trained/old", "quarantine/old.parquet", "snapshots/staging/old", "gateway/version-1",
        f".monitor.json.{'a' * 32}",
    }  # fmt: skip
    assert "8 days ago" in next(one.why for one in planned if one.name == "trained/old")
    (home / "trained/old/again").write_text("somebody came back after the plan")
    retention.remove_leftovers(planned, settings, NOW)
    gone = {"quarantine/old.parquet", "gateway/version-1/router.json",
            "snapshots/staging/old/part-00000.parquet", f".monitor.json.{'a' * 32}"}  # fmt: skip
    assert {name for name in files if not (home / name).exists()} == gone


def test_a_folder_is_gone_whole_or_not_at_all(settings, tmp_path):
    """A half-removed bundle would be taken for a trained router."""
    trained = settings.home / "trained" / "key"
    (trained / "bundle").mkdir(parents=True)
    (trained / "bundle" / "router.json").write_text("x")
    age(settings.home / "trained", 30)
    code = (
        "import os, shutil, signal, sys\n"
        "from datetime import UTC, datetime\n"
        "from routellm import retention\n"
        "from routellm.settings import Settings\n"
        "shutil.rmtree = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        "s, now = Settings(home=sys.argv[1]), datetime.now(UTC)\n"
        "retention.remove_leftovers(retention.plan_leftovers(s, now), s, now)\n"
    )
    program = [sys.executable, "-c", code, str(settings.home)]
    killed = subprocess.run(program, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not trained.exists()
    (left,) = (settings.home / "trained").iterdir()
    assert left.name.startswith(".key.")
    age(left, 8)
    planned = retention.plan_leftovers(settings, NOW)
    retention.remove_leftovers(planned, settings, NOW)
    assert not list((settings.home / "trained").iterdir())
