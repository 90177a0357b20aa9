"""The budget pacer: keeps the strong fraction that was asked for while the traffic drifts.

A threshold that sent 30 % of the calibration's queries to strong sends another share of harder or
easier ones. The pacer takes the threshold from the win rates that it saw last, and pays back what
was sent too much or too little on the way:

1. *Window.* The last `window` win rates, which begin as the calibration's own quantiles, so that a
   new pacer has the calibrated threshold. The threshold is their ``1 - c*`` quantile.
2. *Balance.* Strong calls that the fraction allows less those that were made, since the start. It
   moves ``c*`` away from the fraction c, by ``balance / window``: the integral term of a
   controller. It is held where ``c*`` is half-way to 0 or to 1, so that a long drift is not paid
   back by sending everything, or nothing, to strong.
3. *Limits.* The threshold stays where the odds of the calibration's strong fraction are within a
   factor of `most_odds` of c's (8: for 30 %, from 5 % to 77 %). Drift moves odds alike for every
   c; traffic that was made up to move the threshold moves it no further than this.

Win rates that are equal (the same prompt sent over and over) are on one side of any threshold;
where they are at it, they are shared out, evenly in turn.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict

import numpy as np

from routellm.calibration import Calibration, check_share

WINDOW = 500
MOST_ODDS = 8.0
_TARGETS_A_KEY = 4  # whose pacers are kept; two versions (a canary beside) of two fractions
_GOLDEN = 0.6180339887498949  # steps of this fill [0, 1) evenly, whichever part of them is left


class Pacer:
    """Thresholds for one caller's queries to one version.

    It makes no random draw, and a query costs two binary searches and a move of a few kB (about
    3 µs). Not for several threads: the event loop alone calls it. Each process has its own, which
    does no harm: where each keeps the fraction, all of them do.

    Parameters
    ----------
    calibration : Calibration
        The version's.
    strong_fraction : float
        What to keep, in [0, 1].
    window : int
        Queries that the threshold is taken from, and over which the balance is paid back.
    most_odds : float
        How far the odds of the calibration's strong fraction at the threshold may be from those
        of `strong_fraction`, as a factor of at least 1.

    Attributes
    ----------
    queries, strong : int
        Decided since the start, and of those the ones that went to strong.
    limited : bool
        Whether the last threshold was held back by `most_odds`: the fraction is not kept then.

    Raises
    ------
    UsageError
        If the fraction is outside [0, 1].
    """

    def __init__(
        self,
        calibration: Calibration,
        strong_fraction: float,
        *,
        window: int = WINDOW,
        most_odds: float = MOST_ODDS,
    ) -> None:
        check_share(strong_fraction, "strong fraction")
        self.strong_fraction = c = strong_fraction
        self.queries = 0
        self.strong = 0
        self.limited = False
        self._window = window
        self._balance = 0.0  # strong calls
        self._most_balance = window * (1.0 - c) / 2.0
        self._least_balance = -window * c / 2.0
        self._turn = 0.5  # of queries at the threshold; strong at 1
        self._lowest = calibration.threshold(c * most_odds / (1.0 - c + c * most_odds))
        self._highest = calibration.threshold(c / (c + (1.0 - c) * most_odds))
        at = (np.arange(window) + 0.5) * _GOLDEN % 1.0
        grid = np.linspace(0.0, 1.0, len(calibration.quantiles))
        first = np.interp(at, grid, calibration.quantiles)
        self._last = array("d", first)  # a ring, from `queries % window` on the oldest
        self._sorted = array("d", np.sort(first))

    @property
    def realised(self) -> float:
        """The share of the queries since the start that went to strong; nan before the first."""
        return self.strong / self.queries if self.queries else math.nan

    def threshold(self, win_rate: float) -> float:
        """Return the threshold for a query of this win rate, and learn nothing from it."""
        return self._decided(win_rate)[0]

    def decide(self, win_rate: float) -> float:
        """Return the threshold for a query of this win rate, and count it as decided so.

        Raises
        ------
        UsageError
            If the win rate is outside [0, 1].
        """
        check_share(win_rate, "win rate")
        threshold, self._turn, self.limited = self._decided(win_rate)
        routed = win_rate >= threshold
        self._balance += self.strong_fraction - routed
        self._balance = min(max(self._balance, self._least_balance), self._most_balance)
        oldest = self.queries % self._window
        del self._sorted[bisect_left(self._sorted, self._last[oldest])]
        insort(self._sorted, win_rate)
        self._last[oldest] = win_rate
        self.queries += 1
        self.strong += routed
        return threshold

    def _decided(self, win_rate: float) -> tuple[float, float, bool]:
        """Return the threshold, whose turn is next, and whether the limits hold it back."""
        if self.strong_fraction in (0.0, 1.0):
            return (0.0 if self.strong_fraction else math.nextafter(1.0, 2.0)), self._turn, False
        n = self._window
        wanted = self.strong_fraction * n + self._balance  # of the window's queries, for strong
        at = self._sorted[min(max(math.ceil(n - wanted), 0), n - 1)]
        if at < self._lowest:
            return self._lowest, self._turn, True
        if at > self._highest:
            return self._highest, self._turn, True
        if win_rate != at:
            return at, self._turn, False
        first, last = bisect_left(self._sorted, at), bisect_right(self._sorted, at)
        turn = self._turn + min(max((wanted - (n - last)) / (last - first), 0.0), 1.0)
        if turn >= 1.0:
            return at, turn - 1.0, False
        return math.nextafter(at, 2.0), turn, False


class Pacers:
    """The pacers of every caller; each begins anew with the version that it is for.

    Parameters
    ----------
    window, most_odds
        As for `Pacer`.
    """

    def __init__(self, *, window: int = WINDOW, most_odds: float = MOST_ODDS) -> None:
        self.window = window
        self.most_odds = most_odds
        self._by_key: dict[str, OrderedDict[tuple[str, float], Pacer]] = {}

    def of(
        self, key_id: str, version: str, calibration: Calibration, strong_fraction: float
    ) -> Pacer:
        """Return the pacer of a key, a version and a strong fraction.

        A key keeps the few that it used last: one that asks for another fraction each time has no
        fraction to keep, and takes nothing from the others.
        """
        own = self._by_key.setdefault(key_id, OrderedDict())
        name = version, strong_fraction
        if name not in own:
            own[name] = Pacer(
                calibration, strong_fraction, window=self.window, most_odds=self.most_odds
            )
            if len(own) > _TARGETS_A_KEY:
                own.popitem(last=False)
        own.move_to_end(name)
        return own[name]
