"""The OpenAI contract, feature by feature, with the official client and with raw HTTP.

Every reply and every chunk of every stream passes openai_schemas.py on its way to the test, by a
hook in the HTTP client (conftest.py); the tests check what the shapes cannot say.

    1  structured output        5  local extensions
    2  tools                    6  hostile grammars and schemas
    3  conversations            7  completions
    4  fields of a chat         8  embeddings, models, utilities

    9  the checks themselves
"""

import base64
import json
import math
import re
import struct
import threading
import time
from typing import Annotated, Literal

import openai
import pydantic
import pytest
from jsonschema import Draft202012Validator
from pydantic import Field

import openai_schemas

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
MODEL = "gpt-4o-mini"  # an alias of the default model
HI = [{"role": "user", "content": "Hi"}]  # greedy, the default model answers in about 10 tokens
HA = "ha ha ha ha ha ha ha ha"  # greedy, it goes on for ever
WORD = "My favourite word is"  # many tokens are likely next
GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def client(url, http):
    """The official client; its HTTP goes through the checks."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, http_client=http)


def post(http, path, body, status=200):
    """The parsed reply, which must have this status."""
    response = http.post(path, json=body)
    assert response.status_code == status, response.text[:500]
    return response.json()


def refused(http, path, body, *places) -> str:
    """400, and `param` begins with one of these places; the message."""
    error = post(http, path, body, 400)["error"]
    assert any((error["param"] or "").startswith(place) for place in places), error
    return error["message"]


def ask(http, text="Hi", **options) -> dict:
    """The one choice of a chat."""
    body = {"messages": [{"role": "user", "content": text}], **GREEDY, **options}
    return post(http, CHAT, body)["choices"][0]


def ask_streamed(http, text="Hi", **options) -> dict:
    """The same as a stream, folded by the checker."""
    return stream(http, CHAT, {"messages": [{"role": "user", "content": text}], **GREEDY,
                               **options})[0]


def stream(http, path, body) -> list[dict]:
    """The folded choices of a stream."""
    body = {**body, "stream": True}
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text[:500]
    return openai_schemas.check_stream(openai_schemas.KIND_OF_PATH[path],
                                       openai_schemas.parse_sse(response.text), body)


def complete(http, prompt, **options) -> str:
    """The text of a plain completion."""
    [choice] = post(http, COMPLETIONS, {"prompt": prompt, **GREEDY, **options})["choices"]
    return choice["text"]


def valid(schema, text):
    """The parsed text, which must have this JSON Schema."""
    value = json.loads(text)
    Draft202012Validator(schema).validate(value)
    return value


def obj(**properties) -> dict:
    """A closed object schema whose properties are all required."""
    return {"type": "object", "properties": properties, "required": list(properties),
            "additionalProperties": False}


# ==== 1. Structured output ================================================================


class Address(pydantic.BaseModel):
    city: Literal["Paris", "Rome", "Oslo"]
    number: Annotated[int, Field(ge=1, le=99)]


class Person(pydantic.BaseModel):
    name: Annotated[str, Field(min_length=1, max_length=12)]
    mood: Literal["good", "bad"] | None
    addresses: Annotated[list[Address], Field(min_length=1, max_length=2)]


def test_format_text_is_the_default(http):
    assert ask(http, response_format={"type": "text"})["message"] == ask(http)["message"]


def test_json_object_is_an_object_streamed_or_not(http):
    asked = dict(text='Answer only with the JSON object {"fruit": "apple"}.', max_tokens=300,
                 response_format={"type": "json_object"})
    for choice in (ask(http, **asked), ask_streamed(http, **asked)):
        assert choice["finish_reason"] == "stop"
        assert isinstance(json.loads(choice["message"]["content"]), dict)


def test_parse_gives_the_pydantic_model(client):
    """What the OpenAI examples do: a class in, an instance of it out."""
    reply = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": "Describe a person."}],
        response_format=Person, temperature=1, seed=1, max_tokens=250)
    person = reply.choices[0].message.parsed
    assert isinstance(person, Person) and 1 <= len(person.addresses) <= 2


def test_the_streaming_helper_gives_the_pydantic_model(client):
    with client.chat.completions.stream(
            model=MODEL, messages=[{"role": "user", "content": "Describe an address."}],
            response_format=Address, temperature=1, seed=2, max_tokens=100) as events:
        kinds = {event.type for event in events}
        final = events.get_final_completion()
    assert {"content.delta", "content.done"} <= kinds
    assert isinstance(final.choices[0].message.parsed, Address)


SCHEMAS = {
    "nested": obj(a=obj(b=obj(c={"type": "boolean"})), d={"type": "null"}),
    "enum": obj(x={"enum": ["red", "green", 3, None, 'say "hi"\\']}),
    "const": obj(version={"const": "v1\n"}, flag={"const": True}),
    "anyOf": obj(x={"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9},
                              obj(y={"type": "boolean"})]}),
    "oneOf": obj(x={"oneOf": [{"const": 1}, {"const": "one"}]}),
    "types": obj(x={"type": ["boolean", "null"]}),
    "defs": {**obj(home={"$ref": "#/$defs/place"}, work={"$ref": "#/$defs/place"}),
             "$defs": {"place": obj(city={"enum": ["Rome", "Oslo"]})}},
    "array": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 3},
    "array of objects": obj(rows={"type": "array", "minItems": 1, "maxItems": 2,
                                  "items": obj(on={"type": "boolean"})}),
    "tuple": obj(pair={"type": "array", "prefixItems": [{"type": "boolean"}, {"const": 1}],
                       "minItems": 2, "maxItems": 2, "items": False}),
    "pattern": obj(plate={"type": "string", "pattern": r"^[A-Z]{2}-\d{3}$"}),
    "lengths": obj(word={"type": "string", "minLength": 3, "maxLength": 8}),
    "range": obj(x={"type": "integer", "minimum": -5, "maximum": 12},
                 y={"type": "integer", "exclusiveMinimum": 99, "exclusiveMaximum": 1050}),
    "optional": {"type": "object", "additionalProperties": False, "required": ["b"],
                 "properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}}},
    "empty object": {"type": "object", "properties": {}, "additionalProperties": False},
    "false": {"type": "object", "additionalProperties": False, "required": ["a"],
              "properties": {"a": {"type": "boolean"}, "never": False}},
    "description only": obj(note={"type": "string", "description": 'any "note"', "maxLength": 9}),
    "odd names": obj(**{"größe": {"type": "boolean"}, 'a "b" \\': {"const": "漢字 🌧"}}),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_json_schema_holds_at_temperature_1_streamed_or_not(http, name):
    """The smallest model, made wild, cannot leave the schema."""
    asked = dict(text="Fill in the form.", temperature=1, max_tokens=150, response_format={
        "type": "json_schema",
        "json_schema": {"name": "form", "strict": True, "schema": SCHEMAS[name]}})
    for choice in (ask(http, seed=3, **asked), ask_streamed(http, seed=4, **asked)):
        valid(SCHEMAS[name], choice["message"]["content"])
        assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("schema", [{}, {"description": "anything"}, obj(x=True), obj(x={})])
def test_a_schema_that_allows_anything_gives_json(http, schema):
    """`true` and {} are schemas, too. A value of any kind may be long: ask for its beginning."""
    choice = ask(http, max_tokens=40, json_schema=schema)
    assert choice["message"]["content"].lstrip()[0] in '{["tfn-0123456789'
    if choice["finish_reason"] == "stop":
        valid(schema, choice["message"]["content"])


def test_the_streamed_json_equals_the_unstreamed(http):
    asked = {"response_format": {"type": "json_schema", "json_schema": {
        "name": "form", "schema": SCHEMAS["lengths"]}}, "max_tokens": 60}
    streamed, whole = ask_streamed(http, **asked), ask(http, **asked)
    assert streamed["message"]["content"] == whole["message"]["content"]


def test_json_cut_by_max_tokens_ends_in_length(http):
    choice = ask(http, max_tokens=3, response_format={
        "type": "json_schema", "json_schema": {"name": "form", "schema": SCHEMAS["nested"]}})
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("part, words", [
    ({"not": {"type": "integer"}}, ["when", "not"]),
    ({"if": {"type": "integer"}, "then": {"const": 1}}, ["when", "if"]),
    ({"$ref": "#/$defs/nowhere"}, ["when", "nowhere"]),
    ({"$ref": "https://example.com/schema.json"}, ["when", "example.com"]),
    ({"type": "strin"}, ["when", "strin"]),
    ({"type": "string", "pattern": "^(a"}, ["when", "pattern"]),
    ({"type": "string", "pattern": r"^(a)\1$"}, ["when", "pattern"]),
    ({"enum": []}, ["when", "enum"]),
    ({"type": "integer", "minimum": 5, "maximum": 4}, ["when", "imum"]),
])
def test_a_schema_that_cannot_be_honoured_is_refused_at_its_property(http, part, words):
    """Never a guess: 400, with the path of the property in the message."""
    message = refused(http, CHAT, {"messages": HI, "max_tokens": 4, "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "form", "schema": obj(event=obj(when=part))}}}, "response_format")
    assert all(word in message for word in words), message


@pytest.mark.parametrize("wrong, param", [
    ({"type": "yaml"}, "response_format"),
    ({}, "response_format"),
    ("json", "response_format"),
    ({"type": "json_schema"}, "response_format"),
    ({"type": "json_schema", "json_schema": {"schema": {}}}, "response_format.json_schema"),
    ({"type": "json_schema", "json_schema": {"name": "a", "schema": 5}},
     "response_format.json_schema"),
])
def test_a_wrong_response_format_is_refused_by_name(http, wrong, param):
    refused(http, CHAT, {"messages": HI, "max_tokens": 4, "response_format": wrong}, param)


# ==== 2. Tools ============================================================================


def tool(name, strict=None, **properties) -> dict:
    function = {"name": name, "description": f"Call {name}.", "parameters": obj(**properties)}
    return {"type": "function",
            "function": function if strict is None else {**function, "strict": strict}}


WEATHER = tool("get_weather", city={"type": "string", "maxLength": 12},
               unit={"enum": ["celsius", "fahrenheit"]})
CLOCK = tool("get_time", zone={"enum": ["UTC", "CET"]})
TOOLS = {"tools": [WEATHER, CLOCK], "max_tokens": 120}
FREE = {**TOOLS, "max_tokens": 24}  # where a text may come, of which the beginning tells enough
QUESTION = "What is the weather in Paris?"


def named(name) -> dict:
    return {"type": "function", "function": {"name": name}}


def calls_of(choice, *tools) -> list[tuple[str, dict]]:
    """(name, arguments) of each call; all validate against the tool they name."""
    parameters = {t["function"]["name"]: t["function"]["parameters"] for t in tools}
    functions = [call["function"] for call in choice["message"].get("tool_calls", ())]
    return [(f["name"], valid(parameters[f["name"]], f["arguments"])) for f in functions]


def test_tool_choice_none_never_calls(http):
    for choice in (ask(http, QUESTION, **FREE, tool_choice="none"),
                   ask_streamed(http, QUESTION, **FREE, tool_choice="none")):
        assert "tool_calls" not in choice["message"] and choice["message"]["content"]


def test_tool_choice_auto_leaves_it_to_the_model(http):
    """Text, or calls that validate; `auto` is the default when there are tools."""
    for extra in ({}, {"tool_choice": "auto"}):
        choice = ask(http, QUESTION, **FREE, **extra)
        assert choice["message"]["content"] or calls_of(choice, WEATHER, CLOCK)


@pytest.mark.parametrize("seed", [1, 2])
def test_tool_choice_required_always_calls(http, seed):
    choice = ask(http, QUESTION, **TOOLS, tool_choice="required", temperature=1, seed=seed,
                 parallel_tool_calls=False)
    assert choice["finish_reason"] == "tool_calls"
    assert len(calls_of(choice, WEATHER, CLOCK)) == 1 and not choice["message"]["content"]


@pytest.mark.slow
def test_required_may_call_several_tools(http):
    """Whatever their number, each call has an id of its own and validates. Whether one more call
    comes is a near tie for this model: a reply may alternate the two tools until its length. Then
    all calls but the one that was cut off are held to the same."""
    body = {"messages": [{"role": "user", "content": "What are the weather and the time?"}],
            **TOOLS, "max_tokens": 400, "tool_choice": "required", "parallel_tool_calls": True,
            "temperature": 1, "seed": 4, "n": 8}
    choices = post(http, CHAT, body)["choices"]
    for choice in choices:
        calls, is_cut = choice["message"]["tool_calls"], choice["finish_reason"] == "length"
        assert is_cut or choice["finish_reason"] == "tool_calls"
        assert not choice["message"]["content"] and len({call["id"] for call in calls}) == len(calls)
        whole = {"message": {"tool_calls": calls[:-1] if is_cut else calls}}
        assert calls_of(whole, WEATHER, CLOCK)
    assert sum(choice["finish_reason"] == "tool_calls" for choice in choices) >= 4
    assert max(len(choice["message"]["tool_calls"]) for choice in choices) > 1


def test_a_named_function_is_called_and_validates_at_temperature_1(http):
    body = {"messages": [{"role": "user", "content": QUESTION}], **TOOLS, "temperature": 1,
            "seed": 5, "n": 4, "tool_choice": named("get_weather")}
    for choice in post(http, CHAT, body)["choices"]:
        [(name, arguments)] = calls_of(choice, WEATHER)
        assert name == "get_weather" and set(arguments) == {"city", "unit"}
        assert choice["finish_reason"] == "tool_calls"


def test_allowed_tools_narrow_the_choice(http):
    """The other tools stay in the prompt, so that its cache holds, but are not called."""
    choice = ask(http, QUESTION, **TOOLS, parallel_tool_calls=False, tool_choice={
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [named("get_time")]}})
    assert [name for name, _ in calls_of(choice, CLOCK)] == ["get_time"]
    either = ask(http, QUESTION, **FREE, tool_choice={
        "type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named("get_time")]}})
    assert either["message"]["content"] or calls_of(either, CLOCK)


@pytest.mark.parametrize("choice", [
    named("get_weather"),
    "required",
    {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named("get_time")]}},
])
def test_streamed_calls_equal_the_unstreamed(http, choice):
    """Joined, the fragments are the call. Ids are random, all else is the same."""
    def without_ids(reply):
        return [call["function"] for call in reply["message"]["tool_calls"]]
    asked = dict(text=QUESTION, **TOOLS, tool_choice=choice, parallel_tool_calls=False)
    streamed, whole = ask_streamed(http, **asked), ask(http, **asked)
    assert without_ids(streamed) == without_ids(whole)
    assert streamed["finish_reason"] == whole["finish_reason"] == "tool_calls"
    assert not streamed["message"]["content"] and not whole["message"]["content"]


def test_a_call_cut_by_max_tokens_ends_in_length(http):
    """The connection lives, and nobody takes half a call for a whole one."""
    asked = dict(text=QUESTION, tools=[WEATHER], max_tokens=8, tool_choice=named("get_weather"))
    assert ask(http, **asked)["finish_reason"] == "length"
    assert ask_streamed(http, **asked)["finish_reason"] == "length"


def test_streams_of_several_choices_keep_their_calls_apart(http):
    body = {"messages": HI, **TOOLS, "temperature": 1, "seed": 6, "n": 3,
            "tool_choice": named("get_time")}
    choices = stream(http, CHAT, body)
    assert [calls_of(choice, CLOCK)[0][0] for choice in choices] == ["get_time"] * 3
    assert len({choice["message"]["tool_calls"][0]["id"] for choice in choices}) == 3


@pytest.mark.parametrize("strict", [True, False])
def test_strict_functions_validate(http, strict):
    """Constrained either way: a call that does not validate helps nobody."""
    dice = tool("roll", strict, sides={"type": "integer", "minimum": 4, "maximum": 20})
    choice = ask(http, "Roll!", tools=[dice], tool_choice=named("roll"), max_tokens=60,
                 temperature=1, seed=7)
    [(_, arguments)] = calls_of(choice, dice)
    assert 4 <= arguments["sides"] <= 20


def test_a_tool_without_parameters_is_called_with_an_empty_object(http):
    ping = {"type": "function", "function": {"name": "ping"}}
    choice = ask(http, tools=[ping], tool_choice="required", parallel_tool_calls=False,
                 max_tokens=60)
    function = choice["message"]["tool_calls"][0]["function"]
    assert (function["name"], json.loads(function["arguments"])) == ("ping", {})


def test_the_clients_tool_helpers_parse_the_arguments(client):
    class GetTime(pydantic.BaseModel):
        zone: Literal["UTC", "CET"]

    asked = dict(model=MODEL, messages=HI, max_tokens=60, temperature=0, tool_choice="required",
                 tools=[openai.pydantic_function_tool(GetTime)], parallel_tool_calls=False)
    reply = client.chat.completions.parse(**asked)
    with client.chat.completions.stream(**asked) as events:
        streamed = events.get_final_completion()
    for completion in (reply, streamed):
        [call] = completion.choices[0].message.tool_calls
        assert isinstance(call.function.parsed_arguments, GetTime)


@pytest.mark.parametrize("change, param", [
    ({"tools": [{"type": "function"}]}, "tools[0]"),
    ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, "tools[0]"),
    ({"tools": [{"type": "function", "function": {"name": "n" * 65}}]}, "tools[0]"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]}, "tools[0]"),
    ({"tools": "get_weather"}, "tools"),
    ({"tool_choice": "sometimes"}, "tool_choice"),
    ({"tool_choice": named("get_moon")}, "tool_choice"),
    ({"tool_choice": {"type": "function"}}, "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {
        "mode": "auto", "tools": [named("get_moon")]}}}, "tool_choice"),
    ({"tools": None, "tool_choice": "required"}, "tool_choice"),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
])
def test_wrong_tools_are_refused_by_name(http, change, param):
    refused(http, CHAT, {"messages": HI, **TOOLS, "max_tokens": 4, **change}, param)


def test_a_tools_schema_that_cannot_be_honoured_names_tool_and_property(http):
    bad = tool("book_flight", when={"not": {"type": "integer"}})
    bad["function"]["strict"] = True
    message = refused(http, CHAT, {"messages": HI, "tools": [WEATHER, bad], "max_tokens": 4,
                                   "tool_choice": named("book_flight")}, "tools[1]")
    assert "when" in message and "not" in message


FUNCTIONS = {"functions": [WEATHER["function"], CLOCK["function"]], "max_tokens": 120}


def test_the_deprecated_functions_answer_in_their_own_shape(http):
    """`function_call` in the message and as finish_reason, streamed or not; no tool_calls."""
    asked = dict(text=QUESTION, **FUNCTIONS, function_call={"name": "get_weather"})
    streamed, whole = ask_streamed(http, **asked), ask(http, **asked)
    for choice in (streamed, whole):
        function = choice["message"]["function_call"]
        valid(WEATHER["function"]["parameters"], function["arguments"])
        assert function["name"] == "get_weather" and "tool_calls" not in choice["message"]
        assert choice["finish_reason"] == "function_call"
    assert streamed["message"]["function_call"] == whole["message"]["function_call"]


def test_function_call_none_and_auto(http):
    few = {**FUNCTIONS, "max_tokens": 24}
    assert ask(http, QUESTION, **few, function_call="none")["message"]["content"]
    message = ask(http, QUESTION, **few, function_call="auto")["message"]
    assert message["content"] or message["function_call"]["name"] in ("get_weather", "get_time")
    refused(http, CHAT, {"messages": HI, **FUNCTIONS, "function_call": {"name": "get_moon"}},
            "function_call")


# ==== 3. Conversations ====================================================================


def call(arguments='{"city": "Paris", "unit": "celsius"}') -> dict:
    return {"id": "call_1", "type": "function",
            "function": {"name": "get_weather", "arguments": arguments}}


def rendered(http, messages) -> str:
    return post(http, "/apply-template", {"messages": messages})["prompt"]


@pytest.mark.parametrize("turns", [
    [{"role": "assistant", "content": None, "tool_calls": [call()]},
     {"role": "tool", "tool_call_id": "call_1", "content": "18 degrees and rain"}],
    [{"role": "assistant", "tool_calls": [call()]},
     {"role": "tool", "tool_call_id": "call_1",
      "content": [{"type": "text", "text": "18 degrees and rain"}]}],
    [{"role": "assistant", "content": "Let me look.", "tool_calls": [call()]},
     {"role": "tool", "tool_call_id": "call_1", "content": "18 degrees and rain"}],
    [{"role": "assistant", "content": None,
      "function_call": {"name": "get_weather", "arguments": "{}"}},
     {"role": "function", "name": "get_weather", "content": "18 degrees and rain"}],
])
def test_a_whole_tool_conversation_is_history(http, turns):
    """The call and its result are in the prompt, with tools in the request or without."""
    messages = [{"role": "user", "content": QUESTION}, *turns]
    prompt = rendered(http, messages)
    assert "get_weather" in prompt and "18 degrees and rain" in prompt
    for tools in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        reply = post(http, CHAT, {"messages": messages, **GREEDY, **tools})
        assert reply["choices"][0]["message"]["content"]
    following = [*messages, {"role": "assistant", "content": "18."}, *HI]
    assert post(http, CHAT, {"messages": following, **GREEDY})["usage"]["prompt_tokens"] > 40


def test_the_reply_of_one_turn_is_the_history_of_the_next(client):
    """The message object goes back unchanged, null fields and all, as in OpenAI's examples."""
    asked = dict(model=MODEL, tools=[WEATHER], temperature=0)
    messages = [{"role": "user", "content": QUESTION}]
    message = client.chat.completions.create(
        messages=messages, tool_choice="required", parallel_tool_calls=False, max_tokens=120,
        **asked).choices[0].message
    [made] = message.tool_calls
    assert "city" in json.loads(made.function.arguments)
    messages += [message, {"role": "tool", "tool_call_id": made.id, "content": "Rain."}]
    final = client.chat.completions.create(messages=messages, tool_choice="none", max_tokens=24,
                                           **asked)
    assert final.choices[0].message.content


