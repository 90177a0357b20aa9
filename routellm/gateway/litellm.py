"""Upstreams that speak something else than OpenAI's protocol, asked through LiteLLM in process.

A transport, so that retries, the breaker, the stand-in and cancellation stay where they are: it
takes the request that an OpenAI-compatible endpoint would get, and answers as one would.

What a caller sends never becomes LiteLLM's own options (addresses, keys, callbacks, fallbacks):
fields that the protocol names are passed by name, and every other one as a field of the body.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import os
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from routellm.errors import UsageError
from routellm.gateway.litellm_errors import failed, refused, transport_error

# where the path goes if a setting names no address: LiteLLM knows its providers' own
NO_ADDRESS = "http://litellm.invalid/v1"

_LOGGERS = ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy")
_DONE = b"data: [DONE]\n\n"

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class _Call:
    """One endpoint: the function that answers it, and the fields that it takes by name."""

    function: Callable[..., Awaitable[Any]]
    names: frozenset[str]
    ends_in_done: bool = False


class LiteLLMTransport(httpx.AsyncBaseTransport):
    """Answers requests for one model by calling LiteLLM.

    Parameters
    ----------
    model : str
        LiteLLM's name of it, as ``anthropic/claude-sonnet-4-5``; no other model is answered for,
        since a name chooses the provider and with it whose keys are used.
    api_base : str, optional
        Address of the provider; LiteLLM's own if there is none.
    api_key : str, optional
        Without one LiteLLM looks where its provider's own client would: in the environment.

    Raises
    ------
    UsageError
        If LiteLLM is not installed, or does not know the model's provider.
    """

    def __init__(
        self, model: str, *, api_base: str | None = None, api_key: str | None = None
    ) -> None:
        self._litellm = load()
        try:
            self._litellm.get_llm_provider(model=model, api_base=api_base, api_key=api_key)
        except Exception as error:
            raise UsageError(
                f"LiteLLM knows no provider for the model {model!r}: name it as PROVIDER/MODEL, "
                "for example anthropic/claude-sonnet-4-5"
            ) from error
        self._model = model
        self._api_key = api_key
        self._always = {"api_base": api_base, "api_key": api_key, "max_retries": 0,
                        "num_retries": 0, "no-log": True}  # fmt: skip
        self._calls = _calls(self._litellm)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        call = self._call_of(request.url.path)
        if call is None:
            return refused(404, "LiteLLM has no such endpoint", "not_found")
        try:
            fields = json.loads(await request.aread())
        except (ValueError, RecursionError):
            return refused(400, "the request body is not a JSON object", "invalid_request")
        if not isinstance(fields, dict) or fields.get("model") != self._model:
            return refused(404, f"this upstream answers for {self._model} only", "model_not_found")
        if _asks_litellm_itself(fields.get("tools")):
            return refused(400, "LiteLLM's own MCP gateway is not open here", "invalid_request")
        timeout = httpx.Timeout(**request.extensions["timeout"])
        handed_over: list[bool] = []
        try:
            answer = await call.function(
                **self._arguments(call, fields),
                timeout=timeout,
                # called with the request as the provider gets it, which is not kept
                logger_fn=lambda details: handed_over.append(True),
            )
            if not hasattr(answer, "__aiter__"):
                return httpx.Response(
                    200,
                    headers={"content-type": "application/json"},
                    stream=httpx.ByteStream(_json(answer)),
                )
            events = _Events(answer, call.ends_in_done)
            await events.begin()
        except Exception as error:
            return failed(error, self._api_key, handed_over=bool(handed_over))
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=events)

    async def aclose(self) -> None:
        """Close the connections that LiteLLM keeps, for every model of this process."""
        cleanup = importlib.import_module("litellm.llms.custom_httpx.async_client_cleanup")
        await cleanup.close_litellm_async_clients()
        self._litellm.in_memory_llm_clients_cache.flush_cache()

    def _call_of(self, path: str) -> _Call | None:
        for name, call in self._calls.items():
            if path.endswith(f"/{name}"):
                return call
        return None

    def _arguments(self, call: _Call, fields: Fields) -> dict[str, Any]:
        named = {name: value for name, value in fields.items() if name in call.names}
        others = {name: value for name, value in fields.items() if name not in call.names}
        return named | self._always | ({"extra_body": others} if others else {})


class _Events(httpx.AsyncByteStream):
    """An answer's chunks as server-sent events, each as it comes."""

    def __init__(self, chunks: Any, ends_in_done: bool) -> None:
        self._chunks = chunks
        self._ends_in_done = ends_in_done
        self._first: bytes | None = None

    async def begin(self) -> None:
        """Wait for the first event: what fails before it is still an error with a status."""
        try:
            async for chunk in self._chunks:
                self._first = _event(chunk)
                break
        except BaseException:
            await self.aclose()
            raise

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self._first is not None:
            yield self._first
        try:
            async for chunk in self._chunks:
                yield _event(chunk)
        except Exception as error:
            raise transport_error(error) or httpx.ReadError(
                f"LiteLLM's stream broke off ({type(error).__name__})"
            ) from error
        if self._ends_in_done:
            yield _DONE

    async def aclose(self) -> None:
        close = getattr(self._chunks, "aclose", None)
        if close is not None:
            await close()


