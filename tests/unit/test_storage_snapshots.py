"""Snapshots that two homes have in common: one chain, whoever publishes, is killed or removes."""

import functools
import time
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from routellm import as_of, training
from routellm.embeddings.cache import CachedEncoder
from routellm.errors import SnapshotError, StorageError, StorageUnreachable, UsageError
from routellm.ingest import stage
from routellm.routers.base import Pair
from routellm.settings import Settings
from routellm.snapshots import SnapshotStore, snapshot_store
from routellm.sources.simulated import SIM_STRONG, SIM_WEAK
from routellm.storage import open_storage
from routellm.storage.blobs import Blob
from tests.support.killed_call import killed_at
from tests.support.s3_proxy import back_after
from tests.unit.test_ingest import commit, rows, run
from tests.unit.test_sources import write_lines

WRITES, READS = ["put", "put_new", "delete"], ["get", "fetch", "list"]


@pytest.fixture
def homes(address, tmp_path):
    return [Settings(home=tmp_path / name, storage=address) for name in ("one", "two")]


def publish(settings, *sources):
    """Ingest as a retraining does: again, where another one published in the meantime."""
    while True:
        store = snapshot_store(settings)
        staged = stage([str(one) for one in sources], store, settings)
        try:
            return commit(staged, store)
        except SnapshotError as error:
            if "in the meantime" not in str(error):
                raise
        finally:
            staged.discard()


def battles(folder, start, n=10):
    return write_lines(folder / f"from-{start}.jsonl", rows(n, start))


def test_homes_see_one_chain_and_its_digests_are_those_of_a_home_alone(homes, tmp_path):
    one, two = homes
    first = publish(one, battles(tmp_path, 0))
    second = publish(two, battles(tmp_path, 10), battles(tmp_path, 0))
    stores = [snapshot_store(settings) for settings in homes]
    for store in stores:
        assert store.latest() == second
        assert store.all() == [second, first]
        assert store.get(first.digest[:8]) == first
        with pytest.raises(UsageError, match=f"no snapshot starts with 'zz' in {store.where}"):
            store.get("zz")
        store.verify(second)
        assert len(store.ids(second)) == store.read(second).num_rows == 20
    assert second.previous == first.digest
    alone = Settings(home=tmp_path / "alone")
    assert isinstance(snapshot_store(alone), SnapshotStore)
    assert publish(alone, battles(tmp_path, 0), battles(tmp_path, 10)).digest == second.digest
    assert stage([str(battles(tmp_path, 0))], stores[0], one).unchanged  # cursors are shared too


def test_real_and_simulated_battles_stay_apart(homes, tmp_path):
    publish(homes[0], battles(tmp_path, 0))
    assert snapshot_store(homes[1], simulated=True).latest() is None


@pytest.mark.slow
def test_a_part_crosses_the_network_once(s3_address, proxy, tmp_path):
    one, two = (Settings(home=tmp_path / name, storage=s3_address) for name in ("one", "two"))
    manifest = publish(one, battles(tmp_path, 0))
    before = proxy.count("GET", "/parts/")
    snapshot_store(one).read(manifest)
    assert proxy.count("GET", "/parts/") == before  # who put it has it
    for _ in range(2):
        assert snapshot_store(two).read(manifest).num_rows == 10
    assert proxy.count("GET", "/parts/") == before + 1
    seen = proxy.count("GET", "/manifests/")
    assert snapshot_store(two).latest() == snapshot_store(two).latest() == manifest
    assert proxy.count("GET", "/manifests/") <= seen + 1


def test_a_damaged_copy_is_fetched_again_and_a_lost_part_is_told(homes, tmp_path):
    one, two = homes
    manifest = publish(one, battles(tmp_path, 0))
    store = snapshot_store(two)
    assert store.read(manifest).num_rows == 10
    copy = store.parts_dir / manifest.parts[0].name
    copy.write_bytes(copy.read_bytes()[:-1])
    store.verify(manifest)
    assert store.read(manifest).num_rows == 10
    store.blobs.delete([f"parts/{manifest.parts[0].name}"])
    with pytest.raises(SnapshotError, match="is missing"):
        store.verify(manifest)
    copy.unlink()
    with pytest.raises(SnapshotError, match="is missing"):
        store.read(manifest)