@pytest.mark.parametrize("turn, param", [
    ({"role": "assistant"}, "messages[1]"),
    ({"role": "assistant", "content": None}, "messages[1]"),
    ({"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}, "messages[1].tool_calls"),
    ({"role": "assistant", "content": None, "tool_calls": "get_weather"},
     "messages[1].tool_calls"),
    ({"role": "tool", "content": "18"}, "messages[1]"),
    ({"role": "tool", "tool_call_id": 5, "content": "18"}, "messages[1].tool_call_id"),
    ({"role": "function", "content": "18"}, "messages[1]"),
    ({"role": "user", "content": None}, "messages[1].content"),
])
def test_a_wrong_turn_is_refused_by_its_place(http, turn, param):
    refused(http, CHAT, {"messages": [*HI, turn], "max_tokens": 4}, param)


def test_reasoning_is_accepted_in_history(http):
    """Clients send back what they got, reasoning_content too."""
    messages = [*HI, {"role": "assistant", "content": "Hello.", "reasoning_content": "A greeting."},
                *HI]
    response = http.post(CHAT, json={"messages": messages, **GREEDY})
    assert response.status_code == 200 and "x-ignored-fields" not in response.headers
    messages[1]["reasoning_content"] = 5
    refused(http, CHAT, {"messages": messages}, "messages[1].reasoning_content")


def test_a_refusal_part_and_a_name_are_accepted_in_history(http):
    messages = [{"role": "user", "name": "Ann", "content": [{"type": "text", "text": "Hi"}]},
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "I won't."}]}, *HI]
    assert post(http, CHAT, {"messages": messages, **GREEDY})["choices"][0]["message"]["content"]


