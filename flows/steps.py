"""The lines that a person sees while a flow runs: one per step, with a bar where it takes long.

They go to the terminal, and into the run's log, which Prefect's UI shows.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging import get_run_logger
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

ARTIFACT_EVERY_S = 3.0  # an update is a request to Prefect's server


def _go_quiet(console: Console) -> None:
    console.quiet = True


# nobody reads any more: a run goes on when the worker that began it dies. Rich's own would end the
# process, be it at a line of ours or at one of Prefect's log, which is Rich's too
Console.on_broken_pipe = _go_quiet  # type: ignore[assignment]

console = Console(stderr=True, highlight=False)


@dataclass
class Step:
    """A step in progress; set `result` to what it did."""

    name: str
    bar: Progress
    task: TaskID
    result: str = ""
    notes: list[str] = field(default_factory=list)
    shown_at: float = field(default_factory=time.monotonic)
    artifact: UUID | None = None

    def note(self, text: str) -> None:
        """Add what a person should know; it is in the log at once."""
        self.notes.append(text)
        log(f"{self.name}: {text}")

    def advance(self, done: int, total: int) -> None:
        """Show how far along the step is, here and (every few seconds) in Prefect's UI."""
        self.bar.update(self.task, completed=done, total=total)
        now = time.monotonic()
        if now - self.shown_at < ARTIFACT_EVERY_S or TaskRunContext.get() is None:
            return
        self.shown_at = now
        percent = 100.0 * done / max(total, 1)
        if self.artifact is None:
            key = re.sub(r"[^a-z0-9]+", "-", self.name.lower())
            self.artifact = cast(
                UUID, create_progress_artifact(progress=percent, key=key, description=self.name)
            )
        else:
            update_progress_artifact(artifact_id=self.artifact, progress=percent)


@contextmanager
def step(name: str) -> Iterator[Step]:
    """Show a step while it runs, and one line for it once it is done."""
    started = time.perf_counter()
    bar = Progress(
        TextColumn("  {task.description:<10}"),
        BarColumn(bar_width=32),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        # side by side, none is drawn: one bar at a time is all that a terminal takes
        disable=not console.is_terminal or threading.current_thread() != threading.main_thread(),
    )
    with bar:
        one = Step(name, bar, bar.add_task(name, total=1))
        yield one
    seconds = time.perf_counter() - started
    log(f"{name}: {one.result} ({seconds:.1f} s)")
    console.print(f"[green]✓[/] [bold]{name:<10}[/] {one.result}  [dim]{seconds:.1f} s[/]")
    for note in one.notes:
        console.print(Padding(f"[yellow]{note}[/]", (0, 0, 0, 13)))


def log(text: str) -> None:
    """Write a line into the log of the run that this is called in, if any."""
    if FlowRunContext.get() is not None or TaskRunContext.get() is not None:
        get_run_logger().info(text)
