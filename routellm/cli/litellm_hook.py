"""Our router inside the LiteLLM proxy: a callback that puts the decided model into a request.

In LiteLLM's ``config.yaml``::

    litellm_settings:
      callbacks: routellm.cli.litellm_hook.proxy_handler_instance

A request for the model ``router`` (or ``router-KIND-THRESHOLD``) goes to one of the two models that
``gateway.strong.model`` and ``gateway.weak.model`` name; every other request passes untouched.
LiteLLM does the rest: keys, retries, the call itself.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from routellm.cli.context import load_settings
from routellm.cli.serving import sources
from routellm.errors import GatewayError
from routellm.gateway.cascade import thresholds
from routellm.gateway.decide import Routed
from routellm.gateway.endpoints import CHAT, COMPLETIONS, MESSAGES, RESPONSES
from routellm.gateway.gateway import Gateway
from routellm.gateway.keys import Caller
from routellm.gateway.money import Money

log = logging.getLogger("routellm.gateway")
CustomLogger: Any = import_module("litellm.integrations.custom_logger").CustomLogger

_ENDPOINTS = {  # by LiteLLM's name of the call
    "completion": CHAT,
    "acompletion": CHAT,
    "text_completion": COMPLETIONS,
    "atext_completion": COMPLETIONS,
    "responses": RESPONSES,
    "aresponses": RESPONSES,
    "anthropic_messages": MESSAGES,
}
_OURS = "routellm"  # in a request's metadata


class RouterHook(CustomLogger):  # type: ignore[misc]  # LiteLLM is an extra: no types here
    """Decides for each request for `router`.

    Parameters
    ----------
    gateway : Gateway
        Started already, or about to be: until it has a version its fallback route is taken.
    """

    def __init__(self, gateway: Gateway) -> None:
        super().__init__()
        self.gateway = gateway

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """Put the decided model in place of `router`; whatever fails costs routing alone."""
        endpoint = _ENDPOINTS.get(call_type)
        model = data.get("model")
        if endpoint is None or not isinstance(model, str) or not _is_ours(model):
            return data
        try:
            routed = await self.gateway.decide(endpoint, data, _headers(data), Caller())
            if routed.policy in thresholds(self.gateway.settings):
                raise GatewayError(
                    f"the policy {routed.policy} asks twice, and here LiteLLM asks once: only "
                    "`routellm serve` has it"
                )
        except Exception as error:
            log.error("a request through LiteLLM was not routed: %s", type(error).__name__)
            route = self.gateway.settings.fallback
            why = f"fallback: {error}"
            routed = Routed(route, self.gateway.upstreams[route].model, why)
        data["model"] = routed.model
        data.pop("routing", None)  # meant for the router, unknown to a provider
        _metadata(data)[_OURS] = {
            name.removeprefix("x-routellm-"): text for name, text in routed.headers().items()
        }
        return data

    async def async_post_call_response_headers_hook(
        self, data: dict[str, Any], user_api_key_dict: Any, response: Any, **more: Any
    ) -> dict[str, str] | None:
        """Say in the answer's headers what was decided, as the gateway does."""
        found = (data.get(name) for name in ("litellm_metadata", "metadata"))
        decided = next((m[_OURS] for m in found if isinstance(m, dict) and _OURS in m), None)
        if decided is None:
            return None
        return {
            f"x-routellm-{name}": str(text).encode("ascii", "replace").decode()[:500]
            for name, text in decided.items()
        }


def _is_ours(model: str) -> bool:
    return model == "router" or model.startswith("router-")


def _metadata(data: dict[str, Any]) -> dict[str, Any]:
    """Return what LiteLLM's own loggers see of a request, which is not what a provider sees."""
    name = "litellm_metadata" if isinstance(data.get("litellm_metadata"), dict) else "metadata"
    if not isinstance(data.get(name), dict):
        data[name] = {}
    found: dict[str, Any] = data[name]
    return found


def _headers(data: Mapping[str, Any]) -> Mapping[str, str]:
    request = data.get("proxy_server_request")
    headers = request.get("headers") if isinstance(request, Mapping) else None
    return {str(k).lower(): str(v) for k, v in headers.items()} if headers else {}


def make_hook() -> RouterHook:
    """Return the callback for the settings in force; its version loads in the background.

    Raises
    ------
    UsageError
        If the two models are not set.
    """
    settings = load_settings()
    source, challenger = sources(settings)
    gateway = Gateway(settings.gateway, source, settings.home, challenger, Money.of(settings))
    threading.Thread(target=gateway.start, name="start-router", daemon=True).start()
    return RouterHook(gateway)


def __getattr__(name: str) -> Any:
    """Make the instance that LiteLLM asks for when it asks: importing this module does nothing."""
    if name != "proxy_handler_instance":
        raise AttributeError(name)
    hook = globals()[name] = make_hook()
    return hook
