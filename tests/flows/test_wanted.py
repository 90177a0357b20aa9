"""When a retraining is wanted, what a worker is asked for, and how a failure is told."""

from types import SimpleNamespace

import pytest

from flows.wanted import FIRST, FRESH, NEW_MODEL, retraining_wanted, trained_snapshots
from routellm.lineup import MIN_MODEL_BATTLES
from routellm.snapshots import Manifest


def snapshot(rows, digest="d", **models):
    return Manifest(
        digest=digest, created_at="2026-01-01T00:00:00+00:00", code_version="0", rows=rows,
        parts=(), by_label_kind={}, by_source={}, by_model=models or {"a": rows, "b": rows},
        by_winner={}, quarantined_by_rule={}, cursors={}, validation={}, simulated=False,
        previous=None,
    )  # fmt: skip


def version(number, digest):
    return SimpleNamespace(version=str(number), tags={"snapshot": digest})


def verdict(number, action="reject"):
    return SimpleNamespace(version=str(number), action=action)


def test_the_first_snapshot_asks_for_a_retraining():
    wanted = retraining_wanted(snapshot(100), [], 1000)
    assert (wanted.reason, bool(wanted)) == (FIRST, True)


@pytest.mark.parametrize(("rows", "reason"), [(5000, ""), (5999, ""), (6000, FRESH), (9000, FRESH)])
def test_enough_battles_since_the_newest_trained_snapshot_ask_for_one(rows, reason):
    older = snapshot(1000, "older")
    wanted = retraining_wanted(snapshot(rows), [snapshot(5000, "newer"), older], 1000)
    assert (wanted.reason, bool(wanted)) == (reason, bool(reason))
    assert wanted.numbers["fresh_battles"] == rows - 5000
    if reason:
        assert f"{rows - 5000:,} battles have not been trained on" in wanted.why


@pytest.mark.parametrize(
    ("before", "now", "wanted"),
    [
        (0, MIN_MODEL_BATTLES - 1, False),
        (0, MIN_MODEL_BATTLES, True),
        (MIN_MODEL_BATTLES - 1, MIN_MODEL_BATTLES, True),
        (MIN_MODEL_BATTLES, MIN_MODEL_BATTLES + 1, False),
    ],
)
def test_a_model_that_can_now_be_rated_asks_for_one(before, now, wanted):
    trained = snapshot(5000, a=5000, b=5000, **({"new": before} if before else {}))
    found = retraining_wanted(snapshot(5001, a=5000, b=5000, new=now), [trained], 1000)
    assert found.reason == (NEW_MODEL if wanted else "")
    if wanted:
        assert found.why == f"no router has been trained with new ({now} battles)"


def test_a_model_that_an_older_version_was_trained_with_is_not_new():
    older = snapshot(4000, a=4000, b=4000, new=99)
    found = retraining_wanted(snapshot(5001, a=5000, b=5000, new=99), [snapshot(5000), older], 1000)
    assert found.reason == ""


def test_trained_snapshots_are_in_the_order_of_versions_and_those_gone_are_left_out():
    kept = [snapshot(1, "one"), snapshot(2, "two"), snapshot(3, "three")]
    versions = [version(n, d) for n, d in ((5, "two"), (4, "gone"), (3, "two"), (2, "one"))]
    versions.append(SimpleNamespace(version="1", tags={}))
    history = [verdict(n) for n in range(1, 6)]
    found = trained_snapshots(versions, history, kept)
    assert [one.digest for one in found] == ["two", "one"]


def test_a_retraining_that_was_killed_before_its_verdict_has_not_ended():
    kept = [snapshot(1, "one"), snapshot(2, "two")]
    versions = [version(3, "two"), version(2, "two"), version(1, "one")]
    begun = [verdict(1, "promote"), verdict(2, "challenger")]  # put in line by hand
    assert [one.digest for one in trained_snapshots(versions, begun, kept)] == ["one"]
    for how in ("promote", "reject", "inconclusive"):
        ended = [*begun, verdict(3, how)]
        found = trained_snapshots(versions, ended, kept)
        assert [one.digest for one in found] == ["two", "one"]
