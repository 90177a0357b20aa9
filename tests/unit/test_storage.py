"""What machines have in common, in a folder and on moto's S3 server: objects, folders, vectors."""

import logging
import os
import threading
import time
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from routellm import retention
from routellm.embeddings.cache import CachedEncoder
from routellm.embeddings.shared import SharedRows
from routellm.errors import StorageError, StorageUnreachable, UsageError
from routellm.settings import Settings
from routellm.storage import (
    SharedCheckpoint,
    fetch_folder,
    fetch_verified,
    folders,
    open_storage,
    remove_folder,
    remove_left_over,
    s3,
    share_folder,
    shared_folders,
)
from routellm.storage.blobs import Blob, FolderBlobs
from tests.support.killed_call import killed_at
from tests.support.s3_proxy import back_after
from tests.unit.test_embeddings import Counting

# --- objects --------------------------------------------------------------------------------------


def test_an_object_is_put_whole_listed_read_and_removed(address, tmp_path):
    blobs = open_storage(address, "under")
    assert blobs.list() == []
    assert blobs.get("a/1") is None
    assert not blobs.fetch("a/1", tmp_path / "to")
    (tmp_path / "from").write_bytes(b"of a file")
    for i in range(7):
        blobs.put(f"a/{i}", b"x" * i)
    blobs.put("b", tmp_path / "from")
    assert [one.name for one in blobs.list()] == [*(f"a/{i}" for i in range(7)), "b"]
    assert [one.size_bytes for one in blobs.list("a/", after="a/3")] == [4, 5, 6]
    assert blobs.get("b") == b"of a file"
    assert blobs.fetch("b", tmp_path / "to")
    assert (tmp_path / "to").read_bytes() == b"of a file"
    before = blobs.list("b")[0]
    assert not before.is_left_over()
    blobs.put("b", b"another")
    assert blobs.list("b")[0].version != before.version
    blobs.delete(["b", "never there"])
    assert blobs.list("b") == []
    assert open_storage(address, "").list()[0].name == "under/a/0"


