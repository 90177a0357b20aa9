"""What is logged of a router's figures, under the same names on every run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from routellm.evaluation.evaluate import Evaluation
from routellm.evaluation.metrics import exact_curve
from routellm.evaluation.plots import plot_pareto
from routellm.evaluation.slices import SLICES
from routellm.routers.base import FitReport

STRONG_SHARE = 0.3  # of all queries, at which the table of slices gives quality


def log_figures(
    report: FitReport, evaluations: Mapping[str, Evaluation], primary: str | None = None
) -> None:
    """Log on the open run what training and measuring gave: metrics, curves, and all of it.

    A curve is a stepped metric, so that the UI draws those of several runs over each other:
    ``<benchmark>.pgr``, the step being the percent of queries sent to strong.
    """
    import mlflow
    from mlflow.entities import Metric
    from mlflow.utils.time import get_current_time_millis

    now = get_current_time_millis()
    curves = [
        Metric(name, float(value), now, step)
        for name, values in report.history.items()
        for step, value in enumerate(values, 1)
    ]
    curves += [
        Metric(f"{name}.pgr", one.pgr_by_percent[percent], now, percent)
        for name, one in evaluations.items()
        for percent in range(0, 101, 2)
    ]
    mlflow.log_metrics({**flat_metrics(evaluations, primary), **report.metrics})
    run = mlflow.active_run()
    assert run is not None
    client = mlflow.MlflowClient()
    for first in range(0, len(curves), 1000):  # as many as one call may carry
        client.log_batch(run.info.run_id, metrics=curves[first : first + 1000])
    mlflow.log_dict({name: one.to_dict() for name, one in evaluations.items()}, "evaluations.json")


def flat_metrics(
    evaluations: Mapping[str, Evaluation], primary: str | None = None
) -> dict[str, float]:
    """Return evaluations as flat metric names, the same on every run.

    Those of no benchmark are ``apgr``, by which a retraining chooses its candidate (`mean_apgr`),
    and ``cost_usd_per_1k_queries``, at CPT(50) of the primary benchmark (by default the one with
    most prompts), where the two models have prices.
    """
    out: dict[str, float] = {}
    for name, one in evaluations.items():
        figures: dict[str, Any] = {
            "apgr": one.exact.apgr.value,
            "apgr_low": one.exact.apgr.low,
            "apgr_high": one.exact.apgr.high,
            "cpt20": one.exact.cpt20.value,
            "cpt50": one.exact.cpt50.value,
            "cpt80": one.exact.cpt80.value,
            "paper_apgr": one.paper.apgr.value,
            "paper_cpt50": one.paper.cpt50.value,
            "paper_cpt80": one.paper.cpt80.value,
            "auc": one.auc.value,
            "n": one.n,
            "excluded": one.excluded,
            "perfect_apgr": one.perfect_apgr,
            "random_apgr": 0.5,
            "similarity": one.similarity,
        }
        if one.cost is not None:
            figures["cost_usd_per_1k_queries_all_strong"] = one.cost.strong
            figures["cost_usd_per_1k_queries_all_weak"] = one.cost.weak
            for reached in ("cpt50", "cpt80"):
                cost = getattr(one.cost, f"at_{reached}")
                figures[f"cost_usd_per_1k_queries_{reached}"] = cost
                figures[f"saved_{reached}"] = one.cost.saved(cost)
        out |= {f"{name}.{k}": float(v) for k, v in figures.items() if v is not None}
    if evaluations:
        out["apgr"] = mean_apgr(evaluations)
        cost_of = primary_of(evaluations, primary).cost
        if cost_of is not None:
            out["cost_usd_per_1k_queries"] = cost_of.at_cpt50
    return out


def mean_apgr(evaluations: Mapping[str, Evaluation]) -> float:
    """Return the mean APGR over benchmarks.

    Held-out battles count only where there is no benchmark: they are few.
    """
    return statistics.fmean(one.exact.apgr.value for one in _tables(evaluations))


def _tables(evaluations: Mapping[str, Evaluation]) -> list[Evaluation]:
    found = [one for name, one in evaluations.items() if name != "heldout"]
    return found or list(evaluations.values())


def primary_of(evaluations: Mapping[str, Evaluation], primary: str | None) -> Evaluation:
    if primary is not None and primary in evaluations:
        return evaluations[primary]
    return max(_tables(evaluations), key=lambda one: one.n)


def slice_table(predictions: Mapping[str, pa.Table]) -> dict[str, list[Any]]:
    """Return how a router does on each slice of each benchmark, as columns of a table.

    Parameters
    ----------
    predictions : dict of pyarrow.Table
        By benchmark, as `registry.predictions.predictions_table` makes them.

    Returns
    -------
    dict of list
        ``part`` (such as ``mmlu code=yes``; ``mmlu all`` for the whole), ``apgr`` and ``cpt50``
        (None where strong is no better than weak, so that there is no gap to recover),
        ``quality_at_30`` and ``strong_share_at_30`` (the part's mean score, and the share of its
        prompts that go to strong, at the threshold that sends 30 % of the whole benchmark there),
        ``quality_weak`` and ``quality_strong`` (all to one model), ``n`` prompts; and what
        ``part`` is made of: ``benchmark``, ``slice``, ``value``. The UI's table view compares
        runs by the first column, and shows the second.
    """
    rows = [row for name, table in predictions.items() for row in _parts(name, table)]
    return {column: [row[column] for row in rows] for column in (rows[0] if rows else ())}


def _parts(name: str, table: pa.Table) -> list[dict[str, Any]]:
    rate, strong, weak = (table[c].to_numpy() for c in ("win_rate", "strong", "weak"))
    routed = _routed(rate, STRONG_SHARE)
    quality = weak + routed * (strong - weak)
    parts = [("all", "", np.ones(len(rate), dtype=bool))]
    for by in SLICES:
        values = np.array(table[by].to_pylist(), dtype=object)
        # a slice that is the whole benchmark says nothing more
        found = [v for v in sorted(set(values)) if v and not (values == v).all()]
        parts += [(by, value, values == value) for value in found]
    rows = []
    for by, value, of in parts:
        apgr = cpt50 = None
        if strong[of].mean() > weak[of].mean():
            curve = exact_curve(rate[of], strong[of], weak[of], np.ones(int(of.sum())))
            apgr, cpt50 = curve.apgr(), curve.cpt(0.5)
        figures = {
            "apgr": apgr,
            "cpt50": cpt50,
            "quality_at_30": quality[of].mean(),
            "strong_share_at_30": routed[of].mean(),
            "quality_weak": weak[of].mean(),
            "quality_strong": strong[of].mean(),
        }
        rows.append(
            {
                "part": f"{name} {by}={value}" if value else f"{name} {by}",
                **{k: None if v is None else round(float(v), 4) for k, v in figures.items()},
                "n": int(of.sum()),
                "benchmark": name,
                "slice": by,
                "value": value,
            }
        )
    return rows


def _routed(rate: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """Return P(prompt goes to strong) when `share` of all do: ties in expectation."""
    limit = np.sort(rate)[::-1][int(np.ceil(share * len(rate))) - 1]
    above, tied = rate > limit, rate == limit
    among_tied = (share * len(rate) - above.sum()) / tied.sum()
    return np.where(above, 1.0, np.where(tied, among_tied, 0.0))


def log_pareto(by_kind: Mapping[str, Evaluation]) -> None:
    """Log on the open run what quality each router kind gives at what cost, on one benchmark."""
    import mlflow

    name = next(iter(by_kind.values())).benchmark
    mlflow.log_figure(plot_pareto(by_kind), f"pareto/{name}.png")
