"""What an error of LiteLLM's means: an upstream's answer, a broken connection, or a bad request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx

from routellm.errors import RouteLLMError

_MOST_CHARS = 2000  # of an error's message: LiteLLM may add whole tracebacks


def failed(error: Exception, key: str | None, *, handed_over: bool) -> httpx.Response:
    """Return what an OpenAI-compatible endpoint would have answered.

    Parameters
    ----------
    key : str, optional
        The upstream's key: it is struck out, should a message hold it.
    handed_over : bool
        Whether the provider was about to be called, or was.

    Raises
    ------
    httpx.TransportError
        If there was no answer.
    """
    told = _upstreams_answer(error)
    if told is not None:
        status = told.status_code
        headers = {k: v for k, v in told.headers.items() if k == "retry-after"}
        doc = _said(told) or _error(_message(error, status), "litellm_error")
        return _answer(status, doc, key, headers)
    broken = transport_error(error)
    if broken is not None:
        raise broken from error
    status = _own_status(error, handed_over)
    return _answer(status, _error(_message(error, status), "litellm_error"), key)


def refused(status: int, message: str, code: str) -> httpx.Response:
    """Return an error of this gateway's own."""
    return _answer(status, _error(message, code), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what led to it, each once."""
    seen: set[int] = set()
    # the context of a stand-in's error is this gateway's own, of the model that it stands in for
    while error is not None and id(error) not in seen and not isinstance(error, RouteLLMError):
        seen.add(id(error))
        yield error
        error = getattr(error, "original_exception", None) or error.__cause__ or error.__context__


def _upstreams_answer(error: Exception) -> httpx.Response | None:
    """Return what the upstream answered: LiteLLM's own error knows fewer statuses."""
    for cause in _causes(error):
        if isinstance(cause, httpx.HTTPStatusError):
            return cause.response
    return None


def transport_error(error: Exception) -> httpx.TransportError | None:
    """Return the trouble with the connection that an error of LiteLLM's stands for, if it does."""
    for cause in _causes(error):
        if isinstance(cause, httpx.TransportError):
            return type(cause)(f"through LiteLLM: {type(cause).__name__}")
    if type(error).__name__ == "Timeout" or any(
        isinstance(cause, TimeoutError) for cause in _causes(error)
    ):
        return httpx.ReadTimeout("through LiteLLM: no answer in time")
    return None


def _own_status(error: Exception, handed_over: bool) -> int:
    """Return the status of an error that LiteLLM raised by itself."""
    status = getattr(error, "status_code", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status
    if handed_over or status == 200:
        return 502  # what came back cannot be read
    # what its code does not survive in a request is, as a rule, a field of another type than it
    # expects: the caller's mistake, which must not count against the upstream
    expected = any(
        isinstance(cause, TypeError | AttributeError | LookupError | ValueError)
        for cause in _causes(error)
    )
    return 400 if expected else 502


def _said(response: httpx.Response) -> dict[str, Any] | None:
    """Return the error that an upstream sent, in OpenAI's shape; None if it cannot be read."""
    try:
        doc = json.loads(response.content)
    except (ValueError, RecursionError, httpx.ResponseNotRead):
        return None
    if not isinstance(doc, dict) or not isinstance(doc.get("error"), dict):
        return None
    return {"error": {"message": "", "type": "api_error", "param": None, "code": None}
            | doc["error"]}  # fmt: skip


def _message(error: Exception, status: int) -> str:
    if status >= 500:  # LiteLLM's text may be a traceback
        return f"the model's provider failed ({type(error).__name__})"
    return str(getattr(error, "message", error)).split("Traceback")[0][:_MOST_CHARS]


def _error(message: str, code: str) -> dict[str, Any]:
    kind = "invalid_request_error" if code != "litellm_error" else "api_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _answer(
    status: int, doc: dict[str, Any], key: str | None, headers: dict[str, str] | None = None
) -> httpx.Response:
    text = json.dumps(doc)
    if key:
        text = text.replace(json.dumps(key)[1:-1], "***")
    return httpx.Response(
        status,
        headers={"content-type": "application/json", **(headers or {})},
        stream=httpx.ByteStream(text.encode()),
    )
