"""Calls: the forms in which models write them, and reading them out of a reply.

A chat template writes the calls of a conversation in the one form that its model was trained on.
A `CallForm` is that form as literals, which forms.py learns from the template; the same literals
make the grammar that a call must follow (grammars.py) and the parser that finds it, which is here.
Arguments are a JSON object, or *elements*: a key and a value each, between literals of their own,
where a string is bare text and other values are JSON. It is no feature by itself.
"""

import dataclasses
import functools
import json
import re
import secrets
import string
from collections.abc import Callable, Generator

import server
from features.keywords import KNOWN
from features.reasoning import ReplyParser
from features.thinking import Thinking

# In a literal these stand for a function's name, an argument's key, a call's id and its number.
NAME, KEY, ID, NUMBER = "\ue000\ue001\ue002\ue003"
VARIABLE = re.compile(f"([{ID}{NUMBER}])")
NAME_CHARACTERS = re.compile(r"[a-zA-Z0-9_-]*")
ID_LENGTH = 9  # alphanumerics, as Mistral's templates ask for
PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


# ==== 1. A form ==========================================================================


@dataclasses.dataclass(frozen=True)
class Style:
    """What stands between an argument's key and its value, and behind the value."""

    middle: str
    after: str


@dataclasses.dataclass(frozen=True)
class Elements:
    """Arguments one by one: first KEY middle VALUE after (joint KEY middle VALUE after)*."""

    first: str
    joint: str
    styles: dict[str, Style]  # by the value's type, in JSON Schema's words
    python_words: bool = False  # True, False and None
    is_sorted: bool = False  # by key
    escapes: bool = False  # a string has the backslashes of Python's
    nests: bool = True  # the template writes objects and arrays as JSON

    @functools.cached_property
    def tells_text(self) -> bool:
        """Whether the literals say that a value is a string."""
        return all(style.middle != self.styles["string"].middle
                   for kind, style in self.styles.items() if kind != "string")

    @functools.cached_property
    def middle(self) -> str:
        """What all styles have between key and value."""
        middles = [style.middle for style in self.styles.values()]
        n = next((n for n, column in enumerate(zip(*middles)) if len(set(column)) > 1),
                 min(map(len, middles)))
        return middles[0][:n]


@dataclasses.dataclass(frozen=True)
class CallForm:
    """The literals around tool calls, for the grammar and the parser alike: opening CALL
    (separator CALL)* closing, where CALL is NAME between ARGUMENTS ending."""

    opening: str
    between: str
    ending: str
    separator: str = ""  # empty: one call only
    closing: str = ""
    trigger: str = ""  # the beginning of the opening that makes a reply a call
    at_start: bool = False  # that counts only where the reply (after reasoning) begins
    elements: Elements | None = None  # None: a JSON object, ...
    separators: tuple[str, str] | None = None  # ... with these between items, and key and value
    first_number: int = 0
    takes_tools: bool = True  # the template describes the tools, ...
    wants_words: bool = False  # ... if each of their parameters has a description
    takes_calls: bool = True  # the template renders calls and results, ...
    takes_text: bool = False  # ... arguments as JSON text, ...
    takes_content: bool = True  # ... and content beside them
    short_ids: bool = False  # the template takes ids of exactly 9 alphanumerics
    variables: tuple[str, ...] = ()  # what else the template must be told

    @functools.cached_property
    def variants(self) -> tuple["CallForm", ...]:
        """Other forms that the model writes, and its template does not."""
        return tuple(dataclasses.replace(self, opening=opening, trigger=opening, between=between)
                     for opening, between in VARIANTS.get(self.opening, ()))

    @property
    def literals(self) -> tuple[str, ...]:
        """All its literals."""
        styles = self.elements.styles.values() if self.elements else ()
        joints = (self.elements.first, self.elements.joint) if self.elements else ()
        return (self.opening, self.between, self.ending, self.separator, self.closing, *joints,
                *[text for style in styles for text in (style.middle, style.after)],
                *[text for other in self.variants for text in (other.opening, other.between)])

    @property
    def rest(self) -> str:
        """What of the opening follows the trigger."""
        return self.opening.partition(self.trigger)[2] if self.trigger else self.opening

    def write(self, calls: list[tuple[str, str]]) -> str:
        """Calls (name, arguments as JSON text) as they are described to a model."""
        if self.elements:
            style = self.elements.styles["string"]
            element = f"{self.elements.first}PARAMETER{style.middle}VALUE{style.after}"
            calls = [(name, element.replace(KEY, "PARAMETER")) for name, _ in calls]
        texts = [f"{name}{self.between}{arguments or '{}'}{self.ending}".replace(NAME, name)
                 for name, arguments in calls]
        text = self.opening + self.separator.join(texts) + self.closing
        return text.replace(ID, ID_LENGTH * "0").replace(NUMBER, str(self.first_number))


