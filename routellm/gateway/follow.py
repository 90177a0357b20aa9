"""Follow an alias: load what it points at, check it, swap it in; keep the last good one.

Requests read one attribute (`Follower.serving`), so a swap is one assignment: a request that
began with the old version ends with it.
"""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import dataclass
from pathlib import Path

from routellm.bundle import Bundle, load_bundle, save_bundle
from routellm.errors import RouteLLMError
from routellm.gateway.source import RouterSource, VersionRef
from routellm.snapshots import write_atomic

log = logging.getLogger("routellm.gateway")


@dataclass(frozen=True)
class Serving:
    """The version that answers now."""

    ref: VersionRef
    bundle: Bundle


class Follower:
    """Polls the alias in a thread of its own.

    Parameters
    ----------
    source : RouterSource
    folder : Path
        Where the last good bundle is kept, to start from when the registry is down.
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
        self, source: RouterSource, folder: Path, poll_s: float, cache_path: Path | None = None
    ) -> None:
        self.source = source
        self.folder = folder
        self.poll_s = poll_s
        self.cache_path = cache_path
        self.serving: Serving | None = None
        self.problem = ""
        self.swaps = 0
        self.failures = 0
        self._refused: VersionRef | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follow-alias", daemon=True)

    def start(self) -> None:
        """Look once (or take the last good copy), then follow in the background."""
        self.look()
        if self.serving is None:
            self._start_from_copy()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def look(self) -> None:
        """Look at the alias once; never raises."""
        try:
            ref = self.source.current()
            if ref is None:
                # an alias that is gone takes nothing down: what serves goes on serving
                self.problem = "the alias points at no version"
                return
            if self.serving is not None and self.serving.ref == ref:
                self.problem = ""
                return
            if ref == self._refused:
                return  # it failed its check; looking again would find the same
            bundle = self.source.load(ref)
            try:
                bundle.check_golden()
            except RouteLLMError:
                self._refused = ref
                raise
            self.serving = Serving(ref, bundle)
            self.swaps += 1
            self.problem = ""
            log.info("serving version %s of %s (%s)", ref.version, ref.model, bundle.kind)
            self._keep_copy(ref, bundle)
        except Exception as error:  # the follower must outlive whatever a registry does
            self.failures += 1
            self.problem = str(error) or type(error).__name__
            log.warning("cannot follow the alias: %s", self.problem)

    def _run(self) -> None:
        while not self._stop.wait(self.poll_s):
            self.look()

    def _keep_copy(self, ref: VersionRef, bundle: Bundle) -> None:
        try:
            save_bundle(bundle, self.folder / f"version-{ref.version}")
            doc = {"model": ref.model, "version": ref.version}
            write_atomic(self.folder / "last_good.json", json.dumps(doc))
        except OSError as error:
            log.warning(
                "cannot keep a copy of version %s in %s: %s", ref.version, self.folder, error
            )

    def _start_from_copy(self) -> None:
        try:
            doc = json.loads((self.folder / "last_good.json").read_text())
            ref = VersionRef(doc["model"], doc["version"])
            bundle = load_bundle(self.folder / f"version-{ref.version}", cache_path=self.cache_path)
            bundle.check_golden()
        except FileNotFoundError:
            return
        except (RouteLLMError, OSError, ValueError, KeyError) as error:
            log.warning("cannot start from the last good copy: %s", error)
            return
        self.serving = Serving(ref, bundle)
        log.warning("serving the last good copy, version %s", ref.version)
