"""What a retraining that looks back trains on, in place of reading sources."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

import expectations
from flows.steps import step
from routellm.as_of import publish_as_of
from routellm.ingest import Staged
from routellm.settings import Settings
from routellm.snapshots import Manifest, SnapshotStore


@task(cache_policy=NO_CACHE, persist_result=False)
def look_back(
    when: datetime, store: SnapshotStore, settings: Settings
) -> tuple[Staged, Manifest, Path | None, tuple[str, ...]]:
    """Return the snapshot of what was known, held to the rules, as if it had just been taken in."""

    def check(manifest: Manifest) -> dict[str, Any]:
        found = expectations.validate_snapshot(manifest, store, settings)
        found.raise_if_failed()
        return found.summary()

    with step("look back") as line:
        manifest = publish_as_of(store, when, check)
        line.result = (
            f"snapshot {manifest.digest[:12]}, {manifest.rows:,} battles known by "
            f"{when:%Y-%m-%d %H:%M} UTC"
        )
        line.note("nothing is read from the sources, and the champion stays as it is")
    nothing = Staged(
        directory=store.staging_dir,
        parts=(),
        cursors={},
        read=0,
        new=0,
        duplicates=0,
        sources=(),
        unchanged=(),
        simulated=manifest.simulated,
        previous=None,
    )
    return nothing, manifest, expectations.data_docs(settings), ()
