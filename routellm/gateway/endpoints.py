"""The endpoints that are passed on, and what each says of the query: its user turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from routellm.errors import GatewayError

Dialect = Literal["openai", "anthropic"]
Turns = list[str]

_CHARS_PER_TOKEN = 4  # of English text, roughly: a budget need not be exact
_TEXT_PARTS = ("text", "input_text")


@dataclass(frozen=True)
class Endpoint:
    """One path under ``/v1``.

    Attributes
    ----------
    path : str
        Under the upstream's base address, too.
    turns : callable
        Takes the body's fields; returns the text of each user turn, oldest first.
    dialect : str
        Whose protocol it is: it decides how errors look.
    routed : bool
        Whether a router decides; else the request goes to ``gateway.embeddings``.
    """

    path: str
    turns: Callable[[Mapping[str, Any]], Turns]
    dialect: Dialect = "openai"
    routed: bool = True


def _messages(fields: Mapping[str, Any]) -> Turns:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise GatewayError("`messages` must be a list with at least one message")
    turns = [
        _text(m.get("content"))
        for m in messages
        if isinstance(m, Mapping) and m.get("role") == "user"
    ]
    if not turns:
        raise GatewayError("no message has the role `user`: there is no query to route")
    return turns


def _responses(fields: Mapping[str, Any]) -> Turns:
    given = fields.get("input")
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        # a stored prompt, or a conversation that goes on without a new turn
        return [""]
    return [
        _text(item.get("content"))
        for item in given
        if isinstance(item, Mapping) and item.get("role") == "user"
    ] or [""]


def _completions(fields: Mapping[str, Any]) -> Turns:
    prompt = fields.get("prompt")
    if isinstance(prompt, list):  # of texts, or of tokens, which nobody can read here
        prompt = "\n".join(p for p in prompt if isinstance(p, str))
    return [prompt if isinstance(prompt, str) else ""]


def _text(content: Any) -> str:
    """Return the text of a turn; parts that are not text are left out."""
    if isinstance(content, list):
        content = "\n".join(
            part["text"]
            for part in content
            if isinstance(part, Mapping)
            and part.get("type", "text") in _TEXT_PARTS
            and isinstance(part.get("text"), str)
        )
    return content if isinstance(content, str) else ""


CHAT = Endpoint("chat/completions", _messages)
RESPONSES = Endpoint("responses", _responses)
COMPLETIONS = Endpoint("completions", _completions)
MESSAGES = Endpoint("messages", _messages, "anthropic")
# no query: vectors of two models are not comparable, so the model that is asked for answers
EMBEDDINGS = Endpoint("embeddings", lambda fields: [""], routed=False)
ENDPOINTS = (CHAT, RESPONSES, COMPLETIONS, MESSAGES, EMBEDDINGS)


def scored_text(turns: Turns, how: str, tokens: int) -> str:
    """Return what of a conversation is scored.

    Parameters
    ----------
    turns : list of str
        The user's turns, oldest first; at least one.
    how : str
        ``first_user_turn``, ``last_user_turn``, or ``user_turns``: as many of the latest as are
        within the budget, in their order.
    tokens : int
        The budget, at four characters a token. A text beyond it loses its end, which an encoder
        would not read either.
    """
    budget = tokens * _CHARS_PER_TOKEN
    if how == "first_user_turn":
        return turns[0][:budget]
    if how == "last_user_turn" or len(turns) == 1:
        return turns[-1][:budget]
    kept: Turns = []
    for turn in reversed(turns):
        if kept and budget < len(turn):
            break
        kept.append(turn[:budget])
        budget -= len(kept[-1]) + 1
    return "\n".join(reversed(kept))
