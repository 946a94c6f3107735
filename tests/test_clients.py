"""Heavy clients, as their users write, changed in base_url only: langchain-openai, litellm, anthropic,
openai-agents, pydantic-ai.

They have many dependencies, so they are tested from an environment of their own:
requirements-clients.txt has the commands. All that the first two send and get passes
openai_schemas.py; test_responses.py and test_messages.py hold the others' APIs to theirs.
"""

import asyncio
import base64
import json
import os
import struct
import subprocess
import sys
import zlib
from typing import Literal

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # nothing from the network

import agents
import anthropic
import litellm
import openai
import pydantic
import pydantic_ai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

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


# ==== 3. anthropic ========================================================================

ASKED = {"model": MODEL, "max_tokens": 24, "messages": HI}
CLOCK = {"name": "get_time", "description": "Tell the time in a zone.",
         "input_schema": TOOL["function"]["parameters"]}


@pytest.fixture(scope="module")
def claude(url):
    with anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0) as client:
        yield client


def greedy(**options) -> dict:
    return {"extra_body": {"temperature": 0}, **options}


def test_anthropic_creates_streams_and_counts(claude):
    whole = claude.messages.create(**ASKED, **greedy())
    assert whole.content[0].text and whole.stop_reason == "end_turn"
    with claude.messages.stream(**ASKED, **greedy()) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        final = stream.get_final_message()
    assert final.content[0].text == whole.content[0].text and final.stop_reason == "end_turn"
    usage = final.usage
    counted = claude.messages.count_tokens(model=MODEL, messages=HI)
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    assert usage.output_tokens == whole.usage.output_tokens


def test_anthropic_calls_a_tool_and_brings_its_result(claude):
    asked = {**ASKED, "max_tokens": 80, "tools": [CLOCK]}
    with claude.messages.stream(**asked, **greedy(tool_choice={
            "type": "any", "disable_parallel_tool_use": True})) as stream:
        called = stream.get_final_message()
    [call] = called.content
    assert called.stop_reason == "tool_use" and call.input["zone"] in ("UTC", "CET")
    final = claude.messages.create(**{**asked, "messages": [
        *HI, {"role": "assistant", "content": called.content}, {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": call.id, "content": "12:00"}]}]},
        **greedy(tool_choice={"type": "none"}))
    assert final.content[0].text and final.stop_reason in ("end_turn", "max_tokens")


def test_anthropic_parses_a_class(claude):
    parsed = claude.messages.parse(**{**ASKED, "max_tokens": 80}, output_format=Mood)
    assert isinstance(parsed.parsed_output, Mood)


def test_anthropic_lists_models_and_maps_errors(claude):
    models = list(claude.models.list())
    assert MODEL in [model.id for model in models] and all(model.display_name for model in models)
    assert claude.models.retrieve(MODEL).id == MODEL
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        claude.messages.create(**{**ASKED, "model": "nothing"})
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        claude.messages.create(**{**ASKED, "messages": [{"role": "user", "content": "word " * 2000}]})


def test_anthropic_streams_asynchronously(url):
    async def run() -> str:
        async with anthropic.AsyncAnthropic(base_url=url, api_key="unused") as client:
            async with client.messages.stream(**ASKED) as stream:
                return await stream.get_final_text()
    assert asyncio.run(run())


# ==== 4. openai-agents ====================================================================


@pytest.fixture
def responding(url):
    """A model of openai-agents; its default API is Responses."""
    agents.set_tracing_disabled(True)
    return agents.OpenAIResponsesModel(MODEL, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused"))


def settings(**options) -> "agents.ModelSettings":
    return agents.ModelSettings(temperature=0, max_tokens=80, parallel_tool_calls=False, **options)


def test_openai_agents_call_a_tool_and_answer(responding):
    """The whole loop; the choice is the agent's only once, so that it comes to an end."""
    zones = []

    @agents.function_tool
    def tell_time(zone: Literal["UTC", "CET"]) -> str:
        """Tell the time in a zone."""
        zones.append(zone)
        return "12:00"
    agent = agents.Agent("Clock", instructions="You tell the time.", model=responding, tools=[tell_time],
                         model_settings=settings(tool_choice="required"))
    result = agents.Runner.run_sync(agent, "What time is it in CET?", max_turns=6)
    assert zones and result.final_output and result.raw_responses[-1].usage.total_tokens > 0


def test_openai_agents_hand_over(responding):
    """A handoff is a call of a function; the other agent answers, in a stream."""
    expert = agents.Agent("Expert", instructions="You know rain.", model=responding, model_settings=settings())
    desk = agents.Agent("Desk", instructions="Hand over.", model=responding, handoffs=[expert],
                        model_settings=settings(tool_choice="required"))

    async def run():
        result = agents.Runner.run_streamed(desk, "What is rain?", max_turns=4)
        kinds = [event.type async for event in result.stream_events()]
        return result, kinds
    result, kinds = asyncio.run(run())
    assert result.last_agent.name == "Expert" and result.final_output
    assert "agent_updated_stream_event" in kinds and "raw_response_event" in kinds


# ==== 5. pydantic-ai ======================================================================


@pytest.mark.parametrize("kind", ["responses", "messages"])
def test_pydantic_ai_answers_streams_and_types(url, kind):
    """Its `openai:` models ask for Responses, its `anthropic:` models for Messages."""
    model = OpenAIResponsesModel(MODEL, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="unused")) \
        if kind == "responses" else AnthropicModel(
            MODEL, provider=AnthropicProvider(base_url=url, api_key="unused"))
    options = {"temperature": 0, "max_tokens": 80, "parallel_tool_calls": False}
    agent = pydantic_ai.Agent(model, instructions="Be brief.", model_settings=options)
    first = agent.run_sync("Hi")
    assert first.output and first.usage.total_tokens > 0
    second = agent.run_sync("Why?", message_history=first.all_messages())
    assert second.output and second.usage.input_tokens > first.usage.input_tokens

    async def stream() -> str:
        async with agent.run_stream("Hi") as result:
            return "".join([text async for text in result.stream_text(delta=True)])
    assert asyncio.run(stream())
    typed = pydantic_ai.Agent(model, output_type=Mood, model_settings=options)
    assert isinstance(typed.run_sync("I won the lottery!").output, Mood)
