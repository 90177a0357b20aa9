"""The verbs of ``routellm``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from routellm.cli.context import load_settings, out, print_json, registry_of, set_home
from routellm.cli.judge import EXAMPLE as JUDGE_EXAMPLE
from routellm.cli.judge import judge
from routellm.cli.options import Benchmarks, Json
from routellm.cli.routing import CALIBRATE, EVALUATE, ROUTE, calibrate, evaluate, route
from routellm.errors import UsageError

if TYPE_CHECKING:
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
    from routellm.snapshots import SnapshotStore

    return SnapshotStore(settings.snapshots_dir(simulated=simulated))


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

    settings = load_settings()
    names = list(sources or settings.sources)
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
        raise UsageError("the sources hold no battles: give another source")
    if json:
        print_json({"new": staged.new, "duplicates": staged.duplicates, **_manifest_doc(manifest)})
        return
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
        as_json=json,
    )


app.command(epilog=EVALUATE)(evaluate)


@app.command(epilog="Example: routellm versions")
def versions(json: Json = False) -> None:
    """List registered versions, newest first."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    found = registry_of(load_settings()).versions()
    if json:
        print_json([vars(v) for v in found])
        return
    pairs = {(v.tags.get("strong", "?"), v.tags.get("weak", "?")) for v in found}
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("version", "kind", "aliases", "created (UTC)", "snapshot"):
        table.add_column(column, no_wrap=True)
    if len(pairs) > 1:
        table.add_column("pair")
    for v in found:
        kind = f"{v.kind} [yellow]SIMULATED[/]" if v.simulated else v.kind
        cells = [
            v.version,
            kind,
            f"[bold green]{', '.join(v.aliases)}[/]" if v.aliases else "",
            v.created_at[:16].replace("T", " "),
            v.tags.get("snapshot", "")[:12],
        ]
        if len(pairs) > 1:
            cells.append(f"{v.tags.get('strong', '?')} / {v.tags.get('weak', '?')}")
        table.add_row(*cells)
    out.print(table)
    if len(pairs) == 1:
        (pair,) = pairs
        out.print(f"[dim]all of them route between {pair[0]} and {pair[1]}[/]", soft_wrap=True)


@app.command(epilog="Example: routellm compare champion previous")
def compare(a: str, b: str, json: Json = False) -> None:
    """Put two versions' figures side by side."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    registry = registry_of(load_settings())
    infos = [registry.get(name) for name in (a, b)]
    metrics = [registry.run_metrics(info) for info in infos]
    names = [n for n in metrics[0] if n in metrics[1] and not n.endswith((".pgr", ".n"))]
    rows = {n: (metrics[0][n], metrics[1][n]) for n in sorted(names)}
    if json:
        print_json({n: {"a": x, "b": y, "delta": y - x} for n, (x, y) in rows.items()})
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric", no_wrap=True)
    for info in infos:
        table.add_column(f"{info.kind} v{info.version}", justify="right")
    table.add_column("difference", justify="right")
    same = (".excluded", ".random_apgr", ".perfect_apgr", ".similarity", "_low", "_high")
    for n, (x, y) in rows.items():
        if not n.endswith(same):  # intervals and what does not tell them apart: see --json
            table.add_row(n, f"{x:.4g}", f"{y:.4g}", f"{y - x:+.4g}")
    out.print(table)


@app.command(epilog='Example: routellm promote 7 --force --reason "hotfix"')
def promote(
    version: Annotated[str, typer.Argument(help="Version number or alias.")],
    force: Annotated[bool, typer.Option(help="Promote whatever the gate says.")] = False,
    reason: Annotated[str | None, typer.Option(help="Why; needed with --force.")] = None,
    json: Json = False,
) -> None:
    """Make a version champion, if the gate lets it."""
    from registry.gate import Gate

    if force and not reason:
        raise UsageError("--force needs --reason: it is written into the history")
    registry = registry_of(load_settings())
    info = registry.get(version)
    champion = registry.champion()
    if force:
        registry.promote(info, force_reason=reason)
    else:
        from registry.judge import gate_inputs

        judged, candidate = gate_inputs(registry, champion, info)
        decision = Gate().decide(judged, candidate)
        registry.promote(info, decision, expected=champion.version if champion else None)
    state = registry.state()
    if json:
        print_json(state)
    else:
        out.print(f"[green]champion is version {state['version']}[/]: {state['why']}")


@app.command(epilog="Example: routellm rollback")
def rollback(
    to: Annotated[str | None, typer.Option(help="Version; the one before if not given.")] = None,
    json: Json = False,
) -> None:
    """Take the champion back to where it was."""
    registry = registry_of(load_settings())
    info = registry.rollback(to)
    if json:
        print_json(registry.state())
    else:
        out.print(f"[green]champion is version {info.version}[/] ({info.kind}) again")


app.command(epilog=ROUTE)(route)
app.command(epilog=CALIBRATE)(calibrate)


@app.command(epilog="Example: routellm serve --demo")
def serve(
    demo: Annotated[bool, typer.Option(help="Two built-in echo upstreams.")] = False,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    json: Json = False,
) -> None:
    """Run the OpenAI-compatible gateway."""
    from routellm.gateway.server import serve as run
    from routellm.settings import GatewaySettings

    settings = load_settings()
    given = {k: v for k, v in {"host": host, "port": port}.items() if v is not None}
    try:
        gateway = GatewaySettings.model_validate({**settings.gateway.model_dump(), **given})
    except ValueError as error:
        raise UsageError(f"--host or --port is not allowed: {given}") from error
    settings = settings.model_copy(update={"gateway": gateway})
    url = f"http://{gateway.host}:{gateway.port}/v1"
    if json:
        print_json({"url": url, "alias": gateway.alias, "demo": demo})
    else:
        out.print(
            f"gateway on [bold]{url}[/], following {settings.model}@{gateway.alias}"
            + (", DEMO upstreams" if demo else "")
        )
    run(settings, _LazySource(settings), demo=demo)


class _LazySource:
    """The registry as the gateway's source, connected at each look until it answers once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._registry: Any = None

    def _connected(self) -> Any:
        if self._registry is None:
            self._registry = registry_of(self._settings)
        return self._registry

    def current(self) -> Any:
        return self._connected().current()

    def load(self, ref: Any) -> Any:
        return self._connected().load(ref)


@app.command(epilog="Example: routellm status --json")
def status(json: Json = False) -> None:
    """Say what is live, since when and why, and what it was trained on."""
    settings = load_settings()
    registry = registry_of(settings)
    champion = registry.champion()
    state = registry.state()
    known = champion is not None and state.get("version") == champion.version
    latest = _latest(settings)
    doc = {
        "tracking_uri": settings.resolved_tracking_uri,
        "model": settings.model,
        "champion": None
        if champion is None
        else {
            "version": champion.version,
            "kind": champion.kind,
            "since": state["at"] if known else None,
            "why": state["why"] if known else "moved by something other than routellm",
            "simulated": champion.simulated,
            "snapshot": champion.tags.get("snapshot"),
        },
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
    snap: Any = doc["snapshot"]
    if snap is None:
        out.print("snapshot  [yellow]none[/]: run `routellm ingest SOURCE`")
    else:
        kinds = ", ".join(f"{n:,} {k}" for k, n in snap["by_label_kind"].items())
        out.print(f"snapshot  [bold]{snap['digest'][:12]}[/] of {snap['created_at']}: {kinds}")
