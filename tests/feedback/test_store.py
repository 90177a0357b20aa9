"""The store: what is added stays as it was added, on both backends."""

from __future__ import annotations

import multiprocessing
import sqlite3
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from routellm.errors import UsageError
from routellm.feedback import schema
from routellm.feedback.engine import engine_of, parse_url
from routellm.feedback.errors import FeedbackError, FeedbackUnreachable
from routellm.feedback.records import Decided, Dueled, Judged
from routellm.feedback.store import FeedbackStore
from tests.feedback.records import NOW, decided, dueled, judged, rows
from tests.support.servers import free_port


def test_a_decision_is_found_by_the_response_id_and_by_the_request_id(store):
    one = decided("chatcmpl-7")
    store.append([one, decided("chatcmpl-8")])
    for quoted in ("chatcmpl-7", "req-chatcmpl-7"):
        assert store.find(quoted) == replace(one, user=None, prompt=None)
    assert store.find("chatcmpl-9") is None


def test_every_field_of_a_record_is_kept(store, url):
    store.append([decided(), judged("j1"), dueled()])
    (d,) = rows(url, "feedback_decisions")
    (p,) = rows(url, "feedback_prompts")
    (j,) = rows(url, "feedback_judgements")
    (u,) = rows(url, "feedback_duels")
    for record, row in (
        (decided(), {**d, "prompt": p["prompt"]}),
        (judged("j1"), j),
        (dueled(), u),
    ):
        for field in fields(record):
            if field.name not in ("uid", "at", "user", "by"):
                assert row[field.name] == getattr(record, field.name), field.name
    assert d["at_us"] == 1772366400123456
    assert (j["judge"], u["judge"]) == ("user", "gpt-judge")


def test_of_two_decisions_with_one_id_the_latest_is_found(store):
    store.append([decided(version="2", at=NOW - timedelta(hours=1)), decided(version="3")])
    assert store.find("chatcmpl-1").version == "3"


def test_a_record_written_twice_is_stored_once(store):
    records = [decided(), judged("j1"), dueled()]
    store.append(records)
    store.append(records)
    assert store.count() == {"decisions": 1, "prompts": 1, "judgements": 1, "duels": 1}


def test_counts_of_challengers_are_put_over_older_ones_until_they_are_removed(store):
    store.keep_online({"2.a.json": "one", "3.a.json": "two"})
    store.keep_online({"2.a.json": "three"})
    store.keep_online({})
    assert store.online() == {"2.a.json": "three", "3.a.json": "two"}
    store.remove_online({"2.a.json", "4.a.json"})
    assert store.online() == {"3.a.json": "two"}


def test_a_batch_is_added_whole_or_not_at_all(store):
    store.open()
    with pytest.raises(FeedbackError):
        store.append([decided("chatcmpl-2"), decided(probability=None)])
    assert store.count()["decisions"] == 0


def test_text_that_a_database_does_not_take_is_stored_without_it(store):
    store.append([decided("a\0b", prompt="half \ud83d a pair\0", reason="\0", user="\udfff")])
    assert store.find("a\0b").id == "a�b"
    store.append([judged("j1", of="a\0b")])
    (outcome,) = store.outcomes()
    assert outcome.prompt == "half ? a pair�"


def test_an_id_of_any_length_is_found(store):
    long = "x" * 100_000
    store.append([decided(long), judged("j1", of=long)])
    assert store.find(long).route == "weak"
    assert len(list(store.outcomes())) == 1


def test_a_users_id_is_not_stored_and_stores_do_not_share_its_digest(store, url, tmp_path):
    store.append([decided(user="ada@example.com")])
    (row,) = rows(url, "feedback_decisions")
    assert "ada" not in str(row)
    assert row["user_digest"] == store.digest("ada@example.com")
    other = FeedbackStore(str(tmp_path / "other.db"))
    assert other.digest("ada@example.com") != row["user_digest"]
    assert FeedbackStore(url).digest("ada@example.com") == row["user_digest"]


def test_forgetting_a_user_removes_all_of_them_and_nothing_of_others(store):
    store.append(
        [
            decided("a1", user="ada"), decided("a2", user="ada"), decided("b1", user="bob"),
            decided("c1", user=None), judged("j1", of="a1"), judged("j2", of="req-a2"),
            judged("j3", of="b1"), dueled(of="a1"), dueled(of="b1"),
        ]
    )  # fmt: skip
    assert store.forget("ada") == 2
    assert store.count() == {"decisions": 2, "prompts": 2, "judgements": 1, "duels": 1}
    assert store.find("b1") is not None
    assert store.forget("ada") == 0
    assert store.forget("nobody") == 0


