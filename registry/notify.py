"""Tell a webhook what was decided: signed, tried again, and never in the way of a decision."""

from __future__ import annotations

import hashlib
import hmac
import json
import random
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from routellm.settings import PromotionSettings

_FIRST_WAIT_S = 0.5  # doubles with every attempt
_LONGEST_WAIT_S = 8.0


def signature(secret: str, timestamp: str, body: bytes) -> str:
    """Return what ``X-RouteLLM-Signature`` holds: HMAC-SHA256 over ``timestamp.body``, in hex.

    A receiver computes it again, compares in constant time, and refuses old timestamps, so that a
    recorded post cannot be played again.
    """
    signed = timestamp.encode() + b"." + body
    return "sha256=" + hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()


def notify(
    settings: PromotionSettings,
    event: str,
    entry: Mapping[str, Any],
    *,
    wait: Callable[[float], None] = time.sleep,
) -> str | None:
    """Post an entry of the history to the webhook, if one is set.

    Returns
    -------
    str or None
        Why it did not arrive; None if it did, or none is set. It never raises: a webhook must not
        undo a promotion.
    """
    if settings.webhook_url is None:
        return None
    import httpx

    body = json.dumps({"event": event, **entry}, sort_keys=True, default=str).encode()
    where = urlsplit(settings.webhook_url).hostname or "the webhook"
    why = ""
    for attempt in range(settings.webhook_attempts):
        if attempt:
            longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (attempt - 1))
            wait(random.uniform(longest / 2, longest))
        timestamp = str(int(time.time()))
        headers = {"Content-Type": "application/json", "X-RouteLLM-Timestamp": timestamp}
        if settings.webhook_secret is not None:
            secret = settings.webhook_secret.get_secret_value()
            headers["X-RouteLLM-Signature"] = signature(secret, timestamp, body)
        try:
            reply = httpx.post(
                settings.webhook_url,
                content=body,
                headers=headers,
                timeout=settings.webhook_timeout_s,
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            why = type(error).__name__
            continue
        if reply.is_success:
            return None
        why = f"it answered {reply.status_code}"
        if reply.status_code < 500 and reply.status_code not in (408, 425, 429):
            break  # it will not think better of it
    return (
        f"the webhook at {where} was not told of this ({why}): check `promotion.webhook_url`; the "
        "decision stands, and `routellm history` has it"
    )
