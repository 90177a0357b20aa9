"""The gateway's status: what serves, what it does, what is wrong.

Counts are the metrics' own, so they are what Prometheus sees: of all processes where several
serve. What serves and what is wrong is told by the process that is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Literal

from routellm.errors import GatewayError
from routellm.gateway.figures import Figures
from routellm.gateway.follow import Served
from routellm.gateway.gateway import Gateway


@dataclass(frozen=True)
class RouteStatus:
    """One of the two models; of requests that it was to answer, or did."""

    route: str
    model: str
    answered: int
    failed: int  # 5xx
    input_tokens: int
    output_tokens: int
    usd: float | None
    first_byte_p50_s: float | None
    upstream_p50_s: float | None
    upstream_p99_s: float | None
    retries: int
    stood_in_for: int  # by the other one


@dataclass(frozen=True)
class VersionStatus:
    """One version in one mode (champion, shadow, canary); of prompts that it scored."""

    version: str
    mode: str
    decisions: int
    strong_fraction: float | None
    failures: int
    scoring_p50_s: float | None
    scoring_p99_s: float | None


@dataclass(frozen=True)
class ChallengerStatus:
    mode: str
    version: str | None
    agreed: float | None  # share of shadow decisions that were the champion's
    dropped: int


@dataclass(frozen=True)
class Status:
    """What the page tells.

    Attributes
    ----------
    state : str
        ``serving``, ``troubled`` (it serves, and something is wrong), or ``fallback`` (no version
        serves).
    since : datetime or None
        When the version began to serve.
    strong_fraction : float or None
        Share of the decisions that count for requests (champion's and canary's).
    usd, saved_usd : float or None
        None where a model's price is not set.
    win_rates : tuple of int
        How many prompts the version scored in each twentieth of [0, 1].
    threshold : float or None
        What the settings' target comes to on the version's calibration.
    paced : bool
        Whether the pacer moves it with the traffic.
    """

    state: Literal["serving", "troubled", "fallback"]
    at: datetime
    started: datetime
    processes: int
    version: str | None
    kind: str | None
    since: datetime | None
    problems: tuple[str, ...]
    requests: int
    refused: int  # 4xx
    failed: int  # 5xx
    left: int  # by their clients, before or while they were answered
    broke_off: int
    strong_fraction: float | None
    usd: float | None
    saved_usd: float | None
    fallbacks: int
    routing_p50_s: float | None
    routing_p99_s: float | None
    routes: tuple[RouteStatus, ...]
    versions: tuple[VersionStatus, ...]
    challenger: ChallengerStatus | None
    win_rates: tuple[int, ...]
    threshold: float | None
    paced: bool
    swaps: tuple[Served, ...]  # latest first


def status_of(gateway: Gateway, started: datetime, problems: Sequence[str] = ()) -> Status:
    """Return a gateway's status now; `problems` are known elsewhere."""
    figures = Figures.of(gateway.metrics.exposition())
    total = figures.total
    serving = gateway.follower.serving
    found = (*_problems(gateway), *(p for p in problems if p))
    by_status = figures.by("routellm_requests_total", "status")
    broken = figures.by("routellm_broken_answers_total", "why")
    decided = {"strong": 0.0, "weak": 0.0}
    for mode in ("champion", "canary"):
        for route, n in figures.by("routellm_decisions_total", "route", mode=mode).items():
            decided[route] += n
    priced = all(gateway.money.usd(u.model) is not None for u in gateway.upstreams.values())
    version = serving.ref.version if serving else None
    return Status(
        state="fallback" if serving is None else "troubled" if found else "serving",
        at=datetime.now(UTC),
        started=started,
        processes=gateway.settings.workers,
        version=version,
        kind=serving.bundle.kind if serving else None,
        since=gateway.follower.served[-1].at if serving and gateway.follower.served else None,
        problems=found,
        requests=int(sum(by_status.values())),
        refused=int(sum(n for status, n in by_status.items() if status.startswith("4"))),
        failed=int(sum(n for status, n in by_status.items() if status.startswith("5"))),
        left=int(broken.get("client_left", 0)),
        broke_off=int(broken.get("upstream_broke_off", 0)),
        strong_fraction=_share(decided["strong"], sum(decided.values())),
        usd=total("routellm_spent_usd_total") if priced else None,
        saved_usd=total("routellm_saved_usd_total") if priced else None,
        fallbacks=int(total("routellm_fallbacks_total")),
        routing_p50_s=figures.quantile(0.5, "routellm_routing_seconds"),
        routing_p99_s=figures.quantile(0.99, "routellm_routing_seconds"),
        routes=tuple(_route(gateway, figures, route) for route in gateway.upstreams),
        versions=_versions(figures),
        challenger=_challenger(gateway, figures),
        win_rates=_win_rates(figures, version),
        threshold=_threshold(gateway),
        paced=gateway.settings.pacer and gateway.target.paced,
        swaps=tuple(reversed(gateway.follower.served.copy())),
    )


