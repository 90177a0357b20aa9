"""What ``routellm up`` shows: its parts, what serves, the data, and the latest runs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

import httpx
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from routellm.supervise import ANSWERS_WITHIN_S, Running, Supervisor, tls

if TYPE_CHECKING:
    from flows.recent import FlowRun
    from routellm.settings import Settings

_LOOK_EVERY_S = 3.0
_RUNS = 6
_COLOURS = {
    "running": "green", "done": "green", "waiting": "dim", "starting": "yellow",
    "silent": "yellow", "ended": "red", "Completed": "green", "Running": "cyan",
    "Pending": "dim", "Failed": "red", "Crashed": "red", "Cancelled": "yellow",
}  # fmt: skip


class Screen:
    """One status screen, and the same as lines where there is no terminal."""

    def __init__(self, supervisor: Supervisor, settings: Settings, *, demo: bool) -> None:
        self.supervisor = supervisor
        self.settings = settings
        self.demo = demo
        self.started = time.monotonic()
        self.runs: list[FlowRun] = []
        self.serving: dict[str, Any] = {}
        self._looked_at = 0.0
        self._said: dict[str, str] = {}

    def render(self) -> Group:
        """Return the screen as it is now."""
        self._look()
        return Group(
            Text.assemble(
                ("RouteLLM Ops", "bold"),
                (f"  {self.settings.home.resolve()}  up {_span(time.monotonic() - self.started)}",
                 "dim"),
            ),
            Padding(self._parts(), (1, 0, 1, 2)),
            *(Padding(line, (0, 0, 0, 2)) for line in self._facts()),
            Padding(self._latest(), (1, 0, 1, 2)),
            Text("Ctrl-C stops it. Logs: " + str(self.supervisor.folder / "logs"), style="dim"),
        )  # fmt: skip

    def news(self) -> Iterator[str]:
        """Yield a line for whatever changed since it was last asked."""
        self._look()
        now = {f"part {n}": self._words(one) for n, one in self.supervisor.parts.items()}
        now |= {f"run {r.id}": run_line(r) for r in reversed(self.runs)}
        now |= {f"fact {line.plain.split(' ')[0]}": line.plain for line in self._facts()}
        for key, line in now.items():
            if self._said.get(key) != line:
                self._said[key] = line
                clock = datetime.now().astimezone().strftime("%H:%M:%S")
                what = key.split(" ")[1] + " is " if key.startswith("part ") else ""
                yield f"{clock}  {what}{line}"

    def _look(self) -> None:
        from flows.recent import recent_runs
        from routellm.cli.up import prefect_api

        if time.monotonic() - self._looked_at < _LOOK_EVERY_S:
            return
        self._looked_at = time.monotonic()
        prefect = self.supervisor.parts.get("prefect")
        if prefect is None or prefect.state == "running":
            # where it does not answer, its own line says so
            with suppress(httpx.HTTPError, ValueError, KeyError):
                self.runs = recent_runs(prefect_api(self.settings), _RUNS)
        gateway = self.supervisor.parts["gateway"]
        if gateway.state == "running":
            try:
                url = f"{gateway.part.url}/readyz"
                self.serving = httpx.get(url, timeout=ANSWERS_WITHIN_S, verify=tls()).json()
            except (httpx.HTTPError, ValueError):
                self.serving = {}

    def _parts(self) -> Table:
        table = Table.grid(padding=(0, 3, 0, 0))
        for name, one in self.supervisor.parts.items():
            table.add_row(
                name,
                Text(one.state, style=_COLOURS[one.state]),
                _span(time.monotonic() - one.since) if one.process else "",
                one.part.url,
                Text(self._note(one), style="dim"),
            )
        return table

    def _words(self, one: Running) -> str:
        note = self._note(one)
        address = f", {one.part.url}" if one.part.url and one.state == "running" else ""
        return f"{one.state}{address}" + (f" ({note})" if note else "")

    def _note(self, one: Running) -> str:
        if one.state == "ended" and one.last_status is not None:
            log = self.supervisor.log(one.part.name)
            return f"status {one.last_status}, will be started again; see {log}"
        if one.state == "silent":
            return "does not answer"
        if one.part.name == "gateway" and self.demo:
            return "SIMULATED answers: two built-in upstreams"
        if one.starts > 1:
            return f"started {one.starts} times"
        return ""

    def _facts(self) -> list[Text]:
        serving = self.serving
        if serving.get("version"):
            live = Text(f"champion  version {serving['version']} ({serving['kind']}) serves")
        elif serving:
            live = Text(
                f"champion  none served: the gateway answers from {serving.get('fallback')}",
                style="yellow",
            )
        else:
            live = Text("champion  unknown: the gateway does not answer", style="dim")
        if serving.get("problem"):
            live.append(f" ({serving['problem']})", style="yellow")
        lines = [live, *self._data()]
        seen = _monitor(self.settings)
        if seen:
            lines.append(seen)
        return lines

    def _data(self) -> Iterator[Text]:
        from routellm.snapshots import snapshot_store
        from routellm.sources.inbox import dropped, unreadable

        for simulated in (False, True):
            manifest = snapshot_store(self.settings, simulated=simulated).latest()
            if manifest is not None:
                flag = " SIMULATED" if simulated else ""
                made = manifest.created_at[:16].replace("T", " ")
                yield Text(
                    f"snapshot  {manifest.digest[:12]} of {made} UTC: "
                    f"{manifest.rows:,}{flag} battles"
                )
        n = len(dropped(self.settings.inbox_dir))
        line = Text(f"inbox     {self.settings.inbox_dir}: {n} file{'' if n == 1 else 's'}")
        bad = unreadable(self.settings.inbox_dir)
        if bad:
            first = next(iter(bad))
            others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            line.append(f", {first}{others} cannot be read (see {first}.why.txt)", style="yellow")
        yield line

    def _latest(self) -> Table:
        table = Table.grid(padding=(0, 3, 0, 0))
        for run in self.runs:
            table.add_row(
                run.at.astimezone().strftime("%H:%M:%S"),
                f"{run.name} {run.kind}".rstrip(),
                Text(run.state, style=_COLOURS.get(run.state, "")),
                _span(run.seconds),
                Text(_why(run), style="dim", overflow="ellipsis", no_wrap=True),
            )
        if not self.runs:
            table.add_row(Text("no run yet", style="dim"))
        return table


def _monitor(settings: Settings) -> Text | None:
    """Return what the monitor saw last, if it ever looked."""
    from routellm.monitoring.report import read_report

    report = read_report(settings.home)
    if report is None:
        return None
    counts = Counter(one.outcome for one in report.findings)
    said = ", ".join(f"{n} {outcome}" for outcome, n in counts.items())
    bad = [one for one in report.findings if one.outcome in ("fail", "warn")]
    worst = f": {bad[0].name}: {bad[0].detail}" if bad else ""
    at = report.at.astimezone().strftime("%H:%M:%S")
    return Text(f"monitor   {said} at {at}{worst}", style="yellow" if bad else "")


def run_line(run: FlowRun) -> str:
    """Return a run's state in a line, with the reason where it did not come to its end."""
    why = _why(run)
    return f"{run.name}: {run.state}" + (f" ({why})" if why else "")


def _why(run: FlowRun) -> str:
    return run.message if run.state in ("Failed", "Crashed", "Cancelled") else ""


def _span(seconds: float) -> str:
    """Return a time span as a person reads it: 42 s, 7 min, 3 h 20."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 100:
        return f"{minutes:.0f} min"
    return f"{int(minutes // 60)} h {int(minutes % 60):02d}"
