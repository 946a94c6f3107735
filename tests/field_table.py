"""The tables of request fields in docs/api.md, made from the dataclasses in server.py.

`python tests/field_table.py` writes them between the two markers there; a test checks that they
stand there as made. What becomes of a field and its limits come from its metadata, the notes
from NOTES below.
"""

import dataclasses
import inspect
import math
import sys
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import conftest  # noqa: E402
import engine  # noqa: E402
import server  # noqa: E402
from features import embeddings, messages, responses, tokens  # noqa: E402

HOUSE = conftest.house()

FILE = ROOT / "docs" / "api.md"
BEGIN, END = "<!-- fields -->\n", "<!-- /fields -->\n"
BODIES = {server.ChatBody: "chat", server.CompletionBody: "completions",
          embeddings.EmbeddingBody: "embeddings", tokens.TokenizeBody: "tokenize",
          tokens.DetokenizeBody: "detokenize", responses.ResponsesBody: "responses",
          messages.MessagesBody: "messages"}
# In this order the fields are listed: OpenAI's of each path, those that paths share, samplers.
ORDER = [server.ChatBody, server.CompletionBody, embeddings.EmbeddingBody, tokens.TokenizeBody,
         tokens.DetokenizeBody, responses.InputBody, responses.ResponsesBody, messages.CountBody,
         messages.MessagesBody, server.GenerationBody, engine.SamplingParams]
KINDS = ("honoured", "no effect", "refused")
SETTING = "default: the setting"
LOCAL = "local"

