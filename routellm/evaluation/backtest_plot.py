"""The figure that says whether retraining pays: quality over time, the gain, and on how much."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from textwrap import fill
from typing import TYPE_CHECKING, Any

from routellm.backtest import Backtest, Window
from routellm.evaluation.evaluate import Interval
from routellm.evaluation.plots import COLOURS
from routellm.evaluation.two_policies import Comparison, Figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEVER, RETRAINED = COLOURS[1], COLOURS[0]
_GREY, _RANDOM = "#57606a", 0.5


def plot_backtest(result: Backtest) -> Figure:
    """Draw the two policies' APGR window by window, the gain, and how many battles there were."""
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 7.2), dpi=140, layout="constrained")
    quality, gain, amount = figure.subplots(3, sharex=True, height_ratios=(5, 3, 1.4))
    for axes in (quality, gain, amount):
        axes.grid(alpha=0.22)
        axes.spines[["top", "right"]].set_visible(False)
    _policies(quality, result)
    _gain(gain, result)
    middle = [_middle(one) for one in result.windows]
    width = [0.86 * (one.end - one.start) / timedelta(days=1) for one in result.windows]
    battles = [one.comparison.battles if one.comparison else 0 for one in result.windows]
    amount.bar(middle, battles, width=width, color="#9aa4ae")
    amount.set_ylabel("battles")
    locator = AutoDateLocator()
    amount.xaxis.set_major_locator(locator)
    amount.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    amount.set_xlim(result.windows[0].start, result.windows[-1].end)
    head = f"{result.pair.strong} or {result.pair.weak}"
    figure.suptitle(
        ("SIMULATED  " if result.simulated else "") + f"{head}\n{fill(result.verdict, 96)}",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    return figure


def _policies(axes: Axes, result: Backtest) -> None:
    axes.axhline(_RANDOM, ls="--", lw=1.1, color="#888888")
    axes.annotate(
        "random\n0.500", (1.0, _RANDOM), (5, 0), xycoords=("axes fraction", "data"),
        textcoords="offset points", va="center", fontsize=8.5, color=_GREY,
    )  # fmt: skip
    first = result.windows[0]
    rows = (
        ("never", f"{first.serves} of {first.start:%Y-%m-%d}, never retrained", NEVER, "s"),
        ("retrained", "retrained at each date", RETRAINED, "o"),
    )
    for name, label, colour, mark in rows:
        if result.pooled is not None:
            whole = getattr(result.pooled, name).apgr
            label += "" if whole is None else f"   {whole}"
        at, values = _measured(result.windows, name)
        low, high = [v.low for v in values], [v.high for v in values]
        axes.fill_between(at, low, high, color=colour, alpha=0.10, lw=0)
        for edge in (low, high):
            axes.plot(at, edge, color=colour, lw=0.7, alpha=0.5)
        axes.plot(at, [v.value for v in values], color=colour, lw=2, marker=mark, ms=5, label=label)
    axes.set_ylabel("APGR on the votes\nuntil the next date")
    axes.legend(
        title="APGR over all windows [95 %]; bands: 95 % of each window",
        loc="best",
        reverse=True,
        framealpha=0.85,
        edgecolor="none",
        fontsize=8.5,
        title_fontsize=8.5,
        alignment="left",
    )


def _gain(axes: Axes, result: Backtest) -> None:
    axes.axhline(0.0, lw=1.1, color="#333333")
    whole = result.pooled.gain.apgr if result.pooled else None
    if whole is not None:
        axes.axhspan(whole.low, whole.high, color=COLOURS[2], alpha=0.18, lw=0)
        axes.axhline(whole.value, color=COLOURS[2], lw=1.6)
        told = f"over all windows {whole.value:+.3f} [{whole.low:+.3f}, {whole.high:+.3f}]"
        axes.set_title(told, loc="left", fontsize=8.5, color="#00724f", pad=3)
    at, values = _measured(result.windows, "gain")
    error = [[v.value - v.low for v in values], [v.high - v.value for v in values]]
    axes.errorbar(
        at, [v.value for v in values], yerr=error, fmt="o", ms=4.5, lw=1.2, capsize=2.5, color=_GREY
    )
    axes.set_ylabel("gain of retraining\n(paired, 95 %)")


def _measured(windows: Sequence[Window], name: str) -> tuple[list[Any], list[Interval]]:
    """Return where the windows with an APGR lie in time, and that of one policy or of the gain."""
    at, values = [], []
    for one in windows:
        found: Figures | None = _figures(one.comparison, name)
        if found is not None and found.apgr is not None:
            at.append(_middle(one))
            values.append(found.apgr)
    return at, values


def _figures(comparison: Comparison | None, name: str) -> Figures | None:
    return None if comparison is None else getattr(comparison, name)


def _middle(window: Window) -> Any:
    return window.start + (window.end - window.start) / 2
