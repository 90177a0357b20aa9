"""How old things are that ought to be renewed."""

from __future__ import annotations

from datetime import datetime

from routellm.monitoring.finding import Check, Finding, graded
from routellm.monitoring.seen import Seen


class SnapshotAge(Check):
    """New battles keep coming in."""

    name = "snapshot_age"

    def look(self, seen: Seen) -> Finding:
        newest, how = seen.newest_snapshot(), seen.settings.monitor
        days, limit = _days(seen, newest.created_at), how.max_snapshot_age_days
        detail = f"the newest snapshot, {newest.digest[:12]}, is {_told(days)} old"
        outcome = graded(days, limit, how.warn_share * limit)
        if outcome != "ok":
            detail += ": see that sources bring new battles, and that `ingest` runs"
        return Finding(self.name, outcome, days, limit, detail)


class ChampionAge(Check):
    """The version that serves was trained not too long ago."""

    name = "champion_age"

    def look(self, seen: Seen) -> Finding:
        champion, how = seen.champion(), seen.settings.monitor
        days, limit = _days(seen, champion.created_at), how.max_champion_age_days
        detail = f"the champion, version {champion.version}, was trained {_told(days)} ago"
        outcome = graded(days, limit, how.warn_share * limit)
        if outcome != "ok":
            detail += ": see that `retrain` runs, and why the gate let no later version pass"
        return Finding(self.name, outcome, days, limit, detail)


def _days(seen: Seen, since: str | datetime) -> float:
    when = datetime.fromisoformat(since) if isinstance(since, str) else since
    return (seen.at - when).total_seconds() / 86_400


def _told(days: float) -> str:
    hours = max(days, 0.0) * 24
    if hours < 1:
        return f"{hours * 60:.0f} minutes"
    return f"{days:.1f} days" if days >= 1 else f"{hours:.1f} hours"
