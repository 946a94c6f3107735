"""The Anthropic API at /v1/messages: bodies, blocks, streams, errors, as its clients send and read them.

Every reply and every event passes messages_schemas.py. test_clients.py has the anthropic library itself.
"""

import json
import socket
import sys
import types

import httpx
import pytest

import messages_schemas
from conftest import ROOT, serve
from responses_schemas import validate

sys.path.insert(0, str(ROOT))
import engine  # noqa: E402
import server  # noqa: E402
from features import messages, protocols, tools  # noqa: E402
from features.calls import GENERIC  # noqa: E402

HI = [{"role": "user", "content": "Hi"}]
GREEDY = {"temperature": 0, "max_tokens": 24}
TOOL = {"name": "get_time", "description": "Tell the time in a zone.", "input_schema": {
    "type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"],
    "additionalProperties": False}}


@pytest.fixture(scope="module")
def ask(url):
    """POST to a path under /v1/messages; the reply's JSON, or a stream's message."""
    with httpx.Client(base_url=url, timeout=60, headers={
            "anthropic-version": "2023-06-01", "x-api-key": "unused"}) as client:
        def post(body: dict, path: str = "", status: int = 200, **fields):
            response = client.post(f"/v1/messages{path}", json={"messages": HI, **body, **fields})
            assert response.status_code == status, response.text
            post.headers = response.headers
            if status >= 400:
                return messages_schemas.check_error(response.json())
            if fields.get("stream") or body.get("stream"):
                post.events, message = messages_schemas.check_stream(response.text)
                return message
            if not path:
                messages_schemas.check_message(response.json())
            return response.json()
        yield post


def said(message: dict) -> dict:
    """What a message says, without its id and its counts of what was cached and called."""
    content = [{name: value for name, value in block.items() if name != "id"} for block in message["content"]]
    return {"content": content, "stop_reason": message["stop_reason"], "stop_sequence": message["stop_sequence"],
            "output_tokens": message["usage"]["output_tokens"]}


@pytest.mark.parametrize("body", [
    {}, {"max_tokens": 3}, {"stop_sequences": ["help", "xyz"]},
    {"tools": [TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "max_tokens": 80},
    {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "get_time"}, "max_tokens": 80},
    {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "get_time"}, "max_tokens": 20},
    {"output_config": {"format": {"type": "json_schema", "schema": {
        "type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"],
        "additionalProperties": False}}}}],
    ids=["text", "cut", "stopped", "any", "tool", "call cut", "schema"])
def test_a_stream_folds_to_the_unstreamed_message(ask, body):
    whole = ask({**GREEDY, **body})
    assert said(ask({**GREEDY, **body}, stream=True)) == said(whole)
    if body.get("max_tokens", 24) < 24:
        assert whole["stop_reason"] == "max_tokens" and whole["content"]
    elif "stop_sequences" in body:
        assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", "help")
        assert "help" not in whole["content"][0]["text"]
    elif "tools" in body:
        [call] = whole["content"]
        assert call["name"] == "get_time" and call["input"]["zone"] in ("UTC", "CET")
        assert whole["stop_reason"] == "tool_use"
    elif "output_config" in body:
        assert isinstance(json.loads(whole["content"][0]["text"])["sure"], bool)
    else:
        assert whole["stop_reason"] == "end_turn" and whole["stop_sequence"] is None


def test_an_end_by_itself_is_not_taken_for_a_stop_sequence(ask):
    assert ask({**GREEDY, "stop_sequences": ["never said"]})["stop_reason"] == "end_turn"


def test_counts_are_those_of_the_prompt_and_of_what_was_cached(ask):
    """input_tokens is what had to be read; together with what was cached it is the whole prompt,
    which count_tokens knows without generating."""
    body = {"system": "You know the river Elbe.", "messages": [
        {"role": "user", "content": "How long is it, and where does it end, and who lives there?"}]}
    counted = ask(body, "/count_tokens")
    validate(messages_schemas.OTHERS["count"], counted)
    first, second = (ask({**body, **GREEDY}, stream=True)["usage"] for _ in range(2))
    for usage in (first, second):
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == counted["input_tokens"]
    assert second["input_tokens"] == 1 and second["cache_read_input_tokens"] == counted["input_tokens"] - 1


