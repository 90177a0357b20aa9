"""Whether the traffic is still what the champion was made for: population stability indices.

By chance alone the index of n prompts over B bins is about ``(B - 1) / n``: 0.02 for the fewest
that are judged by and the most bins that there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from routellm.monitoring.finding import Check, Finding, Unknown, graded
from routellm.monitoring.seen import Champion, Seen
from routellm.stability import psi


@dataclass(frozen=True)
class Observed:
    """Win rates in bins.

    Attributes
    ----------
    edges : ndarray (b - 1,)
        A win rate equal to an edge is under it.
    counts : ndarray (b,)
    over : str
        What of, in words.
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.float64]
    over: str

    def expected(self, champion: Champion) -> NDArray[np.float64]:
        """Return what the calibration's sample has in the same bins, (b,)."""
        return _binned(np.array(champion.calibration.quantiles), self.edges)


class WinRateDrift(Check):
    """The champion's win rates are spread as over the sample that it was calibrated on."""

    name, retrain = "drift_win_rate", True

    def look(self, seen: Seen) -> Finding:
        champion, how = seen.champion(), seen.settings.monitor
        found = observed(seen, champion)
        n = int(found.counts.sum())
        if n < how.min_decisions:
            raise Unknown(_too_few(n, f"decisions of version {champion.version}", found.over, seen))
        value = psi(found.expected(champion), found.counts)
        detail = (
            f"the win rates of {n:,} decisions ({found.over}) against {champion.calibration.sample}"
        )
        outcome = graded(value, how.max_psi, how.warn_psi)
        return Finding(self.name, outcome, value, how.max_psi, f"{detail}: PSI {value:.3f}")


class PromptDrift(Check):
    """Prompts are as those of the battles that the champion was trained on, in one respect."""

    retrain = True
    what: str  # of `routellm.monitoring.prompts.counted`
    told: str

    def look(self, seen: Seen) -> Finding:
        how = seen.settings.monitor
        prompts = seen.traffic().prompts
        if not seen.settings.feedback.store_prompts and not prompts:
            raise Unknown("no prompts are stored (feedback.store_prompts)")
        if len(prompts) < how.min_decisions:
            raise Unknown(_too_few(len(prompts), "stored prompts", _window(seen), seen))
        before = seen.baseline()
        expected, live = before.counts[self.what], seen.counted(prompts)[self.what]
        values = sorted({*expected, *live})
        value = psi(*([counts.get(v, 0) for v in values] for counts in (expected, live)))
        detail = (
            f"{self.told} of {len(prompts):,} prompts ({_window(seen)}) against snapshot "
            f"{before.snapshot[:12]}: PSI {value:.3f}"
        )
        outcome = graded(value, how.max_psi, how.warn_psi)
        return Finding(self.name, outcome, value, how.max_psi, detail)


class LengthDrift(PromptDrift):
    name, what, told = "drift_prompt_length", "prompt_length", "the lengths"


class LanguageDrift(PromptDrift):
    name, what, told = "drift_language", "language", "the scripts"


class CodeDrift(PromptDrift):
    name, what, told = "drift_code", "code", "code"


class NumberDrift(PromptDrift):
    name, what, told = "drift_numbers", "numbers", "the numbers"


def observed(seen: Seen, champion: Champion) -> Observed:
    """Return the champion's win rates lately: of the feedback store, or of gateways' own counts.

    Raises
    ------
    Unknown
        If there are neither.
    """
    try:
        rates = seen.traffic().win_rates
        if seen.settings.feedback.enabled or len(rates):
            edges = np.unique(np.quantile(champion.calibration.quantiles, np.arange(1, 10) / 10))
            return Observed(edges, _binned(rates, edges), _window(seen))
    except Unknown:
        pass  # no decisions are recorded
    figures = [one.figures for one in seen.gateways() if one.figures is not None]
    if not figures:
        raise Unknown(
            "neither are decisions recorded (feedback.enabled), nor does a gateway show its metrics"
        )
    edges, counts = np.arange(1, 20) / 20, np.zeros(20)
    for one in figures:
        where = {"version": champion.version, "mode": "champion"}
        under = dict(one.buckets("routellm_win_rate", **where))
        counts += np.diff([0.0, *(under.get(round(b, 2), 0.0) for b in (*edges, 1.0))])
    return Observed(edges, counts, "since the gateway started")


def _binned(values: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    bins = np.searchsorted(edges, values, "left")
    return np.bincount(bins, minlength=len(edges) + 1).astype(np.float64)


def _window(seen: Seen) -> str:
    return f"the last {seen.settings.monitor.window_hours:g} hours"


def _too_few(n: int, what: str, over: str, seen: Seen) -> str:
    wanted = seen.settings.monitor.min_decisions
    return f"{n:,} {what} ({over}) are fewer than monitor.min_decisions, {wanted:,}"
