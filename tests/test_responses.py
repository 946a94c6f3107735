"""OpenAI's Responses API at /v1/responses: bodies, items, streams, what is kept, as its clients send and read them.

Every response and every event passes responses_schemas.py; the openai library reads the same ones.
"""

import asyncio
import base64
import functools
import json
import random
import sys
import threading
import types

import httpx
import numpy as np
import openai
import pydantic
import pytest

import messages_schemas
import openai_schemas
import responses_schemas
from conftest import ROOT, default_model, serve
from responses_schemas import OTHERS, check_response, check_stream, validate
from make_vision_model import COLORS, PRODUCT, SHAPES, pictures, png
from test_messages import CLAUDE_CODE, REPLIES, story_of
from test_limits import listening
from test_models import running_process

sys.path.insert(0, str(ROOT))
import server  # noqa: E402
from features import items, responses, telling, tools  # noqa: E402
from features.calls import GENERIC  # noqa: E402

GREEDY = {"temperature": 0, "max_output_tokens": 24}
TOOL = {"type": "function", "name": "get_time", "description": "Tell the time in a zone.", "parameters": {
    "type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"],
    "additionalProperties": False}}


@pytest.fixture(scope="module")
def ask(url):
    """POST to a path under /v1/responses; the response's JSON, of a stream the one that it folds to."""
    with httpx.Client(base_url=url, timeout=60) as client:
        def post(body: dict, path: str = "", status: int = 200, **fields):
            response = client.post(f"/v1/responses{path}", json={"input": "Hi", **body, **fields})
            assert response.status_code == status, response.text
            post.headers = response.headers
            if status >= 400:
                openai_schemas.check_reply("error", response.json())
                return response.json()["error"]
            if fields.get("stream") or body.get("stream"):
                post.events, whole = check_stream(response.text)
                return whole
            return response.json() if path else check_response(response.json())
        post.client = client
        yield post