# ==== 4. Fields of a chat =================================================================


def test_logprobs_carry_bytes_that_add_up_to_the_content(http):
    """Each token with its bytes, so that half an emoji can be put together; streamed the same."""
    asked = dict(text="Write an emoji: 🌧", logprobs=True, top_logprobs=2, max_tokens=20)
    whole, streamed = ask(http, **asked), ask_streamed(http, **asked)
    entries = whole["logprobs"]["content"]
    joined = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert joined.decode(errors="ignore") == whole["message"]["content"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    assert [entry["bytes"] for entry in streamed["logprobs"]["content"]] == [
        entry["bytes"] for entry in entries]


def test_no_logprobs_unasked(http):
    assert ask(http)["logprobs"] is None


def test_three_choices_in_a_stream(client):
    """Typed chunks; each choice has its role, its text and its end."""
    chunks = list(client.chat.completions.create(
        model=MODEL, messages=HI, n=3, stream=True, temperature=1, seed=1, max_tokens=6,
        stream_options={"include_usage": True}))
    texts = ["".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]
                     if chunk.choices[0].index == index) for index in range(3)]
    assert all(texts) and chunks[-1].usage.completion_tokens >= 3


def test_more_choices_than_slots(http):
    reply = post(http, CHAT, {"messages": HI, "n": 9, "max_tokens": 3, "temperature": 1})
    assert [choice["index"] for choice in reply["choices"]] == list(range(9))


