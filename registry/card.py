"""The model card: a registered version's description, generated from what was measured."""

from __future__ import annotations

from collections.abc import Mapping

from registry.figures import primary_of
from routellm.bundle import Bundle
from routellm.evaluation.evaluate import Evaluation
from routellm.routers.base import FitReport
from routellm.snapshots import Manifest

_SHARES = (0.1, 0.2, 0.3, 0.5, 0.8)
_TOO_FEW = 200  # prompts, below which an APGR's interval is about 0.1 wide on either side


def summary(bundle: Bundle, manifest: Manifest) -> str:
    """Return the card's first sentences: what it is, and what it was trained on."""
    pair = bundle.pair
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in manifest.by_label_kind.items())
    return (
        f"**{bundle.kind}** router between `{pair.strong}` (strong) and `{pair.weak}` (weak): it "
        "reads a query and says how likely the strong model's answer is to be preferred. Trained "
        f"on snapshot `{manifest.digest[:12]}` of {manifest.created_at[:10]}: "
        f"{manifest.rows:,} battles ({kinds})."
        + (" **SIMULATED** battles." if bundle.simulated else "")
    )


def model_card(
    bundle: Bundle,
    evaluations: Mapping[str, Evaluation],
    manifest: Manifest,
    model: str,
    report: FitReport,
    primary: str | None = None,
) -> str:
    """Return the card as Markdown: what it is, figures, limits, thresholds, how to use it."""
    lines = []
    if bundle.simulated:
        lines += [
            "> **SIMULATED**: trained on simulated battles. Its figures say nothing of real "
            "traffic.",
            "",
        ]
    passed = "passed" if manifest.validation.get("passed") else "did not pass"
    lines += [
        summary(bundle, manifest),
        f"The snapshot {passed} validation. Encoder `{bundle.router.encoder.identity}`; made by "
        f"version {bundle.code_version} of the software.",
        "",
        "### Figures",
        "",
        *_figures(evaluations),
        "",
        "APGR is the area under the curve of quality against calls to strong (random routing: "
        "0.5), with its 95 % interval; CPT(50) is the share of calls to strong that recovers half "
        "of the quality between the two models; saved is the share of the bill of sending every "
        "query to strong, at the prices set. Prompts that training may have shown are taken out.",
        "",
        "### Limits",
        "",
        *(f"- {limit}" for limit in _limits(bundle, evaluations, report)),
        "",
        "### Thresholds",
        "",
        *_thresholds(bundle, evaluations, primary),
        "",
        "### How to use it",
        "",
        *_use(model, bundle.calibration.threshold(0.3)),
    ]
    return "\n".join(lines)


def _figures(evaluations: Mapping[str, Evaluation]) -> list[str]:
    priced = any(one.cost for one in evaluations.values())
    heads = ["benchmark", "prompts (taken out)", "APGR [95 %]", "CPT(50)", "CPT(80)", "AUC"]
    heads += ["saved at CPT(50) / (80)"] * priced
    lines = [_row(heads), _rule(len(heads))]
    for name, one in evaluations.items():
        cells = [
            f"{name} (SIMULATED)" if one.simulated else name,
            f"{one.n:,} ({one.excluded:,})",
            str(one.exact.apgr),
            f"{one.exact.cpt50.value:.1%}",
            f"{one.exact.cpt80.value:.1%}",
            f"{one.auc.value:.3f}",
        ]
        lines.append(_row(cells + [_saved(one)] * priced))
    return lines


