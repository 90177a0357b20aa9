"""What the gateway's own OpenAPI document says of the endpoints that it passes on.

It names what the gateway itself reads of a request; all other fields are the upstream's.
"""

from __future__ import annotations

from typing import Any

_SHARE = {"type": "number", "minimum": 0, "maximum": 1}
_TEXT_OR_LIST = {"oneOf": [{"type": "string"}, {"type": "array"}]}
_FIELDS: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": {"type": "array", "items": {"type": "object"}}},
    "messages": {"messages": {"type": "array", "items": {"type": "object"}}},
    "responses": {"input": _TEXT_OR_LIST, "previous_response_id": {"type": "string"}},
    "completions": {"prompt": _TEXT_OR_LIST},
    "embeddings": {"input": _TEXT_OR_LIST},
}
_NEEDED = {"chat/completions": ["messages"], "messages": ["messages"]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}},
        }
    },
}
ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "The gateway's or the upstream's error, in the protocol's own shape",
        "content": {"application/json": {"schema": _ERROR}},
    }
}
PASSED_ON: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The upstream's answer, byte for byte",
        "content": {"application/json": {"schema": {}}, "text/event-stream": {"schema": {}}},
    },
    **ERRORS,
}


FEEDBACK: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["id"],
                    "minProperties": 2,
                    "maxProperties": 2,
                    "properties": {
                        "id": {"type": "string", "description": "an answer's, or x-routellm-id"},
                        "thumbs": {"enum": ["up", "down"]},
                        "rating": {"enum": [1, 2, 3, 4, 5]},
                        "other_was_better": {"enum": [True]},
                        "vote": {"enum": ["strong", "weak", "tie"]},
                    },
                }
            }
        },
    }
}


def request_of(path: str) -> dict[str, Any]:
    """Return the OpenAPI request body of an endpoint."""
    fields = {
        "model": {
            "type": "string",
            "description": "router, router-KIND-THRESHOLD, or an upstream's own name",
        },
        "routing": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "threshold": _SHARE,
                "strong_fraction": _SHARE,
                "quality": _SHARE,
                "max_usd": {"type": "number", "minimum": 0},
                "policy": {"enum": ["pool", "cascade", "automix"]},
                "cost_weight": {"type": "number", "minimum": 0},
            },
        },
        "stream": {"type": "boolean"},
        **_FIELDS[path],
    }
    schema = {
        "type": "object",
        "required": ["model", *_NEEDED.get(path, [])],
        "properties": fields,
        "additionalProperties": True,
    }
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
