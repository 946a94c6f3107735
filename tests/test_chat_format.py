"""Chat formats: prompts of every family, tool formats, messages, replies taken apart.

Set LLAMA_CPP_TEMPLATES to the `models/templates` of an unpacked llama-cpp-python sdist to test
the real templates too; without it each of those tests passes having looked at none.

    1  families              expected strings
    2  the real templates    tool formats, histories
    3  messages              into what templates take
    4  replies               ChatParser, however the text is cut
    5  forms                 of tool calls
    6  rendering             bounded in time, chat_template_file, one BOS
"""

import json
import re
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import conftest  # noqa: E402
import engine  # noqa: E402
import server  # noqa: E402
from features import calls, families, forms, grammars, reasoning, structured, tools, turns  # noqa: E402
from small_templates import (  # noqa: E402
    FORMS, NAMES, PUBLISHED, TEMPLATES, learned, model_of)

GENERIC = calls.GENERIC
TOOLS = [
    {"type": "function", "function": {
        "name": "get_weather", "description": "The weather in a city.",
        "parameters": {"type": "object", "required": ["city"], "properties": {
            "city": {"type": "string", "description": "A city"},
            "days": {"type": "integer"}, "unit": {"type": "string", "enum": ["C", "F"]}}}}},
    {"type": "function", "function": {"name": "get_time"}}]
CALL = {"id": "call_abc", "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Paris", "days": 2}'}}
SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rain?"}
RESULT = {"role": "tool", "tool_call_id": "call_abc", "content": "sunny"}
ANSWER, MORE = {"role": "assistant", "content": "No."}, {"role": "user", "content": "Sure?"}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}


def turns_of(messages, offered, source, form) -> list[dict]:
    """Messages as a template gets them."""
    habits = turns.habits_of(model_of(source))[0] if source else frozenset()
    return server.prepare_messages(turns.merged(
        tools.prepare_messages(messages, offered, form), habits))


def render(source: str, messages, offered=None, **options) -> str:
    """What the server does, with a Model that has a template and no weights."""
    form = learned(source)[0]
    options |= {"tools": tools.prepare_tools(offered, form), **tools.variables_of(offered or [], form)}
    return model_of(source).render_chat(turns_of(messages, offered, source, form), options=options)


def source_of(name: str) -> str:
    return (PUBLISHED / f"{name}.jinja").read_text()


# ==== 1. Families =========================================================================

TALK = [SYSTEM, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"}]
EXPECTED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
              "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
              "<|im_start|>assistant\n",
    "gemma": "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n"
             "<start_of_turn>model\nHello!<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n"
             "<start_of_turn>model\n",
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello! </s>"
              "<s>[INST] Bye [/INST]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
              "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
              "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "chatglm": "[gMASK]sop<|system|>\n Be brief.<|user|>\n Hi<|assistant|>\n Hello!"
               "<|user|>\n Bye<|assistant|>",
    "glm4": "[gMASK]<sop><|system|>\nBe brief.<|user|>\nHi<|assistant|>\nHello!"
            "<|user|>\nBye<|assistant|>\n",
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Hello!</s>[INST] Bye [/INST]",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello!</s>\n"
              "<|user|>\nBye</s>\n<|assistant|>\n",
    "plain": "system: Be brief.\nuser: Hi\nassistant: Hello!\nuser: Bye\nassistant:",
}


@pytest.mark.parametrize("family", families.FAMILY_TEMPLATES)
def test_a_familys_prompt_is_the_published_one(family):
    assert render(families.FAMILY_TEMPLATES[family], TALK) == EXPECTED[family]


