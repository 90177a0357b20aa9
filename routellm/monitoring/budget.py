"""Whether the traffic costs what it should: the share that goes to strong, and dollars."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, cast

from routellm.errors import GatewayError, UsageError
from routellm.gateway.key_file import read_keys
from routellm.gateway.money import Money
from routellm.gateway.targets import QueryPrices, Target
from routellm.monitoring.finding import ORDER, Check, Finding, Outcome, Unknown, graded
from routellm.monitoring.seen import Champion, Seen

if TYPE_CHECKING:
    from routellm.bundle import Bundle


class StrongFraction(Check):
    """As many queries go to strong as the settings ask for, neither more nor fewer."""

    name = "strong_fraction"

    def look(self, seen: Seen) -> Finding:
        champion, how = seen.champion(), seen.settings.monitor
        wanted = asked_for(seen, champion)
        strong, n, over = _decided(seen, champion)
        if n < how.min_decisions:
            raise Unknown(
                f"{n:,} decisions ({over}) are fewer than monitor.min_decisions, "
                f"{how.min_decisions:,}"
            )
        value, limit = strong / n, how.strong_fraction_tolerance
        outcome = graded(abs(value - wanted), limit, how.warn_share * limit)
        detail = (
            f"{value:.1%} of {n:,} decisions ({over}) went to strong, and {wanted:.1%} were asked "
            "for"
        )
        return Finding(self.name, outcome, value, wanted + limit, detail)


class Spend(Check):
    """A day's answers cost no more than they may."""

    name = "spend"

    def look(self, seen: Seen) -> Finding:
        how = seen.settings.monitor
        usd, unpriced = _spent_today(seen)
        budget = how.usd_per_day
        lacking = f"; {unpriced:,} answers have no price (set [prices.MODEL])" if unpriced else ""
        if budget is None:
            detail = f"${usd:,.2f} today, and no budget is set (monitor.usd_per_day){lacking}"
            return Finding(self.name, "ok", usd, None, detail)
        outcome = graded(usd, budget, how.warn_share * budget)
        if outcome == "ok" and unpriced:
            outcome = "warn"
        detail = f"${usd:,.2f} of ${budget:,.2f} today (UTC){lacking}"
        return Finding(self.name, outcome, usd, budget, detail)


class KeyBudgets(Check):
    """No key of the gateway has spent its budget."""

    name = "key_budgets"

    def look(self, seen: Seen) -> Finding:
        home, share = seen.settings.home, seen.settings.monitor.warn_share
        keys = read_keys(home / "keys.json") if (home / "keys.json").exists() else {}
        budgeted = [k for k in keys.values() if k.budgeted and k.revoked_at is None]
        if not budgeted:
            return Finding(self.name, "ok", None, None, "no key has a budget")
        spent = spent_by_key(home / "spend.db", seen.at)
        worst, detail = 0.0, ""
        outcome: Outcome = "ok"
        for key in budgeted:
            used = spent.get(key.id, Used(0.0, 0.0))
            for budget, usd, span in (
                (key.usd_per_day, used.today_usd, "day"),
                (key.usd_per_month, used.month_usd, "month"),
            ):
                if budget is None:
                    continue
                part = usd / budget if budget else float(usd >= budget)
                if part >= worst:
                    worst = part
                    detail = f"key {key.name!r} has spent ${usd:,.2f} of ${budget:,.2f} this {span}"
                # a spent budget is refused from: at the limit is over it
                graded_: Outcome = "fail" if part >= 1 else "warn" if part >= share else "ok"
                outcome = min(outcome, graded_, key=ORDER.index)
        return Finding(self.name, outcome, worst, 1.0, detail)


@dataclass(frozen=True)
class Used:
    """What a key has spent in the day and the month (UTC)."""

    today_usd: float
    month_usd: float


def spent_by_key(path: Path, at: datetime) -> dict[str, Used]:
    """Return what each key has spent, from the gateway's file, which is only read.

    Raises
    ------
    Unknown
        If it cannot be read.
    """
    if not path.exists():
        return {}
    day = f"{at.astimezone(UTC):%Y-%m-%d}"
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as file:
            rows = file.execute(
                "SELECT key, TOTAL(usd) FILTER (WHERE day = :day), TOTAL(usd) FROM spend"
                " WHERE day BETWEEN :first AND :day GROUP BY key",
                {"day": day, "first": f"{day[:7]}-01"},
            ).fetchall()
    except sqlite3.Error as error:
        raise Unknown(f"{path} cannot be read ({error})") from error
    return {key: Used(today, month) for key, today, month in rows}


def asked_for(seen: Seen, champion: Champion) -> float:
    """Return the strong fraction that the settings' target means for the champion.

    Raises
    ------
    Unknown
        If the version, or the prices that are set, cannot say.
    """
    how = seen.settings.gateway
    try:
        target = Target.of_settings(
            threshold=how.threshold, strong_fraction=how.strong_fraction,
            quality=how.quality, max_usd=how.max_usd,
        )  # fmt: skip
        prices = QueryPrices.of(
            Money.of(seen.settings),
            how.strong.model if how.strong else champion.strong,
            how.weak.model if how.weak else champion.weak,
        )
        # of a bundle it reads the calibration and the curve, which a champion has too
        return target.fraction_on(cast("Bundle", champion), prices)
    except (GatewayError, UsageError) as error:
        raise Unknown(str(error)) from error


def _decided(seen: Seen, champion: Champion) -> tuple[int, int, str]:
    """Return how many decisions went to strong, of how many, and over what."""
    try:
        traffic = seen.traffic()
        if seen.settings.feedback.enabled or traffic.asked:
            window = seen.settings.monitor.window_hours
            return traffic.strong, traffic.asked, f"the last {window:g} hours"
    except Unknown:
        pass  # no decisions are recorded
    figures = [one.figures for one in seen.gateways() if one.figures is not None]
    if not figures:
        raise Unknown(
            "neither are decisions recorded (feedback.enabled), nor does a gateway show its metrics"
        )
    where = {"version": champion.version, "mode": "champion"}
    by_route = [one.by("routellm_decisions_total", "route", **where) for one in figures]
    strong = sum(one.get("strong", 0.0) for one in by_route)
    n = sum(sum(one.values()) for one in by_route)
    return int(strong), int(n), "since the gateway started, whoever asked for the route"


def _spent_today(seen: Seen) -> tuple[float, int]:
    """Return the dollars of today, and how many answers have no price."""
    try:
        traffic = seen.traffic()
        if seen.settings.feedback.enabled or traffic.answers_today:
            return traffic.usd_today, traffic.unpriced_today
    except Unknown:
        pass  # no decisions are recorded; the keys' spending is
    path = seen.settings.home / "spend.db"
    if not path.exists():
        raise Unknown("neither are decisions recorded (feedback.enabled), nor is spending by keys")
    return sum(one.today_usd for one in spent_by_key(path, seen.at).values()), 0
