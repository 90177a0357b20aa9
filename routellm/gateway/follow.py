"""Follow an alias: load what it points at, check it, swap it in; keep the last good one.

Requests read one attribute (`Follower.serving`), so a swap is one assignment: a request that
began with the old version ends with it.
"""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from routellm.bundle import Bundle, load_bundle, save_bundle
from routellm.embeddings.memory import Encoders
from routellm.errors import BundleError, RouteLLMError
from routellm.gateway.decide import Scored
from routellm.gateway.source import RouterSource, VersionRef
from routellm.snapshots import write_atomic

log = logging.getLogger("routellm.gateway")

_REMEMBERED = 20  # versions that served
_HEAR_S = 0.1  # between two glances at whether there was a nudge, and so between two looks


@dataclass(frozen=True)
class Served:
    """That a version began to serve, and when."""

    at: datetime
    version: str
    kind: str
    from_copy: bool = False  # the last good copy, since the alias could not be followed


@dataclass(frozen=True)
class Serving:
    """A version that is loaded and checked."""

    ref: VersionRef
    bundle: Bundle

    def score(self, prompt: str, threshold: float) -> Scored:
        """Score one prompt against a threshold.

        Raises
        ------
        BundleError
            If the router gives no win rate; whatever else a broken router raises comes through.
        """
        began = time.perf_counter()
        (rate,) = self.bundle.router.win_rate([prompt])
        latency_ms = 1000.0 * (time.perf_counter() - began)
        if not 0.0 <= rate <= 1.0:
            raise BundleError(
                f"version {self.ref.version} gave the win rate {rate}: register it anew"
            )
        return self.scored(float(rate), threshold, latency_ms)

    def scored(self, rate: float, threshold: float, latency_ms: float) -> Scored:
        return Scored("strong" if rate >= threshold else "weak", rate, threshold, latency_ms)


class Follower:
    """Polls an alias in a thread of its own.

    Parameters
    ----------
    source : RouterSource
    folder : Path or None
        Where the last good bundle is kept, to start from when the registry is down. A follower
        with a folder holds on to what serves when the alias is gone or its version is broken; one
        without lets it go, and does not look before `start` returns.
    poll_s : float
        Seconds between two looks.
    encoders : Encoders
        Shared with other followers: an encoder is large, and loads for seconds.

    Attributes
    ----------
    serving : Serving or None
    problem : str
        Why the alias could not be followed at the last look, or "".
    swaps, failures : int
    served : deque of Served
        The latest versions, the latest last.
    """

    def __init__(
        self,
        source: RouterSource,
        folder: Path | None,
        poll_s: float,
        encoders: Encoders,
    ) -> None:
        self.source = source
        self.folder = folder
        self.poll_s = poll_s
        self.encoders = encoders
        self.serving: Serving | None = None
        self.problem = ""
        self.swaps = 0
        self.failures = 0
        self.served: deque[Served] = deque(maxlen=_REMEMBERED)
        self._refused: tuple[VersionRef, str] | None = None  # and why
        self._nudges: Callable[[], int] = lambda: 0
        self._heard = 0  # what `_nudges` said before the last look
        self._jitter_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follow-alias", daemon=True)

    def hear(self, nudges: Callable[[], int], jitter_s: float) -> None:
        """Look out of turn whenever what `nudges` returns has changed; to be called before `start`.

        Parameters
        ----------
        nudges : callable
            Returns another number after each nudge; asked ten times a second, never raises.
        jitter_s : float
            Longest wait before such a look, drawn anew for each.
        """
        self._nudges, self._jitter_s = nudges, jitter_s
        self._heard = nudges()

    def start(self) -> None:
        """Look once (or take the last good copy), then follow in the background."""
        if self.folder is not None:
            self.look()
            if self.serving is None:
                self._start_from_copy(self.folder)
        self._thread.start()

    def stop(self) -> None:
        """End the looks; a start that is still under way in another thread ends at its first."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def look(self) -> None:
        """Look at the alias once; never raises."""
        try:
            ref = self.source.current()
        except Exception as error:  # the follower must outlive whatever a registry does
            self._fail(error)  # where the alias points is unknown: what serves goes on serving
            return
        if ref is None:
            self._let_go("the alias points at no version")
        elif self.serving is not None and self.serving.ref == ref:
            self.problem = ""
        elif self._refused is not None and self._refused[0] == ref:
            self._let_go(self._refused[1])  # looking again would find the same
        else:
            try:
                self._take(ref)
            except Exception as error:
                self._fail(error)
                self._let_go(self.problem)

    def _take(self, ref: VersionRef) -> None:
        bundle = self.source.load(ref)
        self._share_encoder(bundle)
        try:
            bundle.check_golden()
        except Exception as error:
            self._refused = (ref, str(error) or type(error).__name__)
            raise
        self.serving = Serving(ref, bundle)
        self.served.append(Served(datetime.now(UTC), ref.version, bundle.kind))
        self.swaps += 1
        self.problem = ""
        log.info("loaded version %s of %s (%s)", ref.version, ref.model, bundle.kind)
        if self.folder is not None:
            self._keep_copy(self.folder, ref, bundle)

    def _share_encoder(self, bundle: Bundle) -> None:
        """Let versions share an encoder, and let it load here rather than at the first query."""
        router = bundle.router
        if router.reads_embeddings:
            router.encoder = self.encoders.shared(router.encoder)
            router.encoder.encode(["warm-up"])

    def _fail(self, error: Exception) -> None:
        self.failures += 1
        problem = str(error) or type(error).__name__
        if problem != self.problem:  # once, not at each look
            log.warning("cannot follow the alias: %s", problem)
        self.problem = problem

    def _let_go(self, why: str) -> None:
        self.problem = why
        if self.folder is None:
            self.serving = None

    def _run(self) -> None:
        if self.folder is None and not self._stop.is_set():
            self.look()
        while self._is_due():
            self._heard = self._nudges()  # before the look: one during it asks for another
            self.look()

    def _is_due(self) -> bool:
        """Wait until it is time for a look, by the poll or a nudge; False once told to stop."""
        end = time.monotonic() + self.poll_s
        while (left := end - time.monotonic()) > 0:
            if self._stop.wait(min(left, _HEAR_S)):
                return False
            if self._nudges() != self._heard:
                return not self._stop.wait(random.uniform(0.0, self._jitter_s))
        return not self._stop.is_set()

    def _keep_copy(self, folder: Path, ref: VersionRef, bundle: Bundle) -> None:
        try:
            save_bundle(bundle, folder / f"version-{ref.version}")
            doc = {"model": ref.model, "version": ref.version}
            write_atomic(folder / "last_good.json", json.dumps(doc))
        except OSError as error:
            log.warning("cannot keep a copy of version %s in %s: %s", ref.version, folder, error)

    def _start_from_copy(self, folder: Path) -> None:
        try:
            doc = json.loads((folder / "last_good.json").read_text())
            ref = VersionRef(doc["model"], doc["version"])
            bundle = load_bundle(folder / f"version-{ref.version}")
            self._share_encoder(bundle)
            bundle.check_golden()
        except FileNotFoundError:
            return
        except (RouteLLMError, OSError, ValueError, KeyError) as error:
            log.warning("cannot start from the last good copy: %s", error)
            return
        self.serving = Serving(ref, bundle)
        self.served.append(Served(datetime.now(UTC), ref.version, bundle.kind, from_copy=True))
        log.warning("serving the last good copy, version %s", ref.version)
