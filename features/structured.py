"""Structured output: replies held to a JSON Schema, a grammar, a pattern or a list of texts.

What for: `response_format`, `json_schema`, `grammar`, and what clients of vLLM and of Hugging Face
send in their place. What is written parses and validates. And a value that the model was about to
write never becomes another one because the grammar is narrower than the schema: where both cannot
be had, it is wider.

How it works: whatever a request calls it, what it asks for is one thing, `Asked`, of which a form
is made (replies.py) that every token of the reply must follow. schemas.py reads JSON Schemas.
A field that asks for a form that cannot be had is a 400, never only ignored.

What it costs: what the form costs (replies.py): milliseconds for each request, 10 us for a token.

It reads the fields of GenerationFields, and sends the header `x-loosened-schema` where a schema
need not be held to by the letter and was not.

What is not exact, for llguidance cannot: members come in the schema's order, and those that it does
not name behind them, whose names may repeat; a number with bounds has no exponent; a bound of more
than 64 bits is not held.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any, Literal

import engine
import server
from features.replies import (  # noqa: F401 (grammars.py says structured.literal, ...)
    GBNF_ITEM, Form, Reply, arguments_of, literal)
from features.keywords import SchemaError
from features.schemas import MAX_FORM
from features.thinking import lead_of

NO_TAGS = "forms inside of tags are not supported; send tools, or a grammar"

# ==== 1. Fields ==========================================================================


@dataclasses.dataclass
class JsonSchema:
    """A schema that the reply must satisfy."""

    name: str
    schema: dict[str, Any] | None = None
    description: str | None = server.option(no_effect=True)
    strict: bool = server.option(False, no_effect=True)  # the reply always validates


@dataclasses.dataclass
class ResponseFormat:
    """The form of the reply. `schema` beside `json_object` is llama-server's; `json`, `regex` and
    `value` are those of Hugging Face's text-generation-inference."""

    type: Literal["text", "json_object", "json_schema", "json", "regex"]
    json_schema: JsonSchema | None = None
    schema: dict[str, Any] | None = None
    value: Any = None

    def check(self, at: str) -> None:
        """Refuse a second form, and one that the type does not take."""
        takes = {"text": (), "json_object": ("schema", "value"),
                 "json_schema": ("json_schema", "value")}.get(self.type, ("value",))
        sent = [name for name in ("json_schema", "schema", "value")
                if getattr(self, name) is not None]
        if wrong := [name for name in sent if name not in takes] or sent[1:]:
            raise server.invalid(f"{at}.{wrong[0]}", f"{at}.{wrong[0]}: type {self.type!r} takes "
                                 f"{' or '.join(takes) or 'no form'}, and only one; leave it out")


