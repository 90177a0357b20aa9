"""A soak's log as tables, as a shortened log, and as one figure."""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.fleet import table
from routellm.evaluation.plots import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Event = dict[str, Any]

_STATES = {"Completed": COLOURS[2], "Failed": COLOURS[1], "Crashed": "#b00020",
           "Cancelled": "#999999"}  # fmt: skip
_LANES = ("ingest", "retrain", "train-router/cpu", "monitor")
_GREY = "#57606a"


def read(path: Path) -> list[Event]:
    """Return the events of a log, in order."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def of(events: Sequence[Event], *names: str) -> Iterator[Event]:
    return (one for one in events if one["event"] in names)


def begun(events: Sequence[Event]) -> float:
    """Return when the clock started: when the first router served."""
    return float(next((e["t"] for e in of(events, "begin")), 0.0))


def clock(seconds: float) -> str:
    """Return minutes and seconds, negative before the first router served."""
    sign = "-" if seconds < 0 else ""
    return f"{sign}{int(abs(seconds)) // 60}:{int(abs(seconds)) % 60:02d}"


# --- tables -------------------------------------------------------------------------------------


def summary(events: Sequence[Event]) -> str:
    """Return the tables and the shortened log as Markdown."""
    start = next(of(events, "start"))
    head = f"{start['minutes']:g} minutes, seed {start['seed']}, {start['cores']} cores; SIMULATED"
    checks = [[e["name"], "holds" if e["ok"] else "**FAILS**", e["told"]]
              for e in of(events, "check")]  # fmt: skip
    return "\n".join(
        [
            f"{head} battles and answers\n",
            table(["check", "", "by what"], checks),
            table(["fault", "times", "well again after, median / longest, s", "requests failed"],
                  list(_faults(events))),
            table(["files", "", "battles", "in a snapshot after, median / longest, s"],
                  list(_files(events))),
            table(["runs of", *_STATES, "median, s"], list(_runs(events))),
            table(["memory of", "first 5 minutes, MB", "last 5 minutes, MB", "most, MB"],
                  list(_memory(events))),
            "```\n" + "\n".join(short_log(events)) + "\n```",
        ]
    )  # fmt: skip


def _faults(events: Sequence[Event]) -> Iterator[list[str]]:
    found: dict[str, list[tuple[float | None, int]]] = defaultdict(list)
    well = {e["n"]: e for e in of(events, "well")}
    for fault in of(events, "fault"):
        end = well.get(fault["n"])
        until = end["t"] if end else fault["t"] + 60
        failed = sum(
            sum(e["failed"].values())
            for e in of(events, "requests")
            if fault["t"] - 1 <= e["t"] <= until + 11
        )
        found[fault["what"]].append((end["after_s"] if end else None, failed))
    for what, ends in sorted(found.items()):
        took = [s for s, _ in ends if s is not None]
        told = f"{statistics.median(took):.0f} / {max(took):.0f}" if took else "-"
        never = len(ends) - len(took)
        told += f" ({never} not seen)" if never else ""
        yield [what, str(len(ends)), told, str(sum(n for _, n in ends))]


def _files(events: Sequence[Event]) -> Iterator[list[str]]:
    after = {name: s for e in of(events, "snapshot") for name, s in e["files"].items()}
    for how in ("renamed", "slow", "half", "broken"):
        mine = [e for e in of(events, "file") if e["how"] == how]
        took = [after[e["name"]] for e in mine if e["name"] in after]
        told = f"{statistics.median(took):.0f} / {max(took):.0f}" if took else "never, as it should"
        yield [how, str(len(mine)), f"{sum(e['battles'] for e in mine):,}", told]


def _runs(events: Sequence[Event]) -> Iterator[list[str]]:
    last = {e["id"]: e for e in of(events, "run")}
    for name in sorted({e["run"] for e in last.values()}):
        mine = [e for e in last.values() if e["run"] == name]
        states = Counter(e["state"] for e in mine)
        took = [e["seconds"] for e in mine if e["state"] == "Completed"]
        told = f"{statistics.median(took):.0f}" if took else "-"
        yield [name, *(str(states[state]) for state in _STATES), told]


def _memory(events: Sequence[Event]) -> Iterator[list[str]]:
    seen, since = list(of(events, "memory")), begun(events)
    end = next((e["t"] for e in of(events, "end")), seen[-1]["t"] if seen else 0.0)
    parts: set[str] = set().union(*(e["mb"] for e in seen))
    for part in sorted(parts):
        first = [e["mb"][part] for e in seen if part in e["mb"] and since <= e["t"] < since + 300]
        last = [e["mb"][part] for e in seen if part in e["mb"] and end - 300 <= e["t"] < end]
        most = max(e["mb"].get(part, 0) for e in seen)
        medians = (f"{statistics.median(x):,.0f}" if x else "-" for x in (first, last))
        yield [part, *medians, f"{most:,}"]
    for what, key in (("home, on disk", "disk_mb"), ("free on the machine", "free_mb")):
        if seen:
            yield [what, f"{seen[0][key]:,.0f}", f"{seen[-1][key]:,.0f}",
                   f"{max(e[key] for e in seen):,.0f}"]  # fmt: skip


def short_log(events: Sequence[Event]) -> list[str]:
    """Return a line for each event that a reader would ask after."""
    since, out = begun(events), []
    for one in events:
        told = _told(one)
        if told:
            out.append(f"{clock(one['t'] - since):>7}  {told}")
    return out


def _told(one: Event) -> str:
    kind = one["event"]
    if kind == "file":
        return f"file     {one['name']}, {one['battles']} battles, {one['how']}"
    if kind in ("file whole", "file passed over"):
        return f"file     {one['name']} is {kind.removeprefix('file ')}"
    if kind == "snapshot":
        files = ", ".join(f"{name} ({s:.0f} s)" for name, s in one["files"].items())
        return f"snapshot {one['digest']}, {one['battles']:,} battles: {files or 'no new file'}"
    if kind == "fault":
        more = f" ({one['run']})" if "run" in one else ""
        return f"FAULT {one['n']:>2} {one['what']}{more}"
    if kind in ("well", "not well"):
        return f"{kind:<8} {one['n']} {one['what']}: after {one['after_s']:.0f} s"
    if kind == "run" and one["state"] in ("Failed", "Crashed"):
        return f"run      {one['run']} {one['state'].lower()}: {one['message'][:140]}"
    if kind == "run" and one["state"] == "Completed" and one["run"] in ("retrain",):
        return f"run      {one['run']} completed in {one['seconds']:.0f} s"
    if kind == "version":
        return f"version  {one['version']} ({one['kind']}) of snapshot {one['snapshot']}"
    if kind == "aliases":
        told = ", ".join(f"{k} {v}" for k, v in one.items() if k not in ("t", "at", "event"))
        return f"aliases  {told}"
    if kind == "served":
        return f"served   {'version ' + one['version'] if one['version'] else 'by the fallback'}"
    if kind == "requests" and one["failed"]:
        why = ", ".join(f"{n} {name}" for name, n in one["failed"].items())
        return f"requests failed in ten seconds: {why}; {one['answered']} answered"
    if kind in ("begin", "end", "quiet", "not quiet", "fault left out", "not done",
                "watcher failed"):  # fmt: skip
        rest = {k: v for k, v in one.items() if k not in ("t", "at", "event")}
        return f"{kind} {rest if rest else ''}".strip()
    return ""


# --- the figure ---------------------------------------------------------------------------------


def draw(events: Sequence[Event], path: Path) -> None:
    """Draw one time line: faults, files, runs, versions, requests, memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 12.5), dpi=100, layout="constrained")
    heights = (2.9, 1.1, 1.3, 1.9, 1.5, 2.2)
    axes = figure.subplots(6, sharex=True, height_ratios=heights)
    for one in axes:
        one.grid(alpha=0.22)
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=8.5)
    since = begun(events)
    minutes = [{**e, "m": (e["t"] - since) / 60} for e in events]
    for work, at in zip(
        (_draw_faults, _draw_files, _draw_runs, _draw_versions, _draw_requests, _draw_memory),
        axes, strict=True,
    ):  # fmt: skip
        work(at, minutes)
    axes[-1].set_xlabel("minutes since the first router served")
    axes[-1].set_xlim(minutes[0]["m"], minutes[-1]["m"])
    start = next(of(events, "start"))
    failed = [e["name"] for e in of(events, "check") if not e["ok"]]
    verdict = f"NOT so: {'; '.join(failed)}" if failed else "all checks hold at the end"
    figure.suptitle(
        f"SIMULATED battles and answers: {start['minutes']:g} minutes of `routellm up` with "
        f"{sum(1 for _ in of(events, 'fault'))} faults\n{verdict}",
        x=0.01, ha="left", fontsize=11,
    )  # fmt: skip
    figure.savefig(path)


