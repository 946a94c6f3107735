"""Tools: functions that a model may call.

What for: agents. How it works: the model's chat template decides how it is told of tools and how it
writes calls; what it writes around a call is learned when the model is loaded (forms.py). By that
form a reply is taken apart while it arrives, and a grammar is made that a call must follow, so that
its arguments always validate (grammars.py). For a template without tools the system message
describes them, and for one without calls, calls have a generic form. It costs what the grammar
costs (replies.py). It reads the fields `tools`, `tool_choice`, `parallel_tool_calls`, the
deprecated `functions` and `function_call`, and the calls and results in messages; it sends
`tool_calls`, and tells in the list of models which form they have, and why.
"""

import dataclasses
import datetime
import functools
import hashlib
import importlib.util
import json
import logging
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Literal

import engine
import server
from features import forms, structured
from features.calls import ID_LENGTH, CallForm, CallParser
from features.grammars import add_arguments, calls_of, other_than_calls
from features.reasoning import within_budget
from features.thinking import lead_of, show_control_tokens, thinking_of

log = logging.getLogger("tools")

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
    strict: bool = False  # nothing in `parameters` may be left out


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
    name: str | None = None  # of the function whose result it is
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: CalledFunction | None = None

    def check(self, at: str) -> None:
        """Refuse what role and fields together make impossible; calls may stand alone."""
        if self.tool_calls or self.function_call:
            if self.role != "assistant":
                raise server.invalid(f"{at}.tool_calls",
                                     f"{at}: a {self.role} message cannot call tools")
            self.content = server.given(self.content, "")
        for role, needed in (("tool", "tool_call_id"), ("function", "name")):
            if self.role == role and getattr(self, needed) is None:
                raise server.invalid(f"{at}.{needed}", f"{at}.{needed} is required",
                                     "missing_field")


@dataclasses.dataclass
class ChatFields:
    """Functions, and which of them to call."""

    tools: list[Tool] | None = server.option(max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None  # None: as the form of calls has it
    functions: list[Function] | None = server.option(max_length=128)
    function_call: Literal["none", "auto"] | Function | None = None

    def check(self, _at: str) -> None:
        """Refuse what fields together make impossible, before a model is loaded for it."""
        asked = structured.asked_of(self)
        if self.offer.allowed and asked and asked.kind != "schema":
            raise server.invalid(asked.field, f"{asked.field} and {self.offer.where} were sent; "
                                              "the reply can follow only one of them")

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
                     mode == "required", False if is_named else self.parallel_tool_calls, where,
                     {function.name for function in functions if function.strict})


FIELDS = {"ChatBody": ChatFields, "Message": MessageFields}


@dataclasses.dataclass
class Offer:
    """The functions that the model may call this time."""

    tools: list[dict]  # all of them, for the template
    allowed: list[str]  # names of those that may be called
    is_required: bool
    parallel: bool | None  # several calls in one reply; None: not said
    where: str  # "tools", or the deprecated "functions"
    strict: set[str]  # names of those whose arguments satisfy every word of their parameters

    def is_parallel(self, form: CallForm) -> bool:
        """Whether a reply may have several calls. Where that is not said, a call that must come in
        a form that the model was not trained on is the only one: little models repeat it."""
        return server.given(self.parallel, form.takes_calls or not self.is_required)

    def rules(self) -> Iterator[tuple[str, dict, str, bool]]:
        """Each allowed function's name and parameters, where these stand in the request, and
        whether they are strict. No parameters, as the OpenAI reference has it, are an empty list of
        them."""
        for i, tool in enumerate(self.tools):
            name, inner = tool["function"]["name"], ".function" if self.where == "tools" else ""
            if name in self.allowed:
                parameters = tool["function"].get("parameters") or {"additionalProperties": False}
                yield name, parameters, f"{self.where}[{i}]{inner}.parameters", name in self.strict


# ==== 2. Prompts: tools, calls and results as templates take them ========================

TOOLS_TEXT = ("You can call these functions, described with JSON Schema:\n\n{}\n\nTo call one, "
              "write its name and arguments in exactly this form:\n{}\nIf none helps, just answer.")


