"""Families: chat templates for GGUF files that bring none.

What for: older files. How it works: the model's architecture, or else its file's name, tells the
family, and that the form of its turns; for others, turns are
lines of `role: content`. It costs nothing. It reads the file's
header, and sends nothing.
"""

import re

import engine

NO_SYSTEM = ("{% if messages[0].role == 'system' %}"
             "{{ raise_exception('System role not supported') }}{% endif %}")
FAMILIES = {  # name: (pattern, opening, each message `m`, the reply's beginning)
    "chatml": ("qwen|smollm|internlm2|chatml|dolphin|openorca|openhermes|hermes-?[23]", "",
               "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", "<|im_start|>assistant\n"),
    "zephyr": ("zephyr|tinyllama", "", "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n",
               "<|assistant|>\n"),
    "glm4": ("(?<!chat)glm-?4", "[gMASK]<sop>", "<|{{ m.role }}|>\n{{ m.content }}",
             "<|assistant|>\n"),
    "chatglm": ("chatglm", "[gMASK]sop", "<|{{ m.role }}|>\n {{ m.content }}", "<|assistant|>"),
    "gemma": ("gemma", NO_SYSTEM + "{{ bos_token }}",
              "<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
              "{{ m.content | trim }}<end_of_turn>\n", "<start_of_turn>model\n"),
    "mistral": ("mi[sx]tral", NO_SYSTEM + "{{ bos_token }}",
                "{% if m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
                "{% else %}[INST] {{ m.content }} [/INST]{% endif %}", ""),
    "llama3": ("llama[-_ ]?3", "{{ bos_token }}", "<|start_header_id|>{{ m.role }}<|end_header_id|>"
               "\n\n{{ m.content | trim }}<|eot_id|>",
               "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "llama2": ("llama[-_ ]?2|codellama", "", "{% if m.role == 'assistant' %}"
               " {{ m.content | trim }} {{ eos_token }}{% else %}{% if loop.first or "
               "loop.previtem.role != 'system' %}{{ bos_token }}[INST] {% endif %}"
               "{% if m.role == 'system' %}{{ '<<SYS>>\n' ~ m.content ~ '\n<</SYS>>\n\n' }}"
               "{% else %}{{ m.content | trim }} [/INST]{% endif %}{% endif %}", ""),
    "plain": ("$^", "", "{{ m.role }}: {{ m.content }}\n", "assistant:"),
}
FAMILY_TEMPLATES = {
    name: (opening + "{% for m in messages %}" + message + "{% endfor %}"
           "{% if add_generation_prompt %}" + reply + "{% endif %}")
    for name, (_, opening, message, reply) in FAMILIES.items()}


def family_of(architecture: str, file_name: str) -> str:
    """The family of a GGUF: by its `general.architecture` where that decides (several share
    `llama`, two share `chatglm`), then by its file's name."""
    decides = architecture not in ("llama", "chatglm")
    return next((family for name in (architecture * decides, file_name, architecture)
                 for family, (pattern, *_) in FAMILIES.items()
                 if re.search(pattern, name.lower() or " ")), "plain")


def equip(loaded: "engine.Engine", settings) -> None:
    """Give a model without a template that of its family."""
    model = loaded.model
    if not model.has_template and not settings.chat_template_file:
        model.set_template(FAMILY_TEMPLATES[family_of(model.architecture, model.path.name)])
