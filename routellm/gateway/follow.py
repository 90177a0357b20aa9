"""Follow an alias: load what it points at, check it, swap it in; keep the last good one.

Requests read one attribute (`Follower.serving`), so a swap is one assignment: a request that
began with the old version ends with it.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from routellm.bundle import Bundle, load_bundle, save_bundle
from routellm.embeddings.cache import CachedEncoder
from routellm.errors import BundleError, RouteLLMError
from routellm.gateway.decide import Scored, Target
from routellm.gateway.source import RouterSource, VersionRef
from routellm.snapshots import write_atomic

log = logging.getLogger("routellm.gateway")


@dataclass(frozen=True)
class Serving:
    """A version that is loaded and checked."""

    ref: VersionRef
    bundle: Bundle

    def score(self, prompt: str, target: Target) -> Scored:
        """Score one prompt against the threshold that a target asks of this version.

        Raises
        ------
        BundleError
            If the router gives no win rate; whatever else a broken router raises comes through.
        """
        threshold = self.bundle.thresholds(target.threshold, target.strong_fraction)
        began = time.perf_counter()
        (rate,) = self.bundle.router.win_rate([prompt])
        latency_ms = 1000.0 * (time.perf_counter() - began)
        if not 0.0 <= rate <= 1.0:
            raise BundleError(
                f"version {self.ref.version} gave the win rate {rate}: register it anew"
            )
        return Scored("strong" if rate >= threshold else "weak", float(rate), threshold, latency_ms)

    def asked_fraction(self, target: Target) -> float:
        """Return the strong fraction that a target means for this version."""
        if target.strong_fraction is not None:
            return target.strong_fraction
        return self.bundle.calibration.strong_fraction(self.bundle.thresholds(target.threshold))


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

    Attributes
    ----------
    serving : Serving or None
    problem : str
        Why the alias could not be followed at the last look, or "".
    swaps, failures : int
    """

    def __init__(
        self,
        source: RouterSource,
        folder: Path | None,
        poll_s: float,
        cache_path: Path | None = None,
    ) -> None:
        self.source = source
        self.folder = folder
        self.poll_s = poll_s
        self.cache_path = cache_path
        self.serving: Serving | None = None
        self.problem = ""
        self.swaps = 0
        self.failures = 0
        self._refused: tuple[VersionRef, str] | None = None  # and why
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follow-alias", daemon=True)

    def start(self) -> None:
        """Look once (or take the last good copy), then follow in the background."""
        if self.folder is not None:
            self.look()
            if self.serving is None:
                self._start_from_copy(self.folder)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
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
        try:
            bundle.check_golden()
        except Exception as error:
            self._refused = (ref, str(error) or type(error).__name__)
            raise
        _warm_up(bundle)
        self.serving = Serving(ref, bundle)
        self.swaps += 1
        self.problem = ""
        log.info("loaded version %s of %s (%s)", ref.version, ref.model, bundle.kind)
        if self.folder is not None:
            self._keep_copy(self.folder, ref, bundle)

    def _fail(self, error: Exception) -> None:
        self.failures += 1
        self.problem = str(error) or type(error).__name__
        log.warning("cannot follow the alias: %s", self.problem)

    def _let_go(self, why: str) -> None:
        self.problem = why
        if self.folder is None:
            self.serving = None

    def _run(self) -> None:
        if self.folder is None:
            self.look()
        while not self._stop.wait(self.poll_s):
            self.look()

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
            bundle = load_bundle(folder / f"version-{ref.version}", cache_path=self.cache_path)
            bundle.check_golden()
        except FileNotFoundError:
            return
        except (RouteLLMError, OSError, ValueError, KeyError) as error:
            log.warning("cannot start from the last good copy: %s", error)
            return
        self.serving = Serving(ref, bundle)
        log.warning("serving the last good copy, version %s", ref.version)


def _warm_up(bundle: Bundle) -> None:
    """Let the encoder load before it is needed.

    It does so on the first prompt that its cache does not know, and the cache often knows all the
    golden prompts: the first query would wait for it, seconds long.
    """
    router = bundle.router
    if router.reads_embeddings and isinstance(router.encoder, CachedEncoder):
        router.encoder.encoder.encode(["warm-up"])