NO_EFFECT = {"metadata": {"team": "a"}, "store": False, "user": "ann", "safety_identifier": "x1",
             "prompt_cache_key": "k", "service_tier": "auto"}


def test_fields_without_effect_are_accepted_and_known(client, http):
    """Known, so not in the header that names what nobody knows."""
    response = http.post(CHAT, json={"messages": HI, **GREEDY, **NO_EFFECT})
    assert response.status_code == 200 and "x-ignored-fields" not in response.headers
    typed = client.chat.completions.create(model=MODEL, messages=HI, **GREEDY, **NO_EFFECT)
    assert typed.choices[0].message.content == response.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("name, wrong", [
    ("metadata", "a"), ("store", "no"), ("user", 5), ("safety_identifier", 5),
    ("prompt_cache_key", []), ("service_tier", 5), ("reasoning_effort", 5)])
def test_fields_without_effect_have_a_type_all_the_same(http, name, wrong):
    refused(http, CHAT, {"messages": HI, name: wrong}, name)


@pytest.mark.parametrize("effort", ["minimal", "low", "medium", "high"])
def test_reasoning_effort_is_accepted(http, effort):
    response = http.post(CHAT, json={"messages": HI, "max_tokens": 2, "reasoning_effort": effort})
    assert response.status_code == 200 and "x-ignored-fields" not in response.headers


@pytest.mark.parametrize("name, value", [
    ("audio", {"voice": "alloy", "format": "wav"}),
    ("modalities", ["text", "audio"]),
    ("web_search_options", {"search_context_size": "low"}),
])
def test_what_a_text_model_cannot_do_is_refused_by_name(http, name, value):
    assert name in refused(http, CHAT, {"messages": HI, name: value}, name)


def test_a_picture_is_refused_at_its_place(http):
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    refused(http, CHAT, {"messages": [{"role": "user", "content": [part]}]},
            "messages[0].content[0]")


# ==== 5. Local extensions =================================================================
# Each has an effect that can be seen, and a wrong value that is refused by name.


@pytest.mark.parametrize("narrow", [
    {"top_k": 1},
    {"min_p": 1},
])
def test_samplers_that_leave_only_the_likeliest_are_greedy(http, narrow):
    """However hot, one candidate is no choice."""
    wild = {"temperature": 1.5, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 1, "max_tokens": 20}
    assert complete(http, WORD, **{**wild, **narrow}) == complete(http, WORD, max_tokens=20)


@pytest.mark.parametrize("wide", [
    {"top_k": 0, "temperature": 2},
    {"min_p": 0, "temperature": 2},
])
def test_the_same_samplers_opened_are_not(http, wide):
    wild = {"temperature": 1.5, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 1, "max_tokens": 20}
    assert complete(http, WORD, **{**wild, **wide}) != complete(http, WORD, max_tokens=20)


def test_ignore_eos_goes_on_to_max_tokens(http):
    assert ask(http, max_tokens=24)["finish_reason"] == "stop"
    assert ask(http, max_tokens=24, ignore_eos=True)["finish_reason"] == "length"


def test_min_tokens_puts_off_the_end(http):
    def n_tokens(**options):
        return post(http, CHAT, {"messages": HI, "temperature": 0, "max_tokens": 60, **options}
                    )["usage"]["completion_tokens"]
    short = n_tokens()
    assert n_tokens(min_tokens=short + 5) >= short + 5


def test_a_grammar_is_kept(http):
    grammar = 'root ::= "yes" | "no, " [0-9]+ "!"'
    for seed in range(3):
        choice = ask(http, grammar=grammar, temperature=1.5, seed=seed)
        text = choice["message"]["content"]
        if choice["finish_reason"] == "stop":
            assert text == "yes" or text.startswith("no, ") and text.endswith("!"), text
        else:
            assert text.startswith("no, ") and text[4:].isdigit(), text
    assert complete(http, "Is it?", grammar='root ::= "maybe"') == "maybe"


def test_a_bare_json_schema_is_kept(http):
    """llama-server's field, for chats and plain completions."""
    schema = obj(colour={"enum": ["red", "blue"]})
    valid(schema, ask(http, json_schema=schema, max_tokens=60)["message"]["content"])
    valid(schema, complete(http, "A colour:", json_schema=schema, max_tokens=60))


def test_two_formats_at_once_are_refused(http):
    both = {"grammar": 'root ::= "a"', "json_schema": {"type": "null"}}
    refused(http, CHAT, {"messages": HI, **both}, *both)


def n_prompt(http, messages=HI, **options) -> int:
    return post(http, CHAT, {"messages": messages, "max_tokens": 1, **options}
                )["usage"]["prompt_tokens"]


def test_add_generation_prompt_false_leaves_the_last_turn_as_it_is(http):
    assert n_prompt(http, add_generation_prompt=False) < n_prompt(http)


