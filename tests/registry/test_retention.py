"""What compaction takes from MLflow, what it never takes, and that a kill in it loses nothing."""

import json
import threading
from datetime import UTC, datetime, timedelta

import pytest

from registry import moves, old_runs, retention
from registry.client import connect
from registry.log import log_trial, retraining_run
from registry.old_runs import _pages
from routellm.errors import RegistryError, UsageError
from routellm.routers.base import FitReport
from routellm.settings import RetentionSettings
from tests.support.bare import bare_registry, bare_version, promote, whole, works
from tests.support.versions import MANIFEST, add_version
from tests.unit.test_retention import age

pytestmark = pytest.mark.slow

LATER = datetime.now(UTC) + timedelta(days=60)  # by then all that a test makes is old


def keeping(registry, **how):
    registry.settings = registry.entries.settings = registry.settings.model_copy(
        update={"retention": RetentionSettings(**how)}
    )
    return registry


def compact(registry, now=LATER):
    return retention.carry_out(retention.plan(registry, now), registry)


def runs(registry):
    experiment = registry.client.get_experiment_by_name(registry.settings.experiment)
    return {run.info.run_id for run in registry.client.search_runs([experiment.experiment_id])}


def models(registry):
    experiment = registry.client.get_experiment_by_name(registry.settings.experiment)
    found = registry.client.search_logged_models([experiment.experiment_id])
    return {model.source_run_id: model for model in found}


def files(uri):
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(uri).list_artifacts()


def test_live_and_previous_versions_stay_whole_and_an_old_one_goes_with_all_that_is_its_own(
    registry, planted, encoder
):
    keeping(registry, versions=1)
    made = [add_version(registry, planted, encoder, seed) for seed in (1, 2, 3)]
    with retraining_run(registry, MANIFEST, what="compare") as compared:
        log_trial(
            registry, kind="random", augmentation="both", seed=9, training_key="t",
            report=FitReport({}, {}, {}), evaluations={}, simulated=False, parent_run_id=compared,
        )  # fmt: skip
    promote(registry, "2", "3")
    model, run = models(registry)[made[0].run_id], registry.client.get_run(made[0].run_id)
    parent = run.data.tags["mlflow.parentRunId"]
    assert files(model.artifact_location)
    assert files(run.info.artifact_uri)
    before = runs(registry)

    decided = retention.plan(registry, LATER)
    assert decided.kept == {"3": "champion", "2": "previous"}
    assert [one.name for one in decided.of("version")] == ["1"]
    assert runs(registry) == before  # nothing is gone by deciding
    assert retention.carry_out(decided, registry) == ["1"]

    assert {v.version for v in registry.versions()} == {"2", "3"}
    assert not files(model.artifact_location)
    assert not files(run.info.artifact_uri)
    gone = before - runs(registry)
    assert {made[0].run_id, parent, compared} < gone
    assert len(gone) == 4  # and the trial
    assert set(models(registry)) == {made[1].run_id, made[2].run_id}
    for number in ("2", "3"):
        registry.bundle(registry.get(number)).check_golden()
        assert registry.evaluations(registry.get(number))
    history = registry.history()
    assert [e.action for e in history] == ["promote", "promote", "retire"]
    assert history[-1].reason == "retention: removing version 1"
    assert whole(registry)
    assert retention.plan(registry, LATER).of("version", "model", "run") == []
    assert registry.rollback(smoke=works).version == "2"


@pytest.fixture
def bare(tmp_path):
    """Four versions with a file each, of which the third is champion and the second was before."""
    registry = bare_registry(tmp_path / "home", lease_s=0.4)
    for _ in range(4):
        info = bare_version(registry)
        registry.client.log_text(info.run_id, "x", "file.txt")
    promote(registry, "2", "3")
    return keeping(registry, versions=1)


def test_what_is_young_or_in_the_young_history_stays(bare):
    assert set(retention.plan(bare).kept) == {"1", "2", "3", "4"}  # made today
    promote(bare, "1")
    bare.rollback(smoke=works)
    in_two_days = datetime.now(UTC) + timedelta(days=2)
    kept = retention.plan(bare, in_two_days).kept
    assert kept["1"].startswith("in the history of ")
    assert set(retention.plan(bare, LATER).kept) == {"2", "3", "4"}


def test_a_version_in_line_or_under_any_other_alias_stays(bare):
    bare.set_challenger(bare.get("1"))
    bare.client.set_registered_model_alias(bare.model, "canary-eu", "1")
    assert retention.plan(bare, LATER).kept["1"] == "canary-eu, challenger"
    assert compact(bare) == []
    assert len(bare.versions()) == 4


def test_a_snapshot_that_a_version_names_stays_and_so_does_one_in_the_young_history(bare):
    digest, now = "d" * 64, datetime.now(UTC)
    assert retention._named_snapshots(bare, bare.versions(), LATER) == {digest: "version 1"}
    assert retention._named_snapshots(bare, [], now)[digest].startswith("in the history of ")
    assert retention._named_snapshots(bare, [], LATER) == {}


