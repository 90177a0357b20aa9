"""Prefect's own settings, set before it is first imported."""

from __future__ import annotations

import os

from routellm.settings import Settings


def configure(settings: Settings) -> None:
    """Point Prefect at the home folder, with no telemetry, unless the environment says otherwise.

    Must run before `prefect` is imported: it reads its settings once.
    """
    home = (settings.home / "prefect").resolve()
    home.mkdir(parents=True, exist_ok=True)
    for name, value in {
        "PREFECT_HOME": str(home),
        # the first start in a fresh home builds a database, which takes most of the default 20 s
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        # a failed flow raises, and the command says why in one sentence
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    }.items():
        os.environ.setdefault(name, value)
