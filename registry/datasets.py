"""What a run was trained and measured on, as MLflow datasets: name, digest and counts.

The rows themselves are in snapshots and in the parent run's artifacts; MLflow only has to know
which they were.
"""

from __future__ import annotations

import json
from typing import Any

from routellm.evaluation.evaluate import Evaluation
from routellm.snapshots import Manifest

_DIGEST = 36  # characters that MLflow keeps of a dataset's digest


def log_snapshot(manifest: Manifest) -> None:
    """Log on the open run the battles that routers were trained on."""
    short = manifest.digest[:12]
    _log(
        f"snapshot-{short}",
        manifest.digest,
        f"snapshot {short}",
        "training",
        {
            "num_rows": manifest.rows,
            "by_label_kind": manifest.by_label_kind,
            "by_source": manifest.by_source,
            "by_winner": manifest.by_winner,
            "simulated": manifest.simulated,
        },
    )


def log_evaluation_set(one: Evaluation, run_id: str) -> None:
    """Log on the open run a benchmark that routers were measured on, which `run_id` keeps."""
    counts = {"num_rows": one.n, "excluded": one.excluded, "simulated": one.simulated}
    log_evaluation_counts(one.benchmark, one.benchmark_digest, counts, run_id)


def log_evaluation_counts(name: str, digest: str, counts: dict[str, Any], run_id: str) -> None:
    """Log on the open run a benchmark of this content, which `run_id` keeps."""
    where = f"runs:/{run_id}/evaluation_sets/{name}.parquet"
    _log(name, digest, where, "evaluation", counts)


def _log(name: str, digest: str, where: str, context: str, profile: dict[str, Any]) -> None:
    import mlflow
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset

    class Counted(MetaDataset):
        """Only a name and a digest, with counts for the UI to show."""

        def to_dict(self) -> dict[str, str]:
            return {**super().to_dict(), "profile": json.dumps(profile)}

    source = CodeDatasetSource({"mlflow.source.name": where, "mlflow.source.type": "LOCAL"})
    mlflow.log_input(Counted(source, name, digest[:_DIGEST]), context=context)