def test_a_prompt_goes_when_its_time_is_over_and_its_decision_stays(store):
    store.append([decided("old", at=NOW - timedelta(days=31)), decided("new")])
    assert store.purge(NOW, keep_days=30) == 1
    assert store.count() == {"decisions": 2, "prompts": 1, "judgements": 0, "duels": 0}
    assert store.purge(NOW, keep_days=30) == 0


@pytest.mark.parametrize("way", ["forget", "purge"])
def test_what_is_removed_is_in_no_file_any_more(tmp_path, way):
    store = FeedbackStore(str(tmp_path / "feedback.db"))
    needle = "a-needle-in-a-prompt"
    store.append([decided(str(i), prompt=f"{needle} {i}") for i in range(200)])

    def found():
        return [p.name for p in tmp_path.iterdir() if needle.encode() in p.read_bytes()]

    assert found()
    other = sqlite3.connect(tmp_path / "feedback.db")  # a gateway that has it open
    other.execute("SELECT count(*) FROM feedback_prompts").fetchall()
    if way == "forget":
        store.forget("ada")
    else:
        store.purge(NOW + timedelta(days=2), keep_days=1)
    assert found() == []
    other.close()


def test_outcomes_come_with_their_decision_those_of_one_together(store):
    store.append([decided("a"), decided("b", prompt="Two?"), decided("c", prompt=None)])
    store.append([judged("j1", of="a", s=3), judged("j2", of="req-b"), dueled(of="a", s=1)])
    store.append([judged("j3", of="c"), judged("j4", of="unknown")])
    found = sorted((o.prompt, o.kind, o.value, o.by) for o in store.outcomes())
    assert found == [
        ("Two?", "thumbs", "down", "user"),
        ("Why is the sky blue?", "duel", "strong", "gpt-judge"),
        ("Why is the sky blue?", "thumbs", "down", "user"),
    ]
    of_a = [o for o in store.outcomes() if o.prompt.startswith("Why")]
    assert [o.kind for o in of_a] == ["duel", "thumbs"]
    assert len({o.decision for o in of_a}) == 1


def test_a_judgement_is_of_the_latest_decision_before_it(store):
    store.append([decided(prompt=str(hour), at=NOW + timedelta(hours=hour)) for hour in range(3)])
    store.append([judged("j1", s=3600 + 60)])
    assert [o.prompt for o in store.outcomes()] == ["1"]


def test_an_answer_that_failed_is_judged_of_no_model(store):
    store.append([decided(status=500), judged("j1")])
    assert list(store.outcomes()) == []
    assert store.outcomes_seen()["outcomes"] == 0


def test_what_was_seen_changes_with_every_outcome(store):
    seen = [store.outcomes_seen()]
    store.append([decided("a"), judged("j1", of="a")])
    seen.append(store.outcomes_seen())
    store.append([decided("b"), judged("j2", of="b", s=0)])
    seen.append(store.outcomes_seen())
    store.append([decided("d")])  # nobody has said anything of it
    assert store.outcomes_seen() == seen[-1]
    assert len({str(s) for s in seen}) == 3


def test_a_store_of_a_later_schema_is_one_clear_sentence(store, url):
    store.open()
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO feedback_schema VALUES (99, 0)")
    engine.dispose()
    with pytest.raises(
        FeedbackError, match=r"has schema 99, and this software knows \d+: .*update"
    ):
        FeedbackStore(url).open()


def test_an_older_store_is_brought_up_to_date_with_its_rows(url, monkeypatch):
    old = FeedbackStore(url)
    old.append([decided()])
    steps = range(1, len(schema.STEPS) + 2)
    step = "ALTER TABLE feedback_duels ADD COLUMN seconds DOUBLE PRECISION DEFAULT 0"
    monkeypatch.setattr(schema, "STEPS", (*schema.STEPS, (step,)))
    new = FeedbackStore(url)
    new.append([dueled()])
    assert new.find("chatcmpl-1").version == "3"
    assert rows(url, "feedback_duels")[0]["seconds"] == 0
    assert [r["step"] for r in rows(url, "feedback_schema")] == list(steps)
    old.append([dueled()])  # the gateway of before goes on writing
    assert old.count()["duels"] == 2


