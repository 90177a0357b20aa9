"""One Pareto figure a table: what quality each policy gives for what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from routellm.evaluation.plots import COLOURS, canvas
from routellm.policies.hull import hull
from routellm.policies.measure import Measured
from routellm.policies.recorded import Recorded

_DRAWN = 200

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_policies(measured: Sequence[Measured], table: Recorded) -> Figure:
    """Draw each policy's hull on a table, its models, and the setting that is told of.

    Parameters
    ----------
    table : Recorded
        The rows that were measured on.
    """
    figure, axes = canvas()
    for i, one in enumerate(measured):
        corners = hull(one.points[:, 0], one.points[:, 1])
        # a mix of two settings is a straight line in dollars, and a curve on a log scale
        usd = np.geomspace(corners[0][0], corners[0][-1], _DRAWN)
        quality = np.interp(usd, *corners)
        told = f"{one.policy}{' (SIMULATED)' if one.simulated else ''}  {one.aiq}"
        plain = one.policy in ("zero router", "oracle")
        colour = "#888888" if plain else COLOURS[i % len(COLOURS)]
        axes.plot(usd, quality, ":" if plain else "-", color=colour, lw=1.8, label=told)
        if not plain:
            axes.plot(one.usd_per_1000.value, one.quality.value, "o", color=colour, ms=5)
    usd, quality = table.usd.mean(axis=0) * 1000.0, table.quality.mean(axis=0)
    axes.plot(usd, quality, "x", color="black", ms=6)
    for model, x, y in zip(table.models, usd, quality, strict=True):
        axes.annotate(model, (x, y), (4, -9), textcoords="offset points", fontsize=7)
    axes.set_xscale("log")
    axes.set_xlabel("dollars per 1,000 queries (log scale)")
    axes.set_ylabel(f"quality (mean score of {len(table):,} prompts)")
    axes.set_title(
        f"{table.name}: what each policy gives for what it costs", fontsize=11, loc="left"
    )
    axes.legend(
        title="AIQ [95 % interval]; dots: within half of the price gap", fontsize=7.5,
        title_fontsize=7.5, framealpha=0.85, edgecolor="none", loc="best",
    )  # fmt: skip
    return figure
