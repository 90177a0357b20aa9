import json
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from registry import Decision, connect, moves
from routellm.errors import RegistryError, UsageError
from tests.support.bare import (
    PROMOTE,
    bare_registry,
    bare_settings,
    bare_version,
    fails,
    promote,
    whole,
    works,
)
from tests.support.race import check_race, race

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # kills and races on a busy machine

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def registry(tmp_path):
    return bare_registry(tmp_path / "home", 4)


# --- moves ---------------------------------------------------------------------------------------


def test_an_entry_says_who_when_what_and_why(registry, monkeypatch):
    monkeypatch.setenv("ROUTELLM_USER", "ada")
    decision = Decision("promote", "APGR up by 0.05", {"delta_apgr": 0.05})
    entry = registry.promote(registry.get("1"), decision, smoke=works)
    (read,) = registry.history()
    assert read.to_dict() == entry.to_dict()
    assert (read.action, read.version, read.from_, read.to) == ("promote", "1", None, "1")
    assert (read.by, read.reason, read.forced) == ("ada", "APGR up by 0.05", False)
    assert read.decision == decision.to_dict() | {"checks": []}
    assert (read.snapshot, read.code_version) == ("d" * 64, "0.1.0")
    assert datetime.fromisoformat(read.at).utcoffset() == timedelta(0)
    assert read.marks["smoke"] == "passed"


def test_a_decision_is_an_artifact_of_the_run_and_tags_on_the_version(registry, tmp_path):
    entry = registry.record(registry.get("2"), Decision("reject", "worse by 0.1"))
    tags = registry.get("2").tags
    assert tags["routellm.decision"] == "reject"
    assert tags["routellm.decision_reason"] == "worse by 0.1"
    assert tags["routellm.decided_at"] == entry.at
    path = registry.client.download_artifacts(
        registry.get("2").run_id, "decisions/1.json", str(tmp_path)
    )
    assert json.loads(Path(path).read_text())["decision"]["reason"] == "worse by 0.1"


def test_ten_versions_are_rolled_back_one_by_one(registry):
    for _ in range(6):
        bare_version(registry)
    promote(registry, *map(str, range(1, 11)))
    assert [registry.rollback(smoke=works).version for _ in range(9)] == list("987654321")
    assert "previous" not in registry.aliases()
    with pytest.raises(UsageError, match="nothing to roll back to"):
        registry.rollback()
    assert registry.rollback("7", smoke=works).version == "7"
    assert whole(registry)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_rollback_goes_to_a_version_that_was_archived(registry):
    promote(registry, "1", "2")
    registry.client.transition_model_version_stage("router", "1", "Archived")
    assert registry.rollback(smoke=works).version == "1"
    assert whole(registry)


def test_a_rollback_says_when_the_version_before_was_deleted(registry):
    promote(registry, "1", "2", "3")
    registry.client.delete_model_version("router", "2")
    with pytest.raises(UsageError, match=r"version 2, .* was deleted .* that is left is 1"):
        registry.rollback(smoke=works)
    with pytest.raises(UsageError, match="has no version 2, it may have been deleted"):
        registry.rollback("2", smoke=works)
    assert registry.champion().version == "3"
    assert registry.rollback("1", smoke=works).version == "1"
    assert whole(registry)


def test_a_deleted_version_and_one_of_another_model_are_not_promoted(registry):
    gone = registry.get("4")
    registry.client.delete_model_version("router", "4")
    with pytest.raises(UsageError, match="has no version 4, it may have been deleted"):
        registry.promote(gone, PROMOTE, smoke=works)
    other = bare_registry(registry.settings.home, 1, model="other")
    with pytest.raises(UsageError, match="router has no version 1"):
        registry.promote(other.get("1"), PROMOTE, smoke=works)
    assert registry.history() == []