def prepare_tools(tools: list[dict] | None, form: CallForm) -> list[dict] | None:
    """The tools as a template takes them, with nothing left out; None where it takes none."""
    if not tools or not form.takes_tools:
        return None
    blank = {"name": "", "description": "", "parameters": {"type": "object", "properties": {}}}
    whole = [{"type": "function", "function": {**blank, **tool["function"]}} for tool in tools]
    for tool in whole if form.wants_words else ():
        parameters = tool["function"]["parameters"]
        properties = parameters.get("properties")  # a client's: it may be anything
        tool["function"]["parameters"] = {**parameters, "properties": {
            name: {"description": "", **schema} if isinstance(schema, dict) else schema
            for name, schema in properties.items()} if isinstance(properties, dict) else {}}
    return whole


def variables_of(tools: list[dict], form: CallForm) -> dict[str, str]:
    """What else a template must be told."""
    known = {"functions": json.dumps([tool["function"] for tool in tools], ensure_ascii=False),
             "datetime": datetime.datetime.now().strftime("%Y-%m-%d %H:%M")}
    return {name: known[name] for name in form.variables}


def prepare_messages(messages: list[dict], tools: list[dict], form: CallForm) -> list[dict]:
    """Messages with calls and results as a template takes them. Where it takes none, they become
    text, results the beginning of what the user says next; where it takes no tools, the system
    message describes them."""
    turns, was_result = [], False
    for message in in_turns(messages, form):
        turn, is_result = _prepare(message, form), message["role"] in ("tool", "function")
        if not form.takes_calls and was_result and turn["role"] == "user":
            text = server.text_of(turn["content"])
            turn["content"] = f"{turns.pop()['content']}\n\n{text}"
        turns.append(turn)
        was_result = is_result
    if tools and not form.takes_tools:
        lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        text = TOOLS_TEXT.format(lines, form.write([("NAME", "{...}")]))
        has_system = bool(turns) and turns[0]["role"] in ("system", "developer")
        turns.insert(has_system, {"role": "system", "content": text})
    return turns


def in_turns(messages: list[dict], form: CallForm) -> Iterator[dict]:
    """Messages, of which each has what a template takes in one: where that is one call, each call
    of several has a message of its own, followed by its result."""
    waiting = list(messages)
    while waiting:
        message = waiting.pop(0)
        calls = message.get("tool_calls") or []
        if calls and form.takes_calls and not form.takes_content and message.get("content"):
            yield {**message, "tool_calls": None}
            message = {**message, "content": None}
        if not form.takes_calls or form.separator or len(calls) < 2:
            yield message
            continue
        for i, call in enumerate(calls):
            yield {**message, "content": message["content"] if i == 0 else None,
                   "tool_calls": [call]}
            results = [each for each in waiting if each.get("tool_call_id") == call["id"]]
            yield from results[:1]
            waiting = [each for each in waiting if not any(each is told for told in results[:1])]


