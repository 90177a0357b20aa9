"""What the monitor's checks find, on real stores, a real gateway, and the gateway's own files."""

import contextlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from fastapi import FastAPI

from routellm.calibration import Calibration
from routellm.feedback import store_url
from routellm.feedback.store import FeedbackStore
from routellm.gateway.app import create_app
from routellm.gateway.demo import demo_upstream
from routellm.gateway.gateway import _why
from routellm.gateway.key_file import add_key
from routellm.gateway.keys import Caller
from routellm.gateway.limits import Limits
from routellm.gateway.server import running
from routellm.gateway.targets import Target
from routellm.ingest import stage
from routellm.monitoring import prompts as prompts_module
from routellm.monitoring.budget import KeyBudgets, Spend, StrongFraction
from routellm.monitoring.drift import CodeDrift, LanguageDrift, LengthDrift, NumberDrift
from routellm.monitoring.drift import WinRateDrift as WinRates
from routellm.monitoring.finding import Finding, Unknown
from routellm.monitoring.freshness import ChampionAge, SnapshotAge
from routellm.monitoring.gateways import GatewayHealth
from routellm.monitoring.report import (
    CHECKS,
    Report,
    asked,
    changed,
    look,
    markdown,
    read_report,
    write_report,
)
from routellm.monitoring.seen import Champion, Seen
from routellm.settings import GatewaySettings, Settings, Upstream
from routellm.snapshots import SnapshotStore
from routellm.stability import psi
from tests.feedback.records import decided
from tests.gateway.test_gateway import Versions, bundle, wait_for
from tests.unit.test_ingest import commit
from tests.unit.test_sources import ALPACA, write_lines

AT = datetime.now(UTC).replace(hour=12)
RNG = np.random.default_rng(3)
BY_SETTINGS = _why(Target(strong_fraction=0.3))
BY_KEY = _why(Target(strong_fraction=0.9, asked_by="key"))


def champion(**changes):
    of = {
        "version": "3", "kind": "random", "created_at": AT - timedelta(days=1),
        "since": AT - timedelta(hours=20), "snapshot": "d" * 64, "simulated": False,
        "strong": "large", "weak": "small", "curve": None,
        "calibration": Calibration.of(np.random.default_rng(0).beta(2, 3, 3000), "a sample"),
    }  # fmt: skip
    return Champion(**of | changes)


def settings_in(tmp_path, **changes):
    more = {"feedback": {"enabled": True, "store_prompts": True}, **changes}
    return Settings(home=tmp_path / "home", **more)


def seen(settings, known=None, at=AT):
    return Seen(settings, at, champion() if known is None else known)


def record(settings, *decisions):
    store = FeedbackStore(store_url(settings))
    store.append(decisions)
    store.close()


def rated(rates, *, hours=1.0, **changes):
    at = AT - timedelta(hours=hours)
    given = {"at": at, "version": "3", "reason": BY_SETTINGS, "prompt": None, **changes}
    return [decided(f"c-{i}", win_rate=float(r), **given) for i, r in enumerate(rates)]


# --- freshness ------------------------------------------------------------------------------------


def published(settings, prompts=("one", "two", "three")):
    store = SnapshotStore(settings.snapshots_dir())
    lines = [ALPACA | {"prompt": p} for p in prompts]
    settings.home.parent.mkdir(parents=True, exist_ok=True)
    path = write_lines(settings.home.parent / "battles.jsonl", lines)
    return commit(stage([str(path)], store, settings), store)


@pytest.mark.parametrize(("days", "outcome"), [(1, "ok"), (6, "warn"), (8, "fail")])
def test_ages_are_held_to_their_limits(tmp_path, days, outcome):
    settings = settings_in(tmp_path, monitor={"max_champion_age_days": 7.0})
    manifest = published(settings)
    now = datetime.fromisoformat(manifest.created_at) + timedelta(days=days)
    known = champion(created_at=now - timedelta(days=days))
    for check in (SnapshotAge(), ChampionAge()):
        found = check.look(seen(settings, known, now))
        assert (found.outcome, found.limit) == (outcome, 7.0)
        assert found.value == pytest.approx(days)
        assert f"{days}.0 days" in found.detail


