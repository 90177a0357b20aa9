"""What gateways decided lately, from the feedback store: win rates, routes, dollars, prompts.

Everything but the prompts is there without prompts being stored. Only so many rows are read,
the latest, however busy the gateways are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.exc import SQLAlchemyError

from routellm.feedback import schema, store_url
from routellm.feedback.engine import engine_of, parse_url
from routellm.feedback.errors import FeedbackUnreachable
from routellm.feedback.store import FeedbackStore
from routellm.monitoring.finding import Unknown
from routellm.settings import Settings

_MOST_DECISIONS = 20_000
_MOST_PROMPTS = 5_000
_BY_SETTINGS = "%asked for by the settings"  # how the gateway's reason ends


@dataclass(frozen=True)
class Traffic:
    """Decisions within `monitor.window_hours`.

    Attributes
    ----------
    win_rates : ndarray float64 (n,)
        Of the champion's latest decisions; no canary's.
    asked, strong : int
        Decisions of the champion that the settings' target decided, no request's and no key's own,
        and how many of them went to strong.
    answers_today, unpriced_today : int
        Answers since midnight (UTC), and those whose model has no price.
    usd_today : float
    prompts : tuple of str
        The latest that were stored, redacted.
    """

    win_rates: NDArray[np.float64]
    asked: int
    strong: int
    answers_today: int
    unpriced_today: int
    usd_today: float
    prompts: tuple[str, ...] = field(repr=False)


def read_traffic(settings: Settings, version: str, at: datetime) -> Traffic:
    """Return what the store has of the time before `at`.

    Raises
    ------
    Unknown
        If there is no store.
    FeedbackUnreachable
        If it does not answer.
    """
    if not FeedbackStore(store_url(settings)).exists():
        raise Unknown("the gateway records no decisions (feedback.enabled)")
    since_us = _us(at - timedelta(hours=settings.monitor.window_hours))
    d, p = schema.decisions, schema.prompts
    own = (d.c.version == version, d.c.canary == sa.false(), d.c.at_us >= since_us)
    rates = (
        sa.select(d.c.win_rate)
        .where(*own, d.c.win_rate.is_not(None))
        .order_by(d.c.at_us.desc())
        .limit(_MOST_DECISIONS)
    )
    routes = (
        sa.select(d.c.route, sa.func.count())
        .where(*own, d.c.reason.like(_BY_SETTINGS))
        .group_by(d.c.route)
    )
    midnight = at.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    today = sa.select(sa.func.count(), sa.func.count(d.c.usd), sa.func.sum(d.c.usd)).where(
        d.c.at_us >= _us(midnight)
    )
    prompts = (
        sa.select(p.c.prompt)
        .where(p.c.at_us >= since_us)
        .order_by(p.c.at_us.desc())
        .limit(_MOST_PROMPTS)
    )
    engine = engine_of(parse_url(store_url(settings)))
    try:
        with engine.connect() as connection:
            by_route = {route: int(n) for route, n in connection.execute(routes)}
            answers, priced, usd = connection.execute(today).one()
            return Traffic(
                win_rates=np.array(connection.execute(rates).scalars().all(), np.float64),
                asked=sum(by_route.values()),
                strong=by_route.get("strong", 0),
                answers_today=int(answers),
                unpriced_today=int(answers) - int(priced),
                usd_today=float(usd or 0.0),
                prompts=tuple(connection.execute(prompts).scalars()),
            )
    except (SQLAlchemyError, OSError) as error:
        # not what it said, which may quote a prompt
        raise FeedbackUnreachable(
            f"the feedback store {FeedbackStore(store_url(settings)).name} does not answer "
            f"({type(error).__name__}): see that it runs"
        ) from error
    finally:
        engine.dispose()


def _us(at: datetime) -> int:
    return int(at.timestamp() * 1_000_000)
