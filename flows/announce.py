"""Tell of a decision: a Prefect event and artifact, and the webhook."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from registry import Decision, Registry
from registry.history import Entry
from registry.notify import notify
from routellm.errors import RegistryError
from routellm.settings import Settings


@contextmanager
def announced(registry: Registry) -> Iterator[None]:
    """Tell of every entry that the history gains inside, also where what is done there fails.

    Who could not be told is added to `registry.notices`.
    """
    before = len(registry.history())
    try:
        yield
    finally:
        with suppress(RegistryError):  # MLflow is away: what is done inside says so
            for entry in registry.history()[before:]:
                registry.notices.extend(announce(registry.settings, entry))


def announce(settings: Settings, entry: Entry) -> list[str]:
    """Tell Prefect and the webhook of an entry of the history.

    Inside a flow run, or where a Prefect server is set (``PREFECT_API_URL``), an event
    ``routellm.<action>`` and an artifact ``decision`` are made; outside of both no server is
    started for their sake.

    Returns
    -------
    list of str
        What did not arrive, and why. Never raises: the decision has been made.
    """
    doc = entry.to_dict()
    failed = []
    try:
        _tell_prefect(settings, entry, doc)
    except Exception as error:  # whatever Prefect raises, the decision stands
        logging.getLogger(__name__).debug("prefect was not told", exc_info=True)
        failed.append(
            f"Prefect was not told of this ({type(error).__name__}): the decision stands, and "
            "`routellm history` has it"
        )
    why = notify(settings.promotion, f"routellm.{entry.action}", doc)
    return failed + ([why] if why else [])


def _tell_prefect(settings: Settings, entry: Entry, doc: dict[str, Any]) -> None:
    from prefect.context import FlowRunContext

    if FlowRunContext.get() is None and not os.environ.get("PREFECT_API_URL"):
        return
    from prefect.artifacts import create_markdown_artifact
    from prefect.events import emit_event

    emit_event(
        event=f"routellm.{entry.action}",
        resource={
            "prefect.resource.id": f"routellm.{settings.model}.{entry.version}",
            "prefect.resource.name": f"{settings.model} version {entry.version}",
        },
        payload=doc,
    )
    create_markdown_artifact(decision_markdown(entry), key="decision", description=entry.reason)


def decision_markdown(entry: Entry) -> str:
    """Return an entry as Markdown: what was decided, and every check with its number."""
    lines = [
        f"**{entry.action}** version {entry.version}: {entry.reason}",
        "",
        f"Champion: {entry.from_ or 'none'} → {entry.to or 'none'}, by {entry.by} at {entry.at}.",
    ]
    checks = Decision.from_dict(dict(entry.decision)).checks if entry.decision else ()
    if checks:
        lines += ["", "| check | outcome | measured | limit | |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {one.name} | {one.outcome} | {one.measured} | {one.limit} | {one.detail} |"
        for one in checks
    ]
    return "\n".join(lines)
