"""The verbs of ``routellm``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from routellm.cli.backtest import BACKTEST, backtest
from routellm.cli.compact import COMPACT, compact
from routellm.cli.context import load_settings, out, print_json, registry_of, set_home
from routellm.cli.deploy import DEPLOY, deploy
from routellm.cli.doctor import DOCTOR, doctor
from routellm.cli.feedback import FORGET, forget
from routellm.cli.judge import EXAMPLE as JUDGE_EXAMPLE
from routellm.cli.judge import judge
from routellm.cli.keys import keys_app
from routellm.cli.monitor import MONITOR, monitor
from routellm.cli.options import Benchmarks, Json
from routellm.cli.policies import POLICIES, policies
from routellm.cli.promotion import (
    COMPARE,
    HISTORY,
    PROMOTE,
    ROLLBACK,
    VERSIONS,
    champion_doc,
    compare,
    history,
    promote,
    rollback,
    versions,
)
from routellm.cli.routing import CALIBRATE, EVALUATE, ROUTE, calibrate, evaluate, route
from routellm.cli.serving import SERVE, serve
from routellm.cli.up import DOWN, UP, down, up
from routellm.cli.watch import WATCH, watch
from routellm.errors import UsageError

if TYPE_CHECKING:
    from registry import Registry
    from routellm.settings import Settings
    from routellm.snapshots import Manifest, SnapshotStore

app = typer.Typer(
    name="routellm",
    help="Train, validate, register, promote and serve LLM routers learned from preference data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Sources = Annotated[
    list[str] | None,
    typer.Argument(help="Files, folders, org/name@revision, or simulated://arena."),
]


@app.callback()
def options(
    home: Annotated[Path | None, typer.Option(help="Folder for everything this writes.")] = None,
    debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False,
) -> None:
    set_home(home)


def _store(settings: Settings, *, simulated: bool) -> SnapshotStore:
    from routellm.snapshots import snapshot_store

    return snapshot_store(settings, simulated=simulated)


def _latest(settings: Settings) -> tuple[SnapshotStore, Manifest] | None:
    """Return the newest snapshot of either kind, real or simulated."""
    found = []
    for simulated in (False, True):
        store = _store(settings, simulated=simulated)
        manifest = store.latest()
        if manifest is not None:
            found.append((store, manifest))
    return max(found, key=lambda item: item[1].created_at, default=None)


def _manifest_doc(manifest: Manifest) -> dict[str, Any]:
    return {
        "digest": manifest.digest,
        "created_at": manifest.created_at,
        "rows": manifest.rows,
        "by_label_kind": manifest.by_label_kind,
        "by_winner": manifest.by_winner,
        "quarantined_by_rule": manifest.quarantined_by_rule,
        "simulated": manifest.simulated,
        "previous": manifest.previous,
    }


@app.command(epilog="Example: routellm ingest battles.csv.gz")
def ingest(sources: Sources = None, json: Json = False) -> None:
    """Read what is new, check it, and publish a snapshot."""
    import expectations
    from routellm.ingest import stage
    from routellm.sources.inbox import sources_now

    settings = load_settings()
    names = list(sources or sources_now(settings))
    simulated = all(name.startswith("simulated://") for name in names)
    store = _store(settings, simulated=simulated)
    staged = stage(names, store, settings)
    try:
        manifest = staged.previous
        found = None
        if staged.new:
            found = expectations.validate(staged, store, settings)
            found.raise_if_failed()
            manifest = store.commit(
                parts=found.checked_parts,
                cursors=staged.cursors,
                previous=staged.previous,
                quarantined_by_rule=found.quarantined_by_rule,
                validation=found.summary(),
                simulated=staged.simulated,
            )
    finally:
        staged.discard()
    if manifest is None:
        raise staged.held_nothing
    if json:
        counts = {"new": staged.new, "duplicates": staged.duplicates}
        print_json({**counts, "passed_over": staged.passed_over, **_manifest_doc(manifest)})
        return
    for why in staged.passed_over:
        out.print(f"passed over: {why}", style="yellow", soft_wrap=True, markup=False)
    if not staged.new:
        out.print(f"nothing new; snapshot [bold]{manifest.digest[:12]}[/] stands")
        return
    out.print(
        f"snapshot [bold]{manifest.digest[:12]}[/]: {manifest.rows:,} battles, "
        f"{staged.new:,} read as new, {staged.duplicates:,} duplicates"
    )
    for rule, n in manifest.quarantined_by_rule.items():
        where = found.quarantine_path if found else ""
        out.print(f"[yellow]{n:,} quarantined by {rule}[/]: {where}")


app.command(epilog=JUDGE_EXAMPLE)(judge)


@app.command(epilog="Example: routellm validate --json")
def validate(
    snapshot: Annotated[str | None, typer.Argument(help="Digest; the newest if not given.")] = None,
    json: Json = False,
) -> None:
    """Check a published snapshot against the rules, as they are set now."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    import expectations

    settings = load_settings()
    latest = _latest(settings)
    if latest is None:
        raise UsageError(f"no snapshot in {settings.home}: run `routellm ingest SOURCE` first")
    store, manifest = latest
    if snapshot is not None:
        manifest = store.get(snapshot)
    found = expectations.validate_snapshot(manifest, store, settings)
    if json:
        print_json({"snapshot": manifest.digest, "data_docs": found.data_docs, **found.summary()})
    else:
        table = Table(
            title=f"snapshot {manifest.digest[:12]}, {manifest.rows:,} battles",
            title_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        for column in ("", "rule", "of", "observed", "expected"):
            table.add_column(column, no_wrap=column == "rule")
        for rule in found.rules:
            mark = (
                "[green]✓[/]"
                if rule.passed
                else ("[red]✗[/]" if rule.severity == "critical" else "[yellow]![/]")
            )
            of = "a battle" if rule.kind == "row" else "the set"
            table.add_row(mark, rule.name, of, rule.observed, rule.expected)
        out.print(table)
        out.print(f"Data Docs: {found.data_docs}", soft_wrap=True)
    if not found.passed:
        raise typer.Exit(1)


@app.command(epilog="Example: routellm retrain --source battles.parquet --routers mf,knn")
def retrain(
    source: Annotated[
        list[str] | None, typer.Option("--source", help="As for ingest; may be repeated.")
    ] = None,
    routers: Annotated[str | None, typer.Option(help="Kinds, by commas, or `all`.")] = None,
    benchmarks: Benchmarks = None,
    promote: Annotated[bool, typer.Option(help="Let the best become champion.")] = True,
    seeds: Annotated[
        int,
        typer.Option(min=1, max=100, help="Train each router with so many seeds; show the spread."),
    ] = 1,
    compare_augmentation: Annotated[
        bool,
        typer.Option(
            "--compare-augmentation",
            help="Train each router also without the pair's golden and judge labels.",
        ),
    ] = False,
    as_of: Annotated[
        str | None,
        typer.Option(
            help="Train on what was known by then: a date (the end of that day, UTC) or a date "
            "and time. Reads no source and leaves the champion alone."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Ingest, validate, train, evaluate, register and promote, once."""
    from routellm.cli.retrain import run_retraining

    run_retraining(
        source,
        routers,
        benchmarks,
        move_alias=promote,
        seeds=seeds,
        compare_augmentation=compare_augmentation,
        as_of=as_of,
        as_json=json,
    )


app.command(epilog=BACKTEST)(backtest)
app.command(epilog=EVALUATE)(evaluate)
app.command(epilog=POLICIES)(policies)


app.command(epilog=VERSIONS)(versions)
app.command(epilog=COMPARE)(compare)
app.command(epilog=PROMOTE)(promote)
app.command(epilog=ROLLBACK)(rollback)
app.command(epilog=HISTORY)(history)
app.command(epilog=ROUTE)(route)
app.command(epilog=CALIBRATE)(calibrate)


app.command(epilog=SERVE)(serve)
app.command(epilog=FORGET)(forget)
app.command(epilog=UP)(up)
app.command(epilog=DOWN)(down)
app.command(epilog=DOCTOR)(doctor)
app.command(epilog=DEPLOY)(deploy)
app.command(epilog=WATCH)(watch)
app.command(epilog=MONITOR)(monitor)
app.command(epilog=COMPACT)(compact)
app.add_typer(keys_app, name="keys", help="Make, list and revoke the gateway's API keys.")


@app.command(epilog="Example: routellm status --json")
def status(json: Json = False) -> None:
    """Say what is live, since when and why, and what it was trained on."""
    settings = load_settings()
    registry = registry_of(settings)
    latest = _latest(settings)
    doc = {
        "tracking_uri": settings.resolved_tracking_uri,
        "model": settings.model,
        "champion": champion_doc(registry),
        "challenger": _challenger_doc(registry),
        "versions": len(registry.versions()),
        "snapshot": _manifest_doc(latest[1]) if latest else None,
    }
    if json:
        print_json(doc)
        return
    out.print(f"MLflow    {doc['tracking_uri']}", soft_wrap=True)
    live: Any = doc["champion"]
    if live is None:
        out.print("champion  [yellow]none[/]: run `routellm retrain`")
    else:
        flag = " [yellow]SIMULATED[/]" if live["simulated"] else ""
        out.print(
            f"champion  [bold]version {live['version']}[/] ({live['kind']}){flag} since "
            f"{live['since']}: {live['why']}",
            soft_wrap=True,
        )
    waiting: Any = doc["challenger"]
    if waiting is not None:
        flag = " [yellow]SIMULATED[/]" if waiting["simulated"] else ""
        online = waiting["online"]
        seen = "" if online is None else f", {online['requests']:,} requests seen"
        out.print(
            f"in line   version {waiting['version']} ({waiting['kind']}){flag} is challenger{seen}",
            soft_wrap=True,
        )
    snap: Any = doc["snapshot"]
    if snap is None:
        out.print("snapshot  [yellow]none[/]: run `routellm ingest SOURCE`")
    else:
        kinds = ", ".join(f"{n:,} {k}" for k, n in snap["by_label_kind"].items())
        out.print(
            f"snapshot  [bold]{snap['digest'][:12]}[/] of {snap['created_at']}: {kinds}",
            soft_wrap=True,
        )


def _challenger_doc(registry: Registry) -> dict[str, Any] | None:
    """Return the version in line, and what the gateways saw of it; None if there is none."""
    from dataclasses import asdict

    from registry.online import online

    found = next((v for v in registry.versions() if "challenger" in v.aliases), None)
    if found is None:
        return None
    seen = online(registry.settings, found.version)
    return {
        "version": found.version,
        "kind": found.kind,
        "simulated": found.simulated,
        "online": None if seen is None else asdict(seen),
    }
