"""Tools: functions that a model may call.

What for: agents. How it works: the model's chat template decides how it is told of tools and how it
writes calls; calls.py holds the literals around them, by which a reply is taken apart while it
arrives, and by which a form is made that a call must follow, so that its arguments always validate.
For a template without tools the system message describes them. It costs what the form costs
(structured.py). It reads the fields `tools`, `tool_choice`, `parallel_tool_calls`, the deprecated
`functions` and `function_call`, and the calls and results in messages; it sends `tool_calls`.
"""

import dataclasses
import functools
import hashlib
import json
import re
import secrets
import string
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any, Literal

import engine
import server
from features import structured
from features.calls import (
    NOT_A_CALL, PARAMETER, PARAMETER_END, TOOL_FORMATS, ToolFormat, add_arguments, calls_of,
    is_text, tool_format_of)
from features.reasoning import ReplyParser, unclosed_reasoning

NEEDS = ("structured", "reasoning")
TOOL_NAME = "[a-zA-Z0-9_-]{1,64}"


# ==== 1. Fields ==========================================================================


@dataclasses.dataclass
class CalledFunction:
    """What an assistant called: `arguments` is JSON, as text."""

    name: str
    arguments: str


@dataclasses.dataclass
class ToolCall:
    """A call in an assistant's message."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


@dataclasses.dataclass
class Function:
    """A function that the model may call, or just its name; `parameters` is a JSON Schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False  # whether what a call cannot be held to is refused


@dataclasses.dataclass
class Tool:
    """A tool; functions are the only kind here."""

    type: Literal["function"]
    function: Function


@dataclasses.dataclass
class AllowedTools:
    """Those tools that may be called this time."""

    mode: Literal["auto", "required"]
    tools: list[Tool]


@dataclasses.dataclass
class ToolChoice:
    """A named tool, or a choice of them."""

    type: Literal["function", "allowed_tools"]
    function: Function | None = None
    allowed_tools: AllowedTools | None = None