@pytest.mark.parametrize("architecture, file_name, family", [
    ("qwen2", "x.gguf", "chatml"), ("qwen3moe", "Llama-3-like.gguf", "chatml"),
    ("gemma3", "m.gguf", "gemma"), ("glm4", "m.gguf", "glm4"), ("chatglm", "m.gguf", "chatglm"),
    ("chatglm", "glm-4-9b-chat.gguf", "glm4"), ("chatglm", "chatglm3-6b.gguf", "chatglm"),
    ("smollm3", "m.gguf", "chatml"), ("llama", "Llama-2-7B-Chat.gguf", "llama2"),
    ("llama", "Meta-Llama-3.1-8B.gguf", "llama3"), ("llama", "llama3.gguf", "llama3"),
    ("llama", "Mistral-7B-Instruct-v0.2.gguf", "mistral"), ("llama", "mixtral.gguf", "mistral"),
    ("llama", "OpenHermes-2.5-Mistral-7B.gguf", "chatml"),
    ("llama", "SmolLM2-135M-Instruct.Q4_1.gguf", "chatml"),
    ("llama", "tinyllama-1.1b-chat.gguf", "zephyr"), ("llama", "model.gguf", "plain"),
    ("falcon", "falcon.gguf", "plain"), ("", "", "plain")])
def test_the_family_is_seen_from_the_architecture_then_the_file_name(
        architecture, file_name, family):
    assert families.family_of(architecture, file_name) == family


# ==== 2. The real templates ===============================================================


def for_each(names, check) -> None:
    """Check every template of these that is there; report all that fail."""
    problems = []
    for name in sorted(set(names) & set(NAMES)):
        try:
            check(name, source_of(name))
        except Exception as error:
            problems.append(f"{name}: {type(error).__name__}: {error}")
    assert not problems, "\n\n".join(problems)


def test_gemmas_own_template_agrees_with_ours():
    def check(_name, source):
        assert render(source, TALK) == EXPECTED["gemma"]

    for_each(["google-gemma-2-2b-it"], check)


def test_every_template_renders_calls_results_and_tools():
    def check(_name, source):
        prompt = render(source, [SYSTEM, USER, CALLING, RESULT, ANSWER, MORE], TOOLS)
        for text in ("Rain?", "get_weather", "Paris", "sunny", "get_time", "Sure?"):
            assert text in prompt
        assert "Be brief." in render(source, [SYSTEM, USER, ANSWER, MORE])

    for_each(NAMES, check)


def test_no_template_refuses_a_call_that_was_cut_off():
    cut = {**CALL, "function": {**CALL["function"], "arguments": '{"city": "Par'}}

    def check(_name, source):
        prompt = render(source, [USER, {**CALLING, "tool_calls": [cut]}, RESULT], TOOLS)
        assert "Par" in prompt and "sunny" in prompt

    for_each(NAMES, check)


def test_a_user_turn_after_a_result_renders():
    """Also where the template itself refuses it, such as Mistral's."""
    def check(_name, source):
        prompt = render(source, [SYSTEM, USER, CALLING, RESULT, MORE], TOOLS)
        assert "sunny" in prompt and "Sure?" in prompt

    for_each(NAMES, check)


# ==== 3. Messages =========================================================================


def test_messages_of_every_kind_reach_the_template_in_its_words():
    old = [{"role": "developer", "content": [{"type": "text", "text": "a"},
                                             {"type": "text", "text": "b"}]},
           {"role": "assistant", "content": None, "reasoning_content": "Hm.",
            "function_call": {"name": "f", "arguments": "[1"}},
           {"role": "function", "name": "f", "content": "r"}]
    system, call, result = turns_of(old, None, None, FORMS["hermes"])
    assert system == {"role": "system", "content": "a\nb"}
    assert call == {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [
        {"id": "f", "type": "function", "function": {"name": "f", "arguments": {"arguments": "[1"}}}]}
    assert result == {"role": "tool", "tool_call_id": "f", "content": "r"}
    _, call, result = turns_of(old, None, None, FORMS["mistral"])
    assert call["tool_calls"][0]["id"] == result["tool_call_id"]
    assert re.fullmatch("[a-zA-Z0-9]{9}", result["tool_call_id"])


