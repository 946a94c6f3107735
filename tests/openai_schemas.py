"""The shapes of the OpenAI API as JSON Schemas (draft 2020-12), and checks of whole replies.

Written by hand from https://platform.openai.com/docs/api-reference; it imports nothing of the
server. Objects are closed, so that a stray or misspelt field is a failure. What this server
adds is listed by name: `reasoning_content` and `timings` of llama-server, `max_model_len` of
vLLM, `meta` of a model.

    check_reply(kind, reply)                    one JSON reply
    check_stream(kind, events, asked)           the parsed events of a stream; returns it folded
    check_exchange(path, asked, status, ...)    whatever came back for a request
"""

import json
import re

from jsonschema import Draft202012Validator

# ==== 1. Pieces ===========================================================================


def closed(required: dict, optional: dict | None = None) -> dict:
    """An object with these properties and no others."""
    return {"type": "object", "properties": {**required, **(optional or {})},
            "required": list(required), "additionalProperties": False}


def array(items: dict, **limits) -> dict:
    return {"type": "array", "items": items, **limits}


def nullable(schema: dict) -> dict:
    return {"anyOf": [schema, {"type": "null"}]}


STRING, BOOLEAN, NULL = {"type": "string"}, {"type": "boolean"}, {"type": "null"}
NAME = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
POSITIVE = {"type": "number", "minimum": 0}
TIME = {"type": "integer", "minimum": 1_600_000_000}  # Unix seconds, not milliseconds
LOGPROB = {"type": "number", "maximum": 0, "minimum": -9999}  # -9999 stands for impossible

TIMINGS = closed(
    {"cache_n": COUNT, "prompt_n": COUNT, "prompt_ms": POSITIVE, "prompt_per_token_ms": POSITIVE,
     "prompt_per_second": POSITIVE, "predicted_n": COUNT, "predicted_ms": POSITIVE,
     "predicted_per_token_ms": POSITIVE, "predicted_per_second": POSITIVE},
    {"draft_n": COUNT, "draft_n_accepted": COUNT})

