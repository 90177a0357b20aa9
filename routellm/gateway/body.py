"""A request's JSON object, in which one field is replaced and every other byte stays as it came."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from routellm.errors import GatewayError

_SPACE = re.compile(r"[ \t\n\r]*")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")  # Python would read NaN and Infinity


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


@dataclass(frozen=True)
class Body:
    """A JSON object with the place of each of its fields.

    Attributes
    ----------
    text : str
    fields : dict
        Its values; of a name that stands twice, the last.
    places : tuple of (name, start, value start, end)
        Where each pair stands in the text.
    """

    text: str
    fields: Mapping[str, Any]
    places: tuple[tuple[str, int, int, int], ...]

    @classmethod
    def parse(cls, raw: bytes | bytearray) -> Body:
        """Read a body.

        Raises
        ------
        GatewayError
            If it is not a JSON object in UTF-8.
        """
        try:
            text = raw.decode("utf-8")
            fields: dict[str, Any] = {}
            places = []
            for name, value, *place in _pairs(text):
                fields[name] = value
                places.append((name, place[0], place[1], place[2]))
        except (ValueError, IndexError, RecursionError):
            raise GatewayError("the request body is not a JSON object") from None
        return cls(text, fields, tuple(places))

    def without(self, *names: str) -> Body:
        """Return the body without some of its fields."""
        fields = {name: value for name, value in self.fields.items() if name not in names}
        return Body(self.text, fields, tuple(p for p in self.places if p[0] not in names))

    def rewritten(self, model: str) -> bytes:
        """Return the body for an upstream: with its model's name, and without `routing`."""
        kept = [
            self.text[start:value] + json.dumps(model) if name == "model" else self.text[start:end]
            for name, start, value, end in self.places
            if name != "routing"
        ]
        return f"{{{','.join(kept)}}}".encode()


def _pairs(text: str) -> list[tuple[str, Any, int, int, int]]:
    """Return name, value, start, value's start and end of each pair of an object."""
    found: list[tuple[str, Any, int, int, int]] = []
    at = _skip(text, 0)
    _expect(text, at, "{")
    at = _skip(text, at + 1)
    while text[at] != "}" or found:
        _expect(text, at, '"')
        start = at
        name, at = _DECODER.raw_decode(text, at)
        at = _skip(text, at)
        _expect(text, at, ":")
        value_start = _skip(text, at + 1)
        value, end = _DECODER.raw_decode(text, value_start)
        found.append((name, value, start, value_start, end))
        at = _skip(text, end)
        if text[at] == "}":
            break
        _expect(text, at, ",")
        at = _skip(text, at + 1)
    if _skip(text, at + 1) != len(text):
        raise ValueError("something follows the object")
    return found


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def _expect(text: str, at: int, sign: str) -> None:
    if text[at] != sign:
        raise ValueError(f"no {sign} at {at}")
