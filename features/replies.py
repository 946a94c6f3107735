"""Replies: what a reply may be, and a reply's way through it, token by token.

structured.py, tools.py and grammars.py make forms. A form becomes one grammar in Lark's syntax, in
which each JSON Schema is a `%json` part; llguidance (https://github.com/guidance-ai/llguidance)
compiles it for the model's vocabulary. While the reply is written, the sampler draws a token freely
and asks `Reply.take`; only when that token may not come does it ask for all those that may,
`Reply.restrict`.

Schemas come from strangers, and llguidance trusts them: some hang it, some end the process. So
limits of size come first, and then each grammar is tried out in a child process, the `Trial`, under
limits of time and memory. A child that dies or hangs is replaced, and the form is refused. What
llguidance refuses of a schema is said in other words, or left out where that is allowed.

It is no feature by itself. It costs 0.1 s once for the child and 0.2 s once for each model, when
first used; then a few milliseconds for each request, 10 us for a token, and 0.1 ms where the model
must be corrected.
"""

import json
import re
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Set
from types import MappingProxyType

import numpy as np

import engine
from features.keywords import (
    KNOWN, OVERLAP, UNSATISFIABLE, SchemaError, causes_of, in_ecmascript)
from features.schemas import MAX_FORM, MAX_PATTERN, Schema
from features.trial import FREELY, LIMITS, library, trial

MAX_NESTING = 100  # brackets of a grammar, one inside the other
MAX_MENDED = 16  # times that what llguidance refuses is said in other words, or left out
MEND_SECONDS = 2.0  # for all of them


# ==== 1. A form: Lark, rule by rule ======================================================

