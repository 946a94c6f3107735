"""Small chat templates, one for each kind of form in which models write tool calls.

They are written for the tests, after what published templates do: LLAMA_CPP_TEMPLATES names the folder
`models/templates` of an unpacked llama-cpp-python sdist, where test_forms.py finds those.
"""

import functools
import os
import sys
from pathlib import Path

from llama_cpp.llama_chat_format import Jinja2ChatFormatter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import engine  # noqa: E402
from features import calls, forms, reasoning  # noqa: E402

PUBLISHED = Path(os.environ.get("LLAMA_CPP_TEMPLATES") or "no/such/folder")
NAMES = sorted(path.stem for path in PUBLISHED.glob("*.jinja"))


def template(call: str, before: str = "", between: str = "", after: str = "", content: str =
             "{{ m.content or '' }}", prompt: str = "<|assistant|>", end: str = "<|end|>") -> str:
    """A template that writes calls so: `call` for each, `between` two, with what stands before the
    first and after the last."""
    return ("{% for t in tools or [] %}<|tool|>{{ t | tojson }}{% endfor %}{% for m in messages %}"
            "<|{{ m.role }}|>{% if m.tool_calls %}{% if m.content %}" + content + "{% endif %}"
            + before + "{% for c in m.tool_calls %}{% set f = c.function %}"
            + call + "{% if not loop.last %}" + between + "{% endif %}{% endfor %}" + after
            + "{% elif m.role == 'assistant' %}" + content + "{% else %}{{ m.content }}{% endif %}"
            + end + "{% endfor %}{% if add_generation_prompt %}" + prompt + "{% endif %}")


def elements(call: str) -> str:
    """`call` with each argument `k`, `v` between @ and @."""
    start, element, end = call.split("@")
    return start + "{% for k, v in f.arguments.items() %}" + element + "{% endfor %}" + end


JSON = "{{ f.arguments | tojson }}"
VALUE = "{{ v if v is string else v | tojson }}"
XML = ("<tool_call>\n<function={{ f.name }}>\n@<parameter={{ k }}>\n" + VALUE
       + "\n</parameter>\n@</function>\n</tool_call>")
REASONS = ("<think>\n{{ m.reasoning_content }}\n</think>\n\n")
TEMPLATES = {
    "hermes": template('<tool_call>\n{"name": "{{ f.name }}", "arguments": ' + JSON
                       + "}\n</tool_call>", between="{{ '\n' }}"),
    "llama3": template(  # one call only, which begins with the reply
        "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at once') }}{% endif %}"
        '{"name": "{{ f.name }}", "parameters": ' + JSON + "}"),
    "mistral": template(
        "{% if c.id | length != 9 %}{{ raise_exception('nine letters') }}{% endif %}"
        "[TOOL_CALLS]{{ f.name }}[CALL_ID]{{ c.id }}[ARGS]" + JSON),
    "mistral-nemo": template('{"name": "{{ f.name }}", "arguments": ' + JSON
                             + ', "id": "{{ c.id }}"}', "[TOOL_CALLS][", ", ", "]"),
    "qwen3-coder": template(elements(XML), between="{{ '\n' }}"),
    "glm": template(elements(  # the reasoning is in every turn
        "<tool_call>{{ f.name }}@<arg_key>{{ k }}</arg_key><arg_value>" + VALUE
        + "</arg_value>@</tool_call>"), content="{{ m.content }}", prompt="<|assistant|></think>",
        before="</think>").replace("{% elif m.role == 'assistant' %}",
                                   "{% elif m.role == 'assistant' %}</think>"),
    "gemma": template(
        "<|call>call:{{ f.name }}{{ '{' }}{% for k, v in f.arguments | dictsort %}{{ k }}:"
        "{% if v is string %}<|\"|>{{ v }}<|\"|>{% else %}{{ v | tojson }}{% endif %}"
        "{{ ',' if not loop.last }}{% endfor %}}<call|>"),
    "python": template(
        "{{ f.name }}({% for k, v in f.arguments.items() %}{{ k }}={% if v is string %}'{{ v }}'"
        "{% else %}{{ v }}{% endif %}{{ ', ' if not loop.last }}{% endfor %})",
        "<|calls>[", ", ", "]<calls|>"),
    "key": template('{"{{ f.name }}": ' + JSON + "}", "<|tools_prefix|>[", ", ", "]<|tools_suffix|>"),
    "text": template(  # arguments as text, and no content beside calls
        "{% if m.content is not none %}{{ raise_exception('content beside calls') }}{% endif %}"
        "<|call|>function<|sep|>{{ f.name }}\n```json\n{{ '' + f.arguments }}\n```<|/call|>",
        "<|calls|>", "{{ '\n' }}", "<|/calls|>"),
    "numbered": template(elements(  # a number for each call, a type for each value
        '<|open|>call tool="{{ f.name }}" index="{{ loop.index }}"<|sep|>@<|open|>argument '
        'key="{{ k }}" type="{{ \'string\' if v is string else \'boolean\' if v is boolean else '
        "'number' if v is number else 'null' if v is none else 'object' if v is mapping else "
        "'array' }}\"<|sep|>" + VALUE + "<|close|>argument<|sep|>@<|close|>call<|sep|>"),
        "<|open|>tools<|sep|>", "", "<|close|>tools<|sep|>", prompt="<|assistant|>",
        content="<|open|>response<|sep|>{{ m.content }}<|close|>response<|sep|>"),
    "strings": template(elements(
        '<|invoke name="{{ f.name }}">\n@<|parameter name="{{ k }}" string="{{ \'true\' if v is '
        "string else 'false' }}\">" + VALUE + "</|parameter>\n@</|invoke>\n"),
        "\n\n<|calls>\n", "", "</|calls>"),
    "recipient": template(  # the name twice, and what answers stand behind
        ' to={{ f.name }}<|message|><invoke name="{{ f.name }}">' + JSON + "</invoke>",
        between="<|eom|><|assistant|>", content=" to=user<|message|>{{ m.content }}"),
    "thinking": template(
        '<tool_call>{"name": "{{ f.name }}", "arguments": ' + JSON + "}</tool_call>",
        "{% if m.reasoning_content %}" + REASONS + "{% endif %}", prompt="<|assistant|><think>\n",
        content="{% if m.reasoning_content %}" + REASONS + "{% endif %}{{ m.content or '' }}"),
}


def model_of(source: str) -> engine.Model:
    """A Model that has a template and no weights."""
    model = object.__new__(engine.Model)
    model.generates, model.end_tokens, model.template_source = True, frozenset(), source
    model._template = Jinja2ChatFormatter(template=source, eos_token="</s>", bos_token="<s>")
    return model


@functools.cache
def thinking_of(source: str) -> reasoning.Thinking:
    """How a template makes its model think."""
    return reasoning.learn(model_of(source))


@functools.cache
def learned(source: str) -> tuple[calls.CallForm, str]:
    """The form that is learned from a template, and why."""
    return forms.learn(model_of(source), thinking_of(source))


FORMS = {name: learned(source)[0] for name, source in TEMPLATES.items()}