VARIANTS = {  # by a learned opening: other openings, and what follows the name
    # gpt-oss's template puts the recipient before the channel, and the model also behind it.
    " to=functions.": [("<|channel|>commentary to=functions.", " <|constrain|>json<|message|>")],
}
GENERIC = CallForm('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>",
                   '\n<tool_call>\n{"name": "', trigger="<tool_call>",
                   takes_tools=False, takes_calls=False)

TYPES = ("string", "integer", "number", "boolean", "null", "object", "array")
BARE_KEYS = {"type", "enum", "const", "minLength", "maxLength"}


def is_bare(schema, form: Elements) -> bool:
    """Whether an element's value is bare text: a string without rules that only JSON Schema can
    hold. Else it is JSON."""
    return isinstance(schema, dict) and schema.get("type") == "string" \
        and schema.keys() & KNOWN <= BARE_KEYS and all(
            isinstance(choice, str) and (form.escapes or form.styles["string"].after not in choice)
            for choice in choices_of(schema))


def choices_of(schema: dict) -> list:
    """The values to which a schema restricts a string; [] for no restriction."""
    return [schema["const"]] if "const" in schema else schema.get("enum", [])


def style_of(schema, form: Elements) -> Style:
    """The literals around a value of a schema."""
    kind = schema.get("type") if isinstance(schema, dict) else None
    kinds = [each for each in kind if each != "null"] if isinstance(kind, list) else [kind]
    if is_bare(schema, form):
        return form.styles["string"]
    if form.tells_text and kinds == ["string"] or len(kinds) != 1 or kinds[0] not in form.styles:
        return form.styles["object"]
    return form.styles[kinds[0]]


# ==== 2. Replies: text into calls ========================================================