def test_a_part_that_was_changed_in_the_storage_is_refused(homes, tmp_path):
    one, two = homes
    manifest = publish(one, battles(tmp_path, 0))
    other = publish(Settings(home=tmp_path / "other"), battles(tmp_path, 50))
    blobs = snapshot_store(one).blobs
    blobs.put(
        f"parts/{manifest.parts[0].name}",
        SnapshotStore(tmp_path / "other" / "snapshots").parts_dir / other.parts[0].name,
    )
    with pytest.raises(StorageError, match="not what was written"):
        snapshot_store(two).read(manifest)


# --- several publishers ---------------------------------------------------------------------------


def test_the_slower_of_two_is_told_to_run_again_and_nothing_of_it_is_published(homes, tmp_path):
    _, two = homes
    stores = [snapshot_store(settings) for settings in homes]
    staged = [
        stage([str(battles(tmp_path, 10 * i))], store, settings)
        for i, (store, settings) in enumerate(zip(stores, homes, strict=True))
    ]
    first = commit(staged[0], stores[0])
    with pytest.raises(SnapshotError, match="run the ingest again"):
        commit(staged[1], stores[1])
    assert stores[1].latest() == first
    assert publish(two, battles(tmp_path, 10)).rows == 20


def test_of_two_that_looked_at_the_same_time_one_publishes(homes, tmp_path, monkeypatch):
    """The second has seen that nobody published, and is about to."""
    one, two = homes
    publish(one, battles(tmp_path, 0))
    mine, theirs = (snapshot_store(settings) for settings in homes)
    staged = stage([str(battles(tmp_path, 10))], theirs, two)
    build = type(theirs)._build

    def overtaken(self, *args):
        built = build(self, *args)
        if self is theirs:
            publish(one, battles(tmp_path, 20))
        return built

    monkeypatch.setattr(type(theirs), "_build", overtaken)
    with pytest.raises(SnapshotError, match="run the ingest again"):
        commit(staged, theirs)
    assert mine.latest().rows == 20


PUBLISH = """
import sys
from routellm.settings import Settings
from tests.unit.test_storage_snapshots import publish
settings = Settings(home=sys.argv[1], storage=sys.argv[2])
for path in sys.argv[3:]:
    publish(settings, path)
"""


@pytest.mark.slow
def test_processes_that_publish_at_once_make_one_chain_of_all_battles(s3_address, proxy, tmp_path):
    files = [[battles(tmp_path, 30 * i + 10 * j) for j in range(3)] for i in range(3)]
    racing = [
        run(PUBLISH, tmp_path / f"home-{i}", s3_address, *mine) for i, mine in enumerate(files)
    ]
    for one in racing:
        _, err = one.communicate(timeout=120)
        assert one.returncode == 0, err
    store = snapshot_store(Settings(home=tmp_path / "reader", storage=s3_address))
    chain = store.all()
    assert [m.rows for m in chain] == [10 * i for i in range(9, 0, -1)]
    assert [m.previous for m in chain] == [*(m.digest for m in chain[1:]), None]
    latest = store.latest()
    assert len(store.ids(latest)) == store.read(latest).num_rows == 90
    alone = publish(Settings(home=tmp_path / "alone"), *(f for mine in files for f in mine))
    assert latest.digest == alone.digest


def test_a_kill_anywhere_leaves_the_old_snapshot_or_the_new_and_a_rerun_finishes(address, tmp_path):
    grown = battles(tmp_path, 10)
    kind = type(open_storage(address, ""))
    steps = WRITES if address.startswith("s3") else WRITES + READS  # a read there takes its time
    points, rows_after = 0, []
    # the first publish of a storage has steps of its own
    for already in (True,) if steps is WRITES else (False, True):
        for number in range(1, 100):
            died = []
            for done in (False, True):
                here = f"{address}/{already}-{number}-{done}"
                one, two = (Settings(home=tmp_path / here[-9:] / n, storage=here) for n in "ab")
                if already:
                    publish(one, battles(tmp_path, 0))
                act = functools.partial(publish, one, grown)
                died.append(killed_at(number, kind, steps, act, done=done))
                if not died[-1]:
                    continue
                store = snapshot_store(two)
                latest = store.latest()
                if latest:
                    store.verify(latest)
                rows_after.append(latest.rows if latest else 0)
                final = publish(one, grown)
                assert final.rows == store.read(store.latest()).num_rows == 10 + 10 * already
            if not any(died):
                break
            points += sum(died)
        assert number > 2  # there are as many steps, at least
    assert set(rows_after) == ({10, 20} if steps is WRITES else {0, 10, 20})
    assert len(rows_after) == points


