"""The verbs ``route``, ``calibrate`` and ``evaluate``: what a registered router says of queries.

With ``--strong`` and ``--weak`` the version's router is turned to another pair of models that it
has met. Nothing is trained for that; but the version's thresholds and stored figures are of its
own pair, so that each verb then needs what it would else take from there.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from routellm.cli.context import load_settings, out, print_json, registry_of
from routellm.cli.options import Benchmarks, Fraction, Json, Strong, Threshold, Version, Weak
from routellm.errors import BenchmarkError, UsageError

if TYPE_CHECKING:
    from registry import VersionInfo
    from routellm.bundle import Bundle
    from routellm.evaluation.benchmarks import Benchmark
    from routellm.evaluation.evaluate import Evaluation
    from routellm.routers.base import Pair, Router
    from routellm.settings import Settings

_PAIR = "for another pair --strong gpt-4-1106-preview --weak mistral-7b-instruct-v0.3"
ROUTE = (
    'Example: routellm route "Prove that 17 is prime" --strong-fraction 0.3; '
    f"{_PAIR} --threshold 0.6"
)
CALIBRATE = (
    "Example: routellm calibrate --queries queries.txt --strong-fraction 0.3; "
    f"{_PAIR} beside --queries"
)
EVALUATE = f"Example: routellm evaluate champion --benchmarks tables/; {_PAIR} beside --benchmarks"


def turned(router: Router, strong: str | None, weak: str | None) -> Router:
    """Return the router between the models that were asked for; its own pair if none were.

    Says on standard error what speaks against the pair.

    Raises
    ------
    UsageError
        If only one model was named, or the router cannot be turned to this pair.
    """
    from routellm.battles import canonical_model
    from routellm.routers.base import Pair

    if strong is None and weak is None:
        return router
    if strong is None or weak is None:
        raise UsageError("give both --strong and --weak, or neither")
    other = router.for_pair(Pair(canonical_model(strong), canonical_model(weak)))
    doubt = "" if other is router else other.lineup_.doubt(other.pair.strong, other.pair.weak)
    if doubt:
        err = Console(stderr=True, highlight=False, soft_wrap=True)
        err.print("[yellow]warning:[/]", end=" ")
        err.print(doubt, markup=False)
    return other


def route(
    prompt: str,
    threshold: Threshold = None,
    strong_fraction: Fraction = None,
    strong: Strong = None,
    weak: Weak = None,
    version: Version = "champion",
    json: Json = False,
) -> None:
    """Say where one prompt would go."""
    info, bundle, router = _loaded(version, strong, weak)
    pair = router.pair
    if pair != bundle.pair and (threshold is None or strong_fraction is not None):
        raise UsageError(
            f"the thresholds of version {info.version} are for {_said(bundle.pair)}: give a "
            f"--threshold for {_said(pair)}, which `routellm calibrate` finds on your --queries"
        )
    limit = bundle.thresholds(threshold, strong_fraction)
    rate = float(router.win_rate([prompt])[0])
    way = "strong" if rate >= limit else "weak"
    model = pair.strong if way == "strong" else pair.weak
    if json:
        print_json(
            {"route": way, "model": model, "win_rate": rate, "threshold": limit,
             "version": info.version, "kind": info.kind, "simulated": info.simulated}
        )  # fmt: skip
        return
    out.print(
        f"[bold]{way}[/] ({model}): win rate {rate:.4f} "
        f"{'≥' if way == 'strong' else '<'} threshold {limit:.4f}; {info.kind}, "
        f"version {info.version}" + (", [yellow]SIMULATED[/]" if info.simulated else "")
    )


def calibrate(
    queries: Annotated[
        Path | None, typer.Option(help="Your own queries, one a line; by default the version's.")
    ] = None,
    strong_fraction: Annotated[float, typer.Option(help="Share for strong, in [0, 1].")] = 0.5,
    strong: Strong = None,
    weak: Weak = None,
    version: Version = "champion",
    json: Json = False,
) -> None:
    """Say which threshold sends a share of your queries to strong."""
    from routellm.calibration import Calibration

    info, bundle, router = _loaded(version, strong, weak)
    calibration = bundle.calibration
    if queries is not None:
        try:
            lines = [q for q in queries.read_text(encoding="utf-8").splitlines() if q.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {queries} ({error}): give a UTF-8 text file") from error
        calibration = Calibration.of(router.win_rate(lines), str(queries))
    elif router.pair != bundle.pair:
        raise UsageError(
            f"the calibration of version {info.version} is of {_said(bundle.pair)} on "
            f"{calibration.sample}: give --queries FILE to calibrate {_said(router.pair)} on"
        )
    limit = calibration.threshold(strong_fraction)
    low, high = calibration.threshold_interval(strong_fraction)
    if json:
        print_json(
            {"threshold": limit, "threshold_low": low, "threshold_high": high,
             "strong_fraction": strong_fraction, "sample": calibration.sample,
             "n": calibration.n, "version": info.version, "strong": router.pair.strong,
             "weak": router.pair.weak}
        )  # fmt: skip
        return
    # a gateway serves the version's own pair: only for that is the threshold part of a model name
    named = f" As a model name: router-{info.kind}-{limit:.4f}"
    out.print(
        f"threshold [bold]{limit:.4f}[/] sends {strong_fraction:.0%} of {calibration.n:,} queries "
        f"({calibration.sample}) to strong ({router.pair.strong}, else {router.pair.weak}); for "
        rf"all traffic like these it lies in \[{low:.4f}, {high:.4f}] (95 %)."
        + (named if router.pair == bundle.pair else "")
    )


def evaluate(
    version: Annotated[str, typer.Argument(help="Version number or alias.")],
    benchmarks: Benchmarks = None,
    strong: Strong = None,
    weak: Weak = None,
    json: Json = False,
) -> None:
    """Show how a version did, or measure it on other benchmark tables."""
    from routellm.cli.retrain import evaluation_table

    settings = load_settings()
    registry = registry_of(settings)
    info = registry.get(version)
    label = f"{info.kind} v{info.version}"
    if benchmarks is None:
        if strong is not None or weak is not None:
            raise UsageError(
                f"the figures of version {info.version} are of the pair it was trained for: give "
                "--benchmarks with --strong and --weak"
            )
        found = registry.evaluations(info)
    else:
        from flows.work import named_benchmarks

        bundle = registry.bundle(info, cache_path=settings.embeddings_path)
        router = turned(bundle.router, strong, weak)
        tables = named_benchmarks(benchmarks, settings.home)
        if router.pair != bundle.pair:
            tables = _with_scores(tables, router.pair, benchmarks)
            label += f", {_said(router.pair)}"
        found = {one.name: _measured(router, one, settings) for one in tables}
    if json:
        print_json({name: one.to_dict() for name, one in found.items()})
        return
    out.print(evaluation_table([(label, found, None)]))
    if benchmarks is not None:
        out.print("[yellow]not checked for prompts that training may have seen[/]")


def _loaded(
    version: str, strong: str | None, weak: str | None
) -> tuple[VersionInfo, Bundle, Router]:
    """Return a version, its bundle, and its router turned to the pair that was asked for."""
    settings = load_settings()
    registry = registry_of(settings)
    info = registry.get(version)
    bundle = registry.bundle(info, cache_path=settings.embeddings_path)
    return info, bundle, turned(bundle.router, strong, weak)


def _said(pair: Pair) -> str:
    return f"{pair.strong} or {pair.weak}"


def _with_scores(tables: list[Benchmark], pair: Pair, folder: str) -> list[Benchmark]:
    """Return the benchmarks that have scores of both models; says which have not."""
    have = [one for one in tables if {pair.strong, pair.weak} <= one.scores.keys()]
    if not have:
        names = ", ".join(one.name for one in tables)
        raise BenchmarkError(
            f"no benchmark in {folder} has scores of both {pair.strong} and {pair.weak} (looked "
            f"at {names}): name two models that one of them has, or give another folder"
        )
    left_out = ", ".join(sorted({t.name for t in tables} - {t.name for t in have}))
    if left_out:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"left out, without scores of both models: {left_out}", markup=False
        )
    return have


def _measured(router: Router, table: Benchmark, settings: Settings) -> Evaluation:
    import numpy as np

    from routellm.evaluation.evaluate import evaluate as measure

    pair = router.pair
    table.of_pair(pair)  # refused before anything is embedded
    return measure(
        router.win_rate(table.prompts),
        table,
        pair,
        rng=np.random.default_rng(settings.training.seed),
        resamples=settings.evaluation.bootstrap,
        usd_per_query=(settings.usd_per_query(pair.strong), settings.usd_per_query(pair.weak)),
    )
