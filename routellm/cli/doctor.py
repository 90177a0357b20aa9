"""``routellm doctor``: look at every part, say how it is and what to do."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import urlsplit

import typer
from rich.table import Table

from routellm.cli.context import load_settings, out, print_json, registry_of
from routellm.cli.options import Json
from routellm.errors import RouteLLMError

if TYPE_CHECKING:
    from routellm.settings import Settings, Upstream

DOCTOR = "Example: routellm doctor; routellm doctor --json"

_LITTLE_ROOM, _NO_ROOM = 5e9, 5e8  # bytes free in the home folder
_CONNECT_S = 3.0
_MARKS = {"ok": "[green]✓[/]", "off": "[dim]–[/]", "warn": "[yellow]![/]", "fail": "[red]✗[/]"}


@dataclass(frozen=True)
class Checked:
    """How a part is.

    Attributes
    ----------
    outcome : str
        ok, off (not used here), warn (works, but look at it) or fail.
    found : str
        What was seen.
    to_do : str
        What mends it, or "".
    """

    part: str
    outcome: Literal["ok", "off", "warn", "fail"]
    found: str
    to_do: str = ""


def doctor(
    json: Json = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out what takes seconds: encoder, champion.")
    ] = False,
) -> None:
    """Check every part, and say what to do about those that do not work."""
    settings = load_settings()
    checks: list[Callable[[Settings], Iterator[Checked]]] = [
        packages, home, storage, snapshots, inbox, mlflow, prefect, gateway, upstreams, feedback,
    ]  # fmt: skip
    if not quick:
        checks[3:3] = [encoder, device]
        checks.insert(checks.index(mlflow) + 1, champion)
    found = [one for check in checks for one in _safely(check, settings)]
    if json:
        print_json([asdict(one) for one in found])
    else:
        table = Table.grid(padding=(0, 2, 0, 0))
        for one in found:
            told = one.found + (f"\n[dim]→ {one.to_do}[/]" if one.to_do else "")
            table.add_row(_MARKS[one.outcome], one.part, told)
        out.print(table)
    if any(one.outcome == "fail" for one in found):
        raise typer.Exit(1)


def _safely(check: Callable[[Settings], Iterator[Checked]], settings: Settings) -> list[Checked]:
    """Run one check: what it cannot do is its finding, and the other checks still run."""
    name = check.__name__
    try:
        return list(check(settings))
    except RouteLLMError as error:
        return [Checked(name, "fail", str(error))]
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        return [Checked(name, "fail", what, "run with --debug to see where")]


def packages(settings: Settings) -> Iterator[Checked]:
    """Are the packages installed that this software was built against?"""
    from importlib.metadata import PackageNotFoundError, distribution, version

    from packaging.requirements import Requirement

    wrong = []
    for text in distribution("routellm-mlops").requires or ():
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            have = version(needed.name)
        except PackageNotFoundError:
            wrong.append(f"{needed.name} is missing")
            continue
        if not needed.specifier.contains(have, prereleases=True):
            wrong.append(f"{needed.name} is {have}, wanted {needed.specifier}")
    if wrong:
        to_do = "install again: pip install -r requirements.lock"
        yield Checked("packages", "fail", "; ".join(wrong), to_do)
    else:
        yield Checked("packages", "ok", f"routellm-mlops {version('routellm-mlops')} and its parts")


def home(settings: Settings) -> Iterator[Checked]:
    """Can the home folder be written, and is there room?"""
    from routellm.snapshots import write_atomic

    place = settings.home.resolve()
    try:
        write_atomic(place / ".doctor", "")
        (place / ".doctor").unlink()
    except OSError as error:
        why = f"{place} cannot be written ({error.strerror})"
        yield Checked("home", "fail", why, "set `home` to a folder that can, or make room")
        return
    free = shutil.disk_usage(place).free
    told = f"{place}, {free / 1e9:,.1f} GB free"
    if free < _LITTLE_ROOM:
        outcome: Literal["warn", "fail"] = "warn" if free > _NO_ROOM else "fail"
        yield Checked("home", outcome, told, "make room: `routellm compact` removes what is old")
    else:
        yield Checked("home", "ok", told)


def storage(settings: Settings) -> Iterator[Checked]:
    """Does the storage that several homes share take an object, and give it back?"""
    if settings.storage is None:
        yield Checked("storage", "off", "all is kept in the home folder (`storage`)")
        return
    import uuid

    from routellm.storage import open_storage

    blobs = open_storage(settings.storage, "doctor")
    name = uuid.uuid4().hex  # another doctor may look at the same time
    started = time.perf_counter()
    blobs.put(name, name.encode())
    whole = blobs.get(name) == name.encode()
    blobs.delete([name])
    ms = (time.perf_counter() - started) * 1000
    if whole:
        told = f"{blobs.address} takes an object and gives it back, {ms:.0f} ms"
        yield Checked("storage", "ok", told)
    else:
        told = f"{blobs.address} took an object and did not give it back"
        yield Checked("storage", "fail", told, "it has to show at once what was written")


def encoder(settings: Settings) -> Iterator[Checked]:
    """Does the encoder load and encode?"""
    from routellm.embeddings import get_encoder

    one = get_encoder(settings.embedding, settings.embeddings_path)
    inner = getattr(one, "encoder", one)  # past the cache: the encoder itself is to be asked
    inner.encode(["warm-up"])
    started = time.perf_counter()
    shape = inner.encode(["How many roads must a man walk down?"]).shape
    ms = (time.perf_counter() - started) * 1000
    yield Checked("encoder", "ok", f"{one.identity}: {shape[1]} dimensions, {ms:.0f} ms a query")


def device(settings: Settings) -> Iterator[Checked]:
    """What are routers trained on?"""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Checked("device", "ok", ", ".join(names))
    else:
        told = f"no GPU: all is trained on {torch.get_num_threads()} threads of the processor"
        yield Checked("device", "ok", told)


def snapshots(settings: Settings) -> Iterator[Checked]:
    """Are the newest snapshots what was written?"""
    from routellm.snapshots import snapshot_store

    some = False
    for simulated in (False, True):
        store = snapshot_store(settings, simulated=simulated)
        newest = store.latest()
        if newest is None:
            continue
        some = True
        store.verify(newest)
        flag = "SIMULATED " if simulated else ""
        told = f"{newest.digest[:12]} of {newest.created_at}, {newest.rows:,} {flag}battles, whole"
        yield Checked("snapshot", "ok", told)
    if not some:
        to_do = "run `routellm ingest SOURCE`, or drop a file into the inbox of `routellm up`"
        yield Checked("snapshot", "warn", "there is none yet", to_do)


def inbox(settings: Settings) -> Iterator[Checked]:
    """Can the files that were dropped be read?"""
    from routellm.sources.inbox import dropped, unreadable

    bad = unreadable(settings.inbox_dir)
    for why in bad.values():
        to_do = "mend the file or take it away: every ingest passes it over, and reads the others"
        yield Checked("inbox", "warn", why, to_do)
    if not bad:
        n = len(dropped(settings.inbox_dir))
        told = f"{settings.inbox_dir}: {n} files, none of them known to be unreadable"
        yield Checked("inbox", "ok" if n else "off", told)


def mlflow(settings: Settings) -> Iterator[Checked]:
    """Does MLflow answer, and is the history of moves whole?"""
    registry = registry_of(settings)
    n = len(registry.versions())
    yield Checked("mlflow", "ok", f"{settings.resolved_tracking_uri}: {n} versions")
    moves = registry.history()
    yield Checked("history", "ok", f"{len(moves)} decisions, one chain")


def champion(settings: Settings) -> Iterator[Checked]:
    """Does the champion load, and answer as it did when it was registered?"""
    registry = registry_of(settings)
    ref = registry.current()
    if ref is None:
        to_do = "run `routellm retrain`; until then the gateway answers from its fallback"
        yield Checked("champion", "warn", "there is none", to_do)
        return
    bundle = registry.load(ref)
    bundle.check_golden()
    told = f"version {ref.version} ({bundle.kind}) loads and reproduces its golden predictions"
    yield Checked("champion", "ok", told)


def prefect(settings: Settings) -> Iterator[Checked]:
    """Does Prefect's server answer, with our deployments and a worker?"""
    import os

    import httpx

    from flows.recent import deployments, online_workers
    from routellm.cli.up import prefect_api

    api = prefect_api(settings)
    try:
        found = deployments(api)
    except httpx.HTTPError as error:
        asked_for = "PREFECT_API_URL" in os.environ
        yield Checked(
            "prefect",
            "fail" if asked_for else "off",
            f"no server at {api} ({type(error).__name__})",
            "start it, or `routellm up`, for what is to run by schedule",
        )
        return
    paused = [name for name, is_paused in found.items() if is_paused]
    if not found:
        yield Checked("prefect", "fail", f"{api} has no deployments", "run `routellm deploy`")
    else:
        told = f"{api}: {len(found)} deployments" + (
            f", paused: {', '.join(paused)}" if paused else ""
        )
        yield Checked("prefect", "warn" if paused else "ok", told)
    for pool in (settings.workers.cpu_pool, settings.workers.gpu_pool):
        names = online_workers(api, pool)
        if names:
            yield Checked("workers", "ok", f"pool {pool}: {', '.join(names)}")
        elif pool == settings.workers.cpu_pool:
            to_do = f"start one: prefect worker start --pool {pool}, or `routellm up`"
            yield Checked("workers", "fail", f"pool {pool} has no worker online", to_do)
        else:
            told = f"pool {pool} has no worker online: its routers are trained on the processor"
            yield Checked("workers", "off", told)