def test_a_name_is_given_once_however_many_ask(address):
    blobs = open_storage(address, "race")
    start, won = threading.Barrier(8), []

    def put(i):
        start.wait()
        if blobs.put_new("1", str(i).encode()):
            won.append(str(i).encode())

    threads = [threading.Thread(target=put, args=(i,)) for i in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert won == [blobs.get("1")]
    assert [one.name for one in blobs.list()] == ["1"]


def test_an_object_that_is_not_what_was_written_is_refused(address, tmp_path):
    blobs = open_storage(address, "")
    blobs.put("a", b"damaged")
    with pytest.raises(StorageError, match="not what was written"):
        fetch_verified(blobs, "a", tmp_path / "to" / "a", "0" * 64)
    assert list((tmp_path / "to").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("no folder")
    blobs = FolderBlobs(tmp_path / "file")
    for act in (lambda: blobs.put("a", b""), lambda: blobs.put_new("a", b"")):
        with pytest.raises(StorageError, match="see that it is mounted"):
            act()


@pytest.mark.parametrize(
    "address",
    ["s3://key:secret@bucket/x", "s3://bucket?secret=1", "gs://secret/x", "secret",
     "file://host/secret", "s3://", "file:///"],
)  # fmt: skip
def test_an_address_of_no_known_kind_is_refused_and_not_repeated(address):
    with pytest.raises(UsageError) as caught:
        open_storage(address, "x")
    assert "secret" not in str(caught.value)
    assert "s3://bucket/prefix" in str(caught.value)


# --- when S3 fails --------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_may_pass_is_tried_again(s3_address, proxy, tmp_path):
    blobs = open_storage(s3_address, "")
    proxy.refuse = [(500, "InternalError"), (503, "SlowDown"), (409, "ConditionalRequestConflict")]
    assert blobs.put_new("a", b"first")
    assert proxy.refuse == []
    proxy.away = (503, "ServiceUnavailable")
    back_after(proxy, 0.3)
    assert blobs.get("a") == b"first"
    blobs.put("b", os.urandom(3_000_000))
    proxy.break_off = 2
    assert len(blobs.get("b")) == 3_000_000
    proxy.break_off = 2
    assert blobs.fetch("b", tmp_path / "b")
    assert (tmp_path / "b").stat().st_size == 3_000_000
    assert proxy.break_off == 0


@pytest.mark.slow
def test_a_write_whose_answer_is_lost_is_known_as_ones_own(s3_address, proxy):
    blobs = open_storage(s3_address, "")
    proxy.lose_answers = 1
    assert blobs.put_new("a", b"mine")
    proxy.lose_answers = 1
    assert not blobs.put_new("a", b"another's")
    assert blobs.get("a") == b"mine"


@pytest.mark.slow
def test_an_s3_that_stays_away_is_one_sentence_within_the_time_that_is_set(
    s3_address, proxy, monkeypatch
):
    monkeypatch.setattr(s3, "PATIENCE_S", 1.0)
    blobs = open_storage(s3_address, "")
    proxy.away = (500, "InternalError")
    started = time.monotonic()
    for act in (lambda: blobs.put("a", b""), lambda: blobs.get("a"), blobs.list):
        with pytest.raises(StorageUnreachable, match=r"within 1 s.*nothing is half-done"):
            act()
    assert time.monotonic() - started < 15
    proxy.away = None
    assert blobs.list() == []


@pytest.mark.slow
def test_nobody_at_the_address_is_unreachable(s3_address, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setattr(s3, "PATIENCE_S", 1.0)
    s3._client.cache_clear()
    with pytest.raises(StorageUnreachable, match="EndpointConnectionError"):
        open_storage(s3_address, "").list()
    s3._client.cache_clear()


@pytest.mark.slow
def test_a_wrong_bucket_or_key_is_one_sentence_at_once_and_tells_no_secret(
    s3_address, proxy, monkeypatch, caplog
):
    caplog.set_level(logging.DEBUG, "routellm")
    monkeypatch.setattr(s3, "PATIENCE_S", 600.0)
    said = []
    with pytest.raises(StorageError, match="there is no bucket 'nowhere'") as caught:
        open_storage("s3://nowhere/x", "").list()
    said.append(caught.value)
    for code in ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
        proxy.refuse = [(403, code)]
        with pytest.raises(StorageError, match=f"{code}.*check the credentials") as caught:
            open_storage(s3_address, "").put("a", b"")
        said.append(caught.value)
    proxy.refuse = [(400, "InvalidRequest")]
    with pytest.raises(StorageError, match="AWS_REGION") as caught:
        open_storage(s3_address, "").list()
    said.append(caught.value)
    assert not any(isinstance(one, StorageUnreachable) for one in said)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    s3._client.cache_clear()
    with pytest.raises(StorageError, match=r"NoCredentialsError.*check the credentials"):
        open_storage(s3_address, "").list()
    s3._client.cache_clear()
    assert not any(w in str(one) for one in said for w in ("Credential=", "Signature="))
    assert "Credential" not in caplog.text


# --- folders --------------------------------------------------------------------------------------


def homes(address, tmp_path):
    return [Settings(home=tmp_path / name, storage=address) for name in ("one", "two")]


def filled(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def content(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()
    }


def test_a_folder_that_one_home_shares_another_fetches(address, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "PIECE_BYTES", 4)
    one, two = homes(address, tmp_path)
    files = {"report.json": "{}", "bundle__weights": "0123456789", "empty": ""}
    mine = filled(one.home / "trained" / "k", **files, **{".unfinished": "x", ".tmp__x": "x"})
    theirs = two.home / "trained" / "k"
    assert not fetch_folder("trained/k", theirs, two)
    share_folder(mine, "trained/k", one, about={"step": 3})
    filled(theirs, left="of a killed run")
    assert fetch_folder("trained/k", theirs, two)
    assert content(theirs) == {"report.json": "{}", "bundle/weights": "0123456789", "empty": ""}
    assert [p.name for p in theirs.parent.iterdir()] == ["k"]
    (found,) = shared_folders(two)
    assert (found.name, found.about) == ("trained/k", {"step": 3})
    filled(mine, report="two")
    share_folder(mine, "trained/k", one)
    assert fetch_folder("trained/k", theirs, two)
    assert content(theirs)["report"] == "two"
    # what the second replaced is gone: five files, of which one in three pieces and one in none
    assert len(open_storage(address, "folders/trained/k").list()) == 1 + 5
    remove_folder("trained/k", two)
    assert shared_folders(one) == []
    assert open_storage(address, "").list() == []
    assert not fetch_folder("trained/k", theirs, two)


def test_without_a_storage_nothing_is_shared(settings, tmp_path):
    folder = filled(tmp_path / "f", a="1")
    share_folder(folder, "f", settings)
    assert not fetch_folder("f", folder, settings)
    assert shared_folders(settings) == []
    assert remove_left_over(settings) == 0
    checkpoint = SharedCheckpoint(folder, "f", settings)
    assert not checkpoint.bring()
    checkpoint.written()
    checkpoint.done()
    assert content(folder) == {"a": "1"}


def test_a_damaged_folder_is_refused_and_what_is_here_stays(address, tmp_path):
    one, two = homes(address, tmp_path)
    share_folder(filled(one.home / "f", a="right"), "f", one)
    blobs = open_storage(address, "folders/f")
    (piece,) = [b.name for b in blobs.list() if b.name != "index.json"]
    here = filled(two.home / "f", a="mine")
    blobs.put(piece, b"wrong")
    with pytest.raises(StorageError, match="damaged"):
        fetch_folder("f", here, two)
    blobs.put("index.json", b"{")
    with pytest.raises(StorageError, match="cannot be read"):
        fetch_folder("f", here, two)
    assert content(here) == {"a": "mine"}
    assert [p.name for p in two.home.iterdir()] == ["f"]


def test_a_folder_that_is_replaced_while_it_is_read_comes_whole(address, tmp_path, monkeypatch):
    one, two = homes(address, tmp_path)
    folder = filled(one.home / "f", a="1", b="1")
    share_folder(folder, "f", one)
    kind = type(open_storage(address, ""))
    get, replaced = kind.get, []

    def slow(self, name):
        data = get(self, name)
        if name.endswith("/0-0") and not replaced:
            replaced.append(name)
            share_folder(filled(folder, a="2", b="2"), "f", one)
        return data

    monkeypatch.setattr(kind, "get", slow)
    assert fetch_folder("f", two.home / "f", two)
    assert content(two.home / "f") == {"a": "2", "b": "2"}


def test_a_kill_while_sharing_leaves_the_old_folder_or_the_new(address, tmp_path, monkeypatch):
    one, two = homes(address, tmp_path)
    old, new = {"a": "1", "b": "1"}, {"a": "2", "b": "2"}
    folder = filled(one.home / "f", **old)
    share_folder(folder, "f", one)
    filled(folder, **new)
    kind = type(open_storage(address, ""))
    seen = []
    for calls in range(1, 4):
        for done in (False, True):
            act = lambda: share_folder(folder, "f", one)  # noqa: E731
            assert killed_at(calls, kind, ["put"], act, done=done)
            assert fetch_folder("f", two.home / "f", two)
            seen.append(content(two.home / "f"))
    assert seen == [old] * 5 + [new]
    share_folder(folder, "f", one)
    left = len(open_storage(address, "").list())
    assert left > 3  # what was killed is young, and another machine's work could be
    monkeypatch.setattr(Blob, "is_left_over", lambda self, now=None: True)
    assert remove_left_over(two) > 0
    assert len(open_storage(address, "").list()) == 3
    assert fetch_folder("f", two.home / "f", two)
    assert content(two.home / "f") == new


def test_compaction_removes_folders_that_nobody_came_back_for(address, tmp_path):
    one, two = homes(address, tmp_path)
    share_folder(filled(one.home / "f", a="1"), "trained/k", one)
    now = datetime.now(UTC)
    assert retention.plan_leftovers(two, now) == []
    later = now + timedelta(days=8)
    (planned,) = retention.plan_leftovers(two, later)
    assert (planned.what, planned.name, planned.path) == ("leftover", "trained/k", None)
    assert "8 days ago" in planned.why
    retention.remove_leftovers([planned], two, now)  # it was shared again since
    assert len(shared_folders(one)) == 1
    retention.remove_leftovers([planned], two, later)
    assert shared_folders(one) == []


def progress(folder, step, run="r"):
    return filled(
        folder, **{"progress.json": f'{{"run": "{run}", "step": {step}}}', "w": str(step)}
    )


def test_a_checkpoint_is_brought_where_it_is_further_than_what_is_here(address, tmp_path):
    one, two = homes(address, tmp_path)
    mine = SharedCheckpoint(progress(one.home / "c", 20), "checkpoints/k", one)
    theirs = SharedCheckpoint(two.home / "c", "checkpoints/k", two)
    assert not theirs.bring()
    mine.written()
    before = shared_folders(one)
    mine._next_s = 0.0
    mine.written()  # no new one
    assert shared_folders(one) == before
    mine._next_s = time.monotonic() + 60
    progress(one.home / "c", 30)
    mine.written()  # so soon that it is not worth it
    assert theirs.bring()
    assert content(two.home / "c")["w"] == "20"
    progress(two.home / "c", 25)
    assert not theirs.bring()
    progress(two.home / "c", 99, run="another training")
    assert theirs.bring()
    theirs.done()
    assert shared_folders(one) == []


@pytest.mark.slow
def test_a_training_goes_on_when_its_checkpoint_cannot_be_shared(
    s3_address, proxy, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(s3, "PATIENCE_S", 1.0)
    one, _ = homes(s3_address, tmp_path)
    checkpoint = SharedCheckpoint(progress(one.home / "c", 20), "checkpoints/k", one)
    proxy.away = (500, "InternalError")
    checkpoint.written()
    assert "checkpoint 20 was not shared" in caplog.text
    with pytest.raises(StorageUnreachable):
        checkpoint.bring()


# --- vectors --------------------------------------------------------------------------------------


def test_a_prompt_is_encoded_on_one_machine(address, tmp_path):
    one, two = Counting(), Counting()
    here = CachedEncoder(one, tmp_path / "1.db", address)
    there = CachedEncoder(two, tmp_path / "2.db", address)
    prompts = [f"prompt number {i}" for i in range(20)]
    mine = here.encode(prompts)
    theirs = there.encode([*prompts[10:], "another", *prompts[:10]])
    assert two.encoded == ["another"]
    assert here.missing(["new", prompts[0], "another", "last", "new"]) == ["new", "last"]
    assert np.array_equal(np.delete(theirs, 10, 0), np.roll(mine, 10, 0))
    assert np.array_equal(here.encode(["another"])[0], theirs[10])
    assert sorted(one.encoded) == sorted(prompts)
    other = Counting()
    other.identity = "test/other@1"
    CachedEncoder(other, tmp_path / "3.db", address).encode(["another"])
    assert other.encoded == ["another"]


def test_what_was_encoded_before_there_was_a_storage_goes_up_when_it_is_used(address, tmp_path):
    CachedEncoder(Counting(), tmp_path / "1.db").encode(["old", "older"])
    one, two = Counting(), Counting()
    CachedEncoder(one, tmp_path / "1.db", address).encode(["old", "new"])
    CachedEncoder(two, tmp_path / "2.db", address).encode(["old", "new"])
    assert (one.encoded, two.encoded) == (["new"], [])


@pytest.mark.slow
def test_a_storage_that_has_all_that_is_asked_for_is_not_asked(s3_address, proxy, tmp_path):
    cached = CachedEncoder(Counting(), tmp_path / "1.db", s3_address)
    cached.encode(["a", "b"])
    before = len(proxy.seen)
    cached.encode(["b", "a"])
    assert len(proxy.seen) == before


@pytest.mark.slow
def test_what_could_not_be_shared_is_kept_and_shared_the_next_time(
    s3_address, proxy, tmp_path, monkeypatch
):
    one, two = Counting(), Counting()
    cached = CachedEncoder(one, tmp_path / "1.db", s3_address)
    cached.encode(["before"])
    encode = one.encode

    def then_away(prompts, **kwargs):
        proxy.away = (500, "InternalError")
        return encode(prompts, **kwargs)

    one.encode = then_away
    monkeypatch.setattr(s3, "PATIENCE_S", 1.0)
    with pytest.raises(StorageUnreachable):
        cached.encode(["a", "b"])
    proxy.away = None
    monkeypatch.setattr(s3, "PATIENCE_S", 30.0)
    cached.encode(["a", "b"])
    assert sorted(one.encoded) == ["a", "b", "before"]
    CachedEncoder(two, tmp_path / "2.db", s3_address).encode(["a", "b"])
    assert two.encoded == []


def rows(blobs, path, **bounds):
    cached = CachedEncoder(Counting(), path)
    return cached, SharedRows(blobs, cached._connect, **bounds)


def test_many_small_objects_become_few_and_none_of_their_rows_is_lost(address, tmp_path):
    blobs = open_storage(address, "embeddings/e")
    _, here = rows(blobs, tmp_path / "1.db", full_rows=5, most_small=2)
    sent = {}
    for i in range(15):
        key = bytes([i]) * 32
        sent[key] = np.full(3, i, np.float32)
        here.send({key: sent[key]})
        objects = [int(one.name[:9]) for one in blobs.list()]
        assert len([n for n in objects if n < 5]) <= 2
    assert len(objects) <= 15 / 5 + 2
    assert sum(objects) == 15
    cached, there = rows(blobs, tmp_path / "2.db")
    there.bring(list(sent))
    found = cached._get(list(sent))
    assert all(np.array_equal(found[key], sent[key]) for key in sent)


def test_a_merge_that_is_killed_or_meets_a_reader_loses_no_row(address, tmp_path, monkeypatch):
    blobs = open_storage(address, "embeddings/e")
    kind, keys = type(blobs), [bytes([i]) * 32 for i in range(5)]
    _, here = rows(blobs, tmp_path / "1.db", full_rows=10, most_small=4)
    for key in keys[:4]:
        here.send({key: np.ones(3, np.float32)})
    act = lambda: here.send({keys[4]: np.ones(3, np.float32)})  # noqa: E731
    assert killed_at(1, kind, ["delete"], act, done=False)
    assert len(blobs.list()) == 6  # five small, and the one that holds them all
    cached, there = rows(blobs, tmp_path / "2.db")
    get, met = kind.get, []

    def slow(self, name):  # the other machine merges after this one has listed
        if not met:
            met.append(name)
            blobs.delete([one.name for one in blobs.list() if int(one.name[:9]) == 1])
        return get(self, name)

    monkeypatch.setattr(kind, "get", slow)
    there.bring(keys)
    assert len(cached._get(keys)) == 5


def test_a_damaged_object_of_vectors_is_refused(address, tmp_path):
    blobs = open_storage(address, "embeddings/e")
    _, here = rows(blobs, tmp_path / "1.db")
    here.send({b"k" * 32: np.ones(3, np.float32)})
    (one,) = blobs.list()
    blobs.put(one.name, b"damaged")
    _, there = rows(blobs, tmp_path / "2.db")
    with pytest.raises(StorageError, match="encoded again"):
        there.bring([b"k" * 32])