@pytest.mark.slow
def test_a_publish_whose_answer_is_lost_is_done_once(s3_address, proxy, tmp_path):
    one = Settings(home=tmp_path / "one", storage=s3_address)
    first = publish(one, battles(tmp_path, 0))
    store = snapshot_store(one)
    staged = stage([str(battles(tmp_path, 10))], store, one)
    put_new = type(store.blobs).put_new

    def lost(self, name, data):
        proxy.lose_answers = 1
        return put_new(self, name, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(store.blobs), "put_new", lost)
        second = commit(staged, store)
    assert store.all() == [second, first]
    assert second.rows == 20


@pytest.mark.slow
def test_an_ingest_outlasts_an_s3_that_is_away_and_says_so_when_it_stays_away(
    s3_address, proxy, tmp_path, monkeypatch
):
    one = Settings(home=tmp_path / "one", storage=s3_address)
    proxy.away = (503, "SlowDown")
    back_after(proxy, 0.5)
    first = publish(one, battles(tmp_path, 0))
    store = snapshot_store(one)
    staged = stage([str(battles(tmp_path, 10))], store, one)
    proxy.away = (500, "InternalError")
    store.blobs.patience_s = 1.0
    with pytest.raises(StorageUnreachable):
        commit(staged, store)
    proxy.away = None
    assert snapshot_store(one).latest() == first
    assert publish(one, battles(tmp_path, 10)).rows == 20


def test_a_storage_that_overwrites_what_it_must_not_is_refused(homes, tmp_path, monkeypatch):
    blobs = snapshot_store(homes[0]).blobs

    def overwrites(self, name, data):
        self.put(name, data)
        return True

    monkeypatch.setattr(type(blobs), "put_new", overwrites)
    with pytest.raises(StorageError, match="does not heed If-None-Match"):
        publish(homes[0], battles(tmp_path, 0))
    assert blobs.list("manifests/") == blobs.list("probe/") == []


def test_a_publish_that_takes_too_long_to_be_sure_of_its_parts_is_refused(
    homes, tmp_path, monkeypatch
):
    monkeypatch.setattr("routellm.shared_snapshots.NAME_WITHIN_S", -1)
    with pytest.raises(SnapshotError, match="nothing was published"):
        publish(homes[0], battles(tmp_path, 0))
    assert snapshot_store(homes[1]).latest() is None


def test_a_damaged_manifest_is_one_sentence(homes, tmp_path):
    one, two = homes
    publish(one, battles(tmp_path, 0))
    snapshot_store(one).blobs.put("manifests/000000001.json", b"{")
    with pytest.raises(SnapshotError, match=r"manifests/000000001\.json.*cannot be read"):
        snapshot_store(two).latest()


# --- removing -------------------------------------------------------------------------------------


def whole(store):
    for manifest in store.all():
        store.verify(manifest)
    return [m.rows for m in store.all()]


def test_removed_snapshots_go_with_the_parts_that_only_they_name(homes, tmp_path):
    one, two = homes
    made = [publish(one, battles(tmp_path, 10 * i)) for i in range(3)]
    here, there = snapshot_store(one), snapshot_store(two)
    assert whole(there) == [30, 20, 10]
    before = there.taken_in()
    assert set(before) == {part.name for part in made[2].parts}
    here.remove({m.digest for m in made})
    assert whole(here) == whole(there) == [30]  # the newest stays, and needs all parts
    assert here.taken_in() == there.taken_in() == before
    with pytest.raises(UsageError, match="no snapshot starts with"):
        there.get(made[0].digest)
    assert publish(two, battles(tmp_path, 30)).rows == 40
    assert [blob.name[-14:] for blob in here.blobs.list("manifests/")] == [
        f"00000000{i}.json" for i in range(1, 5)
    ]