def test_only_a_snapshot_of_the_champions_own_kind_of_battles_is_fresh(tmp_path):
    settings = settings_in(tmp_path)
    published(settings)
    with pytest.raises(Unknown, match="no snapshot yet"):
        SnapshotAge().look(seen(settings, champion(simulated=True)))
    assert SnapshotAge().look(Seen(settings, datetime.now(UTC), None)).outcome == "ok"


# --- drift ----------------------------------------------------------------------------------------


def test_win_rates_that_are_spread_as_they_were_do_not_drift_and_others_do(tmp_path):
    one, other = settings_in(tmp_path / "one"), settings_in(tmp_path / "other")
    record(one, *rated(RNG.beta(2, 3, 800)))
    record(other, *rated(RNG.beta(4, 2, 800)))
    same = WinRates().look(seen(one))
    assert same.outcome == "ok"
    assert same.value < 0.05
    moved = WinRates().look(seen(other))
    assert moved.outcome == "fail"
    assert moved.value > 0.5
    assert "800 decisions (the last 24 hours) against a sample" in moved.detail


def test_what_another_version_a_canary_or_an_older_hour_decided_does_not_count(tmp_path):
    settings = settings_in(tmp_path)
    away = RNG.beta(8, 1, 900)
    record(settings, *rated(RNG.beta(2, 3, 600)))
    for i, changes in enumerate(({"version": "2"}, {"canary": True}, {"hours": 25.0})):
        record(settings, *(replace(d, id=f"{i}-{d.id}") for d in rated(away, **changes)))
    found = WinRates().look(seen(settings))
    assert found.outcome == "ok"
    assert "600 decisions" in found.detail


def test_win_rates_of_few_values_do_not_drift_by_being_few(tmp_path):
    settings = settings_in(tmp_path)
    values = np.array([0.2, 0.5, 0.8])
    known = champion(calibration=Calibration.of(values[RNG.integers(0, 3, 2000)], "s"))
    record(settings, *rated(values[RNG.integers(0, 3, 700)]))
    assert WinRates().look(seen(settings, known)).value < 0.03


def test_too_little_traffic_is_unknown_and_says_how_little(tmp_path):
    settings = settings_in(tmp_path)
    record(settings, *rated(RNG.beta(9, 1, 40)))
    with pytest.raises(Unknown, match=r"40 decisions of version 3 .* fewer .* 500"):
        WinRates().look(seen(settings))


def test_an_unmoved_distribution_is_never_taken_for_a_moved_one():
    """At the fewest that are judged by, and the most bins there are."""
    shares = np.array([1, 2, 5, 10, 20, 25, 20, 10, 4, 2, 1]) / 100
    found = [psi(20_000 * shares, RNG.multinomial(500, shares)) for _ in range(300)]
    assert max(found) < 0.1  # where a warning begins
    assert np.mean(found) == pytest.approx(10 / 500, rel=0.3)


EASY = [f"What is the best way to cook {n} eggs for breakfast, number {n}?" for n in range(600)]


