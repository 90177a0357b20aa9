"""The ``policies`` verb: ways to spend less, measured on the same recorded tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from routellm.cli.context import load_settings, out, print_json, registry_of
from routellm.cli.options import Json
from routellm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from routellm.embeddings.base import Encoder
    from routellm.policies import Measured, Policy
    from routellm.settings import Settings

POLICIES = "Example: routellm policies --data ../shared/data --out report/"


def policies(
    data: Annotated[Path, typer.Option(help="Folder of recorded tables.")],
    to: Annotated[Path, typer.Option("--out", help="Folder for the table and the figures.")],
    tables: Annotated[str | None, typer.Option(help="Tables by commas; by default all.")] = None,
    json: Json = False,
) -> None:
    """Measure every policy on recorded tables: quality, calls, dollars, seconds."""
    import numpy as np

    from registry.policies import log_policies
    from routellm.embeddings import get_encoder
    from routellm.policies import load_recorded, measure
    from routellm.policies.plot import plot_policies
    from routellm.policies.tokens import counter
    from routellm.snapshots import write_atomic

    settings = load_settings()
    splits = load_recorded(data, settings, counter(settings.policies.tokenizer))
    if tables is not None:
        wanted = [name.strip() for name in tables.split(",")]
        have = [split.measure.name for split in splits]
        for name in wanted:
            if name not in have:
                raise UsageError(f"no table {name!r} in {data}: it has {', '.join(have)}")
        splits = [split for split in splits if split.measure.name in wanted]
    to.mkdir(parents=True, exist_ok=True)
    encoder = get_encoder(settings.embedding, settings.embeddings_path, settings.storage)
    registry = registry_of(settings)
    found: list[Measured] = []
    for split in splits:
        name = split.measure.name
        measured = []
        for policy in all_policies(encoder, settings):
            with out.status(f"{name}: {policy.name}"):
                policy.fit(split.train)
                rng = np.random.default_rng(settings.training.seed)  # the same resamples for all
                measured += measure(
                    [policy], split, resamples=settings.evaluation.bootstrap, rng=rng
                )
        plot_policies(measured, split.measure).savefig(to / f"pareto-{name}.png")
        log_policies(registry, measured, split.measure)
        found += measured
    write_atomic(to / "policies.md", markdown(found))
    if json:
        print_json([as_json(one) for one in found])
        return
    for split in splits:
        out.print(_table(split.measure.name, found, assumed=split.measure.tokens_assumed))
    out.print(f"  [dim]written[/]  {to / 'policies.md'}, pareto-TABLE.png; runs in MLflow")


def all_policies(encoder: Encoder, settings: Settings) -> list[Policy]:
    """Return every policy, untrained."""
    from routellm.policies.pair import PairRouter
    from routellm.policies.pool import KNNPool, MLPPool
    from routellm.policies.single import Oracle, ZeroRouter
    from routellm.routers.base import Pair
    from routellm.settings import PAPER_STRONG, PAPER_WEAK

    seed = settings.training.seed
    pair = Pair(settings.strong or PAPER_STRONG, settings.weak or PAPER_WEAK)
    kinds = ("sw_ranking", "mf", "knn", "gaussian_process")
    return [
        ZeroRouter(),
        Oracle(),
        KNNPool("KNN over the pool", encoder, seed),
        MLPPool("MLP over the pool", encoder, seed),
        *(PairRouter(f"{kind} on a pair", kind, encoder, pair, seed) for kind in kinds),
    ]


_COLUMNS = ("policy", "quality", "calls", "$ / 1,000", "p50 s", "p95 s", "AIQ", "APGR")


def _cells(one: Measured) -> tuple[str, ...]:
    return (
        one.policy + (" (SIMULATED)" if one.simulated else ""), str(one.quality),
        f"{one.calls.value:.2f}", str(one.usd_per_1000), f"{one.latency_p50_s.value:.1f}",
        f"{one.latency_p95_s.value:.1f}", str(one.aiq), str(one.apgr or ""),
    )  # fmt: skip


def _table(name: str, found: Sequence[Measured], *, assumed: bool) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    mine = [one for one in found if one.table == name]
    told = "; answers' tokens are assumed, none were recorded" if assumed else ""
    table = Table(
        box=SIMPLE_HEAD, title=f"{name}: {mine[0].n:,} prompts{told}", title_justify="left"
    )
    for i, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for one in mine:
        table.add_row(*_cells(one))
    return table


def markdown(found: Sequence[Measured]) -> str:
    """Return the table of all policies on all tables."""
    lines = ["| table | " + " | ".join(_COLUMNS) + " |", "| --- " * (len(_COLUMNS) + 1) + "|"]
    lines += [f"| {one.table} | " + " | ".join(_cells(one)) + " |" for one in found]
    return "\n".join(lines) + "\n"


def as_json(one: Measured) -> dict[str, Any]:
    """Return a policy's figures as JSON takes them."""
    from dataclasses import asdict

    return {**asdict(one), "points": one.points.tolist()}
