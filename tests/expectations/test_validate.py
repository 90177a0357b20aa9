import shutil
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import expectations
from expectations.profile import profile, psi, set_figures
from routellm.errors import ValidationError
from routellm.ingest import Staged
from routellm.lock import alone
from routellm.settings import ValidationSettings
from routellm.snapshots import SnapshotStore
from tests.conftest import REPOSITORY, battle_table


def staged(tmp_path: Path, table: pa.Table, previous=None) -> Staged:
    folder = tmp_path / "staging"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    pq.write_table(table, folder / "part-00000.parquet")
    return Staged(
        folder, (folder / "part-00000.parquet",), {}, len(table), len(table), 0, ("test",), (),
        False, previous,
    )  # fmt: skip


def check(tmp_path, settings, table, previous=None):
    store = SnapshotStore(settings.snapshots_dir())
    return expectations.validate(staged(tmp_path, table, previous), store, settings), store


def with_first(column, value):
    table = battle_table()
    return {column: [value, *table[column].to_pylist()[1:]]}


def test_good_battles_pass_every_rule(tmp_path, settings):
    found, _ = check(tmp_path, settings, battle_table())
    assert found.passed
    assert {r.name for r in found.rules} == {r.name for r in expectations.RULES}
    assert all(r.passed for r in found.rules)
    assert found.quarantine_path is None
    assert found.data_docs.exists()


@pytest.mark.parametrize(
    ("rule", "column", "value"),
    [
        ("models_named", "model_a", ""),
        ("models_named", "model_b", None),
        ("models_differ", "model_a", "m3"),
        ("winner_known", "winner", "modela"),
        ("winner_known", "winner", None),
        ("preference_in_range", "preference_a", 1.5),
        ("preference_in_range", "preference_a", None),
        ("prompt_not_empty", "prompt", " \n "),
        ("prompt_not_empty", "prompt", None),
        ("prompt_length", "prompt", "word " * 30_000),
        ("prompt_text", "prompt", "a\x00b"),
        ("prompt_text", "prompt", "caf\ufffd\ufffd"),
        ("label_kind_known", "label_kind", "guess"),
    ],
)
def test_a_bad_battle_is_quarantined_with_its_rule(tmp_path, settings, rule, column, value):
    found, _ = check(tmp_path, settings, battle_table(**with_first(column, value)))
    assert found.quarantined_by_rule == {rule: 1}
    (row,) = pq.read_table(found.quarantine_path).to_pylist()
    assert row["rule"] == rule
    assert row[column] == value
    assert sum(pq.ParquetFile(p).metadata.num_rows for p in found.checked_parts) == 199
    assert found.passed
    (result,) = [r for r in found.rules if r.name == rule]
    assert (result.passed, result.failed_rows) == (False, 1)


def test_a_battle_twice_is_quarantined(tmp_path, settings):
    ids = battle_table()["battle_id"].to_pylist()
    found, _ = check(tmp_path, settings, battle_table(battle_id=[ids[1], *ids[1:]]))
    assert found.quarantined_by_rule == {"id_unique": 2}


@pytest.mark.parametrize(
    ("rule", "table"),
    [
        ("enough_battles", lambda: battle_table(20)),
        ("tie_share", lambda: battle_table(winner=["tie"] * 200, preference_a=[0.5] * 200)),
        ("quarantine_share", lambda: battle_table(winner=["?"] * 80 + ["tie"] * 120)),
    ],
)
def test_a_critical_rule_on_the_set_stops(tmp_path, settings, rule, table):
    found, store = check(tmp_path, settings, table())
    assert not found.passed
    with pytest.raises(ValidationError, match=rule):
        found.raise_if_failed()
    assert store.latest() is None


@pytest.mark.slow
def test_drift_against_the_last_snapshot_is_a_warning(tmp_path, settings):
    first, store = check(tmp_path, settings, battle_table())
    manifest = store.commit(
        parts=first.checked_parts, cursors={}, previous=None, quarantined_by_rule={},
        validation=first.summary(), simulated=False,
    )  # fmt: skip
    longer = battle_table(prompt=[f"{'long ' * 200}{i}" for i in range(200)], model_a=["new"] * 200)
    found, _ = check(tmp_path, settings, longer, manifest)
    failed = {r.name for r in found.rules if not r.passed}
    assert failed == {"prompt_length_drift", "model_mix_drift"}
    assert found.passed


def test_what_a_killed_validation_left_half_written_holds_up_no_other(tmp_path, settings):
    check(tmp_path, settings, battle_table())
    gx = settings.home / "gx" / "gx"
    written = [p for p in gx.rglob("*") if p.suffix in (".json", ".yml") and p.is_file()]
    assert {p.parent.name for p in written} >= {
        "gx", "expectations", "validation_definitions", "checkpoints", "uncommitted",
    }  # fmt: skip
    for part in (0.5, 0.0):
        for path in written:
            raw = path.read_bytes()
            path.write_bytes(raw[: int(part * len(raw))])
        found, _ = check(tmp_path, settings, battle_table())
        assert found.passed


def test_validations_of_one_home_wait_for_each_other(tmp_path, settings):
    check(tmp_path, settings, battle_table())  # from here on it takes two seconds
    done = threading.Event()

    def validate():
        check(tmp_path, settings, battle_table())
        done.set()

    with alone(settings.home / "locks" / "validate"):
        thread = threading.Thread(target=validate)
        thread.start()
        assert not done.wait(5)
    assert done.wait(60)
    thread.join()


def test_another_schema_is_refused_before_any_rule(tmp_path, settings):
    with pytest.raises(ValidationError, match="not in the battle schema"):
        check(tmp_path, settings, battle_table().drop_columns(["turns"]))


def test_an_expectation_that_cannot_be_evaluated_is_a_failure(tmp_path, settings, monkeypatch):
    from expectations import rules

    real = rules.Rule.expectation

    def of_no_column(rule, settings):
        asked = real(rule, settings)
        return asked.copy(update={"column": "gone"}) if rule.name == "tie_share" else asked

    monkeypatch.setattr(rules.Rule, "expectation", of_no_column)
    with pytest.raises(ValidationError, match="tie_share could not be evaluated"):
        check(tmp_path, settings, battle_table())


@pytest.mark.slow
def test_a_published_snapshot_can_be_checked_again(tmp_path, settings):
    first, store = check(tmp_path, settings, battle_table())
    manifest = store.commit(
        parts=first.checked_parts, cursors={}, previous=None, quarantined_by_rule={},
        validation=first.summary(), simulated=False,
    )  # fmt: skip
    assert expectations.validate_snapshot(manifest, store, settings).passed
    strict = settings.model_copy(update={"validation": ValidationSettings(min_battles=1000)})
    assert not expectations.validate_snapshot(manifest, store, strict).passed


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=8))
def test_psi_is_zero_for_the_same_mix_and_never_negative(counts):
    assert psi(counts, [3 * c for c in counts]) == pytest.approx(0.0, abs=1e-12)
    assert psi(counts, counts[::-1]) >= 0.0


def test_the_profile_of_nothing_has_figures():
    empty = profile([])
    assert set_figures(empty, empty, None, 0)["rows"] == 0.0


def test_the_rules_table_in_the_docs_is_this_one():
    assert expectations.rules_table() in (REPOSITORY / "docs" / "validation.md").read_text()
