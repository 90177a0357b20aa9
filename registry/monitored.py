"""What the monitor has to know of MLflow: which version is champion, and what it was made with."""

from __future__ import annotations

import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from registry.calls import said
from registry.client import Registry, VersionInfo, connect
from routellm.bundle import QualityCurve
from routellm.calibration import Calibration
from routellm.errors import RegistryError
from routellm.monitoring.report import Report, look, read_report
from routellm.monitoring.seen import Champion, Seen
from routellm.settings import Settings
from routellm.snapshots import write_atomic

_KEPT = ("calibration", "curve")  # of a bundle's `router.json`


def look_now(settings: Settings, now: datetime | None = None) -> Report:
    """Run the monitor's checks; where MLflow is away, those that need it are unknown."""
    known: Champion | str | None
    try:
        known = champion(connect(settings))
    except RegistryError as error:
        known = str(error)
    seen = Seen(settings, now or datetime.now(UTC), known)
    return look(seen, read_report(settings.home))


def champion(registry: Registry) -> Champion | None:
    """Return the champion as the monitor looks at it; None if there is none.

    Raises
    ------
    RegistryError
        If MLflow does not answer, or the history was tampered with.
    """
    info = registry.champion()
    if info is None:
        return None
    doc, state = _bundle(registry, info), registry.state()
    calibration, curve = doc["calibration"], doc["curve"]
    since = state["at"] if state.get("version") == info.version else None
    return Champion(
        version=info.version,
        kind=info.kind,
        created_at=datetime.fromisoformat(info.created_at),
        since=datetime.fromisoformat(since) if since else None,
        snapshot=info.tags.get("snapshot", ""),
        simulated=info.simulated,
        strong=info.tags.get("strong", ""),
        weak=info.tags.get("weak", ""),
        calibration=Calibration(
            calibration["sample"], calibration["n"], tuple(calibration["quantiles"])
        ),
        curve=curve and QualityCurve(curve["benchmark"], curve["n"], tuple(curve["pgr"])),
    )


def _bundle(registry: Registry, info: VersionInfo) -> dict[str, Any]:
    """Return what a version's bundle says of calibration and curve; it is fetched once."""
    import mlflow

    folder = registry.settings.home / "monitor"
    path = folder / f"version-{info.run_id}.json"
    try:
        kept = json.loads(path.read_text())
        if set(kept) == set(_KEPT):
            return dict(kept)
    except (OSError, ValueError, TypeError):
        pass  # not there, or cut short by hand: it is fetched again
    uri = f"models:/{registry.model}/{info.version}/artifacts/bundle/router.json"
    with said(registry.settings), tempfile.TemporaryDirectory() as temporary:
        local = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=temporary)
        doc = json.loads(Path(local).read_text())
    doc = {name: doc.get(name) for name in _KEPT}
    for other in folder.glob("version-*.json"):
        other.unlink(missing_ok=True)
    write_atomic(path, json.dumps(doc))
    return doc