ESCAPE = re.compile(r"\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})")
LARK_ITEM = re.compile(  # a literal, a regular expression, a comment
    r'"(?:\\.|[^"\\\n])*"|/(?![/*])(?:\\.|[^/\\\n])+/|(?://|#)[^\n]*')
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
        self.at = ""  # where a whole grammar, a pattern or a choice was sent
        self._parts: dict[str, tuple[Schema, object, str, dict]] = {}  # of schemas, by their rules
        self._whole: dict | None = None  # a grammar, as a question for the trial
        self._options: dict = {}  # of parts yet to come, in place of those of schemas.py

    def add(self, rule: str) -> str:
        """The name of a new rule."""
        name = f"r{len(self._rules)}"
        self._rules[name] = rule
        return name

    def add_schema(self, schema, at: str, is_strict: bool = True) -> str:
        """The name of a rule for a value of a JSON Schema, as JSON text. `replies` raises a
        SchemaError which names the place, below `at`, of what is wrong or cannot be honoured; or,
        unless it is strict, `loosened` tells of this."""
        return self.add_part(Schema(schema, at, is_strict))

    def add_part(self, schema: Schema, part=None, at: str = "") -> str:
        """As add_schema, for a subschema that stands at `at`, or a whole schema."""
        if schema not in self.schemas:
            self.schemas.append(schema)
        name = self.add("")
        self._parts[name] = schema, part, at, self._options
        return name

    def set_white_space(self, pattern: str, at: str) -> None:
        """Take a pattern for the white space of JSON that is added from now on, sent at `at`.
        Raises SchemaError."""
        alone = Form()
        alone.root, alone.at = alone.add_pattern(pattern, at), at
        tried = trial.run({"lark": alone._lark()})
        if error := tried.get("limit") or tried.get("error"):
            raise SchemaError(f"{at}: is refused: {_words(error)}")
        self._options = {"whitespace_pattern": pattern}

    def set_separators(self, item: str, key: str) -> None:
        """Have JSON that is added from now on written with just these between items, and between
        key and value."""
        self._options = {"whitespace_pattern": None, "whitespace_flexible": False,
                         "item_separator": item, "key_separator": key}

    def add_pattern(self, pattern: str, at: str) -> str:
        """The name of a rule for a text that a regular expression matches from end to end."""
        if len(pattern) > MAX_PATTERN:
            raise SchemaError(f"{at}: has {len(pattern)} characters, the limit is {MAX_PATTERN}")
        self.at = at
        meant = {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}
        return self.add(": /" + re.sub(r"(?s)\\.|/|\n", lambda part: meant.get(part[0], part[0]),
                                       in_ecmascript(pattern)) + "/")

    def add_choice(self, choices: list[str], at: str) -> str:
        """The name of a rule for one of some texts."""
        size = sum(len(choice.encode()) for choice in choices)
        if size > MAX_FORM:
            raise SchemaError(f"{at}: has {size} bytes, the limit is {MAX_FORM}")
        self.at, terminal = at, f"R{len(self._rules)}"  # one regular expression, by its capitals
        self._rules[terminal] = ": " + " | ".join(map(literal, choices))
        return terminal

    def add_text_until(self, marker: str) -> str:
        """The name of a rule for any text and, where it ends, the marker."""
        pattern = re.escape(marker).replace("/", r"\/").replace("\n", "n")
        return self.add(f"[lazy]: /(?s:.*){pattern}/")

    def set_gbnf(self, text: str, at: str = "grammar") -> None:
        """Take a whole grammar in llama.cpp's syntax (its grammars/README.md), sent at `at`. Raises
        SchemaError."""
        self._check_grammar(text, re.sub(GBNF_ITEM, "", text), at)
        self._whole = {"gbnf": GBNF_ITEM.sub(_read_gbnf_item, text)}

    def set_lark(self, text: str, at: str) -> None:
        """Take a whole grammar in Lark's syntax, as llguidance has it (its docs/syntax.md). Raises
        SchemaError."""
        bare = re.sub(LARK_ITEM, "", text)
        self._check_grammar(text, bare, at)
        if named := re.search(r"%llguidance|<\[", bare):  # its options, or ids of tokens
            raise SchemaError(f"{at}: {named[0]} is not for requests; leave it out")
        self._whole = {"lark": FREELY + text}

    def _check_grammar(self, text: str, bare: str, at: str) -> None:
        """Bound a grammar; bare: without its literals."""
        self.at, depth, deepest = at, 0, 0
        for char in bare:
            depth += (char in "([{") - (char in ")]}")
            deepest = max(deepest, depth)
        for what, size, most in (("bytes", len(text.encode("utf-8", "replace")), MAX_FORM // 4),
                                 ("brackets inside each other", deepest, MAX_NESTING)):
            if size > most:
                raise SchemaError(f"{at}: has {size} {what}, the limit is {most}")
        if "\0" in text:
            raise SchemaError(f"{at}: has a NUL character")

    def replies(self, model: engine.Model, must_trigger: bool) -> Callable[[], "Reply"]:
        """Compile the form; what is returned makes the Reply of one choice. must_trigger: no end
        before the triggers. Raises SchemaError."""
        try:
            library()
        except ImportError:
            raise SchemaError(f"{self._at}: needs the llguidance library on the server: pip "
                              "install -r features/requirements.txt") from None
        until = time.monotonic() + MEND_SECONDS
        for n in range(MAX_MENDED + 1):
            tried = trial.run(self._whole or {"lark": self._lark()})
            if "limit" in tried:
                raise SchemaError(f"{self._at}: {tried['limit']}")
            if "error" not in tried:
                break
            blamed = self._blame(tried["error"])
            schema, part, at, said = blamed[0]
            if n == MAX_MENDED or time.monotonic() > until or said.startswith(TOO_MUCH) \
                    or not any([each[0].mend(*each[1:]) for each in blamed]):
                raise _with_place(part, at, said)
        lark, vocabulary = tried["lark"], Vocabulary.of(model)
        limits = library().LLParserLimits(**LIMITS)
        matcher = library().LLMatcher(vocabulary.tokenizer, lark, log_level=0, limits=limits)
        matcher.compute_bitmask()  # the first is the slowest, and does not yet hold up others
        if matcher.is_error():
            raise _with_place(*self._blame(matcher.get_error())[0][1:])
        return lambda: Reply(vocabulary, matcher.deep_copy(), self.triggers, must_trigger)

    @property
    def loosened(self) -> list[str]:
        """Places of what `replies` left out of schemas that are not strict."""
        return [place for schema in self.schemas for place in schema.loosened]

    @property
    def _at(self) -> str:
        """Where the form was asked for."""
        return self.at or self.schemas[0].at

    def _lark(self) -> str:
        """The grammar. Raises SchemaError."""
        made = {name: f": %json {self._json(*part)}" for name, part in self._parts.items()}
        rules = "\n".join(f"{name}{rule}" for name, rule in {**self._rules, **made}.items())
        return f"{FREELY}start: {self.root}\n{rules}\n"

    def _json(self, schema: Schema, part, at: str, own: Mapping = MappingProxyType({})) -> str:
        """A schema, or a part of it, for llguidance; own: its options. Raises SchemaError."""
        made = schema.compiled(part, at)
        options = {name: value for name, value in {**made["x-guidance"], **own}.items()
                   if value is not None}
        return json.dumps({**made, "x-guidance": options})

    def _blame(self, error: str) -> list[tuple[Schema, object, str, str]]:
        """The subschemas that make an error, at least one: their schema, themselves, their places,
        and what is wrong with them. Raises SchemaError if none makes it alone."""
        until, error = time.monotonic() + BLAME_SECONDS, _words(error)
        keys, found = causes_of(error), []
        if error.startswith(TOO_MUCH) and len(self.schemas) == 1:  # no part of it is the cause
            schema = self.schemas[0]
            return [(schema, schema.root, schema.at, error)]
        for schema in self.schemas if keys else ():
            for part, at in schema.all_parts():  # those that have the keyword which may be meant
                if keys & part.keys() and time.monotonic() < until:
                    said = self._refusal(schema, part, at, keys)
                    if said and causes_of(said) == keys:
                        found.append((schema, part, at, said))
        if found:
            return found
        for schema in self.schemas:  # the innermost that makes the error
            waiting: list[tuple[object, str]] = [(schema.root, schema.at)]
            blamed, seen = None, set()
            while waiting and (blamed is None or time.monotonic() < until):
                part, at = waiting.pop(0)
                found = self._refusal(schema, part, at) if id(part) not in seen else None
                seen.add(id(part))
                if found and (blamed is None or _is_cause(found, at, blamed[3])):
                    blamed, waiting = (schema, part, at, found), [*schema.parts(part, at)]
            if blamed:
                return [blamed]
        raise SchemaError(f"{self._at}: is refused: {error}")

    def _refusal(self, schema: Schema, part, at: str, keys: Set[str] = frozenset()) -> str | None:
        """What is wrong with a part of a schema, alone; keys: that only this part may have."""
        try:
            schema.alone = id(part), keys
            compiled = self._json(schema, part, at)
        except SchemaError:
            return None
        finally:
            schema.alone = None
        error = trial.run({"lark": f"{FREELY}start: %json {compiled}"}).get("error")
        return error and _words(error)


TOO_MUCH = "Parser Error"  # what a token may take
BLAME_SECONDS = 0.5  # for the place of an error; each subschema takes about a millisecond


def _is_cause(found: str, place: str, said: str) -> bool:
    """Whether what is wrong with a part, at its place, is why the whole is refused."""
    if named := re.search("required property '(.*)' is unsatisfiable", said):
        return place.endswith(f".{named[1]}")
    return found == said or said.startswith(UNSATISFIABLE) and found.startswith(UNSATISFIABLE)


def _words(error: str) -> str:
    """llguidance's words, in one line, without the lines of Lark that it quotes."""
    error = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "",
                   re.split(r"\n +\d+ \| |\n +while processing", error)[0])
    return " ".join(error.split())[:300]


