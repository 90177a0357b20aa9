"""Send an event to Prefect's server, and know that it arrived.

Prefect's own `emit_event` hands an event to a thread and comes back; what the server was not there
to take is lost without a word. What must not be lost goes this way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from routellm.errors import RouteLLMError, UsageError


class ServerAway(RouteLLMError):
    """Prefect's server did not take an event; it may at another time."""


def send_event(
    event: str, resource_id: str, resource_name: str, payload: Mapping[str, Any] | None = None
) -> None:
    """Send an event; returns once the server has it.

    Raises
    ------
    ServerAway
        If it does not answer, or refuses.
    """
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.events import Event
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.types._datetime import now

    made = Event(
        occurred=now("UTC"),
        event=event,
        resource={"prefect.resource.id": resource_id, "prefect.resource.name": resource_name},
        payload=dict(payload or {}),
    )
    try:
        with get_client(sync_client=True) as client:
            client.request("POST", "/events", json=[made.model_dump(mode="json")])
    except (httpx.HTTPError, PrefectHTTPStatusError, OSError, RuntimeError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ServerAway(
            f"Prefect's server did not take the event {event} ({why}): see that it runs and that "
            "PREFECT_API_URL is right"
        ) from error


def server_url() -> str:
    """Return the address of Prefect's server.

    Raises
    ------
    UsageError
        If none is set: one that Prefect starts for itself ends with this process.
    """
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if not url:
        raise UsageError(
            "no Prefect server to tell: set PREFECT_API_URL, as in http://127.0.0.1:4200/api"
        )
    return str(url)
