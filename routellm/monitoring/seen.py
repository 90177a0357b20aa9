"""What the checks look at: each thing is read once, and what could not be read is told alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

from routellm.bundle import QualityCurve
from routellm.calibration import Calibration
from routellm.errors import RouteLLMError, UsageError
from routellm.monitoring.finding import Unknown
from routellm.monitoring.gateways import GatewaySeen, ask, urls
from routellm.monitoring.prompts import Baseline, Counts, baseline, counted
from routellm.monitoring.traffic import Traffic, read_traffic
from routellm.settings import Settings
from routellm.snapshots import Manifest, snapshot_store

T = TypeVar("T")


@dataclass(frozen=True)
class Champion:
    """The version that gateways serve, as far as it is looked at.

    Attributes
    ----------
    created_at : datetime
        When it was registered.
    since : datetime or None
        From when it is champion, as the history has it.
    snapshot : str
        Digest of what it was trained on.
    """

    version: str
    kind: str
    created_at: datetime
    since: datetime | None
    snapshot: str
    simulated: bool
    strong: str
    weak: str
    calibration: Calibration
    curve: QualityCurve | None


@dataclass
class Seen:
    """All that the checks look at.

    Parameters
    ----------
    champion : Champion, str or None
        Or why it is not known; None if there is none.
    """

    settings: Settings
    at: datetime
    champion_or_why: Champion | str | None
    _read: dict[str, Any] = field(default_factory=dict, repr=False)

    def champion(self) -> Champion:
        if isinstance(self.champion_or_why, str):
            raise Unknown(self.champion_or_why)
        if self.champion_or_why is None:
            raise Unknown("there is no champion yet")
        return self.champion_or_why

    def newest_snapshot(self) -> Manifest:
        """Return the newest snapshot of the champion's kind of battles, real or simulated."""
        known = self.champion_or_why
        kinds = (known.simulated,) if isinstance(known, Champion) else (False, True)

        def read() -> Manifest:
            stores = (snapshot_store(self.settings, simulated=s) for s in kinds)
            found = [m for store in stores if (m := store.latest()) is not None]
            if not found:
                raise Unknown("there is no snapshot yet")
            return max(found, key=lambda m: m.created_at)

        return self._once("snapshot", read)

    def traffic(self) -> Traffic:
        """Return what gateways decided lately, by the feedback store."""
        known = self.champion_or_why
        version = known.version if isinstance(known, Champion) else ""
        return self._once("traffic", lambda: read_traffic(self.settings, version, self.at))

    def gateways(self) -> list[GatewaySeen]:
        """Return what each gateway says of itself."""
        how = self.settings.monitor
        return self._once("gateways", lambda: [ask(u, how.timeout_s) for u in urls(self.settings)])

    def baseline(self) -> Baseline:
        """Return the prompts that the champion was trained on, counted."""
        champion = self.champion()

        def read() -> Baseline:
            store = snapshot_store(self.settings, simulated=champion.simulated)
            try:
                manifest = store.get(champion.snapshot)
            except UsageError as error:
                raise Unknown(
                    f"the snapshot {champion.snapshot[:12]} that the champion was trained on is "
                    "not in this home"
                ) from error
            return baseline(store, manifest, self.settings.home / "monitor")

        return self._once("baseline", read)

    def counted(self, prompts: tuple[str, ...]) -> Counts:
        """Return the live prompts, counted."""
        return self._once("counted", lambda: counted(prompts))

    def _once(self, name: str, read: Callable[[], T]) -> T:
        if name not in self._read:
            try:
                self._read[name] = read()
            except (Unknown, RouteLLMError) as error:
                self._read[name] = error
        found = self._read[name]
        if isinstance(found, Exception):
            raise found
        out: T = found
        return out
