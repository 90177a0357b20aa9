"""A backtest as one MLflow run: its curves as stepped metrics, its figure, and all of its numbers.

No version is registered. The same result is logged once: a backtest that is run again finds its
run.
"""

from __future__ import annotations

import json
from datetime import timedelta
from html import escape
from typing import Any

from registry.calls import said
from registry.client import Registry
from registry.page import page, svg
from routellm.backtest import Backtest, spelled
from routellm.bundle import content_key
from routellm.evaluation.backtest_plot import plot_backtest
from routellm.evaluation.two_policies import Figures

_POLICIES = ("retrained", "never", "gain")


def log_backtest(registry: Registry, result: Backtest) -> str:
    """Log a backtest, unless it was logged before, and return its run's id.

    A curve's step is the day, from the first date, on which its window ends.

    Raises
    ------
    RegistryError
        If MLflow does not do it.
    """
    import mlflow
    from mlflow.entities import Metric

    key = content_key(json.dumps(result.to_dict(), sort_keys=True))
    settings = registry.settings
    with said(settings):
        experiment = mlflow.set_experiment(settings.experiment)
        known = registry.client.search_runs(
            [experiment.experiment_id],
            f"tags.backtest_key = '{key}' and attributes.status = 'FINISHED'",
            max_results=1,
        )
        if known:
            return str(known[0].info.run_id)
        with mlflow.start_run(run_name=f"backtest {result.snapshot[:12]}") as run:
            first, last = result.windows[0], result.windows[-1]
            mlflow.set_tags(
                {
                    "role": "backtest",
                    "backtest_key": key,
                    "snapshot": result.snapshot,
                    "simulated": str(result.simulated).lower(),
                    "mlflow.note.content": ("**SIMULATED** " if result.simulated else "")
                    + result.verdict,
                }
            )
            mlflow.log_params(
                {
                    "from": first.start.isoformat(),
                    "to": last.end.isoformat(),
                    "every": spelled(result.every),
                    "strong": result.pair.strong,
                    "weak": result.pair.weak,
                    "never_retrained_kind": first.serves,
                }
            )
            curve = []
            for one in result.windows:
                if one.comparison is None:
                    continue
                day = round((one.end - first.start) / timedelta(days=1))
                at_ms = int(one.end.timestamp() * 1000)
                found = {"battles": float(one.comparison.battles), "excluded": one.excluded}
                for name in _POLICIES:
                    found |= _metrics(name, getattr(one.comparison, name))
                curve += [Metric(f"window.{k}", float(v), at_ms, day) for k, v in found.items()]
            for start in range(0, len(curve), 1000):  # as many as one call may carry
                registry.client.log_batch(run.info.run_id, metrics=curve[start : start + 1000])
            if result.pooled is not None:
                whole = {"battles": float(result.pooled.battles)}
                for name in _POLICIES:
                    whole |= _metrics(name, getattr(result.pooled, name))
                mlflow.log_metrics(whole)
            mlflow.log_figure(plot_backtest(result), "backtest.png")
            mlflow.log_text(backtest_page(result), "backtest.html")
            mlflow.log_dict(result.to_dict(), "backtest.json")
            return str(run.info.run_id)


def _metrics(name: str, figures: Figures) -> dict[str, float]:
    out: dict[str, float] = {}
    for what in ("apgr", "cross_entropy", "brier"):
        found = getattr(figures, what)
        if found is not None:
            out[f"{name}.{what}"] = found.value
            out[f"{name}.{what}_low"], out[f"{name}.{what}_high"] = found.low, found.high
    return out


def backtest_page(result: Backtest) -> str:
    """Return a backtest as a page of its own (see `registry.page`)."""
    columns = ("until", "battles", "left out", "trained on", "serves", "retrained", "never", "gain")
    head = "".join(f'<th class="n">{name}</th>' for name in columns)
    rows = [
        (
            f"{one.end:%Y-%m-%d}",
            f"{one.comparison.battles:,}" if one.comparison else "0",
            f"{one.excluded:,}",
            f"{one.known:,}",
            one.serves,
            *(_apgr(getattr(one.comparison, name, None)) for name in _POLICIES),
        )
        for one in result.windows
    ]
    if result.pooled is not None:
        excluded = sum(one.excluded for one in result.windows)
        all_of = (_apgr(getattr(result.pooled, name)) for name in _POLICIES)
        rows.append(("all", f"{result.pooled.battles:,}", f"{excluded:,}", "", "", *all_of))
    body = "".join(
        "<tr>" + "".join(f'<td class="n">{escape(cell)}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    pair = f"{result.pair.strong} or {result.pair.weak}"
    return page(
        f"Does retraining pay? {pair}",
        [
            f'<p class="verdict">{escape(result.verdict)}</p>',
            svg(plot_backtest(result)),
            f"<table><tr>{head}</tr>{body}</table>",
            '<p class="note">APGR with 95 % intervals, of battles resampled; gain: on the same '
            "resamples. Retrained: the kind with the highest APGR on held-out battles known at "
            "each date serves until the next. What another training seed would have given is not "
            "in the intervals.</p>",
        ],
        simulated=result.simulated,
    )


def _apgr(figures: Any) -> str:
    return "" if figures is None or figures.apgr is None else str(figures.apgr)
