"""From feedback to battles: the table in docs/feedback.md, and what ingest makes of it."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routellm.battles import BATTLE_SCHEMA
from routellm.errors import SourceError, SourceUnreachable, UsageError
from routellm.feedback import store_url
from routellm.feedback.records import VALUES, Judged, Outcome
from routellm.feedback.store import FeedbackStore
from routellm.ingest import stage
from routellm.settings import Settings
from routellm.snapshots import SnapshotStore
from routellm.sources import open_source
from routellm.sources.gateway import winner_of
from tests.conftest import REPOSITORY
from tests.feedback.records import NOW, decided, dueled, judged
from tests.support.servers import free_port


def battles(url, settings):
    source = open_source(f"gateway://{url}", settings)
    return [row for batch in source.batches(None) for row in batch.to_pylist()]


def outcome(route="weak", kind="thumbs", value="down", by="user"):
    return Outcome("d", "p", route, "m", "o", "j", NOW, kind, value, by)


MAPPING = [
    ("vote", "strong", "weak", "strong"), ("vote", "weak", "strong", "weak"),
    ("judge", "tie", "strong", "tie"), ("duel", "weak", "weak", "weak"),
    ("other_was_better", "yes", "weak", "strong"), ("other_was_better", "yes", "strong", "weak"),
    ("thumbs", "down", "weak", "strong"), ("thumbs", "up", "weak", "tie"),
    ("thumbs", "down", "strong", None), ("thumbs", "up", "strong", None),
    ("rating", "1", "weak", "strong"), ("rating", "2", "weak", "strong"),
    ("rating", "3", "weak", None), ("rating", "4", "weak", "tie"), ("rating", "5", "weak", "tie"),
    ("rating", "1", "strong", None), ("rating", "5", "strong", None),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "value", "route", "winner"), MAPPING)
def test_each_kind_of_feedback_says_who_won_or_nothing(kind, value, route, winner):
    assert winner_of(outcome(route, kind, value)) == winner


def test_every_kind_and_value_is_mapped():
    for kind, values in VALUES.items():
        for value in values:
            for route in ("strong", "weak"):
                assert winner_of(outcome(route, kind, value)) in ("strong", "weak", "tie", None)


def test_the_documents_table_is_what_the_code_does():
    page = (REPOSITORY / "docs" / "feedback.md").read_text()
    said = re.findall(r"^\| `(\w+)` (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", page, re.M)
    assert {kind for kind, *_ in said} == {*VALUES, "duel"}
    checked = 0
    for kind, values, weak, strong, _ in said:
        names = re.findall(r"`(\w+)`", values)
        for value in names:
            for route, cell in (("weak", weak), ("strong", strong)):
                found = winner_of(outcome(route, kind, value))
                expected = {"that one": value, "none": None}.get(cell, cell.replace(" wins", ""))
                assert found == expected, (kind, value, route)
                checked += 1
    assert checked == 2 * (sum(map(len, VALUES.values())) + 3)


def test_a_judged_decision_becomes_a_feedback_battle_in_the_schema(store, url, settings):
    store.append([decided(model="Small-1 ", other_model="gpt4_1106_preview"), judged("j1")])
    (battle,) = battles(url, settings)
    assert len(battle.pop("battle_id")) == 32
    assert battle == {
        "prompt": "Why is the sky blue?", "model_a": "gpt-4-1106-preview", "model_b": "small-1",
        "winner": "model_a", "preference_a": 1.0, "label_kind": "feedback", "judge": None,
        "source": open_source(f"gateway://{url}", settings).name, "category": None,
        "language": None, "turns": None, "voted_at": NOW + timedelta(seconds=1),
    }  # fmt: skip
    batch = next(iter(open_source(f"gateway://{url}", settings).batches(None)))
    assert batch.schema == BATTLE_SCHEMA


def test_the_pair_has_one_order_whoever_answered(store, url, settings):
    store.append([decided("a"), decided("b", route="strong", model="large", other_model="small")])
    store.append(
        [dueled(of="a", winner="weak"), judged("j", of="b", kind="other_was_better", value="yes")]
    )
    found = battles(url, settings)
    assert {(b["model_a"], b["model_b"], b["winner"]) for b in found} == {
        ("large", "small", "model_b")
    }
    assert sorted(str(b["judge"]) for b in found) == ["None", "gpt-judge"]


def test_one_decision_is_one_battle_the_strongest_then_the_latest(store, url, settings):
    store.append(
        [decided("a"), judged("1", of="a", value="down", s=1), judged("2", of="a", value="up", s=2)]
    )
    assert [b["winner"] for b in battles(url, settings)] == ["tie"]
    store.append([dueled(of="a", winner="weak", s=1)])
    assert [b["winner"] for b in battles(url, settings)] == ["model_b"]
    store.append([judged("3", of="a", kind="vote", value="strong", s=1)])
    store.append([judged(f"4{i}", of="a", value="up", s=10 + i) for i in range(50)])
    assert [b["winner"] for b in battles(url, settings)] == ["model_a"]


@given(st.permutations(range(4)))
def test_the_order_in_which_feedback_is_written_does_not_matter(tmp_path_factory, order):
    store = FeedbackStore(str(tmp_path_factory.mktemp("f") / "feedback.db"))
    written = [
        decided("a"), judged("1", of="a", value="up", s=2),
        judged("2", of="a", value="down", s=3), judged("3", of="a", kind="rating", value="5", s=9),
    ]  # fmt: skip
    for i in order:
        store.append([written[i]])
    (battle,) = battles(store.name, Settings())
    assert battle["winner"] == "model_a"


def test_decisions_without_a_prompt_or_that_say_nothing_make_no_battle(store, url, settings):
    store.append(
        [
            decided("a", prompt=None), judged("1", of="a"), decided("b", route="strong"),
            judged("2", of="b"), decided("c"), judged("3", of="c", kind="rating", value="3"),
            decided("d", status=502), judged("4", of="d"), decided("e"),
        ]
    )  # fmt: skip
    assert battles(url, settings) == []


def test_ingest_takes_each_battle_once_and_sees_when_there_is_nothing_new(settings):
    store = FeedbackStore(store_url(settings))
    snapshots = SnapshotStore(settings.snapshots_dir())
    store.append(
        [
            d
            for i in range(40)
            for d in (decided(f"a{i}", prompt=f"What is {i}?"), judged(f"j{i}", of=f"a{i}"))
        ]
    )

    def ingested():
        staged = stage(["gateway://"], snapshots, settings)
        if staged.new:
            snapshots.commit(
                parts=staged.parts, cursors=staged.cursors, previous=staged.previous,
                quarantined_by_rule={}, validation={}, simulated=staged.simulated,
            )  # fmt: skip
        staged.discard()
        return staged.new, bool(staged.unchanged)

    assert ingested() == (40, False)
    assert ingested() == (0, True)
    store.append([decided("b", prompt="What is new?")])
    assert ingested() == (0, True)
    store.append([judged("jb", of="b", s=-0.0)])
    assert ingested() == (1, False)
    assert store.purge(NOW + timedelta(days=9), keep_days=1) == 41
    assert ingested() == (0, False)  # read again, and what was ingested stays
    assert snapshots.latest().rows == 41


def test_the_homes_own_store_is_the_default_and_its_absence_is_one_sentence(settings, tmp_path):
    with pytest.raises(
        SourceError, match=r"no feedback store .*/feedback\.db: the gateway makes it"
    ):
        open_source("gateway://", settings)
    assert not (settings.home / "feedback.db").exists()
    store = FeedbackStore(store_url(settings))
    store.append([decided(), judged("j1")])
    own = open_source("gateway://", settings)
    named = open_source(f"gateway://{settings.home / 'feedback.db'}", settings)
    assert own.name == named.name == f"gateway://{(settings.home / 'feedback.db').resolve()}"
    assert own.cursor() == named.cursor()
    assert not own.simulated


def test_a_store_that_does_not_answer_is_worth_another_try_and_shows_no_password(settings):
    url = f"postgresql://u:hunter2@127.0.0.1:{free_port()}/x"
    source = open_source(f"gateway://{url}", settings)
    assert "hunter2" not in source.name
    for ask in (source.cursor, lambda: list(source.batches(None))):
        with pytest.raises(SourceUnreachable) as raised:
            ask()
        assert "hunter2" not in str(raised.value)
    with pytest.raises(UsageError, match="give sqlite"):
        open_source("gateway://mysql://u@h/x", settings)


def test_many_battles_come_in_batches(store, url, settings):
    store.append([decided(str(i), prompt=f"p{i}") for i in range(1200)])
    store.append([Judged(f"j{i}", NOW, str(i), "thumbs", "up") for i in range(1200)])
    batches = list(open_source(f"gateway://{url}", settings).batches(None))
    assert [len(b) for b in batches] == [1000, 200]
    assert len({i for b in batches for i in b.column("battle_id").to_pylist()}) == 1200
