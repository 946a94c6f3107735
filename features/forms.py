"""Learning a form of calls: what a chat template writes around calls of unmistakable names.

How it works: the template renders a conversation that ends with calls, whose names, ids, keys and
values are words that nothing else contains, and one that ends with an answer (renderings.py). What
both begin and end with is the turn; the rest is the form: what stands before the first name,
between name and arguments, around each argument, behind a call, between two and at the end
(calls.py). What templates take of a call differs, so several ways are tried: arguments as an object
or as text, with content beside it or without, several calls or one. What was learned must then read
what the template writes, piece by piece and whole; if it does not, or the template writes no calls,
calls have the generic form. It costs some ten renderings, once for each model. It is no feature by
itself.
"""

import dataclasses
import functools
import itertools
import json
import re

import engine
from features.calls import (
    GENERIC, ID, KEY, NAME, NUMBER, TYPES, CallForm, CallParser, Elements, Style)
from features.thinking import Thinking
from features.renderings import ANSWER, TOOL, Renderings, answer, common_start, segments, turn_end

NAMES, IDS = ("calleda", "calledb", "calledc"), ("callid0a1", "callid0b2", "callid0c3")
ARGUMENTS = {  # a value of each type, two strings in front and one at the end
    "keyb": "textb", "keya": "texta", "keyc": 4711, "keyd": 47.5, "keye": True, "keyf": None,
    "keyg": {"inner": ["innertext", 12]}, "keyh": ["itemtext", 13], "keyi": "texti"}
WORDLESS = json.loads(json.dumps(TOOL).replace('"description": "A part."', '"title": "Part"'))
KINDS = {"keyb": "string", "keyc": "integer", "keyd": "number", "keye": "boolean", "keyf": "null",
         "keyg": "object", "keyh": "array"}
PROPERTIES = {key: {"type": KINDS.get(key, "string")} for key in ARGUMENTS}
CALLED = [{"type": "function", "function": {
    "name": name, "parameters": {"type": "object", "properties": PROPERTIES}}} for name in NAMES]
SEPARATORS = [(", ", ": "), (",", ":"), (", ", ":"), (",", ": ")]
OLD_VARIABLES = {"functions": json.dumps([TOOL["function"]]), "datetime": "today"}


class Unlearnable(Exception):
    """The form cannot be learned; the message says why."""


def learn(model: engine.Model, thinking: Thinking) -> tuple[CallForm, str]:
    """The form of a model's calls, and why it is this one."""
    if not model.generates:
        return GENERIC, "the model makes no text"
    render, reasons = Renderings(model), []
    for takes_text, takes_content in itertools.product((False, True), (True, False)):
        way = Way(render, thinking, takes_text, takes_content)
        try:
            form = way.form()
            way.check(form)
        except Unlearnable as error:
            reasons.append(str(error))
        else:
            return form, "learned from the chat template"
    return GENERIC, TOO_SLOW if render.is_slow else max(reasons, key=REASONS.index)


NO_TOOLS = "the chat template refuses tools"
NO_CALLS = "the chat template writes no calls"
UNKNOWN = "how the chat template writes calls is not understood"
TOO_SLOW = "the chat template takes too long"
MISREAD = "what the chat template writes is not read back"
REASONS = [NO_TOOLS, NO_CALLS, UNKNOWN, MISREAD]  # the last tells most