def test_generic_calls_and_results_become_text_and_nothing_sent_is_changed():
    messages = [SYSTEM, USER, CALLING, RESULT, {**RESULT, "content": "warm"}, MORE]
    before = json.dumps(messages)
    given = turns_of(messages, TOOLS, None, GENERIC)
    assert json.dumps(messages) == before
    assert [turn["role"] for turn in given] == ["system", "user", "assistant", "user"]
    assert given[0]["content"].startswith("Be brief.\n\n") and "get_time" in given[0]["content"]
    assert given[2]["content"] == ('<tool_call>\n{"name": "get_weather", "arguments": '
                                   '{"city": "Paris", "days": 2}}\n</tool_call>')
    assert given[3]["content"] == ("<tool_response>\nsunny\n</tool_response>\n\n<tool_response>\n"
                                   "warm\n</tool_response>\n\nSure?")


# ==== 4. Replies ==========================================================================


def new_parser(form=None, offered=(), unclosed: str = "", split_reasoning: bool = True,
               thinking=reasoning.Thinking()):
    if form is None:
        return reasoning.ReplyParser(unclosed, split_reasoning, thinking)
    return tools.CallParser(form, list(offered), False, unclosed, split_reasoning, thinking)


def read(text: str, step: int = 1, **options) -> dict:
    """Feed a reply in pieces of `step` characters and fold the deltas."""
    parser = new_parser(**options)
    reply = {"content": "", "reasoning_content": "", "calls": []}
    deltas = [d for i in range(0, len(text), step) for d in parser.feed(text[i:i + step])]
    for delta in deltas + parser.finish():
        (key, value), = delta.items()
        if key != "tool_calls":
            assert value
            reply[key] += value
            continue
        (call,) = value
        if "id" in call:
            assert call["index"] == len(reply["calls"]) and call["type"] == "function"
            assert call["function"]["arguments"] == ""
            reply["calls"].append([call["id"], call["function"]["name"], ""])
        else:
            assert call.keys() == {"index", "function"} and call["function"]["arguments"]
            reply["calls"][call["index"]][2] += call["function"]["arguments"]
    assert getattr(parser, "n_calls", 0) == len(reply["calls"])
    return reply


STEPS = pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
ARGUMENTS = ['{"city": "Pa\\"}\\n</tool_call>\\\\", "days": 2}', '{"a": [{}, "]"]}', "{}"]
JSON_CALLS = {
    "hermes": '<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>\n<tool_call>\n'
              '{"name": "g", "arguments": %s}\n</tool_call>',
    "llama3": '{"name": "f", "parameters": %s}',
    "mistral": "[TOOL_CALLS]f[CALL_ID]abcdefgh1[ARGS]%s[TOOL_CALLS]g[CALL_ID]abcdefgh2[ARGS]%s",
    "mistral-nemo": '[TOOL_CALLS][{"name": "f", "arguments": %s, "id": "abcdefgh1"}, '
                    '{"name": "g", "arguments": %s, "id": "abcdefgh2"}]',
}


@STEPS
@pytest.mark.parametrize("name", JSON_CALLS)
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_calls_are_read_however_the_text_is_cut(name, arguments, step):
    text = JSON_CALLS[name]
    n_calls = text.count("%s")
    reply = read(text % ((arguments,) * n_calls), step, form=FORMS[name])
    assert [call[1:] for call in reply["calls"]] == [["f", arguments], ["g", arguments]][:n_calls]
    assert reply["content"] == ""
    pattern = "abcdefgh[12]" if name == "mistral" else "call_[a-zA-Z0-9]{24}"
    assert all(re.fullmatch(pattern, call[0]) for call in reply["calls"])


