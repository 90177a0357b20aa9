"""The steps of a retraining: what a kill leaves, what is done once, what is refused."""

import hashlib

import mlflow
import pytest

import expectations
from flows import trained as trained_routers
from flows import trials, work
from flows.engine import configure
from flows.promotion import promote_best
from flows.wanted import trained_snapshots
from registry import connect
from registry.log import retraining_run
from routellm import training
from routellm.battles import prompt_split
from routellm.errors import BenchmarkError, SourceError, SourceUnreachable, UsageError
from routellm.ingest import stage
from routellm.settings import Settings
from routellm.snapshots import SnapshotStore
from tests.conftest import HashEncoder

pytestmark = pytest.mark.slow
SOURCES = ["simulated://arena?battles=3000"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A home with a validated snapshot."""
    settings = Settings(
        home=tmp_path_factory.mktemp("flow") / "home",
        evaluation={"bootstrap": 100},
        training={"routers": ("random", "knn")},
    )
    store = SnapshotStore(settings.snapshots_dir(simulated=True))
    staged = stage(SOURCES, store, settings)
    found = expectations.validate(staged, store, settings)
    manifest = store.commit(
        parts=found.checked_parts, cursors=staged.cursors, previous=None,
        quarantined_by_rule={}, validation=found.summary(), simulated=True,
    )  # fmt: skip
    staged.discard()
    return settings, store, manifest


@pytest.fixture
def plan(prepared):
    settings, store, manifest = prepared
    return work.plan_of(manifest, store, HashEncoder(), SOURCES, settings)


@pytest.fixture
def registry(prepared):
    return connect(prepared[0])


@pytest.fixture
def no_work(monkeypatch):
    """Let nothing be trained or measured from here on."""

    def refuse(*args, **kwargs):
        raise AssertionError("this was done before")

    def forbid():
        monkeypatch.setattr(training, "train", refuse)
        monkeypatch.setattr(trained_routers, "measure", refuse)

    return forbid


def test_a_run_that_is_killed_between_steps_goes_on_where_it_was(plan, prepared, registry, no_work):
    settings, _, manifest = prepared
    trained = trained_routers.train_router("knn", plan, settings)
    figures = trained_routers.evaluate_router(trained, plan, settings)
    no_work()
    again = trained_routers.train_router("knn", plan, settings)
    assert again == trained
    assert trained_routers.evaluate_router(again, plan, settings) == figures
    with retraining_run(registry, manifest) as parent:
        first = trained_routers.register_router(again, plan, registry, parent)
    assert not trained.folder.exists()
    assert first.evaluations == figures
    assert work.find_done(["knn", "random"], plan, registry, settings) == {"knn": first.version}


def test_a_router_is_registered_once_however_often_it_is_asked_for(plan, prepared, registry):
    settings, _, manifest = prepared
    versions = []
    for _ in range(2):
        trained = trained_routers.train_router("random", plan, settings)
        trained_routers.evaluate_router(trained, plan, settings)
        with retraining_run(registry, manifest) as parent:
            versions.append(
                trained_routers.register_router(trained, plan, registry, parent).version.version
            )
    assert versions[0] == versions[1]


def test_a_retraining_of_random_alone_ends_with_its_verdict_once(plan, prepared, registry):
    settings, _, manifest = prepared
    with retraining_run(registry, manifest) as parent:
        trained = trained_routers.train_router("random", plan, settings)
        trained_routers.evaluate_router(trained, plan, settings)
        measured = trained_routers.register_router(trained, plan, registry, parent)
    for _ in range(2):  # asked for again, it is not written down again
        decision = promote_best([measured], plan.primary, registry)
        assert decision.outcome == "reject"
    version = measured.version.version
    verdicts = [e.action for e in registry.history() if e.version == version]
    assert verdicts == ["reject"]
    assert trained_snapshots(registry.versions(), registry.history(), [manifest]) == [manifest]
    assert registry.champion() is None


def test_a_registered_router_carries_its_curve_on_the_primary_benchmark(plan, prepared, registry):
    settings, _, manifest = prepared
    trained = trained_routers.train_router("random", plan, settings)
    trained_routers.evaluate_router(trained, plan, settings)
    with retraining_run(registry, manifest) as parent:
        measured = trained_routers.register_router(trained, plan, registry, parent)
    curve, on = registry.bundle(measured.version).curve, measured.evaluations[plan.primary]
    assert (curve.benchmark, curve.n) == (plan.primary, on.n)
    assert curve.pgr == on.pgr_by_percent
    assert curve.strong_fraction(0.5) == pytest.approx(on.exact.cpt50.value, abs=0.01)


def test_a_version_that_someone_deleted_is_trained_again(plan, prepared, registry):
    settings, _, manifest = prepared
    done = work.find_done(["random"], plan, registry, settings)
    if not done:
        trained = trained_routers.train_router("random", plan, settings)
        trained_routers.evaluate_router(trained, plan, settings)
        with retraining_run(registry, manifest) as parent:
            trained_routers.register_router(trained, plan, registry, parent)
        done = work.find_done(["random"], plan, registry, settings)
    registry.client.delete_model_version("router", done["random"].version)
    assert work.find_done(["random"], plan, registry, settings) == {}


def test_another_option_is_another_router(plan, prepared):
    settings = prepared[0]
    other = settings.model_copy(
        update={
            "training": settings.training.model_copy(update={"options": {"knn": {"kinship": 0.1}}})
        }
    )
    assert work.training_key("knn", plan, settings) != work.training_key("knn", plan, other)
    assert work.training_key("random", plan, settings) == work.training_key("random", plan, other)


def with_routers(settings, *routers, **training_settings):
    return settings.model_copy(
        update={
            "training": settings.training.model_copy(
                update={"routers": routers, **training_settings}
            )
        }
    )


def test_a_kind_that_cannot_be_trained_here_is_skipped_by_all_and_refused_by_name(plan, prepared):
    away = {"options": {"causal_llm": {"model": "nobody/no-such-model"}}}
    kinds, skipped = work.kinds_to_train(plan, with_routers(prepared[0], "all", **away))
    assert {"knn", "mf", "sw_ranking", "random"} <= set(kinds)
    assert set(skipped) == {"causal_llm"}
    with pytest.raises(UsageError, match=r"causal_llm cannot be trained here: .*no-such-model"):
        work.kinds_to_train(plan, with_routers(prepared[0], "causal_llm", **away))
    with pytest.raises(UsageError, match="unknown router kind 'gpt'"):
        work.kinds_to_train(plan, with_routers(prepared[0], "gpt"))
    with pytest.raises(
        UsageError, match=r"training.options.knn.colour: .* \(its options: kinship\)"
    ):
        work.kinds_to_train(
            plan, with_routers(prepared[0], "knn", options={"knn": {"colour": "red"}})
        )


def test_a_benchmark_without_the_pair_is_refused_before_any_work(prepared, tmp_path):
    settings, store, manifest = prepared
    (tmp_path / "b.benchmark.csv").write_text("prompt,one,two\nhello,1,0\nworld,0,0\n")
    named = settings.model_copy(
        update={"evaluation": settings.evaluation.model_copy(update={"benchmarks": str(tmp_path)})}
    )
    with pytest.raises(BenchmarkError, match="has no scores of 'simulated-strong'"):
        work.plan_of(manifest, store, HashEncoder(), SOURCES, named)


def test_a_prompt_in_training_and_evaluation_is_left_out_of_either_and_listed_in_the_run(
    prepared, registry, tmp_path
):
    settings, store, manifest = prepared
    share = settings.training
    trained_on = [
        p
        for p in dict.fromkeys(store.read(manifest, ("prompt",))["prompt"].to_pylist())
        if prompt_split(
            p, validation_share=share.validation_share, heldout_share=share.heldout_share
        )
        == "train"
    ]
    asked = [trained_on[0].upper() + " !!", "zebra quokka", "violin oboe cello"]
    rows = "".join(f'"{p}",{int(i != 1)},0\n' for i, p in enumerate(asked))
    head = "prompt,simulated-strong,simulated-weak\n"
    (tmp_path / "mine.benchmark.csv").write_text(head + rows)

    def run(**changed):
        mine = settings.model_copy(
            update={
                "evaluation": settings.evaluation.model_copy(
                    update={"benchmarks": str(tmp_path), **changed}
                )
            }
        )
        plan = work.plan_of(manifest, store, HashEncoder(), SOURCES, mine)
        work.embedded(plan, mine)
        return plan, work.training_key("knn", plan, mine)

    plan, key = run()
    assert plan.clean["mine"].benchmark.prompts == tuple(asked[1:])
    assert plan.clean["mine"].benchmark.excluded == 1
    assert trained_on[0] in plan.prepared.battles.prompts
    assert plan.contamination.battles == 0
    assert "1 of mine" in plan.contamination.summary

    other, other_key = run(contamination="drop_training")
    assert other_key != key
    assert other.clean["mine"].benchmark.prompts == tuple(asked)
    assert other.clean["mine"].benchmark.excluded == 0
    assert trained_on[0] not in other.prepared.battles.prompts
    left_out = other.contamination.battles
    assert len(other.prepared.battles) == len(plan.prepared.battles) - left_out < 3000
    assert sum(other.prepared.by_label_kind.values()) == 3000 - left_out
    assert other.clean["mine"].similarity < plan.clean["mine"].similarity

    with retraining_run(registry, manifest, contamination=plan.contamination) as run_id:
        pass
    logged = registry.client.get_run(run_id).data
    assert logged.params["contamination"] == "drop_evaluation"
    assert logged.metrics["mine.matched_by_ngram"] == 1
    assert logged.metrics["mine.matched_by_similarity"] == 1
    table = mlflow.artifacts.load_dict(f"runs:/{run_id}/contamination.json")
    listed = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    (one,) = [row for row in listed if row["benchmark"] == "mine"]
    assert one["prompt_sha256"] == hashlib.sha256(asked[0].encode()).hexdigest()[:16]
    assert one["left_out"] == "evaluation"
    assert one["matched_by"] == "both"
    assert one["similarity"] == pytest.approx(1.0, abs=0.05)
    assert not any(p in str(table) for p in [*asked, trained_on[0]])


def test_a_source_that_does_not_answer_is_asked_again_and_a_wrong_one_is_not(
    prepared, tmp_path, monkeypatch
):
    configure(prepared[0])
    from prefect import flow
    from prefect.testing.utilities import prefect_test_harness

    from flows import retrain

    asked = []

    def fail(error, times):
        def staging(sources, store, settings):
            asked.append(1)
            if len(asked) <= times:
                raise error
            return stage(sources, store, settings)

        return staging

    settings = Settings(home=tmp_path / "home")
    store = SnapshotStore(settings.snapshots_dir(simulated=True))
    task = retrain.ingest.with_options(retry_delay_seconds=0)
    run = flow(validate_parameters=False, persist_result=False)(
        lambda: task(["simulated://arena?battles=100"], store, settings)
    )
    with prefect_test_harness(server_startup_timeout=120):
        monkeypatch.setattr(retrain, "stage", fail(SourceUnreachable("the hub is away"), 2))
        assert run().new == 100
        assert len(asked) == 3
        asked.clear()
        monkeypatch.setattr(retrain, "stage", fail(SourceError("a column is missing"), 2))
        with pytest.raises(SourceError, match="a column is missing"):
            run()
        assert len(asked) == 1


def trials_of(settings, *kinds, **options):
    return trials.trials_to_run(kinds, settings, **{"seeds": 1, "augmentations": False, **options})


def test_trials_are_the_other_seeds_and_the_augmentations_left_out(prepared):
    settings = prepared[0]
    wanted = trials_of(settings, "random", "knn", seeds=3, augmentations=True)
    assert [(t.kind, t.augmentation, t.seed) for t in wanted] == [
        ("random", "both", 1), ("knn", "both", 1), ("random", "both", 2), ("knn", "both", 2),
        ("knn", "none", 0), ("knn", "golden", 0), ("knn", "judge", 0),
    ]  # fmt: skip
    assert trials_of(settings, "knn") == []


def test_a_trial_is_measured_and_logged_once_and_makes_no_version(
    plan, prepared, registry, no_work
):
    settings, _, manifest = prepared
    before = len(registry.versions())
    for wanted in (
        *trials_of(settings, "knn", seeds=2),
        trials_of(settings, "knn", augmentations=True)[0],
    ):
        assert trials.find_trial(wanted, plan, registry, settings) is None
        plans = trials.variants(plan, settings, [wanted])
        with retraining_run(registry, manifest, what="compare") as parent:
            done = trials.run_trial(wanted, plans[wanted.augmentation], registry, settings, parent)
        assert done.failed == ""
        assert set(done.evaluations) == set(plan.clean)
        again = trials.find_trial(wanted, plan, registry, settings)
        assert again.evaluations == done.evaluations
        (run,) = registry.client.search_runs(
            [registry.client.get_experiment_by_name("routellm").experiment_id],
            f"tags.`mlflow.parentRunId` = '{parent}'",
        )
        assert run.data.params["augmentation"] == wanted.augmentation
        assert run.data.params["training_seed"] == str(wanted.seed)
    assert len(registry.versions()) == before
    assert not list((settings.home / "trained").glob("*/bundle"))


def test_a_trial_that_was_killed_after_training_is_not_trained_again(
    plan, prepared, registry, no_work
):
    settings, _, manifest = prepared
    (wanted,) = trials_of(settings, "random", seeds=2)
    seeded = with_routers(settings, seed=1)
    trained = trained_routers.train_router("random", plan, seeded)
    trained_routers.evaluate_router(trained, plan, seeded, with_speed=False)
    no_work()
    with retraining_run(registry, manifest, what="compare") as parent:
        done = trials.run_trial(wanted, plan, registry, settings, parent)
    assert done.evaluations
    assert not trained.folder.exists()


def test_what_cannot_be_trained_without_the_pairs_labels_says_why(plan, prepared, registry):
    settings, _, manifest = prepared
    wanted = trials_of(settings, "knn", augmentations=True)[0]
    with retraining_run(registry, manifest, what="compare") as parent:
        done = trials.run_trial(wanted, "no battle of weak", registry, settings, parent)
    assert done.failed == "no battle of weak"
    assert done.evaluations == {}
