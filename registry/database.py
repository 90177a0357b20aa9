"""MLflow's own SQLite database, made whole or not at all.

MLflow makes one in hundreds of statements, each of which counts at once. A process that is killed
between two of them leaves a database that no MLflow opens again ("table ... already exists"). So
it is made beside its place, and renamed.

``python -m registry.database URI COMMAND ...`` makes one, then becomes the command: what `routellm
up` starts as MLflow's server.
"""

from __future__ import annotations

import os
import sys
import uuid
from pathlib import Path

from routellm.lock import alone


def make_database(uri: str) -> None:
    """Make the SQLite database that a tracking URI names, if it is one and there is none yet.

    Raises
    ------
    OSError, SQLAlchemyError
        If the disk does not take it; nothing is in its place then.
    """
    if not uri.startswith("sqlite:///"):
        return
    path = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    if _is_there(path):
        return
    with alone(path.with_name(f"{path.name}.lock")):
        if not _is_there(path):
            _make(path)


def _is_there(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _make(path: Path) -> None:
    from mlflow.db import upgrade

    for left in path.parent.glob(f".{path.name}.*"):  # by one that was killed
        left.unlink()
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        upgrade.callback(f"sqlite:///{temporary}")
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    make_database(sys.argv[1])
    os.execvp(sys.argv[2], sys.argv[2:])
