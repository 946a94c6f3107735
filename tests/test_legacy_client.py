"""Programs written for openai 0.28, as many still are: openai.ChatCompletion.create(...).

With openai 0.28 installed, in an environment of its own (`pip install -r
tests/requirements-legacy.txt`), the real one is used. Beside a current openai, whose module no
longer has these calls, a stand-in sends what 0.28 sends and gives the parsed JSON, which is
what 0.28's objects are: dicts.
"""

import importlib.metadata
import json

import httpx
import pytest

import openai_schemas

MODEL = "gpt-4o-mini"


class Endpoint:
    """`openai.ChatCompletion` and its like: POST to a path; dicts, or a generator of dicts."""

    def __init__(self, base: str, path: str):
        self.base, self.path = base, path

    def create(self, **body):
        response = httpx.post(self.base + self.path, json=body, timeout=60,
                              headers={"Authorization": "Bearer unused"})
        if response.status_code != 200:
            raise InvalidRequestError(response.json()["error"])
        if body.get("stream"):
            return iter(openai_schemas.parse_sse(response.text))
        return response.json()


class InvalidRequestError(Exception):
    """With the fields that 0.28 takes from the error's JSON."""

    def __init__(self, error: dict):
        super().__init__(error["message"])
        self.param, self.code = error["param"], error["code"]


class StandIn:
    """The part of the 0.28 module that programs use."""

    def __init__(self, base: str):
        self.ChatCompletion = Endpoint(base, "/chat/completions")
        self.Completion = Endpoint(base, "/completions")
        self.Embedding = Endpoint(base, "/embeddings")
        self.Model = self
        self.error = self
        self.base, self.InvalidRequestError = base, InvalidRequestError

    def list(self):
        return httpx.get(self.base + "/models", timeout=60).json()


@pytest.fixture(scope="module")
def openai(url):
    """The 0.28 module, real or stood in for, set up as its programs do."""
    if not importlib.metadata.version("openai").startswith("0."):
        return StandIn(f"{url}/v1")
    import openai as module
    module.api_base, module.api_key = f"{url}/v1", "unused"
    return module


def ask(openai, **options):
    return openai.ChatCompletion.create(
        model=MODEL, messages=[{"role": "user", "content": "Hi"}], temperature=0, max_tokens=12,
        **options)


def plain(answer) -> dict:
    """0.28's objects are dicts with attributes; the schemas want dicts."""
    return json.loads(json.dumps(answer))


def test_chat_replies_are_dicts(openai):
    answer = ask(openai)
    openai_schemas.check_reply("chat.completion", plain(answer))
    assert answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")
    assert answer["usage"]["total_tokens"] > answer["usage"]["completion_tokens"] > 0


def test_chat_streams_are_read_delta_by_delta(openai):
    """The loop of a thousand programs: role first, then content, then an empty delta."""
    chunks = list(ask(openai, stream=True))
    openai_schemas.check_stream("chat.completion", [plain(chunk) for chunk in chunks])
    text = ""
    for chunk in chunks:
        text += chunk["choices"][0]["delta"].get("content") or ""
    assert text == ask(openai)["choices"][0]["message"]["content"]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "content" not in chunks[-1]["choices"][0]["delta"]


def test_completions_are_dicts_with_text(openai):
    options = dict(model=MODEL, prompt="The quick brown fox", temperature=0, max_tokens=6)
    answer = openai.Completion.create(**options)
    openai_schemas.check_reply("text_completion", plain(answer))
    chunks = list(openai.Completion.create(**options, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == answer["choices"][0]["text"]
    assert answer["choices"][0]["text"]


def test_completions_score_a_prompt(openai):
    """echo with logprobs and max_tokens 0, the legacy way to weigh a text."""
    answer = openai.Completion.create(model=MODEL, prompt="The sky is blue", echo=True, logprobs=1,
                                      max_tokens=0)
    logprobs = answer["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == "The sky is blue"
    assert logprobs["token_logprobs"][0] is None and logprobs["text_offset"][0] == 0


def test_functions_are_called_and_answered(openai):
    """The function-calling example of 2023, both turns."""
    functions = [{"name": "get_time", "parameters": {
        "type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"],
        "additionalProperties": False}}]
    messages = [{"role": "user", "content": "What time is it?"}]
    options = dict(model=MODEL, functions=functions, temperature=0)
    answer = openai.ChatCompletion.create(messages=messages, function_call={"name": "get_time"},
                                          max_tokens=60, **options)
    message = answer["choices"][0]["message"]
    assert message["content"] is None
    assert json.loads(message["function_call"]["arguments"])["zone"] in ("UTC", "CET")
    messages += [plain(message), {"role": "function", "name": "get_time", "content": "12:00"}]
    final = openai.ChatCompletion.create(messages=messages, function_call="none", max_tokens=12,
                                         **options)
    assert final["choices"][0]["message"]["content"]


def test_embeddings_are_lists_of_floats(openai):
    """One text, a list of texts, and the old default of its helper functions."""
    one = openai.Embedding.create(model=MODEL, input="The quick brown fox")
    vector = one["data"][0]["embedding"]
    assert sum(x * x for x in vector) == pytest.approx(1, abs=1e-3)
    two = openai.Embedding.create(model=MODEL, input=["The quick brown fox", "rain"])
    assert len(two["data"]) == 2 and two["data"][1]["index"] == 1
    assert two["data"][0]["embedding"] == pytest.approx(vector, abs=0.01)


def test_models_have_their_permission(openai):
    entries = openai.Model.list()["data"]
    assert MODEL in [entry["id"] for entry in entries]
    assert entries[0]["permission"][0]["object"] == "model_permission"


def test_a_refusal_is_an_invalid_request_error_with_its_param(openai):
    with pytest.raises(openai.error.InvalidRequestError) as caught:
        openai.ChatCompletion.create(model=MODEL, messages=[])
    assert caught.value.param == "messages" and "messages" in str(caught.value)