def test_a_publisher_that_stood_still_cannot_take_the_number_of_a_removed_snapshot(
    homes, tmp_path, monkeypatch
):
    one, two = homes
    publish(one, battles(tmp_path, 0))
    store = snapshot_store(two)
    staged = stage([str(battles(tmp_path, 50))], store, two)
    build = type(store)._build

    def asleep(self, *args):
        built = build(self, *args)
        if self is store:
            made = [publish(one, battles(tmp_path, 10 * i)) for i in (1, 2)]
            snapshot_store(one).remove({made[0].digest})
        return built

    monkeypatch.setattr(type(store), "_build", asleep)
    with pytest.raises(SnapshotError, match="run the ingest again"):
        commit(staged, store)
    assert whole(snapshot_store(one)) == [30, 10]


def test_what_a_killed_publish_left_goes_once_it_is_old_and_no_part_that_is_named(
    homes, tmp_path, monkeypatch
):
    one, two = homes
    publish(one, battles(tmp_path, 0))
    act = functools.partial(publish, one, battles(tmp_path, 10))
    store = snapshot_store(two)
    assert killed_at(1, type(store.blobs), ["put_new"], act, done=False)
    store.remove(set())
    assert len(store.blobs.list("parts/")) == 2  # a publisher could be about to name it
    monkeypatch.setattr(Blob, "is_left_over", lambda self, now=None: True)
    assert len(store.only_in(set())) == 1
    store.remove(set())
    assert whole(store) == [10]
    assert len(store.blobs.list("parts/")) == 1


def test_a_home_drops_its_copies_of_parts_that_are_gone(homes, tmp_path, monkeypatch):
    one, two = homes
    publish(one, battles(tmp_path, 0))
    moment = datetime.now(UTC)
    check = lambda manifest: {"passed": True}  # noqa: E731
    time.sleep(1.1)  # whole seconds are kept
    publish(one, battles(tmp_path, 10))
    store = snapshot_store(two)
    known = as_of.publish_as_of(store, moment, check)
    assert whole(store) == [20, 10]
    left = store.parts_dir / "left.parquet"
    left.write_bytes(b"of a removed snapshot")
    store.remove({known.digest})
    assert left.exists()
    monkeypatch.setattr("routellm.shared_snapshots.UNNAMED_S", -1)
    publish(one, battles(tmp_path, 20))
    again = snapshot_store(two)
    assert again.read(again.latest()).num_rows == 30
    assert not left.exists()
    assert len(list(store.parts_dir.iterdir())) == 3


def test_what_was_known_at_a_moment_is_published_beside_the_newest_for_all(homes, tmp_path):
    one, two = homes
    first = publish(one, battles(tmp_path, 0))
    store = snapshot_store(one)
    latest = publish(one, battles(tmp_path, 10))
    half = [
        *first.parts,
        stage([str(battles(tmp_path, 70, 3))], SnapshotStore(tmp_path / "x"), one).parts[0],
    ]
    moment = (datetime.now(UTC) - timedelta(days=1)).isoformat()
    aside = store.publish_aside(half, as_of=moment, simulated=False, check=lambda m: {"n": m.rows})
    there = snapshot_store(two)
    assert there.get(aside.digest) == aside
    assert (aside.rows, aside.validation, aside.as_of) == (13, {"n": 13}, moment)
    assert there.latest() == latest
    assert sorted(whole(there)) == [10, 13, 20]
    there.remove({aside.digest})
    assert whole(store) == [20, 10]
    assert len(store.blobs.list("parts/")) == 2


# --- the same as at home --------------------------------------------------------------------------


def test_a_router_trained_on_another_machine_is_the_one_trained_at_home(address, tmp_path, encoder):
    def trained(settings):
        store = snapshot_store(settings, simulated=True)
        manifest = store.latest()
        cached = CachedEncoder(encoder, settings.embeddings_path, settings.storage)
        prepared = training.prepare(store, manifest, cached, settings, Pair(SIM_STRONG, SIM_WEAK))
        router, report = training.train("knn", prepared.battles, cached, seed=0)
        return manifest.digest, report, router.win_rate(prepared.battles.prompts[:50])

    alone, one, two = (
        Settings(home=tmp_path / name, storage=where)
        for name, where in (("alone", None), ("one", address), ("two", address))
    )
    for settings in (alone, one):
        store = snapshot_store(settings, simulated=True)
        commit(stage(["simulated://arena?battles=1500"], store, settings), store)
    at_home, elsewhere = trained(alone), trained(two)
    assert at_home[0] == elsewhere[0]
    assert at_home[1] == elsewhere[1]
    assert np.array_equal(at_home[2], elsewhere[2])
