"""MLflow's SQLite database: killed while it is made, it is made again."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import mlflow.store.model_registry.sqlalchemy_store
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  before forking
import pytest
from sqlalchemy.engine.default import DefaultDialect

from registry import connect
from registry.database import make_database
from routellm.settings import Settings
from tests.conftest import REPOSITORY
from tests.support.killed_call import killed_at

pytestmark = pytest.mark.slow


def files(settings):
    return sorted(path.name for path in settings.home.iterdir() if "mlflow.db" in path.name)


def test_killed_while_the_database_is_made_the_next_one_makes_it(tmp_path):
    settings = Settings(home=tmp_path / "new")
    for statement in (30, 300):
        assert killed_at(
            statement, DefaultDialect, ["do_execute"], lambda: connect(settings), done=True
        )
        assert len(files(settings)) == 2  # the lock, and the half
    assert connect(settings).versions() == []
    assert files(settings) == ["mlflow.db", "mlflow.db.lock"]


def test_two_at_once_make_one_and_what_is_no_sqlite_file_is_left_alone(tmp_path):
    uri = f"sqlite:///{tmp_path / 'home' / 'mlflow.db'}"
    command = [sys.executable, "-m", "registry.database", uri, sys.executable, "-c", "print('on')"]

    def one(_):
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
        return done.stdout, done.returncode

    with ThreadPoolExecutor() as both:
        assert list(both.map(one, range(2))) == [("on\n", 0)] * 2
    before = (tmp_path / "home" / "mlflow.db").stat()
    make_database(uri)
    assert (tmp_path / "home" / "mlflow.db").stat() == before
    make_database("postgresql://nobody@127.0.0.1:1/nothing")
    make_database("http://127.0.0.1:1")
