"""What must hold once a soak is over."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpx

from benchmarks.soak.place import Place
from benchmarks.soak.watch import Observer, Traffic
from registry import Registry, connect
from routellm.settings import IngestSettings
from routellm.sources.files import read_file
from routellm.sources.inbox import unreadable
from tests.support.half_registered import half_registered

Check = tuple[str, bool, str]


def checks(
    place: Place,
    traffic: Traffic,
    observer: Observer,
    names: Iterable[str],
    broken: Iterable[str],
) -> list[Check]:
    """Return every check: its name, whether it holds, and the numbers it was decided by.

    Parameters
    ----------
    names : iterable of str
        The good files, as they are in the inbox now.
    broken : iterable of str
        Those beside them that cannot be read.
    """
    registry = connect(place.settings)
    return [
        _battles(place, sorted(names)),
        _passed_over(place, sorted(broken)),
        _versions(registry),
        *_history(registry),
        _served(place, registry),
        _requests(place, traffic),
        _trained(place, registry),
        _doctor(place),
        _runs(observer),
    ]


def _battles(place: Place, names: list[str]) -> Check:
    """Compare the newest snapshot with what the files hold, battle by battle."""
    wanted: Counter[str] = Counter()
    for name in names:
        for _, batches in read_file(place.inbox / name, IngestSettings()):
            for batch in batches or ():
                wanted.update(batch.column("battle_id").to_pylist())
    there: Counter[str] = Counter()
    if (manifest := place.store.latest()) is not None:
        there.update(place.store.read(manifest, ["battle_id"])["battle_id"].to_pylist())
    lost, strange = wanted.keys() - there.keys(), there.keys() - wanted.keys()
    doubled = [one for one, n in there.items() if n > 1]
    told = (
        f"{len(names)} files with {wanted.total():,} battles; in the newest snapshot "
        f"{there.total():,}, lost {len(lost)}, doubled {len(doubled)}, from nowhere {len(strange)}"
    )
    return "every battle is there once", bool(there) and there == wanted, told


def _passed_over(place: Place, broken: list[str]) -> Check:
    """Compare the files that a note calls unreadable with those that are."""
    noted = sorted(unreadable(place.inbox))
    told = f"{len(broken)} dropped and left there; with a note: {', '.join(noted) or 'none'}"
    return "broken files are named, and only they", noted == broken, told


def _versions(registry: Registry) -> Check:
    wrong, n = half_registered(registry), len(registry.versions())
    told = "; ".join(wrong) or f"{n} versions: each has its run, figures, files and tags, and loads"
    return "every version is whole", bool(n) and not wrong, told


def _history(registry: Registry) -> Iterator[Check]:
    entries = registry.history()  # raises if the chain of hashes is broken
    moves = [e for e in entries if e.from_ != e.to]
    joined = [e.from_ for e in moves] == [None, *(e.to for e in moves[:-1])]
    applied = all(e.applied for e in entries) and registry.unsettled() is None
    chain = " → ".join(["none", *(str(e.to) for e in moves)])
    told = f"{len(entries)} entries, {len(moves)} moves of the champion: {chain}"
    yield "the moves are one chain", bool(moves) and joined, told
    smoke = sum(e.marks.get("smoke") == "passed" for e in moves)
    told = f"all applied: {applied}; smoke checks passed: {smoke} of {len(moves)}"
    yield "no move is unfinished", applied, told


def _served(place: Place, registry: Registry) -> Check:
    champion, serving = registry.champion(), None
    end = time.monotonic() + 60
    while time.monotonic() < end:
        serving = httpx.get(f"{place.urls['gateway']}/readyz", timeout=10).json().get("version")
        if champion is not None and serving == champion.version:
            break
        time.sleep(1)
    told = f"champion {champion and champion.version}, the gateway serves {serving}"
    return "the champion is served", champion is not None and serving == champion.version, told


def _requests(place: Place, traffic: Traffic) -> Check:
    """Count requests; that some fail while the one gateway is away is no surprise."""
    at = traffic.answered_at
    gaps = sorted(b - a for a, b in itertools.pairwise(at))
    failed = sum(traffic.failed.values())
    why = ", ".join(f"{n} {name}" for name, n in traffic.failed.most_common())
    told = (
        f"{len(at):,} answered, {failed} failed ({why or 'none'}); longest time without an answer "
        f"{gaps[-1]:.1f} s, median {statistics.median(gaps):.2f} s"
    )
    strange = [name for name in traffic.failed if not _while_away(name)]
    return "requests fail only while the gateway is away", not strange, told


def _while_away(why: str) -> bool:
    return why in ("ConnectError", "ReadError", "RemoteProtocolError")


def _trained(place: Place, registry: Registry) -> Check:
    """Compare what was trained on last with what there is."""
    from benchmarks.soak.place import FRESH

    manifest = place.store.latest()
    newest = {v.tags["snapshot"]: v for v in registry.versions()[:1]}
    known = {m.digest: m.rows for m in place.store.all()}
    trained = max((known[digest] for digest in newest if digest in known), default=0)
    rows = manifest.rows if manifest else 0
    told = f"the newest version was trained on {trained:,} of {rows:,} battles (fresh: {FRESH:,})"
    return "what is fresh was trained on", rows - trained < FRESH, told


def _doctor(place: Place) -> Check:
    done = place.command("doctor", "--quick", "--json")
    try:
        found = json.loads(done.stdout)
    except ValueError:
        return "routellm doctor finds nothing wrong", False, done.stderr.strip()[:300]
    wrong = [f"{one['part']}: {one['found']}" for one in found if one["outcome"] == "fail"]
    told = "; ".join(wrong) or f"{len(found)} parts looked at"
    return "routellm doctor finds nothing wrong", not wrong, told


def _runs(observer: Observer) -> Check:
    left = observer.under_way()
    return "no run is left over", not left, "; ".join(left) or "all runs have ended"


def nothing_is_left(place: Place, said: str) -> Check:
    """Look for processes of this home after `routellm down`."""
    left = []
    for pid in place.processes():
        try:
            left.append(" ".join(Path(f"/proc/{pid}/cmdline").read_text().split("\0"))[:120])
        except OSError:
            continue
    clean = said.startswith("stopped") and not left
    return "down leaves no process", clean, "; ".join(left) or said
