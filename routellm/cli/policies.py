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
    from routellm.policies import Measured, Policy, Recorded
    from routellm.policies.claims import Checked
    from routellm.policies.verify import Verifier
    from routellm.settings import Settings

POLICIES = "Example: routellm policies --data ../shared/data --out report/"


def policies(
    data: Annotated[Path, typer.Option(help="Folder of recorded tables.")],
    to: Annotated[
        Path, typer.Option("--out", help="Folder for the table, the figures and the scorers.")
    ],
    tables: Annotated[str | None, typer.Option(help="Tables by commas; by default all.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="A policy's name or its beginning; can be repeated. By default all."),
    ] = None,
    json: Json = False,
) -> None:
    """Measure every policy on recorded tables: quality, calls, dollars, seconds."""
    import numpy as np

    from registry.policies import log_policies
    from routellm.embeddings import get_encoder
    from routellm.policies import answerable, fitted, load_recorded, measure
    from routellm.policies.cascade import FrugalGPT
    from routellm.policies.claims import check
    from routellm.policies.claims import markdown as claims_markdown
    from routellm.policies.plot import plot_policies
    from routellm.policies.tokens import counter
    from routellm.snapshots import write_atomic

    settings = load_settings()
    encoder = get_encoder(settings.embedding, settings.embeddings_path, settings.storage)
    chosen = _named(all_policies(encoder, settings), only)
    splits = load_recorded(data, settings, counter(settings.policies.tokenizer))
    if tables is not None:
        wanted = [name.strip() for name in tables.split(",")]
        have = [split.measure.name for split in splits]
        for name in wanted:
            if name not in have:
                raise UsageError(f"no table {name!r} in {data}: it has {', '.join(have)}")
        splits = [split for split in splits if split.measure.name in wanted]
    to.mkdir(parents=True, exist_ok=True)
    registry = registry_of(settings)
    found: list[Measured] = []
    for split in splits:
        name = split.measure.name
        measured = []
        for policy in chosen:
            if not only and not answerable(policy, split.measure):
                continue  # the table says so below
            with out.status(f"{name}: {policy.name}"):
                fitted(policy, split.train, split.held)
                if isinstance(policy, FrugalGPT):
                    policy.score.save(to / f"scorer-{name}")
                rng = np.random.default_rng(settings.training.seed)  # the same resamples for all
                measured += measure(
                    [policy], split, resamples=settings.evaluation.bootstrap, rng=rng
                )
        plot_policies(measured, split.measure).savefig(to / f"pareto-{name}.png")
        log_policies(registry, measured, split.measure)
        found += measured
    checked = check(found)
    write_atomic(to / "policies.md", markdown(found) + "\n" + claims_markdown(checked))
    if json:
        print_json([as_json(one) for one in found])
        return
    for split in splits:
        out.print(_table(split.measure, found))
    if checked:
        out.print(_claims(checked))
    out.print(
        f"  [dim]written[/]  {to / 'policies.md'}, pareto-TABLE.png, scorer-TABLE; runs in MLflow"
    )


def all_policies(encoder: Encoder, settings: Settings) -> list[Policy]:
    """Return every policy, untrained."""
    from routellm.policies.answer_score import AnswerScore
    from routellm.policies.automix import PomdpAutoMix, ThresholdAutoMix
    from routellm.policies.bart_score import BartScore
    from routellm.policies.cascade import FrugalGPT, JudgedCascade
    from routellm.policies.hybrid import LABELS, GapEncoder, HybridLLM, recorded_quality
    from routellm.policies.pair import PairRouter
    from routellm.policies.pool import KindPool, KNNPool, MLPPool
    from routellm.policies.several import BestOfN, LLMBlender, PairRanker
    from routellm.policies.single import Oracle, ZeroRouter
    from routellm.policies.verify import EndpointVerifier, PlantedVerifier
    from routellm.routers.base import Pair
    from routellm.settings import PAPER_STRONG, PAPER_WEAK

    seed, scorer = settings.training.seed, settings.policies.scorer
    pair = Pair(settings.strong or PAPER_STRONG, settings.weak or PAPER_WEAK)
    kinds = ("sw_ranking", "mf", "knn", "gaussian_process")
    bart = settings.policies.bart_score
    quality = BartScore(bart.model, bart.revision) if bart.model else recorded_quality
    gap = GapEncoder(encoder, pair, scorer, seed, quality)
    score = AnswerScore(scorer, seed)
    verify = settings.policies.verifier
    verifier: Verifier = (
        EndpointVerifier(verify, settings.votes_path, section="policies.verifier.endpoint")
        if verify.endpoint.base_url
        else PlantedVerifier(verify.planted_right, verify.planted_wrong, verify.samples, seed)
    )
    return [
        ZeroRouter(),
        Oracle(),
        KNNPool("KNN over the pool", encoder, seed),
        MLPPool("MLP over the pool", encoder, seed),
        KindPool(
            "gaussian_process over the pool", encoder, seed, kind="gaussian_process", between=pair
        ),
        *(PairRouter(f"{kind} on a pair", kind, encoder, pair, seed) for kind in kinds),
        *(HybridLLM(f"Hybrid-LLM, {label}", gap, label) for label in LABELS),
        FrugalGPT("FrugalGPT", score),
        ThresholdAutoMix("AutoMix, threshold", pair, verifier, settings),
        PomdpAutoMix("AutoMix, POMDP", pair, verifier, settings),
        BestOfN("best of n", score),
        LLMBlender("LLM-Blender", PairRanker(scorer, seed)),
        *(
            JudgedCascade(f"cascade, judge errs {rate:.0%}", rate, seed)
            for rate in (0.0, 0.1, 0.2, 0.3)
        ),
    ]


def _named(policies: list[Policy], wanted: list[str] | None) -> list[Policy]:
    if not wanted:
        return policies
    for name in wanted:
        if not any(one.name.startswith(name) for one in policies):
            names = "; ".join(one.name for one in policies)
            raise UsageError(f"no policy {name!r}: there are {names}")
    return [one for one in policies if one.name.startswith(tuple(wanted))]


_COLUMNS = (
    "policy", "quality", "calls", "$ / 1,000", "p50 s", "p95 s", "AIQ", "over blind mixing", "APGR",
)  # fmt: skip


def _cells(one: Measured) -> tuple[str, ...]:
    return (
        one.policy + (" (SIMULATED)" if one.simulated else ""), str(one.quality),
        f"{one.calls.value:.2f}", str(one.usd_per_1000), f"{one.latency_p50_s.value:.1f}",
        f"{one.latency_p95_s.value:.1f}", str(one.aiq), str(one.figures["aiq_gain"]),
        str(one.apgr or ""),
    )  # fmt: skip


def _table(measured: Recorded, found: Sequence[Measured]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    mine = [one for one in found if one.table == measured.name]
    told = "" if measured.answers else "; no answers were recorded: their tokens are assumed, and "
    told += "" if measured.answers else "policies that read them are left out"
    table = Table(
        box=SIMPLE_HEAD,
        title=f"{measured.name}: {mine[0].n:,} prompts{told}",
        title_justify="left",
    )
    for i, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for one in mine:
        table.add_row(*_cells(one))
    return table


def _claims(checked: Sequence[Checked]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        box=SIMPLE_HEAD, title="what each policy's paper claims, on these tables",
        title_justify="left",
    )  # fmt: skip
    for column in ("policy", "figure", "at least", "table", "measured", "verdict"):
        table.add_column(column, no_wrap=True)
    for one in checked:
        simulated = " (SIMULATED)" if one.simulated else ""
        table.add_row(
            one.policy + simulated, one.claim.figure, f"{one.claim.least:g}", one.table,
            str(one.measured), one.verdict,
        )  # fmt: skip
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
