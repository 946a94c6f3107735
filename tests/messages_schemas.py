"""The shapes of Anthropic's Messages API as JSON Schemas, and checks of whole streams.

Written by hand from https://docs.anthropic.com/en/api/messages and its streaming events; it imports
nothing of the server. Objects are closed, so that a stray field is a failure.

    check_message(reply)        one message
    check_stream(text)          a stream as it came; returns its events and the message, folded
"""

import json

from jsonschema import Draft202012Validator

from openai_schemas import COUNT, NAME, STRING, array, closed, nullable
from responses_schemas import parse, validate

TEXT = closed({"type": {"const": "text"}, "text": STRING})
THINKING = closed({"type": {"const": "thinking"}, "thinking": STRING, "signature": STRING})
TOOL_USE = closed({"type": {"const": "tool_use"}, "id": {"type": "string", "pattern": "^[a-zA-Z0-9_-]+$"},
                   "name": NAME, "input": {"type": "object"}})
BLOCK = {"anyOf": [TEXT, THINKING, TOOL_USE]}
COUNTS = {"input_tokens": COUNT, "cache_creation_input_tokens": COUNT, "cache_read_input_tokens": COUNT,
          "output_tokens": COUNT, "output_tokens_details": closed({"thinking_tokens": COUNT})}
REASON = {"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]}
MESSAGE = closed({
    "id": {"type": "string", "pattern": "^msg_"}, "type": {"const": "message"}, "role": {"const": "assistant"},
    "model": NAME, "content": array(BLOCK), "stop_reason": nullable(REASON), "stop_sequence": nullable(NAME),
    "usage": closed({**COUNTS, "service_tier": {"const": "standard"}})})
ERROR_TYPES = ["invalid_request_error", "authentication_error", "permission_error", "not_found_error",
               "request_too_large", "rate_limit_error", "timeout_error", "api_error", "overloaded_error"]
ERROR = closed({"type": {"const": "error"}, "error": closed({"type": {"enum": ERROR_TYPES}, "message": NAME})})
MODEL = closed({"type": {"const": "model"}, "id": NAME, "display_name": NAME, "created_at": {
    "type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$"}})
DELTAS = [closed({"type": {"const": f"{kind}_delta"}, field: NAME}) for kind, field in (
    ("text", "text"), ("thinking", "thinking"), ("signature", "signature"), ("input_json", "partial_json"))]
EVENTS = {
    "message_start": {"message": MESSAGE},
    "content_block_start": {"index": COUNT, "content_block": BLOCK},
    "content_block_delta": {"index": COUNT, "delta": {"anyOf": DELTAS}},
    "content_block_stop": {"index": COUNT},
    "message_delta": {"delta": closed({"stop_reason": REASON, "stop_sequence": nullable(NAME)}),
                      "usage": closed(COUNTS)},
    "message_stop": {}, "ping": {},
}
VALIDATORS = {kind: Draft202012Validator(closed({"type": {"const": kind}, **fields}))
              for kind, fields in EVENTS.items()} | {"error": Draft202012Validator(ERROR)}
OTHERS = {"message": Draft202012Validator(MESSAGE), "count": Draft202012Validator(closed({"input_tokens": COUNT})),
          "models": Draft202012Validator(closed({"data": array(MODEL, minItems=1), "has_more": {"const": False},
                                                 "first_id": NAME, "last_id": NAME})),
          "model": Draft202012Validator(MODEL)}


def check_message(reply: dict) -> dict:
    """A message that has come to its end."""
    validate(OTHERS["message"], reply)
    assert reply["stop_reason"] and (reply["stop_sequence"] is not None) == (reply["stop_reason"] == "stop_sequence")
    if reply["stop_reason"] == "tool_use":
        assert any(block["type"] == "tool_use" for block in reply["content"])
    assert reply["usage"]["output_tokens_details"]["thinking_tokens"] <= reply["usage"]["output_tokens"]
    return reply


def check_error(reply: dict) -> dict:
    validate(VALIDATORS["error"], reply)
    return reply["error"]


def check_stream(text: str) -> tuple[list[dict], dict]:
    """Every event and their order; returns the events, and the message that they fold to."""
    events = parse(text)
    for event in events:
        validate(VALIDATORS[event["type"]], event)
    told = [event for event in events if event["type"] != "ping"]
    assert told[0]["type"] == "message_start"
    assert [event["type"] for event in told[-2:]] == ["message_delta", "message_stop"]
    message = told[0]["message"]
    assert message["content"] == [] and message["stop_reason"] is None
    rest = told[1:-2]
    while rest:
        message["content"].append(fold_block(rest, len(message["content"])))
    assert message["usage"].items() >= {name: told[-2]["usage"][name] for name in (
        "input_tokens", "cache_read_input_tokens")}.items(), "the beginning tells another count than the end"
    message |= told[-2]["delta"]
    message["usage"] |= told[-2]["usage"]
    return events, check_message(message)


def fold_block(rest: list[dict], index: int) -> dict:
    """Take the events of one block; return it, made of its deltas."""
    first = rest.pop(0)
    assert first["type"] == "content_block_start" and first["index"] == index
    block, pieces = first["content_block"], []
    assert not (block.get("text") or block.get("thinking") or block.get("input"))
    while (event := rest.pop(0))["type"] != "content_block_stop":
        assert event["type"] == "content_block_delta" and event["index"] == index
        kind, text = event["delta"].values()
        if kind == "signature_delta":
            block["signature"] = text
        else:
            assert kind == {"text": "text_delta", "thinking": "thinking_delta",
                            "tool_use": "input_json_delta"}[block["type"]]
            pieces.append(text)
    assert event["index"] == index
    if block["type"] == "tool_use":
        try:
            block["input"] = json.loads("".join(pieces) or "{}")
        except ValueError:  # cut off
            block["input"] = {}
    else:
        block[block["type"]] = "".join(pieces)
    return block