# By the field's path, or by "PLACE PATH" where places differ.
NOTES = {
    "model": "the model's name or one of `model_aliases`; may be left out",
    "messages": "content is a string or text parts; an assistant's may be null beside `tool_calls`",
    "chat max_tokens": SETTING,
    "completions max_tokens": "default: 16",
    "max_completion_tokens": "the newer name; wins over `max_tokens`",
    "chat logprobs": "true or false; with `bytes`",
    "completions logprobs": "the legacy shape",
    "top_logprobs": "needs `logprobs: true`",
    "response_format": "see [Structured output](#structured-output)",
    "prediction": "see [Predicted outputs](#predicted-outputs)",
    "prediction.content": "a string or text parts",
    "tools": "functions; see [Tools](#tools)",
    "tool_choice": "or a named function, or `allowed_tools`",
    "parallel_tool_calls": "false: one call at most; where it is not sent, see [Tools](#tools)",
    "functions": "the deprecated form of `tools`",
    "function_call": "or a named function; the deprecated form of `tool_choice`",
    "reasoning_effort": "given to the template; `none` and `minimal` also set `enable_thinking: "
                        "false` and end the reasoning, the others set true",
    "reasoning_budget": f"{LOCAL}: tokens; -1: no bound; see [Reasoning](#reasoning)",
    "chat_template_kwargs": f"{LOCAL}: variables for the chat template",
    "add_generation_prompt": f"{LOCAL}: false ends the prompt after the last message",
    "continue_final_message": f"{LOCAL}: the reply goes on where the content of the last, "
                              "the assistant's, message ends",
    "prompt": "a string, a list of strings, a list of token ids, or a list of such lists; at most "
              f"{server.MAX_CHOICES} replies in all",
    "echo": "the text begins with the prompt; with `logprobs`, its tokens are scored too",
    "suffix": "what follows the reply; 400 where the model has no fill-in-the-middle tokens",
    "best_of": "at least `n`; the `n` likeliest of so many replies; in a stream equal to `n`",
    "input": f"a string, a list of strings, a list of token ids, or a list of such lists; at most "
             f"{tokens.MAX_INPUTS}",
    "dimensions": "at most the model's; the vector's beginning, brought to length 1",
    "content": "the text",
    "add_special": "put the BOS in front, where the model has one; default: false",
    "add_special_tokens": "the same beside `prompt`; default: true",
    "tokenize prompt": "vLLM's name of the text",
    "parse_special": "special tokens written out become these tokens; default: true",
    "with_pieces": "also the text of each token; default: false",
    "tokens": "token ids",
    "n": "choices for each prompt, which share one reading of it; default: 1",
    "stop": "a string or a list, each of 1 to 1000 characters; the text ends before it",
    "logit_bias": "by token id",
    "ignore_eos": f"{LOCAL}: no end of text",
    "stream": "server-sent events",
    "stream_options": "needs `stream: true`",
    "cache_prompt": f"{LOCAL}: false reads the prompt anew; default: true",
    "grammar": f"{LOCAL}: GBNF that the reply follows",
    "json_schema": f"{LOCAL}: a JSON Schema that the reply satisfies, as it is or as text",
    "structured_outputs": f"{LOCAL}: one of `json`, `regex`, `choice`, `grammar`, `json_object`",
    "guided_json": f"{LOCAL}: as `structured_outputs.json`",
    "guided_regex": f"{LOCAL}: as `structured_outputs.regex`",
    "guided_choice": f"{LOCAL}: as `structured_outputs.choice`",
    "guided_grammar": f"{LOCAL}: as `structured_outputs.grammar`",
    "guided_whitespace_pattern": f"{LOCAL}: as `structured_outputs.whitespace_pattern`",
    "guided_decoding_backend": f"{LOCAL}: there is one",
    "regex": f"{LOCAL}: as `structured_outputs.regex`",
    "ebnf": f"{LOCAL}: as `grammar`",
    "structured_outputs.json": "a JSON Schema, as it is or as text",
    "structured_outputs.regex": "a pattern that the whole reply matches",
    "structured_outputs.choice": "the reply is one of these texts",
    "structured_outputs.grammar": "GBNF or Lark",
    "structured_outputs.json_object": "true: any object",
    "structured_outputs.whitespace_pattern": "a pattern for the white space of JSON",
    "structured_outputs.disable_any_whitespace": "JSON without white space",
    "structured_outputs.disable_additional_properties": "true is a 400: write it in the schema",
    "seed": "the same seed and request give the same reply, but for rounding: when other requests "
            "run beside it, when more of its prompt is cached, and from 256 tokens of context on "
            "with drafts (`draft: null`); default: a new one each time",
    "temperature": f"0 takes the likeliest token; {SETTING}",
    "top_p": SETTING,
    "top_k": f"{LOCAL}: 0 and -1 keep all tokens; {SETTING}",
    "min_p": f"{LOCAL}; {SETTING}",
    "typical_p": f"{LOCAL}; 1: off",
    "top_n_sigma": f"{LOCAL}; below 0: off",
    "presence_penalty": "counts the tokens of the reply",
    "frequency_penalty": "counts the tokens of the reply",
    "repeat_penalty": f"{LOCAL}; 1: off",
    "repeat_last_n": f"{LOCAL}: tokens looked back at, in the prompt too; -1: all; default: 64",
    "dry_multiplier": f"{LOCAL}; 0: off",
    "dry_base": f"{LOCAL}; default: 1.75",
    "dry_allowed_length": f"{LOCAL}; default: 2",
    "dry_penalty_last_n": f"{LOCAL}: tokens looked back at; -1, the default: all",
    "dry_sequence_breakers": f"{LOCAL}; default: line end, `:`, `\"`, `*`",
    "xtc_probability": f"{LOCAL}; 0: off",
    "xtc_threshold": f"{LOCAL}; default: 0.1",
    "mirostat": f"{LOCAL}: 1 and 2 take the place of all samplers but the temperature; 0: off",
    "mirostat_tau": f"{LOCAL}; default: 5",
    "mirostat_eta": f"{LOCAL}; default: 0.1",
    "min_tokens": f"{LOCAL}: no end before so many tokens",
    "store": "but for false",
    "modalities": "but for `[\"text\"]`",
    "messages[].role": "`developer` is taken for `system`, `function` for `tool`",
    "messages[].content": "null only beside calls, a refusal or reasoning",
    "messages[].name": "what a `function` message answers; elsewhere it changes nothing",
    "messages[].tool_calls": "in an assistant's message",
    "messages[].tool_calls[].function.arguments": "JSON as text",
    "messages[].tool_call_id": "required in a `tool` message",
    "messages[].function_call": "the deprecated form of `tool_calls`",
    "messages[].reasoning_content": "given to the template",
    "response_format.schema": f"{LOCAL}: with `json_object`, a schema as in `json_schema`",
    "response_format.value": f"{LOCAL}: with `json`, `json_object`, `json_schema` and `regex`, what "
                             "Hugging Face's clients send",
    "response_format.json_schema.name": "required, but changes nothing",
    "response_format.json_schema.strict": "the reply always validates",
    "tools[].function.parameters": "a JSON Schema; left out: no parameters",
    "tools[].function.strict": "true: a schema that a call cannot be held to is a 400, not "
                               "loosened",
    "tool_choice.allowed_tools.tools": "items as in `tools`, names are enough",
    "tool_choice.function": "its `name`",
    "responses input": "a string, or a list of [items](#responses)",
    "instructions": "the system's first words; those of earlier responses are gone",
    "previous_response_id": "a response that is kept: its conversation goes on",
    "responses tools": "functions, also in a `namespace`; other kinds are skipped and named",
    "responses tool_choice": "or a named function, or `allowed_tools`",
    "responses metadata": "told again",
    "reasoning": "see [Reasoning](#reasoning); with a `summary`, its events come, too",
    "reasoning.effort": "as `reasoning_effort`; `max` is `xhigh`",
    "reasoning.generate_summary": "the older name of `summary`",
    "text": "see [Structured output](#structured-output)",
    "truncation": "nothing is ever cut",
    "max_output_tokens": SETTING,
    "responses top_logprobs": "also asks for log-probabilities",
    "include": "`message.output_text.logprobs` asks for log-probabilities; the others change nothing",
    "responses store": "false: nothing is kept; default: true",
    "background": "but for false",
    "responses prompt": "a template kept elsewhere",
    "messages messages": "content is a string or a list of [blocks](#messages)",
    "system": "a string or text blocks",
    "messages tools": "with `input_schema`; those that servers run are skipped and named",
    "tool_choice.disable_parallel_tool_use": "true: one call at most",
    "thinking": "see [Messages](#messages)",
    "thinking.display": "`omitted`: blocks without their text",
    "output_config.effort": "as `reasoning_effort`; `max` is `xhigh`",
    "output_config.format": "see [Structured output](#structured-output)",
    "messages max_tokens": SETTING,
    "messages top_k": SETTING,
    "messages tool_choice": "`auto`, `any`, `tool`, `none`",
    "messages messages[].role": "what the system says is said with the user's words, but at the beginning",
    "responses stream_options": "",
    "stop_sequences": "as `stop`",
}


