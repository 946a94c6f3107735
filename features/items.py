"""Items: what conversations in OpenAI's Responses API are made of.

A conversation is a list of items: messages, calls of functions and their results, reasoning, and
references to items that are kept. Each kind is a dataclass, by
https://platform.openai.com/docs/api-reference/responses; `read_turns` makes of them a conversation
as a chat has it, `Tools` of tools the functions that a chat may call. Kinds that are not known here
belong to tools that OpenAI's servers or the client's model run: they are left out, and named in
`x-ignored-fields`. It is no feature by itself; responses.py is.
"""

import dataclasses
import secrets
from collections.abc import Callable, Iterator
from typing import Any, Literal

import server
from features.protocols import Place, Said, Turns, read_kind

Status = Literal["in_progress", "completed", "incomplete"]


# ==== 1. Items ===========================================================================


@dataclasses.dataclass
class ItemPart:
    """One part of a content."""

    type: Literal["input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text",
                  "input_image"]
    text: str = ""
    refusal: str = ""
    image_url: str | None = None
    detail: str | None = server.option(no_effect=True)
    annotations: Any = server.option(no_effect=True)
    logprobs: Any = server.option(no_effect=True)
    prompt_cache_breakpoint: Any = server.option(no_effect=True)  # every prefix is cached

    def check(self, at: str) -> None:
        """Refuse an image that is not there."""
        if self.type == "input_image" and not self.image_url:
            raise server.invalid(f"{at}.image_url", f"{at}.image_url is required: images are read "
                                 "from URLs, such as data:image/png;base64,...", "missing_field")

    def said(self, at: str) -> Said:
        """It as a part of a chat's message."""
        if self.type == "refusal":
            return Said({"type": "refusal", "refusal": self.refusal}, at)
        return Said.image(self.image_url, at) if self.image_url else Said.text(self.text, at)


def said_in(content: str | list[ItemPart] | None, at: str) -> list[Said]:
    """What a content says."""
    if isinstance(content, str):
        return [Said.text(content, at)]
    return [part.said(f"{at}[{i}]") for i, part in enumerate(content or ())]


@dataclasses.dataclass
class Item:
    """What all kinds of items have."""

    type: str
    id: str | None = None
    status: Status | None = server.option(no_effect=True)


@dataclasses.dataclass
class MessageItem(Item):
    """What somebody said."""

    role: Literal["user", "assistant", "system", "developer"] = dataclasses.field(kw_only=True)
    content: str | list[ItemPart] = dataclasses.field(kw_only=True)
    phase: str | None = server.option(no_effect=True)

    def tell(self, turns: Turns, at: str, tools: "Tools") -> None:
        """Add it to a conversation."""
        turns.say(self.role, said_in(self.content, f"{at}.content"), at)


@dataclasses.dataclass
class CallItem(Item):
    """A call of the assistant's."""

    call_id: str = dataclasses.field(kw_only=True)
    name: str = dataclasses.field(kw_only=True)
    arguments: str = dataclasses.field(kw_only=True)
    namespace: str | None = None
    caller: Any = server.option(no_effect=True)

    def tell(self, turns: Turns, at: str, tools: "Tools") -> None:
        """As MessageItem.tell."""
        turns.call(self.call_id, tools.name_of(self.namespace, self.name), self.arguments, at)


@dataclasses.dataclass
class CallOutputItem(Item):
    """What a call gave."""

    call_id: str = dataclasses.field(kw_only=True)
    output: str | list[ItemPart] = dataclasses.field(kw_only=True)
    name: str | None = server.option(no_effect=True)
    namespace: str | None = server.option(no_effect=True)
    caller: Any = server.option(no_effect=True)

    def tell(self, turns: Turns, at: str, tools: "Tools") -> None:
        """As MessageItem.tell."""
        turns.result(self.call_id, said_in(self.output, f"{at}.output"), at)


@dataclasses.dataclass
class ReasoningItem(Item):
    """What the assistant thought, or a summary of it."""

    summary: list[ItemPart] | None = None
    content: list[ItemPart] | None = None
    encrypted_content: str | None = server.option(no_effect=True)

    def tell(self, turns: Turns, at: str, tools: "Tools") -> None:
        """As MessageItem.tell."""
        if text := "\n".join(part.text for part in self.content or self.summary or ()):
            turns.think(text, at)


ITEMS = {"message": MessageItem, "function_call": CallItem, "function_call_output": CallOutputItem,
         "reasoning": ReasoningItem}
