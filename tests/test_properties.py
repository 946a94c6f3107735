"""Properties that hold for all inputs, shown on random ones (hypothesis).

    1  random bodies     never a 5xx, never a hang, and every error has the OpenAI shape

The replies' shapes are checked by the HTTP client's hook (conftest.py).
"""

import copy
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SECONDS = 20  # a request that takes longer hangs

# Random requests, not the same ones in each run; a failure is shrunk and printed.
PROPERTY = settings(database=None, deadline=None, print_blob=True,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@pytest.fixture(scope="module")
def small(start_server):
    """A server whose replies and queues are short, so that nothing random runs for minutes."""
    return start_server(N_CTX="256", PARALLEL="4", MAX_TOKENS="4")


# ==== 1. Random bodies ====================================================================

SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", 1]}, "b": {"type": "integer"}},
          "required": ["a"], "additionalProperties": False, "$defs": {"c": {"type": "null"}}}
FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TURNS = [{"role": "user", "content": "Hi"},
         {"role": "assistant", "content": None, "tool_calls": [CALL]},
         {"role": "tool", "tool_call_id": "c", "content": "r"},
         {"role": "assistant", "content": "a", "reasoning_content": "t"},
         {"role": "user", "content": "Hi"}]
GENERATION = {
    "model": None, "max_tokens": 2, "temperature": 1.0, "top_p": 0.9, "top_k": 5, "min_p": 0.1,
    "n": 2, "stop": ["x"], "seed": 1, "presence_penalty": 0.5, "frequency_penalty": 0.5,
    "logit_bias": {"5": 1}, "stream": True, "stream_options": {"include_usage": True},
    "user": "u", "typical_p": 0.9, "repeat_penalty": 1.1, "mirostat": 0, "mirostat_tau": 5,
    "mirostat_eta": 0.1, "dry_multiplier": 0.5, "dry_base": 1.75, "dry_allowed_length": 2,
    "dry_penalty_last_n": 64, "dry_sequence_breakers": ["\n"], "xtc_probability": 0.1,
    "xtc_threshold": 0.1, "top_n_sigma": 1, "ignore_eos": True, "min_tokens": 1,
    "grammar": 'root ::= "a"', "json_schema": SCHEMA, "cache_prompt": False}
