"""What a challenger did online, summed over the gateways that share a home or a feedback store.

Gateways write counts (`routellm.gateway.evidence`), one document per process and version, to
``<home>/online/`` and, where the feedback store is a server's, there too. What is in both is taken
once, as the file has it, which is the later. Documents of processes that have ended stay, since
their counts still count; `forget_deleted` removes those of versions that the registry no longer
has.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from routellm.errors import RegistryError
from routellm.feedback import store_url
from routellm.feedback.store import FeedbackStore
from routellm.gateway.evidence import BOUNDS_MS, FORMAT, Counts, Record, median_ms
from routellm.settings import Settings

_UNFINISHED_S = 3600.0  # a file still being written is not this old


@dataclass(frozen=True)
class Online:
    """A version's counts as a challenger.

    Attributes
    ----------
    requests : int
        Requests that it was asked to score, in shadow or as a canary.
    failures : int
        Those on which it raised, gave no win rate, or took too long.
    dropped : int
        Requests beside these that it was not asked about because it was behind.
    shadow : int
        Those of `requests` that were in shadow.
    strong_fraction, asked_fraction : float or None
        Share of its answers that said strong, and the mean strong fraction that was asked of it
        (a threshold's, by its own calibration). They differ where traffic is not like the sample
        it was calibrated on. None if it never answered.
    latency_ms_p50 : float or None
        Median time of scoring. In shadow the champion has often encoded the prompt just before,
        and the encoder's time is then not in it.
    agreement : float or None
        Share of its answers in shadow that gave the champion's route; None without any.
    since, until : str
        First and last request, ISO 8601 in UTC.
    processes : int
        Gateway processes that counted.
    """

    requests: int
    failures: int
    dropped: int
    shadow: int
    strong_fraction: float | None
    asked_fraction: float | None
    latency_ms_p50: float | None
    agreement: float | None
    since: str
    until: str
    processes: int

    @property
    def error_share(self) -> float:
        """Share of the requests that it failed on; 0 without any."""
        return self.failures / self.requests if self.requests else 0.0


def online(settings: Settings, version: str) -> Online | None:
    """Return what a version did online as a challenger; None if it never was one.

    Raises
    ------
    RegistryError
        If a document of its counts is damaged.
    FeedbackUnreachable
        If the feedback store does not answer.
    """
    records = [r for r in _records(settings, version) if r.model == settings.model]
    if not records:
        return None
    counts = [r.counts for r in records]
    latency = np.sum([c.latency for c in counts], axis=0).tolist()
    shadow = [r.counts for r in records if r.mode == "shadow"]
    answered = sum(c.requests - c.failures for c in counts)
    shadowed = sum(c.requests - c.failures for c in shadow)
    return Online(
        requests=sum(c.requests for c in counts),
        failures=sum(c.failures for c in counts),
        dropped=sum(c.dropped for c in counts),
        shadow=sum(c.requests for c in shadow),
        strong_fraction=sum(c.strong for c in counts) / answered if answered else None,
        asked_fraction=sum(c.asked for c in counts) / answered if answered else None,
        latency_ms_p50=median_ms(latency),
        agreement=sum(c.agreed for c in shadow) / shadowed if shadowed else None,
        since=min(r.since for r in records),
        until=max(r.until for r in records),
        processes=len({r.process for r in records}),
    )


def forget_deleted(settings: Settings, versions: Collection[str]) -> int:
    """Remove the files of versions that are not among `versions`; return how many.

    Parameters
    ----------
    versions : collection of str
        Every version that the registered model has now.
    """
    gone = set()
    for name, where, text in _documents(settings):
        if name.split(".")[0] not in versions and _parsed(text, where).model == settings.model:
            gone.add(name)
    for name in gone:
        (_folder(settings) / name).unlink(missing_ok=True)
    with _store(settings) as store:
        if store is not None and gone:
            store.remove_online(gone)
    for rest in _folder(settings).glob(".*.json.*"):  # of a process killed while it wrote
        with contextlib.suppress(FileNotFoundError):  # written to its end just now
            if time.time() - rest.stat().st_mtime > _UNFINISHED_S:
                rest.unlink()
    return len(gone)


def _folder(settings: Settings) -> Path:
    return settings.home / "online"


def _records(settings: Settings, version: str) -> Iterator[Record]:
    for name, where, text in _documents(settings):
        if name.split(".")[0] == version:
            yield _parsed(text, where)


def _documents(settings: Settings) -> Iterator[tuple[str, str, str]]:
    """Yield name, place and text of every document of counts, each name once."""
    seen = set()
    for path in sorted(_folder(settings).glob("*.json")):
        try:
            text = path.read_text()
        except FileNotFoundError:  # another process has removed it just now
            continue
        except (OSError, ValueError) as error:
            raise _damaged(str(path), error) from error
        seen.add(path.name)
        yield path.name, str(path), text
    with _store(settings) as store:
        documents = {} if store is None else store.online()
        for name in sorted(documents.keys() - seen):
            assert store is not None
            yield name, f"{name} in the feedback store {store.name}", documents[name]


@contextlib.contextmanager
def _store(settings: Settings) -> Iterator[FeedbackStore | None]:
    """Yield the feedback store, if it is one that gateways elsewhere write to."""
    store = FeedbackStore(store_url(settings))
    if not store.is_shared:
        yield None
        return
    with contextlib.closing(store):
        yield store


def _parsed(text: str, where: str) -> Record:
    try:
        doc = json.loads(text)
        record = Record(**{**doc, "counts": Counts(**doc["counts"])})
        if record.format != FORMAT or len(record.counts.latency) != len(BOUNDS_MS) + 1:
            raise ValueError(f"format {record.format}, expected {FORMAT}")
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(where, error) from error
    return record


def _damaged(where: str, error: Exception) -> RegistryError:
    return RegistryError(
        f"{where} holds no online counts ({type(error).__name__}: {error}): delete it; what it "
        "counted is lost"
    )
