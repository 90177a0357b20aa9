"""The lines that a person sees while a flow runs: one per step, with a bar where it takes long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

console = Console(stderr=True, highlight=False)


@dataclass
class Step:
    """A step in progress; set `result` to what it did."""

    name: str
    bar: Progress
    task: TaskID
    result: str = ""
    done: bool = False
    notes: list[str] = field(default_factory=list)

    def advance(self, done: int, total: int) -> None:
        """Show how far along the step is."""
        self.bar.update(self.task, completed=done, total=total)


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
        disable=not console.is_terminal,
    )
    with bar:
        one = Step(name, bar, bar.add_task(name, total=1))
        yield one
    seconds = time.perf_counter() - started
    console.print(f"[green]✓[/] [bold]{name:<10}[/] {one.result}  [dim]{seconds:.1f} s[/]")
    for note in one.notes:
        console.print(f"             [yellow]{note}[/]")
