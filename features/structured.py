"""Structured output: replies held to a JSON Schema, a GBNF grammar, or the form of tool calls.

What for: `response_format`, `json_schema`, `grammar`, and the arguments of tool calls. What is
written parses and validates. And a value that the model was about to write never becomes another
one because the grammar is narrower than the schema: where both cannot be had, it is wider.

How it works: the form of a reply becomes one grammar in Lark's syntax, in which each JSON Schema is
a `%json` part; llguidance (https://github.com/guidance-ai/llguidance) compiles it for the model's
vocabulary. While the reply is written, the sampler draws a token freely and asks `Reply.take`; only
when that token may not come does it ask for all those that may, `Reply.restrict`.

Schemas come from strangers, and llguidance trusts them: some hang it, some end the process. So
limits of size come first, and then each grammar is tried out in a child process, the `Trial`, under
limits of time and memory. A child that dies or hangs is replaced, and the request is a 400.

What it costs: 0.1 s once for the child and 0.2 s once for each model, when first used; then a few
milliseconds for each request, 10 us for a token, and 0.1 ms where the model must be corrected.

It reads the fields `response_format`, `json_schema` and `grammar`, and sends nothing elsewhere.

What is not exact, for llguidance cannot: members come in the schema's order, and those that it does
not name behind them, whose names may repeat; a number with bounds has no exponent; a bound of more
than 64 bits is not held.
"""

import contextlib
import dataclasses
import functools
import json
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np

import engine
import server
from features.schemas import MAX_FORM, Schema, SchemaError
from features.trial import FREELY, LIMITS, library, trial

MAX_NESTING = 100  # brackets of a GBNF grammar, one inside the other


# ==== 1. A form: Lark, rule by rule ======================================================