def _lanes(axes: Axes, names: Sequence[str]) -> dict[str, int]:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    return {name: i for i, name in enumerate(names)}


def _draw_faults(axes: Axes, events: Sequence[Event]) -> None:
    faults = list(of(events, "fault"))
    well = {e["n"]: e["m"] for e in of(events, "well")}
    lanes = _lanes(axes, sorted({e["what"] for e in faults}))
    for one in faults:
        y, end = lanes[one["what"]], well.get(one["n"])
        if end is not None:
            axes.plot([one["m"], end], [y, y], color=COLOURS[4], lw=5, solid_capstyle="butt")
        axes.plot(one["m"], y, "x", color="#b00020", ms=7, mew=2)
    axes.set_title("faults (x), until all is well again", loc="left", fontsize=9, color=_GREY)


def _draw_files(axes: Axes, events: Sequence[Event]) -> None:
    lanes = _lanes(axes, ("renamed", "slow", "half", "broken"))
    taken = {name: e["m"] for e in of(events, "snapshot") for name in e["files"]}
    passed = {e["name"]: e["m"] for e in of(events, "file passed over")}
    for one in of(events, "file"):
        y, name = lanes[one["how"]], one["name"]
        end = taken.get(name, passed.get(name))
        colour = COLOURS[1] if one["how"] == "broken" else COLOURS[0]
        if end is not None:
            axes.plot([one["m"], end], [y, y], color=colour, lw=3, alpha=0.45)
            axes.plot(end, y, "x" if name in passed else "o", color=colour, ms=4)
        axes.plot(one["m"], y, "|", color=colour, ms=9, mew=2)
    axes.set_title("files: dropped (|) until in a snapshot (o); a broken one is passed over (x)",
                   loc="left", fontsize=9, color=_GREY)  # fmt: skip