def load() -> Any:
    """Return the module `litellm`, silent and offline.

    Raises
    ------
    UsageError
        If it is not installed.
    """
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it downloads prices as it loads
    os.environ["LITELLM_MODE"] = "PRODUCTION"  # else it reads ./.env into the environment
    try:
        litellm: Any = importlib.import_module("litellm")
    except ImportError as error:
        raise UsageError(
            "an upstream is asked through LiteLLM, which is not installed: pip install "
            '"routellm-mlops[litellm]", or set its `via` to http'
        ) from error
    # it logs requests at several levels, and its debug mode keys as well: its errors come back
    # as exceptions, so nothing is lost
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.setLevel(logging.CRITICAL + 1)
    logging.getLogger("openai").setLevel(logging.WARNING)  # its client logs whole requests below
    # pydantic quotes what it warns of, which may be an answer
    warnings.filterwarnings("ignore", message="Pydantic serializer warnings")
    litellm.suppress_debug_info = True
    litellm.set_verbose = False
    litellm.telemetry = False  # of older releases
    litellm.turn_off_message_logging = True
    litellm.disable_streaming_logging = True
    litellm.drop_params = False  # a field that a provider cannot take is an error, not silence
    litellm.user_url_validation = True  # of images that it fetches itself: no private addresses
    litellm.disable_aiohttp_trust_env = True  # as for others: no proxy of this machine's user
    return litellm


def _calls(litellm: Any) -> dict[str, _Call]:
    """Return what answers each path, longer paths first.

    Anthropic's ``messages`` is not among them: LiteLLM streams it only where its whole proxy is
    installed, and leaves fields that it does not know out. Anthropic itself is asked over HTTP.
    """
    from openai.types import completion_create_params, embedding_create_params
    from openai.types.chat import completion_create_params as chat_create_params
    from openai.types.responses import response_create_params

    def both(protocol: Any, function: Any, *more: str) -> frozenset[str]:
        # of the protocol's fields those that LiteLLM has an argument for
        takes = inspect.signature(function).parameters
        return frozenset({"stream", *more} | (set(protocol.__annotations__) & set(takes)))

    chat = both(chat_create_params.CompletionCreateParamsBase, litellm.acompletion, "thinking")
    text = both(completion_create_params.CompletionCreateParamsBase, litellm.text_completion)
    vectors = both(embedding_create_params.EmbeddingCreateParams, litellm.embedding)
    responses = both(response_create_params.ResponseCreateParamsBase, litellm.aresponses)
    # LiteLLM takes `metadata` for its own loggers and does not send it; as a field it is sent
    own = {"metadata"}
    return {
        "chat/completions": _Call(litellm.acompletion, chat - own, ends_in_done=True),
        "completions": _Call(litellm.atext_completion, text - own, ends_in_done=True),
        "embeddings": _Call(litellm.aembedding, vectors - {"stream"}),
        "responses": _Call(litellm.aresponses, responses),
    }


def _asks_litellm_itself(tools: Any) -> bool:
    return isinstance(tools, list) and any(
        isinstance(tool, dict) and str(tool.get("server_url", "")).startswith("litellm_proxy")
        for tool in tools
    )


def _json(answer: Any) -> bytes:
    return str(answer.model_dump_json(exclude_none=True, warnings=False)).encode()


def _event(chunk: Any) -> bytes:
    doc = chunk.model_dump_json(exclude_none=True, exclude_unset=True, warnings=False)
    kind = getattr(chunk, "type", None)  # of the Responses API: its events have names
    named = f"event: {getattr(kind, 'value', kind)}\n" if kind else ""
    return f"{named}data: {doc}\n\n".encode()