def test_decisions_are_found_by_time_through_an_index_in_a_store_of_before_too(url, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(schema, "STEPS", schema.STEPS[:1])
        FeedbackStore(url).append([decided()])
    assert "at_us" not in indexed(url)
    FeedbackStore(url).open()
    assert "at_us" in indexed(url)
    assert rows(url, "feedback_decisions")[0]["at_us"] == 1772366400123456


def indexed(url):
    """Return the columns of decisions that have an index."""
    engine = engine_of(parse_url(url))
    found = sa.inspect(engine).get_indexes("feedback_decisions")
    engine.dispose()
    return {name for one in found for name in one["column_names"]}


def test_a_migration_that_fails_leaves_the_store_as_it_was(url, monkeypatch):
    FeedbackStore(url).append([decided()])
    steps = (*schema.STEPS, ("CREATE TABLE feedback_more (x TEXT)", "CREATE TABEL feedback_even"))
    with monkeypatch.context() as patched:
        patched.setattr(schema, "STEPS", steps)
        with pytest.raises(FeedbackError):
            FeedbackStore(url).open()
    assert FeedbackStore(url).count()["decisions"] == 1
    monkeypatch.setattr(schema, "STEPS", (*schema.STEPS, ("CREATE TABLE feedback_more (x TEXT)",)))
    FeedbackStore(url).open()
    assert rows(url, "feedback_more") == []


def _fill(url: str, start, which: int, done) -> None:
    start.wait()
    store = FeedbackStore(url)
    for i in range(20):
        store.append([decided(f"{which}-{i}-{k}") for k in range(5)])
    store.close()
    done.put(which)


@pytest.mark.slow
def test_processes_that_make_and_fill_one_store_at_once_lose_nothing(url):
    context = multiprocessing.get_context("spawn")
    start, done = context.Barrier(3), context.Queue()
    workers = [context.Process(target=_fill, args=(url, start, i, done)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [w.exitcode for w in workers] == [0, 0, 0]
    store = FeedbackStore(url)
    assert store.count()["decisions"] == store.count()["prompts"] == 300
    assert len(rows(url, "feedback_meta")) == 1  # one salt, or users would be forgotten by half


def test_a_store_that_does_not_answer_is_one_clear_sentence(tmp_path):
    away = FeedbackStore(f"postgresql://u:hunter2@127.0.0.1:{free_port()}/feedback")
    with pytest.raises(FeedbackUnreachable, match="does not answer") as raised:
        away.open()
    assert "hunter2" not in str(raised.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(FeedbackUnreachable, match="folder can be written to"):
        FeedbackStore(str(tmp_path / "file" / "feedback.db")).open()


def test_a_file_that_is_no_store_is_one_clear_sentence(tmp_path):
    (tmp_path / "feedback.db").write_text("no database at all, but long enough to be one" * 100)
    with pytest.raises(FeedbackError, match="see that it is one"):
        FeedbackStore(str(tmp_path / "feedback.db")).open()


@pytest.mark.parametrize("bad", ["mysql://u@h/db", "sqlite://", "://"])
def test_another_address_is_refused_with_the_forms_that_are_taken(bad):
    with pytest.raises(UsageError, match="give sqlite:///path or postgresql://"):
        FeedbackStore(bad)


def test_an_error_quotes_no_prompt_and_no_password(store):
    store.open()
    with pytest.raises(FeedbackError) as raised:
        store.append([decided(prompt="my secret plan", reason="my secret plan", probability=None)])
    assert "secret plan" not in str(raised.value)


def test_feedback_of_an_unknown_kind_or_value_is_refused():
    with pytest.raises(UsageError, match="no kind of feedback 'stars': give one of thumbs"):
        Judged("j", NOW, "d", "stars", "5")
    with pytest.raises(UsageError, match="'6' is no value of rating: give one of 1, 2"):
        Judged("j", NOW, "d", "rating", "6")
    with pytest.raises(UsageError, match="strong, weak or tie, not 'both'"):
        Dueled("d", NOW, "weak", "both", "user")


def test_a_records_text_shows_no_prompt():
    assert "sky" not in repr(decided())
    assert isinstance(decided(), Decided)


def test_the_stores_name_has_no_password(tmp_path: Path):
    assert FeedbackStore("postgresql://u:pw@db:5433/x").name == "postgresql://db:5433/x"
    assert FeedbackStore(str(tmp_path / "f.db")).name == str(tmp_path / "f.db")
