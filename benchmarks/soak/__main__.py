"""Run all of it for an hour while files arrive, requests go on, and parts are killed.

``routellm up`` in an empty home; battles are those of the SIMULATED arena, in files that are
dropped into the inbox; answers are those of the two SIMULATED upstreams of ``up --demo``. Faults
come at random times, drawn from the seed. All that happens goes to OUT/soak.jsonl as it happens;
at the end it is checked that no battle is lost or doubled, that every version is whole, and that
the champion is served. The clock starts when the first router serves, some minutes after the start.

Example: python -m benchmarks.soak --minutes 60 --out soak
         python -m benchmarks.soak --draw soak
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.soak.checks import Check, checks, nothing_is_left
from benchmarks.soak.faults import Doer
from benchmarks.soak.place import Log, Place
from benchmarks.soak.plan import Drop, Fault, arena, file_of, plan
from benchmarks.soak.report import draw, read, summary
from benchmarks.soak.watch import Memory, Observer, Traffic

_FIRST_WITHIN_S = 900.0
_QUIET_WITHIN_S = 900.0
_QUIET_FOR_S = 20.0


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=60.0, help="default: %(default)g")
    parser.add_argument("--seed", type=int, default=0, help="of files and faults; default: 0")
    parser.add_argument("--out", type=Path, help="folder for home, log and figure; must be new")
    parser.add_argument("--draw", type=Path, metavar="OUT", help="draw the log of a soak anew")
    asked = parser.parse_args()
    if (asked.out is None) == (asked.draw is None):
        parser.error("give --out FOLDER, or --draw FOLDER")
    if asked.minutes < 5:
        parser.error("--minutes must be 5 or more: a retraining takes one or two")
    if asked.out is not None and asked.out.exists():
        parser.error(f"{asked.out} exists: give a new folder")
    return asked


def run(folder: Path, minutes: float, seed: int) -> bool:
    """Run a soak; returns whether all checks hold."""
    folder.mkdir(parents=True)
    log = Log(folder / "soak.jsonl")
    place = Place(folder.resolve(), log)
    drops, faults = plan(minutes, seed)
    battles = arena(sum(one.battles for one in drops), seed)
    log.write("start", seed=seed, minutes=minutes, cores=os.cpu_count(), files=len(drops),
              faults=len(faults))  # fmt: skip
    observer, traffic, memory = Observer(place), Traffic(place), Memory(place)
    doer = Doer(place, observer, seed)

    def data(one: Drop) -> bytes:
        part = battles.slice(one.start, one.battles)
        return file_of(part, one.name) if one.battles else b""

    place.start()
    try:
        _wait(lambda: place.parts().keys() >= {"watch", "gateway"} and place.answers("gateway"),
              "up", _FIRST_WITHIN_S)  # fmt: skip
        for watcher in (observer, traffic, memory):
            watcher.start()
        doer.do(drops[0], data(drops[0]))
        _wait(lambda: traffic.version is not None, "a first router", _FIRST_WITHIN_S)
        began = log.now()
        log.write("begin")
        planned: list[Drop | Fault] = [*drops[1:], *faults]
        for due in sorted(planned, key=lambda one: one.at_s):
            time.sleep(max(0.0, began + due.at_s - log.now()))
            doer.do(due, data(due) if isinstance(due, Drop) else b"")
        time.sleep(max(0.0, began + 60 * minutes - log.now()))
        log.write("end")
        doer.finish(_QUIET_WITHIN_S)
        good = {one.name for one in drops if one.battles}
        broken = {one.name for one in drops} - good
        _wait_for_quiet(place, observer, good)
        traffic.stop()
        found = checks(place, traffic, observer, good, broken)
        observer.stop()
        memory.stop()
        found.append(nothing_is_left(place, place.down()))
    finally:
        place.down()
    for name, ok, told in found:
        log.write("check", name=name, ok=ok, told=told)
    _show(folder, found)
    return all(ok for _, ok, _ in found)


def _wait(condition: Any, what: str, within_s: float) -> None:
    end = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"{what} did not come within {within_s:.0f} s: see the logs")
        time.sleep(0.5)


def _wait_for_quiet(place: Place, observer: Observer, good: set[str]) -> None:
    """Wait until every good file is in, and no run is under way for some time."""
    since = end = time.monotonic()
    while time.monotonic() - end < _QUIET_WITHIN_S:
        time.sleep(1.0)
        if observer.under_way() or good - observer.ingested or not place.well():
            since = time.monotonic()
        elif time.monotonic() - since > _QUIET_FOR_S:
            place.log.write("quiet")
            return
    place.log.write("not quiet", runs=observer.under_way(),
                    files=sorted(good - observer.ingested))  # fmt: skip


def _show(folder: Path, found: list[Check]) -> None:
    events = read(folder / "soak.jsonl")
    draw(events, folder / "soak.png")
    told = summary(events)
    (folder / "soak.md").write_text(told)
    print(told)


def main() -> None:
    asked = arguments()
    if asked.draw is not None:
        _show(asked.draw, [])
        return
    sys.exit(0 if run(asked.out, asked.minutes, asked.seed) else 1)


if __name__ == "__main__":
    main()