def _draw_runs(axes: Axes, events: Sequence[Event]) -> None:
    lanes = _lanes(axes, _LANES)
    begun_at: dict[str, float] = {}
    for one in of(events, "run"):
        begun_at.setdefault(one["id"], one["m"])
        if one["state"] in _STATES and one["run"] in lanes:
            y, start = lanes[one["run"]], min(begun_at[one["id"]], one["m"] - one["seconds"] / 60)
            colour = _STATES[one["state"]]
            axes.plot([start, max(one["m"], start + 0.1)], [y, y], color=colour, lw=6,
                      solid_capstyle="butt")  # fmt: skip
    for name, colour in _STATES.items():
        axes.plot([], [], color=colour, lw=6, label=name.lower())
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    axes.set_title("flow runs", loc="left", fontsize=9, color=_GREY)


def _draw_versions(axes: Axes, events: Sequence[Event]) -> None:
    marks = dict(zip(sorted({e["kind"] for e in of(events, "version")}), "os^v", strict=False))
    for kind, mark in marks.items():
        mine = [e for e in of(events, "version") if e["kind"] == kind]
        axes.plot([e["m"] for e in mine], [int(e["version"]) for e in mine], mark,
                  color=COLOURS[0], ms=4, mfc="none", label=kind)  # fmt: skip
    end = events[-1]["m"]
    for name, key, colour, width in (
        ("champion", "aliases", COLOURS[2], 4.5),
        ("served by the gateway", "served", "#000000", 1.2),
    ):
        field = "champion" if key == "aliases" else "version"
        steps = [(e["m"], int(e[field])) for e in of(events, key) if e.get(field)]
        if steps:
            axes.step([*(m for m, _ in steps), end], [*(v for _, v in steps), steps[-1][1]],
                      where="post", color=colour, lw=width, alpha=0.8, label=name)  # fmt: skip
    axes.set_ylabel("version")
    rows = axes.twinx()
    seen = [(e["m"], e["battles"]) for e in of(events, "snapshot")]
    if seen:
        rows.step([*(m for m, _ in seen), end], [*(n for _, n in seen), seen[-1][1]],
                  where="post", color=COLOURS[3], lw=1.2)  # fmt: skip
    rows.set_ylabel("battles", color=COLOURS[3])
    rows.spines[["top"]].set_visible(False)
    axes.legend(loc="upper left", fontsize=8, frameon=False, ncols=3)
    axes.set_title("versions, and battles in the newest snapshot", loc="left", fontsize=9,
                   color=_GREY)  # fmt: skip


def _draw_requests(axes: Axes, events: Sequence[Event]) -> None:
    seen = list(of(events, "requests"))
    at = [e["m"] for e in seen]
    axes.bar(at, [e["answered"] for e in seen], width=0.16, color="#c5cdd5", label="answered")
    failed = [sum(e["failed"].values()) for e in seen]
    axes.bar(at, failed, width=0.16, color="#b00020", label="failed")
    axes.set_ylabel("in 10 s")
    late = axes.twinx()
    late.plot(at, [e["longest_ms"] / 1000 for e in seen], color=COLOURS[0], lw=0.9)
    late.set_ylabel("longest, s", color=COLOURS[0])
    late.set_ylim(bottom=0)
    late.spines[["top"]].set_visible(False)
    axes.legend(loc="upper left", fontsize=8, frameon=False, ncols=2)
    axes.set_title("requests to the gateway", loc="left", fontsize=9, color=_GREY)


def _draw_memory(axes: Axes, events: Sequence[Event]) -> None:
    seen = list(of(events, "memory"))
    parts = ("prefect", "mlflow", "gateway", "worker", "watch", "up", "runs")
    at = [e["m"] for e in seen]
    axes.stackplot(
        at, [[e["mb"].get(part, 0) / 1000 for e in seen] for part in parts],
        colors=(*COLOURS[:6], "#c5cdd5"), labels=parts, alpha=0.75, lw=0,
    )  # fmt: skip
    axes.set_ylabel("memory, GB")
    disk = axes.twinx()
    disk.plot(at, [e["disk_mb"] for e in seen], color="#000000", lw=1.3)
    disk.set_ylabel("home on disk (line), MB")
    disk.set_ylim(bottom=0)
    disk.spines[["top"]].set_visible(False)
    axes.legend(loc="upper left", fontsize=8, frameon=False, ncols=7)
    axes.margins(y=0.25)
    axes.set_title("resident memory of the parts", loc="left", fontsize=9, color=_GREY)