def prompt_of(url: str, body: dict) -> str:
    """The prompt that a message becomes, by way of the chat that it becomes."""
    house = server.load_features(["messages", "vision", "tokens"])
    handler = types.SimpleNamespace(
        server=types.SimpleNamespace(house=house, config=house.Config()), tally=server.Tally(),
        answer_headers={}, receive=lambda *_: None)
    handler.read_fields = lambda cls, sent: server.Handler.read_fields(handler, cls, sent)
    read = server.read_object(house.type_of(messages.MessagesBody), body, "", server.Reading(house))
    messages.receive(handler, read, None)
    prompt_of.ignored, prompt_of.chat = handler.tally.ignored, read.chat
    chat = [{key: value for key, value in server.dataclasses.asdict(message).items() if value is not None}
            for message in read.chat.messages]
    for message in chat:
        if isinstance(message.get("content"), list):
            message["content"] = [{key: value for key, value in part.items() if value} for part in message["content"]]
    return httpx.post(f"{url}/apply-template", json={"messages": chat}, timeout=60).json()["prompt"]


def test_a_conversation_of_an_agent_becomes_a_prompt(url):
    """Thinking, calls and results in their turns; what the system says later goes with the user."""
    prompt = prompt_of(url, {"max_tokens": 5, "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197.123; cc_entrypoint=cli; cch=a5145;"},
        {"type": "text", "text": "You help.", "cache_control": {"type": "ephemeral"}}], "messages": [
        {"role": "user", "content": [{"type": "text", "text": "When?"}]},
        {"role": "system", "content": "Agents: none."},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "A clock!", "signature": "s"}, {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "toolu_1", "name": "get_time", "input": {"zone": "UTC"}},
            {"type": "server_tool_use", "id": "srv", "name": "web_search", "input": {}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "12:00"}]},
            {"type": "text", "text": "So?"}]}]})
    turns = [turn.split("\n", 1) for turn in prompt.split("<|im_start|>")[1:]]
    assert [role for role, _ in turns] == ["system", "user", "assistant", "user", "assistant"]
    texts = [text.removesuffix("<|im_end|>\n") for _, text in turns]
    assert texts[0] == "You help." and texts[1] == "When?\n<system-reminder>\nAgents: none.\n</system-reminder>"
    assert texts[2].startswith("I look.\n<tool_call>") and '"zone": "UTC"' in texts[2]
    assert texts[3].startswith("<tool_response>\n12:00\n</tool_response>") and texts[3].endswith("So?")
    assert prompt_of.ignored == ["messages[2].content[3] (server_tool_use)"]
    assert prompt_of.chat.messages[2].reasoning_content == "A clock!"


def test_the_line_that_changes_with_every_request_is_not_in_the_prompt(ask):
    """Claude Code's first system block; else no request would find the last one's prefix."""
    def usage(stamp: str) -> dict:
        return ask({**GREEDY, "max_tokens": 1, "system": [
            {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1; cc_entrypoint=cli; cch={stamp};"},
            {"type": "text", "text": "You are an agent that counts ships in the harbour of a small town."}]})["usage"]
    usage("a5145")
    assert usage("0ffee")["input_tokens"] == 1


def test_thinking_is_asked_for_by_the_names_of_this_api(url):
    def effort(**fields) -> str | None:
        prompt_of(url, {"max_tokens": 5, "messages": HI, **fields})
        return prompt_of.chat.reasoning_effort
    assert effort() is None and effort(output_config={"effort": "high"}) == "high"
    assert effort(thinking={"type": "disabled"}, output_config={"effort": "high"}) == "none"
    assert effort(thinking={"type": "enabled", "budget_tokens": 1024}) == "medium"
    assert prompt_of.chat.reasoning_budget == 1024
    assert effort(thinking={"type": "adaptive"}, output_config={"effort": "max"}) == "xhigh"
    assert effort(thinking={"type": "adaptive"}) is None


CLAUDE_CODE = {  # what `claude -p` 2.1 sends, in small, with other words
    "model": "gpt-4o-mini", "max_tokens": 16, "stream": True, "messages": [
        {"role": "user", "content": [
            {"type": "text", "text": "<system-reminder>\n# currentDate\nToday is a day.\n</system-reminder>\n"},
            {"type": "text", "text": "Say hi", "cache_control": {"type": "ephemeral"}}]},
        {"role": "system", "content": "Available agent types:\n- one: Does all."}],
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197.123; cc_entrypoint=sdk-cli;"},
        {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "\nYou help with software.", "cache_control": {"type": "ephemeral"}}],
    "tools": [{"name": "Read", "description": "Reads a file.", "input_schema": {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object", "properties": {
            "file_path": {"description": "The path", "type": "string"},
            "offset": {"description": "A line", "type": "integer", "minimum": 0, "maximum": 9007199254740991}},
        "required": ["file_path"], "additionalProperties": False}},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}],
    "metadata": {"user_id": '{"device_id":"d","account_uuid":"","session_id":"s"}'},
    "thinking": {"type": "adaptive"}, "output_config": {"effort": "high"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}}