@STEPS
def test_xml_parameters_become_a_json_object(step):
    text = ("Let me look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nSão \"P\"\n\n"
            "</parameter>\n<parameter=days>\n[1, 2]\n</parameter>\n<parameter=unit>\nC\n"
            "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=get_time>\n"
            "</function>\n</tool_call>")
    reply = read(text, step, form=FORMS["qwen3-coder"], offered=TOOLS)
    assert reply["content"] == "Let me look."
    assert [call[1] for call in reply["calls"]] == ["get_weather", "get_time"]
    assert json.loads(reply["calls"][0][2]) == {"city": 'São "P"\n', "days": [1, 2], "unit": "C"}
    assert reply["calls"][1][2] == "{}"


@STEPS
@pytest.mark.parametrize("text, reasoning, content", [
    ("<think>\nHm.\n</think>\n\nYes. ", "Hm.", "Yes. "),
    ("<think>\n\n</think>\n\nYes", "", "Yes"),
    ("[THINK]a <b> [/THIN[/THINK]c", "a <b> [/THIN", "c"),
    ("<think>cut off</thi", "cut off</thi", ""),
    (" \n<thin air> </think>", "", " \n<thin air> </think>"),
    ("Tags <think>later</think>", "", "Tags <think>later</think>"),
    ("a\0b", "", "a\0b"), ("", "", ""), (" ", "", " "),
    ("\n\n" + 300 * " " + "x\n ", "", "\n\n" + 300 * " " + "x\n "),
])
def test_reasoning_is_told_from_content(text, reasoning, content, step):
    reply = read(text, step)
    assert (reply["reasoning_content"], reply["content"]) == (reasoning, content)


CHANNELS = reasoning.Thinking(  # as they are learned from gpt-oss's template
    "<|channel|>analysis<|message|>", "<|end|><|start|>assistant", "<|channel|>final<|message|>")


@STEPS
@pytest.mark.parametrize("text, thought", [
    ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b", "a"),
    ("<|channel|>final<|message|>b", "")])
def test_what_stands_before_every_answer_is_no_part_of_it(text, thought, step):
    reply = read(text, step, thinking=CHANNELS)
    assert (reply["reasoning_content"], reply["content"]) == (thought, "b")


@STEPS
def test_reasoning_that_the_prompt_opened(step):
    close = reasoning.Thinking().unclosed("<|Assistant|><think>\n")
    reply = read("So.\n</think>\n\n<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>",
                 step, unclosed=close, form=GENERIC)
    assert reply["reasoning_content"] == "So." and reply["calls"][0][1:] == ["f", "{}"]
    assert reasoning.Thinking().unclosed("<think>\n\n</think>\n\n") == ""
    assert read("<think>x</think>", step, split_reasoning=False)["content"] == "<think>x</think>"


@STEPS
def test_a_partial_tag_never_leaks_and_is_released_at_the_end(step):
    for text in ("a <tool_cal", "a <tool_calls> b \n\n", "<tool", "a\n", "<<tool_call"):
        assert read(text, step, form=GENERIC)["content"] == text


@STEPS
def test_a_llama_call_stands_only_at_the_start(step):
    text = 'Write {"name": "x", "parameters": {}}'
    assert read(text, step, form=FORMS["llama3"])["content"] == text


@pytest.mark.parametrize("name", JSON_CALLS)
@pytest.mark.parametrize("step", [1, 5])
def test_a_call_cut_anywhere_yields_what_was_complete(name, step):
    whole = JSON_CALLS[name].replace("%s", '{"a": "b"}')
    before = []
    for end in range(len(whole)):
        reply = read(whole[:end], step, form=FORMS[name])
        assert reply["content"] == "" or reply["content"] == whole[:end]
        assert not (reply["content"] and reply["calls"])
        calls = "".join(name + arguments for _, name, arguments in reply["calls"])
        assert calls.startswith("".join(before))
        before = [calls]
    assert calls


