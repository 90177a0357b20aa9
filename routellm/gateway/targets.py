"""What a request asks of its route, who asked, and the threshold that this means for a version.

Who asks, strongest first: the model's name (RouteLLM's ``router-mf-0.116``), the body's
``routing`` object, the ``x-routellm-*`` headers, the API key, the settings. The strongest that says
anything is heard, and the others are not mixed in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from routellm.errors import GatewayError, UsageError
from routellm.gateway.money import Money

if TYPE_CHECKING:
    from routellm.bundle import Bundle

AskedBy = Literal["model name", "body", "header", "key", "settings"]

FIELDS = ("threshold", "strong_fraction", "quality", "max_usd")
POLICY, COST_WEIGHT = "policy", "cost_weight"
_OTHERS = (POLICY, COST_WEIGHT)
_HEADERS = {name: f"x-routellm-{name.replace('_', '-')}" for name in FIELDS}
_NAMED = re.compile(r"router-([a-z][a-z0-9_]*)-([0-9.eE+-]{1,40})")  # RouteLLM's own names


@dataclass(frozen=True)
class QueryPrices:
    """What a query costs on average with each model, in dollars; None where no price is set."""

    strong: str
    weak: str
    strong_usd: float | None
    weak_usd: float | None

    @classmethod
    def of(cls, money: Money, strong: str, weak: str) -> QueryPrices:
        """Return the prices of two models, for as many tokens as the settings say."""
        return cls(strong, weak, money.usd(strong), money.usd(weak))


@dataclass(frozen=True)
class Target:
    """What is asked for: one of the first four is set, and `kind` only beside a threshold.

    Attributes
    ----------
    threshold : float
        Win rate from which a query goes to strong, in [0, 1].
    strong_fraction : float
        Share of queries for strong, in [0, 1].
    quality : float
        Share of the gap between weak and strong to recover (PGR), in [0, 1].
    max_usd : float
        Most dollars that a query may cost on average.
    kind : str
        Router kind that the model's name insists on.
    asked_by : str
        Who said so.
    """

    threshold: float | None = None
    strong_fraction: float | None = None
    quality: float | None = None
    max_usd: float | None = None
    kind: str | None = None
    asked_by: AskedBy = "settings"

    @classmethod
    def of_settings(
        cls,
        *,
        threshold: float | None,
        strong_fraction: float,
        quality: float | None = None,
        max_usd: float | None = None,
    ) -> Target:
        """Return the gateway's own target: the strong fraction, where no other is set.

        Raises
        ------
        UsageError
            If two of the others are set.
        """
        values = {"threshold": threshold, "quality": quality, "max_usd": max_usd}
        given = {name: v for name, v in values.items() if v is not None}
        if len(given) > 1:
            names = ", ".join(f"gateway.{name}" for name in given)
            raise UsageError(f"{names} are set, and only one of them can hold: unset the others")
        return Target.of(given) or cls(strong_fraction=strong_fraction)

    @classmethod
    def of(cls, values: Mapping[str, float], asked_by: AskedBy = "settings") -> Target | None:
        """Return the target that one of `FIELDS` is; None without one."""
        if not values:
            return None
        threshold, fraction, quality, max_usd = (values.get(name) for name in FIELDS)
        return cls(threshold, fraction, quality, max_usd, asked_by=asked_by)

    @property
    def by_request(self) -> bool:
        """Whether the request itself asked: what cannot be met is then its own mistake."""
        return self.asked_by in ("model name", "body", "header")

    @property
    def paced(self) -> bool:
        """Whether it is a share of the traffic, which a pacer keeps while the traffic drifts.

        A threshold means itself. A quality is what the benchmark's queries needed: where more
        queries are hard, more of them must go to strong to keep it.
        """
        return self.strong_fraction is not None or self.max_usd is not None

    def __str__(self) -> str:
        if self.threshold is not None:
            return f"a threshold of {self.threshold:g}"
        if self.quality is not None:
            return f"a quality of {self.quality:g}"
        if self.max_usd is not None:
            return f"at most ${self.max_usd:g} a query"
        return f"a strong fraction of {self.strong_fraction:g}"

    def fraction_on(self, bundle: Bundle, prices: QueryPrices) -> float:
        """Return the strong fraction that this means for a version, in [0, 1].

        Raises
        ------
        GatewayError
            If the version or the prices cannot say, or nothing is as cheap as is asked.
        """
        if self.threshold is not None:
            return bundle.calibration.strong_fraction(self.threshold)
        if self.quality is not None:
            if bundle.curve is None:
                raise _cannot(
                    f"{self} cannot be met: the version that serves carries no curve of quality; "
                    "ask for a strong fraction, or register a new version"
                )
            return bundle.curve.strong_fraction(self.quality)
        if self.max_usd is not None:
            return _affordable(self.max_usd, prices)
        assert self.strong_fraction is not None
        return self.strong_fraction

    def threshold_on(self, bundle: Bundle, prices: QueryPrices) -> float:
        """Return the win rate from which a query goes to strong.

        Raises
        ------
        GatewayError
            As `fraction_on`.
        """
        if self.threshold is not None:
            return self.threshold
        return bundle.calibration.threshold(self.fraction_on(bundle, prices))


def target_of(
    fields: Mapping[str, Any], headers: Mapping[str, str], key: Target | None, default: Target
) -> Target:
    """Return what a request asks for.

    Parameters
    ----------
    fields : dict
        The body's.
    key : Target or None
        The API key's target.
    default : Target
        The settings' (`Target.of_settings`).

    Raises
    ------
    GatewayError
        If a value is not a number in its range, or one place asks for two things.
    """
    name = fields.get("model")
    if isinstance(name, str) and (named := _NAMED.fullmatch(name)):
        limit = number("threshold", named.group(2))
        return Target(threshold=limit, kind=named.group(1), asked_by="model name")
    routing = fields.get("routing")
    if routing is not None:
        if not isinstance(routing, Mapping):
            raise GatewayError(f"`routing` must be an object with one of {_listed(FIELDS)}")
        unknown = sorted(str(n)[:40] for n in set(routing) - {*FIELDS, *_OTHERS})
        if unknown:
            known = _listed((*FIELDS, *_OTHERS))
            raise GatewayError(f"`routing` knows {known}, not {unknown[:3]}")
        if target := _target(
            {n: v for n, v in routing.items() if v is not None and n in FIELDS}, "body"
        ):
            return target
    given = {n: headers[header] for n, header in _HEADERS.items() if header in headers}
    return _target(given, "header") or key or default


def policy_of(fields: Mapping[str, Any], headers: Mapping[str, str]) -> str:
    """Return the policy that a request asks for, by the body or a header; "" for the router.

    Raises
    ------
    GatewayError
        If it is no text.
    """
    routing = fields.get("routing")
    asked = routing.get(POLICY) if isinstance(routing, Mapping) else None
    if asked is None:
        asked = headers.get(f"x-routellm-{POLICY}", "")
    if not isinstance(asked, str):
        raise GatewayError("`routing.policy` must be a policy's name")
    return asked


def number(name: str, raw: Any) -> float:
    """Return the value of one of `FIELDS`, or of `COST_WEIGHT`.

    Raises
    ------
    GatewayError
        If it is not a number in its range.
    """
    value = math.nan
    if isinstance(raw, str | int | float) and not isinstance(raw, bool):
        try:
            value = float(raw)
        except (ValueError, OverflowError):
            value = math.nan
    if name in ("max_usd", COST_WEIGHT):
        good = 0.0 <= value < math.inf
        allowed = "dollars, 0 or more" if name == "max_usd" else "of 0 or more"
    else:
        good, allowed = 0.0 <= value <= 1.0, "in [0, 1]"
    if not good:
        # of what is neither text nor number only the type: it may be large, or deep
        shown = repr(raw[:40]) if isinstance(raw, str) else type(raw).__name__
        if isinstance(raw, float):
            shown = f"{raw:g}"
        raise GatewayError(f"{name.replace('_', ' ')} {shown} is not a number {allowed}")
    return value


def _target(given: Mapping[str, Any], by: AskedBy) -> Target | None:
    if len(given) > 1:
        raise GatewayError(f"ask for one of {_listed(FIELDS)}; found {_listed(sorted(given))}")
    return Target.of({name: number(name, raw) for name, raw in given.items()}, by)


def _affordable(max_usd: float, prices: QueryPrices) -> float:
    """Return the largest c with ``c * strong_usd + (1 - c) * weak_usd <= max_usd``."""
    strong, weak = prices.strong_usd, prices.weak_usd
    for model, usd in ((prices.strong, strong), (prices.weak, weak)):
        if usd is None:
            raise _cannot(
                f"at most ${max_usd:g} a query cannot be met: no price is set for {model} "
                f"(setting prices.{model}); set it, or ask for a strong fraction"
            )
    assert strong is not None
    assert weak is not None
    if max_usd >= strong:
        return 1.0
    if max_usd < weak:
        raise _cannot(
            f"no query costs as little as ${max_usd:g} on average: {prices.weak} alone costs "
            f"${weak:.3g}; ask for no less than that"
        )
    return (max_usd - weak) / (strong - weak)


def _cannot(message: str) -> GatewayError:
    return GatewayError(message, code="target_cannot_be_met")


def _listed(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]
