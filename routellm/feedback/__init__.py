"""What the gateway decided, what came of it, and what it is learned from: the feedback store."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from routellm.settings import Settings


def store_url(settings: Settings) -> str:
    """Return the address of the feedback store: the one that is set, or SQLite in the home."""
    return settings.feedback.store or f"sqlite:///{(settings.home / 'feedback.db').resolve()}"