def test_continue_final_message_goes_on_where_it_ends(http):
    """No end of turn between the beginning that was sent and the reply."""
    messages = [*HI, {"role": "assistant", "content": "One, two, three,"}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert n_prompt(http, messages, **options) < n_prompt(http, messages,
                                                          add_generation_prompt=False)
    reply = post(http, CHAT, {"messages": messages, **GREEDY, **options})
    assert "four" in reply["choices"][0]["message"]["content"]


def test_continue_final_message_goes_on_with_text_only(http):
    """What cannot go on is refused, and nothing of the message is dropped."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for last in ({"tool_calls": [call]}, {"content": "I call", "tool_calls": [call]},
                 {"reasoning_content": "Hm, I think"}):
        refused(http, CHAT, {"messages": [*HI, {"role": "assistant", **last}], "max_tokens": 2,
                             "continue_final_message": True}, "continue_final_message")
    prompt = post(http, "/apply-template", {"continue_final_message": True, "messages": [
        *HI, {"role": "assistant", "refusal": "I cannot, because"}]})["prompt"]
    assert prompt.endswith("I cannot, because")


def test_chat_template_kwargs_reach_the_template(start_server, tmp_path):
    """A template of our own, which writes what it is given."""
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.role }}: {{ message.content }}\n"
                        "{% endfor %}{{ tone }}assistant:")
    other = start_server(CHAT_TEMPLATE_FILE=str(template), PARALLEL="1", N_CTX="256")
    plain = n_prompt(other)
    assert n_prompt(other, chat_template_kwargs={"tone": "Speak like a friendly pirate. "}) > plain
    assert rendered(other, HI) == "user: Hi\nassistant:"


def test_cache_prompt_false_computes_the_prompt_again(http):
    def cached(**options):
        reply = post(http, CHAT, {"messages": HI, "max_tokens": 1, **options})
        return reply["usage"]["prompt_tokens_details"]["cached_tokens"]
    n_cached = (cached(), cached(), cached(cache_prompt=False))
    assert n_cached[1] > 10 and n_cached[2] == 0


def test_timings_tell_what_was_computed(http):
    """llama-server's numbers add up to the usage, in the reply and in a stream's last chunk."""
    body = {"messages": HI, **GREEDY}
    whole = post(http, CHAT, body)
    assert_timings(whole["timings"], whole["usage"])
    plain = post(http, COMPLETIONS, {"prompt": HA, **GREEDY})
    assert_timings(plain["timings"], plain["usage"])
    text = http.post(CHAT, json={**body, "stream": True,
                                 "stream_options": {"include_usage": True}}).text
    last = openai_schemas.parse_sse(text)[-1]
    assert_timings(last["timings"], last["usage"])


def assert_timings(timings, usage):
    assert timings["cache_n"] == usage["prompt_tokens_details"]["cached_tokens"]
    assert timings["cache_n"] + timings["prompt_n"] == usage["prompt_tokens"]
    assert timings["predicted_n"] == usage["completion_tokens"] and timings["predicted_ms"] > 0
    per_second = 1000 * timings["predicted_n"] / timings["predicted_ms"]
    assert math.isclose(timings["predicted_per_second"], per_second, rel_tol=0.2)


@pytest.mark.parametrize("name, wrong", [
    ("top_k", 1.5), ("min_p", 1.1), ("ignore_eos", "yes"), ("min_tokens", -1), ("grammar", 5),
    ("grammar", 'root ::= "a'), ("json_schema", 5), ("json_schema", {"type": "strin"}),
    ("chat_template_kwargs", "tone"), ("add_generation_prompt", "no"),
    ("continue_final_message", 1.5), ("cache_prompt", "no")])
def test_a_wrong_extension_is_refused_by_name(http, name, wrong):
    refused(http, CHAT, {"messages": HI, "max_tokens": 2, name: wrong}, name)


# ==== 6. Hostile grammars and schemas =====================================================

DEEP = {"type": "object", "properties": {}}
for _ in range(300):
    DEEP = {"type": "object", "properties": {"a": DEEP}, "required": ["a"]}

# What no server can honour, ...
IMPOSSIBLE = {
    "left recursion": {"grammar": "root ::= root"},
    "indirect left recursion": {"grammar": 'root ::= a "x"\na ::= b\nb ::= root'},
    "no root": {"grammar": 'start ::= "a"'},
    "undefined rule": {"grammar": 'root ::= "a" missing'},
    "blank": {"grammar": " "},
    "a huge number": {"grammar": 'root ::= "a"{99999999999999999999999}'},
    "open parentheses": {"grammar": "root ::= " + "(" * 60_000},
    "a null character": {"grammar": 'root ::= "a\0b" c'},
    "a bad escape": {"grammar": r'root ::= "\xZZ"'},
    "an open range": {"grammar": "root ::= [z-a"},
    "a reversed repetition": {"grammar": 'root ::= "a"{5,2}'},  # llama.cpp counts down from 2**64
    "half a character": {"json_schema": {"enum": ["\ud800"]}},
    "infinity": '{"json_schema": {"type": "integer", "minimum": 1e400}}',
    "a list that is none": {"json_schema": {"allOf": [{"required": 1}, {"required": 2}]}},
    "a schema that is only itself": {"json_schema": {"$ref": "#"}},
    "a ring of references": {"json_schema": {
        "$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}},
}
# ... and what it may refuse or honour, as long as it neither dies nor takes for ever.
HEAVY = {
    "recursion that doubles with each character": {
        "grammar": 'root ::= "a" root "b" | "a" root "c"'},
    "a huge repetition": {"grammar": 'root ::= "a"{1000000000}'},
    "recursion that may double": {"grammar": 'root ::= ("a" root "b" | "a" root "c" | "")'},
    "arrays that begin alike": {"json_schema": {"$ref": "#/$defs/t", "$defs": {"t": {"anyOf": [
        {"type": "array", "items": {"$ref": "#/$defs/t"}, "minItems": 1, "maxItems": n}
        for n in (1, 2)]}}}},
    "a nullable repetition repeated": {"json_schema": {
        "type": "string", "pattern": "^((a?){0,40}){0,40}$"}},
    "an enum of 10,000": {"json_schema": {"enum": [f"value {i}" for i in range(10_000)]}},
    "repetitions of repetitions": {"grammar": 'root ::= (((("ab"{90}){90}){90}){90}){90}'},
    "deep parentheses": {"grammar": "root ::= " + "(" * 60_000 + '"a"' + ")" * 60_000},
    "empty loops": {"grammar": 'root ::= (("a"*)*)*'},
    "a long text": {"grammar": 'root ::= "' + "a" * 2_000_000 + '"'},
    "many rules": {"grammar": "root ::= r1\n" + "".join(
        f'r{i} ::= r{i + 1} | "{i}"\n' for i in range(1, 60_000)) + 'r60000 ::= "x"'},
    "a regex of regexes": {"json_schema": {"type": "string", "pattern":
                                           "^((((a{1,99}){1,99}){1,99}){1,99}){1,99}$"}},
    "a deep regex": {"json_schema": {"type": "string",
                                     "pattern": "^" + "(" * 5000 + "a" + ")" * 5000 + "$"}},
    "references that double": {"json_schema": {
        "$ref": "#/$defs/d0", "$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2}
                                        for i in range(40)} | {"d40": {"type": "null"}}}},
    "a huge array": {"json_schema": {"type": "array", "minItems": 10**9, "items": {"const": 1}}},
    "arrays of arrays": {"json_schema": {
        "type": "array", "minItems": 999, "maxItems": 999, "items": {
            "type": "array", "minItems": 999, "maxItems": 999, "items": {
                "type": "array", "minItems": 999, "maxItems": 999, "items": {"const": 1}}}}},
    "a schema 300 deep": {"json_schema": DEEP},
}


@pytest.mark.parametrize("name", [*IMPOSSIBLE, *HEAVY])
def test_a_hostile_grammar_or_schema_neither_kills_nor_holds_the_server(http, name):
    """Refused by name within seconds, or honoured; the next request is none the wiser."""
    sent = (IMPOSSIBLE | HEAVY)[name]
    sent = sent if isinstance(sent, str) else json.dumps(sent)  # as text: 1e400 is not Python's
    body = '{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20, ' + sent[1:]
    field = re.match(r'{"(\w+)"', sent)[1]
    began = time.monotonic()
    response = http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert time.monotonic() - began < 10
    assert response.status_code == 400 or (name in HEAVY and response.status_code == 200)
    assert response.status_code == 200 or response.json()["error"]["param"].startswith(field)
    assert complete(http, HA, max_tokens=2)


@pytest.mark.parametrize("path", [CHAT, "/apply-template"])
def test_a_schema_nested_deeper_than_python_goes_is_refused(http, path):
    """JSON that can be read may still be too deep for what works on it."""
    deep = '{"properties": {"a": ' * 450 + "{}" + "}}" * 450
    tool = '{"type": "function", "function": {"name": "f", "parameters": ' + deep + "}}"
    body = '{"messages": [{"role": "user", "content": "Hi"}], "tools": [' + tool + "]}"
    response = http.post(path, content=body)
    assert response.status_code == 400 and "deep" in response.json()["error"]["message"]


def test_template_variables_reach_the_template_or_are_refused(http):
    """What the server sets itself cannot be set beside it; the usual switch can, twice even."""
    for name in ("messages", "tools", "add_generation_prompt", "self", "raise_exception"):
        error = refused(http, CHAT, {"messages": HI, "max_tokens": 1,
                                     "chat_template_kwargs": {name: 1}}, "chat_template_kwargs")
        assert name in error
    post(http, CHAT, {"messages": HI, "max_tokens": 1, "reasoning_effort": "low",
                      "chat_template_kwargs": {"enable_thinking": True}})


def test_a_call_cut_by_a_stop_sequence_does_not_end_in_tool_calls(http):
    """Whoever reads `tool_calls` parses the arguments."""
    choice = ask(http, tools=[WEATHER], tool_choice="required", stop=["}"], max_tokens=60)
    assert choice["finish_reason"] == "stop"


def test_a_forced_form_does_not_end_inside_the_reasoning(http):
    """A reply that never leaves its reasoning is cut off, not done."""
    messages = [*HI, {"role": "assistant", "content": "<think>"}]
    reply = post(http, CHAT, {"messages": messages, **GREEDY, "continue_final_message": True,
                              "response_format": {"type": "json_object"}, "max_tokens": 30})
    assert reply["choices"][0]["finish_reason"] == "length"


def test_too_many_replies_to_one_request_are_refused(http):
    refused(http, COMPLETIONS, {"prompt": ["hi"] * 2048, "n": 128, "max_tokens": 1}, "n")
    refused(http, COMPLETIONS, {"prompt": ["hi"] * 600, "max_tokens": 1}, "prompt")


def test_an_endless_stop_sequence_is_refused(http):
    """Each choice keeps tables of the size of its stop sequences."""
    refused(http, COMPLETIONS, {"prompt": "hi", "stop": ["ab" * 501], "max_tokens": 1}, "stop")


def test_a_large_but_honest_max_length_compiles(http):
    """maxLength: 100000 is what code generators write; it must not become 100,000 rules."""
    schema = obj(text={"type": "string", "maxLength": 100_000}, ok={"type": "boolean"})
    assert ask(http, json_schema=schema, max_tokens=8)["finish_reason"] in ("stop", "length")


# ==== 7. Completions ======================================================================

FOX, RAIN = "The quick brown fox", "When it rains, it"


@pytest.fixture(scope="module")
def tokens(http):
    def tokenize(text):
        return post(http, "/tokenize", {"content": text})["tokens"]
    return tokenize


def test_a_prompt_is_a_string_or_its_tokens(http, tokens):
    for prompt in ([FOX], tokens(FOX), [tokens(FOX)]):
        assert complete(http, prompt, max_tokens=5) == complete(http, FOX, max_tokens=5)


@pytest.mark.parametrize("as_tokens", [False, True])
def test_each_prompt_of_a_list_has_its_choices_in_order(http, tokens, as_tokens):
    """Prompt after prompt, n choices each, numbered through; usage counts all."""
    prompts = [tokens(FOX), tokens(RAIN)] if as_tokens else [FOX, RAIN]
    reply = post(http, COMPLETIONS, {"prompt": prompts, "n": 2, "temperature": 0,
                                     "max_tokens": 4})
    alone = [complete(http, prompt, max_tokens=4) for prompt in (FOX, RAIN)]
    texts = [choice["text"] for choice in reply["choices"]]
    assert texts == [alone[0], alone[0], alone[1], alone[1]]
    assert reply["usage"]["prompt_tokens"] == len(tokens(FOX)) + len(tokens(RAIN))
    assert reply["usage"]["completion_tokens"] == 16


def test_a_stream_of_several_prompts_folds_to_the_unstreamed_reply(http):
    body = {"prompt": [FOX, RAIN], "n": 2, "temperature": 0, "max_tokens": 4, "logprobs": 1,
            "stream_options": {"include_usage": True}}
    folded = stream(http, COMPLETIONS, body)
    del body["stream_options"]
    whole = post(http, COMPLETIONS, body)["choices"]
    assert [choice["text"] for choice in folded] == [choice["text"] for choice in whole]
    assert [choice["logprobs"]["tokens"] for choice in folded] == [
        choice["logprobs"]["tokens"] for choice in whole]


def test_echo_begins_with_the_prompt(http, tokens):
    for prompt in (FOX, tokens(FOX)):
        assert complete(http, prompt, echo=True) == FOX + complete(http, FOX)
    [choice] = stream(http, COMPLETIONS, {"prompt": FOX, "echo": True, **GREEDY})
    assert choice["text"] == FOX + complete(http, FOX)


def test_echo_with_logprobs_scores_a_text(http, tokens):
    """What evaluation harnesses do: max_tokens 0, and the prompt's own logprobs. Nothing comes
    before the first token, so it has none."""
    body = {"prompt": FOX, "echo": True, "logprobs": 1, "max_tokens": 0, "temperature": 0}
    reply = post(http, COMPLETIONS, body)
    [choice] = reply["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"] == FOX == "".join(logprobs["tokens"])
    assert len(logprobs["tokens"]) == len(tokens(FOX)) == reply["usage"]["prompt_tokens"]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
    assert all(top for top in logprobs["top_logprobs"][1:])
    lengths = [len("".join(logprobs["tokens"][:i])) for i in range(len(logprobs["tokens"]))]
    assert logprobs["text_offset"] == lengths
    assert reply["usage"]["completion_tokens"] == 0 and choice["finish_reason"] == "length"


def test_echo_with_logprobs_goes_on_into_the_reply(http):
    """One list of tokens over prompt and reply; a likely text scores higher than an odd one."""
    body = {"prompt": FOX, "echo": True, "logprobs": 0, "max_tokens": 4, "temperature": 0}
    [choice] = post(http, COMPLETIONS, body)["choices"]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]

    def score(text):
        [scored] = post(http, COMPLETIONS, {**body, "prompt": text, "max_tokens": 0})["choices"]
        return sum(scored["logprobs"]["token_logprobs"][1:])
    assert score("The sky is blue.") > score("The sky is seven.")


def test_the_echoed_scores_are_those_of_generating(http, tokens):
    """The logprob of a token is the same, whether it was sampled or given."""
    [made] = post(http, COMPLETIONS, {"prompt": FOX, "logprobs": 0, **GREEDY, "max_tokens": 5}
                  )["choices"]
    [given] = post(http, COMPLETIONS, {"prompt": FOX + made["text"], "logprobs": 0, "echo": True,
                                       "max_tokens": 0})["choices"]
    n = len(tokens(FOX))
    assert given["logprobs"]["tokens"][n:] == made["logprobs"]["tokens"]
    assert given["logprobs"]["token_logprobs"][n:] == pytest.approx(
        made["logprobs"]["token_logprobs"], abs=0.2)


def test_best_of_returns_the_likeliest(http):
    """The best of four is one of the four that n gives, by the mean logprob of its tokens; the
    usage counts the others, too."""
    body = {"prompt": WORD, "temperature": 1, "seed": 3, "max_tokens": 4, "logprobs": 0}
    four = post(http, COMPLETIONS, {**body, "n": 4})["choices"]
    reply = post(http, COMPLETIONS, {**body, "best_of": 4})
    [best] = reply["choices"]

    def mean(choice):
        return sum(choice["logprobs"]["token_logprobs"]) / len(choice["logprobs"]["tokens"])
    assert best["text"] == max(four, key=mean)["text"]
    assert reply["usage"]["completion_tokens"] == 16
    two = post(http, COMPLETIONS, {**body, "best_of": 4, "n": 2})["choices"]
    assert two[0]["text"] == best["text"]


def test_best_of_prefers_a_text_to_none(http):
    """A stop sequence at once leaves nothing to weigh, which once counted as certain."""
    body = {"prompt": "The capital of France is", "temperature": 1, "seed": 5, "max_tokens": 8,
            "stop": [" a", " the", " in"]}
    texts = [choice["text"] for choice in post(http, COMPLETIONS, {**body, "n": 16})["choices"]]
    [best] = post(http, COMPLETIONS, {**body, "best_of": 16})["choices"]
    assert any(texts) and best["text"] in texts and best["text"]


def test_offsets_are_those_of_the_text_also_within_characters(http):
    """A character of several tokens: each stands where it begins, and what follows behind it."""
    [choice] = post(http, COMPLETIONS, {"prompt": "A 😀 b 漢字 c", "echo": True, "logprobs": 0,
                                        "temperature": 0, "max_tokens": 4})["choices"]
    logprobs = choice["logprobs"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"]):
        assert token.startswith("bytes:") or choice["text"].startswith(token, offset), (token, offset)
    assert any(token.startswith("bytes:") for token in logprobs["tokens"])


@pytest.mark.parametrize("change, param", [
    ({"best_of": 2, "n": 3}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"best_of": 128, "prompt": ["a"] * 5}, "best_of"),
    ({"best_of": "two"}, "best_of"),
    ({"suffix": " the end."}, "suffix"),
    ({"suffix": "word " * 1100}, "suffix"),
    ({"echo": "yes"}, "echo"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": ["a", 5]}, "prompt"),
    ({"prompt": [[5], "a"]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [49152]}, "prompt"),
    ({"prompt": [5, 10**12]}, "prompt"),
    ({"prompt": [[5], [2**31]]}, "prompt"),
    ({"prompt": [["a"]]}, "prompt"),
    ({"prompt": ["a", "word " * 1100]}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
])
def test_a_wrong_completion_is_refused_by_name(http, change, param):
    refused(http, COMPLETIONS, {"prompt": FOX, "max_tokens": 2, **change}, param)


def test_legacy_logprobs_have_the_offsets_of_their_tokens_streamed_or_not(client):
    asked = dict(model=MODEL, prompt="Once upon a time", max_tokens=8, temperature=0, logprobs=2)
    choice = client.completions.create(**asked).choices[0]
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset[2] == len("".join(choice.logprobs.tokens[:2]))
    assert all(len(top) == 2 for top in choice.logprobs.top_logprobs)
    streamed = list(client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == choice.text
    offsets = [offset for chunk in streamed if chunk.choices[0].logprobs
               for offset in chunk.choices[0].logprobs.text_offset]
    assert offsets == choice.logprobs.text_offset


def test_the_client_types_completions(client):
    reply = client.completions.create(model=MODEL, prompt=[FOX, RAIN], max_tokens=3, echo=True,
                                      logprobs=1, temperature=0)
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert reply.choices[1].text.startswith(RAIN)
    assert reply.choices[0].logprobs.token_logprobs[0] is None
    texts = ["", ""]
    for chunk in client.completions.create(model=MODEL, prompt=[FOX, RAIN], max_tokens=3, echo=True,
                                           temperature=0, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in reply.choices]


# ==== 8. Embeddings, models, utilities ====================================================


def embed(http, given, **options) -> list[list[float]]:
    reply = post(http, EMBEDDINGS, {"input": given, **options})
    return [entry["embedding"] for entry in reply["data"]]


def dot(a, b) -> float:
    """The cosine, for vectors of length 1."""
    return sum(x * y for x, y in zip(a, b, strict=True))


def test_embeddings_take_strings_and_tokens_alone_and_in_lists(http, tokens):
    [expected] = embed(http, FOX)
    [other] = embed(http, RAIN)
    assert dot(expected, expected) == pytest.approx(1, abs=1e-4)
    for given in ([FOX], tokens(FOX), [tokens(FOX)]):
        [vector] = embed(http, given)
        assert dot(vector, expected) > 0.999
    for given in ([FOX, RAIN, FOX], [tokens(FOX), tokens(RAIN), tokens(FOX)]):
        first, second, third = embed(http, given)
        assert dot(first, expected) > 0.999 and dot(third, expected) > 0.999
        assert dot(second, other) > 0.999 > dot(second, expected)


def test_base64_holds_the_same_floats(http):
    """Little-endian float32, as the official clients ask for unasked."""
    [floats], [encoded] = (embed(http, FOX, encoding_format=name) for name in ("float", "base64"))
    data = base64.b64decode(encoded)
    assert struct.unpack(f"<{len(data) // 4}f", data) == pytest.approx(floats, abs=1e-3)


def test_the_client_decodes_embeddings(client):
    reply = client.embeddings.create(model=MODEL, input=["a", "b"])
    same = client.embeddings.create(model=MODEL, input=["a", "b"], encoding_format="float")
    for one, two in zip(reply.data, same.data, strict=True):
        assert one.embedding == pytest.approx(two.embedding, abs=1e-3)


def test_dimensions_shorten_and_keep_unit_length(http):
    [full], [short] = embed(http, FOX), embed(http, FOX, dimensions=64)
    assert len(short) == 64 and dot(short, short) == pytest.approx(1, abs=1e-4)
    norm = math.sqrt(dot(full[:64], full[:64]))
    assert short == pytest.approx([x / norm for x in full[:64]], abs=0.02)


def test_similar_texts_are_closer_than_different_ones(http):
    cat, kitten, market = embed(http, [
        "The cat sleeps on the sofa.", "A cat is sleeping on the couch.",
        "Stock prices fell by 3% after the quarterly report."])
    assert dot(cat, kitten) > dot(cat, market)


def test_usage_counts_the_tokens(http, tokens):
    reply = post(http, EMBEDDINGS, {"input": [FOX, RAIN], "user": "ann"})
    assert reply["usage"]["prompt_tokens"] == len(tokens(FOX)) + len(tokens(RAIN))


def test_more_texts_than_slots(http):
    vectors = embed(http, [f"Text number {i}." for i in range(11)])
    assert len({round(vector[0], 9) for vector in vectors}) > 5


@pytest.mark.parametrize("change, param", [
    ({"input": ""}, "input"), ({"input": []}, "input"), ({"input": ["a", ""]}, "input"),
    ({"input": [[]]}, "input"), ({"input": [["a"]]}, "input"), ({"input": [[[1]]]}, "input"),
    ({"input": None}, "input"), ({"input": {}}, "input"), ({"input": [1.5]}, "input"),
    ({"input": [-1]}, "input"), ({"input": [49152]}, "input"), ({"input": [[1], [2**31]]}, "input"),
    ({"input": ["a", 1]}, "input"), ({"dimensions": 0}, "dimensions"),
    ({"dimensions": 100_000}, "dimensions"), ({"dimensions": "few"}, "dimensions"),
    ({"encoding_format": "hex"}, "encoding_format"),
])
def test_wrong_embeddings_are_refused_by_name(http, change, param):
    refused(http, EMBEDDINGS, {"input": "a", **change}, param)


@pytest.mark.parametrize("given", ["word " * 1100, ["a", "word " * 1100], [5] * 1100, [[5] * 1100]])
def test_a_text_too_long_to_embed_is_400_with_its_code(http, given):
    """Never cut unasked."""
    error = post(http, EMBEDDINGS, {"input": given}, 400)["error"]
    assert error["code"] == "context_length_exceeded" and error["param"].startswith("input")


def test_generation_goes_on_beside_embeddings(http):
    """Both are right: the vectors are those of a quiet server, the stream ends as it should."""
    quiet = embed(http, [FOX, RAIN])
    ended = []
    beside = threading.Thread(target=lambda: ended.append(
        ask_streamed(http, max_tokens=60, ignore_eos=True)["finish_reason"]))
    beside.start()
    for _ in range(5):
        for vector, expected in zip(embed(http, [FOX, RAIN]), quiet, strict=True):
            assert dot(vector, expected) > 0.999
    beside.join()
    assert ended == ["length"]


def test_models_tell_what_they_are(client, http):
    """The classic list of permissions, and what a client needs to know of the model."""
    model = http.get("/v1/models").json()["data"][0]["id"]
    for name in (model, MODEL):
        entry = http.get(f"/v1/models/{name}").json()
        assert entry["id"] == name and entry["root"] == model
        assert len(entry["permission"]) == 1 and entry["max_model_len"] == 1024
        meta = entry["meta"]
        assert meta["n_ctx"] == 1024 and meta["n_ctx_train"] == 8192
        assert 130e6 < meta["n_params"] < 140e6 and 90e6 < meta["size"] < 100e6
        assert "Q4_1" in json.dumps(meta), "the quantisation"
        assert all(isinstance(name, str) for name in meta["capabilities"])
    typed = client.models.retrieve(MODEL)
    assert typed.permission[0]["object"] == "model_permission" and typed.parent is None


def test_tokens_there_and_back(http):
    text = "Grüße, 漢字 and 🌧!"
    listed = post(http, "/tokenize", {"content": text, "add_special": False})["tokens"]
    assert post(http, "/detokenize", {"tokens": listed})["content"] == text
    assert post(http, "/tokenize", {"content": ""})["tokens"] == []
    assert post(http, "/detokenize", {"tokens": []})["content"] == ""


def test_pieces_are_text_or_the_bytes_of_a_part_of_a_character(http):
    text = "Rain 漢 🌧"
    listed = post(http, "/tokenize", {"content": text, "with_pieces": True})["tokens"]
    plain = post(http, "/tokenize", {"content": text})["tokens"]
    assert [entry["id"] for entry in listed] == plain
    pieces = [entry["piece"] for entry in listed]
    assert any(isinstance(piece, list) for piece in pieces)
    assert b"".join(piece.encode() if isinstance(piece, str) else bytes(piece)
                    for piece in pieces).decode() == text


def test_special_tokens_are_read_as_such_unless_told_otherwise(http):
    ids = [post(http, "/tokenize", {"content": "<|im_end|>", **extra})["tokens"]
           for extra in ({}, {"parse_special": True}, {"parse_special": False})]
    assert len(ids[0]) == 1 and ids[0] == ids[1] and len(ids[2]) > 1


def test_the_applied_template_is_the_prompt_of_the_chat(http, tokens):
    messages = [{"role": "system", "content": "Be brief."}, *HI]
    prompt = rendered(http, messages)
    assert "Be brief." in prompt and prompt.endswith("<|im_start|>assistant\n")
    assert len(tokens(prompt)) == n_prompt(http, messages)


@pytest.mark.parametrize("path, body, param", [
    ("/tokenize", {}, "content"), ("/tokenize", {"content": 5}, "content"),
    ("/tokenize", {"content": "a", "with_pieces": "yes"}, "with_pieces"),
    ("/tokenize", {"content": "a", "add_special": 2}, "add_special"),
    ("/detokenize", {}, "tokens"), ("/detokenize", {"tokens": "a"}, "tokens"),
    ("/detokenize", {"tokens": [-1]}, "tokens"), ("/detokenize", {"tokens": [49152]}, "tokens"),
    ("/detokenize", {"tokens": [10**30]}, "tokens"), ("/detokenize", {"tokens": ["5"]}, "tokens"),
    ("/apply-template", {}, "messages"), ("/apply-template", {"messages": []}, "messages"),
    ("/apply-template", {"messages": [{"role": "king"}]}, "messages[0]"),
])
def test_wrong_utilities_are_refused_by_name(http, path, body, param):
    refused(http, path, body, param)


@pytest.mark.parametrize("method, path, status", [
    ("GET", "/v1/models/nope", 404), ("GET", "/v1/nothing", 404), ("GET", CHAT, 405),
    ("POST", "/v1/models", 405), ("GET", EMBEDDINGS, 405)])
def test_every_error_has_the_one_shape(http, method, path, status):
    assert http.request(method, path).status_code == status


# ==== 9. The checks themselves ============================================================
# A check that lets everything pass would make all of the above worthless.

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1_700_000_000,
        "model": "m"}


def chunk(delta, finish_reason=None, index=0, **more) -> dict:
    return {**HEAD, "choices": [{"index": index, "delta": delta, "logprobs": None,
                                 "finish_reason": finish_reason}], **more}


FIRST, TEXT, LAST = (chunk({"role": "assistant", "content": ""}), chunk({"content": "a"}),
                     chunk({}, "stop"))
COUNTS = {**HEAD, "choices": [],
          "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}


def call_delta(index=0, **more) -> dict:
    return chunk({"tool_calls": [{"index": index, **more}]})


BEGUN = call_delta(id="c", type="function", function={"name": "f", "arguments": ""})
MORE = call_delta(function={"arguments": "{}"})
CALLED = chunk({}, "tool_calls")


def test_a_right_stream_passes():
    [choice] = openai_schemas.check_stream("chat.completion", [FIRST, TEXT, TEXT, LAST])
    assert choice["message"]["content"] == "aa" and choice["finish_reason"] == "stop"
    [choice] = openai_schemas.check_stream("chat.completion", [FIRST, BEGUN, MORE, CALLED])
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}


@pytest.mark.parametrize("chunks", [
    [TEXT, LAST],  # no role
    [FIRST, FIRST, LAST],  # the role again
    [chunk({"role": "assistant", "content": "a"}), LAST],  # text beside the role
    [FIRST, TEXT],  # no end
    [FIRST, LAST, LAST],  # two ends
    [FIRST, LAST, TEXT],  # text after the end
    [FIRST, chunk({"content": "a"}, "stop")],  # text in the end
    [FIRST, TEXT, LAST, COUNTS],  # usage unasked
    [FIRST, LAST, chunk({"role": "assistant", "content": ""}, index=1)],  # a choice too many
    [FIRST, {**TEXT, "id": "chatcmpl-2"}, LAST],  # another id
    [FIRST, chunk({"text": "a"}), LAST],  # a field of another endpoint
    [FIRST, BEGUN, MORE, LAST],  # a call that ends in `stop`
    [FIRST, MORE, CALLED],  # arguments of nothing
    [FIRST, BEGUN, CALLED],  # arguments that are no JSON
    [FIRST, BEGUN, BEGUN, MORE, CALLED],  # a call begun twice
    [FIRST, TEXT, CALLED],  # tool_calls without one
    [FIRST, call_delta(id="c", type="function", function={"name": "f", "arguments": "{}"}),
     CALLED],  # arguments beside the name
])
def test_a_wrong_stream_does_not(chunks):
    with pytest.raises((AssertionError, ValueError)):
        openai_schemas.check_stream("chat.completion", chunks)


@pytest.mark.parametrize("text", [
    "", "data: {}\n\n", "data: [DONE]\n\ndata: {}\n\n", "data: {}\ndata: [DONE]\n\n",
    "data: [DONE]\n", '{"a": 1}', "data: [DONE]\n\ndata: [DONE]\n\n"])
def test_a_broken_event_stream_does_not_parse(text):
    """A missing or doubled [DONE], or lines that are no events."""
    with pytest.raises((AssertionError, ValueError)):
        openai_schemas.parse_sse(text)
