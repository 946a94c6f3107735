"""Grammars of calls: what a reply may be that calls a function.

Of a form's literals and the functions' JSON Schemas comes one grammar, part by part in Lark's
syntax (structured.py): a call, or several, or, where calls begin with the reply, what else it may
be. It is no feature by itself; tools.py asks it. It costs what structured.py says of grammars.
"""

import json
import re

from features import structured
from features.calls import (
    ID, ID_LENGTH, KEY, NAME, NUMBER, VARIABLE, CallForm, choices_of, is_bare, style_of)
from features.schemas import KNOWN, Schema, SchemaError

LATER_NUMBER = "/[0-9]{1,2}/"  # of a call behind the first
NO_BRACE = r"/[^{](?s:.)*/"
ANY = r"/(?s:.*)/"


def regex(text: str) -> str:
    """A text in a regular expression of Lark's."""
    return re.escape(text).replace("/", r"\/").replace("\n", "n")


def write_literal(text: str, name: str = "", number: str = "") -> str:
    """A literal in Lark's syntax. number: what the call's number may be, in that syntax."""
    parts = VARIABLE.split(text.replace(NAME, name))
    return " ".join({ID: f"/[a-zA-Z0-9]{{{ID_LENGTH}}}/", NUMBER: number}.get(
        part, structured.literal(part)) for part in parts if part) or '""'


def add_arguments(reply: structured.Form, form: CallForm, schema: dict, at: str) -> str:
    """The name of a rule for the arguments of a function with these `parameters`. Elements
    come in the schema's order, and those not required may be left out."""
    if schema.get("type", "object") != "object":
        raise SchemaError(f"{at}.type: must be 'object', got {schema['type']!r:.60}")
    # JSON Schema would allow more members. But a function takes what it declares, and a model that
    # may go on to invent arguments does.
    if "properties" in schema and schema.keys() & KNOWN <= {"type", "properties", "required"}:
        schema = {**schema, "additionalProperties": False}
    whole = Schema({**schema, "type": "object"}, at)
    reply.schemas.append(whole)
    compiled = whole.compiled()  # refuses what is wrong anywhere
    if form.elements is None:
        return reply.add(f": %json {json.dumps(_spaced(compiled, form))}")
    if other := schema.keys() & KNOWN - {"type", "properties", "required",
                                         "additionalProperties"}:
        raise SchemaError(f"{at}.{min(other)}: is not supported in this model's format of calls")
    properties = schema.get("properties", {})
    keys = sorted(properties, key=str.lower) if form.elements.is_sorted else properties
    return _add_elements(reply, form, [
        (_element(reply, form, key, whole, f"{at}.properties.{key}"),
         key in schema.get("required", ())) for key in keys])


def _spaced(compiled: dict, form: CallForm) -> dict:
    """A compiled schema with the white space that the template writes."""
    if form.separators is None:
        return compiled
    item, key = form.separators
    return {**compiled, "x-guidance": {
        **{name: value for name, value in compiled["x-guidance"].items()
           if name != "whitespace_pattern"},
        "whitespace_flexible": False, "item_separator": item, "key_separator": key}}


def _add_elements(reply: structured.Form, form: CallForm, elements: list[tuple[str, bool]]) -> str:
    """The name of a rule for elements, each an expression and whether it is required: what may
    follow when none was written yet, and when one was, from the last on."""
    first, joint = (write_literal(text) for text in (form.elements.first, form.elements.joint))
    none, some = '""', '""'
    for element, required in reversed(elements):
        follow = reply.add(f": {joint} {element} {some}" + f" | {some}" * (not required))
        none = reply.add(f": {first} {element} {some}" + f" | {none}" * (not required))
        some = follow
    return none if elements else reply.add(': ""')


def _element(reply: structured.Form, form: CallForm, key: str, whole: Schema, at: str) -> str:
    """The expression for an argument, from its key on."""
    inner, elements = whole.root["properties"][key], form.elements
    style = style_of(inner, elements)
    before, after = (text.replace(KEY, key) for text in (key + style.middle, style.after))
    if is_bare(inner, elements):
        value = _bare_text(reply, inner, after, elements.escapes)
    elif elements.python_words and isinstance(inner, dict) and inner.get("type") in (
            "boolean", "null") and not choices_of(inner):
        words = ("True", "False") if inner["type"] == "boolean" else ("None",)
        value = " | ".join(structured.literal(word + after) for word in words)
    else:
        compiled = _spaced(whole.compiled(inner, at), form)
        value = f"{reply.add(f': %json {json.dumps(compiled)}')} {structured.literal(after)}"
    return f"{structured.literal(before)} ({value})"


def _bare_text(reply: structured.Form, schema: dict, marker: str, escapes: bool) -> str:
    """The expression for a string without quotes, up to the marker."""
    if choices := choices_of(schema):
        return " | ".join(structured.literal((escaped(choice, marker[0]) if escapes else choice)
                                             + marker) for choice in choices)
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    if escapes:
        character = f"([^{regex(marker[0])}\\\\\\n]|\\\\[{regex(marker[0])}\\\\nrt])"
        return reply.add(f": /{character}{{{least},{most}}}{regex(marker)}/")
    if not least and most == "":
        return reply.add_text_until(marker)
    # Its characters are counted, and the marker is not among them.
    name = reply.add(': ""').upper()  # of a terminal: rules cannot say "and not"
    return reply.add(f": {name}\n{name}: (/(?s:.{{{least},{most}}})/ & "
                     f"~/(?s:.*){regex(marker)}(?s:.*)/) {structured.literal(marker)}")


def escaped(text: str, quote: str) -> str:
    """A string with Python's backslashes."""
    return re.sub(rf"[\\{quote}]", r"\\\g<0>", text).replace("\n", r"\n")


def calls_of(form: CallForm, functions: list[tuple[str, str]], parallel: bool,
             from_trigger: bool) -> str:
    """The expression for a reply that is a call, or several if `parallel`; for what follows
    the trigger, or the whole reply. functions: their names and the rules of their
    arguments."""
    def ways(number: str) -> str:
        return " | ".join(
            f"{structured.literal(name)} {write_literal(form.between, name, number)} {arguments} "
            f"{write_literal(form.ending, name, number)}" for name, arguments in functions)

    first = structured.literal(str(form.first_number))
    start = write_literal(form.rest if from_trigger else form.opening, number=first)
    more = f"({write_literal(form.separator, number=LATER_NUMBER)} ({ways(LATER_NUMBER)}))*" \
        if parallel and form.separator else ""
    return f"{start} ({ways(first)}) {more} {write_literal(form.closing)}"


def other_than_calls(form: CallForm, head: str) -> str:
    """The expression for a reply where a call begins with the reply: one that begins otherwise.
    head: what stands before every answer."""
    return f"{structured.literal(head)} {ANY}" if head else NO_BRACE