def _with_place(part, at: str, error: str) -> SchemaError:
    """What is wrong with a part of a schema that stands at `at`."""
    keys = causes_of(error) & part.keys() if isinstance(part, dict) else ()
    key = next((f".{key}" for key in sorted(keys)), "")
    return SchemaError(f"{at}{key}: {OVERLAP if key == '.oneOf' else error}")


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


def arguments_of(schema: dict, at: str, is_strict: bool) -> Schema:
    """The schema of a function's arguments: an object, whatever else its `parameters` say. JSON
    Schema would allow members that it does not name; but a function takes what it declares, and a
    model that may go on to invent arguments does. Raises SchemaError."""
    kinds, whole = schema.get("type", "object"), {**schema, "type": "object"}
    if isinstance(schema.get("properties"), dict) \
            and schema.keys() & KNOWN <= {"type", "properties", "required"}:
        whole["additionalProperties"] = False
        if isinstance(required := schema.get("required"), list):  # some declare no more than that
            whole["properties"] = {**schema["properties"], **{
                name: True for name in required if isinstance(name, str)
                and name not in schema["properties"]}}
    arguments = Schema(whole, at, is_strict)
    if kinds != "object" and not (isinstance(kinds, list) and "object" in kinds):
        if is_strict:
            raise SchemaError(f"{at}.type: must be 'object', got {kinds!r:.60}")
        arguments.loosened[f"{at}.type"] = None
    return arguments


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
