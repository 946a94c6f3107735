"""Grammars of calls: what a reply may be that calls a function.

Of a form's literals and the functions' JSON Schemas comes one grammar, part by part in Lark's
syntax (replies.py): a call, or several, or, where calls begin with the reply, what else it may
be. It is no feature by itself; tools.py asks it. It costs what replies.py says of grammars.
"""

import re

from features import structured
from features.calls import (
    ID, ID_LENGTH, KEY, NAME, NUMBER, VARIABLE, CallForm, choices_of, is_bare, style_of)
from features.keywords import KNOWN, SchemaError
from features.schemas import Schema

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


def add_arguments(reply: structured.Form, form: CallForm, schema: dict, at: str,
                  is_strict: bool = True) -> str:
    """The name of a rule for the arguments of a function with these `parameters`. Elements
    come in the schema's order, and those not required may be left out."""
    whole = structured.arguments_of(schema, at, is_strict)
    if form.separators:
        reply.set_separators(*form.separators)
    if form.elements is None:
        return reply.add_part(whole)
    reply.schemas.append(whole)
    whole.compiled()  # refuses what is wrong anywhere
    for key in schema.keys() & KNOWN - {"type", "properties", "required", "additionalProperties"}:
        whole.give_up(key, "is not supported in this model's format of calls")
    properties = schema.get("properties", {})
    for key in properties:
        if form.elements.middle in key:
            raise SchemaError(f"{at}.properties.{key}: a name cannot have {form.elements.middle!r} "
                              "in it: that ends names in this model's format of calls")
    keys = sorted(properties, key=str.lower) if form.elements.is_sorted else properties
    return _add_elements(reply, form, [
        (_element(reply, form, key, whole, properties[key], f"{at}.properties.{key}"),
         key in schema.get("required", ())) for key in keys])


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


def _element(reply: structured.Form, form: CallForm, key: str, whole: Schema, inner, at: str
             ) -> str:
    """The expression for an argument of a schema `inner`, from its key on."""
    elements, style = form.elements, style_of(inner, form.elements)
    before, after = (text.replace(KEY, key) for text in (key + style.middle, style.after))
    if is_bare(inner, elements):
        value = _bare_text(reply, inner, after, elements.escapes)
    elif elements.python_words and isinstance(inner, dict) and inner.get("type") in (
            "boolean", "null") and not choices_of(inner):
        words = ("True", "False") if inner["type"] == "boolean" else ("None",)
        value = " | ".join(structured.literal(word + after) for word in words)
    else:
        value = f"{reply.add_part(whole, inner, at)} {structured.literal(after)}"
    return f"{structured.literal(before)} ({value})"


def _bare_text(reply: structured.Form, schema: dict, marker: str, escapes: bool) -> str:
    """The expression for a string without quotes, up to the marker."""
    if choices := choices_of(schema):
        return " | ".join(structured.literal((escaped(choice, marker[0]) if escapes else choice)
                                             + marker) for choice in choices)
    least, most = int(schema.get("minLength", 0)), schema.get("maxLength", "")
    most = most if most == "" else int(most)  # JSON's 4.0 is an integer
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