@pytest.fixture(scope="module")
def client(url):
    """The openai library."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as each:
        yield each


def said(response: dict) -> dict:
    """What a response says, without its ids and its counts of what was cached."""
    output = [{name: value for name, value in item.items() if name not in ("id", "call_id")}
              for item in response["output"]]
    return {"output": output, **{name: response[name] for name in ("status", "incomplete_details", "text", "tools")},
            "output_tokens": response["usage"]["output_tokens"]}


@pytest.mark.parametrize("body", [
    {}, {"max_output_tokens": 3}, {"top_logprobs": 2, "include": ["message.output_text.logprobs"]},
    {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 80},
    {"tools": [TOOL], "tool_choice": {"type": "function", "name": "get_time"}, "max_output_tokens": 80},
    {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [
        {"type": "function", "name": "get_time"}]}, "max_output_tokens": 20},
    {"text": {"format": {"type": "json_schema", "name": "mood", "strict": True, "schema": {
        "type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"],
        "additionalProperties": False}}}}],
    ids=["text", "cut", "logprobs", "required", "named", "call cut", "schema"])
def test_a_stream_folds_to_the_unstreamed_response(ask, body):
    whole = ask({**GREEDY, **body})
    assert said(ask({**GREEDY, **body}, stream=True)) == said(whole)
    if body.get("max_output_tokens", 24) < 24:
        assert whole["status"] == "incomplete" and whole["output"][-1]["status"] == "incomplete"
    elif "tools" in body:
        [call] = whole["output"]
        assert call["name"] == "get_time" and json.loads(call["arguments"])["zone"] in ("UTC", "CET")
    elif "text" in body:
        assert isinstance(json.loads(whole["output"][0]["content"][0]["text"])["sure"], bool)
    elif "top_logprobs" in body:
        [part] = whole["output"][0]["content"]
        assert "".join(each["token"] for each in part["logprobs"]) == part["text"]
        assert all(len(each["top_logprobs"]) == 2 for each in part["logprobs"])
    assert whole["temperature"] == 0 and whole["top_p"] == 0.95  # the setting


def test_tokens_are_counted_without_generating(ask):
    body = {"instructions": "You know rivers.", "input": [{"role": "user", "content": "Name one."}], "tools": [TOOL]}
    counted = ask(body, "/input_tokens")
    validate(OTHERS["input_tokens"], counted)
    assert counted["input_tokens"] == ask({**body, **GREEDY})["usage"]["input_tokens"]


# ==== The openai library =================================================================


class Mood(pydantic.BaseModel):
    """How somebody feels."""

    sure: bool


def test_the_library_creates_streams_and_parses(client):
    asked = dict(model="gpt-4o-mini", input="Hi", temperature=0, max_output_tokens=24)
    whole = client.responses.create(**asked)
    assert whole.output_text and whole.status == "completed"
    with client.responses.stream(**asked) as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(texts) == stream.get_final_response().output_text == whole.output_text
    parsed = client.responses.parse(**asked, text_format=Mood)
    assert isinstance(parsed.output_parsed, Mood)
    counted = client.responses.input_tokens.count(model="gpt-4o-mini", input="Hi")
    assert counted.input_tokens == whole.usage.input_tokens


def test_the_library_goes_on_with_what_is_kept(client):
    first = client.responses.create(model="gpt-4o-mini", input="My name is Ann.", max_output_tokens=12, temperature=0)
    second = client.responses.create(model="gpt-4o-mini", input="Who am I?", max_output_tokens=12, temperature=0,
                                     previous_response_id=first.id)
    assert second.usage.input_tokens_details.cached_tokens > first.usage.input_tokens  # its reply, too
    assert client.responses.retrieve(second.id).output_text == second.output_text
    listed = [item.content[0].text for item in client.responses.input_items.list(second.id, order="asc")]
    assert listed == ["My name is Ann.", first.output_text, "Who am I?"]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    third = client.responses.create(model="gpt-4o-mini", input="Sure?", max_output_tokens=4,
                                    previous_response_id=second.id)  # it holds what it needs
    assert third.usage.input_tokens > second.usage.total_tokens


def test_the_library_calls_a_function_and_brings_its_result(client):
    """Both ways: items sent back, and a reference to what is kept."""
    asked = dict(model="gpt-4o-mini", tools=[TOOL], temperature=0, max_output_tokens=80)
    first = client.responses.create(**asked, input="What time is it?", tool_choice="required",
                                    parallel_tool_calls=False)
    [call] = first.output
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "12:00"}
    question = {"role": "user", "content": "What time is it?"}
    whole = [client.responses.create(**asked, tool_choice="none", **way) for way in (
        {"input": [question, call, result]}, {"input": [result], "previous_response_id": first.id},
        {"input": [question, {"type": "item_reference", "id": call.id}, result]})]
    assert len({reply.output_text for reply in whole}) == 1 and whole[0].output_text
    assert len({reply.usage.input_tokens for reply in whole}) == 1


def test_the_asynchronous_library_streams(url):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused") as each:
            stream = await each.responses.create(model="gpt-4o-mini", input="Hi", stream=True, max_output_tokens=8)
            return [event.type async for event in stream]
    kinds = asyncio.run(run())
    assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")


# ==== What is kept =======================================================================


def test_nothing_is_kept_where_that_is_not_wanted(ask):
    name = ask(GREEDY, store=False)["id"]
    assert ask.client.get(f"/v1/responses/{name}").status_code == 404
    error = ask(GREEDY, previous_response_id=name, status=404)
    assert error["param"] == "previous_response_id" and "is not kept" in error["message"]


def test_a_response_is_kept_before_its_stream_says_so(ask):
    """Whoever reads the last event may name it at once."""
    whole = ask(GREEDY, stream=True)
    assert ask.client.get(f"/v1/responses/{whole['id']}").json() == whole
    deleted = ask.client.delete(f"/v1/responses/{whole['id']}").json()
    validate(OTHERS["deleted"], deleted)
    assert ask.client.delete(f"/v1/responses/{whole['id']}").status_code == 404


def test_input_items_are_listed_in_pages(ask):
    name = ask({**GREEDY, "input": [{"role": "user", "content": f"Line {i}"} for i in range(5)]})["id"]

    def page(query: str = "", status: int = 200) -> dict:
        response = ask.client.get(f"/v1/responses/{name}/input_items{query}")
        assert response.status_code == status, response.text
        if status == 200:
            validate(OTHERS["items"], response.json())
        return response.json()
    whole = page()
    assert [item["content"] for item in whole["data"]] == [f"Line {i}" for i in (4, 3, 2, 1, 0)]
    first = page("?limit=2&order=asc")
    assert first["has_more"] and len(first["data"]) == 2
    rest = page(f"?order=asc&after={first['last_id']}")
    assert not rest["has_more"] and first["data"] + rest["data"] == whole["data"][::-1]
    for query in ("?limit=0", "?limit=101", "?limit=x", "?order=up", "?after=nobody"):
        assert page(query, 400)["error"]["param"] == query[1:].split("=")[0]
    for path in ("/input_items", f"/{name}/output_items", f"/{name}/input_items/x"):
        assert ask.client.get(f"/v1/responses{path}").status_code == 404


def a_response(name: str, size: int = 0) -> responses.Kept:
    message = {"id": f"msg_{name}", "type": "message", "text": "x" * size}
    return responses.Kept({"id": name, "output": [message]}, [])


def test_the_oldest_go_when_there_are_too_many_or_too_large(caplog):
    store = responses.Store(3, 1000)
    for name in "abcd":
        store.add(a_response(name))
    assert list(store.kept) == ["b", "c", "d"]
    with pytest.raises(server.ApiError, match="older than the 3 that are"):
        store.find("a")
    with pytest.raises(server.ApiError, match="the item .* is not kept"):
        store.find_item("msg_a", "input[0]")
    assert store.find_item("msg_d", "input[0]")["id"] == "msg_d"
    store.add(a_response("large", 800))
    assert list(store.kept) == ["d", "large"] and store.n_bytes <= 1000
    store.add(a_response("huge", 2000))
    assert list(store.kept) == ["d", "large"], "what cannot be kept costs no other its place"
    assert "huge is not kept" in caplog.text


def test_many_threads_keep_within_the_limits():
    store = responses.Store(10, 10**6)

    def work(number: int) -> None:
        for i in range(200):
            store.add(a_response(f"{number}-{i}"))
            if i % 3 == 0:
                try:
                    store.remove(f"{number}-{i}")
                except server.ApiError:
                    pass
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.kept) <= 10 and len(store.holders) == len(store.kept)
    assert store.n_bytes == sum(size for _, size in store.kept.values())


# ==== Bodies =============================================================================


def chat_of(body: dict) -> server.ChatBody:
    """The chat that a body becomes; `ignored` is what was left out."""
    house = server.load_features(["responses", "vision"])
    running = types.SimpleNamespace(house=house, config=house.Config())
    Running = type("Running", (), {"__init__": lambda self: self.__dict__.update(vars(running))})
    handler = types.SimpleNamespace(server=Running(), tally=server.Tally(), key="",
                                    receive=lambda *_: None)
    responses.start(handler.server)
    handler.read_fields = lambda cls, sent: server.Handler.read_fields(handler, cls, sent)
    read = server.read_object(house.type_of(responses.ResponsesBody), body, "", server.Reading(house))
    responses.receive(handler, read, None)
    chat_of.ignored, chat_of.body = handler.tally.ignored, read
    return read.chat


def test_a_conversation_of_an_agent_becomes_a_chat():
    """Reasoning, calls and results in their turns; kinds that cannot run here are named."""
    chat = chat_of({"instructions": "You help.", "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"role": "user", "content": "When?"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "In UTC."}]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "A clock!"}],
         "encrypted_content": None},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "content": [
            {"type": "output_text", "text": "I look.", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "now", "arguments": "{}", "namespace": "clock"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search"}},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "12:00"}]},
        {"role": "developer", "content": "Now answer."}],
        "tools": [TOOL, {"type": "web_search"}, {"type": "custom", "name": "apply_patch"},
                  {"type": "function", "name": "now", "parameters": None}, {"type": "namespace", "name": "clock", "tools": [
                      {"type": "function", "name": "now"}, {"type": "function", "name": "set"}, {"type": "custom", "name": "x"}]}]})
    assert [message.role for message in chat.messages] == ["system", "user", "assistant", "tool", "user"]
    system, user, assistant, result, last = chat.messages
    assert [part.text for part in system.content + user.content] == ["You help.", "Be brief.", "When?", "In UTC."]
    assert assistant.reasoning_content == "A clock!" and assistant.content[0].text == "I look."
    assert assistant.tool_calls[0].function.name == "clock__now"
    assert result.tool_call_id == "c1" and result.content[0].text == "12:00"
    assert last.content[0].text == "<system-reminder>\nNow answer.\n</system-reminder>"
    assert [tool.function.name for tool in chat.tools] == ["get_time", "now", "clock__now", "set"]
    assert chat_of.ignored == ["tools[1] (web_search)", "tools[2] (custom)", "tools[4].tools[2] (custom)",
                               "input[6] (web_search_call)"]
    assert chat_of.body.known.namespaces == {"clock__now": ("clock", "now"), "set": ("clock", "set")}


def test_a_call_of_a_namespace_is_told_with_it():
    """As its client knows the function, whatever the model calls it."""
    known = items.Tools([{"type": "namespace", "name": "clock", "tools": [
        {"type": "function", "name": "get_time"}]}], server.Reading(server.House()))
    text = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
    _, reply = told(text, 5, known=known)
    assert (reply["output"][0]["namespace"], reply["output"][0]["name"]) == ("clock", "get_time")


CODEX = {  # what `codex exec` 0.171 sends, in small, with other words
    "model": "gpt-4o-mini", "stream": True, "store": False, "input": [
        {"type": "message", "id": "msg_9604", "role": "developer", "content": [
            {"type": "input_text", "text": "You are an agent in a terminal."}]},
        {"type": "message", "id": "msg_9605", "role": "developer", "content": [
            {"type": "input_text", "text": "<skills>none</skills>"}, {"type": "input_text", "text": "<permissions/>"}]},
        {"type": "message", "id": "msg_9606", "role": "user", "content": [
            {"type": "input_text", "text": "<environment_context><cwd>/home</cwd></environment_context>"}]},
        {"type": "message", "id": "msg_9607", "role": "user", "content": [{"type": "input_text", "text": "Say hi"}]}],
    "tools": [
        {"type": "function", "name": "exec_command", "description": "Runs a command.", "strict": False, "parameters": {
            "type": "object", "properties": {"cmd": {"type": "string", "description": "The command."},
                                             "yield_time_ms": {"type": "number"}},
            "required": ["cmd"], "additionalProperties": False}},
        {"type": "namespace", "name": "multi_agent_v1", "description": "Agents.", "tools": [
            {"type": "function", "name": "close_agent", "description": "Closes.", "strict": False, "parameters": {
                "type": "object", "properties": {"target": {"type": "string"}}, "required": ["target"]}}]},
        {"type": "web_search", "external_web_access": False}],
    "tool_choice": "auto", "parallel_tool_calls": True, "reasoning": {"summary": "auto"},
    "include": ["reasoning.encrypted_content"], "prompt_cache_key": "01a2",
    "client_metadata": {"turn_id": "01a2", "session_id": "01a2"}}


def test_what_codex_sends_is_served(ask):
    whole = ask(CODEX, max_output_tokens=16)
    assert whole["output"] and whole["store"] is False and whole["model"] == "gpt-4o-mini"
    assert ask.headers["x-ignored-fields"] == "tools[2] (web_search)"


def test_a_prompt_that_does_not_fit_fails_where_its_client_looks(ask):
    """Codex makes a conversation shorter when a stream ends with this code; unstreamed it is a 400."""
    body = {**GREEDY, "input": "word " * 2000}
    error = ask(body, status=400)
    assert error["code"] == "context_length_exceeded" and error["param"] == "input"
    whole = ask(body, stream=True)
    assert whole["status"] == "failed" and whole["error"]["code"] == "context_length_exceeded"
    assert error["message"] == whole["error"]["message"]
    assert [event["type"] for event in ask.events] == ["response.created", "response.in_progress", "response.failed"]


@pytest.mark.parametrize("body, param, words", [
    ({"input": 3}, "input", "expected a string or a list"),
    ({"input": []}, "input", "must have at least 1 items"),
    ({"input": [{"type": 3}]}, "input[0].type", "expected a string, got 3"),
    ({"input": [{"type": "message", "role": "user"}]}, "input[0].content", "is required"),
    ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}, "input[0].content[0].type",
     "expected 'input_text'"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
     "input[0].content[0].image_url", "is required"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,AAAA"}]}]},
     "input[0].content[0]", "reads no images"),
    ({"input": [{"type": "item_reference", "id": "msg_no"}]}, "input[0].id", "is not kept"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "must be 1 to 64 letters"),
    ({"tools": [{"type": "web_search"}, {"type": "function", "name": "f", "parameters": {
        "type": "object", "properties": {"a": {"type": "strng"}}}}], "tool_choice": "required"},
     "tools[1].parameters.properties.a.type", "strng"),
    ({"tool_choice": {"type": "web_search"}}, "tool_choice.type", "expected 'function'"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "is required"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"uniqueItems": True}}}}, "text.format.schema.uniqueItems", "held"),
    ({"background": True}, "background", "is not supported"),
    ({"conversation": "conv_1"}, "conversation", "is not supported"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt", "is not supported"),
    ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
    ({"top_logprobs": 21}, "top_logprobs", "between 0 and 20")])
def test_a_refusal_names_what_the_client_sent(ask, body, param, words):
    status = 404 if "is not kept" in words else 400
    error = ask({**GREEDY, **body}, status=status)
    assert error["param"] == param and words in error["message"], error
    assert ask({**GREEDY, **body}, status=status, stream=True) == error


# ==== Reasoning, text and calls in any order ==============================================


def told(text: str, size: int, reason: str = "stop", known=None, summarizes: bool = False):
    """The events and the response of a text that arrives in pieces."""
    house = server.load_features(["responses"])
    body = house.type_of(responses.ResponsesBody)(input="Hi")
    body.chat = types.SimpleNamespace(temperature=0.7, top_p=0.95)
    reply = responses.begun(body, "m")
    parser = tools.CallParser(GENERIC, [{"type": "function", "function": {"name": "get_time"}}])
    known = known or items.Tools(None, server.Reading(server.House()))
    events, reply = story_of(telling.Response, parser, text, size, reason, reply=reply, tools=known,
                             summarizes=summarizes, keep=lambda _: None)
    dialect = telling.Events(reply, lambda _: None)
    return check_stream("".join(dialect.event(event).decode() for event in events))[0], check_response(reply)


@pytest.mark.parametrize("summarizes", [False, True])
@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize("text", REPLIES)
def test_items_come_one_after_the_other_whatever_the_reply(text, size, summarizes):
    events, reply = told(text, size, "length" if text.endswith("zo") else "stop", summarizes=summarizes)
    kinds = [item["type"] for item in reply["output"]]
    assert kinds == ["reasoning"] * ("<think>" in text) + ["message"] * ("Yes" in text or "I look" in text) \
        + ["function_call"] * text.count("<tool_call>")
    if "<think>" in text:
        item = reply["output"][0]
        assert bool(item["summary"]) == summarizes and item["content"][0]["text"] in ("Hm.", "Hm, hm.", "A clock!")
        assert reply["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


def test_a_fault_in_the_middle_of_a_stream_is_a_response_that_failed():
    """The stream says what became of it, and that is what is kept."""
    kept = []
    reply = {"id": "resp_1", "output": [], "error": None}
    dialect = telling.Events(reply, kept.append)
    assert dialect.sign("ping", None) == b": ping\n\n"  # nothing may come before response.created
    dialect.event({"type": "response.created", "response": reply})
    assert responses_schemas.parse(dialect.sign("ping", None).decode()) == [{"type": "keepalive", "sequence_number": 1}]
    [event] = responses_schemas.parse(dialect.error_event(server.ApiError(500, "a fault", code="engine_error")).decode())
    assert event["type"] == "response.failed" and event["sequence_number"] == 2
    assert event["response"]["error"] == {"code": "server_error", "message": "a fault"} and kept == [reply]
    [event] = responses_schemas.parse(responses.RESPONSES.error_event(server.ApiError(500, "a fault")).decode())
    validate(responses_schemas.VALIDATORS["error"], event)


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    """A server whose model thinks, since its prompts end in the tag, and whose streams ping soon."""
    template = tmp_path_factory.mktemp("thinking") / "template.jinja"
    template.write_text("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
                        "{% endfor %}<|im_start|>assistant\n<think>\n")
    with serve(CHAT_TEMPLATE_FILE=str(template), PING_INTERVAL="0.02", PARALLEL="1", N_CTX="2048",
               MAX_RESPONSES="1") as address:
        yield address


def test_reasoning_and_silence_over_the_wire(thinking):
    text = "\n".join(f"Line {i} of a long list of things." for i in range(10))
    response = httpx.post(f"{thinking}/v1/responses", timeout=60, json={
        "input": text, "stream": True, "reasoning": {"summary": "auto", "effort": "low"}, **GREEDY})
    events, whole = check_stream(response.text)
    assert events[2] == {"type": "keepalive", "sequence_number": 2}
    [item] = whole["output"]
    assert item["type"] == "reasoning" and item["summary"][0]["text"] == item["content"][0]["text"]
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] >= 20
    assert whole["reasoning"] == {"effort": "low", "summary": "auto"}


def test_the_setting_says_how_many_are_kept(thinking):
    names = [httpx.post(f"{thinking}/v1/responses", json={"input": "Hi", "max_output_tokens": 1}, timeout=60).json()["id"]
             for _ in range(2)]
    assert [httpx.get(f"{thinking}/v1/responses/{name}").status_code for name in names] == [404, 200]


# ==== Whatever comes ======================================================================

ODD = [None, True, 0, -1, 1e30, "", "x", "\ud800", [], {}, [[]], [None], {"type": None}, {"type": []}, {"type": "x"},
       [{"type": "text"}], [{"type": "function"}], [{"type": "namespace", "name": "n", "tools": [1]}],
       [{"type": "item_reference", "id": []}], [{"type": "reasoning", "summary": [{"type": "x"}]}], "a" * 5000]


def places_in(value, at: tuple = ()):
    """Every place in a body."""
    yield at
    for key, inner in (value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()):
        yield from places_in(inner, (*at, key))


def changed(body: dict, at: tuple, value) -> dict:
    """The body with another value at a place."""
    body = json.loads(json.dumps(body))
    inner = functools.reduce(lambda each, key: each[key], at[:-1], body)
    inner[at[-1]] = value
    return body


@pytest.mark.parametrize("path, body", [
    ("/v1/responses", CODEX | {"max_output_tokens": 1}), ("/v1/messages", CLAUDE_CODE | {"max_tokens": 1})],
    ids=["responses", "messages"])
def test_an_odd_value_anywhere_is_a_4xx_or_served(url, path, body):
    """What an agent sends, with something else in one place: never a 500, and the server lives."""
    chance = random.Random(7)
    body, places = {**body, "stream": False}, [at for at in places_in(body) if at and at != ("stream",)]
    with httpx.Client(base_url=url, timeout=60) as client:
        for _ in range(30):
            at, value = chance.choice(places), chance.choice(ODD)
            sent = json.dumps(changed(body, at, value))
            response = client.post(path, content=sent)
            assert response.status_code in (200, 400, 404), (at, value, response.text)
            if response.status_code != 200:
                error = response.json()
                assert (messages_schemas.check_error(error) if path == "/v1/messages" else
                        openai_schemas.check_reply("error", error) or error["error"])["message"]


@pytest.mark.parametrize("path, body, last", [
    ("/v1/responses", {"input": "Count.", "max_output_tokens": 900}, "response.failed"),
    ("/v1/messages", {"messages": [{"role": "user", "content": "Count."}], "max_tokens": 900}, "error")])
def test_a_stream_that_the_end_of_the_server_cuts_says_so(path, body, last):
    """In the protocol's own words, and then it ends."""
    started = [ROOT / "server.py", "--port", "0", "--model", default_model()]
    with running_process(*started, N_CTX="1024", DRAIN_SECONDS="0") as (process, address, _):
        asked = {**body, "stream": True}
        with httpx.stream("POST", f"{address}{path}", json=asked, timeout=60) as response:
            pieces = response.iter_text()
            text = next(pieces)
            while text.count("delta") < 4:
                text += next(pieces)
            process.terminate()
            text += "".join(pieces)
    events = responses_schemas.parse(text)
    assert events[-1]["type"] == last, events[-1]
    if path == "/v1/messages":
        assert messages_schemas.check_error(events[-1])["type"] == "overloaded_error"
    else:
        _, whole = check_stream(text[:text.index("event: response.output_item.added")] + text[text.rindex("event: "):].replace(
            f'"sequence_number":{len(events) - 1}', '"sequence_number":2'))
        assert whole["error"]["code"] == "server_error"


