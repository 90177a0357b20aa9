"""Who works on a run in MLflow, and the end of runs whose process was killed: they stay RUNNING.

Whoever opens a retraining's run holds a lock on a file of the home folder, and the run names that
file in a tag. The kernel frees the lock however the process ends, so that a file which can be
locked is nobody's any more. Another machine's files are not seen here: its own next retraining ends
what it left, and where it never comes back, `compact` does by age.
"""

from __future__ import annotations

import fcntl
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TextIO
from uuid import uuid4

from registry.calls import patient
from registry.client import Registry
from routellm.errors import RegistryError
from routellm.settings import Settings

AT_WORK = "routellm.at_work"  # tag: the name of the file


@contextmanager
def at_work(settings: Settings) -> Iterator[str]:
    """Hold a lock for as long as this process works on a run; yields what the run's tag is to say.

    The file stays. Whether MLflow was told of the run's end, too, is for the next one to look up.

    Raises
    ------
    RegistryError
        If no file can be locked in the home folder.
    """
    file = _folder(settings) / f"run-{uuid4().hex}"
    # waits where one that looks for what is left has it just now; then the file goes, and the run
    # is, should this process be killed, ended by its age
    held = _locked(file, fcntl.LOCK_EX)
    assert held is not None
    with held:
        yield file.name


def end_left(registry: Registry, began_before: datetime | None = None) -> list[str]:
    """End as KILLED, with those inside them, the runs that nobody works on any more.

    Those are the runs of processes of this home that are gone.

    Parameters
    ----------
    began_before : datetime, optional
        Also every run that is RUNNING since before then, unless a process of this home holds it.

    Returns
    -------
    list of str
        Ids of the runs that were ended; their time of end is now, since nobody knows the true one.

    Raises
    ------
    RegistryError
        If MLflow does not answer; what was not ended is found again.
    """
    ended: list[str] = []
    folder = _folder(registry.settings)
    for file in sorted(folder.glob("run-*")):
        held = _locked(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if held is not None:
            with held:
                ended += _end(registry, f"tags.`{AT_WORK}` = '{file.name}'")
                file.unlink(missing_ok=True)
    if began_before is not None:
        ms = int(began_before.timestamp() * 1000)
        living = {file.name for file in folder.glob("run-*")}
        old = f"attributes.status = 'RUNNING' and attributes.start_time < {ms}"
        ended += _end(registry, old, living)
    return ended


def _end(registry: Registry, which: str, living: Collection[str] = ()) -> list[str]:
    client, settings = registry.client, registry.settings
    experiment = patient(settings, partial(client.get_experiment_by_name, settings.experiment))
    if experiment is None:
        return []
    here, ended = [experiment.experiment_id], []
    for run in patient(settings, partial(client.search_runs, here, which)):
        if run.data.tags.get(AT_WORK) in living:
            continue
        within = f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
        inside = patient(settings, partial(client.search_runs, here, within))
        for one in (*inside, run):  # itself last: where this is killed too, it is found again
            if one.info.status == "RUNNING" and one.info.run_id not in ended:
                patient(settings, partial(client.set_terminated, one.info.run_id, "KILLED"))
                ended.append(one.info.run_id)
    return ended


def _locked(file: Path, how: int) -> TextIO | None:
    """Return a file, made if need be, that is locked until it is closed; None if it was locked."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        held = file.open("a")
        try:
            fcntl.flock(held, how)
        except OSError:
            held.close()
            raise
        return held
    except BlockingIOError:
        return None
    except OSError as error:
        raise RegistryError(
            f"{file} cannot be locked ({error.strerror}): see that the home folder can be written "
            "to, and that its disk is not full"
        ) from error


def _folder(settings: Settings) -> Path:
    return settings.home / "locks"
