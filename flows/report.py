"""What a retraining says of its routers, and the report that it ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prefect.artifacts import create_markdown_artifact

from registry import Registry, VersionInfo
from registry.retraining_report import RetrainingReport, log_report, markdown
from routellm.evaluation.evaluate import Evaluation


def label(version: VersionInfo | None) -> str:
    """Return what a report calls a version; "" for none."""
    return f"{version.kind} v{version.version}" if version else ""


def end_with(report: RetrainingReport, registry: Registry, run_id: str | None) -> None:
    """Keep the report; without a run, where nothing was trained, in Prefect alone."""
    create_markdown_artifact(markdown(report), key="retraining-report", description=report.headline)
    if run_id is not None:
        log_report(registry, run_id, report)


def apgr(found: Mapping[str, Evaluation]) -> str:
    """Return a router's APGR on each benchmark, in words."""
    figures = (f"{name} {one.exact.apgr.value:.3f}" for name, one in found.items())
    return "APGR " + ", ".join(figures)


def figures_table(
    routers: Sequence[tuple[str, str, Mapping[str, Evaluation]]],
) -> list[dict[str, str]]:
    """Return an artifact's rows, of (label, version, evaluations) each."""
    return [
        {
            "router": label,
            "version": version,
            "benchmark": f"{name} (SIMULATED)" if e.simulated else name,
            "APGR": str(e.exact.apgr),
            "CPT(50)": f"{e.exact.cpt50.value:.3f}",
            "CPT(80)": f"{e.exact.cpt80.value:.3f}",
        }
        for label, version, evaluations in routers
        for name, e in evaluations.items()
    ]