@dataclasses.dataclass
class MessageFields:
    """Calls and their results. The role `function` is the older one for `tool`."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: CalledFunction | None = None

    def is_empty(self) -> bool:
        """As Message.is_empty."""
        return super().is_empty() and not (self.tool_calls or self.function_call)

    def check(self, at: str) -> None:
        """Refuse what role and fields together make impossible."""
        if (self.tool_calls or self.function_call) and self.role != "assistant":
            raise server.invalid(f"{at}.tool_calls",
                                 f"{at}: a {self.role} message cannot call tools")
        for role, needed in (("tool", "tool_call_id"), ("function", "name")):
            if self.role == role and getattr(self, needed) is None:
                raise server.invalid(f"{at}.{needed}", f"{at}.{needed} is required",
                                     "missing_field")


@dataclasses.dataclass
class ChatFields:
    """Functions, and which of them to call."""

    tools: list[Tool] | None = server.option(max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool = True
    functions: list[Function] | None = server.option(max_length=128)
    function_call: Literal["none", "auto"] | Function | None = None

    def check(self, _at: str) -> None:
        """Refuse what fields together make impossible, before a model is loaded for it."""
        asked = structured.asked_of(self)
        if self.offer.allowed and asked and asked.kind != "schema":
            raise server.invalid(asked.field, f"{asked.at} and {self.offer.where} were sent; the "
                                              "reply can follow only one of them")

    @functools.cached_property
    def offer(self) -> "Offer":
        """The functions that the model may call."""
        old = self.functions is not None
        where = "functions" if old else "tools"
        functions = self.functions or [tool.function for tool in self.tools or ()]
        choice = self.function_call if old else self.tool_choice
        names = [function.name for function in functions]
        for i, name in enumerate(names):
            if not re.fullmatch(TOOL_NAME, name) or name in names[:i]:
                at = f"{where}[{i}]{'' if old else '.function'}.name"
                raise server.invalid(at, f"{at}: {server.describe(name)} must be 1 to 64 letters, "
                                     "digits, _ and -, and occur once")
        allowed, mode = names, choice if isinstance(choice, str) else "auto"
        if isinstance(choice, ToolChoice) and choice.type == "allowed_tools":
            listed = choice.allowed_tools or AllowedTools("auto", [])
            allowed, mode = [tool.function.name for tool in listed.tools], listed.mode
        elif choice is not None and not isinstance(choice, str):
            named = choice.function or Function("") if isinstance(choice, ToolChoice) else choice
            allowed, mode = [named.name], "required"
        param = "function_call" if old else "tool_choice"
        if missing := [name for name in allowed if name not in names]:
            raise server.invalid(param, f"{param}: {server.describe(missing[0])} is not among "
                                 f"the {where}")
        if mode == "required" and not allowed:
            raise server.invalid(param, f"{param}: asks for a call, but there are no {where}")
        tools = [{"type": "function", "function": {
            key: value for key, value in dataclasses.asdict(function).items()
            if value is not None and key != "strict"}} for function in functions]
        is_named = mode == "required" and choice != "required" and len(allowed) == 1
        return Offer(tools if mode != "none" else [], allowed if mode != "none" else [],
                     mode == "required", self.parallel_tool_calls and not is_named, where,
                     {function.name for function in functions if function.strict})


FIELDS = {"ChatBody": ChatFields, "Message": MessageFields}


@dataclasses.dataclass
class Offer:
    """The functions that the model may call this time."""

    tools: list[dict]  # all of them, for the template
    allowed: list[str]  # names of those that may be called
    is_required: bool
    is_parallel: bool  # several calls in one reply
    where: str  # "tools", or the deprecated "functions"
    strict: set[str]  # names of those whose arguments satisfy every word of their parameters

    def rules(self) -> Iterator[tuple[str, dict, str, bool]]:
        """Each allowed function's name and parameters, where these stand in the request, and
        whether they are strict. No parameters, as the OpenAI reference has it, are an empty list of
        them."""
        for i, tool in enumerate(self.tools):
            name, inner = tool["function"]["name"], ".function" if self.where == "tools" else ""
            if name in self.allowed:
                parameters = tool["function"].get("parameters") or {"additionalProperties": False}
                yield name, parameters, f"{self.where}[{i}]{inner}.parameters", name in self.strict


# ==== 2. Replies: text into calls ========================================================


class CallParser(ReplyParser):
    """A ReplyParser that finds calls in the answer, too."""

    def __init__(self, form: ToolFormat, tools: list[dict], old_style: bool = False, *of_reply):
        """tools: for the types of XML parameters. old_style: calls are told in the deprecated
        `function_call`. of_reply: arguments of ReplyParser."""
        super().__init__(*of_reply)
        self.n_calls = self.n_whole = 0  # calls begun and ended
        self._form, self._old_style = form, old_style
        functions = [tool["function"] for tool in tools]
        self._schemas = {each["name"]: each.get("parameters") or {} for each in functions}

    def finish_reason(self, reason: str) -> str:
        """As TextParser.finish_reason. A call cut off stays incomplete, and is none."""
        if reason != "stop" or not 0 < self.n_calls == self.n_whole:
            return reason
        return "function_call" if self._old_style else "tool_calls"

    def whole(self, message: dict) -> dict:
        """As TextParser.whole: content beside calls may be null."""
        if message.get("tool_calls") or message.get("function_call"):
            message["content"] = message["content"] or None
        return message

    def _answer(self, strip: str) -> Generator:
        form = self._form
        if form.at_start and (yield from self._choose(form.trigger)):
            yield from self._calls(form)
        trigger = "" if form.at_start else form.trigger
        say = functools.partial(self._say, "content")
        while (yield from self._until(trigger, say, strip)) is not None:
            yield from self._calls(form)
            strip = "both"

    def _calls(self, form: ToolFormat) -> Generator:
        more = (yield from self._choose(form.opening)) is not None
        while more and (name := (yield from self._until(form.between))):
            self.n_calls += 1
            self._add_arguments("", id=new_call_id(form), type="function", function={"name": name})
            read = self._parameters(name, form) if form.xml else self._object(form)
            self.n_whole += bool((yield from read))
            ends = filter(None, (form.separator, form.closing))
            more = (yield from self._choose(*ends)) == form.separator
        if self._ended:
            self._pending = ""  # part of one of the literals

    def _object(self, form: ToolFormat) -> Generator:
        """A JSON object, passed on as it comes, up to the brace that closes its first and the
        ending behind it; whether both came."""
        depth, in_string, escaped = 0, False, False
        while not self._ended:
            end = 0  # of what is read in this piece
            for end, char in enumerate(self._pending, start=1):
                if in_string:
                    in_string, escaped = escaped or char != '"', char == "\\" and not escaped
                else:
                    in_string = char == '"'
                    depth += (char in "{[") - (char in "]}")
                    if depth == 0:
                        break
            text, self._pending = self._pending[:end], self._pending[end:]
            self._add_arguments(text)
            if text and depth == 0:
                return (yield from self._choose(form.ending)) is not None
            yield

    def _parameters(self, function: str, form: ToolFormat) -> Generator:
        """XML parameters, passed on as a JSON object, up to the ending; whether that came."""
        properties, before = self._schemas.get(function, {}).get("properties", {}), "{"
        start, end = PARAMETER, PARAMETER_END
        while (found := (yield from self._choose(start, form.ending))) == start:
            if not (name := (yield from self._until(form.between))):
                return False
            quote, convert = ('"', quoted) if is_text(properties.get(name)) else ("", str)
            self._add_arguments(f'{before}"{quoted(name)}": {quote}')
            add = functools.partial(self._add_converted, convert)
            if (yield from self._until(end, add)) is not None:
                self._add_arguments(quote)
            before = ", "
        if found:
            self._add_arguments("{}" if before == "{" else "}")
        return bool(found)

    def _add_converted(self, convert: Callable[[str], str], text: str) -> None:
        self._add_arguments(convert(text))

    def _add_arguments(self, text: str, **head) -> None:
        """A fragment of the last call's arguments; with a `head` also its beginning."""
        if not text and not head:
            return
        part = {"function": {**head.pop("function", {}), "arguments": text}}
        if self._old_style:
            self._say("function_call", part["function"])
        else:
            self._say("tool_calls", [{"index": self.n_calls - 1, **head, **part}])


