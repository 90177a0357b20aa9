"""The ``retrain`` verb: run the flow, then say what came out and what to type next."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from routellm.cli.comparison import (
    augmentation_rows,
    augmentation_table,
    seeds_rows,
    seeds_table,
)
from routellm.cli.context import load_settings, out, print_json
from routellm.errors import UsageError
from routellm.evaluation.evaluate import Evaluation

if TYPE_CHECKING:
    from flows.retrain import Retraining
    from routellm.settings import Settings


def run_retraining(
    sources: Sequence[str] | None,
    routers: str | None,
    benchmarks: str | None,
    *,
    move_alias: bool,
    seeds: int,
    compare_augmentation: bool,
    as_of: str | None,
    as_json: bool,
) -> None:
    """Run the loop once and print its result."""
    from routellm.as_of import moment

    when = None if as_of is None else moment(as_of)  # refused before anything else
    settings = settings_for(routers, benchmarks)
    from flows.engine import configure

    configure(settings)
    from flows.retrain import retrain

    names = list(sources) if sources else None
    result = retrain(settings, names, move_alias, seeds, compare_augmentation, when)
    if as_json:
        print_json(_document(result, settings))
    else:
        _print(result, settings)


def settings_for(routers: str | None, benchmarks: str | None) -> Settings:
    """Return the settings in force, with the router kinds and benchmarks that were asked for."""
    from routellm.routers.base import router_class, router_kinds

    settings = load_settings()
    update: dict[str, Any] = {}
    if routers is not None:
        kinds = tuple(k.strip() for k in routers.split(",") if k.strip())
        update["training"] = settings.training.model_copy(update={"routers": kinds})
    if benchmarks is not None:
        update["evaluation"] = settings.evaluation.model_copy(update={"benchmarks": benchmarks})
    settings = settings.model_copy(update=update)
    if not settings.training.routers:
        raise UsageError(f"no router kind was given: use {', '.join(router_kinds())} or `all`")
    for kind in settings.training.routers:
        if kind != "all":
            router_class(kind)  # refused before anything is ingested
    return settings


def _document(result: Retraining, settings: Settings) -> dict[str, Any]:
    champion = result.champion
    return {
        "snapshot": result.manifest.digest,
        "as_of": result.manifest.as_of,
        "new_battles": result.new_battles,
        "simulated": result.simulated,
        "primary": result.primary,
        "trained": result.trained,
        "reused": result.reused,
        "champion": champion.version if champion else None,
        "champion_why": result.champion_why,
        "decision": result.decision.to_dict() if result.decision else None,
        "data_docs": result.data_docs,
        "routers": [
            {
                "kind": m.kind,
                "version": m.version.version,
                "queries_per_s": m.queries_per_s,
                "latency_ms": m.latency_ms,
                "evaluations": {name: e.to_dict() for name, e in m.evaluations.items()},
            }
            for m in result.measured
        ],
        "trials": [
            {
                "kind": t.kind,
                "augmentation": t.augmentation,
                "seed": t.seed,
                "failed": t.failed,
                "evaluations": {name: e.to_dict() for name, e in t.evaluations.items()},
            }
            for t in result.trials
        ],
    }


def evaluation_table(
    rows: Sequence[tuple[str, Mapping[str, Evaluation], tuple[float, float] | None]],
    title: str = "",
) -> Table:
    """Return the table of routers by benchmarks; rows are (label, evaluations, speed)."""
    table = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("router", no_wrap=True)
    table.add_column("benchmark", no_wrap=True)
    for name in (r"APGR \[95 %]", "CPT50", "CPT80", "q/s", "ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, evaluations, speed in rows:
        for i, (name, one) in enumerate(evaluations.items()):
            table.add_row(
                label if i == 0 else "",
                name,
                str(one.exact.apgr).replace("[", r"\["),
                f"{one.exact.cpt50.value:.0%}",
                f"{one.exact.cpt80.value:.0%}",
                f"{speed[0]:.0f}" if speed and speed[0] < 1e4 and i == 0 else "",
                f"{speed[1]:.0f}" if speed and i == 0 else "",
                end_section=i == len(evaluations) - 1,
            )
    return table


def _measured_on(name: str, one: Evaluation) -> str:
    similarity = "" if one.similarity is None else f"; {one.similarity:.2f}"
    return f"{name} {one.n:,} ({one.excluded:,}; {one.perfect_apgr:.3f}{similarity})"


def _print_trials(result: Retraining) -> None:
    """Print what trials showed: labels against no labels, and one seed against others."""
    if any(t.augmentation != "both" for t in result.trials):
        out.print()
        out.print(augmentation_table(augmentation_rows(result)))
        out.print(
            "[dim]labels: which labels of this very pair were trained on beside all else. "
            "CPT50/80: share of strong calls that recovers 50 % (80 %) of the gap; saved: dollars "
            "a 1,000 queries there, against all of them to strong. paper: its APGR for the same "
            "router and labels, where it has one.[/]"
        )
    spread = seeds_rows(result)
    if spread:
        out.print()
        out.print(seeds_table(spread))
    for trial in result.trials:
        if trial.failed:
            out.print(f"[yellow]{trial.label} was not trained[/]: {trial.failed}")


def _print(result: Retraining, settings: Settings) -> None:
    pair = next(iter(result.measured[0].evaluations.values()))
    title = f"{pair.strong} or {pair.weak}, snapshot {result.manifest.digest[:12]}"
    if result.simulated:
        title = f"[yellow]SIMULATED[/] arena: {title}"
    rows = [
        (f"{m.kind} v{m.version.version}", m.evaluations, (m.queries_per_s, m.latency_ms))
        for m in result.measured
    ]
    out.print()
    out.print(evaluation_table(rows, title))
    out.print(
        "[dim]APGR: random is 0.500. CPTx: least share of strong calls that recovers x % of the "
        "gap. q/s: queries a second in a batch, ms: one query; both with embedding. Prompts "
        "measured (taken out as possibly seen in training; the perfect order's APGR; similarity "
        "to the training prompts): "
        + ", ".join(_measured_on(n, e) for n, e in result.measured[0].evaluations.items())
        + "[/]"
    )
    _print_trials(result)
    if result.manifest.as_of:
        out.print(
            f"\nTrained on what was known by {result.manifest.as_of[:16]} UTC: the champion stays, "
            "whatever came out. `routellm promote VERSION` asks the gate about one."
        )
    elif not result.trained and not result.new_battles:
        out.print("\nNothing new: no battle was ingested, embedded or trained on again.")
    if result.champion is not None:
        out.print(
            f"\nChampion: [bold green]version {result.champion.version}[/] "
            f"({result.champion.kind}) — {result.champion_why}"
        )
        serving = result.champion.version
        kept = next((m for m in result.measured if m.version.version == serving), None)
        for name, one in (kept.evaluations if kept else {}).items():
            cost = one.cost
            if cost is not None and name != "heldout":
                out.print(
                    f"  [dim]{name:<9}[/] half of the gap at ${cost.at_cpt50:.2f} a 1,000 queries "
                    f"({cost.saved(cost.at_cpt50):.0%} saved), 80 % at ${cost.at_cpt80:.2f} "
                    f"({cost.saved(cost.at_cpt80):.0%})"
                )
    if result.decision is not None and result.decision.outcome != "promote":
        out.print(f"This run: {result.decision.outcome} — {result.decision.reason}")
    out.print("\n[bold]Next[/]")
    command = os.path.relpath(sys.argv[0]) if os.path.exists(sys.argv[0]) else "routellm"
    mlflow = os.path.join(os.path.dirname(command), "mlflow") if "/" in command else "mlflow"
    home = f" --home {settings.home}" if str(settings.home) != ".routellm" else ""
    for what, line in (
        ("compare the runs", f"{mlflow} ui --backend-store-uri {settings.resolved_tracking_uri}"),
        ("route a prompt", f'{command}{home} route "Prove that there are infinitely many primes"'),
        ("start the gateway", f"{command}{home} serve --demo"),
    ):
        out.print(f"  [dim]{what:<18}[/] {line}", soft_wrap=True)
