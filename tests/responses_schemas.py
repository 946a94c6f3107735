"""The shapes of OpenAI's Responses API as JSON Schemas, and checks of whole streams.

Written by hand from https://platform.openai.com/docs/api-reference/responses and its streaming
events; it imports nothing of the server. Objects are closed, so that a stray field is a failure.

    check_response(reply)       one response
    check_stream(text)          a stream as it came; returns its events and the response, folded
"""

import json

from jsonschema import Draft202012Validator

from openai_schemas import BOOLEAN, BYTES, COUNT, LOGPROB, NAME, STRING, TIME, array, closed, nullable

STATUS = {"enum": ["in_progress", "completed", "incomplete"]}
TEXT_LOGPROB = closed({"token": STRING, "logprob": LOGPROB, "bytes": BYTES, "top_logprobs": array(
    closed({"token": STRING, "logprob": LOGPROB, "bytes": BYTES}), maxItems=20)})
EVENT_LOGPROB = closed({"token": STRING, "logprob": LOGPROB, "top_logprobs": array(
    closed({"token": STRING, "logprob": LOGPROB}), maxItems=20)})
TEXT_PART = closed({"type": {"const": "output_text"}, "text": STRING, "annotations": array({}, maxItems=0),
                    "logprobs": array(TEXT_LOGPROB)})
REASONING_PART = closed({"type": {"const": "reasoning_text"}, "text": STRING})
SUMMARY_PART = closed({"type": {"const": "summary_text"}, "text": STRING})


def item(kind: str, prefix: str, required: dict, optional: dict | None = None) -> dict:
    return closed({"id": {"type": "string", "pattern": f"^{prefix}_"}, "type": {"const": kind},
                   "status": STATUS, **required}, optional)


MESSAGE = item("message", "msg", {"role": {"const": "assistant"}, "content": array(TEXT_PART)})
CALL = item("function_call", "fc", {"call_id": NAME, "name": NAME, "arguments": STRING}, {"namespace": NAME})
REASONING = item("reasoning", "rs", {"summary": array(SUMMARY_PART), "content": array(REASONING_PART)})
OUTPUT = {"anyOf": [MESSAGE, CALL, REASONING]}

USAGE = closed({"input_tokens": COUNT, "output_tokens": COUNT, "total_tokens": COUNT,
                "input_tokens_details": closed({"cached_tokens": COUNT, "cache_write_tokens": COUNT}),
                "output_tokens_details": closed({"reasoning_tokens": COUNT})})
FORMAT = {"anyOf": [closed({"type": {"enum": ["text", "json_object"]}}), closed(
    {"type": {"const": "json_schema"}, "name": NAME, "schema": {"type": "object"}},
    {"strict": BOOLEAN, "description": STRING})]}
RESPONSE = closed({
    "id": {"type": "string", "pattern": "^resp_"}, "object": {"const": "response"}, "created_at": TIME,
    "completed_at": nullable(TIME), "background": {"const": False},
    "status": {"enum": ["in_progress", "completed", "incomplete", "failed"]},
    "error": nullable(closed({"code": NAME, "message": NAME})),
    "incomplete_details": nullable(closed({"reason": {"enum": ["max_output_tokens", "content_filter"]}})),
    "instructions": nullable(STRING), "max_output_tokens": nullable(COUNT), "max_tool_calls": nullable(COUNT),
    "metadata": {"type": "object", "additionalProperties": STRING}, "model": NAME, "output": array(OUTPUT),
    "parallel_tool_calls": BOOLEAN, "previous_response_id": nullable(NAME), "prompt_cache_key": nullable(STRING),
    "reasoning": closed({"effort": nullable(NAME), "summary": nullable(NAME)}),
    "safety_identifier": nullable(STRING), "service_tier": NAME, "store": BOOLEAN,
    "temperature": {"type": "number"}, "top_p": {"type": "number"},
    "text": closed({"format": FORMAT}, {"verbosity": NAME}),
    "tool_choice": {"type": ["string", "object"]}, "tools": array({"type": "object"}),
    "top_logprobs": COUNT, "truncation": {"enum": ["auto", "disabled"]}, "usage": nullable(USAGE),
    "user": nullable(STRING)})

OF_ITEM = {"item_id": NAME, "output_index": COUNT}
OF_CONTENT, OF_SUMMARY = {**OF_ITEM, "content_index": COUNT}, {**OF_ITEM, "summary_index": COUNT}
SNAPSHOT = {"response": RESPONSE}
PART = {"part": {"anyOf": [TEXT_PART, REASONING_PART]}}
EVENTS = {
    "response.created": SNAPSHOT, "response.in_progress": SNAPSHOT, "response.completed": SNAPSHOT,
    "response.incomplete": SNAPSHOT, "response.failed": SNAPSHOT,
    "response.output_item.added": {"output_index": COUNT, "item": OUTPUT},
    "response.output_item.done": {"output_index": COUNT, "item": OUTPUT},
    "response.content_part.added": {**OF_CONTENT, **PART}, "response.content_part.done": {**OF_CONTENT, **PART},
    "response.output_text.delta": {**OF_CONTENT, "delta": NAME, "logprobs": array(EVENT_LOGPROB)},
    "response.output_text.done": {**OF_CONTENT, "text": STRING, "logprobs": array(EVENT_LOGPROB)},
    "response.reasoning_text.delta": {**OF_CONTENT, "delta": NAME},
    "response.reasoning_text.done": {**OF_CONTENT, "text": STRING},
    "response.reasoning_summary_part.added": {**OF_SUMMARY, "part": SUMMARY_PART},
    "response.reasoning_summary_part.done": {**OF_SUMMARY, "part": SUMMARY_PART},
    "response.reasoning_summary_text.delta": {**OF_SUMMARY, "delta": NAME},
    "response.reasoning_summary_text.done": {**OF_SUMMARY, "text": STRING},
    "response.function_call_arguments.delta": {**OF_ITEM, "delta": NAME},
    "response.function_call_arguments.done": {**OF_ITEM, "name": NAME, "arguments": STRING},
    "keepalive": {},  # undocumented, but sent by api.openai.com, and known to OpenAI's libraries
    "error": {"code": nullable(NAME), "message": NAME, "param": nullable(NAME)},
}
VALIDATORS = {kind: Draft202012Validator(closed({"type": {"const": kind}, "sequence_number": COUNT, **fields}))
              for kind, fields in EVENTS.items()}