def test_an_engine_elsewhere_gets_both_protocols_as_they_came(url):
    """Relayed, as everything under /v1; the query of Claude Code's path is no trouble."""
    with serve(OPENAI_BASE_URL=f"{url}/v1", OPENAI_API_KEY="unused", MODEL_ALIASES="[own]") as address:
        for path, body in (("/v1/responses", {"input": "Hi", "max_output_tokens": 4, "temperature": 0}),
                           ("/v1/messages?beta=true", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4,
                                                       "temperature": 0})):
            texts = [httpx.post(f"{each}{path}", json={**body, "model": "gpt-4o-mini", "stream": True}, timeout=60).text
                     for each in (address, url)]
            check = check_stream if "responses" in path else messages_schemas.check_stream
            assert said_by(check(texts[0])[1]) == said_by(check(texts[1])[1])


def said_by(reply: dict) -> str:
    """The text of a response or a message."""
    return (reply["output"][0] if "output" in reply else reply)["content"][0]["text"]


def test_a_model_sees_what_both_protocols_show():
    """The colour of a shape, asked as each API has it; an image in a call's result, too."""
    image = pictures(np.random.default_rng(7), np.array([list(COLORS).index("green")]), np.array([len(SHAPES) - 1]))[0]
    data = base64.b64encode(png(image)).decode()
    part = {"type": "input_image", "image_url": f"data:image/png;base64,{data}", "detail": "auto"}
    block = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}
    ask = "What is the color?"
    call = {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}
    with serve(MMPROJ=str(PRODUCT), TEMPERATURE="0") as address:
        for given in ([{"role": "user", "content": [part, {"type": "input_text", "text": ask}]}],
                      [call, {"type": "function_call_output", "call_id": "c", "output": [part]},
                       {"role": "user", "content": ask}]):
            reply = httpx.post(f"{address}/v1/responses", json={"input": given, "max_output_tokens": 8}, timeout=60)
            assert "green" in said_by(check_response(reply.json())), reply.text
        reply = httpx.post(f"{address}/v1/messages", timeout=60, json={"max_tokens": 8, "messages": [
            {"role": "user", "content": [block, {"type": "text", "text": ask}]}]})
        assert "green" in said_by(messages_schemas.check_message(reply.json()))


