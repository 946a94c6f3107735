"""What clients of other servers ask for, by HTTP: a form by any name is honoured or a 400.

The small model at temperature 1.5 writes what it is held to, and nothing else.
"""

import json
import re
import sys

import pytest
from jsonschema import Draft202012Validator

import conftest
from test_samplers import serving

sys.path.insert(0, str(conftest.ROOT))
import engine  # noqa: E402
import server  # noqa: E402
from features import structured  # noqa: E402

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Say something."}]
ANIMAL = {"type": "object", "additionalProperties": False, "required": ["legs", "size"], "properties": {
    "legs": {"type": "integer", "minimum": 0, "maximum": 8}, "size": {"enum": ["small", "large"]}}}
NUMBER = {"type": "integer", "minimum": 1, "maximum": 12}
GBNF, LARK = 'root ::= "a" | "b" [0-9]', 'start: "a" | "b" DIGIT\nDIGIT: /[0-9]/'


def post(http, path: str, **fields):
    start = {"messages": MESSAGES} if path == CHAT else {"prompt": "Once"}
    return http.post(path, json={**start, "max_tokens": 300, "temperature": 1, "seed": 1, **fields})


def write(http, path: str, **fields) -> str:
    response = post(http, path, **fields)
    assert response.status_code == 200, response.text
    assert "x-ignored-fields" not in response.headers
    [choice] = response.json()["choices"]
    assert choice["finish_reason"] == "stop"
    return choice["message"]["content"] if path == CHAT else choice["text"]


def refusal(http, path: str = CHAT, **fields) -> dict:
    response = post(http, path, **fields)
    assert response.status_code == 400, response.text
    return response.json()["error"]


ASKED = {  # name: fields, a pattern for the reply; None: JSON of the schema ANIMAL
    "vLLM, JSON": ({"structured_outputs": {"json": ANIMAL}}, None),
    "vLLM, JSON as text": ({"structured_outputs": {"json": json.dumps(ANIMAL)}}, None),
    "vLLM, a pattern": ({"structured_outputs": {"regex": r"[ab]{2}\d"}}, r"[ab]{2}\d"),
    "vLLM, a choice": ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
    "vLLM, GBNF": ({"structured_outputs": {"grammar": GBNF}}, "a|b[0-9]"),
    "vLLM, Lark": ({"structured_outputs": {"grammar": LARK}}, "a|b[0-9]"),
    "vLLM, white space": ({"structured_outputs": {"json": ANIMAL, "whitespace_pattern": ""}}, r'\{"legs":\d,"size":"\w+"\}'),
    "vLLM, no white space": ({"structured_outputs": {"json": ANIMAL, "disable_any_whitespace": True}},
                             r'\{"legs":\d,"size":"\w+"\}'),
    "older vLLM, JSON": ({"guided_json": ANIMAL, "guided_decoding_backend": "outlines"}, None),
    "older vLLM, JSON as text": ({"guided_json": json.dumps(ANIMAL)}, None),
    "older vLLM, a pattern": ({"guided_regex": r"[ab]{2}\d"}, r"[ab]{2}\d"),
    "older vLLM, a choice": ({"guided_choice": ["yes", "no"]}, "yes|no"),
    "older vLLM, GBNF": ({"guided_grammar": GBNF}, "a|b[0-9]"),
    "older vLLM, Lark": ({"guided_grammar": LARK}, "a|b[0-9]"),
    "older vLLM, white space": ({"guided_json": ANIMAL, "guided_whitespace_pattern": ""}, r'\{"legs":\d,"size":"\w+"\}'),
    "Hugging Face, JSON": ({"response_format": {"type": "json", "value": ANIMAL}}, None),
    "Hugging Face, an object": ({"response_format": {"type": "json_object", "value": ANIMAL}}, None),
    "Hugging Face, JSON as text": ({"response_format": {"type": "json", "value": json.dumps(ANIMAL)}}, None),
    "Hugging Face, a pattern": ({"response_format": {"type": "regex", "value": r"[ab]{2}\d"}}, r"[ab]{2}\d"),
    "Hugging Face, a schema": ({"response_format": {"type": "json_schema", "value": {"name": "x", "schema": ANIMAL}}}, None),
    "SGLang, a pattern": ({"regex": r"[ab]{2}\d"}, r"[ab]{2}\d"),
    "SGLang, EBNF": ({"ebnf": GBNF}, "a|b[0-9]"),
    "SGLang, JSON": ({"json_schema": json.dumps(ANIMAL)}, None),
    "llama-server, JSON": ({"json_schema": ANIMAL}, None),
    "OpenAI": ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": ANIMAL}}}, None),
}