@pytest.mark.parametrize("step", [1, 5])
def test_an_xml_call_cut_anywhere_yields_what_was_complete(step):
    whole = ("<tool_call>\n<function=get_weather>\n<parameter=city>\nA\n</parameter>\n"
             "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>")
    arguments = '{"city": "A", "days": 2}'
    for end in range(len("<tool_call>"), len(whole) + 1):
        reply = read(whole[:end], step, form=FORMS["qwen3-coder"], offered=TOOLS)
        assert reply["content"] == ""
        assert all(call[1] == "get_weather" and arguments.startswith(call[2])
                   for call in reply["calls"]), whole[:end]
    assert reply["calls"][0][2] == arguments


def test_work_does_not_grow_with_the_text():
    parser = new_parser(GENERIC)
    for _ in range(50_000):
        parser.feed(" <")
        assert len(parser._pending) <= reasoning.MAX_HELD + 2


# ==== 5. Forms of tool calls ==============================================================


@pytest.fixture(scope="module")
def model():
    """The default model."""
    model = engine.Model(conftest.default_model())
    yield model
    model.close()


def follows(model, form: structured.Form, text: str) -> bool:
    """Whether a reply of this text, and no less, has a form."""
    reply, end = form.replies(model, must_trigger=True)(), min(model.end_tokens)
    return all(reply.take(token) for token in model.tokenize(text, bos=False).tolist()) \
        and reply.take(end)


CALL_TEXTS = {name: text.replace("%s", "{}").replace('"f"', '"get_time"').replace('"g"', '"get_time"')
              .replace("]f[", "]get_time[").replace("]g[", "]get_time[")
              for name, text in JSON_CALLS.items()} | {"qwen3-coder": "\n".join(
                  ["<tool_call>\n<function=get_time>\n</function>\n</tool_call>"] * 2)}


@pytest.mark.parametrize("name", CALL_TEXTS)
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("from_trigger", [True, False])
def test_the_form_of_calls_takes_what_the_parser_reads(model, name, parallel, from_trigger):
    """It takes the calls of the parser's tests, two only if parallel, and neither half a call nor
    another function."""
    form, reply_form = FORMS[name], structured.Form()
    functions = [(tool["function"]["name"], grammars.add_arguments(
        reply_form, form, tool["function"].get("parameters") or {}, f"tools[{i}].function.parameters"))
        for i, tool in enumerate(TOOLS)]
    reply_form.root = grammars.calls_of(form, functions, parallel, from_trigger)
    both = CALL_TEXTS[name]
    separator = next((each for each in ("\n<tool_call>", "[TOOL_CALLS]get", ', {"name"')
                      if each in both[5:]), None)
    one = both if separator is None else both[:both.index(separator, 5)] + form.closing
    cut = len(form.trigger) if from_trigger else 0
    assert follows(model, reply_form, one[cut:])
    assert separator is None or follows(model, reply_form, both[cut:]) == parallel
    assert not follows(model, reply_form, one[cut:-1])
    assert not follows(model, reply_form, one[cut:].replace("get_time", "get_tim"))
    reply = read(one, form=form, offered=TOOLS)
    assert [call[1:] for call in reply["calls"]] == [["get_time", "{}"]]


OPENERS = [{"additionalProperties": True}, {"additionalProperties": {"type": "integer"}},
           {"patternProperties": {"^p": {}}}, {"allOf": [{"properties": {"a": {}, "p": {}}}]}]


def test_a_call_has_the_arguments_that_its_function_declares(model):
    """A little model that may invent arguments does so until its length cuts the call off. Where a
    schema says more than `properties`, its own rules hold."""
    declared = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for schema, text, may in [
            (declared, '{"a": 1}', True), (declared, '{"p": 1}', False),
            (declared, '{"a": 1, "p": 1}', False), ({"properties": {}}, '{"p": 1}', False),
            ({"properties": {}, "description": "Nothing."}, "{}", True),
            ({"type": "object"}, '{"p": 1}', True), ({}, '{"p": 1}', True),
            *[({**declared, **opener}, '{"a": 1, "p": 1}', True) for opener in OPENERS]]:
        form = structured.Form()
        form.root = grammars.add_arguments(form, GENERIC, schema, "parameters")
        assert follows(model, form, text) == may, (schema, text)


