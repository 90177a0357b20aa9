"""How the status page writes figures: the text of each place, the rows of each table, the bars."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from routellm.gateway.status import Status

HEIGHT = 60.0  # of the histogram, in its own units
_NONE = "–"
_STATES = {"serving": "Serving", "troubled": "Serving, with a problem", "fallback": "No router"}


@dataclass(frozen=True)
class Bars:
    """What is drawn.

    Attributes
    ----------
    strong, decided : float
        Of the bar of decisions, which is 100 long: strong's part, and the whole.
    win_rates : tuple of float
        Heights of the histogram's 20 bars.
    weak_until : int
        How many of those are under the threshold.
    threshold : float
        Its place on an axis of 200; out of sight where there is none.
    """

    strong: float
    decided: float
    win_rates: tuple[float, ...]
    weak_until: int
    threshold: float


def texts(status: Status) -> dict[str, str]:
    """Return what the page says in each place."""
    one, own = status, status.version is not None
    since = f" · since {_ago(one.since, one.at)}" if one.since else ""
    whole = (one.usd or 0.0) + (one.saved_usd or 0.0)
    served = [v for v in one.versions if v.mode in ("champion", "canary")]
    threshold = ""
    if one.threshold is not None:
        threshold = f"Calibrated threshold {one.threshold:.3f}" + (
            "; the pacer moves it with the traffic." if one.paced else "."
        )
    challenger = ""
    if one.challenger is not None:
        on = one.challenger.version
        challenger = f"Challenger in {one.challenger.mode}: " + (
            f"version {on}" if on else "no version in line"
        )
        if one.challenger.agreed is not None:
            challenger += f" · agrees with the champion on {_percent(one.challenger.agreed)}"
        if one.challenger.dropped:
            challenger += f" · {_count(one.challenger.dropped, 'prompt')} not asked: it was behind"
    return {
        "state": _STATES[one.state],
        "serves": f"Version {one.version} · {one.kind}{since}" if own else "No version serves",
        "requests": f"{one.requests:,}",
        "outcomes": f"{one.failed:,} failed · {one.refused:,} refused · {one.left:,} left",
        "strong_fraction": _percent(one.strong_fraction),
        "decisions": f"of {_count(sum(v.decisions for v in served), 'decision')}",
        "saved": _usd(one.saved_usd),
        "spent": "A model has no price" if one.usd is None else f"{_usd(one.usd)} spent",
        "saved_share": f"{_percent(one.saved_usd / whole)} less than strong alone"
        if one.saved_usd and whole
        else "",
        "routing": _time(one.routing_p50_s),
        "routing_p99": f"p99 {_time(one.routing_p99_s)}",
        "fallbacks": _count(one.fallbacks, "decision") + " without a router",
        "no_swaps": "" if one.swaps else "No version has served yet.",
        "threshold": threshold,
        "challenger": challenger,
        "counted": f"Counts are since {_day(one.started)}"
        + (f", of all {one.processes} processes" if one.processes > 1 else "")
        + ".",
        "at": _day(one.at, seconds=True),
    }


def rows(status: Status) -> dict[str, list[list[str]]]:
    """Return the rows of each table."""
    return {
        "problems": [[problem] for problem in status.problems],
        "swaps": [
            [_day(s.at), s.version, s.kind, "last good copy" if s.from_copy else ""]
            for s in status.swaps[:8]
        ],
        "routes": [
            [
                r.route, r.model, f"{r.answered:,}", f"{r.failed:,}", f"{r.retries:,}",
                f"{r.stood_in_for:,}", f"{r.input_tokens:,}", f"{r.output_tokens:,}", _usd(r.usd),
                _time(r.first_byte_p50_s), _time(r.upstream_p50_s), _time(r.upstream_p99_s),
            ]
            for r in status.routes
        ],
        "versions": [
            [
                v.version, v.mode, f"{v.decisions:,}", _percent(v.strong_fraction),
                f"{v.failures:,}", _time(v.scoring_p50_s), _time(v.scoring_p99_s),
            ]
            for v in status.versions[:12]
        ],
    }  # fmt: skip


def bars(status: Status) -> Bars:
    """Return the lengths of what is drawn, each in its drawing's own units."""
    most = max(status.win_rates, default=0)
    heights = [round(HEIGHT * n / most, 2) if most else 0.0 for n in status.win_rates]
    strong, threshold = status.strong_fraction, status.threshold
    return Bars(
        strong=round(100.0 * (strong or 0.0), 2),
        decided=0.0 if strong is None else 100.0,
        win_rates=tuple((heights + [0.0] * 20)[:20]),
        weak_until=20 if threshold is None else round(20 * threshold),
        threshold=-9.0 if threshold is None else round(200.0 * threshold, 2),
    )


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def _percent(share: float | None) -> str:
    return _NONE if share is None else f"{100.0 * share:.1f} %"


def _usd(usd: float | None) -> str:
    if usd is None:
        return _NONE
    return (
        f"${usd:,.2f}" if usd == 0 or usd >= 1 else f"${usd:.2g}" if usd < 0.01 else f"${usd:.3f}"
    )


def _time(seconds: float | None) -> str:
    if seconds is None:
        return _NONE
    if seconds < 0.01:
        return f"{1000.0 * seconds:.1f} ms"
    return f"{1000.0 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _day(at: datetime, *, seconds: bool = False) -> str:
    return at.strftime("%-d %b %Y, %H:%M:%S UTC" if seconds else "%-d %b %Y, %H:%M UTC")


def _ago(since: datetime, now: datetime) -> str:
    minutes = int((now - since).total_seconds() // 60)
    for unit, many in (("day", 1440), ("hour", 60), ("minute", 1)):
        if minutes >= many:
            return f"{_day(since)} ({_count(minutes // many, unit)})"
    return f"{_day(since)} (just now)"
