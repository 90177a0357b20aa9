"""The verb: a person asks to be forgotten."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import typer.testing

from routellm.cli.context import set_home
from routellm.cli.feedback import forget
from routellm.errors import UsageError
from routellm.feedback import store_url
from routellm.feedback.store import FeedbackStore
from tests.feedback.records import decided


def run(settings, *words):
    set_home(settings.home)
    app = typer.Typer()
    app.command()(forget)
    done = typer.testing.CliRunner().invoke(app, list(words))
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def test_a_user_is_forgotten(settings):
    store = FeedbackStore(store_url(settings))
    store.append([decided("1", user="ada"), decided("2", user="ada"), decided("3", user="bob")])
    assert "2 decisions and all that belongs to them are removed" in run(settings, "ada")
    assert store.count()["decisions"] == store.count()["prompts"] == 1
    assert "nothing is stored of this user" in run(settings, "ada")
    assert json.loads(run(settings, "bob", "--json")) == {"store": store.name, "decisions": 1}


def test_a_user_is_forgotten_in_the_store_that_is_named(settings, url):
    store = FeedbackStore(url)
    store.append([decided(user="ada")])
    assert json.loads(run(settings, "ada", "--store", url, "--json"))["decisions"] == 1
    assert store.count()["decisions"] == 0


def test_where_nothing_was_stored_it_says_so_and_makes_no_store(settings):
    with pytest.raises(UsageError, match="there is nothing to forget"):
        run(settings, "ada")
    assert not settings.home.exists()


def test_the_module_of_the_verb_loads_nothing_heavy():
    code = (
        "import sys, routellm.cli.feedback\n"
        "print([m for m in ('sqlalchemy', 'torch', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
