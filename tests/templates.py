"""Chat templates to try features on, and a desk that makes prompts with them, without a server.

SMALL has templates written for the tests, each with a habit of real ones. Set LLAMA_CPP_TEMPLATES to
the `models/templates` of an unpacked llama-cpp-python sdist (vendor/llama.cpp) to try the real ones,
too; the vocabularies in the folder above are then tried as well.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import conftest  # noqa: E402
import engine  # noqa: E402
import server  # noqa: E402

FOLDER = Path(os.environ.get("LLAMA_CPP_TEMPLATES") or "no/such/folder")
REAL = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.jinja"))}

REPLY = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
SAID, END = "<|im_start|>{{ m.role }}\n{{ m.content }}", "<|im_end|>\n"
TURN = SAID + END
CALLS = ("{% for c in m.tool_calls or [] %}<tool_call>{{ {'name': c.function.name, 'arguments': "
         "c.function.arguments} | tojson }}</tool_call>{% endfor %}")
ALTERNATE = ("{% for m in talk %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
             "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}")
INST = ("{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == 'tool' %}"
        "[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% elif m.tool_calls %}[TOOL_CALLS]"
        "{{ m.tool_calls | tojson }}</s>{% else %}{{ m.content }}</s>{% endif %}")
SMALL = {
    "takes everything": "{% for m in messages %}" + SAID + CALLS + END + "{% endfor %}" + REPLY,
    "refuses a late system message":
        "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
        "{{ raise_exception('System message must be at the beginning.') }}{% endif %}" + TURN
        + "{% endfor %}" + REPLY,
    "drops a late system message":
        "{% for m in messages %}{% if m.role != 'system' or loop.first %}" + TURN
        + "{% endif %}{% endfor %}" + REPLY,
    "keeps the last system message":
        "{% set ns = namespace(system='') %}{% for m in messages if m.role == 'system' %}"
        "{% set ns.system = m.content %}{% endfor %}{{ bos_token }}{{ ns.system }}"
        "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>"
        "{{ m.content.split('</think>')[-1] | trim }}{% if m.role == 'assistant' %}<|end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
    "no system, alternating": "{{ bos_token }}{% set talk = messages %}{% if messages[0].role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}" + ALTERNATE
        + "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "alternating but for tools":
        "{{ bos_token }}{% if messages[0].role == 'system' %}[SYSTEM_PROMPT]{{ messages[0].content }}"
        "[/SYSTEM_PROMPT]{% set messages = messages[1:] %}{% endif %}{% set ns = namespace(n=0) %}"
        "{% for m in messages if m.role != 'tool' and not m.tool_calls %}{% if (m.role == 'user') != "
        "(ns.n % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{% endfor %}{% for m in messages %}" + INST + "{% endfor %}",
    "the system message in the last user's":
        "{% set ns = namespace(system='') %}{% if messages[0].role == 'system' %}"
        "{% set ns.system = messages[0].content ~ '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% elif m.role == 'user' and loop.last %}[INST] {{ ns.system }}{{ m.content }} [/INST]"
        "{% else %}" + INST + "{% endif %}{% endfor %}",
    "no chat without a user":
        "{% if not messages | selectattr('role', 'equalto', 'user') | list %}"
        "{{ raise_exception('No user query found in messages.') }}{% endif %}"
        "{% for m in messages %}" + TURN + "{% endfor %}" + REPLY,
    "writes reasoning":
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% set thoughts = m.reasoning_content or '' %}{% set said = m.content %}"
        "{% if '</think>' in said %}{% set thoughts = said.split('</think>')[0].split('<think>')[-1] %}"
        "{% set said = said.split('</think>')[-1] %}{% endif %}<think>\n{{ thoughts }}\n</think>\n\n"
        "{{ said }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    "goes on inside the reasoning":
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}"
        "<think>\n{% endif %}{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    "writes names of arguments into tags":
        "{% for m in messages %}" + SAID + "{% for c in m.tool_calls or [] %}<tool_call><function="
        "{{ c.function.name }}>{% if c.function.arguments is mapping %}{% for name, value in "
        "c.function.arguments | items %}<parameter={{ name }}>{{ value }}</parameter>{% endfor %}"
        "{% else %}{{ c.function.arguments }}{% endif %}</function></tool_call>{% endfor %}"
        + END + "{% endfor %}" + REPLY,
    "makes ASCII of tools and calls":
        "{% if tools %}<|im_start|>system\n{{ tools | tojson(ensure_ascii=True) }}<|im_end|>\n{% endif %}"
        "{% for m in messages %}" + SAID + "{% for c in m.tool_calls or [] %}<tool_call>{{ c | tojson(True, 2) }}</tool_call>{% endfor %}"
        + END + "{% endfor %}" + REPLY,
}


class Loaded:
    """An engine as features know it, of which nothing is asked but its model."""

    def __init__(self, model: engine.Model, *features):
        self.model, self.n_ctx, self.capabilities, self.facts = model, 2**20, [], {}
        for feature in features:
            feature.equip(self, conftest.config())


def chat_of(loaded: Loaded, body: dict) -> server.Chat:
    """What a body wants, after all features had their say."""
    handler, house = object.__new__(server.Handler), conftest.house()
    handler.loaded = loaded
    handler.server = type("Server", (), {"config": conftest.config(), "house": house})
    return handler.join(server.Chat, server.read_object(
        house.type_of(server.ChatBody), body, "", server.Reading(house)))
