"""One figure per benchmark: quality recovered against calls to the strong model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from routellm.evaluation.evaluate import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind eyes
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def plot_curves(evaluations: Mapping[str, Evaluation]) -> Figure:
    """Draw PGR against strong fraction for each router kind on one benchmark."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.0), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    percent = np.arange(101)
    some = next(iter(evaluations.values()))
    axes.plot([0, 100], [0, 100], "--", color="#888888", lw=1.2, label="random, expected  0.500")
    drawn = [kind for kind in evaluations if kind != "random"]
    for kind, colour in zip(drawn, _COLOURS * len(drawn), strict=False):
        one = evaluations[kind]
        interval = one.exact.apgr
        label = f"{kind}  {interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
        axes.plot(percent, np.array(one.pgr_by_percent) * 100, color=colour, lw=2, label=label)
    title = f"{some.benchmark}: {some.strong} or {some.weak}"
    axes.set_title(("SIMULATED  " if some.simulated else "") + title, fontsize=11, loc="left")
    axes.set_xlabel("queries sent to the strong model, %")
    axes.set_ylabel("quality gap recovered (PGR), %")
    axes.set_xlim(0, 100)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        title=f"APGR [95 % interval], {some.n} prompts; perfect order {some.perfect_apgr:.3f}",
        framealpha=0.85,
        edgecolor="none",
        fontsize=8.5,
        title_fontsize=8.5,
        loc="best",
    )
    return figure
