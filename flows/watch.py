"""Watch the inbox, and tell Prefect's server of files that have arrived.

The folder is looked at again and again: one on a network has no other way to tell. Nothing is
remembered from one start to the next. What lies in the inbox when the watch starts is told of, and
ingest knows by their digests which files it has read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from flows.send import ServerAway, send_event
from routellm.settings import Settings
from routellm.sources.inbox import Dropped, settled

ARRIVED = "routellm.inbox.arrived"
LOOK_EVERY_S = 1.0
_LONGEST_WAIT_S = 15.0  # between two tries while the server is away
_NAMED = 100  # files that an event names; it tells how many there are


def watch(
    settings: Settings, said: Callable[[str], None], told: Callable[[Sequence[Dropped]], None]
) -> None:
    """Tell of new files for as long as this process runs.

    Parameters
    ----------
    said : callable
        Given what goes wrong, and that it is over; once each.
    told : callable
        Given the files that the server was told of.
    """
    settings.inbox_dir.mkdir(parents=True, exist_ok=True)
    known: dict[str, Dropped] = {}
    trouble, wait_s = "", LOOK_EVERY_S
    while True:
        try:
            if not settings.inbox_dir.is_dir():
                raise FileNotFoundError(f"the inbox {settings.inbox_dir} is not there any more")
            there = settled(settings)
            fresh = [one for one in there if known.get(one.name) != one]
            if fresh:
                send_event(ARRIVED, "routellm.inbox", str(settings.inbox_dir), payload(fresh))
                told(fresh)
            known = {one.name: one for one in there}
            if trouble:
                said("it works again")
            trouble, wait_s = "", LOOK_EVERY_S
        except (ServerAway, OSError) as error:
            if not trouble:
                said(f"{error}; trying on")
            trouble, wait_s = str(error), min(2 * wait_s, _LONGEST_WAIT_S)
        time.sleep(wait_s)


def payload(files: Sequence[Dropped]) -> dict[str, Any]:
    """Return what an event says of files that arrived."""
    return {
        "files": [{"name": one.name, "bytes": one.size_bytes} for one in files[:_NAMED]],
        "count": len(files),
        "bytes": sum(one.size_bytes for one in files),
    }