ESCAPE = re.compile(r"\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})")
GBNF_ITEM = re.compile(  # a literal, a class, a comment, any character
    r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*|\.')


def literal(text: str) -> str:
    """A text in Lark's syntax."""
    return json.dumps(text)


class Form:
    """What a reply may be, from its start or from a trigger on."""

    def __init__(self):
        self.triggers: tuple[str, ...] = ()  # texts that come before, one after the other
        self.root = ""  # the expression that must be written, in Lark; "" while there is none
        self._rules: dict[str, str] = {}
        self.schemas: list[Schema] = []
        self._gbnf: str | None = None

    def add(self, rule: str) -> str:
        """The name of a new rule."""
        name = f"r{len(self._rules)}"
        self._rules[name] = rule
        return name

    def add_schema(self, schema, at: str) -> str:
        """The name of a rule for a value of a JSON Schema, as JSON text. Raises SchemaError, which
        names the place, below `at`, of what is wrong or cannot be honoured."""
        self.schemas.append(Schema(schema, at))
        return self.add(f": %json {json.dumps(self.schemas[-1].compiled())}")

    def add_text_until(self, marker: str) -> str:
        """The name of a rule for any text and, where it ends, the marker."""
        pattern = re.escape(marker).replace("/", r"\/").replace("\n", "n")
        return self.add(f"[lazy]: /(?s:.*){pattern}/")

    def set_gbnf(self, text: str) -> None:
        """Take a whole grammar in llama.cpp's syntax (its grammars/README.md). Raises
        SchemaError."""
        depth = deepest = 0
        for char in re.sub(GBNF_ITEM, "", text):
            depth += (char == "(") - (char == ")")
            deepest = max(deepest, depth)
        for what, size, most in (("bytes", len(text.encode("utf-8", "replace")), MAX_FORM // 4),
                                 ("brackets inside each other", deepest, MAX_NESTING)):
            if size > most:
                raise SchemaError(f"grammar: has {size} {what}, the limit is {most}")
        if "\0" in text:
            raise SchemaError("grammar: has a NUL character")
        self._gbnf = GBNF_ITEM.sub(_read_gbnf_item, text)

    def replies(self, model: engine.Model, must_trigger: bool) -> Callable[[], "Reply"]:
        """Compile the form; what is returned makes the Reply of one choice. must_trigger: no end
        before the triggers. Raises SchemaError."""
        try:
            library()
        except ImportError:
            raise SchemaError(f"{self._at}: needs the llguidance library on the server: pip "
                              "install -r features/requirements.txt") from None
        question = {"gbnf": self._gbnf} if self._gbnf is not None else {"lark": self._lark()}
        tried = trial.run(question)
        if "limit" in tried:
            raise SchemaError(f"{self._at}: {tried['limit']}")
        if "error" in tried:
            raise self._blame(tried["error"])
        lark, vocabulary = tried["lark"], Vocabulary.of(model)
        limits = library().LLParserLimits(**LIMITS)
        matcher = library().LLMatcher(vocabulary.tokenizer, lark, log_level=0, limits=limits)
        matcher.compute_bitmask()  # the first is the slowest, and does not yet hold up others
        if matcher.is_error():
            raise self._blame(matcher.get_error())
        return lambda: Reply(vocabulary, matcher.deep_copy(), self.triggers, must_trigger)

    @property
    def _at(self) -> str:
        """Where the form was asked for."""
        return self.schemas[0].at if self.schemas else "grammar"

    def _lark(self) -> str:
        rules = "\n".join(f"{name}{rule}" for name, rule in self._rules.items())
        return f"{FREELY}start: {self.root}\n{rules}\n"

    def _blame(self, error: str) -> SchemaError:
        """The error with the place of the innermost subschema that makes it alone."""
        until, error = time.monotonic() + BLAME_SECONDS, _words(error)
        for schema in self.schemas:
            part, at, waiting = schema.root, schema.at, [(schema.root, schema.at)]
            said, seen = None, set()
            while waiting and time.monotonic() < until:
                inner, place = waiting.pop(0)
                found = self._refusal(schema, inner, place) if id(inner) not in seen else None
                seen.add(id(inner))
                if found and (said is None or _is_cause(found, place, said)):
                    part, at, said = inner, place, found
                    waiting = [*schema.parts(part, at)]
            if said:
                return _with_place(at, said)
        return SchemaError(f"{self._at}: is refused: {error}")

    @staticmethod
    def _refusal(schema: Schema, part, at: str) -> str | None:
        """What is wrong with a part of a schema, alone."""
        try:
            compiled = json.dumps(schema.compiled(part, at))
        except SchemaError:
            return None
        error = trial.run({"lark": f"{FREELY}start: %json {compiled}"}).get("error")
        return error and _words(error)


BLAME_SECONDS = 0.5  # for the place of an error; each subschema takes about a millisecond
KEYS = {  # what llguidance says: where that is, and in other words
    "oneOf constraints": (".oneOf", "the alternatives may overlap: write anyOf, or give each a "
                          "type or a constant of its own"),
    "regex": (".pattern", ""), "lookarounds": (".pattern", ""),
    "min/maxProperties": (".minProperties", "")}


def _is_cause(found: str, place: str, said: str) -> bool:
    """Whether what is wrong with a part, at its place, is why the whole is refused."""
    if named := re.search("required property '(.*)' is unsatisfiable", said):
        return place.endswith(f".{named[1]}")
    return found == said or said.startswith(UNSATISFIABLE) and found.startswith(UNSATISFIABLE)


UNSATISFIABLE = "Unsatisfiable schema"


def _words(error: str) -> str:
    """llguidance's words, in one line, without the lines of Lark that it quotes."""
    error = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "",
                   re.split(r"\n +\d+ \| |\n +while processing", error)[0])
    return " ".join(error.split())[:300]


def _with_place(at: str, error: str) -> SchemaError:
    key, words = next((found for said, found in KEYS.items() if said in error), ("", ""))
    return SchemaError(f"{at}{key}: {words or error}")


def _read_gbnf_item(match: re.Match) -> str:
    """A part of a grammar as the converter of llguidance understands it."""
    item = match[0]
    if item == ".":  # newlines, too
        return r"[^\x00]"
    if item[0] == "#":
        return ""
    return ESCAPE.sub(_unescape, item)


def _unescape(match: re.Match) -> str:
    """An escaped code point as it is, unless it means something there, or nothing visible."""
    char = chr(min(int(match[1] or match[2] or match[3], 16), 0x10FFFF))
    special = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
    if char in '\\"[]':
        return "\\" + char
    return special.get(char) or (char if char.isprintable() and char not in "^-/" else
                                 f"\\x{ord(char):02x}" if ord(char) < 128 else char)


# ==== 2. A reply: token by token =========================================================


class Tokens:
    """What llguidance reads of a tokenizer (its TokenizerWrapper). It keeps this one, and must not
    lead back to what keeps llguidance's: the collector does not see through it."""

    def __init__(self, pieces: list[bytes], of_byte: dict[int, int], eos_token: int):
        self.tokens = [piece or b"<%d>" % token for token, piece in enumerate(pieces)]
        self.special_token_ids = [token for token, piece in enumerate(pieces) if not piece]
        self.eos_token_id, self.bos_token_id = eos_token, None
        self._of_byte = of_byte

    def __call__(self, text: bytes) -> list[int]:
        """The tokens of a text, as llguidance would force them; it is told not to (FREELY)."""
        return [self._of_byte[byte] for byte in text if byte in self._of_byte]


class Vocabulary:
    """A model's tokens, as their text shows in a reply, for llguidance. Safe from any thread."""

    _lock = threading.Lock()  # while one is made, so that it is made once
    _of: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # by engine.Model

    def __init__(self, model: engine.Model):
        self.n_vocab, self.end_tokens = model.n_vocab, sorted(model.end_tokens)
        self.pieces = [b"" if token in model.end_tokens else model.piece(token)
                       for token in range(model.n_vocab)]
        # Bytes of which a token may be the only one, to write what no token begins with.
        self.of_byte = {piece[0]: token for token, piece in enumerate(self.pieces)
                        if len(piece) == 1}
        tokens = Tokens(self.pieces, self.of_byte, self.end_tokens[0])
        self.tokenizer = library().LLTokenizer(
            library().TokenizerWrapper(tokens), n_vocab=self.n_vocab, eos_token=self.end_tokens)

    @classmethod
    def of(cls, model: engine.Model) -> "Vocabulary":
        """The one of a model."""
        with cls._lock:
            if model not in cls._of:
                cls._of[model] = cls(model)
            return cls._of[model]


class Reply(engine.Constraint):
    """One choice's way through a form. Engine thread only, after it was made."""

    def __init__(self, vocabulary: Vocabulary, matcher, triggers: tuple[str, ...],
                 must_trigger: bool):
        self._vocabulary, self._matcher, self._must_trigger = vocabulary, matcher, must_trigger
        self._triggers = [trigger.encode() for trigger in triggers]
        self._tail = b""  # the end of the text so far, in which the next trigger may have begun

    def take(self, token: int) -> bool:
        """As Constraint.take."""
        if token in self._vocabulary.end_tokens:
            return not self._must_trigger if self._triggers else self._matcher.is_accepting()
        if not self._triggers:
            return self._consume([token])
        tail, triggers = self._tail + self._vocabulary.pieces[token], self._triggers
        while triggers and triggers[0] in tail:
            tail = tail.partition(triggers[0])[2]
            triggers = triggers[1:]
        # subtle: what follows the last trigger inside its token is the first text of the form.
        rest = [self._vocabulary.of_byte.get(byte) for byte in tail]
        if not triggers and rest and (None in rest or not self._consume(rest)):
            return False
        self._triggers = triggers
        self._tail = tail[max(0, len(tail) - len(triggers[0]) + 1):] if triggers else b""
        return True

    def restrict(self, logits: np.ndarray) -> None:
        """As Constraint.restrict."""
        if self._triggers:
            if self._must_trigger:
                logits[self._vocabulary.end_tokens] = -np.inf
            return
        if self._matcher.is_stopped():
            allowed = np.zeros(len(logits), dtype=np.uint8)
            allowed[self._vocabulary.end_tokens] = 1
        else:
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            allowed = np.unpackbits(bits, count=len(logits), bitorder="little")
        self._check()
        logits[allowed == 0] = -np.inf

    def _consume(self, tokens: list[int]) -> bool:
        """Read tokens; False, and nothing is changed, if they may not come here."""
        if self._matcher.is_stopped():
            return False
        # subtle: only a mask gives llguidance new fuel. After some tokens without one it would
        # refuse what may come, and say nothing.
        self._matcher.compute_bitmask()
        n = self._matcher.try_consume_tokens(tokens)
        self._check()
        if 0 < n < len(tokens):
            self._matcher.rollback(n)
        return n == len(tokens)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise engine.GrammarError(_words(self._matcher.get_error()))


# ==== 3. Fields ==========================================================================


@dataclasses.dataclass
class JsonSchema:
    """A schema that the reply must satisfy."""

    name: str
    schema: dict[str, Any] | None = None
    description: str | None = server.option(no_effect=True)
    strict: bool = server.option(False, no_effect=True)  # the reply always validates


@dataclasses.dataclass
class ResponseFormat:
    """The form of the reply. `schema` beside `json_object` is llama-server's."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema: dict[str, Any] | None = None


@dataclasses.dataclass
class GenerationFields:
    """Forms of any reply."""

    grammar: str | None = None  # GBNF
    json_schema: dict[str, Any] | None = None

    def check(self, _at: str) -> None:
        """Refuse what fields together make impossible, before a model is loaded for it."""
        schema_of(self)
        if self.grammar == "":
            raise server.invalid("grammar", "grammar: is empty; leave it out")


@dataclasses.dataclass
class ChatFields:
    """The form of a chat's reply."""

    response_format: ResponseFormat | None = None


FIELDS = {"GenerationBody": GenerationFields, "ChatBody": ChatFields}
AFTER_REASONING = "/[ \\n]{0,3}/ "  # what may stand between the reasoning and the form, in Lark


def field_of(body) -> str | None:
    """The field that asks for a form. Raises ApiError when there are several."""
    wanted = [name for name in ("grammar", "json_schema") if getattr(body, name) is not None]
    response_format = getattr(body, "response_format", None)
    wanted += ["response_format"] * bool(response_format and response_format.type != "text")
    if len(wanted) > 1:
        raise server.invalid(wanted[0], f"{' and '.join(wanted)} were sent; the reply can follow "
                                        "only one of them")
    return next(iter(wanted), None)


def schema_of(body) -> tuple[Any, str] | None:
    """The JSON Schema of the reply, and where it was sent. Raises ApiError."""
    field = field_of(body)
    if field == "json_schema":
        return body.json_schema, "json_schema"
    if field != "response_format":
        return None
    wanted = body.response_format
    if wanted.type == "json_object":
        return server.given(wanted.schema, {"type": "object"}), "response_format.schema"
    if wanted.json_schema is None:
        raise server.invalid("response_format.json_schema", "response_format.json_schema is "
                                                            "required", "missing_field")
    return server.given(wanted.json_schema.schema, True), "response_format.json_schema.schema"


def join(wanted: "server.Generation") -> None:
    """Hold the reply to what its body asks for."""
    if field := field_of(wanted.body):
        wanted.constrained_by = field
        wanted.constrain = functools.partial(constrain, wanted)


def constrain(wanted: "server.Generation", prompt: str) -> Callable[[], Reply]:
    """What makes the Reply of each choice. Raises ApiError."""
    form, body = Form(), wanted.body
    after = wanted.lead(prompt)
    form.triggers = (after,) if after else ()
    with schema_errors():
        if body.grammar is not None:
            form.set_gbnf(body.grammar)
        else:
            form.root = AFTER_REASONING * bool(after) + form.add_schema(*schema_of(body))
        return form.replies(wanted.loaded.model, must_trigger=True)


@contextlib.contextmanager
def schema_errors() -> Iterator[None]:
    """Make a refusal a 400 at its place, with which its message starts."""
    try:
        yield
    except SchemaError as error:
        raise server.invalid(str(error).split(":")[0], str(error)) from None
