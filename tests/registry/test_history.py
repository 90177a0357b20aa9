import json
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.chain import verified
from registry.history import (
    GENESIS,
    Entry,
    Standing,
    advance,
    canonical,
    digest,
    replay,
    serving_at,
    who,
)
from registry.mirror import Mirror
from routellm.errors import RegistryError
from tests.support.bare import PROMOTE, bare_registry, works

REMEDY = "restore a backup"


def row(entry, n, **marks):
    """An entry as MLflow gives it back."""
    text = entry.text()
    tags = {"entry.0": text[:100], "entry.1": text[100:], "sha256": digest(text), **marks}
    return SimpleNamespace(version=n, tags=tags, creation_timestamp=1_700_000_000_000 + n)


def promoted(to, from_=None, prev=GENESIS, **more):
    return Entry("promote", to, from_, to, "better", prev=prev, **more)


def rows(n):
    """A whole chain of n promotions."""
    out, prev, champion = [], GENESIS, None
    for i in range(1, n + 1):
        entry = promoted(str(i), champion, prev)
        out.append(row(entry, i, applied=entry.at))
        prev, champion = out[-1].tags["sha256"], str(i)
    return out


# --- the chain -----------------------------------------------------------------------------------


def test_a_whole_chain_is_read_in_order():
    chain = verified(rows(5), "h", REMEDY)
    assert [e.to for e in chain.entries] == ["1", "2", "3", "4", "5"]
    assert chain.head == chain.entries[-1].sha256
    assert all(e.applied for e in chain.entries)


def test_an_entry_whose_writer_was_not_the_fastest_is_void():
    whole = rows(2)
    late = row(promoted("9", "1", whole[0].tags["sha256"]), 3)
    after = row(promoted("3", "2", whole[1].tags["sha256"]), 4)
    chain = verified([*whole, late, after], "h", REMEDY)
    assert [e.to for e in chain.entries] == ["1", "2", "3"]
    assert [e.void for e in chain.written] == [False, False, True, False]


def edited(whole, i, **changes):
    doc = json.loads(whole[i].tags["entry.0"] + whole[i].tags["entry.1"]) | changes
    return canonical(doc)


def with_text(text):
    return {"entry.0": text, "sha256": digest(text)}


def only_the_text(whole):
    whole[2].tags = {**whole[2].tags, "entry.0": edited(whole, 2, by="mallory"), "entry.1": ""}


def text_and_hash(whole):
    whole[2].tags = with_text(edited(whole, 2, by="mallory"))


def first_text_and_hash(whole):
    whole[0].tags = with_text(edited(whole, 0, by="mallory"))


def made_void(whole):
    whole[2].tags = with_text(edited(whole, 2, prev=GENESIS))


def taken_out(whole):
    del whole[2]


def tag_taken_away(whole):
    whole[2].tags = {"note": "hello"}


def slipped_in(whole):
    whole.append(row(promoted("9", "5", "f" * 64), 6))


@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (only_the_text, "entry 3 of h was edited"),
        (text_and_hash, "entry 3 of h was edited: entry 4 carries"),
        (first_text_and_hash, "entry 1 of h was edited"),
        (made_void, "entry 2 of h was edited: entry 4 carries"),
        (taken_out, "entry 3 of h is missing"),
        (tag_taken_away, "version 3 of h is no entry"),
        (slipped_in, "entry 5 of h was edited: entry 6 carries"),
    ],
)
def test_tampering_is_one_sentence_that_names_the_entry(tamper, says):
    whole = rows(5)
    tamper(whole)
    with pytest.raises(RegistryError, match=says) as raised:
        verified(whole, "h", REMEDY)
    assert str(raised.value).endswith(REMEDY)
    assert "\n" not in str(raised.value)


def test_numbers_that_json_lacks_are_kept_as_what_json_has():
    numbers = {"nan": float("nan"), "np": np.float64(0.5), "n": np.int64(3), "list": (1, np.inf)}
    entry = promoted("1", decision={"numbers": numbers})
    (read,) = verified([row(entry, 1)], "h", REMEDY).entries
    assert read.decision["numbers"] == {"nan": None, "np": 0.5, "n": 3, "list": [1, None]}


def test_an_entry_of_a_newer_version_of_this_software_can_be_read():
    text = canonical({**json.loads(promoted("1").text()), "weather": "fine"})
    newer = SimpleNamespace(version=1, tags=with_text(text), creation_timestamp=0)
    assert verified([newer], "h", REMEDY).head == digest(text)


# --- where it leaves things ----------------------------------------------------------------------


