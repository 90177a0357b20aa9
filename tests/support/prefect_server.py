"""This process as a client of a Prefect server, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def client_of(api: str) -> Iterator[None]:
    """Point Prefect at a server, and send it all events before the block ends.

    Prefect keeps one sender of events a process, with the address that it began with: left behind,
    it would hold up whoever waits for events to be sent later by a minute for each.
    """
    from prefect.events.worker import EventsWorker
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: api}):
        try:
            yield
        finally:
            EventsWorker.drain_all()
