"""The source protocol: where battles come from, and how far they have been read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import pyarrow as pa

NOTHING: Mapping[str, str] = MappingProxyType({})


class Source(Protocol):
    """A place that battles are read from.

    Attributes
    ----------
    passed_over : Mapping
        What the last reading left out, though it was there: its key in the cursor -> why, in a
        sentence. Only the inbox leaves anything out; other sources raise.
    """

    name: str
    simulated: bool
    passed_over: Mapping[str, str]

    def cursor(self) -> dict[str, Any]:
        """Return a JSON-able fingerprint of all there is to read now.

        It is published with the snapshot; while it stays the same, there is nothing new.
        """

    def batches(self, since: dict[str, Any] | None) -> Iterator[pa.RecordBatch]:
        """Yield battles in the battle schema, leaving out what `since` shows to be unchanged.

        Yielding some that were read before does no harm: ingest knows their ids.

        Raises
        ------
        SourceError
            If the source cannot be read.
        """
