"""Sources of battles: files, folders, the Hugging Face hub, our gateway, the simulated arena."""

from __future__ import annotations

import re
from pathlib import Path

from routellm.errors import UsageError
from routellm.settings import Settings
from routellm.sources.base import Source

__all__ = ["Source", "open_source"]

_HUB_NAME = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")


def open_source(spec: str, settings: Settings) -> Source:
    """Return the source that `spec` names.

    Parameters
    ----------
    spec : str
        A file or folder (the inbox: what has settled there); ``hf://org/name@revision`` or
        ``org/name``; ``simulated://arena`` with optional ``?battles=20000&seed=0``; ``gateway://``
        for the home's own feedback store, or ``gateway://`` and a path or a PostgreSQL address.

    Raises
    ------
    UsageError
        If it is none of these.
    """
    if spec.startswith("simulated://"):
        from routellm.sources.simulated import SimulatedArena

        return SimulatedArena(spec)
    if spec.startswith("gateway://"):
        from routellm.sources.gateway import GatewaySource

        return GatewaySource(spec, settings)
    path = Path(spec).expanduser()
    if path.resolve() == settings.inbox_dir.resolve():
        from routellm.sources.inbox import InboxSource

        return InboxSource(settings)
    if path.exists():
        from routellm.sources.files import FileSource, FolderSource

        return (
            FolderSource(path, settings.ingest)
            if path.is_dir()
            else FileSource(path, settings.ingest)
        )
    hub = _HUB_NAME.fullmatch(spec)
    looks_like_path = spec.startswith((".", "/", "~")) or path.suffix in {
        ".csv",
        ".parquet",
        ".jsonl",
        ".json",
        ".gz",
        ".zip",
    }
    if hub and not looks_like_path:
        from routellm.sources.hub import HubSource

        return HubSource(hub.group(1), hub.group(2), settings.ingest)
    raise UsageError(
        f"no source {spec!r}: give a file or folder that exists, a Hugging Face name "
        "(org/name@revision), gateway:// or simulated://arena"
    )