@pytest.mark.parametrize("path", [CHAT, TEXT], ids=["chat", "text"])
@pytest.mark.parametrize("name", ASKED)
def test_a_form_by_any_name_is_kept(http, name, path):
    """In chats and completions alike; what such a client sent was ignored before, with a 200."""
    fields, pattern = ASKED[name]
    text = write(http, path, **fields)
    if pattern is None:
        Draft202012Validator(ANIMAL).validate(json.loads(text))
    else:
        assert re.fullmatch(pattern, text)


def test_any_object_may_be_asked_for(http):
    """With a schema it is easier to end: here is only the beginning."""
    for path in (CHAT, TEXT):
        response = post(http, path, structured_outputs={"json_object": True}, max_tokens=2)
        choice = response.json()["choices"][0]
        assert (choice["message"]["content"] if path == CHAT else choice["text"]).startswith("{")
    assert "x-ignored-fields" not in response.headers


REFUSED = [  # fields, the param, words
    ({"structured_outputs": {}}, "structured_outputs", "holds none"),
    ({"structured_outputs": {"json_schema": ANIMAL}}, "structured_outputs", "holds none"),
    ({"structured_outputs": {"json": ANIMAL, "regex": "a"}}, "structured_outputs", "only one"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "no JSON"),
    ({"structured_outputs": {"json": "[" * 300_000}}, "structured_outputs.json", "300000"),
    ({"structured_outputs": {"json": "[" * 200_000}}, "structured_outputs.json", "no JSON"),
    ({"structured_outputs": {"json": "[]"}}, "structured_outputs.json", "object"),
    ({"structured_outputs": {"json": 5}}, "structured_outputs.json", "a string or an object"),
    ({"structured_outputs": {"json": {"type": "array", "uniqueItems": True}}}, "structured_outputs.json.uniqueItems", "held"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
    ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice", "a string"),
    ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs.regex", "look-around"),
    ({"structured_outputs": {"grammar": " "}}, "structured_outputs.grammar", "empty"),
    ({"structured_outputs": {"grammar": "nonsense"}}, "structured_outputs.grammar", ""),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "not supported"),
    ({"structured_outputs": {"json": ANIMAL, "disable_additional_properties": True}},
     "structured_outputs.disable_additional_properties", "additionalProperties"),
    ({"structured_outputs": {"choice": ["a"], "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern", "no schema"),
    ({"structured_outputs": {"json": ANIMAL, "whitespace_pattern": "["}}, "structured_outputs.whitespace_pattern", "refused"),
    ({"structured_outputs": {"json": ANIMAL}, "guided_json": ANIMAL}, "guided_json", "structured_outputs.json"),
    ({"guided_json": 5}, "guided_json", "a string or an object"), ({"guided_json": "nonsense"}, "guided_json", "no JSON"),
    ({"guided_choice": "yes"}, "guided_choice", "a list"), ({"guided_regex": "["}, "guided_regex", "unclosed"),
    ({"guided_grammar": 'start: "a\0"'}, "guided_grammar", "NUL"), ({"guided_grammar": 'root ::= "\0"'}, "guided_grammar", "NUL"),
    ({"grammar": 'root ::= "a\0"'}, "grammar", "NUL"), ({"ebnf": 'root ::= "a\0"'}, "ebnf", "NUL"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex", "only one"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "no schema"),
    ({"structural_tag": {"triggers": []}}, "structural_tag", "not supported"),
    ({"response_format": {"type": "structural_tag", "structures": [], "triggers": []}}, "response_format.type", "json_schema"),
    ({"response_format": {"type": "json"}}, "response_format.value", "required"),
    ({"response_format": {"type": "regex", "value": 5}}, "response_format.value", "regular expression"),
    ({"response_format": {"type": "regex", "value": "("}}, "response_format.value", ""),
    ({"response_format": {"type": "json", "value": [1]}}, "response_format.value", "object"),
    ({"response_format": {"type": "json_schema", "value": ANIMAL}}, "response_format.value", "a schema"),
    ({"response_format": {"type": "json_object"}, "guided_json": ANIMAL}, "response_format", "guided_json"),
]


@pytest.mark.parametrize("path", [CHAT, TEXT], ids=["chat", "text"])
@pytest.mark.parametrize("fields, param, words", REFUSED, ids=lambda value: str(value)[:60])
def test_a_form_that_cannot_be_had_is_a_400_at_its_place(http, fields, param, words, path):
    error = refusal(http, path, **fields)
    assert error["param"] == param or error["param"].startswith(f"{param}[")
    assert words in error["message"] and param in error["message"]


@pytest.mark.parametrize("fields", [
    {"guided_json": None, "structured_outputs": None}, {"guided_decoding_backend": "auto"},
    {"response_format": {"type": "text"}}, {"structured_outputs": {"json_object": False}}], ids=str)
def test_what_asks_for_nothing_changes_nothing(http, fields):
    free = {"temperature": 0, "max_tokens": 5}
    one, two = (post(http, CHAT, **free, **more).json()["choices"][0]["message"] for more in ({}, fields))
    assert one == two


# ==== Tools: strict, or loosened just there ===============================================

TAGS = {"type": "object", "required": ["tags"], "properties": {"tags": {
    "type": "array", "uniqueItems": True, "minItems": 1, "maxItems": 2, "items": {"enum": ["a", "b"]}}}}
NEW = {"type": "object", "required": ["x\r\ny: z"], "properties": {
    "x\r\ny: z": {"enum": ["a"], "contains": {}}}}


def tool(parameters, **more) -> dict:
    return {"type": "function", "function": {"name": "save", "parameters": parameters, **more}}


def test_a_tool_without_strict_is_loosened_just_there(http):
    """The header names the places, which a client's names cannot break out of."""
    response = post(http, CHAT, tools=[tool(TAGS)], tool_choice="required", parallel_tool_calls=False)
    assert response.status_code == 200, response.text
    assert response.headers["x-loosened-schema"] == "tools[0].function.parameters.properties.tags.uniqueItems"
    [call] = response.json()["choices"][0]["message"]["tool_calls"]
    tags = json.loads(call["function"]["arguments"])["tags"]
    assert 1 <= len(tags) <= 2 and set(tags) <= {"a", "b"}
    response = post(http, CHAT, tools=[tool(NEW)], tool_choice="required", parallel_tool_calls=False, stream=True,
                    max_tokens=4)
    assert response.headers["x-loosened-schema"] == \
        r"tools[0].function.parameters.properties.x\r\ny: z.contains" and "y" not in response.headers


def test_a_strict_tool_is_refused_at_the_place(http):
    error = refusal(http, tools=[tool(ANIMAL, strict=True), tool(TAGS, strict=True) | {
        "function": {"name": "other", "parameters": TAGS, "strict": True}}])
    assert error["param"] == "tools[1].function.parameters.properties.tags.uniqueItems"
    response = post(http, CHAT, tools=[tool(ANIMAL, strict=True)], tool_choice="required", parallel_tool_calls=False)
    assert response.status_code == 200 and "x-loosened-schema" not in response.headers


@pytest.mark.parametrize("fields", [
    {"guided_regex": "a"}, {"guided_choice": ["a"]}, {"structured_outputs": {"grammar": GBNF}}, {"grammar": GBNF},
    {"response_format": {"type": "regex", "value": "a"}}], ids=str)
def test_a_reply_follows_tools_or_a_grammar(http, fields):
    error = refusal(http, tools=[tool(ANIMAL)], **fields)
    assert "tools were sent" in error["message"]


def test_json_by_another_name_may_stand_beside_tools(http):
    text = write(http, CHAT, tools=[tool(ANIMAL)], tool_choice="none", guided_json=NUMBER)
    assert 1 <= int(text) <= 12
    response = post(http, CHAT, tools=[tool(NUMBER | {"type": "object"})], guided_json=ANIMAL, n=4, max_tokens=100)
    for choice in response.json()["choices"]:
        message = choice["message"]
        if not message.get("tool_calls") and choice["finish_reason"] == "stop":
            Draft202012Validator(ANIMAL).validate(json.loads(message["content"]))


def test_the_white_space_of_one_part_is_not_that_of_another():
    """A client's pattern holds for its own schema; a call has the separators of its template."""
    from features import replies
    form = replies.Form()
    form.set_white_space(" {3}", "whitespace_pattern")
    first = form.add_schema({"type": "object"}, "json")
    form.set_separators(", ", ": ")
    second = form.add_schema({"type": "object"}, "tools")
    rules = dict(re.findall(rf"(?m)^({first}|{second}): %json (.*)$", form._lark()))
    options = {name: json.loads(rule)["x-guidance"] for name, rule in rules.items()}
    assert options[first]["whitespace_pattern"] == " {3}" and "item_separator" not in options[first]
    assert "whitespace_pattern" not in options[second] and options[second]["item_separator"] == ", "


@pytest.mark.parametrize("schema", [
    {"$id": "http://[", "$defs": {"a": {"$id": "x"}}, "$ref": "y"},
    {"anyOf": [{"type": "null"}], "$ref": "#/anyOf/" + "1" * 5000},
    {"anyOf": [{"type": "null"}], "$ref": "#/anyOf/\u0663"}])
def test_a_reference_that_no_parser_takes_is_400(http, schema):
    assert refusal(http, json_schema=schema)["param"].startswith("json_schema")


@pytest.mark.parametrize("form, at", [
    ({"type": "json_object", "schema": {"type": "null"}, "value": {}}, "value"),
    ({"type": "json_schema", "json_schema": {"name": "x", "schema": {}}, "value": {"schema": {}}}, "value"),
    ({"type": "json", "json_schema": {"name": "x"}, "value": {}}, "json_schema"),
    ({"type": "text", "value": {}}, "value"), ({"type": "regex", "schema": {}, "value": "a"}, "schema")])
def test_a_second_form_in_one_format_is_never_only_ignored(http, form, at):
    assert refusal(http, response_format=form)["param"] == f"response_format.{at}"


@pytest.mark.parametrize("fields", [{"grammar": 'root ::= "a"+'}, {"guided_regex": "a+", "stream": True}])
def test_a_grammar_that_is_refused_while_it_is_followed_is_the_clients(fields, monkeypatch):
    """Some of llguidance's limits show only on the way: a 400 that names the field, and others are served."""
    def take(self, token):
        raise engine.GrammarError("too complex")

    monkeypatch.setattr(structured.Reply, "take", take)
    with serving(server.load_features(["structured"])) as alone:
        error = refusal(alone, **fields)
        assert error["param"] == next(iter(fields)) and "the grammar is refused: too complex" in error["message"]
        assert post(alone, TEXT, max_tokens=2).status_code == 200
