"""Trained routers between machines, each with a home of its own and one storage."""

import hashlib
from dataclasses import replace
from shutil import copytree

import pytest

from flows import trained as made
from flows import work
from registry import connect
from registry.log import retraining_run
from routellm import training
from routellm.embeddings.cache import CachedEncoder
from routellm.errors import StorageUnreachable
from routellm.ingest import stage
from routellm.settings import Settings
from routellm.snapshots import snapshot_store
from routellm.storage import checkpoints, open_storage, s3, shared_folders
from routellm.storage.blobs import FolderBlobs
from tests.conftest import HashEncoder
from tests.support.killed_call import killed_at
from tests.support.tiny_bert import save_tiny_bert
from tests.unit.test_ingest import commit

SOURCES = ["simulated://arena?battles=1500"]


@pytest.fixture
def home(address, tmp_path):
    """Return what makes homes of the storage; the snapshot of all is published by the first."""

    def make(name, **training_settings):
        return Settings(
            home=tmp_path / name, storage=address, evaluation={"bootstrap": 100},
            training=training_settings,
        )  # fmt: skip

    store = snapshot_store(make("first"), simulated=True)
    commit(stage(SOURCES, store, make("first")), store)
    return make


def plan_at(settings):
    store = snapshot_store(settings, simulated=True)
    encoder = CachedEncoder(HashEncoder(), settings.embeddings_path, settings.storage)
    return work.plan_of(store.latest(), store, encoder, SOURCES, settings)


def make(kind, settings):
    plan = plan_at(settings)
    router = made.train_router(kind, plan, settings)
    return router, made.evaluate_router(router, plan, settings)


def shared(settings):
    return [one.name for one in shared_folders(settings)]


def content(folder):
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_a_router_that_one_machine_made_another_does_not_make_again(home, monkeypatch):
    one, two = home("one"), home("two")
    router, figures = make("knn", one)
    assert shared(two) == [f"trained/{router.key}"]

    def refuse(*args, **kwargs):
        raise AssertionError("this was done before")

    monkeypatch.setattr(training, "train", refuse)
    monkeypatch.setattr(training, "prepare", refuse)  # nor is anything embedded
    again, found = make("knn", two)
    assert again == replace(router, folder=two.home / "trained" / router.key)
    assert found == figures
    assert content(again.folder) == content(router.folder)
    again.clear(two)
    assert shared(one) == []
    assert not again.folder.exists()


def test_a_kill_at_any_write_to_the_storage_leaves_a_whole_router_there_or_none(home, tmp_path):
    one, other = home("one"), home("other")
    router, _ = make("random", one)
    kept = copytree(router.folder, tmp_path / "kept")
    router.clear(one)
    whole = content(kept)
    kind = type(open_storage(one.storage, ""))
    calls, killed, seen = 0, True, []
    while killed:
        calls += 1 if kind is FolderBlobs else 5  # a request takes its time
        for done in (False, True):
            some = replace(router, key=f"{calls}-{done}")  # what a kill leaves is in nobody's way
            mine, theirs = (replace(some, folder=at.home / "router") for at in (one, other))
            copytree(kept, mine.folder)

            def share_and_clear(mine=mine):
                mine.share(one)
                mine.clear(one)

            killed = killed_at(calls, kind, ["put", "delete"], share_and_clear, done=done)
            theirs.fetch(other)
            seen.append(theirs.figures.exists())
            assert not theirs.folder.exists() or content(theirs.folder) == whole
            if killed:
                assert content(mine.folder) == whole  # who is asked again finds it
                share_and_clear()
            assert shared(one) == []
            theirs.clear(other)
    assert calls > 10
    assert set(seen) == {True, False}


@pytest.mark.slow
@pytest.mark.parametrize("address", ["file"], indirect=True)
def test_a_training_that_is_lost_with_its_machine_another_one_ends_with_the_same_weights(
    home, tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoints, "_MOST_SHARE", 1.0)  # each checkpoint is shared
    base = save_tiny_bert(tmp_path / "tiny")
    steps = {"max_steps": 12, "evaluate_every": 5, "checkpoint_every": 3}
    how = {"options": {"bert": {"model": str(base), **steps}}}

    class Lost(Exception):
        pass

    def lost_at(step):
        def progress(done, total):
            seen.append(done)
            if done == step:
                raise Lost

        return progress

    def train(settings, progress=None):
        return made.train_router("bert", plan_at(settings), settings, progress)

    alone = home("alone", **how).model_copy(update={"storage": None})
    copytree(home("first").home, alone.home)
    seen = []
    plan = plan_at(home("first", **how))
    expected = content(made.train_router("bert", plan, alone).bundle)
    with pytest.raises(Lost):
        train(home("one", **how), lost_at(8))
    assert seen == list(range(1, 9))
    assert shared(home("one")) == [f"checkpoints/{work.training_key('bert', plan, alone)}"]
    seen.clear()
    two = home("two", **how)
    router = train(two, lost_at(None))
    assert seen[0] == 7  # after the last checkpoint
    assert content(router.bundle) == expected
    assert not (router.folder / "checkpoint").exists()
    assert shared(two) == [f"checkpoints/{router.key}"]  # who is lost now has lost little
    made.evaluate_router(router, plan_at(two), two)
    assert shared(two) == [f"trained/{router.key}"]


@pytest.mark.slow
@pytest.mark.parametrize("address", ["s3"], indirect=True)
def test_a_storage_that_goes_away_while_a_router_is_registered_costs_another_try(
    home, proxy, monkeypatch
):
    settings = home("one")
    registry, plan = connect(settings), plan_at(settings)
    router, figures = make("random", settings)
    monkeypatch.setattr(s3, "PATIENCE_S", 1.0)
    manifest = replace(plan.manifest, validation={"passed": True, "rules": []})
    with retraining_run(registry, manifest) as parent:
        proxy.away = (503, "SlowDown")
        with pytest.raises(StorageUnreachable):
            made.register_router(router, plan, registry, parent)
        proxy.away = None
        (first,) = registry.versions()
        measured = made.register_router(router, plan, registry, parent)
    assert measured.version.version == first.version
    assert measured.evaluations == figures
    assert shared(settings) == []
    assert not router.folder.exists()


def test_who_asked_for_a_router_takes_it_from_the_storage_and_says_if_it_is_not_there(home):
    from flows.dispatch import _Runs

    asking, worker = home("asking"), home("worker")
    plan = plan_at(asking)
    runs = _Runs(None, None, plan, SOURCES, asking, None)
    runs._take("random")
    assert "must share `home`, or `storage`" in runs.failed.pop("random")
    router, _ = make("random", worker)
    runs._take("random")
    (taken,) = runs.trained
    assert taken.folder == asking.home / "trained" / router.key
    assert content(taken.folder) == content(router.folder)
    taken.clear(asking)
    make("random", worker)  # it is shared again from where it is still kept
    blobs = open_storage(asking.storage, f"folders/trained/{router.key}")
    blobs.delete(one.name for one in blobs.list() if one.name != "index.json")
    runs._take("random")
    assert "is damaged: a piece of it is missing" in runs.failed["random"]