@dataclasses.dataclass
class Way:
    """A way to tell a template of calls."""

    render: Renderings
    thinking: Thinking
    takes_text: bool
    takes_content: bool
    variables: dict = dataclasses.field(default_factory=dict)

    def form(self) -> CallForm:
        """The form that the template writes. Raises Unlearnable."""
        self._find_variables()
        prompt = self.render(prompt=True, **self.options)
        told = self.render(answer(), **self.options)
        if prompt is None or told is None or ANSWER not in told:
            raise Unlearnable(NO_TOOLS)
        known = self.render.whole(prompt=True, **self.options)
        reason = NO_CALLS
        for n_calls in (3, 2, 1):
            text = self._written(n_calls) or ""
            if NAMES[n_calls - 1] in text:
                try:
                    form = self._compare(text, told, prompt, n_calls)
                except (Unlearnable, ValueError, IndexError, StopIteration):  # any text may come
                    reason = UNKNOWN
                    continue
                return dataclasses.replace(
                    form, takes_text=self.takes_text, takes_content=self.takes_content,
                    variables=tuple(self.variables), short_ids=self._written(1, "0") is None,
                    takes_tools=TOOL["function"]["name"] in known, wants_words=self.render.whole(
                        prompt=True, **{**self.options, "tools": [WORDLESS]}) is None)
        raise Unlearnable(reason)

    def _compare(self, text: str, told: str, prompt: str, n_calls: int) -> CallForm:
        """The form of calls in a text. told: an answer in their place. Raises Unlearnable."""
        before, _, after = told.partition(ANSWER)
        self.start = self._start(text, before, prompt)
        end = len(text) - len(turn_end([text, after], self.render.turn_end))
        for token in self.render.model.end_tokens:
            mark = self.render.model.piece(token, special=True).decode("utf-8", "replace")
            at = text.find(mark, text.rindex(NAMES[n_calls - 1])) if mark else -1
            end = min(end, at) if at >= 0 else end
        self.text = text[:end]
        calls = [self._split(i, n_calls) for i in range(n_calls)]
        form = self._assemble(calls)
        return self._with_trigger(form, told + prompt)

    def _start(self, text: str, before: str, prompt: str) -> int:
        """Where the calls begin in a text. before: what stands before an answer."""
        shared = common_start([text, before.removesuffix(self.thinking.head)])
        if text.startswith(prompt):  # what is alike behind it may be part of a word
            more = "".join(re.findall(r"(?s).*[>\]\n]", shared[len(prompt):]))
            shared = prompt + more
        off = self.render(prompt=True, enable_thinking=False, **self.options) or ""
        prompts = (prompt, off, prompt + self.thinking.end(prompt), off + self.thinking.end(off))
        if not any(each.endswith(shared) for each in prompts) \
                and any(each.endswith(shared.rstrip()) for each in prompts):
            shared = shared.rstrip()  # the reply begins with white space
        return min(len(shared), text.index(NAMES[0]))

    @property
    def options(self) -> dict:
        """What else the template reads."""
        return {"tools": [TOOL], **self.variables}

    def _find_variables(self) -> None:
        """Some old templates cannot do without variables that only they know."""
        if self.render(prompt=True, tools=[TOOL]) is None:
            self.variables = OLD_VARIABLES
            if self.render(prompt=True, **self.options) is None:
                raise Unlearnable(NO_TOOLS)

    def _written(self, n_calls: int, suffix: str = "", arguments: dict = ARGUMENTS) -> str | None:
        """Calls as the template writes them. suffix: behind their ids."""
        given = json.dumps(arguments, ensure_ascii=False) if self.takes_text else arguments
        turn = {"role": "assistant", "tool_calls": [
            {"id": call_id + suffix, "type": "function",
             "function": {"name": name, "arguments": given}}
            for name, call_id in zip(NAMES[:n_calls], IDS)]}
        turn["content"] = "" if self.takes_content else None
        return self.render(turn, **self.options)

    def _split(self, i: int, n_calls: int) -> "Written":
        """The parts of a call in the text."""
        at = self.text.index(NAMES[i], self.start)
        begin = at + len(NAMES[i])
        until = self.text.index(NAMES[i + 1], begin) if i + 1 < n_calls else len(self.text)
        part = self.text[begin:until]
        brace = part.find("{", 0, max(0, part.find(f'"{next(iter(ARGUMENTS))}"')))
        try:
            value, n = json.JSONDecoder().raw_decode(part[brace:]) if brace >= 0 else (None, 0)
        except ValueError:
            value, n = None, 0
        if value == ARGUMENTS:
            raw = part[brace:brace + n]
            return Written(part[:brace], part[brace + n:], None, next((
                pair for pair in SEPARATORS
                if json.dumps(ARGUMENTS, ensure_ascii=False, separators=pair) == raw), None))
        if self.takes_text:
            raise Unlearnable(UNKNOWN)
        elements, between, ending = learn_elements(part)
        return Written(between, ending, elements, SEPARATORS[0])

    def _assemble(self, calls: list["Written"]) -> CallForm:
        """One form of several calls."""
        opening = general(self._behind_reasoning(
            self.text[self.start:self.text.index(NAMES[0], self.start)]))
        # What follows a call's name, and its arguments, up to the next name or the end.
        betweens = [general(call.between, name) for call, name in zip(calls, NAMES)]
        endings = [general(call.after, name) for call, name in zip(calls, NAMES)]
        first, between, ending, separator, number = calls[0], betweens[0], endings[-1], "", 0
        if len(calls) > 1:
            between, number = numbered(betweens)
            separator, later = numbered(endings[:-1])
            if NUMBER in separator:
                number = later - 1
                behind = f"{number}{separator.rpartition(NUMBER)[2]}"
                if not opening.endswith(behind):
                    raise Unlearnable(UNKNOWN)
                opening = opening.removesuffix(behind) + NUMBER + behind.removeprefix(str(number))
            ending = common_start([endings[-1], separator])
        if any(call.elements != first.elements for call in calls):
            raise Unlearnable(UNKNOWN)
        return CallForm(opening, between, ending, separator[len(ending):],
                        endings[-1][len(ending):] if separator else "", elements=first.elements,
                        separators=first.separators, first_number=number)

    def _behind_reasoning(self, opening: str) -> str:
        """What comes behind the reasoning that a template writes in front of calls."""
        for close in {*self.thinking.tags.values()}:
            opening = opening.rpartition(close)[2]
        return opening

    def _with_trigger(self, form: CallForm, others: str) -> CallForm:
        """With the beginning of its opening by which a call is told from what else is written."""
        empty = self.thinking.head + self.thinking.tail  # an answer that says nothing
        opening, trigger = form.opening.removeprefix(empty).lstrip(), ""
        if opening[:1] not in TAGS:
            return dataclasses.replace(form, at_start=True, trigger=opening)
        for run in itertools.groupby(segments(re.split(f"[{ID}{NUMBER}]", opening)[0]), len):
            trigger += "".join(run[1])
            if trigger not in others and opening.count(trigger) == 1:
                break
        return dataclasses.replace(form, trigger=trigger.rstrip())

    def check(self, form: CallForm) -> None:
        """See that calls are read back as they were written, in pieces and whole. Raises
        Unlearnable."""
        n_most = 2 if form.separator else 1
        nests = form.elements is None or form.elements.nests
        readable = {key: value for key, value in ARGUMENTS.items()
                    if (nests or not isinstance(value, (dict, list))) and key in self.text}
        for arguments in (readable, {}):
            for n_calls in range(1, n_most + 1):
                text = self._written(n_calls, arguments=arguments)
                if not text or NAMES[0] not in text:
                    continue
                at = text.rfind(form.trigger or NAMES[0], 0, text.index(NAMES[0]) + len(NAMES[0]))
                if at < 0 or not is_read(form, self.thinking, text[at:], n_calls, arguments):
                    raise Unlearnable(MISREAD)