def gateway(settings: Settings) -> Iterator[Checked]:
    """Does the gateway serve the champion?"""
    from routellm.monitoring.gateways import ask

    seen = ask(settings.gateway.url, _CONNECT_S)
    if seen.ready is None:
        told = f"no gateway at {seen.url}: {seen.why}"
        yield Checked("gateway", "off", told, "start it: `routellm serve`, or `routellm up`")
        return
    version, problem = seen.ready["version"], seen.ready.get("problem")
    if version is None:
        told = f"{seen.url}: no version, answers from {seen.ready.get('fallback')}: {problem}"
        yield Checked("gateway", "warn", told)
    elif problem:
        yield Checked("gateway", "warn", f"{seen.url}: version {version} serves, but {problem}")
    else:
        told = f"{seen.url}: version {version} ({seen.ready.get('kind')}) serves"
        yield Checked("gateway", "ok", told)


def upstreams(settings: Settings) -> Iterator[Checked]:
    """Can the models' endpoints be reached? They are connected to, and not asked anything."""
    for route in ("strong", "weak"):
        one: Upstream | None = getattr(settings.gateway, route)
        if one is None:
            to_do = f"set gateway.{route}.base_url and .model, or serve with --demo"
            yield Checked(route, "off", f"no upstream is set for {route}", to_do)
            continue
        one.key()  # says which file cannot be read
        if one.base_url is None:
            yield Checked(route, "ok", f"{one.model} through LiteLLM, at its provider's address")
            continue
        address = urlsplit(one.base_url)
        port = address.port or (443 if address.scheme == "https" else 80)
        try:
            socket.create_connection((str(address.hostname), port), _CONNECT_S).close()
        except OSError as error:
            why = f"{one.model}: {address.hostname}:{port} cannot be reached ({error})"
            yield Checked(route, "fail", why, f"mend gateway.{route}.base_url, or start it")
        else:
            yield Checked(route, "ok", f"{one.model} at {address.hostname}:{port}")


def feedback(settings: Settings) -> Iterator[Checked]:
    """Does the feedback store open?"""
    if not settings.feedback.enabled:
        yield Checked("feedback", "off", "decisions are not recorded (`feedback.enabled`)")
        return
    from routellm.feedback import store_url
    from routellm.feedback.store import FeedbackStore

    store = FeedbackStore(store_url(settings))
    store.open()
    counts = ", ".join(f"{n:,} {what}" for what, n in store.count().items())
    yield Checked("feedback", "ok", f"{store.name}: {counts}")
    store.close()