# ==== 6. Rendering ========================================================================

ENDLESS = {
    "nested": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
              "{% endfor %}{% endfor %}{% endfor %}",
    "writing": "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}"
               "{% endfor %}",
    "in a macro": "{% macro f(n) %}{% for a in range(99999) %}{% for b in range(99999) %}"
                  "{% set x = a * b %}{% endfor %}{% endfor %}{% endmacro %}{{ f(1) }}",
    "recursive": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "in one line": "{% set x = namespace(n=0) %}{% for a in range(99999) %}{% for b in range(99999)"
                   " %}{% set x.n = x.n + 1 %}{% endfor %}{% endfor %}{{ x.n }}",
}


@pytest.fixture
def load(tmp_path):
    """The default model with a template of one's own."""
    models = []

    def load(template: str) -> engine.Model:
        file = tmp_path / "template.jinja"
        file.write_text(template)
        models.append(engine.Model(conftest.default_model(),
                                   chat_template_file=str(file)))
        return models[-1]

    yield load
    for model in models:
        model.close()


@pytest.mark.parametrize("name", ENDLESS)
def test_rendering_is_bounded_in_time(load, name):
    """A template that does not end is refused like one that raises, and the next one works."""
    model = load("{% if messages[0].content == 'loop' %}" + ENDLESS[name] + "{% endif %}ok")
    began = time.monotonic()
    with pytest.raises(engine.TemplateError):
        model.render_chat([{"role": "user", "content": "loop"}])
    assert time.monotonic() - began < 3
    assert model.render_chat([{"role": "user", "content": "end"}]) == "ok"


def test_the_template_files_own_words_reach_the_prompt(load):
    """chat_template_file stands in for the GGUF's own, and says how calls are written."""
    model = load("{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
                 "{% if add_generation_prompt %}<bot>{% endif %}{{ mood }}")
    assert model.render_chat([{"role": "user", "content": "Hi"}]) == "<|im_start|><user>Hi<bot>"
    assert model.render_chat([{"role": "user", "content": "Hi"}], False, {"mood": "!", "tools": None}) == \
        "<|im_start|><user>Hi!"
    assert forms.learn(model, reasoning.learn(model))[0] is GENERIC
    other = load(TEMPLATES["mistral"])
    assert forms.learn(other, reasoning.learn(other))[0] == FORMS["mistral"]


def test_a_template_that_cannot_be_used_is_a_model_error(tmp_path):
    path = conftest.default_model()
    with pytest.raises(engine.ModelError, match="no-such.jinja"):
        engine.Model(path, chat_template_file=str(tmp_path / "no-such.jinja"))
    (tmp_path / "bad.jinja").write_text("{% for %}")
    with pytest.raises(engine.ModelError, match="bad.jinja"):
        engine.Model(path, chat_template_file=str(tmp_path / "bad.jinja"))


@pytest.mark.parametrize("source, message", [
    ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
    ("{{ messages[0].no.such }}", "no attribute"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),  # the sandbox
    ("{{ 1 / 0 }}", "zero")])
def test_a_templates_own_refusal_is_told(source, message):
    with pytest.raises(engine.TemplateError, match=message):
        render(source, TALK)


@pytest.mark.parametrize("opening", ["", "{{ bos_token }}"])
def test_a_prompt_has_exactly_one_bos(load, opening):
    """Whether the template writes it, the tokenizer adds it, or both. (The default model's own
    BOS is <|im_start|> and is not added; this one is made to.)"""
    model = load(opening + "{{ messages[0].content }}")
    model._add_bos = True
    tokens = model.tokenize(model.render_chat([{"role": "user", "content": "Hi"}])).tolist()
    assert tokens.count(model._bos) == 1 and tokens[0] == model._bos
    assert model.tokenize("Hi", bos=False).tolist() == tokens[1:]
