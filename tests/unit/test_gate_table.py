"""What the gate looked at, as a terminal shows it."""

import pytest
from rich.console import Console

from registry.checks import CheckResult
from routellm.cli import promotion

LONG = "slice category=high_school_computer_science"
CHECKS = (
    CheckResult("delta_apgr", "unsure", -0.001, -0.019, 0.018, 0.0, 900, "may clear 0"),
    CheckResult(LONG, "fail", -0.25, -0.44, -0.13, -0.1, 400, "surely loses more than 0.1"),
    CheckResult("canary", "skipped", detail="it has not run online as challenger"),
)


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_every_check_can_be_read_whatever_the_width(monkeypatch, columns):
    console = Console(width=columns, record=True, highlight=False, file=open("/dev/null", "w"))  # noqa: SIM115
    monkeypatch.setattr(promotion, "out", console)
    console.print(promotion.gate_table(CHECKS))
    text = console.export_text()
    for check in CHECKS:
        assert check.detail in text
        assert check.measured in text
    assert len([line for line in text.splitlines() if line.strip()]) <= 2 + 3 * len(CHECKS)
    assert LONG in text or columns < 200  # else folded
    assert "[-0.440, -0.130]   -0.1" in text
