"""Heavy clients, as their users write: langchain-openai and litellm, changed in base_url only.

They have many dependencies, so they are tested from an environment of their own:
requirements-clients.txt has the commands. All they send and get passes openai_schemas.py.
"""

import base64
import json
import os
import struct
import subprocess
import sys
import zlib
from typing import Literal

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # nothing from the network

import litellm
import pydantic
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

from conftest import ROOT, blocks_of

MODEL = "gpt-4o-mini"
GREEDY = {"temperature": 0, "max_tokens": 24}
HI = [{"role": "user", "content": "Hi"}]
ONE_FRUIT = 'Write one fruit as JSON, like {"fruit": "name"}.'  # greedy, its object ends


# ==== 1. langchain-openai =================================================================


@pytest.fixture(scope="module")
def llm(url, http):
    """A chat model; its HTTP goes through the checks."""
    def make(**options):
        return ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key="unused", http_client=http,
                          **{**GREEDY, **options})
    return make


@tool
def get_time(zone: Literal["UTC", "CET"]) -> str:
    """Tell the time in a zone."""
    return f"12:00 {zone}"


class Mood(pydantic.BaseModel):
    """How somebody feels."""

    mood: Literal["good", "bad"]
    sure: bool


def test_langchain_invokes(llm):
    message = llm().invoke([SystemMessage("Be brief."), HumanMessage("Hi")])
    assert isinstance(message, AIMessage) and message.content
    assert message.usage_metadata["output_tokens"] > 0
    assert message.response_metadata["finish_reason"] in ("stop", "length")