@dataclasses.dataclass
class StructuredOutputs:
    """vLLM's StructuredOutputsParams: one form, and how JSON is spaced."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = server.option(min_length=1)
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = server.option(refused=NO_TAGS)
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False


@dataclasses.dataclass
class GenerationFields:
    """Forms of any reply: OpenAI's name, llama-server's, vLLM's since 0.12 and before, SGLang's."""

    response_format: ResponseFormat | None = None
    grammar: str | None = None
    json_schema: str | dict[str, Any] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = server.option(min_length=1)
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    guided_decoding_backend: str | None = server.option(no_effect=True)  # there is one
    structural_tag: Any = server.option(refused=NO_TAGS)
    regex: str | None = None
    ebnf: str | None = None

    def check(self, _at: str) -> None:
        """Refuse what fields together make impossible, before a model is loaded for it."""
        asked_of(self)


FIELDS = {"GenerationBody": GenerationFields}


# ==== 2. What a body asks for ============================================================


@dataclasses.dataclass(frozen=True)
class Asked:
    """The form of a reply, whatever the request calls it."""

    kind: Literal["schema", "pattern", "choice", "gbnf", "lark"]
    value: Any
    at: str  # where it was sent
    spaces: tuple[str, str] | None = None  # a pattern for JSON's white space, and where it was sent

    @property
    def field(self) -> str:
        """The field of the body."""
        return self.at.partition(".")[0]


OTHER_NAMES = {  # fields that other servers have, and what they hold
    "grammar": "gbnf", "json_schema": "json", "guided_json": "json", "guided_regex": "regex",
    "guided_choice": "choice", "guided_grammar": "grammar", "structural_tag": "structural_tag",
    "regex": "regex", "ebnf": "gbnf"}
HELD = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


def asked_of(body) -> Asked | None:
    """The form that a body asks for. Raises ApiError where there are several, or one that cannot be
    had."""
    newer, found = body.structured_outputs, [*_of_response_format(body.response_format)]
    found += [read_asked(kind, sent, name) for name, kind in OTHER_NAMES.items()
              if (sent := getattr(body, name)) is not None]
    if newer is not None:
        sent = {kind: getattr(newer, kind) for kind in HELD if getattr(newer, kind) is not None}
        if not sent:
            raise server.invalid("structured_outputs", "structured_outputs: holds none of "
                                                       f"{', '.join(HELD[:-1])}")
        found += [read_asked(kind, value, f"structured_outputs.{kind}")
                  for kind, value in sent.items() if value is not False]
    if len(found) > 1:
        raise server.invalid(found[0].field, f"{' and '.join(each.at for each in found)} were "
                                             "sent; the reply can follow only one of them")
    asked, spaces = next(iter(found), None), spaces_of(body)
    if spaces is None:
        return asked
    if asked is None or asked.kind != "schema":
        raise server.invalid(spaces[1], f"{spaces[1]}: is for the white space of JSON, but no "
                                        "schema was sent")
    return dataclasses.replace(asked, spaces=spaces)


def spaces_of(body) -> tuple[str, str] | None:
    """A pattern for the white space of JSON, and where it was sent; None for ours. Raises
    ApiError."""
    at, newer = "structured_outputs", body.structured_outputs or StructuredOutputs()
    if newer.disable_additional_properties:
        at += ".disable_additional_properties"
        raise server.invalid(at, f"{at}: is not supported; write additionalProperties: false in "
                                 "the schema")
    if newer.disable_any_whitespace:
        return "", f"{at}.disable_any_whitespace"
    if newer.whitespace_pattern is not None:
        return newer.whitespace_pattern, f"{at}.whitespace_pattern"
    if body.guided_whitespace_pattern is not None:
        return body.guided_whitespace_pattern, "guided_whitespace_pattern"
    return None


def read_asked(kind: str, sent, at: str) -> Asked:
    """What was sent as one of HELD, or as "gbnf". Raises ApiError."""
    if kind == "structural_tag":
        raise server.invalid(at, f"{at}: {NO_TAGS}", "unsupported_parameter")
    if kind == "json_object":
        return Asked("schema", {"type": "object"}, at)
    if kind == "json":
        return Asked("schema", schema_in(sent, at), at)
    if kind in ("regex", "choice"):
        return Asked("pattern" if kind == "regex" else "choice", sent, at)
    if not sent.strip():
        raise server.invalid(at, f"{at}: is empty; leave it out")
    is_gbnf = kind == "gbnf" or "::=" in GBNF_ITEM.sub("", sent)  # vLLM takes Lark's syntax, too
    return Asked("gbnf" if is_gbnf else "lark", sent, at)


def schema_in(sent, at: str):
    """A JSON Schema that was sent as it is or as text. Raises ApiError."""
    if not isinstance(sent, str):
        return sent  # schemas.py refuses what is none
    if len(sent) > MAX_FORM:
        raise server.invalid(at, f"{at}: has {len(sent)} characters, the limit is {MAX_FORM}")
    try:
        return json.loads(sent)
    except (ValueError, RecursionError) as error:
        raise server.invalid(at, f"{at}: is text, but no JSON: {error}") from None


def _of_response_format(wanted: ResponseFormat | None) -> Iterator[Asked]:
    """What `response_format` asks for. Raises ApiError."""
    if wanted is None or wanted.type == "text":
        return
    at, value = "response_format.value", wanted.value
    if wanted.type == "json_object" and value is None:
        yield Asked("schema", server.given(wanted.schema, {"type": "object"}),
                    "response_format.schema")
    elif wanted.type == "json_schema" and wanted.json_schema is not None:
        yield Asked("schema", server.given(wanted.json_schema.schema, True),
                    "response_format.json_schema.schema")
    elif wanted.type == "json_schema" and value is None:
        raise server.invalid("response_format.json_schema", "response_format.json_schema is "
                                                            "required", "missing_field")
    elif value is None:
        raise server.invalid(at, f"{at} is required", "missing_field")
    elif wanted.type == "json_schema":  # Hugging Face's way to write it
        if not isinstance(value, dict) or "schema" not in value:
            raise server.invalid(at, f"{at}: must be an object with a schema, got "
                                     f"{server.describe(value)}")
        yield read_asked("json", value["schema"], f"{at}.schema")
    elif wanted.type == "regex" and not isinstance(value, str):
        raise server.invalid(at, f"{at}: must be a regular expression, got "
                                 f"{server.describe(value)}")
    else:
        yield read_asked("regex" if wanted.type == "regex" else "json", value, at)


# ==== 3. What a reply is held to =========================================================

AFTER_REASONING = "/[ \\n]{0,3}/ "  # what may stand between the reasoning and the form, in Lark


class HeldReply:
    """What a reply that is held to a form does in other ways."""

    constrained_by = ""  # the field of the body that asks for the form

    def chunks(self, events: Iterator[engine.Event]) -> Iterator[dict]:
        """As Generation.chunks. Raises ApiError where a grammar is refused on the way."""
        try:
            yield from super().chunks(events)
        except engine.GrammarError as error:
            raise server.invalid(self.constrained_by, f"{self.constrained_by}: the grammar is "
                                                      f"refused: {error}") from None


METHODS = {"Generation": HeldReply}


def join(wanted: server.Generation) -> None:
    """Hold the reply to what its body asks for."""
    if asked := asked_of(wanted.body):
        wanted.constrained_by = asked.field
        wanted.constrain = functools.partial(constrain, wanted, asked)


def constrain(wanted: server.Generation, asked: Asked, prompt: str) -> Callable[[], Reply]:
    """What makes the Reply of each choice. Raises ApiError."""
    form, after = Form(), lead_of(wanted.loaded, prompt)
    form.triggers = (after,) if after else ()
    with schema_errors():
        if asked.kind == "gbnf":
            form.set_gbnf(asked.value, asked.at)
        elif asked.kind == "lark":
            form.set_lark(asked.value, asked.at)
        else:
            form.root = AFTER_REASONING * bool(after) + add_asked(form, asked)
        return form.replies(wanted.loaded.model, must_trigger=True)


def add_asked(form: Form, asked: Asked) -> str:
    """The name of a rule for what is asked for, unless that is a whole grammar. Raises
    SchemaError."""
    if asked.kind == "pattern":
        return form.add_pattern(asked.value, asked.at)
    if asked.kind == "choice":
        return form.add_choice(asked.value, asked.at)
    if asked.spaces:
        form.set_white_space(*asked.spaces)
    return form.add_schema(asked.value, asked.at)


def tell_loosened(handler: server.Handler, form: Form) -> None:
    """Name what a reply is not held to, though its schemas ask for it: to the client and in the
    log."""
    if form.loosened:
        names = ", ".join(ascii(place)[1:-1] for place in form.loosened)
        handler.answer_headers["x-loosened-schema"] = names[:MAX_NAMES]
        server.log.warning("%s schemas of tools are not held to at: %s", handler.tally.id,
                           names[:MAX_NAMES])


MAX_NAMES = 2000  # characters of a header


@contextlib.contextmanager
def schema_errors() -> Iterator[None]:
    """Make a refusal a 400 at its place, with which its message starts."""
    try:
        yield
    except SchemaError as error:
        raise server.invalid(str(error).split(":")[0], str(error)) from None
