"""One Pareto figure a table: what quality each policy gives for what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from routellm.evaluation.plots import COLOURS, canvas
from routellm.policies.hull import hull
from routellm.policies.measure import Measured
from routellm.policies.recorded import Recorded

_DRAWN = 200
_SIZE = (11.5, 5.2)  # inches: the legend stands beside the lines, there are too many to hide it
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (5, 1, 1, 1)))
_BOUNDS = {"zero router": "--", "oracle": ":"}
_COLOURS = (*COLOURS, "#8C564B")

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_policies(measured: Sequence[Measured], table: Recorded) -> Figure:
    """Draw each policy's hull on a table, its models, and the setting that is told of.

    Policies of one family have one colour and differ in their dashes.

    Parameters
    ----------
    table : Recorded
        The rows that were measured on.
    """
    figure, axes = canvas(*_SIZE)
    families: dict[str, int] = {}
    for one in measured:
        corners = hull(one.points[:, 0], one.points[:, 1])
        # a mix of two settings is a straight line in dollars, and a curve on a log scale
        usd = np.geomspace(corners[0][0], corners[0][-1], _DRAWN)
        quality = np.interp(usd, *corners)
        told = f"{one.policy}{' (SIMULATED)' if one.simulated else ''}  {one.aiq}"
        if one.policy in _BOUNDS:
            axes.plot(usd, quality, _BOUNDS[one.policy], color="#888888", lw=1.8, label=told)
            continue
        family = family_of(one.policy)
        drawn = families[family] = families.get(family, -1) + 1
        colour = _COLOURS[list(families).index(family) % len(_COLOURS)]
        axes.plot(usd, quality, color=colour, ls=_DASHES[drawn % len(_DASHES)], lw=1.5, label=told)
        axes.plot(one.usd_per_1000.value, one.quality.value, "o", color=colour, ms=4)
    usd, quality = table.usd.mean(axis=0) * 1000.0, table.quality.mean(axis=0)
    axes.plot(usd, quality, "x", color="black", ms=6)
    axes.set_xscale("log")
    middle = np.sqrt(usd.min() * usd.max())
    for model, x, y in zip(table.models, usd, quality, strict=True):
        # dear models stand at the edge, beside the legend: their names go to the left
        side, right = ("right", -4) if x > middle else ("left", 4)
        axes.annotate(model, (x, y), (right, -9), textcoords="offset points", fontsize=7, ha=side)
    axes.set_xlabel("dollars per 1,000 queries (log scale)")
    axes.set_ylabel(f"quality (mean score of {len(table):,} prompts)")
    axes.set_title(
        f"{table.name}: what each policy gives for what it costs", fontsize=11, loc="left"
    )
    axes.legend(
        title="AIQ [95 % interval]; dots: within half of the price gap", fontsize=7.5,
        title_fontsize=7.5, alignment="left", frameon=False, loc="upper left",
        bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, handlelength=3.0,
    )  # fmt: skip
    return figure


def family_of(policy: str) -> str:
    """Return what a policy's name has in common with those of its family.

    >>> [family_of(p) for p in ("mf on a pair", "Hybrid-LLM, transformed", "FrugalGPT")]
    ['on a pair', 'Hybrid-LLM', 'FrugalGPT']
    """
    for ending in ("on a pair", "over the pool"):
        if policy.endswith(ending):
            return ending
    return policy.split(",")[0]