def test_langchain_streams_what_it_invokes(llm):
    """The chunks add up to the message, with the usage at the end."""
    chunks = list(llm(stream_usage=True).stream("Hi"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.content == llm().invoke("Hi").content
    assert whole.usage_metadata["total_tokens"] > 0


def test_langchain_batches(llm):
    replies = llm().batch(["Hi", "What is 2+2?", "Name a colour."])
    assert all(reply.content for reply in replies)


def test_langchain_reads_logprobs(llm):
    message = llm(logprobs=True, top_logprobs=2).invoke("Hi")
    assert message.response_metadata["logprobs"]["content"][0]["logprob"] <= 0


def test_langchain_binds_tools_and_answers_them(llm):
    """A whole agent's turn: call, result, reply."""
    question = [HumanMessage("What time is it in CET?")]
    calling = llm(max_tokens=80).bind_tools([get_time], tool_choice="get_time",
                                            parallel_tool_calls=False)
    message = calling.invoke(question)
    [call] = message.tool_calls
    assert call["name"] == "get_time" and call["args"]["zone"] in ("UTC", "CET")
    assert message.response_metadata["finish_reason"] == "tool_calls"
    result = get_time.invoke(call)
    assert isinstance(result, ToolMessage)
    final = llm().bind_tools([get_time], tool_choice="none").invoke([*question, message, result])
    assert final.content and not final.tool_calls


def test_langchain_joins_streamed_tool_calls(llm):
    calling = llm(max_tokens=80).bind_tools([get_time], tool_choice="any",
                                            parallel_tool_calls=False)
    whole = None
    for chunk in calling.stream("What time is it?"):
        whole = chunk if whole is None else whole + chunk
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [
        (call["name"], call["args"]) for call in calling.invoke("What time is it?").tool_calls]
    assert whole.tool_calls and not whole.invalid_tool_calls


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("strict", [None, True])
def test_langchain_gives_structured_output(llm, method, strict):
    structured = llm(max_tokens=80, temperature=1, seed=1).with_structured_output(
        Mood, method=method, strict=strict)
    assert isinstance(structured.invoke("I won the lottery!"), Mood)


def test_langchain_streams_structured_output(llm):
    *_, last = llm(max_tokens=80).with_structured_output(Mood, method="json_schema").stream("Hi")
    assert isinstance(last, Mood)


def test_langchain_json_mode_gives_an_object(llm):
    structured = llm(max_tokens=100).with_structured_output(None, method="json_mode")
    assert isinstance(structured.invoke(ONE_FRUIT), dict)


def red_square() -> str:
    """A PNG file of 48 x 48 pixels, in Base64."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(
            ">I", zlib.crc32(kind + data))

    inside = range(12, 36)
    rows = b"".join(b"\0" + b"".join(bytes((215, 30, 30) if x in inside and y in inside else
                                           (240, 240, 240)) for x in range(48)) for y in range(48))
    file = (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 48, 48, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return base64.b64encode(file).decode()


def test_langchain_sends_an_image(start_server):
    """The model, which sees, says its color."""
    http = start_server(MMPROJ=str(ROOT / "tests" / "tiny-vision.mmproj.gguf"))
    llm = ChatOpenAI(model=MODEL, base_url=f"{http.base_url}/v1", api_key="unused",
                     http_client=http, **GREEDY)
    message = llm.invoke([HumanMessage([
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{red_square()}"}},
        {"type": "text", "text": "What is the color?"}])])
    assert "red" in message.content.lower()


def test_the_langchain_snippet_of_the_docs_prints_an_answer(url):
    code, = [block for block in blocks_of("python") if "langchain" in block]
    done = subprocess.run([sys.executable, "-c", code.replace("http://127.0.0.1:8080", url)],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_langchain_completes(url, http):
    """The plain completions, several prompts in one request."""
    plain = OpenAI(model=MODEL, base_url=f"{url}/v1", api_key="unused", http_client=http, **GREEDY)
    result = plain.generate(["The quick brown fox", "When it rains, it"])
    assert len(result.generations) == 2
    assert "".join(plain.stream("The quick brown fox")) == result.generations[0][0].text


def test_langchain_embeds(url, http):
    """Strings as they are: its default would cut them into tokens of OpenAI's vocabulary."""
    embeddings = OpenAIEmbeddings(model=MODEL, base_url=f"{url}/v1", api_key="unused",
                                  http_client=http, check_embedding_ctx_length=False)
    vectors = embeddings.embed_documents(["The quick brown fox", "rain"])
    assert len(vectors) == 2 and len(vectors[0]) == 576
    assert embeddings.embed_query("rain") == pytest.approx(vectors[1], abs=0.01)


# ==== 2. litellm ==========================================================================

TOOL = {"type": "function", "function": {
    "name": "get_time", "description": "Tell the time in a zone.", "parameters": {
        "type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"],
        "additionalProperties": False}}}


@pytest.fixture(scope="module")
def lite(url, http):
    """litellm's arguments for this server; its HTTP goes through the checks."""
    litellm.client_session = http
    yield {"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": "unused"}
    litellm.client_session = None


def test_litellm_completes(lite):
    reply = litellm.completion(messages=HI, **GREEDY, **lite)
    assert reply.choices[0].message.content and reply.usage.total_tokens > 0


def test_litellm_streams_what_it_completes(lite):
    chunks = list(litellm.completion(messages=HI, stream=True, **GREEDY, **lite))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == litellm.completion(messages=HI, **GREEDY, **lite).choices[0].message.content
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    built = litellm.stream_chunk_builder(chunks, messages=HI)
    assert built.choices[0].message.content == text


def test_litellm_calls_tools_streamed_or_not(lite):
    asked = dict(messages=HI, tools=[TOOL], tool_choice="required", parallel_tool_calls=False,
                 temperature=0, max_tokens=80, **lite)
    whole = litellm.completion(**asked)
    built = litellm.stream_chunk_builder(list(litellm.completion(stream=True, **asked)))
    for reply in (whole, built):
        [call] = reply.choices[0].message.tool_calls
        assert call.function.name == "get_time"
        assert json.loads(call.function.arguments)["zone"] in ("UTC", "CET")
        assert reply.choices[0].finish_reason == "tool_calls"


def test_litellm_sends_the_tools_result_back(lite):
    call = {"id": "call_1", "type": "function",
            "function": {"name": "get_time", "arguments": '{"zone": "UTC"}'}}
    messages = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call_1", "content": "12:00"}]
    reply = litellm.completion(messages=messages, tools=[TOOL], tool_choice="none", **GREEDY,
                               **lite)
    assert reply.choices[0].message.content


def test_litellm_takes_a_pydantic_class_as_format(lite):
    reply = litellm.completion(messages=HI, response_format=Mood, temperature=1, seed=2,
                               max_tokens=80, **lite)
    assert Mood.model_validate_json(reply.choices[0].message.content)


def test_litellm_completes_plain_text(lite):
    lite = {**lite, "model": f"text-completion-openai/{MODEL}"}
    reply = litellm.text_completion(prompt="The quick brown fox", **GREEDY, **lite)
    assert reply.choices[0].text


def test_litellm_embeds(lite):
    reply = litellm.embedding(input=["The quick brown fox", "rain"], encoding_format="float",
                              **lite)
    assert [entry["index"] for entry in reply.data] == [0, 1]
    assert len(reply.data[0]["embedding"]) == 576


def test_litellm_maps_errors(lite):
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(messages=HI, temperature=9, num_retries=0, **lite)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(messages=HI, **{**lite, "model": "openai/nothing"})