@dataclasses.dataclass
class Written:
    """A call as it was written, without its name."""

    between: str
    after: str
    elements: Elements | None
    separators: tuple[str, str] | None


TAGS = ("<", "[", "]")  # what a reply seldom begins with


def general(text: str, name: str = "") -> str:
    """A text with what stands for a call's own name and for any id."""
    text = text.replace(name, NAME) if name else text
    return functools.reduce(lambda text, call_id: text.replace(call_id, ID), IDS, text)


def numbered(texts: list[str]) -> tuple[str, int]:
    """Texts that differ in a number that counts, as one, and the first number. Raises
    Unlearnable."""
    if len(set(texts)) == 1:
        return texts[0], 0
    columns = list(zip(*(re.split(r"(\d+)", text) for text in texts)))
    counts = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    for i in counts:
        numbers = [int(each) for each in columns[i] if each.isdecimal()]
        if numbers != list(range(numbers[0], numbers[0] + len(texts))) if numbers else True:
            raise Unlearnable(UNKNOWN)
    text = "".join(NUMBER if i in counts else column[0] for i, column in enumerate(columns))
    return text, int(columns[counts[0]][0])


def learn_elements(part: str) -> tuple[Elements, str, str]:
    """Arguments one by one: their form, what stands between the name and them, and behind them.
    part: what follows a name. Raises Unlearnable."""
    given = [key for key in ARGUMENTS if key in part or ARGUMENTS[key] is not None]
    keys = sorted(given, key=part.find)
    is_sorted = keys == sorted(given)
    if min(map(part.find, keys)) < 0 or not is_sorted and keys != given:
        raise Unlearnable(UNKNOWN)
    starts = [part.index(key) for key in keys]
    pieces = [part[start + len(key):end] for start, key, end in
              zip(starts, keys, [*starts[1:], len(part)])]  # from each key to the next
    pieces = [piece.replace(key, KEY) for piece, key in zip(pieces, keys)]
    between, last = part[:starts[0]], pieces[-1].rpartition(ARGUMENTS[keys[-1]])
    text, follow = pieces[0].split(ARGUMENTS[keys[0]], 1)
    after = common_start([follow, last[2]])
    joint, ending = follow[len(after):], last[2][len(after):]
    if not joint or not last[1] or last[0] != text:
        raise Unlearnable(UNKNOWN)
    first = next(joint[i:] for i in range(len(joint) + 1) if between.endswith(joint[i:]))
    styles, python_words, nests = {"string": Style(text, after)}, False, True
    for key, piece in zip(keys, pieces):
        kind, value, piece = KINDS.get(key), ARGUMENTS[key], piece.removesuffix(joint)
        if kind not in (None, "string"):
            as_json, as_python = json.dumps(value), str(value)
            found = next((text for text in (as_json, as_python) if text in piece), None)
            styles[kind] = Style(*piece.rpartition(found)[::2]) if found else styles["integer"]
            python_words |= kind == "boolean" and found == as_python
            nests &= kind not in ("object", "array") or found == as_json
    escapes = after[:1] == "'" and text.endswith("'")
    styles = {kind: styles.get(kind, styles["integer"]) for kind in TYPES}
    form = Elements(first, joint, styles, python_words, is_sorted, escapes, nests)
    if not form.middle:
        raise Unlearnable(UNKNOWN)
    return form, between.removesuffix(first), ending


def is_read(form: CallForm, thinking: Thinking, text: str, n_calls: int, arguments: dict) -> bool:
    """Whether a parser finds these calls in a text, in pieces of one character and whole."""
    for step in (1, len(text)):
        parser, found = CallParser(form, CALLED, thinking=thinking), []
        pieces = [text[i:i + step] for i in range(0, len(text), step)]
        for delta in sum(map(parser.feed, pieces), []) + parser.finish():
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    found.append([call["function"]["name"], ""])
                found[-1][1] += call["function"]["arguments"]
        if [name for name, _ in found] != list(NAMES[:n_calls]) or parser.n_whole != n_calls:
            return False
        try:
            if any(json.loads(read) != arguments for _, read in found):
                return False
        except ValueError:
            return False
    return True