def _prepare(message: dict, form: CallForm) -> dict:
    """One message. The old function_call and role function have no ids: the name serves."""
    def new_id(call_id: str) -> str:
        fits = not form.short_ids or re.fullmatch(f"[A-Za-z0-9]{{{ID_LENGTH}}}", call_id)
        return call_id if fits else hashlib.sha256(call_id.encode()).hexdigest()[:ID_LENGTH]

    content = server.text_of(message.get("content"))
    turn = {key: value for key, value in message.items()
            if key not in ("name", "tool_calls", "tool_call_id", "function_call")}
    turn["role"] = "tool" if message["role"] == "function" else message["role"]
    old = message.get("function_call")
    calls = message.get("tool_calls") or ([{"id": old["name"], "function": old}] if old else [])
    if turn["role"] == "tool":
        turn["tool_call_id"] = new_id(message.get("tool_call_id") or message.get("name") or "")
        if not form.takes_calls:
            turn = {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    elif calls and form.takes_calls:
        turn["tool_calls"] = [{"id": new_id(call["id"]), "type": "function", "function": {
            **call["function"], "arguments": read_arguments(call["function"]["arguments"], form)}}
            for call in calls]
        if not form.takes_content:
            del turn["content"]
    elif calls:
        texts = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
        turn["content"] = f"{content}\n{form.write(texts)}".lstrip("\n")
    return turn


def read_arguments(text: str, form: CallForm) -> dict | str:
    """Arguments as templates take them: an object, by Hugging Face's convention, or text. What is
    no JSON object (a call was cut off, or a model made a mistake) is shown inside one."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = text
    value = value if isinstance(value, dict) else {"arguments": text}
    return json.dumps(value, ensure_ascii=False) if form.takes_text else value


# ==== 3. Plugging in =====================================================================

_forms: "weakref.WeakKeyDictionary[engine.Engine, CallForm]" = weakref.WeakKeyDictionary()


def equip(loaded: engine.Engine, _settings) -> None:
    """Learn how the model's template makes it write calls."""
    model = loaded.model
    form, why = forms.learn(model, thinking_of(loaded))
    _forms[loaded] = form
    show_control_tokens(model, *form.literals)
    has_library = importlib.util.find_spec("llguidance") is not None
    why = why if has_library else "the llguidance library is not installed"
    how = "none" if not (model.generates and has_library) else \
        "native" if form.takes_calls else "generic"
    loaded.facts |= {"tool_calls": how, "tool_calls_why": why}
    if model.generates:
        loaded.capabilities.append("tools")
    if why in (forms.UNKNOWN, forms.MISREAD, forms.TOO_SLOW):
        log.warning("%s: tool calls have the generic form: %s", model.name, why)


def join(wanted: "server.Generation") -> None:
    """Tell the model of its tools, and find its calls."""
    if not isinstance(wanted, server.Chat):
        return
    offer, form = wanted.body.offer, _forms[wanted.loaded]
    wanted.messages = prepare_messages(wanted.messages, offer.tools, form)
    wanted.options["tools"] = prepare_tools(offer.tools, form)
    wanted.options |= variables_of(offer.tools, form)
    if not offer.allowed:
        return
    asked = structured.asked_of(wanted.body)
    wanted.constrained_by = asked.field if asked else offer.where
    wanted.constrain = within_budget(wanted, functools.partial(constrain, wanted, offer, form))
    thinking = thinking_of(wanted.loaded)
    wanted.parse = lambda prompt: functools.partial(
        CallParser, form, offer.tools, offer.where == "functions", thinking.unclosed(prompt),
        wanted.config.split_reasoning, thinking)


def constrain(chat: "server.Chat", offer: Offer, form: CallForm, prompt: str
              ) -> Callable[[], engine.Constraint]:
    """What makes the Constraint of each choice: a call, or what else the reply may be. Raises
    ApiError."""
    reply, after = structured.Form(), tuple(filter(None, [lead_of(chat.loaded, prompt)]))
    thinking, parallel = thinking_of(chat.loaded), offer.is_parallel(form)
    with structured.schema_errors():
        asked = structured.asked_of(chat.body)
        ways = [structured.add_asked(reply, asked)] if asked else []
        functions = [(name, add_arguments(reply, form, parameters, at, is_strict))
                     for name, parameters, at, is_strict in offer.rules()]
        if not ways and not offer.is_required and not form.at_start:
            reply.triggers = (*after, form.trigger)
            reply.root = calls_of(form, functions, parallel, True)
        else:
            reply.triggers = after
            calls = [calls_of(form, functions, parallel, False)]
            if not offer.is_required:
                calls += [calls_of(each, functions, False, False) for each in form.variants]
                calls += ways or [other_than_calls(form, thinking.head)]
            reply.root = structured.AFTER_REASONING * bool(after) + f"({' | '.join(calls)})"
            if thinking.opening and not (after or ways or offer.is_required):
                thought = reply.add_text_until(thinking.closing.strip())
                opening = structured.literal(thinking.opening.rstrip())
                reply.root = f"({opening} {thought} {structured.AFTER_REASONING})? {reply.root}"
        replies = reply.replies(chat.loaded.model, offer.is_required or asked is not None)
        structured.tell_loosened(chat.handler, reply)
        return replies
