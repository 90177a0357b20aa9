"""The inbox: which of its files are read, and what takes its place beside the other sources."""

import json
import os
import time
from pathlib import Path

import pytest

from routellm.errors import SourceError, SourceUnreachable
from routellm.ingest import stage
from routellm.settings import Settings
from routellm.snapshots import SnapshotStore
from routellm.sources import files as files_module
from routellm.sources import open_source
from routellm.sources.inbox import InboxSource, dropped, settled, sources_now, unreadable
from tests.unit.test_ingest import commit, rows
from tests.unit.test_sources import write_lines


@pytest.fixture
def settings(tmp_path):
    made = Settings(home=tmp_path / "home", inbox_settle_s=0.15)
    made.inbox_dir.mkdir(parents=True)
    return made


def drop(settings, name, n=3, start=0, *, wait=True):
    path = write_lines(settings.inbox_dir / name, rows(n, start))
    if wait:
        time.sleep(0.2)
    return path


def ingest(settings, *names):
    simulated = all(name.startswith("simulated://") for name in names)
    store = SnapshotStore(settings.snapshots_dir(simulated=simulated))
    staged = stage(names, store, settings)
    return commit(staged, store) if staged.new else staged.previous


def test_hidden_files_and_those_still_being_written_are_not_read(settings):
    for name in ("a.jsonl", ".b.jsonl", "c.jsonl.part", "d.jsonl.tmp", "notes.txt"):
        drop(settings, name, wait=False)
    (settings.inbox_dir / "folder.jsonl").mkdir()
    assert [one.name for one in dropped(settings.inbox_dir)] == ["a.jsonl"]
    assert settled(settings) == []
    time.sleep(0.2)
    assert [one.name for one in settled(settings)] == ["a.jsonl"]
    with (settings.inbox_dir / "a.jsonl").open("a") as file:
        file.write("\n")
    assert settled(settings) == []


def test_a_file_with_an_old_time_is_new_where_it_was_just_put(settings):
    path = drop(settings, "a.jsonl", wait=False)
    os.utime(path, (1e9, 1e9))  # as `cp -p` and `mv` leave it
    assert settled(settings) == []
    os.utime(path, (4e9, 4e9))  # nor does one of the future wait for it
    time.sleep(0.2)
    assert len(settled(settings)) == 1


