"""What the monitor reads of MLflow, on SQLite and on a server with PostgreSQL and S3."""

import json
from datetime import UTC, datetime

import pytest

from registry.monitored import champion, look_now
from routellm.errors import UsageError
from routellm.monitoring.finding import Finding
from routellm.monitoring.report import Report, read_report, write_report
from routellm.settings import Settings
from tests.support.bare import bare_registry, promote
from tests.support.versions import add_version

pytestmark = pytest.mark.slow


def test_the_champion_is_known_with_what_it_was_calibrated_on_and_fetched_once(
    registry, planted, encoder, monkeypatch
):
    import mlflow

    assert champion(registry) is None
    for seed in (1, 2):
        add_version(registry, planted, encoder, seed)
    promote(registry, "1", "2")
    known, bundle = champion(registry), registry.bundle(registry.get("2"))
    assert (known.version, known.kind, known.snapshot) == ("2", "random", "d" * 64)
    assert (known.strong, known.weak) == ("strong", "weak")
    assert known.calibration == bundle.calibration
    assert known.curve == bundle.curve
    assert known.since.isoformat() == registry.state()["at"]
    now = datetime.now(UTC)
    assert 0 <= (now - known.created_at).total_seconds() < 120

    (kept,) = (registry.settings.home / "monitor").glob("version-*.json")
    assert "prompt" not in kept.read_text()  # golden prompts are not kept with it
    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", None)
    assert champion(registry) == known
    kept.write_text("{")
    monkeypatch.undo()
    assert champion(registry) == known


def test_where_mlflow_is_away_the_other_checks_are_made(tmp_path):
    away = Settings(
        home=tmp_path, tracking_uri="http://user:secret@127.0.0.1:9", gateway={"port": 9}
    )
    report = look_now(away)
    by_name = {one.name: one for one in report.findings}
    assert by_name["champion_age"].outcome == "unknown"
    assert "http://***@127.0.0.1:9" in by_name["champion_age"].detail
    assert by_name["key_budgets"].outcome == "ok"
    assert not (tmp_path / "monitor.json").exists()  # it is the deployment that remembers


def verb(home, *args):
    import typer.testing

    from routellm.cli.app import app

    home.mkdir(parents=True, exist_ok=True)
    env = {"ROUTELLM_GATEWAY__PORT": "9", "COLUMNS": "120"}
    return typer.testing.CliRunner().invoke(app, ["--home", str(home), *args], env=env)


def test_the_verb_shows_the_checks_and_ends_with_1_if_one_fails(tmp_path):
    bare_registry(tmp_path / "home")
    shown = verb(tmp_path / "home", "monitor")
    assert shown.exit_code == 0, shown.output
    assert "there is no champion yet" in shown.output
    asked = verb(tmp_path / "home", "monitor", "--last")
    assert isinstance(asked.exception, UsageError)
    assert "has not looked yet" in str(asked.exception)

    now = datetime.now(UTC)
    found = (Finding("spend", "fail", 12.0, 10.0, "$12.00 of $10.00 today [UTC]"),)
    write_report(Report(now, "3", found, {"spend": now.isoformat()}), tmp_path / "home")
    last = verb(tmp_path / "home", "monitor", "--last")
    assert last.exit_code == 1
    assert "champion version 3" in last.output
    assert "$12.00 of $10.00 today [UTC] (limit 10)" in last.output
    doc = json.loads(verb(tmp_path / "home", "monitor", "--last", "--json").output)
    assert (doc["outcome"], doc["checks"][0]["name"]) == ("fail", "spend")
    assert read_report(tmp_path / "home").findings == found
