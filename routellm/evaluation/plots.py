"""Figures of one benchmark: quality against calls to the strong model, and against dollars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from routellm.evaluation.evaluate import Evaluation
from routellm.evaluation.metrics import upper_hull

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind eyes
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GREY = "#666666"
Floats = NDArray[np.float64]


def plot_curves(evaluations: Mapping[str, Evaluation]) -> Figure:
    """Draw PGR against strong fraction for each router kind on one benchmark."""
    figure, axes = canvas()
    percent = np.arange(101)
    some = next(iter(evaluations.values()))
    axes.plot([0, 100], [0, 100], "--", color="#888888", lw=1.2, label="random, expected  0.500")
    for kind, colour in _coloured(evaluations):
        one = evaluations[kind]
        interval = one.exact.apgr
        label = f"{kind}  {interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
        axes.plot(percent, np.array(one.pgr_by_percent) * 100, color=colour, lw=2, label=label)
    axes.set_title(_title(some), fontsize=11, loc="left")
    axes.set_xlabel("queries sent to the strong model, %")
    axes.set_ylabel("quality gap recovered (PGR), %")
    axes.set_xlim(0, 100)
    axes.legend(
        title=f"APGR [95 % interval], {some.n} prompts; perfect order {some.perfect_apgr:.3f}",
        framealpha=0.85,
        edgecolor="none",
        fontsize=8.5,
        title_fontsize=8.5,
        loc="best",
    )
    return figure


def plot_pareto(evaluations: Mapping[str, Evaluation]) -> Figure:
    """Draw the quality that each router kind gives against what it costs, on one benchmark.

    The hull is the best that these routers, and mixing two points of them by a coin, can do.
    Without prices the cost is the percent of queries sent to strong.
    """
    figure, axes = canvas()
    some = next(iter(evaluations.values()))
    priced = some.cost is not None
    ends = (some.cost.weak, some.cost.strong) if some.cost else (0.0, 100.0)
    low, high = some.quality_weak, some.quality_strong
    cost = np.linspace(*ends, 101)
    axes.plot(ends, (low, high), "--", color=_GREY, lw=1.2, zorder=1)
    curves = {}
    for kind, colour in _coloured(evaluations):
        curves[kind] = low + np.array(evaluations[kind].pgr_by_percent) * (high - low)
        axes.plot(cost, curves[kind], color=colour, lw=1.6, zorder=3)
    points = np.column_stack([ends, (low, high)])
    points = np.vstack([points, *(np.column_stack([cost, c]) for c in curves.values())])
    hull = upper_hull(points)
    axes.plot(hull[:, 0], hull[:, 1], color="black", lw=6, alpha=0.16, zorder=2)
    axes.plot(ends, (low, high), "o", color="black", ms=6, zorder=4)
    axes.set_title(f"{_title(some)}, with APGR", fontsize=11, loc="left")
    axes.set_xlabel(
        "dollars per 1,000 queries" if priced else "queries sent to the strong model, % (no prices)"
    )
    axes.set_ylabel(f"quality (mean score of {some.n:,} prompts)")
    lines = [
        (f"{kind}  {evaluations[kind].exact.apgr.value:.3f}", colour, curves[kind])
        for kind, colour in _coloured(evaluations)
    ]
    lines.sort(key=lambda line: -float(line[2].mean()))
    best = ("hull: the best mix of them", "#333333", np.interp(cost, hull[:, 0], hull[:, 1]))
    random = ("any mix at random  0.500", _GREY, np.linspace(low, high, 101))
    _room(axes, np.vstack([curve for _, _, curve in [best, *lines, random]]), ends)
    _name_lines(axes, cost, [best, *lines, random])
    for model, at, offset, align in (
        (some.weak, (ends[0], low), (6, -8), ("left", "top")),
        (some.strong, (ends[1], high), (0, 10), ("right", "bottom")),
    ):
        dollars = f"${at[0]:,.2f}, " if priced else ""
        axes.annotate(
            f"all to {model}\n{dollars}{at[1]:.3f}", at, offset, textcoords="offset points",
            ha=align[0], va=align[1], fontsize=8.5,
        )  # fmt: skip
    return figure


def _room(axes: Axes, curves: Floats, ends: tuple[float, float]) -> None:
    """Leave room above the curves for their names, and below for an end point's."""
    width, bottom, top = ends[1] - ends[0], float(curves.min()), float(curves.max())
    axes.set_xlim(ends[0] - 0.03 * width, ends[1] + 0.03 * width)
    axes.set_ylim(bottom - 0.14 * (top - bottom), top + 0.20 * (top - bottom))


def _name_lines(axes: Axes, cost: Floats, lines: Sequence[tuple[str, str, Floats]]) -> None:
    """Name lines at the upper left, where a hull leaves room, each with a leader to its line.

    The leaders end the further left the lower their name is, so that they do not cross.
    """
    for i, (text, colour, curve) in enumerate(lines):
        at = round(70 - 40 * i / (len(lines) - 1))
        axes.annotate(
            text, (float(cost[at]), float(curve[at])), (0.28, 0.965 - 0.05 * i),
            textcoords="axes fraction", color=colour, fontsize=9, va="center", ha="right",
            arrowprops={
                "arrowstyle": "-", "color": colour, "lw": 0.7, "alpha": 0.8, "shrinkB": 0,
                "relpos": (1.0, 0.5),
            },
        )  # fmt: skip
        axes.plot(cost[at], curve[at], "o", color=colour, ms=4, zorder=5)


def canvas(width_in: float = 7.2, height_in: float = 5.0) -> tuple[Figure, Axes]:
    """Return an empty figure of ours, and its axes; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _coloured(kinds: Mapping[str, Any] | Sequence[str]) -> list[tuple[str, str]]:
    """Return the kinds to draw, with a colour each; random's own draw says nothing."""
    drawn = [kind for kind in kinds if kind != "random"]
    return list(zip(drawn, COLOURS * len(drawn), strict=False))


def _title(some: Evaluation) -> str:
    title = f"{some.benchmark}: {some.strong} or {some.weak}"
    return ("SIMULATED  " if some.simulated else "") + title
