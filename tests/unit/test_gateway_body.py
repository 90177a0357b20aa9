"""A request's body: which are read, and what is left as it came."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routellm.errors import GatewayError
from routellm.gateway.body import Body
from routellm.gateway.endpoints import CHAT, COMPLETIONS, RESPONSES, scored_text
from routellm.gateway.usage import UsageReader

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
OBJECTS = st.dictionaries(st.text() | st.sampled_from(["model", "routing"]), VALUES, max_size=6)


@given(OBJECTS, st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_any_object_is_read_and_rewritten_but_for_model_and_routing(doc, ascii_only, indent):
    raw = json.dumps(doc, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass")
    try:
        raw.decode()
    except UnicodeDecodeError:  # a lone surrogate, unescaped: no UTF-8
        with pytest.raises(GatewayError):
            Body.parse(raw)
        return
    body = Body.parse(raw)
    assert body.fields == json.loads(raw)
    want = {k: v for k, v in json.loads(raw).items() if k != "routing"}
    if "model" in want:
        want["model"] = 'm "quoted" é'
    assert json.loads(body.rewritten('m "quoted" é')) == want


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "replace")))
def test_anything_else_is_refused(raw):
    try:
        is_object = isinstance(json.loads(raw.decode(), parse_constant=int), dict)
    except ValueError:
        is_object = False
    if is_object:
        Body.parse(raw)
    else:
        with pytest.raises(GatewayError, match="not a JSON object"):
            Body.parse(raw)


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"nul", b'{"a":1', b'{"a":1}}', b'{"a" 1}', b'{"a":1,}', b"{1:2}", b'{"a":NaN}',
     b'{"a":Infinity}', b"\xff\xfe{}", b'{"a":' + b"[" * 100_000, b'{"a":1} {"b":2}'],
)  # fmt: skip
def test_what_only_looks_like_json_is_refused(raw):
    with pytest.raises(GatewayError):
        Body.parse(raw)


def test_a_name_that_stands_twice_is_rewritten_twice():
    body = Body.parse(b'{"model":"router","model":"other"}')
    assert body.fields["model"] == "other"
    assert body.rewritten("big") == b'{"model": "big","model": "big"}'.replace(b": ", b":")


@pytest.mark.parametrize(
    ("endpoint", "fields", "turns"),
    [
        (CHAT, {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"},
                             {"role": "user", "content": [{"type": "text", "text": "b"},
                                                          {"type": "image_url"}, 7]},
                             {"role": "user", "content": None}]}, ["a", "b", ""]),
        (RESPONSES, {"input": "a"}, ["a"]),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"},
                                                            {"type": "input_image"}]},
                               {"type": "function_call_output", "output": "x"}]}, ["a"]),
        (RESPONSES, {"prompt": {"id": "p"}}, [""]),
        (COMPLETIONS, {"prompt": ["a", "b"]}, ["a\nb"]),
        (COMPLETIONS, {"prompt": [1, 2, 3]}, [""]),
    ],
)  # fmt: skip
def test_the_users_turns_are_found(endpoint, fields, turns):
    assert endpoint.turns(fields) == turns


def test_as_many_of_the_latest_turns_are_scored_as_the_budget_holds():
    turns = ["a" * 40, "b" * 40, "c" * 40]
    assert scored_text(turns, "user_turns", 1000) == "\n".join(turns)
    assert scored_text(turns, "user_turns", 21) == "\n".join(turns[1:])
    assert scored_text(turns, "user_turns", 5) == "c" * 20
    assert scored_text(turns, "first_user_turn", 5) == "a" * 20
    assert scored_text(turns, "last_user_turn", 1000) == "c" * 40


@given(st.lists(st.integers(1, 400), max_size=8))
def test_token_counts_are_found_however_a_stream_is_cut(cuts):
    events = b"".join(
        b"data: " + json.dumps(doc).encode() + b"\r\n\r\n"
        for doc in (
            {"id": "x", "choices": [{"delta": {"content": "é" * 50}}]},
            {"id": "x", "choices": [], "usage": None},
            {"id": "x", "usage": {"prompt_tokens": 12, "completion_tokens": 34}},
        )
    )
    reader, at = UsageReader("text/event-stream; charset=utf-8"), 0
    for cut in [*cuts, len(events)]:
        reader.feed(events[at : at + cut])
        at += cut
    found = reader.end()
    assert (found.id, found.input_tokens, found.output_tokens) == ("x", 12, 34)


@pytest.mark.parametrize(
    "raw", [b"not json", b"[1]", b'{"usage": 3}', b'{"usage": {"prompt_tokens": "many"}}', b""]
)
def test_an_answer_that_cannot_be_read_has_no_counts(raw):
    reader = UsageReader("application/json")
    reader.feed(raw)
    assert reader.end().input_tokens is None