def test_a_rollback_takes_back_one_champion_after_the_other():
    standing = replay([promoted("1"), promoted("2", "1"), promoted("3", "2")])
    assert (standing.champion, standing.before) == ("3", ("2", "1"))
    standing = advance(standing, Entry("rollback", "2", "3", "2", "rollback"))
    assert (standing.champion, standing.before) == ("2", ("1",))


def test_a_version_that_failed_its_smoke_check_is_nothing_to_go_back_to():
    standing = replay([promoted("1"), promoted("2", "1"), promoted("3", "2")])
    back = advance(standing, Entry("revert", "3", "3", "2", "smoke check failed"))
    assert (back.champion, back.before) == ("2", ("1",))
    late = advance(standing, Entry("revert", "2", "3", "3", "smoke check failed"))
    assert (late.champion, late.before) == ("3", ("1",))


def test_an_outside_move_back_is_taken_as_a_rollback_and_any_other_as_a_promotion():
    standing = replay([promoted("1"), promoted("2", "1")])
    back = advance(standing, Entry("outside", "1", "2", "1", "?", by="unknown"))
    assert (back.champion, back.before) == ("1", ())
    on = advance(standing, Entry("outside", "7", "2", "7", "?", by="unknown"))
    assert (on.champion, on.before) == ("7", ("2", "1"))
    gone = advance(standing, Entry("outside", None, "2", None, "?", by="unknown"))
    assert (gone.champion, gone.before) == (None, ("2", "1"))


VERSIONS = st.sampled_from(["1", "2", "3", "4"])


@given(st.lists(st.tuples(st.sampled_from(["promote", "rollback", "outside", "reject"]), VERSIONS)))
def test_a_promotion_and_its_rollback_leave_things_as_they_were(steps):
    standing = Standing()
    for action, version in steps:
        to = standing.champion if action == "reject" else version
        if action != "reject" and version == standing.champion:
            continue
        standing = advance(standing, Entry(action, version, standing.champion, to, "?"))
        assert standing.champion not in standing.before
        assert len(set(standing.before)) == len(standing.before)
    there = advance(standing, promoted("9", standing.champion))
    if standing.champion is not None:
        back = advance(there, Entry("rollback", standing.champion, "9", standing.champion, "?"))
        assert (back.champion, back.before) == (standing.champion, standing.before)
    assert advance(there, Entry("revert", "9", "9", standing.champion, "?")).before == (
        standing.before
    )


def test_what_was_serving_at_a_time_is_the_last_move_before_it():
    begin = datetime(2026, 3, 3, 14, 0, tzinfo=UTC)

    def at(minutes):
        return (begin + timedelta(minutes=minutes)).isoformat(timespec="seconds")

    entries = [
        promoted("1", at=at(0), marks={"applied": at(0)}),
        Entry("reject", "2", "1", "1", "worse", at=at(2), marks={"applied": at(2)}),
        promoted("3", "1", at=at(5), marks={"applied": at(7)}),  # cut short, finished later
        promoted("4", "3", at=at(9)),  # not applied
    ]

    def served(minutes):
        found = serving_at(entries, begin + timedelta(minutes=minutes))
        return found and found.to

    assert [served(m) for m in (-1, 0, 4, 6, 7, 60)] == [None, "1", "1", "1", "3", "3"]


def test_who_is_the_named_user_or_the_login_name(monkeypatch):
    monkeypatch.setenv("ROUTELLM_USER", "ada")
    assert promoted("1").by == who() == "ada"
    monkeypatch.delenv("ROUTELLM_USER")
    monkeypatch.setenv("LOGNAME", "grace")
    assert who() == "grace"


# --- the copy in the home folder -----------------------------------------------------------------


def copied(path, whole, model="router"):
    mirror = Mirror(path, "sqlite:///x", model)
    mirror.extend(verified(whole, "h", REMEDY).written)
    return mirror


def compared(mirror, whole):
    mirror.compare(mirror.lines(), verified(whole, "h", REMEDY).written, "h", REMEDY)


def test_the_copy_grows_by_what_is_new(tmp_path):
    path, whole = tmp_path / "home" / "history.jsonl", rows(4)
    copied(path, whole[:2])
    copied(path, whole)
    mirror = copied(path, whole[:3])  # a reader that was slow takes nothing back
    assert [line["n"] for line in mirror.lines()] == [1, 2, 3, 4]
    compared(mirror, whole)


def test_a_history_cut_off_at_its_end_is_missed_by_the_copy(tmp_path):
    whole = rows(4)
    mirror = copied(tmp_path / "history.jsonl", whole)
    with pytest.raises(RegistryError, match=r"entry 3 of h is missing from MLflow, .*jsonl has it"):
        compared(mirror, whole[:2])