def stored(settings, prompts):
    record(settings, *(
        decided(f"p-{i}", at=AT - timedelta(hours=1), prompt=p, version="9")
        for i, p in enumerate(prompts)
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("check", "changed_prompt"),
    [
        (LengthDrift(), lambda p: p * 40),
        (LanguageDrift(), lambda p: "请问早餐怎么煮鸡蛋最好吃呢请问早餐怎么煮鸡蛋最好吃呢 15 15"),
        (CodeDrift(), lambda p: p + " def f"),
        (NumberDrift(), lambda p: p + " 1 2 3 4 5 6 7 8 9"),
    ],
)
def test_prompts_of_another_kind_drift_from_the_snapshot_and_those_of_its_kind_do_not(
    tmp_path, check, changed_prompt
):
    same, other = settings_in(tmp_path / "same"), settings_in(tmp_path / "other")
    for settings, prompts in ((same, EASY), (other, [changed_prompt(p) for p in EASY])):
        manifest = published(settings, EASY)
        stored(settings, prompts)
        found = check.look(seen(settings, champion(snapshot=manifest.digest)))
        assert found.outcome == ("ok" if settings is same else "fail"), found
        assert f"against snapshot {manifest.digest[:12]}" in found.detail
        for path in (settings.home / "monitor").iterdir():  # counts alone are kept
            assert "breakfast" not in path.read_text()
            assert "早" not in path.read_text()


def test_a_snapshot_is_counted_once_evenly_and_with_bounds(tmp_path, monkeypatch):
    settings = settings_in(tmp_path)
    store = SnapshotStore(settings.snapshots_dir())
    for i in range(3):  # parts of 10, 20 and 300 battles
        n = (10, 20, 300)[i]
        lines = [ALPACA | {"prompt": f"{'x' * 10**i} {j}"} for j in range(n)]
        path = write_lines(tmp_path / f"{i}.jsonl", lines)
        manifest = commit(stage([str(path)], store, settings), store)
    monkeypatch.setattr(prompts_module, "_SAMPLE", 66)
    made = prompts_module.baseline(store, manifest, tmp_path / "m")
    assert made.n == 66
    lengths = made.counts["prompt_length"]
    assert (lengths["0"], lengths["64"]) == (6, 60)  # the first two parts are short: 2 and 4
    monkeypatch.setattr(prompts_module, "_sampled", None)  # it is read no more
    assert prompts_module.baseline(store, manifest, tmp_path / "m") == made


def test_where_no_prompts_are_kept_or_the_snapshot_is_gone_that_is_said(tmp_path):
    off = settings_in(tmp_path / "off", feedback={"enabled": True})
    record(off, *rated([0.5]))
    with pytest.raises(Unknown, match="no prompts are stored"):
        LengthDrift().look(seen(off))
    settings = settings_in(tmp_path / "on")
    stored(settings, EASY)
    published(settings)
    with pytest.raises(Unknown, match=r"snapshot dddddddddddd .* is not in this home"):
        LengthDrift().look(seen(settings))


# --- strong fraction and dollars ------------------------------------------------------------------


@pytest.mark.parametrize(("strong", "outcome"), [(0.31, "ok"), (0.21, "warn"), (0.55, "fail")])
def test_the_strong_fraction_is_held_to_what_the_settings_ask_for(tmp_path, strong, outcome):
    settings = settings_in(tmp_path, gateway={"strong_fraction": 0.3})
    n = round(1000 * strong)
    record(
        settings,
        *(replace(d, id=f"s{d.id}") for d in rated([0.9] * n, route="strong")),
        *rated([0.1] * (1000 - n), route="weak"),
        *(replace(d, id=f"k{d.id}") for d in rated([0.9] * 400, route="strong", reason=BY_KEY)),
    )
    found = StrongFraction().look(seen(settings))
    assert (found.outcome, found.value) == (outcome, pytest.approx(strong))
    assert "1,000 decisions" in found.detail  # none that a key asked for otherwise


def test_a_threshold_asks_for_the_fraction_that_it_is_by_calibration(tmp_path):
    known = champion()
    threshold = known.calibration.threshold(0.2)
    settings = settings_in(tmp_path, gateway={"threshold": threshold})
    record(settings, *rated([0.1] * 800, route="weak"))
    assert StrongFraction().look(seen(settings)).outcome == "fail"
    dear = settings_in(tmp_path, gateway={"quality": 0.5})
    with pytest.raises(Unknown, match="no curve of quality"):
        StrongFraction().look(seen(dear))


def test_a_days_dollars_are_those_since_midnight_and_what_has_no_price_is_said(tmp_path):
    settings = settings_in(tmp_path, monitor={"usd_per_day": 10.0})
    record(
        settings,
        *rated([0.5] * 90, usd=0.1),
        *(replace(d, id=f"y{d.id}") for d in rated([0.5] * 500, usd=1.0, hours=13)),
    )
    found = Spend().look(seen(settings))
    assert (found.outcome, found.value) == ("warn", pytest.approx(9.0))
    record(settings, *(replace(d, id=f"n{d.id}") for d in rated([0.5] * 20, usd=0.1)))
    assert Spend().look(seen(settings)).outcome == "fail"
    free = settings_in(tmp_path / "free", monitor={"usd_per_day": 10.0})
    record(free, *rated([0.5] * 5, usd=None))
    found = Spend().look(seen(free))
    assert found.outcome == "warn"
    assert "5 answers have no price" in found.detail


def test_the_spending_of_keys_is_read_from_the_gateways_own_file(tmp_path):
    settings = settings_in(tmp_path, feedback={"enabled": False})
    with pytest.raises(Unknown, match="nor is spending by keys"):
        Spend().look(seen(settings))
    assert KeyBudgets().look(seen(settings)).detail == "no key has a budget"
    keys = [
        add_key(settings.home / "keys.json", name, usd_per_day=day, usd_per_month=month)[0]
        for name, day, month in (("ada", 10.0, None), ("bob", None, 100.0))
    ]
    limits = Limits(settings.home / "spend.db", clock=AT.timestamp)
    limits.open()
    for key, usd in zip(keys, (9.0, 70.0), strict=True):
        limits.enter(Caller(key))
        limits.leave(Caller(key), usd)
    found = KeyBudgets().look(seen(settings))
    assert (found.outcome, found.value) == ("warn", pytest.approx(0.9))
    assert found.detail == "key 'ada' has spent $9.00 of $10.00 this day"
    assert Spend().look(seen(settings)).value == pytest.approx(79.0)
    limits.enter(Caller(keys[0]))
    limits.leave(Caller(keys[0]), 1.0)
    assert KeyBudgets().look(seen(settings)).outcome == "fail"
    tomorrow = KeyBudgets().look(seen(settings, at=AT + timedelta(days=1)))
    assert "ada" not in tomorrow.detail
    limits.close()


# --- gateways -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def upstream():
    with running(demo_upstream()) as url:
        yield url


@contextlib.contextmanager
def gateway(upstream, home, source):
    one = {"base_url": f"{upstream}/v1"}
    settings = GatewaySettings(
        strong=Upstream(**one, model="big"), weak=Upstream(**one, model="small"),
        poll_s=0.05, log_format="off", strong_fraction=0.3,
    )  # fmt: skip
    with running(create_app(settings, source, home=home)) as url:
        yield url, settings


def health(url, known, **more):
    settings = Settings(monitor={"gateways": (url,), **more})
    found = GatewayHealth().look(seen(settings, known))
    return found.outcome, found.detail


def test_a_gateway_is_well_while_it_serves_what_the_alias_points_at(upstream, tmp_path):
    source = Versions(v3=bundle(3), v4=bundle(4))
    source.alias = "3"
    with gateway(upstream, tmp_path, source) as (url, _):
        assert health(url, champion()) == ("ok", f"{url} serves version 3")
        assert health(url, "MLflow is away")[0] == "unknown"
        outcome, detail = health(url, champion(version="4"))
        assert outcome == "fail"
        assert detail == f"{url} serves version 3, and the champion is 4"
        just = champion(version="4", since=AT - timedelta(seconds=20))
        assert health(url, just)[0] == "ok"  # it may take a while to follow
        assert health(url, just, follow_s=10.0)[0] == "fail"
        source.down = True
        wait_for(lambda: health(url, champion())[0] == "warn")
        assert "MLflow does not answer" in health(url, champion())[1]
        settings = Settings(monitor={"gateways": (url, "http://127.0.0.1:9")})
        found = GatewayHealth().look(seen(settings))
        assert (found.outcome, found.value) == ("fail", 2.0)
        assert found.detail == "http://127.0.0.1:9 is down: nothing listens there"


def test_a_gateway_without_a_router_and_what_is_no_gateway_fail(upstream, tmp_path):
    source = Versions()
    source.alias = None
    with gateway(upstream, tmp_path, source) as (url, _):
        outcome, detail = health(url, champion())
        assert outcome == "fail"
        assert "has no router and answers with strong (the alias points at no version)" in detail
    with running(FastAPI()) as url:
        assert health(url, champion()) == ("fail", f"{url} is down: it answers 404")
    assert health("http://[", champion())[0] == "fail"


def test_where_no_gateway_is_set_and_none_answers_that_is_not_called_a_failure(upstream):
    with pytest.raises(Unknown, match="no gateway is set"):
        GatewayHealth().look(seen(Settings(gateway={"port": 9})))
    one = {"base_url": "http://127.0.0.1:1/v1", "model": "m"}
    both = Settings(gateway={"port": 9, "strong": one, "weak": {**one, "model": "n"}})
    assert GatewayHealth().look(seen(both)).outcome == "fail"


def test_where_no_decisions_are_recorded_a_gateways_own_counts_are_taken(upstream, tmp_path):
    import httpx

    source = Versions(v3=bundle(3))
    source.alias = "3"
    with gateway(upstream, tmp_path, source) as (url, how), httpx.Client(base_url=url) as http:
        for i in range(200):
            asked = [{"role": "user", "content": f"query {i}"}]
            http.post("/v1/chat/completions", json={"model": "router", "messages": asked})
        settings = Settings(
            home=tmp_path / "home", gateway=how, monitor={"gateways": (url,), "min_decisions": 200}
        )
        known = champion(calibration=bundle(3).calibration)
        found = WinRates().look(seen(settings, known))
        assert found.outcome in ("ok", "warn")  # 19 bins of 200: chance alone gives 0.1
        assert "200 decisions (since the gateway started)" in found.detail
        low = Calibration.of(np.random.default_rng(0).beta(1, 9, 500), "s")
        assert WinRates().look(seen(settings, champion(calibration=low))).outcome == "fail"
        share = StrongFraction().look(seen(settings, known))
        assert share.outcome == "ok"
        assert share.value == pytest.approx(0.3, abs=0.05)


# --- the report -----------------------------------------------------------------------------------


def test_a_check_that_cannot_be_made_says_why_and_holds_up_no_other(tmp_path):
    settings = settings_in(tmp_path, gateway={"port": 9})
    settings.home.mkdir()
    (settings.home / "feedback.db").write_bytes(b"no database" * 100)
    published(settings)
    report = look(seen(settings, "MLflow at sqlite does not answer", datetime.now(UTC)))
    assert [one.name for one in report.findings] == [check.name for check in CHECKS]
    by_name = {one.name: one for one in report.findings}
    assert by_name["champion_age"].detail == "MLflow at sqlite does not answer"
    assert "does not answer (DatabaseError)" in by_name["spend"].detail
    assert by_name["snapshot_age"].outcome == by_name["key_budgets"].outcome == "ok"
    assert report.champion is None
    assert not report.wants_retraining


def of(**outcomes):
    at = AT.isoformat(timespec="seconds")
    findings = tuple(Finding(name, outcome) for name, outcome in outcomes.items())
    return Report(AT, "3", findings, dict.fromkeys(outcomes, at))


def test_only_what_has_changed_is_told_and_at_first_what_is_wrong():
    first = of(spend="ok", gateway="fail", champion_age="unknown", snapshot_age="warn")
    assert [f.name for _, f in changed(None, first)] == ["gateway", "snapshot_age"]
    then = of(spend="warn", gateway="ok", champion_age="unknown", snapshot_age="warn")
    told = [(was, f.name, f.outcome) for was, f in changed(first, then)]
    assert told == [("ok", "spend", "warn"), ("fail", "gateway", "ok")]
    assert changed(then, then) == []


def test_a_retraining_is_asked_for_once_for_each_champion_and_only_because_of_drift():
    assert not of(gateway="fail", spend="fail", drift_code="warn").wants_retraining
    report = of(drift_code="fail")
    assert report.wants_retraining
    report = asked(report)
    assert not report.wants_retraining
    assert replace(report, champion="4").wants_retraining


def test_a_report_comes_back_as_it_was_written_and_remembers_since_when(tmp_path):
    settings = settings_in(tmp_path, gateway={"port": 9})
    published(settings)
    assert read_report(settings.home) is None
    now = datetime.now(UTC).replace(microsecond=0)
    first = asked(look(seen(settings, champion(created_at=now), now)))
    write_report(first, settings.home)
    assert read_report(settings.home) == first
    later = now + timedelta(days=8)  # the snapshot has become too old, the champion not
    second = look(seen(settings, champion(created_at=now), later), read_report(settings.home))
    assert second.asked_for == "3"
    assert second.since["snapshot_age"] == later.isoformat()
    assert second.since["champion_age"] == now.isoformat()
    assert second.outcome == "fail"
    lines = markdown(second).splitlines()
    assert lines[0].startswith("**1 fail, ")
    assert lines[4].startswith("| snapshot_age | ✗ **fail** | ")
    (settings.home / "monitor.json").write_text("{")
    assert read_report(settings.home) is None