def _limits(bundle: Bundle, evaluations: Mapping[str, Evaluation], report: FitReport) -> list[str]:
    sample = bundle.calibration
    limits = [
        "It knows these two models only; others need a router of their own.",
        f"Thresholds hold for queries like the sample they were set on ({sample.sample}, "
        f"{sample.n:,} queries): for your own traffic use `routellm calibrate --queries FILE`.",
        _calibrated(report),
    ]
    few = [f"{name} ({one.n})" for name, one in evaluations.items() if one.n < _TOO_FEW]
    if few:
        limits.append(f"Few prompts, so wide intervals: {', '.join(few)}.")
    worse = [n for n, one in evaluations.items() if one.exact.apgr.high < 0.5]
    if worse:
        limits.append(f"**Worse than random routing** on {', '.join(worse)}.")
    unsure = [n for n, one in evaluations.items() if one.exact.apgr.low <= 0.5 and n not in worse]
    if unsure:
        limits.append(f"Not surely better than random routing on {', '.join(unsure)}.")
    if not any(one.cost for one in evaluations.values()):
        limits.append("No prices are set for the two models (`prices`), so nothing is in dollars.")
    return limits


def _calibrated(report: FitReport) -> str:
    """Say how far win rates are from the shares they stand for."""
    n = report.metrics.get("calibration_n", 0)
    if "calibration_ece_before" not in report.metrics:
        return f"Win rates are not calibrated: {report.params.get('platt', 'not tried')}."
    before, after = (report.metrics[f"calibration_ece_{when}"] for when in ("before", "after"))
    return (
        f"Win rates: expected calibration error {before:.3f} before Platt scaling, {after:.3f} "
        f"as served, over {n:.0f} validation battles that the map was not fitted on."
    )


def _thresholds(
    bundle: Bundle, evaluations: Mapping[str, Evaluation], primary: str | None
) -> list[str]:
    some = primary_of(evaluations, primary) if evaluations else None
    heads = ["strong fraction", "threshold"]
    if some is not None:
        heads.append(f"quality recovered on {some.benchmark}")
    if some is not None and some.cost is not None:
        heads.append("dollars per 1,000 queries")
    lines = [_row(heads), _rule(len(heads))]
    for share in _SHARES:
        cells = [f"{share:.0%}", f"{bundle.calibration.threshold(share):.4f}"]
        if some is not None:
            cells.append(f"{some.pgr_by_percent[round(100 * share)]:.0%}")
        if some is not None and some.cost is not None:
            cells.append(f"{some.cost.weak + share * (some.cost.strong - some.cost.weak):.2f}")
        lines.append(_row(cells))
    return lines


def _use(model: str, threshold: float) -> list[str]:
    prompt = "Why is the sky blue?"
    return [
        f"`@champion` is the version in force; this one is `models:/{model}/<its number>`. In "
        "Python:",
        "",
        "```python",
        f'model = mlflow.pyfunc.load_model("models:/{model}@champion")',
        f'model.predict(pd.DataFrame({{"prompt": ["{prompt}"]}}),',
        f'              params={{"strong_fraction": 0.3}})  # or {{"threshold": {threshold:.4f}}}',
        "```",
        "",
        "In front of the two models, for any OpenAI client (`base_url` "
        "`http://127.0.0.1:6060/v1`, model `router`):",
        "",
        "```bash",
        "routellm serve",
        "```",
        "",
        "As an HTTP service of its own:",
        "",
        "```bash",
        f"mlflow models serve -m models:/{model}@champion --env-manager local --port 5001",
        "curl http://127.0.0.1:5001/invocations -H 'content-type: application/json' \\",
        f'  -d \'{{"dataframe_records": [{{"prompt": "{prompt}"}}],'
        ' "params": {"strong_fraction": 0.3}}\'',
        "```",
    ]


def _row(cells: list[str]) -> str:
    # MLflow's UI sets the cells of a table side by side without a gap
    return f"| {'&emsp; | '.join(cells)} |"


def _rule(n: int) -> str:
    return f"|{' --- |' * n}"


def _saved(one: Evaluation) -> str:
    if one.cost is None:
        return ""
    return f"{one.cost.saved(one.cost.at_cpt50):.0%} / {one.cost.saved(one.cost.at_cpt80):.0%}"