def test_nobody_sees_what_another_key_keeps():
    """Not by its id, nor in a conversation; nor may they delete it."""
    store = responses.Store(3, 1000)
    store.add(responses.Kept({"id": "a", "output": [{"id": "msg_a"}]}, [], "one"))
    assert store.find("a", owner="one") and store.find_item("msg_a", "", "one")
    for call in (lambda: store.find("a", owner="two"), lambda: store.find("a"),
                 lambda: store.find_item("msg_a", "input[0]", "two"), lambda: store.remove("a", "two")):
        with pytest.raises(server.ApiError, match="is not kept"):
            call()
    with listening(api_keys=["aaaa", "bbbb"]) as running:
        responses.stores[running].add(responses.Kept({"id": "a", "output": []}, [], "aaaa"))
        for key, status in (("aaaa", 200), ("bbbb", 404)):
            assert httpx.get(f"{running.url}/v1/responses/a", headers={"x-api-key": key}).status_code == status
    with listening() as running:  # without keys an address is nobody's name
        responses.stores[running].add(responses.Kept({"id": "a", "output": []}, [], ""))
        assert httpx.get(f"{running.url}/v1/responses/a", headers={"x-api-key": "any"}).status_code == 200


def test_items_with_one_id_twice_are_told_apart(ask):
    """Else a list that goes on behind an id would never end."""
    [first, *others] = [item["id"] for item, _ in items.listed(
        [{"role": "user", "content": text, "id": "z"} for text in "abc"], None)]
    assert first == "z" and len({first, *others}) == 3
    for kind in ({}, 5, []):
        with pytest.raises(server.ApiError, match=r"input\[0\].type: expected a string"):
            items.listed([{"type": kind, "content": "a"}], None)


def test_one_call_is_asked_for_unless_several_are():
    """What is not said stays unsaid in the chat: else `required` would repeat itself in a generic form."""
    for sent, passed in (({}, None), ({"parallel_tool_calls": True}, True), ({"parallel_tool_calls": False}, False)):
        assert chat_of({"input": "a", **sent}).parallel_tool_calls is passed


def test_an_empty_schema_is_one_and_half_a_character_is_no_key():
    chat = chat_of({"input": "a", "text": {"format": {"type": "json_schema", "name": "x", "schema": {}}}})
    assert chat.response_format.json_schema.schema == {}
    with pytest.raises(server.ApiError, match="surrogate"):
        chat_of({"input": "a", "metadata": {"\ud800": "x"}})


def test_a_target_with_half_an_address_asks_for_its_query_only():
    kept = responses.Kept({"id": "a", "output": []}, [{"id": "z"}])
    with listening() as running:
        responses.stores[running].add(kept)
        sent: list[dict] = []
        responses.get_input_items(types.SimpleNamespace(
            server=running, key="", raw_requestline=b"GET http://[/v1/responses/a/input_items?limit=1 HTTP/1.1\r\n",
            send_json=sent.append), "a")
    assert [item["id"] for item in sent[0]["data"]] == ["z"]
