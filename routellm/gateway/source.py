"""Where the gateway gets its router from: a small protocol that the registry implements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from routellm.bundle import Bundle


@dataclass(frozen=True)
class VersionRef:
    """One registered version."""

    model: str
    version: str


class RouterSource(Protocol):
    """The alias that is served, and the versions it can point at."""

    def current(self) -> VersionRef | None:
        """Return what the alias points at now; None if it points at nothing.

        Raises
        ------
        RegistryError
            If the registry does not answer.
        """

    def load(self, ref: VersionRef) -> Bundle:
        """Load a version; slow, never called on the request path."""