def test_what_claude_code_sends_is_served(ask, url):
    """As it is, to the path with its query; what cannot run here is named."""
    message = ask(CLAUDE_CODE, "?beta=true")
    assert message["content"] and message["model"] == "gpt-4o-mini"
    assert ask.headers["x-ignored-fields"] == "tools[1] (web_search_20250305)"
    assert ask.headers["request-id"] == ask.headers["x-request-id"]
    assert httpx.head(url).status_code == 200  # it asks whether somebody is there


@pytest.mark.parametrize("body, words", [
    ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ({"messages": []}, "messages must have at least 1 items"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text is required"),
    ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type is required"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}]},
     "messages[0].content[0].type: tool_use belongs in a message of the assistant's"),
    ({"messages": [{"role": "user", "content": [
        {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBE"}}]}]},
     "messages[0].content[0].source.type: a document must be 'text'"),
    ({"messages": [*HI, {"role": "user", "content": [{"type": "text", "text": "See"}, {
        "type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}]}]},
     "messages[1].content[1]: SmolLM2-135M-Instruct.Q4_1 reads no images"),
    ({"tools": [{"name": "f", "input_schema": {"type": "object", "properties": {"a": {"type": "strng"}}}}],
      "tool_choice": {"type": "any"}}, "tools[0].input_schema.properties.a.type"),
    ({"tool_choice": {"type": "tool", "name": "f"}}, "tool_choice: \"f\" is not among the tools"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name is required"),
    ({"stop_sequences": ["a"] * 17}, "stop_sequences must have at most 16 items"),
    ({"temperature": 3}, "temperature must be between 0 and 2"),
    ({"system": "word " * 2000}, "prompt is too long: messages: the text has")])
def test_a_refusal_names_what_the_client_sent(ask, body, words):
    error = ask({**GREEDY, **body}, status=400)
    assert error["type"] == "invalid_request_error" and words in error["message"], error
    if "prompt" not in words:
        assert ask({**GREEDY, **body}, status=400, stream=True) == error


def test_the_list_of_models_is_in_the_shape_of_its_client(url):
    """The same path answers OpenAI's clients as before."""
    headers = {"anthropic-version": "2023-06-01"}
    models = httpx.get(f"{url}/v1/models?limit=1000", headers=headers).json()
    validate(messages_schemas.OTHERS["models"], models)
    names = [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]]
    assert [model["id"] for model in models["data"]] == names
    model = httpx.get(f"{url}/v1/models/{names[0]}", headers=headers).json()
    validate(messages_schemas.OTHERS["model"], model)
    assert httpx.get(f"{url}/v1/models/{names[0]}").json()["object"] == "model"
    assert httpx.get(f"{url}/v1/models/nobody", headers=headers).status_code == 404


# ==== Errors of every status, and silence =================================================


@pytest.fixture(scope="module")
def guarded():
    """A server with keys and narrow limits, whose streams ping soon."""
    with serve(API_KEYS="one,two", RATE_LIMITING_ENABLED="true", REQUESTS_PER_MINUTE="60", MAX_BODY_MB="0.1",
               CLIENT_TIMEOUT="1", PING_INTERVAL="0.02", PARALLEL="1", N_CTX="2048") as address:
        yield address


def exchange(address: str, head: str, body: str = "") -> tuple[int, dict]:
    """The status and the JSON of the answer to a request as it is written here."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(f"{head.replace('HOST', f'Host: {host}')}\r\nConnection: close\r\n\r\n{body}".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    head, _, text = answer.partition("\r\n\r\n")
    return int(head.split()[1]), json.loads(text)


KEY = "x-api-key: one\r\nHOST\r\nContent-Length: {}"


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize("status, kind, head, body", [
    (401, "authentication_error", "POST PATH HTTP/1.1\r\nHOST\r\nContent-Length: 2", "{}"),
    (403, "permission_error", "POST PATH HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 2", "{}"),
    (404, "not_found_error", f"POST PATH HTTP/1.1\r\n{KEY.format(26)}",
     '{"model":"no","messages":1}'[:26]),
    (405, "invalid_request_error", "GET PATH HTTP/1.1\r\nx-api-key: one\r\nHOST", ""),
    (408, "timeout_error", f"POST PATH HTTP/1.1\r\n{KEY.format(9)}", "{"),
    (411, "invalid_request_error", "POST PATH HTTP/1.1\r\nx-api-key: one\r\nHOST", ""),
    (413, "request_too_large", f"POST PATH HTTP/1.1\r\n{KEY.format(10**6)}", ""),
    (400, "invalid_request_error", f"POST PATH HTTP/1.1\r\n{KEY.format(1)}", "{"),
    (400, "invalid_request_error", f"POST PATH HTTP/1.1\r\n{KEY.format(2)}", "{}")])
def test_an_error_of_any_status_has_this_api_s_shape(guarded, path, status, kind, head, body):
    """Also where it is known before the body, or the path's own function, is reached."""
    if status == 404:
        body = '{"model":"no","messages":1}'
        head = head.replace("Content-Length: 26", f"Content-Length: {len(body)}")
    got, reply = exchange(guarded, head.replace("PATH", path), body)
    assert (got, messages_schemas.check_error(reply)["type"]) == (status, kind)


def test_a_key_that_asks_too_often_gets_429_in_this_shape(guarded):
    with httpx.Client(base_url=guarded, headers={"x-api-key": "two"}) as client:
        answers = [client.post("/v1/messages", content=b"{}") for _ in range(62)]
    assert answers[-1].status_code == 429 and "retry-after" in answers[-1].headers
    assert messages_schemas.check_error(answers[-1].json())["type"] == "rate_limit_error"


def test_every_status_that_the_server_knows_has_a_type():
    for status in (400, 401, 403, 404, 405, 408, 411, 413, 414, 415, 429, 431, 500, 501, 502, 503, 504, 505, 508):
        messages_schemas.check_error(messages.MESSAGES.error(server.ApiError(status, "why")))
    assert messages.MESSAGES.error(server.unavailable("full", "queue_full"))["error"]["type"] == "overloaded_error"
    event = messages.MESSAGES.error_event(server.ApiError(500, "a fault")).decode()
    assert event.startswith("event: error\ndata: {") and event.endswith("\n\n")


def test_a_silent_stream_pings(guarded):
    """While a prompt is read nothing is said; the ping is an event that its clients know."""
    text = "\n".join(f"Line {i} of a long list of things." for i in range(10))
    response = httpx.post(f"{guarded}/v1/messages", headers={"x-api-key": "one"}, timeout=60, json={
        "messages": [{"role": "user", "content": text}], "max_tokens": 2, "stream": True})
    events, _ = messages_schemas.check_stream(response.text)
    assert events[0] == {"type": "ping"}


# ==== Reasoning, text and calls in any order ==============================================


def story_of(kind, parser: tools.CallParser, text: str, size: int, reason: str = "stop", **of_kind):
    """The events and the unstreamed reply of a text that arrives in pieces; `kind` makes the story."""
    choice = types.SimpleNamespace(n_prompt=9, n_reused=4, n_generated=500, stopped_by="")
    model = types.SimpleNamespace(name="m", tokenize=lambda text, *_: text.split())
    wanted = types.SimpleNamespace(choices=[choice], model=model)

    def chunks():
        deltas = [{"role": "assistant", "content": "", "refusal": None}]
        for start in range(0, len(text), size):
            deltas += parser.feed(text[start : start + size])
        for delta in deltas + parser.finish():
            yield {"choices": [{"delta": delta, "logprobs": None, "finish_reason": None}]}
        yield {"choices": [{"delta": {}, "logprobs": None, "finish_reason": parser.finish_reason(reason)}]}

    story = kind(wanted=wanted, **of_kind)
    return [json.loads(json.dumps(event)) for event in story.events(chunks())], story.reply


REPLIES = [
    "Yes.", "<think>Hm.</think>Yes.", "<think>\nHm, hm.\n</think>\n\n", "",
    '<think>A clock!</think>I look.\n<tool_call>\n{"name": "get_time", "arguments": {"zone": "UTC"}}\n</tool_call>',
    '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_time", "arguments": {"zone": "CET"}}\n</tool_call>',
    '<tool_call>\n{"name": "get_time", "arguments": {"zo']


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("text", REPLIES)
def test_blocks_come_one_after_the_other_whatever_the_reply(text, size):
    parser = tools.CallParser(GENERIC, [{"type": "function", "function": {"name": "get_time"}}])
    body = messages.MessagesBody(messages=[])
    events, reply = story_of(messages.Message, parser, text, size, "length" if text.endswith("zo") else "stop", body=body)
    _, folded = messages_schemas.check_stream("".join(
        f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events))
    assert folded == messages_schemas.check_message(reply)
    kinds = [block["type"] for block in reply["content"]]
    assert kinds == ["thinking"] * ("<think>" in text) + ["text"] * ("Yes" in text or "I look" in text) \
        + ["tool_use"] * text.count("<tool_call>")
    assert reply["usage"]["output_tokens_details"]["thinking_tokens"] == (2 if "A clock" in text or "hm." in text else
                                                                         "<think>" in text)


def test_thinking_that_is_not_to_be_shown_is_not():
    """`display: omitted`: the block is there, with its signature and without its text."""
    body = messages.MessagesBody(messages=[], thinking=messages.Thinking("adaptive", display="omitted"))
    events, reply = story_of(messages.Message, tools.CallParser(GENERIC, []), "<think>Hm.</think>Yes.", 3, body=body)
    assert reply["content"][0] == {"type": "thinking", "thinking": "", "signature": messages.SIGNATURE}
    assert not any("thinking_delta" in json.dumps(event) for event in events)


def test_images_in_results_come_with_the_user_s_words():
    """Only users show images to a model, and nothing stands between two results."""
    turns, said = protocols.Turns(), protocols.Said
    turns.call("t", "f", "{}", "messages[0]")
    turns.call("u", "f", "{}", "messages[0]")
    turns.result("t", [said.text("Here", "a"), said.image("data:,", "b")], "messages[1]")
    turns.result("u", [said.image("data:,", "c")], "messages[1]")
    turns.say("user", [said.text("What is it?", "d")], "messages[1]")
    turns.call("v", "f", "{}", "messages[2]")
    turns.result("v", [said.image("data:,", "e")], "messages[3]")
    assert [message["role"] for message in turns.end().messages] == [
        "assistant", "tool", "tool", "user", "assistant", "tool", "user"]
    assert [part["type"] for part in turns.messages[3]["content"]] == ["image_url", "image_url", "text"]
    assert turns.messages[2]["content"] == "" and ("messages[3].content[1]", "c") in turns.places


def test_a_stop_sequence_is_told_to_whoever_asks():
    """engine.py: the one that ended the reply, whole, though none of it is sent."""
    stream = engine.TextStream(["END", "stop"])
    assert stream.feed(b"a ST") == ("a ST", "") and stream.feed(b" EN") == (" ", "")
    assert stream.feed(b"D!") == ("", "END")