OTHERS = {"response": Draft202012Validator(RESPONSE), "input_tokens": Draft202012Validator(closed(
    {"object": {"const": "response.input_tokens"}, "input_tokens": COUNT})),
    "deleted": Draft202012Validator(closed(
        {"id": NAME, "object": {"const": "response"}, "deleted": {"const": True}})),
    "items": Draft202012Validator(closed({
        "object": {"const": "list"}, "data": array({"type": "object", "required": ["id", "type"]}),
        "first_id": nullable(NAME), "last_id": nullable(NAME), "has_more": BOOLEAN}))}


def validate(validator: Draft202012Validator, value) -> None:
    """AssertionError with the place and the reason if it has not the shape."""
    problems = [f"{error.json_path}: {error.message[:300]}" for error in validator.iter_errors(value)]
    assert not problems, problems


def check_response(reply: dict) -> dict:
    """A response that has come to its end."""
    validate(OTHERS["response"], reply)
    status = reply["status"]
    assert (reply["error"] is not None) == (status == "failed")
    assert (reply["incomplete_details"] is not None) == (status == "incomplete")
    assert (reply["completed_at"] is not None) == (status == "completed")
    states = [each["status"] for each in reply["output"]]
    assert states[:-1] == ["completed"] * len(states[:-1])
    if status == "completed":
        assert states[-1:] in ([], ["completed"])
    if usage := reply["usage"]:
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        assert usage["input_tokens_details"]["cached_tokens"] <= usage["input_tokens"]
        assert usage["output_tokens_details"]["reasoning_tokens"] <= usage["output_tokens"]
    return reply


def parse(text: str) -> list[dict]:
    """The events of a stream, each with the name of its type; comments are left out."""
    events = []
    for block in filter(None, text.split("\n\n")):
        lines = [line for line in block.split("\n") if not line.startswith(":")]
        if lines:
            assert len(lines) == 2 and lines[0].startswith("event: ") and lines[1].startswith("data: "), lines
            events.append(json.loads(lines[1][6:]))
            assert lines[0] == f"event: {events[-1]['type']}"
    return events


def check_stream(text: str) -> tuple[list[dict], dict]:
    """Every event, their order and their indices; what they fold to is what the last one says."""
    events = parse(text)
    for number, event in enumerate(events):
        validate(VALIDATORS[event["type"]], event)
        assert event["sequence_number"] == number, "the numbers have a gap"
    told = [event for event in events if event["type"] != "keepalive"]
    assert [event["type"] for event in told[:2]] == ["response.created", "response.in_progress"]
    last = told[-1]
    assert last["type"] in ("response.completed", "response.incomplete", "response.failed")
    assert last["type"] == f"response.{last['response']['status']}"
    output, rest = [], told[2:-1]
    while rest:
        output.append(fold_item(rest, len(output)))
    assert output == last["response"]["output"]
    same = {"status", "completed_at", "incomplete_details", "output", "usage", "error"}
    for event in told[:2]:
        assert event["response"]["status"] == "in_progress" and event["response"]["output"] == []
        assert all(event["response"][name] == last["response"][name] for name in event["response"].keys() - same)
    return events, check_response(last["response"])


def fold_item(rest: list[dict], index: int) -> dict:
    """Take the events of one item, which may not be mixed with another's; return it, made of its deltas."""
    whole = rest.pop(0)
    assert whole["type"] == "response.output_item.added" and whole["output_index"] == index
    whole, seen = whole["item"], []
    assert whole["status"] == "in_progress"
    while (event := rest.pop(0))["type"] != "response.output_item.done":
        kind = event["type"].removeprefix("response.")
        assert event["item_id"] == whole["id"] and event["output_index"] == index
        place, part = kind.partition(".")[::2]
        into = whole.get("summary" if "summary" in place else "content")
        if part == "added":
            assert event.get("content_index", event.get("summary_index")) == len(into)
            into.append(event["part"])
        elif place == "function_call_arguments" and part == "delta":
            whole["arguments"] += event["delta"]
        elif place == "function_call_arguments":
            assert (event["name"], event["arguments"]) == (whole["name"], whole["arguments"])
        elif part == "delta":
            into[-1]["text"] += event["delta"]
            seen += event.get("logprobs", [])
        elif place in ("content_part", "reasoning_summary_part"):
            assert event["part"]["text"] == into[-1]["text"]
            into[-1] = event["part"]
        else:
            assert event["text"] == into[-1]["text"] and event.get("logprobs", seen) == seen
    assert event["output_index"] == index and event["item"]["status"] in ("completed", "incomplete")
    whole["status"] = event["item"]["status"]
    assert whole == event["item"]
    return whole