# Of each path: what must be there, and what may. Random parts are put into these.
BODIES = {
    "/v1/chat/completions": (
        {"max_tokens": 2, "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "n"}]},
        {**GENERATION, "messages": TURNS, "max_completion_tokens": 2,
         "logprobs": True, "top_logprobs": 2,
         "tools": [{"type": "function", "function": FUNCTION}],
         "tool_choice": {"type": "function", "function": {"name": "f"}},
         "parallel_tool_calls": False, "functions": [FUNCTION], "function_call": {"name": "f"},
         "response_format": {"type": "json_schema",
                             "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}},
         "modalities": ["text"], "audio": None, "prediction": None, "web_search_options": None,
         "reasoning_effort": "low", "metadata": {"a": "b"}, "store": False,
         "safety_identifier": "s", "prompt_cache_key": "k", "service_tier": "auto",
         "chat_template_kwargs": {"a": 1}, "add_generation_prompt": True,
         "continue_final_message": False}),
    "/v1/completions": (
        {"prompt": "a", "max_tokens": 2},
        {**GENERATION, "prompt": ["a", "b"], "logprobs": 2, "echo": True, "suffix": None,
         "best_of": 2}),
    "/v1/embeddings": (
        {"input": ["a", "b"]},
        {"model": None, "encoding_format": "base64", "dimensions": 8, "user": "u"}),
    "/tokenize": ({"content": "a"},
                  {"add_special": True, "parse_special": True, "with_pieces": True}),
    "/detokenize": ({"tokens": [1, 2]}, {}),
    "/apply-template": ({"messages": [{"role": "user", "content": "Hi"}]},
                        {"tools": [{"type": "function", "function": FUNCTION}],
                         "chat_template_kwargs": {"a": 1}, "add_generation_prompt": False}),
}
NAMES = sorted({name for required, optional in BODIES.values() for name in [*required, *optional]})

ODD_NUMBERS = [0, -0.0, -1, 1, 1.5, 0.1, 49151, 49152, 2**31 - 1, 2**31, -(2**31) - 1, 2**32,
               2**63, -(2**64), 10**40, 1e308, -1e-308, float("inf"), float("nan")]
ODD_TEXTS = ["", " ", "\0", "\ud800", "a\u0300\u200f", "<|im_end|>", "<|endoftext|>", "{{ 1/0 }}",
             "<tool_call>", "<think>", "漢🌧", "auto", "none", "required", "json_object",
             "x" * 3000, "../../etc/passwd", "NaN"]
# What keywords of schemas and grammars do when they meet by chance.
ODD_SCHEMAS = [{"type": "array", "items": {"$ref": "#"}}, {"$ref": "#/$defs/c"}, {"not": {}},
               {"type": ["string", "null"], "pattern": "^(a|b)*$"}, {"enum": []}, {"const": {}},
               {"type": "string", "minLength": 9, "maxLength": 3}, {"anyOf": []}, True, False]

scalars = (st.none() | st.booleans() | st.sampled_from(ODD_NUMBERS) | st.integers(-3, 300)
           | st.floats(allow_nan=True) | st.sampled_from(ODD_TEXTS) | st.text(max_size=12))
values = st.recursive(
    scalars | st.sampled_from(ODD_SCHEMAS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(NAMES) | st.text(max_size=6), inner, max_size=4), max_leaves=12)


# Values deeper than Python would serialise stand as a mark, until `to_json` writes them out.
deep = st.builds("<{} times {}>".format, st.sampled_from([20, 200, 900, 20_000]),
                 st.sampled_from(["[]", "{}"]))


def to_json(value) -> bytes:
    """JSON as a careless client writes it: NaN, half characters and all."""
    def write_out(mark):
        opening, closing = ("[", "]") if mark[2] == "[]" else ('{"a":', "}")
        return opening * int(mark[1]) + "1" + closing * int(mark[1])
    return re.sub(r'"<(\d+) times (..)>"', write_out, json.dumps(value)).encode()


def places(value, path=()) -> list[tuple]:
    """The path of every part of a JSON value, but for the whole."""
    items = (value.items() if isinstance(value, dict) else
             enumerate(value) if isinstance(value, list) else ())
    return [place for key, part in items
            for place in [(*path, key), *places(part, (*path, key))]]


def put(body, path, value) -> None:
    """Replace the part at a path, by a copy: what hypothesis draws must stay as it is."""
    for key in path[:-1]:
        body = body[key]
    body[path[-1]] = copy.deepcopy(value)


def remove(body, path) -> None:
    for key in path[:-1]:
        body = body[key]
    del body[path[-1]]


def bounded(body):
    """Without the numbers that are valid, but ask for more work than a test has time for."""
    for name, most in (("max_tokens", 3), ("max_completion_tokens", 3), ("min_tokens", 3),
                       ("n", 3), ("best_of", 3)):
        if isinstance(value := body.get(name), (int, float)) and value > most:
            body[name] = most if value <= 2**31 else -1
    if body.get("max_tokens") is None and "messages" not in body:
        body["max_tokens"] = 2
    return body


@st.composite
def requests(draw):
    """(path, body): a valid body, a few random fields more, and a few parts changed or lost."""
    path = draw(st.sampled_from(list(BODIES)))
    body, optional = copy.deepcopy(BODIES[path])
    if optional:
        for name in draw(st.lists(st.sampled_from(sorted(optional)), max_size=4, unique=True)):
            body[name] = optional[name]
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.sampled_from(places(body) or [("x",)]))
        if place[0] in body and draw(st.integers(0, 5)) == 0:
            remove(body, place)
        else:
            put(body, place, draw(values | deep))
    if draw(st.integers(0, 3)) == 0:
        put(body, [draw(st.sampled_from(NAMES))], draw(values))
    return path, bounded(body)


def check(server, path, content: bytes) -> int:
    """The status of a request: an answer or a refusal in the API's shape, and soon."""
    response = server.post(path, content=content, timeout=SECONDS)
    assert response.status_code in (200, 400, 404), response.text[:500]
    return response.status_code


def test_mutated_bodies_are_answered_or_refused(small):
    """Some are still valid, so that both ways are walked."""
    statuses = []

    @settings(PROPERTY, max_examples=230)
    @given(requests())
    def run(request):
        path, body = request
        statuses.append(check(small, path, to_json(body)))
    run()
    assert statuses.count(400) > 20 and statuses.count(200) > 10


def test_random_json_is_refused(small):
    """Whatever JSON, at whatever path."""
    @settings(PROPERTY, max_examples=60)
    @given(st.sampled_from(list(BODIES)), values | deep)
    def run(path, value):
        assert check(small, path, to_json(value)) in (200, 400)
    run()


def test_broken_json_is_refused(small):
    """Cut anywhere, with random bytes in place of the rest."""
    whole = {path: json.dumps({**required, **optional}).encode()
             for path, (required, optional) in BODIES.items()}

    @settings(PROPERTY, max_examples=60)
    @given(st.sampled_from(list(BODIES)), st.floats(0, 1, exclude_max=True), st.binary(max_size=3))
    def run(path, where, inserted):
        content = whole[path][:int(where * len(whole[path]))] + inserted
        assert check(small, path, content) == 400 or json.loads(content)
    run()


def test_the_server_is_well_afterwards(small):
    response = small.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
    assert response.status_code == 200 and small.get("/health").status_code == 200
