"""What a registered version must have, looked for in MLflow: whoever was killed when."""

from __future__ import annotations

from collections import Counter
from typing import Any

from registry import Registry, VersionInfo
from routellm.errors import RouteLLMError

TAGS = {
    "kind", "training_key", "snapshot", "simulated", "strong", "weak", "snapshot_created_at",
    "snapshot_validated",
}  # fmt: skip


def half_registered(registry: Registry) -> list[str]:
    """Return what versions lack or have twice, in words; none if all of them are whole."""
    versions = registry.versions()
    keys = Counter(v.tags.get("training_key", "") for v in versions)
    found = [f"training key {key} has {n} versions" for key, n in keys.items() if n > 1]
    for version in versions:
        found += [f"version {version.version}: {what}" for what in _lacks(registry, version)]
    return found


def _lacks(registry: Registry, version: VersionInfo) -> list[str]:
    client = registry.client
    out = [f"no tag {name}" for name in sorted(TAGS - version.tags.keys())]
    record = client.get_model_version(registry.model, version.version)
    if not (record.description or "").strip():
        out.append("no model card")
    run = client.get_run(version.run_id)
    if (run.info.status, run.info.lifecycle_stage) != ("FINISHED", "active"):
        out.append(f"its run is {run.info.status} and {run.info.lifecycle_stage}")
    if run.data.tags.get("role") != "version" or run.data.tags.get("kind") != version.kind:
        out.append("its run is not that of a version of this kind")
    if not {"apgr", "queries_per_s", "latency_ms_p50"} <= run.data.metrics.keys():
        out.append(f"its run has only the metrics {', '.join(run.data.metrics)}")
    try:
        evaluations = registry.evaluations(version)
        registry.bundle(version).check_golden()
    except RouteLLMError as error:
        return [*out, str(error)]
    for name in evaluations:
        if f"predictions/{name}.parquet" not in _artifacts(client, version.run_id, "predictions"):
            out.append(f"no predictions on {name}")
        parent = run.data.tags.get("mlflow.parentRunId", "")
        sets = _artifacts(client, parent, "evaluation_sets")
        if f"evaluation_sets/{name}.parquet" not in sets:
            out.append(f"its retraining's run lacks the evaluation set {name}")
    if "slices.json" not in _artifacts(client, version.run_id):
        out.append("no slices.json")
    return out


def _artifacts(client: Any, run_id: str, folder: str | None = None) -> set[str]:
    return {one.path for one in client.list_artifacts(run_id, folder)}
