"""The model card: a registered version's description, generated from what was measured."""

from __future__ import annotations

from collections.abc import Mapping

from routellm.bundle import Bundle
from routellm.evaluation.evaluate import Evaluation
from routellm.routers.base import FitReport
from routellm.snapshots import Manifest


def model_card(
    bundle: Bundle,
    evaluations: Mapping[str, Evaluation],
    manifest: Manifest,
    model: str,
    report: FitReport,
) -> str:
    """Return the card as Markdown: what it is, its figures, its thresholds, how to use it."""
    pair = bundle.pair
    lines = [
        f"**{bundle.kind}** router between `{pair.strong}` and `{pair.weak}`"
        + (" — trained on **SIMULATED** battles" if bundle.simulated else ""),
        "",
        f"Trained on snapshot `{manifest.digest[:12]}`: {manifest.rows:,} battles "
        f"({', '.join(f'{n:,} {k}' for k, n in manifest.by_label_kind.items())}). "
        f"Encoder `{bundle.router.encoder.identity}`.",
        "",
        "| benchmark | prompts (taken out) | APGR [95 %] | CPT(50) | CPT(80) | AUC | similarity | "
        "saved at CPT(50) / (80) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, one in evaluations.items():
        label = f"{name} (SIMULATED)" if one.simulated else name
        similarity = "" if one.similarity is None else f"{one.similarity:.3f}"
        lines.append(
            f"| {label} | {one.n} ({one.excluded}) | {one.exact.apgr} | "
            f"{one.exact.cpt50.value:.1%} | {one.exact.cpt80.value:.1%} | {one.auc.value:.3f} | "
            f"{similarity} | {_saved(one)} |"
        )
    lines += [
        "",
        "The random router has APGR 0.5; saved is the share of the cost of sending every query "
        "to strong, at the prices set. Limits: two models only; thresholds hold for queries "
        f"like the sample they were set on ({bundle.calibration.sample}, "
        f"{bundle.calibration.n} queries).",
        "",
        _calibrated(report),
        "",
        "| strong fraction | threshold |",
        "| --- | --- |",
    ]
    lines += [
        f"| {share:.0%} | {bundle.calibration.threshold(share):.4f} |"
        for share in (0.1, 0.2, 0.3, 0.5, 0.8)
    ]
    lines += [
        "",
        "```python",
        f'model = mlflow.pyfunc.load_model("models:/{model}@champion")',
        'model.predict(pd.DataFrame({"prompt": ["Why is the sky blue?"]}),',
        '              params={"strong_fraction": 0.3})',
        "```",
    ]
    return "\n".join(lines)


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


def _saved(one: Evaluation) -> str:
    if one.cost is None:
        return ""
    return f"{one.cost.saved(one.cost.at_cpt50):.0%} / {one.cost.saved(one.cost.at_cpt80):.0%}"
