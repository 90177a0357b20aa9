"""The lines that a person sees: none of them may end what they speak of."""

import contextlib
import logging
import os

import pytest
from prefect.logging.handlers import PrefectConsoleHandler

from flows import steps


@pytest.fixture
def nobody():
    """A file whose reader is gone, as where a worker is killed that reads what its runs print."""
    read, write = os.pipe()
    os.close(read)
    with contextlib.suppress(BrokenPipeError), os.fdopen(write, "w") as file:  # at its close
        yield file


def test_a_step_goes_on_where_nobody_reads_its_lines_any_more(nobody, monkeypatch):
    monkeypatch.setattr(steps.console, "_file", nobody)
    monkeypatch.setattr(steps.console, "quiet", False)
    done = []
    for name in ("first", "second"):
        with steps.step(name) as line:
            line.result = "done"
        done.append(name)
    assert done == ["first", "second"]


def test_so_does_what_prefect_logs(nobody):
    handler = PrefectConsoleHandler(stream=nobody)
    for number in range(2):
        handler.emit(logging.LogRecord("run", logging.INFO, "", 0, f"line {number}", None, None))
    assert handler.console.quiet
