"""``routellm keys``: a key is shown once, listed without itself, and revoked."""

import json

import pytest
from typer.testing import CliRunner

from routellm.cli.context import set_home
from routellm.cli.keys import keys_app
from routellm.errors import UsageError
from routellm.gateway.keys import Caller, Keys
from routellm.gateway.limits import Limits


@pytest.fixture
def home(tmp_path):
    set_home(tmp_path / "home")
    return tmp_path / "home"


def run(*words):
    done = CliRunner().invoke(keys_app, list(words), catch_exceptions=False, standalone_mode=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_key_that_is_made_opens_the_gateway_with_what_it_may(home):
    said = json.loads(
        run("add", "search team", "--strong-fraction", "0.3", "--concurrent", "4", "--json")
    )
    key = Keys(home / "keys.json").caller({"x-api-key": said["key"]}).key
    assert (key.id, key.name, key.strong_fraction) == (said["id"], "search team", 0.3)
    assert key.concurrent == 4
    assert "digest" not in said


def test_a_key_is_shown_once_and_never_again(home):
    shown = run("add", "alice", "--requests-per-minute", "60")
    (text,) = [line for line in shown.splitlines() if line.startswith("rlk_")]
    assert Keys(home / "keys.json").caller({"x-api-key": text}).key.name == "alice"
    for listed in (run("list"), run("list", "--json")):
        assert "alice" in listed
        assert text.rsplit("_", 1)[1] not in listed
    assert "60 requests" in run("list")


def test_the_list_says_what_was_spent(home):
    said = json.loads(run("add", "alice", "--json"))
    assert "$" in run("list")
    limits = Limits(home / "spend.db")
    limits.open()
    caller = Caller(Keys(home / "keys.json").all()[0])
    limits.enter(caller)
    limits.leave(caller, 1.25)
    limits.close()
    (row,) = json.loads(run("list", "--json"))
    assert (row["id"], row["usd_today"], row["usd_this_month"]) == (said["id"], 1.25, 1.25)
    assert "1.25" in run("list")


def test_a_key_that_was_revoked_is_still_listed_and_said_to_be(home):
    said = json.loads(run("add", "alice", "--json"))
    assert "is revoked" in run("revoke", said["id"])
    assert "revoked" in run("list")
    (row,) = json.loads(run("list", "--json"))
    assert row["revoked_at"]


def test_without_keys_the_list_says_that_the_gateway_is_open(home):
    assert "whoever can reach it" in run("list")
    assert json.loads(run("list", "--json")) == []


def test_a_name_is_printed_as_it_is(home):
    assert "[bold]x[/bold]" in run("add", "[bold]x[/bold]")
    assert "[bold]x[/bold]" in run("list")


def test_dollars_of_a_model_without_a_price_are_refused(home, monkeypatch):
    monkeypatch.setenv("ROUTELLM_GATEWAY__STRONG__BASE_URL", "http://localhost/v1")
    monkeypatch.setenv("ROUTELLM_GATEWAY__STRONG__MODEL", "unpriced")
    for option in ("--usd-per-day", "--usd-per-month", "--max-usd"):
        with pytest.raises(UsageError, match=r"unpriced .* has no price"):
            run("add", "alice", option, "1")
    assert not (home / "keys.json").exists()


def test_an_admin_key_takes_no_limits(home):
    with pytest.raises(UsageError, match="sends no queries"):
        run("add", "root", "--admin", "--concurrent", "2")
    assert json.loads(run("add", "root", "--admin", "--json"))["admin"] is True
