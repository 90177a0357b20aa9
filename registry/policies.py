"""Policies as MLflow runs: one a table, and in it one a policy, so that they can be compared."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from registry.calls import said
from registry.client import Registry
from routellm.evaluation.evaluate import Interval
from routellm.policies import Measured, Recorded
from routellm.policies.plot import plot_policies

if TYPE_CHECKING:
    from mlflow.entities import Metric

FIGURES = ("quality", "calls", "usd_per_1000", "latency_p50_s", "latency_p95_s", "aiq", "apgr")


def log_policies(registry: Registry, measured: Sequence[Measured], table: Recorded) -> str:
    """Log what policies did on one table, with the Pareto figure; returns the run's id.

    Raises
    ------
    RegistryError
        If MLflow does not do it.
    """
    import mlflow

    with said(registry.settings):
        registry.log_to(f"{registry.settings.experiment}-policies")
        with mlflow.start_run(run_name=f"policies on {table.name}") as parent:
            mlflow.set_tags({"role": "policies", "table": table.name})
            mlflow.log_params(
                {
                    "prompts": len(table),
                    "models": ", ".join(table.models),
                    "answer_tokens": "assumed" if table.tokens_assumed else "counted",
                }
            )
            mlflow.log_figure(plot_policies(measured, table), f"pareto-{table.name}.png")
            for one in measured:
                with mlflow.start_run(
                    run_name=f"{one.policy} on {table.name}", nested=True
                ) as child:
                    mlflow.set_tags(
                        {
                            "role": "policy",
                            "table": one.table,
                            "policy": one.policy,
                            "simulated": str(one.simulated).lower(),
                        }
                    )
                    mlflow.log_params({"policy": one.policy, "setting": one.setting})
                    mlflow.log_metrics(metrics(one))
                    registry.client.log_batch(child.info.run_id, metrics=_curve(one))
        return str(parent.info.run_id)


def _curve(one: Measured) -> list[Metric]:
    from mlflow.entities import Metric

    now_ms = int(time.time() * 1000)
    return [
        Metric(name, value, now_ms, step)
        for step, point in enumerate(one.points.tolist())
        for name, value in zip(("curve.usd_per_1000", "curve.quality"), point, strict=True)
    ]


def metrics(one: Measured) -> dict[str, float]:
    """Return a policy's figures and the ends of their intervals, by flat names."""
    out: dict[str, float] = {}
    for name in FIGURES:
        found: Any = getattr(one, name)
        if found is not None:
            out |= _ends(name, found)
    for name, found in one.figures.items():
        out |= _ends(name, found)
    return out


def _ends(name: str, found: Interval) -> dict[str, float]:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
