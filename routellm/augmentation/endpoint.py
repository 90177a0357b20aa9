"""An endpoint to ask: OpenAI-compatible chat completions, asked until it answers.

What may pass (a limit, a server error, a timeout, a broken reply) is tried again after a growing
wait; what will not (a wrong key, address or model) stops the run.
"""

from __future__ import annotations

import asyncio
import math
import random
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Self

from routellm.augmentation.budget import Budget, StopJudging
from routellm.errors import JudgeError, UsageError

if TYPE_CHECKING:
    import httpx

    from routellm.settings import JudgeSettings

_RETRIED = frozenset({408, 409, 429})  # and every 5xx
_STOPS = frozenset({401, 403, 404})
_MAX_BACKOFF_S = 60.0
_MAX_ASKED_WAIT_S = 600.0  # an endpoint that asks for more is better run again later
_FRAME_TOKENS = 64  # what a chat template puts around two messages, at most
_CODE = re.compile(r"[a-z][a-z_]{1,39}")


class CallFailed(JudgeError):
    """This one question got no reply; the others may."""


@dataclass(frozen=True)
class Reply:
    """What the model wrote.

    Attributes
    ----------
    whole : bool
        Whether it ended by itself, not at the limit of tokens.
    refused : bool
        Whether the endpoint says that the model, or a filter, refused.
    input_tokens, output_tokens : int or None
        None if the endpoint did not report usage.
    cost_usd : float
        The most it could be, if usage was not reported.
    """

    text: str
    whole: bool
    refused: bool
    input_tokens: int | None
    output_tokens: int | None
    cost_usd: float


@dataclass(frozen=True)
class _Setback:
    """A call without a reply; `cost_usd` is None where it may have been billed all the same."""

    reason: str
    cost_usd: float | None = 0.0
    wait_s: float | None = None
    ends: type[JudgeError] | None = None