def test_an_inconclusive_verdict_puts_in_line_and_a_rejection_takes_out(registry):
    promote(registry, "1")
    registry.record(registry.get("2"), Decision("inconclusive", "too few prompts"))
    assert registry.aliases()["challenger"] == "2"
    registry.record(registry.get("3"), Decision("reject", "worse"))
    assert registry.aliases()["challenger"] == "2"
    registry.record(registry.get("2"), Decision("reject", "worse after all"))
    assert "challenger" not in registry.aliases()
    registry.set_challenger(registry.get("3"))
    promote(registry, "3")
    assert "challenger" not in registry.aliases()
    actions = ["promote", "inconclusive", "reject", "reject", "challenger", "promote"]
    assert [e.action for e in registry.history()] == actions
    with pytest.raises(UsageError, match="is the champion"):
        registry.set_challenger(registry.get("3"))
    with pytest.raises(UsageError, match="promote it instead"):
        registry.record(registry.get("2"), PROMOTE)
    assert whole(registry)


def test_what_was_serving_is_known_for_any_time(registry):
    assert registry.serving_at(datetime.now(UTC)) is None
    promote(registry, "1")
    time.sleep(1.1)
    between = datetime.now(UTC)
    time.sleep(1.1)
    promote(registry, "2")
    assert registry.serving_at(between).to == "1"
    assert registry.serving_at(between.astimezone().replace(tzinfo=None)).to == "1"
    assert registry.serving_at(datetime.now(UTC) + timedelta(hours=1)).to == "2"
    assert registry.serving_at(between - timedelta(hours=1)) is None


# --- the smoke check -----------------------------------------------------------------------------


def test_a_version_that_fails_its_smoke_check_is_taken_back(registry):
    promote(registry, "1", "2")
    with pytest.raises(RegistryError, match=r"0\.2\) and was taken back: the champion is 2 again"):
        promote(registry, "3", smoke=fails)
    assert [e.action for e in registry.history()][2:] == ["promote", "revert"]
    assert registry.state()["before"] == ["1"]
    assert "smoke check failed" in registry.state()["why"]
    assert registry.history()[2].marks["smoke"] == "failed: golden predictions differ by 0.2"
    assert registry.get("3").tags["routellm.decision"] == "revert"
    assert whole(registry)


def test_a_first_version_that_fails_leaves_no_champion(registry):
    with pytest.raises(RegistryError, match="the champion is none again"):
        promote(registry, "1", smoke=fails)
    assert registry.champion() is None
    assert registry.state()["version"] is None
    assert whole(registry)


def test_a_rollback_to_a_version_that_fails_is_taken_back(registry):
    promote(registry, "1", "2")
    with pytest.raises(RegistryError, match="the champion is 2 again"):
        registry.rollback(smoke=fails)
    assert whole(registry)


def test_a_smoke_check_that_breaks_off_counts_as_failed(registry):
    def breaks(uri):
        raise OSError("no memory")

    promote(registry, "1")
    with pytest.raises(RegistryError, match="OSError: no memory"):
        promote(registry, "2", smoke=breaks)
    assert registry.champion().version == "1"


def test_a_champion_that_moved_on_meanwhile_is_not_taken_back(registry):
    promote(registry, "1")

    def overtaken(uri):
        promote(connect(registry.settings), "3")
        return "too slow"

    with pytest.raises(RegistryError, match="moved on meanwhile, it is 3"):
        promote(registry, "2", smoke=overtaken)
    assert registry.state()["before"] == ["1"]  # version 2 is nothing to go back to
    assert registry.aliases()["previous"] == "1"
    assert whole(registry)


def test_the_smoke_check_asks_for_the_very_version(registry):
    asked = []
    promote(registry, "1", smoke=asked.append)
    assert asked == ["models:/router/1"]


def test_a_version_without_a_model_fails_the_real_smoke_check(registry):
    with pytest.raises(RegistryError, match="version 1 failed its smoke check"):
        registry.promote(registry.get("1"), PROMOTE)
    assert registry.champion() is None


