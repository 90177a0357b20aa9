"""The policy `pool`: one version chooses among any number of models, each weighed by its price.

The version is turned to each model against weak (`routellm.routers.pool`), and the model answers
whose quality less ``cost_weight`` x its dollars is highest. One call, so that every request can
have it; docs/policies.md has it measured.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np

from routellm.errors import GatewayError, UsageError
from routellm.gateway.decide import Routed
from routellm.gateway.follow import Serving
from routellm.gateway.lane import Lane
from routellm.gateway.money import Money
from routellm.gateway.targets import COST_WEIGHT, number
from routellm.routers.pool import Pool, best_at
from routellm.settings import GatewaySettings

_WAITING = 256  # prompts that may wait to be scored


def cost_weight_of(fields: Mapping[str, Any], headers: Mapping[str, str]) -> float | None:
    """Return the weight of a dollar that a request asks for, by the body or a header.

    Raises
    ------
    GatewayError
        If it is not a number, 0 or more.
    """
    routing = fields.get("routing")
    asked = routing.get(COST_WEIGHT) if isinstance(routing, Mapping) else None
    if asked is None:
        asked = headers.get("x-routellm-cost-weight")
    return None if asked is None else number(COST_WEIGHT, asked)


class PoolPolicy:
    """Chooses among strong, weak and the models of ``gateway.pool``.

    Raises
    ------
    UsageError
        If a model has no price.
    """

    def __init__(self, settings: GatewaySettings, money: Money) -> None:
        self._routes = ("weak", "strong", *settings.pool.models)
        self._models = [settings.routes[route].model for route in self._routes]
        self._weight = settings.pool.cost_weight
        self._timeout_s = settings.routing_timeout_s
        usd = [money.usd(model) for model in self._models]
        for route, model, one in zip(self._routes, self._models, usd, strict=True):
            if one is None:
                raise UsageError(
                    f"{model} ({route}) has no price, so gateway.pool cannot weigh it: set "
                    f'[prices."{model}"] with input and output in routellm.toml'
                )
        self._usd = np.array(usd, dtype=np.float64)
        self._lane = Lane("score-pool", _WAITING, settings.routing_timeout_s)
        # of the version that serves: its pool, or why it has none
        self._pool: tuple[Serving, Pool | UsageError] | None = None

    def close(self) -> None:
        self._lane.close()

    async def decide(self, serving: Serving, prompt: str, weight: float | None) -> Routed:
        """Return where a prompt goes.

        Raises
        ------
        Exception
            Whatever a broken or slow router raises, or one that does not know a model.
        """
        weight = self._weight if weight is None else weight
        work = self._lane.submit(lambda: self._of(serving).quality([prompt])[0])
        quality = await asyncio.wait_for(asyncio.wrap_future(work), self._timeout_s)
        if not np.isfinite(quality).all():
            raise GatewayError(f"version {serving.ref.version} gave no win rate", status=500)
        (best,) = best_at(quality[None], self._usd, weight)
        return Routed(
            self._routes[best],
            self._models[best],
            f"quality less {weight:g} x dollars, of {len(self._routes)} models",
            serving.ref.version,
            serving.bundle.kind,
            float(quality[best] + 1.0) / 2.0,
            policy="pool",
            prompt=prompt,
            pair=serving.bundle.pair,
        )

    def _of(self, serving: Serving) -> Pool:
        """Return the pool of a version; runs in the lane's thread."""
        if self._pool is None or self._pool[0] is not serving:
            pair = serving.bundle.pair
            names = (pair.weak, pair.strong, *self._routes[2:])
            try:
                self._pool = serving, Pool(serving.bundle.router, names)
            except UsageError as error:  # found out once: the version stays as it is
                self._pool = serving, error
        found = self._pool[1]
        if isinstance(found, UsageError):
            raise found
        return found