def quoted(text: str) -> str:
    """Text as it stands inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def new_call_id(form: ToolFormat) -> str:
    """A random id in the shape that the API, or the model's template, asks for."""
    letters = secrets.SystemRandom().choices(string.ascii_letters + string.digits, k=24)
    return "".join(letters[:9]) if form.short_ids else "call_" + "".join(letters)


# ==== 3. Prompts: tools, calls and results as templates take them ========================

TOOLS_TEXT = ("You can call these functions, described with JSON Schema:\n\n{}\n\nTo call one, "
              "write its name and arguments in exactly this form:\n{}\nIf none helps, just answer.")


def prepare_tools(tools: list[dict] | None, form: ToolFormat) -> list[dict] | None:
    """The tools as a template takes them, with nothing left out; None where it takes none."""
    blank = {"name": "", "description": "", "parameters": {"type": "object", "properties": {}}}
    return [{"type": "function", "function": {**blank, **tool["function"]}}
            for tool in tools] if tools and form.native else None


def prepare_messages(messages: list[dict], tools: list[dict], form: ToolFormat) -> list[dict]:
    """Messages with calls and results as a template takes them. Where that is not native, they
    become text, results the beginning of what the user says next, and the system message describes
    the tools."""
    turns, was_result = [], False
    for message in messages:
        turn, is_result = _prepare(message, form), message["role"] in ("tool", "function")
        if not form.native and was_result and turn["role"] == "user":
            text = server.text_of(turn["content"])
            turn["content"] = f"{turns.pop()['content']}\n\n{text}"
        turns.append(turn)
        was_result = is_result
    if tools and not form.native:
        lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        text = TOOLS_TEXT.format(lines, _write_calls(form, [("NAME", "{...}")]))
        has_system = bool(turns) and turns[0]["role"] in ("system", "developer")
        turns.insert(has_system, {"role": "system", "content": text})
    return turns