def test_a_version_that_came_to_be_needed_after_the_plan_stays(bare):
    decided = retention.plan(bare, LATER)
    assert [one.name for one in decided.of("version")] == ["1"]
    bare.set_challenger(bare.get("1"))
    assert retention.carry_out(decided, bare) == []
    assert bare.get("challenger").version == "1"
    assert bare.client.list_artifacts(bare.get("1").run_id)
    assert bare.history()[-1].action == "challenger"  # nothing was retired


def test_a_version_cannot_be_promoted_while_it_is_being_removed(bare, monkeypatch):
    told = []

    def promote_it():
        other = connect(bare.settings)
        try:
            other.promote(info, force_reason="at the same time", smoke=works)
        except (UsageError, RegistryError) as error:
            told.append(str(error))

    info = bare.get("1")
    bare.settings = bare.settings.model_copy(
        update={"promotion": bare.settings.promotion.model_copy(update={"lease_s": 20.0})}
    )
    thread = threading.Thread(target=promote_it)

    def step(name):
        if name == "before version 1":
            thread.start()
            thread.join(1.5)
            assert thread.is_alive()  # it waits for what is not finished

    monkeypatch.setattr(moves, "step", step)
    assert compact(bare) == ["1"]
    thread.join(30)
    assert "has no version 1, it may have been deleted" in told[0]
    assert bare.champion().version == "3"
    assert whole(bare)


def test_versions_of_another_registered_model_in_the_same_experiment_are_left_alone(bare):
    other = connect(bare.settings.model_copy(update={"model": "another"}))
    theirs = bare_version(other)
    bare.client.set_tag(theirs.run_id, "role", "version")
    compact(bare)
    assert theirs.run_id in runs(bare)
    assert bare.client.get_model_version("another", theirs.version)


class Killed(BaseException):
    pass


def test_killed_at_any_step_it_leaves_what_is_needed_and_the_next_one_finishes(
    tmp_path, monkeypatch
):
    seen: list[str] = []
    for nth in range(1, 30):
        registry = bare_registry(tmp_path / f"home-{nth}", lease_s=0.3)
        for _ in range(4):
            info = bare_version(registry)
            registry.client.log_text(info.run_id, "x", "file.txt")
        promote(registry, "2", "3")
        keeping(registry, versions=1)
        left = nth

        def step(name):
            nonlocal left
            left -= 1
            if not left:
                seen.append(name)
                raise Killed(name)

        def artifacts(uri, real=old_runs._delete_artifacts):
            step("before artifacts")
            real(uri)
            step("artifacts")

        with monkeypatch.context() as patch:
            patch.setattr(moves, "step", step)
            patch.setattr(old_runs, "_delete_artifacts", artifacts)
            try:
                compact(registry)
            except Killed:
                pass
            else:
                break
        registry = keeping(connect(registry.settings), versions=1)
        for number in ("2", "3", "4"):
            assert registry.client.list_artifacts(registry.get(number).run_id)
        assert registry.champion().version == "3"
        # the run of a version that is gone is found again by its role, as retraining leaves it
        for run_id in runs(registry):
            registry.client.set_tag(run_id, "role", "version")
        compact(registry)
        assert {v.version for v in registry.versions()} == {"2", "3", "4"}
        assert len(runs(registry)) == 3
        assert registry.rollback(smoke=works).version == "2"
        assert whole(registry)
    assert {"entry", "before version 1", "version 1", "artifacts"} <= set(seen)


def test_the_verb_says_what_goes_and_removes_nothing_in_a_dry_run(bare):
    import typer.testing

    from routellm.cli.app import app

    left = bare.settings.home / "trained" / "key"
    left.mkdir(parents=True)
    age(left, 30)

    def verb(*args):
        command = ["--home", str(bare.settings.home), "compact", *args]
        done = typer.testing.CliRunner().invoke(app, command, env={"COLUMNS": "120"})
        assert done.exit_code == 0, done.output
        return done.output

    assert "nothing was removed (--dry-run)" in verb("--dry-run")
    assert left.exists()
    doc = json.loads(verb("--json"))
    assert [one["name"] for one in doc["removals"]] == ["trained/key"]
    assert set(doc["versions_kept"]) == {"1", "2", "3", "4"}
    assert not left.exists()
    assert "nothing to remove" in verb()


def test_a_history_that_was_tampered_with_stops_it(bare):
    bare.client.set_model_version_tag(f"{bare.model}-history", "1", "entry.0", "{}")
    with pytest.raises(RegistryError, match="tampered with"):
        retention.plan(bare, LATER)
    assert len(bare.versions()) == 4


def test_all_pages_are_read():
    class Page(list):
        token = None

    def ask(max_results, page_token):
        page = Page([page_token])
        page.token = {None: "a", "a": "b", "b": ""}[page_token]
        return page

    assert list(_pages(ask)) == [None, "a", "b"]