def test_a_last_entry_that_was_edited_with_its_hash_differs_from_the_copy(tmp_path):
    whole = rows(4)
    mirror = copied(tmp_path / "history.jsonl", whole)
    whole[3].tags = with_text(edited(whole, 3, by="mallory"))
    with pytest.raises(RegistryError, match="entry 4 of h is not the same in MLflow and in"):
        compared(mirror, whole)


@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (lambda lines: [lines[0].replace("better", "best"), *lines[1:]], "line 1 of .* was edited"),
        (lambda lines: [lines[0], lines[2]], "line 2 of .* is entry 3 where entry 2 should be"),
        (lambda lines: [lines[0], "{}", *lines[1:]], "line 2 of .* was edited"),
    ],
)
def test_a_copy_that_was_edited_says_which_line(tmp_path, tamper, says):
    path = tmp_path / "history.jsonl"
    mirror = copied(path, rows(3))
    path.write_text("\n".join(tamper(path.read_text().splitlines())) + "\n")
    with pytest.raises(RegistryError, match=says) as raised:
        mirror.lines()
    assert "move the file away" in str(raised.value)


def test_a_line_that_was_being_written_when_the_power_went_is_written_again(tmp_path):
    path, whole = tmp_path / "history.jsonl", rows(3)
    copied(path, whole)
    path.write_bytes(path.read_bytes()[:-20])
    mirror = copied(path, whole)
    assert [line["n"] for line in mirror.lines()] == [1, 2, 3]


def test_one_home_keeps_the_histories_of_several_models(tmp_path):
    path = tmp_path / "history.jsonl"
    one, other = copied(path, rows(3)), copied(path, rows(2), "other")
    assert (len(one.lines()), len(other.lines())) == (3, 2)


# --- in MLflow -----------------------------------------------------------------------------------


@pytest.fixture
def registry(tmp_path):
    registry = bare_registry(tmp_path / "home", 4)
    for version in ("1", "2", "3"):
        registry.promote(registry.get(version), PROMOTE, expected=registry.state().get("version"),
                         smoke=works)  # fmt: skip
    return registry


def tampered(registry, says):
    """Every way to the history says the same, and nothing moves."""
    for use in (
        registry.history,
        registry.state,
        registry.rollback,
        lambda: registry.promote(registry.get("4"), force_reason="now", smoke=works),
    ):
        with pytest.raises(RegistryError, match=says) as raised:
            use()
        assert "history.jsonl away" in str(raised.value)
    assert registry.aliases()["champion"] == "3"


@pytest.mark.slow
def test_an_entry_edited_in_mlflow_stops_every_move(registry):
    text = registry.history()[1].text().replace("better", "worse!")
    registry.client.set_model_version_tag("router-history", "2", "entry.0", text)
    tampered(registry, "entry 2 of router-history was edited")


@pytest.mark.slow
def test_an_entry_deleted_in_mlflow_stops_every_move(registry):
    registry.client.delete_model_version("router-history", "2")
    tampered(registry, "entry 2 of router-history is missing")


@pytest.mark.slow
def test_a_last_entry_deleted_in_mlflow_stops_every_move(registry):
    registry.client.delete_model_version("router-history", "3")
    tampered(registry, r"entry 3 of router-history is missing from MLflow, .*history\.jsonl has it")


@pytest.mark.slow
def test_a_new_history_begins_once_the_old_one_is_put_aside(registry):
    registry.client.delete_model_version("router-history", "2")
    registry.client.rename_registered_model("router-history", "router-history-2026")
    (registry.settings.home / "history.jsonl").rename(registry.settings.home / "old.jsonl")
    assert "version 3 was champion before the history began" in registry.repair()
    assert [e.action for e in registry.history()] == ["outside"]
    registry.rollback("2", smoke=works)
    assert registry.state()["version"] == registry.champion().version == "2"


@pytest.mark.slow
def test_a_long_decision_is_kept_whole_and_the_history_outlives_the_version(registry):
    long = {"prompts": ["x" * 1000] * 200}
    decision = type(PROMOTE)("promote", "much to say", long)
    registry.promote(registry.get("4"), decision, expected="3", smoke=works)
    assert registry.history()[-1].decision["numbers"] == long
    registry.client.delete_model_version("router", "4")
    entry = registry.history()[-1]
    assert (entry.to, entry.decision["numbers"], entry.snapshot) == ("4", long, "d" * 64)


@pytest.mark.slow
def test_a_home_that_cannot_be_written_stops_no_rollback_and_is_said(registry):
    path = registry.settings.home / "history.jsonl"
    path.unlink()
    path.symlink_to(registry.settings.home / "nowhere" / "history.jsonl")
    assert registry.rollback(smoke=works).version == "2"
    assert "the history was not copied to" in registry.notices[0]