def _prepare(message: dict, form: ToolFormat) -> dict:
    """One message. The old function_call and role function have no ids: the name serves."""
    def new_id(call_id: str) -> str:
        fits = not form.short_ids or re.fullmatch("[A-Za-z0-9]{9}", call_id)
        return call_id if fits else hashlib.sha256(call_id.encode()).hexdigest()[:9]

    content = server.text_of(message.get("content") or message.get("refusal") or "")
    turn = {key: value for key, value in message.items()
            if key not in ("tool_calls", "tool_call_id", "function_call")}
    turn["role"] = "tool" if message["role"] == "function" else message["role"]
    old = message.get("function_call")
    calls = message.get("tool_calls") or ([{"id": old["name"], "function": old}] if old else [])
    if turn["role"] == "tool":
        turn["tool_call_id"] = new_id(message.get("tool_call_id") or message.get("name") or "")
        if not form.native:
            turn = {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    elif calls and form.native:
        turn["tool_calls"] = [{"id": new_id(call["id"]), "type": "function", "function": {
            **call["function"], "arguments": _read_object(call["function"]["arguments"])}}
            for call in calls]
    elif calls:
        texts = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
        turn["content"] = f"{content}\n{_write_calls(form, texts)}".lstrip("\n")
    return turn


def _read_object(text: str) -> dict | str:
    """Arguments as templates take them, by Hugging Face's convention; no object stays text."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _write_calls(form: ToolFormat, calls: list[tuple[str, str]]) -> str:
    """Calls (name, arguments as JSON) as their model would have written them."""
    texts = [name + form.between + (arguments or "{}") + form.ending for name, arguments in calls]
    return form.trigger + form.opening + form.separator.join(texts) + form.closing


forms: "weakref.WeakKeyDictionary[engine.Engine, ToolFormat]" = weakref.WeakKeyDictionary()


def equip(loaded: engine.Engine, _settings) -> None:
    """Learn how the model's template makes it write calls."""
    forms[loaded] = tool_format_of(loaded.model.template_source)
    loaded.model.show(text for form in TOOL_FORMATS.values()
                      for text in (form.trigger, form.between, form.ending))
    if loaded.model.generates:
        loaded.capabilities.append("tools")


def join(wanted: "server.Generation") -> None:
    """Tell the model of its tools, and find its calls."""
    if not isinstance(wanted, server.Chat):
        return
    offer, form = wanted.body.offer, forms[wanted.loaded]
    wanted.messages = prepare_messages(wanted.messages, offer.tools, form)
    wanted.options["tools"] = prepare_tools(offer.tools, form)
    if not offer.allowed:
        return
    asked = structured.asked_of(wanted.body)
    wanted.constrained_by = asked.field if asked else offer.where
    wanted.constrain = functools.partial(constrain, wanted, offer, form)
    wanted.parse = lambda prompt: functools.partial(
        CallParser, form, offer.tools, offer.where == "functions", unclosed_reasoning(prompt),
        wanted.config.split_reasoning)


def constrain(chat: "server.Chat", offer: Offer, format: ToolFormat, prompt: str
              ) -> Callable[[], engine.Constraint]:
    """What makes the Constraint of each choice: a call, or what else the reply may be. Raises
    ApiError."""
    form, after = structured.Form(), tuple(filter(None, [chat.lead(prompt)]))
    with structured.schema_errors():
        asked = structured.asked_of(chat.body)
        ways = [structured.add_asked(form, asked)] if asked else []
        functions = [(name, add_arguments(form, format, parameters, at, is_strict))
                     for name, parameters, at, is_strict in offer.rules()]
        if not ways and not offer.is_required and not format.at_start:
            form.triggers = (*after, format.trigger)
            form.root = calls_of(format, functions, offer.is_parallel, True)
        else:
            form.triggers = after
            call = calls_of(format, functions, offer.is_parallel, False)
            ways = [call] if offer.is_required else [call, *(ways or [NOT_A_CALL])]
            form.root = structured.AFTER_REASONING * bool(after) + f"({' | '.join(ways)})"
        replies = form.replies(chat.loaded.model, offer.is_required or asked is not None)
        structured.tell_loosened(chat.handler, form)
        return replies
