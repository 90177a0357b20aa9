"""How the MLflow UI opens on our experiment: what to look at, and the charts to choose by.

The UI keeps a view (filter, order, columns, charts) as a tag of the experiment: MLflow 3.17's
"saved views". One of ours stands under *Views*, so that nobody has to put the charts together.
The browser test holds it against the UI that is installed.
"""

from __future__ import annotations

import base64
import json
import time
import zlib
from collections.abc import Iterable
from typing import Any

from routellm.evaluation.plots import COLOURS

VIEW = "routers"  # what the view's address calls it
VIEW_NAME = "Compare routers"
_TAG = f"mlflow.sharedViewState.{VIEW}"
_NOTE = "mlflow.note.content"
_KIND = "mlflow.experimentKind"  # else the UI opens on pages about chat applications

_CURVES, _FIGURES = "Quality against cost", "Figures, best first"


def address(experiment_id: str) -> str:
    """Return where the view is, from the UI's root."""
    return (
        f"#/experiments/{experiment_id}/runs?workflowType=machine_learning"
        f"&viewStateShareKey={VIEW}&compareRunsMode=CHART"
    )


def name_run(client: Any, run_id: str, kind: str, version: int) -> None:
    """Give a version's run the name and the colour that the UI tells it by.

    A kind is trained again and again: its name alone would not do. The colours are told apart by
    colour-blind eyes, and come back after seven versions.
    """
    client.set_tag(run_id, "mlflow.runName", f"{kind} v{version}")
    client.set_tag(run_id, "mlflow.runColor", COLOURS[version % len(COLOURS)])


def show(
    client: Any, experiment_id: str, benchmarks: Iterable[str], *, priced: bool = True
) -> None:
    """Describe the experiment in the UI, and keep our view of it up to date.

    What a person wrote as the experiment's description, or chose as its kind, stays.
    """
    tags = client.get_experiment(experiment_id).tags
    if _KIND not in tags:
        client.set_experiment_tag(experiment_id, _KIND, "custom_model_development")
    if _NOTE not in tags:
        client.set_experiment_tag(experiment_id, _NOTE, description(experiment_id))
    state = _packed(view(tuple(benchmarks), priced=priced))
    before = json.loads(tags[_TAG]) if _TAG in tags else {}
    if before.get("state") != state:
        now = int(time.time() * 1000)
        saved = {
            "name": VIEW_NAME,
            "createdAt": before.get("createdAt", now),
            "updatedAt": now,
            "state": state,
        }
        client.set_experiment_tag(experiment_id, _TAG, json.dumps(saved))


def description(experiment_id: str) -> str:
    """Return what the experiment's page says: how to choose between routers."""
    return "\n".join(
        [
            f"**To choose a router**: [compare the versions]({address(experiment_id)}), or *Views* "
            f"▸ *{VIEW_NAME}* above; the eye beside a run's name shows or hides it.",
            "",
            "- `<benchmark>.pgr` is the curve: which share of the quality between the weak and "
            "the strong model is reached (1 is all) when so many percent of queries (the step) "
            "go to strong. Higher is better; random routing is the straight line.",
            "- `<benchmark>.apgr` is the area under it (random: 0.5), `apgr` its mean over the "
            "benchmarks, by which a retraining chooses its candidate.",
            "- `<benchmark>.cpt50` is the share of calls to strong that reaches half of that "
            "quality (lower is better), `cost_usd_per_1k_queries` what 1,000 queries then cost "
            "on the primary benchmark.",
            "- `latency_ms_p50` is what the router adds to one query.",
            "",
            "A retraining is a run, with a run inside for each router; on it are the Pareto "
            "figures (`pareto/`) and curves (`curves/`). A router's run has `slices.json` "
            "(language, code, length, category) and leads to its registered version with the "
            "model card.",
        ]
    )


def view(benchmarks: tuple[str, ...], *, priced: bool) -> dict[str, Any]:
    """Return the view as the UI keeps it: versions only, best first, curves on top.

    `priced` says whether there are figures in dollars, and so a chart of them.
    """
    general = ("apgr", "cost_usd_per_1k_queries", "latency_ms_p50", "calibration_ece_after")
    bars = ("apgr", *(f"{name}.{of}" for of in ("apgr", "cpt50") for name in benchmarks))
    charts: list[dict[str, Any]] = [
        {
            "type": "LINE",
            "metricKey": f"{name}.pgr",
            "xAxisKey": "step",
            "lineSmoothness": 0,
            "useGlobalLineSmoothing": False,
            "displayPoints": False,
            "section": _CURVES,
        }
        for name in benchmarks
    ]
    charts += [
        {
            "type": "SCATTER",
            "xaxis": {"key": against, "type": "METRIC"},
            "yaxis": {"key": "apgr", "type": "METRIC"},
            "section": _CURVES,
        }
        for against in ("cost_usd_per_1k_queries", "latency_ms_p50")[0 if priced else 1 :]
    ]
    charts += [
        {"type": "BAR", "metricKey": key, "section": _FIGURES} for key in (*bars, *general[1:])
    ]
    sections = {_CURVES: True, _FIGURES: True, "Model metrics": False, "System metrics": False}
    return {
        "searchFilter": "tags.role = 'version'",
        "orderByKey": "metrics.`apgr`",
        "orderByAsc": False,
        "selectedColumns": [f"metrics.`{name}`" for name in (*general, *bars[1:])],
        "runsHiddenMode": "FIRST_10_RUNS",
        "isAccordionReordered": True,  # else sections stand in the order of their names
        "compareRunCharts": [
            {
                "uuid": f"routellm-{number}",
                "deleted": False,
                "isGenerated": False,
                "runsCountToCompare": 10,
                "displayName": chart.get("metricKey"),
                "metricSectionId": _id(chart.pop("section")),
                **chart,
            }
            for number, chart in enumerate(charts)
        ],
        "compareRunSections": [
            {
                "uuid": _id(name),
                "name": name,
                "display": opened,
                "columns": 2 if name == _CURVES else 3,
                "isReordered": False,
                "deleted": False,
                "isGenerated": False,
            }
            for name, opened in sections.items()
        ],
    }


def _id(section: str) -> str:
    return "routellm-" + section.lower().replace(" ", "-").replace(",", "")


def _packed(state: dict[str, Any]) -> str:
    """Return a view's state as the UI packs it."""
    text = json.dumps(state, separators=(",", ":")).encode()
    return "deflate;" + base64.b64encode(zlib.compress(text)).decode()