class Endpoint:
    """Asks one model within a budget.

    Parameters
    ----------
    backoff_s : float
        Wait before the second attempt, doubled with each further one, half to one and a half
        times as long by chance.
    section : str
        Where its settings stand, for messages; its last word says who is asked.

    Raises
    ------
    UsageError
        If `base_url` is not set or no address, or the key cannot be sent.
    """

    def __init__(
        self, settings: JudgeSettings, budget: Budget, *, backoff_s: float, section: str = "judge"
    ) -> None:
        import httpx

        self._section = section
        self.who = section.rpartition(".")[2]
        try:
            url = httpx.URL((settings.base_url or "").rstrip("/") + "/chat/completions")
        except httpx.InvalidURL:
            url = httpx.URL()
        if url.scheme not in {"http", "https"} or not url.host:
            raise UsageError(
                f"set `{section}.base_url` to an OpenAI-compatible endpoint, up to and including "
                "/v1"
            )
        self._settings = settings
        self._budget = budget
        self._backoff_s = backoff_s
        self._url = url
        self._shown = url.copy_with(userinfo=b"", query=None)  # may hold a password
        self._key = settings.api_key.get_secret_value().strip() if settings.api_key else ""
        if not (self._key.isascii() and self._key.isprintable()):
            # httpx would show the key in its complaint
            raise UsageError(f"`{section}.api_key` holds characters that no key has: set it again")
        self._open_at = 0.0  # no call before this, in seconds of the loop's clock

    async def __aenter__(self) -> Self:
        import httpx

        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=self._settings.concurrency)
        self._client = httpx.AsyncClient(
            headers=headers, limits=limits, timeout=self._settings.timeout_s
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._client.aclose()

    async def ask(self, system: str, user: str, *, temperature: float = 0) -> Reply:
        """Return the model's reply.

        Raises
        ------
        StopJudging
            If no further call is to be made: the budget is reached, or the endpoint refuses all.
        CallFailed
            If this question got no reply in all attempts.
        """
        # a token is a byte of text or more
        most_tokens = len((system + user).encode()) + _FRAME_TOKENS
        most_usd = self._usd(most_tokens, self._settings.max_output_tokens)
        body = {
            "model": self._settings.model,
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": user},
            ],
            "temperature": temperature,
            "max_tokens": self._settings.max_output_tokens,
        }
        clock = asyncio.get_running_loop().time
        outcome: Reply | _Setback = _Setback("no attempt")
        for attempt in range(self._settings.attempts):
            if attempt:
                # chance, and not a seed: processes that were refused together return apart
                wait = min(self._backoff_s * 2 ** (attempt - 1), _MAX_BACKOFF_S)
                await self._budget.sleep(wait * random.uniform(0.5, 1.5))
            await self._budget.sleep(self._open_at - clock())
            await self._budget.reserve(most_usd)
            known_usd = None
            try:
                outcome = await self._post(body, most_usd)
                if not isinstance(outcome, Reply) or outcome.input_tokens is not None:
                    known_usd = outcome.cost_usd
            finally:
                self._budget.settle(most_usd, known_usd)
            if isinstance(outcome, Reply):
                return outcome
            if outcome.ends is not None:
                raise outcome.ends(outcome.reason)
            if outcome.wait_s is not None:  # the limit is everybody's, so all wait
                self._open_at = max(self._open_at, clock() + outcome.wait_s)
        assert isinstance(outcome, _Setback)
        raise CallFailed(f"{outcome.reason}, {self._settings.attempts} times")

    def without_key(self, text: str) -> str:
        """Return a text to be kept: what came from an endpoint may echo the key."""
        return text.replace(self._key, "***") if self._key else text

    async def _post(self, body: dict[str, Any], most_usd: float) -> Reply | _Setback:
        import httpx

        try:
            async with asyncio.timeout(self._settings.timeout_s):  # httpx limits a single read
                answer = await self._client.post(self._url, json=body)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout):
            return _Setback("no connection")
        except (httpx.TimeoutException, TimeoutError):
            return _Setback("timeout", cost_usd=None)
        except httpx.HTTPError as error:
            return _Setback(type(error).__name__, cost_usd=None)
        if answer.is_success:
            return self._read(answer, most_usd)
        return self._refused(answer)

    def _refused(self, answer: httpx.Response) -> _Setback:
        status = answer.status_code
        told = f"status {status}{_error_code(answer)}"
        if status in _STOPS:
            return _Setback(
                f"the {self.who}'s endpoint {self._shown} answered with {told}: check "
                f"`{self._section}.base_url`, `{self._section}.model` and "
                f"`{self._section}.api_key`",
                ends=StopJudging,
            )
        if status not in _RETRIED and status < 500:
            return _Setback(told, ends=CallFailed)
        wait_s = _retry_after_s(answer.headers.get("Retry-After"))
        if wait_s is not None and wait_s > _MAX_ASKED_WAIT_S:
            return _Setback(
                f"the {self.who}'s endpoint {self._shown} answered with {told} and asks to wait "
                f"{wait_s:.0f} s: run again after that",
                ends=StopJudging,
            )
        return _Setback(told, wait_s=wait_s)

    def _read(self, answer: httpx.Response, most_usd: float) -> Reply | _Setback:
        try:
            doc = answer.json()
            message = doc["choices"][0]["message"]
            text = message.get("content") or ""
            finish = doc["choices"][0].get("finish_reason")
            usage = doc.get("usage")
            if not isinstance(text, str):
                raise TypeError
            refused = bool(message.get("refusal")) or finish == "content_filter"
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            return _Setback("a reply that is no chat completion", cost_usd=None)
        tokens = _usage(usage)
        return Reply(
            text=text,
            whole=finish != "length",
            refused=refused,
            input_tokens=tokens[0] if tokens else None,
            output_tokens=tokens[1] if tokens else None,
            cost_usd=self._usd(*tokens) if tokens else most_usd,
        )

    def _usd(self, input_tokens: int, output_tokens: int) -> float:
        prices = self._settings
        return (
            input_tokens * prices.usd_per_million_input
            + output_tokens * prices.usd_per_million_output
        ) / 1e6


def _usage(usage: Any) -> tuple[int, int] | None:
    """Return (input, output) tokens, or None where they are not two whole numbers."""
    if not isinstance(usage, dict):
        return None
    found = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    if all(type(n) is int and n >= 0 for n in found):
        return found  # type: ignore[return-value]
    return None


def _error_code(answer: httpx.Response) -> str:
    """Return the error's code and parameter; never its message, which may quote key or prompt."""
    try:
        error = answer.json()["error"]
        words = [error.get("code"), error.get("param")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
    plain = [w for w in words if isinstance(w, str) and _CODE.fullmatch(w)]
    return f" ({': '.join(plain)})" if plain else ""


def _retry_after_s(value: str | None) -> float | None:
    """Return the seconds of a ``Retry-After``: a number, or a date (RFC 9110, section 10.2.3)."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(seconds, 0.0) if math.isfinite(seconds) else None
