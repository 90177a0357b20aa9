"""What an answer says of itself, read from its bytes in passing: id and token counts.

The bytes go to the client as they come, whatever is found here: an answer that cannot be read
has no counts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

_MOST_JSON = 4_000_000  # bytes of an answer that are kept to be read
_MOST_TEXT = 100_000  # characters
_MOST_LINE = 1_000_000  # bytes of one event of a stream


@dataclass
class Usage:
    """Attributes: the answer's id, and its tokens, as far as they are known."""

    id: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None


class UsageReader:
    """Reads an answer as it passes.

    Parameters
    ----------
    content_type : str
        Of the answer: an event stream is read line by line, JSON at its end.
    text : bool
        Whether to gather what a chat completion says, too, up to a bound.

    Attributes
    ----------
    text : str
        What it says; "" if that is not wanted, not text, or too long.
    ended : bool
        Whether a completion whose text is gathered says that the model ended it by itself.
    """

    def __init__(self, content_type: str, *, text: bool = False) -> None:
        self.usage = Usage()
        self.text = ""
        self.ended = False
        self._wants_text = text
        self._stream = content_type.startswith("text/event-stream")
        self._json = content_type.startswith("application/json")
        self._kept = bytearray()
        self._lost = False

    def feed(self, chunk: bytes) -> None:
        if self._lost or not (self._stream or self._json):
            return
        self._kept += chunk
        if self._stream and b"\n" in chunk:
            *lines, rest = self._kept.split(b"\n")
            self._kept = bytearray(rest)
            for line in lines:
                self._line(bytes(line))
        if len(self._kept) > (_MOST_LINE if self._stream else _MOST_JSON):
            self._kept.clear()
            self._lost = True

    def end(self) -> Usage:
        """Return what was found, once all has passed."""
        if self._json and not self._lost:
            self._read(bytes(self._kept))
        elif self._stream:
            self._line(bytes(self._kept))
        self._kept.clear()
        return self.usage

    def _line(self, line: bytes) -> None:
        # most events are pieces of text: only those that can say something new are parsed
        new = self._wants_text or self.usage.id is None or b'"usage"' in line
        if line.startswith(b"data:") and new:
            self._read(line[5:])

    def _read(self, raw: bytes) -> None:
        try:
            doc = json.loads(raw)
        except (ValueError, RecursionError):
            return
        if not isinstance(doc, dict):
            return
        for inner in ("response", "message"):  # OpenAI's Responses and Anthropic's streams
            if isinstance(doc.get(inner), dict):
                self._take(doc[inner])
        self._take(doc)
        if self._wants_text:
            self._gather(doc)

    def _gather(self, doc: dict[str, Any]) -> None:
        try:
            choice = doc["choices"][0]
            self.ended = choice.get("finish_reason") == "stop"
            said = (choice.get("delta") or choice["message"])["content"]
        except (LookupError, TypeError, AttributeError):
            return
        if isinstance(said, str):
            self.text += said
        if len(self.text) > _MOST_TEXT:
            self.text, self._wants_text = "", False

    def _take(self, doc: dict[str, Any]) -> None:
        if isinstance(doc.get("id"), str) and self.usage.id is None:
            self.usage.id = doc["id"][:200]
        usage = doc.get("usage")
        if not isinstance(usage, dict):
            return
        for name, keys in (
            ("input_tokens", ("prompt_tokens", "input_tokens")),
            ("output_tokens", ("completion_tokens", "output_tokens")),
        ):
            for key in keys:
                count = usage.get(key)
                if isinstance(count, int) and not isinstance(count, bool) and count >= 0:
                    setattr(self.usage, name, count)
