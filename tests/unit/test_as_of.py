"""What was known at a moment: which battles, published where, and what never gets in."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from routellm import as_of, snapshots
from routellm.as_of import History, moment, publish_as_of, store_with_history
from routellm.errors import UsageError, ValidationError
from routellm.settings import Settings
from routellm.snapshots import Manifest, SnapshotStore
from tests.conftest import battle_table
from tests.support.killed_call import killed_at

DAY = timedelta(days=1)
FIRST = datetime(2026, 3, 1, tzinfo=UTC)
NOON = datetime(2026, 3, 11, 12, tzinfo=UTC)


def passed(manifest):
    return {"passed": True, "rules": [], "rows": manifest.rows}


def committed(store, folder, table, *, at=None):
    """Publish battles on top of the newest snapshot, as if it had been done `at` a time."""
    path = folder / f"{len(list(folder.glob('*.parquet')))}.parquet"
    pq.write_table(table, path)
    manifest = store.commit(
        parts=[path], cursors={"test": {}}, previous=store.latest(), quarantined_by_rule={},
        validation={"passed": True, "rules": []}, simulated=False,
    )  # fmt: skip
    if at is not None:
        dated = replace(manifest, created_at=at.isoformat(timespec="seconds"))
        (store.directory / f"{manifest.digest}.json").write_text(dated.to_json())
    return store.latest()


def numbered(first, voted_at):
    """Return a battle for each date (None: undated), with ids of their own."""
    n = len(voted_at)
    return battle_table(
        n,
        voted_at=pa.array(voted_at, pa.timestamp("us", tz="UTC")),
        battle_id=[f"{first + i:032x}" for i in range(n)],
    )


@pytest.fixture
def store(tmp_path):
    """Ten battles a day apart; then ten more, of which one was voted early and two bear no date."""
    (tmp_path / "parts").mkdir()
    store = SnapshotStore(tmp_path / "home" / "snapshots")
    days = [FIRST + i * DAY for i in range(10)]
    committed(store, tmp_path / "parts", numbered(0, days), at=NOON)
    late = [FIRST + DAY, None, None, *(NOON + i * DAY for i in range(1, 8))]
    committed(store, tmp_path / "parts", numbered(100, late), at=NOON + 5 * DAY)
    return store


def ids(store, manifest):
    return {int(one, 16) for one in store.read(manifest, ["battle_id"])["battle_id"].to_pylist()}


# --- moments ---------------------------------------------------------------------------------


def test_a_date_is_the_end_of_that_day_in_utc_and_a_time_is_in_utc_unless_it_says_otherwise():
    now = datetime(2026, 6, 1, tzinfo=UTC)
    assert moment("2026-01-31", now=now) == datetime(2026, 1, 31, 23, 59, 59, 999_999, UTC)
    assert moment("2026-01-31T12:00", now=now) == datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert moment("2026-01-31T12:00+02:00", now=now) == datetime(2026, 1, 31, 10, tzinfo=UTC)
    assert moment("2026-01-31T12:00Z", now=now) == datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("yesterday", "'yesterday' is no date"),
        ("2026-02-30", "'2026-02-30' is no date"),
        ("2026-06-02", "2026-06-02 is not over yet"),
        ("2026-06-01", "2026-06-01 is not over yet"),
        ("2026-06-01T00:01", "is not over yet"),
    ],
)
def test_a_moment_that_is_none_or_has_not_passed_is_refused_in_a_sentence(text, says):
    with pytest.raises(UsageError, match=says):
        moment(text, now=datetime(2026, 6, 1, tzinfo=UTC))


# --- what was known --------------------------------------------------------------------------


def test_a_battle_is_known_from_its_vote_and_an_undated_one_from_when_it_was_taken_in(store):
    def known(when):
        history = History.of(store)
        return {int(one, 16) for one, k in zip(history.ids, history.known_by(when), strict=True)
                if k}  # fmt: skip

    assert known(FIRST) == {0}
    assert known(FIRST + DAY) == {0, 1, 100}  # voted early, though taken in late
    assert known(NOON) == {*range(10), 100}
    taken_in = NOON + 5 * DAY
    assert known(taken_in - timedelta(seconds=1)) == {*range(10), 100, 103, 104, 105, 106}
    assert known(taken_in) == {*range(10), *range(100, 108)}
    assert known(NOON + 30 * DAY) == {*range(10), *range(100, 110)}


def test_what_was_known_is_a_snapshot_beside_the_newest_with_just_these_battles(store):
    latest = store.latest()
    manifest = publish_as_of(store, NOON, passed)
    assert ids(store, manifest) == {*range(10), 100}
    assert manifest.rows == 11
    assert manifest.as_of == NOON.isoformat()
    assert manifest.validation["rows"] == 11
    assert manifest.cursors == {}
    assert store.latest() == latest
    assert store.get(manifest.digest[:12]) == manifest
    store.verify(manifest)
    assert latest.parts[0] in manifest.parts  # known as a whole: named, not copied
    assert latest.parts[1] not in manifest.parts


def test_the_same_battles_are_one_snapshot_made_once_whatever_moment_asks_for_them(store):
    first = publish_as_of(store, NOON, passed)
    there = sorted((p, p.stat().st_mtime_ns) for p in store.directory.rglob("*") if p.is_file())

    def refuse(manifest):
        raise AssertionError("it was made before")

    again = publish_as_of(store, NOON, refuse)
    assert again == first
    later = publish_as_of(store, NOON + timedelta(minutes=5), refuse)
    assert (later.digest, later.parts) == (first.digest, first.parts)
    assert later.as_of == (NOON + timedelta(minutes=5)).isoformat()
    whole = publish_as_of(store, NOON + 30 * DAY, refuse)
    assert whole.digest == store.latest().digest
    after = sorted((p, p.stat().st_mtime_ns) for p in store.directory.rglob("*") if p.is_file())
    assert after == there


def test_more_battles_later_change_nothing_of_what_was_known(store, tmp_path):
    before = publish_as_of(store, NOON, passed)
    more = numbered(200, [NOON + timedelta(microseconds=1), *(NOON + i * DAY for i in range(1, 5))])
    committed(store, tmp_path / "parts", more)
    assert publish_as_of(store, NOON, passed) == before


def test_a_snapshot_that_fails_its_check_is_not_published(store):
    def fail(manifest):
        assert manifest.rows == 11
        raise ValidationError("too few battles")

    before = store.all()
    with pytest.raises(ValidationError, match="too few"):
        publish_as_of(store, NOON, fail)
    assert store.all() == before
    assert not list(store.staging_dir.iterdir())


def test_before_the_first_battle_nothing_was_known_and_a_sentence_says_so(store, tmp_path):
    with pytest.raises(UsageError, match=r"by 2026-02-28T00:00 UTC: the first .* 2026-03-01"):
        publish_as_of(store, FIRST - DAY, passed)
    with pytest.raises(UsageError, match=r"no snapshot in .*: run `routellm ingest SOURCE` first"):
        publish_as_of(SnapshotStore(tmp_path / "none"), NOON, passed)


def test_killed_at_any_write_it_leaves_nothing_published_and_is_made_by_the_next_try(store):
    latest, before = store.latest(), store.all()
    deaths = 0
    for number in range(1, 20):
        if not killed_at(
            number, snapshots.Path, ["replace"], lambda: publish_as_of(store, NOON, passed),
            done=False,
        ):  # fmt: skip
            break
        deaths += 1
        assert store.all() == before
        assert store.latest() == latest
    assert deaths >= 2  # a part, and the manifest
    assert ids(store, publish_as_of(store, NOON, passed)) == {*range(10), 100}


def test_a_manifest_from_before_there_was_an_as_of_is_still_read(store):
    doc = json.loads(store.latest().to_json())
    del doc["as_of"]
    assert Manifest.from_json(json.dumps(doc)) == store.latest()
    assert store.latest().as_of is None


def test_one_looks_back_in_the_snapshots_that_the_sources_fill(tmp_path):
    settings = Settings(home=tmp_path / "home")
    (tmp_path / "parts").mkdir()
    real = SnapshotStore(settings.snapshots_dir())
    assert store_with_history(settings).directory == settings.snapshots_dir(simulated=True)
    committed(real, tmp_path / "parts", numbered(0, [FIRST]))
    assert store_with_history(settings).directory == real.directory  # the only ones there are
    named = store_with_history(settings, ["simulated://arena"])
    assert named.directory == settings.snapshots_dir(simulated=True)
    dated = History.of(real)
    assert dated.last_voted == FIRST
    assert as_of.utc(FIRST) == dated.voted[0]
