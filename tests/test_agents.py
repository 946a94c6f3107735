"""Coding agents and node's libraries, unchanged: Codex, Claude Code, the AI SDK.

They run only with `--agents FOLDER`, where npm has installed them; those that are not there are
skipped. What the agents are told does not matter here: their prompts are long, and a model that only
says "Hello." reads them in seconds (make_echo_model.py). README.md has the commands.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

import make_echo_model
from conftest import default_model, serve

TURN_SECONDS = 240  # for an agent's start, its prompt, and the reply


@pytest.fixture(scope="module")
def folder(request) -> Path:
    """Where npm has installed them."""
    if not (found := request.config.getoption("--agents")):
        pytest.skip("needs --agents FOLDER")
    return Path(found).resolve()


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory):
    """A server whose model says "Hello.", with room for an agent's prompt."""
    model = tmp_path_factory.mktemp("echo") / "hello.gguf"
    make_echo_model.make(default_model(), model)
    with serve(MODEL_PATH=str(model), N_CTX="32768", PARALLEL="2", MODEL_ALIASES="local") as found:
        yield found


def run(folder: Path, program: str, *words: str, cwd: Path, **environ: str) -> str:
    """What a program prints, with a home of its own, when it has ended well."""
    file = folder / "node_modules" / ".bin" / program
    if not file.exists():
        pytest.skip(f"{program} is not installed in {folder}")
    done = subprocess.run([str(file), *words], cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=TURN_SECONDS, env={"PATH": os.environ["PATH"], "HOME": str(cwd), **environ})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_codex_completes_a_turn(folder, address, tmp_path):
    (tmp_path / "config.toml").write_text(
        'model = "local"\nmodel_provider = "local"\n[model_providers.local]\nname = "local"\n'
        f'base_url = "{address}/v1"\nwire_api = "responses"\n')
    said = run(folder, "codex", "exec", "--skip-git-repo-check", "--json", "Say hello", cwd=tmp_path,
               CODEX_HOME=str(tmp_path))
    events = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    messages = [event["item"]["text"] for event in events if event["type"] == "item.completed"
                and event["item"]["type"] == "agent_message"]
    [usage] = [event["usage"] for event in events if event["type"] == "turn.completed"]
    assert messages == ["Hello."] and usage["input_tokens"] > 1000 and usage["output_tokens"] == 3


@pytest.mark.parametrize("tools", [["--tools", "Bash,Read,Edit,Write"], []], ids=["some tools", "all tools"])
def test_claude_code_completes_a_turn(folder, address, tmp_path, tools):
    said = run(folder, "claude", "-p", "Say hello", "--model", "local", "--output-format", "json", *tools, cwd=tmp_path,
               ANTHROPIC_BASE_URL=address, ANTHROPIC_API_KEY="unused", CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1")
    result = json.loads(said)
    result = next(each for each in result if each["type"] == "result") if isinstance(result, list) else result
    assert result["result"] == "Hello." and not result["is_error"]
    usage = result["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] > 1000 and usage["output_tokens"] == 3


AI_SDK = """
import { generateText, streamText, tool, stepCountIs, Output } from 'ai';
import { createOpenAI } from '@ai-sdk/openai';
import { createAnthropic } from '@ai-sdk/anthropic';
import { z } from 'zod';

const [kind, baseURL] = process.argv.slice(2);
const create = kind === 'openai' ? createOpenAI : createAnthropic;
const model = create({ baseURL: `${baseURL}/v1`, apiKey: 'unused' })('gpt-4o-mini');
const said = { model, prompt: 'Hi', temperature: 0, maxOutputTokens: 24, maxRetries: 0 };
const whole = await generateText(said);
let streamed = '';
const stream = streamText({ ...said, onError: ({ error }) => { throw error; } });
for await (const text of stream.textStream) streamed += text;
let zone = '';
const get_time = tool({
  description: 'Tell the time in a zone.', inputSchema: z.object({ zone: z.enum(['UTC', 'CET']) }),
  execute: async (input) => { zone = input.zone; return '12:00'; } });
const agent = await generateText({
  ...said, prompt: 'What time is it?', tools: { get_time }, maxOutputTokens: 80, stopWhen: stepCountIs(2),
  providerOptions: { openai: { parallelToolCalls: false }, anthropic: { disableParallelToolUse: true } },
  prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber ? 'none' : 'required' }) });
const mood = await generateText({ ...said, maxOutputTokens: 80, output: Output.object({ schema: z.object({ sure: z.boolean() }) }) });
console.log(JSON.stringify({
  whole: whole.text, streamed, reason: whole.finishReason, usage: (await stream.usage).totalTokens, zone,
  steps: agent.steps.map((step) => step.finishReason), answer: agent.text, sure: mood.output.sure }));
"""


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
def test_the_ai_sdk_generates_streams_and_calls(folder, url, kind):
    """Responses, where a call is brought back as a reference to what is kept; and Messages."""
    if not (folder / "node_modules" / "@ai-sdk" / kind).exists():
        pytest.skip(f"@ai-sdk/{kind} is not installed in {folder}")
    done = subprocess.run(["node", "--input-type=module", "-", kind, url], cwd=folder, input=AI_SDK, text=True,
                          capture_output=True, timeout=TURN_SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["whole"] == told["streamed"] and told["whole"] and told["reason"] == "stop" and told["usage"] > 0
    assert told["zone"] in ("UTC", "CET") and told["steps"][0] == "tool-calls" and told["answer"]
    assert isinstance(told["sure"], bool)