USAGE = closed(
    {"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT},
    {"prompt_tokens_details": nullable(closed({"cached_tokens": COUNT}, {"audio_tokens": COUNT})),
     "completion_tokens_details": nullable(closed({}, {
         "reasoning_tokens": COUNT, "audio_tokens": COUNT, "accepted_prediction_tokens": COUNT,
         "rejected_prediction_tokens": COUNT}))})

BYTES = nullable(array({"type": "integer", "minimum": 0, "maximum": 255}))
TOP_LOGPROB = closed({"token": STRING, "logprob": LOGPROB, "bytes": BYTES})
TOKEN_LOGPROB = closed({"token": STRING, "logprob": LOGPROB, "bytes": BYTES,
                        "top_logprobs": array(TOP_LOGPROB, maxItems=20)})
CHAT_LOGPROBS = nullable(closed({"content": nullable(array(TOKEN_LOGPROB))},
                                {"refusal": nullable(array(TOKEN_LOGPROB))}))
TEXT_LOGPROBS = nullable(closed({
    "tokens": array(STRING), "token_logprobs": array(nullable(LOGPROB)),
    "top_logprobs": nullable(array(nullable({"type": "object", "additionalProperties": LOGPROB}))),
    "text_offset": array(COUNT)}))

FUNCTION = closed({"name": NAME, "arguments": STRING})
TOOL_CALL = closed({"id": NAME, "type": {"const": "function"}, "function": FUNCTION})
# Streamed: the first delta of a call tells its id and name, the others only more arguments.
TOOL_DELTA = {"anyOf": [
    closed({"index": COUNT, "id": NAME, "type": {"const": "function"},
            "function": closed({"name": NAME, "arguments": {"const": ""}})}),
    closed({"index": COUNT, "function": closed({"arguments": NAME})})]}
FUNCTION_DELTA = {"anyOf": [closed({"name": NAME, "arguments": {"const": ""}}),
                            closed({"arguments": NAME})]}

CHAT_FINISH = {"enum": ["stop", "length", "tool_calls", "content_filter", "function_call"]}
TEXT_FINISH = {"enum": ["stop", "length", "content_filter"]}
SERVICE_TIER = nullable({"enum": ["auto", "default", "flex", "scale", "priority"]})

MESSAGE = closed(
    {"role": {"const": "assistant"}, "content": nullable(STRING), "refusal": nullable(STRING)},
    {"tool_calls": array(TOOL_CALL, minItems=1), "function_call": FUNCTION,
     "annotations": array({"type": "object"}), "audio": NULL, "reasoning_content": STRING})

DELTA = closed({}, {
    "role": {"const": "assistant"}, "content": nullable(STRING), "refusal": nullable(STRING),
    "tool_calls": array(TOOL_DELTA, minItems=1), "function_call": FUNCTION_DELTA,
    "reasoning_content": nullable(STRING)})

PERMISSION = closed({
    "id": {"type": "string", "pattern": "^modelperm-"}, "object": {"const": "model_permission"},
    "created": TIME, "allow_create_engine": BOOLEAN, "allow_sampling": {"const": True},
    "allow_logprobs": BOOLEAN, "allow_search_indices": BOOLEAN, "allow_view": BOOLEAN,
    "allow_fine_tuning": BOOLEAN, "organization": STRING, "group": nullable(STRING),
    "is_blocking": BOOLEAN})

# Counts as llama-server names them, and more.
META = {"type": "object", "required": ["n_ctx", "n_ctx_train", "n_params", "size"],
        "properties": {"n_ctx": COUNT, "n_ctx_train": COUNT, "n_params": COUNT, "size": COUNT}}

MODEL = closed({"id": NAME, "object": {"const": "model"}, "created": TIME, "owned_by": NAME,
                "root": NAME, "parent": nullable(NAME),
                "permission": array(PERMISSION, minItems=1, maxItems=1)},
               {"max_model_len": COUNT, "meta": META})


def reply(prefix: str, name: str, choice: dict, required: dict, optional: dict) -> dict:
    """A reply or chunk of one of the generating endpoints."""
    return closed(
        {"id": {"type": "string", "pattern": f"^{prefix}-.+"}, "object": {"const": name},
         "created": TIME, "model": NAME, "choices": choice, **required},
        {"system_fingerprint": nullable(NAME), "service_tier": SERVICE_TIER, "timings": TIMINGS,
         **optional})


TEXT_CHOICE = {"text": STRING, "index": COUNT, "logprobs": TEXT_LOGPROBS}
TOKEN = {"type": "integer", "minimum": 0}

SCHEMAS = {
    "chat.completion": reply("chatcmpl", "chat.completion", array(closed(
        {"index": COUNT, "message": MESSAGE, "logprobs": CHAT_LOGPROBS,
         "finish_reason": CHAT_FINISH}), minItems=1), {"usage": USAGE}, {}),
    "chat.completion.chunk": reply("chatcmpl", "chat.completion.chunk", array(closed(
        {"index": COUNT, "delta": DELTA, "finish_reason": nullable(CHAT_FINISH)},
        {"logprobs": CHAT_LOGPROBS})), {}, {"usage": nullable(USAGE)}),
    "text_completion": reply("cmpl", "text_completion", array(closed(
        {**TEXT_CHOICE, "finish_reason": TEXT_FINISH}), minItems=1), {"usage": USAGE}, {}),
    "text_completion.chunk": reply("cmpl", "text_completion", array(closed(
        {**TEXT_CHOICE, "finish_reason": nullable(TEXT_FINISH)})), {}, {"usage": nullable(USAGE)}),
    "embeddings": closed({
        "object": {"const": "list"}, "model": NAME,
        "data": array(closed({
            "object": {"const": "embedding"}, "index": COUNT,
            "embedding": {"anyOf": [array({"type": "number"}, minItems=1),
                                    {"type": "string", "pattern": "^[A-Za-z0-9+/]+={0,2}$"}]}}),
            minItems=1),
        "usage": closed({"prompt_tokens": COUNT, "total_tokens": COUNT})}),
    "model": MODEL,
    "models": closed({"object": {"const": "list"}, "data": array(MODEL, minItems=1)}),
    "error": closed({"error": closed({"message": NAME, "type": NAME, "param": nullable(NAME),
                                      "code": nullable(NAME)})}),
    # llama-server's utilities
    "tokenize": closed({"tokens": {"anyOf": [array(TOKEN), array(closed(
        {"id": TOKEN, "piece": {"anyOf": [STRING, array(TOKEN, minItems=1)]}}))]}},
        {"count": COUNT, "max_model_len": COUNT}),  # vLLM's
    "detokenize": closed({"content": STRING, "prompt": STRING}),
    "apply-template": closed({"prompt": STRING}),
}
VALIDATORS = {kind: Draft202012Validator(schema) for kind, schema in SCHEMAS.items()}

KIND_OF_PATH = {
    "/v1/chat/completions": "chat.completion", "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings", "/v1/models": "models", "/tokenize": "tokenize",
    "/detokenize": "detokenize", "/apply-template": "apply-template"}
CHUNK_OF = {"chat.completion": "chat.completion.chunk", "text_completion": "text_completion.chunk"}

# ==== 2. One JSON object ==================================================================


def check_reply(kind: str, obj) -> None:
    """AssertionError with the place and the reason if `obj` has not the shape `kind`."""
    problems = [f"{error.json_path}: {error.message[:300]}"
                for error in VALIDATORS[kind].iter_errors(obj)]
    assert not problems, f"not a {kind}: {problems}"
    if kind in CHUNK_OF:
        check_usage(obj["usage"])
        assert [choice["index"] for choice in obj["choices"]] == list(range(len(obj["choices"])))
    if kind == "chat.completion":
        for choice in obj["choices"]:
            check_ending(choice["message"], choice["finish_reason"])
    if kind.startswith("text_completion"):
        for choice in obj["choices"]:
            check_text_logprobs(choice["logprobs"])
    if kind == "embeddings":
        assert [entry["index"] for entry in obj["data"]] == list(range(len(obj["data"])))
        assert obj["usage"]["prompt_tokens"] == obj["usage"]["total_tokens"] > 0


def check_usage(usage: dict) -> None:
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    details = usage.get("prompt_tokens_details") or {"cached_tokens": 0}
    assert details["cached_tokens"] <= usage["prompt_tokens"]


def parses(text: str) -> bool:
    """Whether a text is JSON."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def check_ending(message: dict, finish_reason: str) -> None:
    """The finish_reason says what the message holds; a call that was cut is no call to make."""
    calls, function = message.get("tool_calls"), message.get("function_call")
    assert not (calls and function), "tool_calls and the deprecated function_call in one message"
    if finish_reason in ("tool_calls", "function_call"):
        assert message.get(finish_reason), f"ends in {finish_reason} without any"
    elif calls or function:
        # Cut off by max_tokens, or in the middle by a stop sequence of the client's.
        last = function or calls[-1]["function"]
        assert finish_reason == "length" or not parses(last["arguments"]), \
            f"a call ends in {finish_reason}"
    else:
        assert isinstance(message["content"], str), "neither text nor a call"
    for call in [function] if function else [call["function"] for call in calls or ()]:
        if finish_reason in ("tool_calls", "function_call"):
            assert isinstance(json.loads(call["arguments"]), dict), call
    ids = [call["id"] for call in calls or ()]
    assert len(set(ids)) == len(ids), "two calls with one id"


def check_text_logprobs(logprobs: dict | None) -> None:
    """The four lists of the legacy shape belong together."""
    if logprobs is None:
        return
    n = len(logprobs["tokens"])
    assert len(logprobs["token_logprobs"]) == len(logprobs["text_offset"]) == n
    assert logprobs["top_logprobs"] is None or len(logprobs["top_logprobs"]) == n
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])


# ==== 3. A stream =========================================================================


def parse_sse(text: str) -> list[dict]:
    """The JSON events of a stream: one `data:` line each, [DONE] last and once."""
    blocks = text.split("\n\n")
    assert blocks.pop() == "", "the stream ends within an event"
    events = []
    for block in blocks:
        if re.fullmatch(r"(:.*\n?)+", block):  # a comment keeps a silent connection alive
            continue
        assert block.startswith("data: ") and "\n" not in block, f"not one data line: {block!r}"
        events.append(block.removeprefix("data: "))
    assert events and events.pop() == "[DONE]", f"no [DONE] at the end: {text[-300:]!r}"
    return [json.loads(event) for event in events]


def check_stream(kind: str, events: list[dict], asked: dict | None = None) -> list[dict]:
    """Check all chunks of a stream against what was asked for; return the folded choices, in
    the shape of the unstreamed reply."""
    asked = asked or {}
    for event in events:
        check_reply(CHUNK_OF[kind], event)
    for name in ("id", "created", "model"):
        assert len({event[name] for event in events}) == 1, f"{name} changes within the stream"

    chunks = list(events)
    if (asked.get("stream_options") or {}).get("include_usage"):
        last = chunks.pop()
        assert last["choices"] == [] and last.get("usage"), "the last chunk is not the usage"
        check_usage(last["usage"])
        assert all("usage" in chunk for chunk in chunks), "usage is null in the other chunks"
    assert all(chunk.get("usage") is None for chunk in chunks), "usage unasked, or too early"
    assert all(chunk["choices"] for chunk in chunks), "a chunk without a choice"
    assert not any("timings" in chunk for chunk in events[:-1]), "timings before the end"

    by_index: dict[int, list[dict]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            by_index.setdefault(choice["index"], []).append(choice)
    assert sorted(by_index) == list(range(n_choices(kind, asked))), sorted(by_index)
    fold = fold_chat if kind == "chat.completion" else fold_text
    return [fold(parts) for _, parts in sorted(by_index.items())]


def n_choices(kind: str, asked: dict) -> int:
    """How many choices a request is answered with."""
    n, prompt = int(asked.get("n") or 1), asked.get("prompt")
    several = kind == "text_completion" and isinstance(prompt, list) and not all(
        isinstance(item, (int, float)) for item in prompt)
    return n * len(prompt) if several else n


def check_finish(parts: list[dict]) -> str:
    """The finish_reason comes once, in the choice's last chunk."""
    reasons = [part["finish_reason"] for part in parts]
    assert reasons[-1] and not any(reasons[:-1]), f"finish_reason of the chunks: {reasons}"
    return reasons[-1]


def fold_chat(parts: list[dict]) -> dict:
    """One choice's deltas, checked and joined: the role once and first, with empty content; then
    text or calls; then an empty delta with the finish_reason."""
    first, *rest = [part["delta"] for part in parts]
    assert first.get("role") == "assistant" and not first.get("content"), first
    assert "content" in first, "the first delta has no content"
    assert not any("role" in delta for delta in rest), "the role comes once"
    assert parts[-1]["delta"] == {}, "the last delta is empty, but for the finish_reason"
    message = {"role": "assistant", "content": None, "refusal": None}
    calls: list[dict] = []
    for delta in [first, *rest]:
        for name in ("content", "reasoning_content"):
            if delta.get(name) is not None:
                message[name] = (message.get(name) or "") + delta[name]
        for call in delta.get("tool_calls", ()):
            fold_call(calls, call)
        if function := delta.get("function_call"):
            if "name" in function:
                assert "function_call" not in message, "the function's name comes once"
                message["function_call"] = dict(function)
            else:
                message["function_call"]["arguments"] += function["arguments"]
    if calls:
        message["tool_calls"] = calls
    finish_reason = check_finish(parts)
    check_ending(message, finish_reason)
    logprobs = None
    if any(part.get("logprobs") for part in parts):
        entries = [part["logprobs"]["content"] for part in parts if part.get("logprobs")]
        logprobs = {"content": [entry for some in entries for entry in some or ()]}
    return {"index": parts[0]["index"], "message": message, "logprobs": logprobs,
            "finish_reason": finish_reason}


def fold_call(calls: list[dict], delta: dict) -> None:
    """Calls come one after the other, each begun by its id and name."""
    if "id" in delta:
        assert delta["index"] == len(calls), "the calls' indices do not count up"
        calls.append({"id": delta["id"], "type": delta["type"],
                      "function": dict(delta["function"])})
    else:
        assert delta["index"] == len(calls) - 1, "arguments for a call that is not the current one"
        calls[-1]["function"]["arguments"] += delta["function"]["arguments"]


def fold_text(parts: list[dict]) -> dict:
    """One choice of a plain completion."""
    logprobs = None
    if any(part["logprobs"] for part in parts):
        logprobs = {name: [item for part in parts if part["logprobs"]
                           for item in part["logprobs"][name] or ()]
                    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
        check_text_logprobs(logprobs)
    return {"index": parts[0]["index"], "text": "".join(part["text"] for part in parts),
            "logprobs": logprobs, "finish_reason": check_finish(parts)}


# ==== 4. Whatever came back ===============================================================


def check_exchange(path: str, asked, status: int, content_type: str, text: str) -> None:
    """Check the answer to a request by its path, its status and what was asked for."""
    if status >= 400:
        check_reply("error", json.loads(text))
        return
    asked = asked if isinstance(asked, dict) else {}
    kind = KIND_OF_PATH.get(path) or ("model" if path.startswith("/v1/models/") else None)
    if content_type.startswith("text/event-stream"):
        assert asked.get("stream") is True, "a stream unasked"
        check_stream(kind, parse_sse(text), asked)
        return
    assert not asked.get("stream"), "a stream was asked for"
    if kind:
        check_reply(kind, json.loads(text))
    if kind in CHUNK_OF:
        assert len(json.loads(text)["choices"]) == n_choices(kind, asked)