def document(status: Status) -> dict[str, object]:
    """Return a status as JSON takes it."""

    def plain(value: object) -> object:
        if isinstance(value, datetime):
            return value.isoformat(timespec="seconds").replace("+00:00", "Z")
        if isinstance(value, dict):
            return {name: plain(inner) for name, inner in value.items()}
        if isinstance(value, tuple | list):
            return [plain(inner) for inner in value]
        return value

    return {name: plain(value) for name, value in asdict(status).items()}


def _problems(gateway: Gateway) -> list[str]:
    out, follower = [], gateway.follower
    if follower.serving is None:
        out.append(f"No router serves: queries go to {gateway.settings.fallback}, the fallback.")
    elif follower.problem and follower.served and follower.served[-1].from_copy:
        out.append("The version that serves is the last good copy.")
    if follower.problem:
        out.append(f"The alias {gateway.settings.alias}: {follower.problem}.")
    if gateway.challenger is not None and gateway.challenger.follower.failures:
        why = gateway.challenger.follower.problem
        if why:
            out.append(f"The challenger: {why}.")
    return out


def _route(gateway: Gateway, figures: Figures, route: str) -> RouteStatus:
    total, model = figures.total, gateway.upstreams[route].model
    by_status = figures.by("routellm_requests_total", "status", route=route)
    priced = gateway.money.usd(model) is not None
    return RouteStatus(
        route=route,
        model=model,
        answered=int(sum(n for status, n in by_status.items() if status.startswith("2"))),
        failed=int(sum(n for status, n in by_status.items() if status.startswith("5"))),
        input_tokens=int(total("routellm_tokens_total", route=route, direction="input")),
        output_tokens=int(total("routellm_tokens_total", route=route, direction="output")),
        usd=total("routellm_spent_usd_total", route=route) if priced else None,
        first_byte_p50_s=figures.quantile(0.5, "routellm_upstream_first_byte_seconds", route=route),
        upstream_p50_s=figures.quantile(0.5, "routellm_upstream_seconds", route=route),
        upstream_p99_s=figures.quantile(0.99, "routellm_upstream_seconds", route=route),
        retries=int(total("routellm_retries_total", route=route)),
        stood_in_for=int(total("routellm_stand_ins_total", route=route)),
    )


def _versions(figures: Figures) -> tuple[VersionStatus, ...]:
    """Return each version in each mode, the highest version first."""
    names = ("routellm_decisions_total", "routellm_scoring_failures_total")
    found = {pair for name in names for pair in figures.values_of(name, "version", "mode")}
    out = []
    for version, mode in sorted(found, key=lambda pair: (_number(pair[0]), pair), reverse=True):
        where = {"version": version, "mode": mode}
        by_route = figures.by("routellm_decisions_total", "route", **where)
        decisions = sum(by_route.values())
        out.append(
            VersionStatus(
                version=version,
                mode=mode,
                decisions=int(decisions),
                strong_fraction=_share(by_route.get("strong", 0.0), decisions),
                failures=int(figures.total("routellm_scoring_failures_total", **where)),
                scoring_p50_s=figures.quantile(0.5, "routellm_scoring_seconds", **where),
                scoring_p99_s=figures.quantile(0.99, "routellm_scoring_seconds", **where),
            )
        )
    return tuple(out)


def _challenger(gateway: Gateway, figures: Figures) -> ChallengerStatus | None:
    if gateway.challenger is None:
        return None
    one, _ = gateway.challenger.standing(gateway.follower.serving)
    if one is None:
        return ChallengerStatus(gateway.challenger.mode, None, None, 0)
    version = one.ref.version
    decisions = figures.total("routellm_decisions_total", version=version, mode="shadow")
    agreed = figures.total("routellm_challenger_agreements_total", version=version)
    dropped = figures.total("routellm_challenger_dropped_total", version=version)
    return ChallengerStatus(
        gateway.challenger.mode, version, _share(agreed, decisions), int(dropped)
    )


def _win_rates(figures: Figures, version: str | None) -> tuple[int, ...]:
    if version is None:
        return ()
    buckets = figures.buckets("routellm_win_rate", version=version, mode="champion")
    counts = [0.0, *(count for bound, count in buckets if bound <= 1.0)]
    return tuple(int(counts[i + 1] - counts[i]) for i in range(len(counts) - 1))


def _threshold(gateway: Gateway) -> float | None:
    serving = gateway.follower.serving
    if serving is None:
        return None
    try:
        return gateway.target.threshold_on(serving.bundle, gateway.prices)
    except GatewayError:  # the version cannot do what the settings ask for: requests fall back
        return None


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _number(version: str) -> int:
    return int(version) if version.isdecimal() else -1
