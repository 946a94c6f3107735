"""Forms of calls: how models write tool calls, and what a reply of that form may be.

A chat template tells its model of tools, and to write calls in some form: a JSON object or XML
elements between literals. `TOOL_FORMATS` has these literals for the forms that are known; the same
literals make the grammar that a call must follow and the parser that finds it (tools.py). It is no
feature by itself.
"""

import dataclasses
import re

from features import structured
from features.keywords import KNOWN


@dataclasses.dataclass(frozen=True)
class ToolFormat:
    """The literals around tool calls, for the grammar, the parser and the history alike: trigger
    opening CALL (separator CALL)* closing, where CALL is NAME between ARGUMENTS ending."""

    pattern: str  # found in the source of a template that makes its model write this
    trigger: str  # what makes a reply a call
    opening: str
    between: str
    ending: str
    separator: str = ""  # empty: one call only
    closing: str = ""
    at_start: bool = False  # the trigger counts only where the reply (after reasoning) begins
    xml: bool = False  # ARGUMENTS are <parameter=P> elements, not a JSON object
    short_ids: bool = False  # the template takes ids of exactly 9 alphanumerics
    native: bool = True  # the template describes the tools, and renders calls and results


TOOL_FORMATS = {  # the first whose pattern is found wins
    "qwen3-coder": ToolFormat(
        r"<tool_call>.{0,20}<function=.*<parameter=", "<tool_call>", "\n<function=", ">\n",
        "</function>\n</tool_call>", "\n<tool_call>\n<function=", xml=True),
    "mistral": ToolFormat(r"\[TOOL_CALLS\].*\[ARGS\]", "[TOOL_CALLS]", "", "[ARGS]", "",
                          "[TOOL_CALLS]", short_ids=True),
    "mistral-nemo": ToolFormat(r"\[TOOL_CALLS\] ?\[", "[TOOL_CALLS]", '[{"name": "',
                               '", "arguments": ', "}", ', {"name": "', "]", short_ids=True),
    "llama3": ToolFormat(r'\{"name": function name, "parameters": ', '{"name": "', "",
                         '", "parameters": ', "}", at_start=True),
    "hermes": ToolFormat(  # xml_tools: SmolLM 3 takes tools by that name, and renders no calls
        r'^(?!.*xml_tools).*<tool_call>.{0,30}\{\\?"name\\?":', "<tool_call>", '\n{"name": "',
        '", "arguments": ', "}\n</tool_call>", '\n<tool_call>\n{"name": "'),
}
GENERIC = dataclasses.replace(TOOL_FORMATS["hermes"], native=False)
PARAMETER, PARAMETER_END = "<parameter=", "\n</parameter>\n"


def tool_format_of(template_source: str | None) -> ToolFormat:
    """How a template makes its model write calls; GENERIC where that is not known."""
    return next((form for form in TOOL_FORMATS.values()
                 if re.search(form.pattern, template_source or "", re.DOTALL)), GENERIC)


def is_text(schema) -> bool:
    """Whether an XML parameter is bare text: a string with no rules but an enum. Else JSON."""
    return isinstance(schema, dict) and schema.get("type") == "string" \
        and schema.keys() & KNOWN <= {"type", "enum"} \
        and all(isinstance(choice, str) for choice in schema.get("enum", []))


NOT_A_CALL = r"/[^{](?s:.)*/"  # a reply where calls begin with a brace


def add_arguments(reply: structured.Form, form: ToolFormat, schema: dict, at: str,
                  is_strict: bool = True) -> str:
    """The name of a rule for the arguments of a function with these `parameters`. XML
    parameters come in the schema's order, and those not required may be left out."""
    whole, elements = structured.arguments_of(schema, at, is_strict), []
    if not form.xml:
        return reply.add_part(whole)
    reply.schemas.append(whole)
    whole.compiled()  # refuses what is wrong anywhere
    for key in schema.keys() & KNOWN - {"type", "properties", "required", "additionalProperties"}:
        whole.give_up(key, "is not supported in this model's format of calls")
    for name, inner in schema.get("properties", {}).items():
        opening = structured.literal(PARAMETER + name + form.between)
        place = f"{at}.properties.{name}"
        if not is_text(inner):
            value = reply.add_part(whole, inner, place)
            element = f"{opening} {value} {structured.literal(PARAMETER_END)}"
        elif "enum" in inner:
            values = " | ".join(structured.literal(f"{choice}{PARAMETER_END}")
                                for choice in inner["enum"])
            element = f"{opening} ({values})"
        else:
            element = f"{opening} {reply.add_text_until(PARAMETER_END)}"
        elements.append(f"({element})" + ("" if name in schema.get("required", ()) else "?"))
    return reply.add(": " + (" ".join(elements) or '""'))


def calls_of(form: ToolFormat, functions: list[tuple[str, str]], parallel: bool,
          from_trigger: bool) -> str:
    """The expression for a reply that is a call, or several if `parallel`; for what follows
    the trigger, or the whole reply. functions: their names and the rules of their
    arguments."""
    ways = " | ".join(
        f"{structured.literal(name + form.between)} {arguments} {structured.literal(form.ending)}"
        for name, arguments in functions)
    start = form.opening if from_trigger else form.trigger + form.opening
    more = f"({structured.literal(form.separator)} ({ways}))*" \
        if parallel and form.separator else ""
    return f"{structured.literal(start)} ({ways}) {more} {structured.literal(form.closing)}"