REFERENCE = "item_reference"
PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco",
            "reasoning": "rs"}


def new_id(kind: str) -> str:
    """An id for an item of a kind, or with another prefix."""
    return f"{PREFIXES.get(kind, kind)}_{secrets.token_hex(16)}"


def kind_of(item: dict):
    """The type of an item, which may be left out of messages and references."""
    kind = item.get("type")
    return kind if kind is not None else "message" if "role" in item else REFERENCE


def listed(sent: str | list[dict], find: Callable[[Any, str], dict]) -> list[tuple[dict, str]]:
    """The items of an input, each with a type and an id, as they are kept, and their places. find:
    gives what a reference means, by id and place. Raises ApiError."""
    if isinstance(sent, str):
        return [({"type": "message", "id": new_id("message"), "role": "user",
                  "content": [{"type": "input_text", "text": sent}]}, "input")]
    items: list[tuple[dict, str]] = []
    seen: set[str] = set()
    for i, item in enumerate(sent):
        at, kind = f"input[{i}]", kind_of(item)
        if not isinstance(kind, str):
            raise server.invalid(f"{at}.type", f"{at}.type: expected a string, got "
                                 f"{server.describe(kind)}", "invalid_type")
        if kind != REFERENCE:
            item = {"id": new_id(kind), "type": kind, **{
                name: value for name, value in item.items() if value is not None}}
            if not isinstance(item["id"], str) or item["id"] in seen:  # a list goes on behind an id
                item["id"] = new_id(kind)
            seen.add(item["id"])
        items.append((find(item.get("id"), at) if kind == REFERENCE else item, at))
    return items


# ==== 2. Tools ===========================================================================


@dataclasses.dataclass
class FunctionTool:
    """A function that the model may call; `parameters` is a JSON Schema."""

    type: str
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: bool | None = server.option(no_effect=True)
    allowed_callers: Any = server.option(no_effect=True)
    output_schema: Any = server.option(no_effect=True)


@dataclasses.dataclass
class NamespaceTool:
    """Functions under a name of their own."""

    type: str
    name: str
    tools: list[dict[str, Any]]
    description: str | None = None


class Tools:
    """The functions that the model may call. Those of a namespace have that name before theirs
    where another one has the same."""

    def __init__(self, sent: list[dict] | None, reading: server.Reading):
        """Raises ApiError."""
        self.chat: list[dict] = []  # as a chat has them
        self.places: list[Place] = []
        self.namespaces: dict[str, tuple[str, str]] = {}  # by the name in the chat, and its own
        found = [*self._read(sent, reading)]
        taken = [tool.name for _, tool, _ in found]
        for namespace, tool, at in found:
            name = tool.name
            if namespace and taken.count(name) > 1:
                name = f"{namespace}__{name}"
            if namespace:
                self.namespaces[name] = namespace, tool.name
            ours = f"tools[{len(self.chat)}]"
            self.places += [(f"{ours}.function", at), (ours, at)]
            self.chat.append({"type": "function", "function": {
                "name": name, "description": tool.description, "parameters": tool.parameters,
                "strict": bool(tool.strict)}})

    def _read(self, sent: list[dict] | None, reading: server.Reading
              ) -> Iterator[tuple[str | None, FunctionTool, str]]:
        kinds = {"function": FunctionTool, "namespace": NamespaceTool}
        for i, each in enumerate(sent or ()):
            tool = read_kind(kinds, each, f"tools[{i}]", reading)
            if isinstance(tool, FunctionTool):
                yield None, tool, f"tools[{i}]"
            for j, inner in enumerate(getattr(tool, "tools", ())):
                at = f"tools[{i}].tools[{j}]"
                if function := read_kind({"function": FunctionTool}, inner, at, reading):
                    yield tool.name, function, at

    def name_of(self, namespace: str | None, name: str) -> str:
        """The name in the chat of a function."""
        return next((ours for ours, theirs in self.namespaces.items()
                     if theirs == (namespace, name)), name)


def read_turns(instructions: str | None, items: list[tuple[dict, str]], tools: Tools,
               reading: server.Reading) -> Turns:
    """The conversation of items, which stand beside their places. Raises ApiError."""
    turns = Turns()
    if instructions:
        turns.say("system", [Said.text(instructions, "instructions")], "instructions")
    for sent, at in items:
        if item := read_kind(ITEMS, sent, at, reading):
            item.tell(turns, at, tools)
    return turns.end()