def kind_of(field: dataclasses.Field) -> str:
    """Refused, no effect, or honoured."""
    said = (kind for kind in KINDS[1:] if field.metadata.get(kind.replace(" ", "_")))
    return next(said, KINDS[0])


def number(value: float) -> str:
    """A limit as it is best read: 2^31-1, not 2147483647."""
    size = abs(value) + (value > 0)
    if size >= 2**31 and math.log2(size).is_integer():
        return f"{'-' * (value < 0)}2^{math.log2(size):.0f}{'-1' * (value > 0)}"
    return f"{value:g}"


def limits_of(field: dataclasses.Field, hint) -> str:
    """The values and limits of a field, as the validator checks them."""
    texts = [f"`{word}`" for option in (hint, *typing.get_args(hint))
             if typing.get_origin(option) is typing.Literal for word in typing.get_args(option)]
    said = [", ".join(texts)] if texts else []
    get = field.metadata.get
    low, high = get("low", -math.inf), get("high", math.inf)
    if math.isfinite(low):
        said += [f"{number(low)} to {number(high)}" if math.isfinite(high) else
                 f"at least {number(low)}"]
    if "min_length" in field.metadata:
        said += [f"at least {get('min_length')} item{'s' * (get('min_length') != 1)}"]
    if "max_length" in field.metadata:
        said += [f"at most {get('max_length')} items"]
    return "; ".join(said)


def dataclasses_in(hint, path: str):
    """Yield (dataclass, path) for what a type holds; a list's items have [] behind the path."""
    if dataclasses.is_dataclass(hint):
        yield hint, path
    for inner in typing.get_args(hint):
        yield from dataclasses_in(inner, path + "[]" * (typing.get_origin(hint) is list))


def rows_of(cls, place: str, path: str, seen: set) -> list[tuple[str, str, str, str]]:
    """(path, kind, place, limits) of each field, then of those inside; a class is listed once."""
    rows, inside = [], []
    cls = HOUSE.type_of(cls)
    hints = HOUSE.hints(cls)
    for field in dataclasses.fields(cls):
        name = path + field.name
        rows.append((name, kind_of(field), place, limits_of(field, hints[field.name])))
        for inner, at in dataclasses_in(hints[field.name], name):
            if inner not in seen:
                seen.add(inner)
                inside += rows_of(inner, place, f"{at}.", seen)
    return rows + inside


def make() -> str:
    """Both tables, in Markdown."""
    order = [name for cls in ORDER for each in (cls, *HOUSE.extensions.get(cls.__name__, ()))
             for name in inspect.get_annotations(each)]
    unused, seen, found = set(NOTES), set(), {}  # {(path, kind, rest of the row): places}
    for cls, place in BODIES.items():
        for path, kind, place, limits in rows_of(cls, place, "", seen):
            key = f"{place} {path}" if f"{place} {path}" in NOTES else path
            unused.discard(key)
            said = "; ".join(filter(None, (limits, NOTES.get(key, ""))))
            places = found.setdefault((path, kind, said), [])
            places += [place] if place not in places else []
    if unused:
        raise SystemExit(f"NOTES of fields that are not there: {', '.join(sorted(unused))}")
    rows = sorted(found.items(), key=lambda row: (
        KINDS.index(row[0][1]), order.index(row[0][0]) if row[0][0] in order else 0))
    lines = ["| field | what becomes of it | in | |", "|---|---|---|---|"]
    lines += [f"| `{path}` | {kind} | {', '.join(places)} | {said} |"
              for (path, kind, said), places in rows if "." not in path]
    lines += ["", "Inside them:", "", "| field | what becomes of it | |", "|---|---|---|"]
    lines += [f"| `{path}` | {kind} | {said} |" for path, kind, said in found if "." in path]
    return "\n".join(lines) + "\n"


def parts(text: str) -> tuple[str, str, str]:
    """What stands before, between and behind the markers."""
    before, _, rest = text.partition(BEGIN)
    between, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{FILE.name} lacks the markers {BEGIN.strip()} and {END.strip()}")
    return before + BEGIN, between, END + after


if __name__ == "__main__":
    before, _, after = parts(FILE.read_text())
    FILE.write_text(before + make() + after)