def test_a_file_that_is_written_slowly_is_read_once_it_is_whole(settings):
    drop(settings, "a.jsonl", 4)
    text = "".join(json.dumps(row) + "\n" for row in rows(6, 100))
    with (settings.inbox_dir / "slow.jsonl").open("w") as file:
        file.write(text[: len(text) // 2])
        file.flush()
        assert ingest(settings, str(settings.inbox_dir)).rows == 4
        file.write(text[len(text) // 2 :])
    time.sleep(0.2)
    assert ingest(settings, str(settings.inbox_dir)).rows == 10


def test_each_file_is_read_once_and_what_is_dropped_later_is_added(settings):
    drop(settings, "a.jsonl", 3)
    inbox = str(settings.inbox_dir)
    assert ingest(settings, inbox).rows == 3
    store = SnapshotStore(settings.snapshots_dir())
    assert stage([inbox], store, settings).unchanged == (str(settings.inbox_dir.resolve()),)
    drop(settings, "b.jsonl", 2, 50)
    staged = stage([inbox], store, settings)
    assert (staged.read, staged.new) == (2, 2)  # the first file is not read again


def test_an_empty_inbox_is_nothing_wrong_and_a_missing_one_is_said(settings):
    assert list(InboxSource(settings).batches(None)) == []
    settings.inbox_dir.rmdir()
    with pytest.raises(SourceError, match=r"inbox .* is not there: make it"):
        open_source(str(settings.inbox_dir), settings)


def test_the_inbox_takes_the_place_of_simulated_sources_and_keeps_it(settings):
    simulated = ("simulated://arena",)
    assert sources_now(settings) == simulated
    path = drop(settings, "a.jsonl", wait=False)
    assert sources_now(settings) == simulated  # nobody knows yet that it is whole
    time.sleep(0.2)
    assert sources_now(settings) == (str(settings.inbox_dir),)
    ingest(settings, *sources_now(settings))
    path.unlink()
    # its battles are in a snapshot: simulated ones are not trained on because it was emptied
    assert sources_now(settings) == (str(settings.inbox_dir),)
    assert ingest(settings, *sources_now(settings)).rows == 3


def test_the_inbox_stands_beside_real_sources_and_is_named_once(settings, tmp_path):
    real = str(write_lines(tmp_path / "real.jsonl", rows(2, 900)))
    both = settings.model_copy(update={"sources": (real,)})
    assert sources_now(both) == (real,)
    drop(settings, "a.jsonl")
    assert sources_now(both) == (real, str(settings.inbox_dir))
    assert ingest(settings, *sources_now(both)).rows == 5
    named = settings.model_copy(update={"sources": (real, f"{settings.inbox_dir}/")})
    assert sources_now(named) == named.sources


def test_another_folder_can_be_the_inbox(tmp_path):
    elsewhere = Settings(home=tmp_path / "home", inbox=tmp_path / "drop", inbox_settle_s=0)
    elsewhere.inbox_dir.mkdir()
    write_lines(tmp_path / "drop" / "a.jsonl", rows(1))
    assert sources_now(elsewhere) == (str(tmp_path / "drop"),)
    assert isinstance(open_source(str(tmp_path / "drop"), elsewhere), InboxSource)
    assert Settings().inbox_dir == Path(".routellm/inbox")


def staged_of(settings):
    return stage([str(settings.inbox_dir)], SnapshotStore(settings.snapshots_dir()), settings)


def test_a_file_that_cannot_be_read_holds_back_no_other_and_says_why_beside_it(settings):
    drop(settings, "a.jsonl", 3)
    bad = drop(settings, "b.jsonl", 2, 50)
    bad.write_text(bad.read_text() + '{"prompt": "cut sh')  # its first rows are good
    (settings.inbox_dir / "c.parquet").write_bytes(b"no parquet")
    drop(settings, "d.jsonl", 1, 90)
    staged = staged_of(settings)
    assert (staged.read, staged.new) == (4, 4)  # nothing of a file whose end cannot be read
    assert [Path(why.split(" ")[0]).name for why in staged.passed_over] == ["b.jsonl", "c.parquet"]
    assert "b.jsonl line 3 is not JSON" in staged.passed_over[0]
    note = settings.inbox_dir / "b.jsonl.why.txt"
    assert note.read_text().strip() == staged.passed_over[0]
    assert unreadable(settings.inbox_dir) == dict(
        zip(("b.jsonl", "c.parquet"), staged.passed_over, strict=True)
    )
    assert {one.name for one in dropped(settings.inbox_dir)} == {
        "a.jsonl", "b.jsonl", "c.parquet", "d.jsonl",
    }  # fmt: skip

    store = SnapshotStore(settings.snapshots_dir())
    assert commit(staged, store).rows == 4
    again = staged_of(settings)  # tried again, and the others are not read again
    assert (again.read, len(again.passed_over)) == (0, 2)
    write_lines(bad, rows(3, 50))
    (settings.inbox_dir / "c.parquet").unlink()
    time.sleep(0.2)
    mended = staged_of(settings)
    assert (mended.new, mended.passed_over) == (3, ())
    assert not list(settings.inbox_dir.glob("*.why.txt"))
    assert commit(mended, store).rows == 7


def test_a_note_that_cannot_be_written_and_a_file_without_rights_stop_nothing(
    settings, monkeypatch
):
    drop(settings, "a.jsonl", 3)
    drop(settings, "b.jsonl", 3, 50)
    digest = files_module.file_sha256

    def refused(path):
        if path.name == "b.jsonl":
            raise PermissionError(13, "Permission denied")
        return digest(path)

    monkeypatch.setattr(files_module, "file_sha256", refused)
    (settings.inbox_dir / "b.jsonl.why.txt").mkdir()  # where the note would be
    staged = staged_of(settings)
    assert staged.new == 3
    assert "b.jsonl cannot be read (Permission denied)" in staged.passed_over[0]


def test_with_nothing_but_files_that_cannot_be_read_it_is_said_which(settings):
    (settings.inbox_dir / "a.parquet").write_bytes(b"no parquet")
    time.sleep(0.2)
    staged = staged_of(settings)
    assert staged.previous is None
    assert str(staged.held_nothing).startswith("there is no battle to begin with: ")
    assert "a.parquet cannot be read" in str(staged.held_nothing)


@pytest.mark.parametrize("how", ["grows", "goes"])
def test_a_file_that_changes_while_it_is_read_stops_the_ingest_and_nothing_is_kept(
    settings, monkeypatch, how
):
    path = drop(settings, "a.jsonl", 5)
    read = files_module.to_battles

    def changing(*args):
        if how == "grows":
            with path.open("a") as file:
                file.write(json.dumps(rows(1, 70)[0]) + "\n")
        else:
            path.unlink()
        return read(*args)

    monkeypatch.setattr(files_module, "to_battles", changing)
    store = SnapshotStore(settings.snapshots_dir())
    with pytest.raises(SourceUnreachable, match=r"a\.jsonl changed while it was read"):
        stage([str(settings.inbox_dir)], store, settings)
    assert store.latest() is None
    assert not list(store.staging_dir.iterdir())


def test_a_file_that_ends_early_because_it_still_grows_is_not_called_damaged(settings):
    path = drop(settings, "a.jsonl", 5)
    source = InboxSource(settings)
    source.cursor()
    path.write_text(path.read_text()[:-20])
    with pytest.raises(SourceUnreachable, match="changed while it was read"):
        list(source.batches(None))