class CallParser(ReplyParser):
    """A ReplyParser that finds calls in the answer, too."""

    def __init__(self, form: CallForm, tools: list[dict], old_style: bool = False,
                 unclosed: str = "", split_reasoning: bool = True, thinking: Thinking = Thinking()):
        """tools: for the types of elements. old_style: calls are told in the deprecated
        `function_call`. The others are ReplyParser's."""
        super().__init__(unclosed, split_reasoning, thinking)
        self.n_calls = self.n_whole = 0  # calls begun and ended
        self._form, self._old_style = form, old_style
        self._id = ""  # as the model wrote it before the arguments
        functions = [tool["function"] for tool in tools]
        self._schemas = {each["name"]: each.get("parameters") or {} for each in functions}

    def finish_reason(self, reason: str) -> str:
        """As ReplyParser.finish_reason. A call cut off stays incomplete, and is none."""
        if reason != "stop" or not 0 < self.n_calls == self.n_whole:
            return reason
        return "function_call" if self._old_style else "tool_calls"

    def whole(self, message: dict) -> dict:
        """As ReplyParser.whole: content beside calls may be null."""
        if message.get("tool_calls") or message.get("function_call"):
            message["content"] = message["content"] or None
        if parts := message.get("tool_calls"):
            message["tool_calls"] = joined(parts)
        return message

    def _answer(self, strip: str) -> Generator:
        form, head = self._form, self._thinking.head
        if form.at_start:
            begun = {each.trigger: each for each in (form, *form.variants)}
            found = yield from self._choose(*filter(None, (head, *begun)))
            if found in begun or not (form.trigger or found):
                yield from self._calls(begun[found or ""])
            yield from self._content("both" if found else strip)
            return
        while (yield from self._content(strip, form.trigger)) is not None:
            yield from self._calls(form)
            strip = "both"

    def _calls(self, form: CallForm) -> Generator:
        more = yield from self._literal(form.rest)
        while more and (name := (yield from self._run(NAME_CHARACTERS))):
            if not (yield from self._literal(form.between, name)):
                break
            self.n_calls += 1
            call_id, self._id = self._id or new_call_id(form), ""
            self._add_arguments("", id=call_id, type="function", function={"name": name})
            read = self._elements(name, form) if form.elements else self._object(name, form)
            self.n_whole += bool((yield from read))
            self._id = ""  # told already
            more = (yield from self._literal(form.separator)) if form.separator else False
            if not more:
                yield from self._literal(form.closing)
        if self._ended:
            self._pending = ""  # part of one of the literals

    def _literal(self, text: str, name: str = "") -> Generator:
        """Read a literal with what stands in its place for variables; whether it came. What is
        not begun is left."""
        for part in filter(None, VARIABLE.split(text.replace(NAME, name))):
            if part == ID:
                self._id = yield from self._run(NAME_CHARACTERS)
            elif part == NUMBER:
                yield from self._run(DIGITS)
            elif (yield from self._choose(part)) is None:
                return False
        return True

    def _run(self, characters: re.Pattern) -> Generator:
        """Read such characters, up to the first other one."""
        while True:
            end = characters.match(self._pending).end()
            if end < len(self._pending) or self._ended:
                run, self._pending = self._pending[:end], self._pending[end:]
                return run
            yield

    def _object(self, name: str, form: CallForm) -> Generator:
        """A JSON object, passed on as it comes, and the ending behind it; whether both came."""
        if not (yield from self._json(self._add_arguments)):
            return False
        return (yield from self._literal(form.ending, name))

    def _json(self, add: Callable[[str], None]) -> Generator:
        """A JSON value, passed on as it comes, up to its end; whether that came."""
        self._pending = self._pending.lstrip()
        depth, in_string, escaped, begun = 0, False, False, ""
        while not self._ended or self._pending:
            end, is_over = 0, False
            for end, char in enumerate(self._pending):
                if begun and not depth and not in_string:  # closed, or a word has ended
                    if begun in '{["' or not (char.isalnum() or char in "+-."):
                        is_over = True
                        break
                begun = begun or char
                if in_string:
                    in_string, escaped = escaped or char != '"', char == "\\" and not escaped
                elif char == '"':
                    in_string = True
                else:
                    depth += (char in "{[") - (char in "]}")
            else:
                end = len(self._pending)
                is_over = bool(begun) and begun in '{["' and not depth and not in_string
            text, self._pending = self._pending[:end], self._pending[end:]
            if text:
                add(text)
            if is_over:
                return True
            yield
        return False

    def _elements(self, function: str, form: CallForm) -> Generator:
        """Elements, passed on as a JSON object, up to the ending; whether that came."""
        properties, elements = self._schemas.get(function, {}).get("properties", {}), form.elements
        before, ending = "{", VARIABLE.split(form.ending.replace(NAME, function))[0]
        start = elements.first
        while (found := (yield from self._choose(*filter(None, (start, ending))))) != ending:
            key: list[str] = []
            if found is None and start or not (
                    yield from self._until(elements.middle, add=key.append)):
                return False
            name = "".join(key)
            style, is_text = yield from self._style(properties.get(name), elements)
            self._add_arguments(f'{before}"{quoted(name)}": ' + '"' * is_text)
            after = style.after.replace(KEY, name)
            if not (yield from self._value(is_text, after, elements)):
                return False
            before, start = ", ", elements.joint
        self._add_arguments("{}" if before == "{" else "}")
        return (yield from self._literal(form.ending.replace(NAME, function)[len(ending):]))

    def _style(self, schema, elements: Elements) -> Generator:
        """The style of the value that comes, and whether it is bare text."""
        style, text = style_of(schema, elements), elements.styles["string"]
        if not elements.tells_text:
            yield from self._choose(style.middle[len(elements.middle):])
            return style, is_bare(schema, elements)
        middles = {each.middle[len(elements.middle):]: each
                   for each in (text, style, *elements.styles.values())}
        found = middles.get((yield from self._choose(*middles)), style)
        return found, found.middle == text.middle

    def _value(self, is_text: bool, after: str, elements: Elements) -> Generator:
        """An argument's value, passed on as JSON; whether its end came."""
        if not is_text:
            word = yield from self._choose(*PYTHON_WORDS)  # no JSON begins with a capital
            self._add_arguments(PYTHON_WORDS.get(word, ""))
            return (word or (yield from self._json(self._add_arguments))) and (
                not after or (yield from self._choose(after)) is not None)
        if elements.escapes:
            return (yield from self._escaped(after))
        found = yield from self._until(after, add=lambda text: self._add_arguments(quoted(text)))
        self._add_arguments('"' * bool(found))
        return bool(found)

    def _escaped(self, after: str) -> Generator:
        """A string with backslashes, up to its quote and what follows; whether that came."""
        quote = after[0]
        while True:
            end = re.match(rf"(?:[^\\{quote}]|\\.)*", self._pending, re.DOTALL).end()
            text, self._pending = self._pending[:end], self._pending[end:]
            if text:
                unescaped = re.sub(r"\\(.)", lambda match: ESCAPES.get(match[1], match[1]), text)
                self._add_arguments(quoted(unescaped))
            if self._pending.startswith(quote):
                self._add_arguments('"')
                return (yield from self._choose(after)) is not None
            if self._ended:
                return False
            yield

    def _add_arguments(self, text: str, **head) -> None:
        """A fragment of the last call's arguments; with a `head` also its beginning."""
        if not text and not head:
            return
        part = {"function": {**head.pop("function", {}), "arguments": text}}
        if self._old_style:
            self._say("function_call", part["function"])
        else:
            self._say("tool_calls", [{"index": self.n_calls - 1, **head, **part}])


def joined(parts: list[dict]) -> list[dict]:
    """The calls that the parts of a stream's deltas make, put together."""
    found: list[dict] = []
    for part in parts:
        if part["index"] == len(found):
            found.append({})
        server.merge(found[part["index"]], {
            name: value for name, value in part.items() if name != "index"})
    return found


DIGITS = re.compile("[0-9]*")
ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}


def quoted(text: str) -> str:
    """Text as it stands inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def new_call_id(form: CallForm) -> str:
    """A random id in the shape that the API, or the model's template, asks for."""
    letters = secrets.SystemRandom().choices(string.ascii_letters + string.digits, k=24)
    return "".join(letters[:ID_LENGTH]) if form.short_ids else "call_" + "".join(letters)