# --- others --------------------------------------------------------------------------------------


def test_an_alias_moved_in_the_mlflow_ui_is_noticed_and_written_down(registry):
    promote(registry, "1", "2")
    registry.client.set_registered_model_alias("router", "champion", "4")
    assert "moved from 2 to 4 by something other than routellm" in registry.unsettled()
    assert "moved from 2 to 4" in registry.repair()
    assert registry.repair() is None
    last = registry.history()[-1]
    assert (last.action, last.by, last.to) == ("outside", "unknown", "4")
    assert whole(registry)
    assert registry.rollback(smoke=works).version == "2"


def test_a_promotion_judged_against_a_champion_that_was_moved_outside_is_refused(registry):
    promote(registry, "1")
    registry.client.set_registered_model_alias("router", "champion", "4")
    with pytest.raises(RegistryError, match="moved from 1 to 4 while version 2 was being judged"):
        registry.promote(registry.get("2"), PROMOTE, expected="1", smoke=works)


def test_a_champion_deleted_in_mlflow_is_noticed_and_rolled_back_from(registry):
    promote(registry, "1", "2")
    registry.client.delete_model_version("router", "2")
    assert registry.repair() == (
        "version 2, the champion, was deleted in MLflow; it is written in the history"
    )
    assert registry.state()["version"] is None
    with pytest.raises(UsageError, match="version 2, the champion before this one, was deleted"):
        registry.rollback(smoke=works)
    assert registry.rollback("1", smoke=works).version == "1"


def test_two_rollbacks_at_once_go_back_one_step(registry, monkeypatch):
    promote(registry, "1", "2", "3")
    other = connect(registry.settings)
    seen = other.aliases

    def aliases():
        found = seen()
        monkeypatch.setattr(other, "aliases", seen)
        registry.rollback(smoke=works)  # after the other has looked
        return found

    monkeypatch.setattr(other, "aliases", aliases)
    with pytest.raises(RegistryError, match="moved from 3 to 2 in the meantime"):
        other.rollback(smoke=works)
    assert registry.champion().version == "2"


@pytest.mark.parametrize("force", [False, True])
def test_processes_that_promote_at_once_leave_one_chain(tmp_path, force):
    settings = bare_settings(tmp_path / "home")
    processes = 6 if force else 20
    found = race(settings.resolved_tracking_uri, tmp_path, processes=processes, force=force)
    check_race(found, processes=processes, force=force)


def test_a_writer_that_slept_through_its_lease_puts_back_what_it_set(registry, monkeypatch):
    promote(registry, "1")
    slept, go_on = threading.Event(), threading.Event()

    def step(name):
        if threading.current_thread().name == "slow" and name == "before champion":
            slept.set()
            go_on.wait(60)

    monkeypatch.setattr(moves, "step", step)
    told = []

    def slow():
        try:
            promote(connect(registry.settings), "2")
        except RegistryError as error:
            told.append(str(error))

    thread = threading.Thread(target=slow, name="slow")
    thread.start()
    assert slept.wait(60)
    promote(registry, "3")  # finishes the move to 2, then makes its own
    assert "finished what was cut short" in registry.notices[0]
    go_on.set()
    thread.join(60)
    assert "another process finished it, and the champion is 3 by now" in told[0]
    assert [e.to for e in registry.history()] == ["1", "2", "3"]
    assert whole(registry)


def test_a_reader_never_sees_no_champion_during_many_moves(registry):
    promote(registry, "1")
    done, seen = threading.Event(), []

    def read():
        reader = connect(registry.settings)
        while not done.is_set():
            seen.append(reader.current())

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for _ in range(15):
            promote(registry, "2", "3")
            registry.rollback("1", smoke=works)
    finally:
        done.set()
        thread.join()
    assert len(registry.history()) == 46
    assert len(seen) > 100
    assert {ref and ref.version for ref in seen} <= {"1", "2", "3"}
    assert whole(registry)
