"""Blocks: what conversations in the Anthropic API are made of.

A message holds blocks: texts, images, documents, thinking, calls of tools and their results. Each
kind is a dataclass, by https://docs.anthropic.com/en/api/messages; `read_turns` makes of them a
conversation as a chat has it, `read_tools` of tools the functions that a chat may call. Kinds that
are not known here belong to tools that Anthropic's servers run: they are left out, and named in
`x-ignored-fields`. A line that Claude Code puts in front of its system prompt changes with every
request, so it is left out, too: nothing behind it would be found in a cache. It is no feature by
itself; messages.py is.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import server
from features.protocols import Place, Said, Turns, read_kind

BILLING = re.compile(r"\Ax-anthropic-billing-header:(?:\s*\w+=[^;\s]*;)*\s*")


@dataclasses.dataclass
class Source:
    """Where an image or a document is."""

    type: Literal["base64", "url", "text"]
    media_type: str = ""
    data: str = ""
    url: str = ""


@dataclasses.dataclass
class Block:
    """What all kinds of blocks have."""

    type: str
    cache_control: Any = server.option(no_effect=True)  # every prefix is cached


@dataclasses.dataclass
class TextBlock(Block):
    """A text."""

    text: str = dataclasses.field(kw_only=True)
    citations: Any = server.option(no_effect=True)

    def said(self, at: str) -> Iterator[Said]:
        """It as parts of a chat's message."""
        yield Said.text(self.text, at)


@dataclasses.dataclass
class ImageBlock(Block):
    """An image."""

    source: Source = dataclasses.field(kw_only=True)

    def said(self, at: str) -> Iterator[Said]:
        """As TextBlock.said."""
        source = self.source
        if source.type == "text":
            raise server.invalid(f"{at}.source.type", f"{at}.source.type: an image is 'base64' or "
                                                      "'url', not 'text'")
        yield Said.image(source.url if source.type == "url" else
                         f"data:{source.media_type};base64,{source.data}", at)


@dataclasses.dataclass
class DocumentBlock(Block):
    """A document; only texts can be read here."""

    source: Source = dataclasses.field(kw_only=True)
    title: str | None = None
    context: str | None = None
    citations: Any = server.option(no_effect=True)

    def said(self, at: str) -> Iterator[Said]:
        """As TextBlock.said."""
        if self.source.type != "text":
            raise server.invalid(f"{at}.source.type", f"{at}.source.type: a document must be "
                                 f"'text', got {server.describe(self.source.type)}; send its text")
        yield Said.text("\n".join(filter(None, (self.title, self.context, self.source.data))), at)


@dataclasses.dataclass
class ThinkingBlock(Block):
    """What the assistant thought."""

    thinking: str = dataclasses.field(kw_only=True)
    signature: str | None = server.option(no_effect=True)


@dataclasses.dataclass
class ToolUseBlock(Block):
    """A call of the assistant's."""

    id: str = dataclasses.field(kw_only=True)
    name: str = dataclasses.field(kw_only=True)
    input: dict[str, Any] = dataclasses.field(kw_only=True)
    caller: Any = server.option(no_effect=True)


@dataclasses.dataclass
class ToolResultBlock(Block):
    """What a call gave."""

    tool_use_id: str = dataclasses.field(kw_only=True)
    content: str | list[dict[str, Any]] | None = None
    is_error: bool = server.option(False, no_effect=True)  # the content says it


SHOWN = {"text": TextBlock, "image": ImageBlock, "document": DocumentBlock}
BLOCKS = {**SHOWN, "thinking": ThinkingBlock, "tool_use": ToolUseBlock,
          "tool_result": ToolResultBlock}


@dataclasses.dataclass
class Turn:
    """One message; its blocks are read by their kinds."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


@dataclasses.dataclass
class CustomTool:
    """A function that the model may call; `input_schema` is a JSON Schema."""

    name: str
    input_schema: dict[str, Any]
    type: str = "custom"
    description: str | None = None
    cache_control: Any = server.option(no_effect=True)
    strict: bool = False
    input_examples: Any = server.option(no_effect=True)
    eager_input_streaming: bool = server.option(False, no_effect=True)
    defer_loading: bool = server.option(False, no_effect=True)
    allowed_callers: Any = server.option(no_effect=True)


def read_blocks(content: str | list[dict] | None, at: str, kinds: dict[str, type],
                reading: server.Reading) -> Iterator[tuple[Block, str]]:
    """The blocks of a content, and where they are. Raises ApiError."""
    if isinstance(content, str):
        yield TextBlock("text", text=content), at
        return
    for i, sent in enumerate(content or ()):
        if block := read_kind(kinds, sent, f"{at}[{i}]", reading):
            yield block, f"{at}[{i}]"


def read_turns(system: str | list[dict] | None, messages: list[Turn], reading: server.Reading
               ) -> Turns:
    """The conversation. Raises ApiError."""
    turns = Turns()
    said = [Said.text(text, at) for block, at in read_blocks(
        system, "system", {"text": TextBlock}, reading)
        if (text := BILLING.sub("", block.text))]
    if said:
        turns.say("system", said, "system")
    for i, turn in enumerate(messages):
        said = []
        for block, at in read_blocks(turn.content, f"messages[{i}].content", BLOCKS, reading):
            whose = {"thinking": "assistant", "tool_use": "assistant",
                     "tool_result": "user"}.get(block.type, turn.role)
            if turn.role != whose:
                raise server.invalid(f"{at}.type", f"{at}.type: {block.type} belongs in a message "
                                                   f"of the {whose}'s, not of the {turn.role}'s")
            if block.type in SHOWN:
                said += block.said(at)
            elif block.type == "thinking":
                turns.think(block.thinking, at)
            elif block.type == "tool_use":
                turns.call(block.id, block.name, json.dumps(block.input, ensure_ascii=False), at)
            else:
                turns.result(block.tool_use_id, [each for inner, place in read_blocks(
                    block.content, f"{at}.content", SHOWN, reading)
                    for each in inner.said(place)], at)
        if said:
            turns.say(turn.role, said, f"messages[{i}]")
    return turns.end()


def read_tools(sent_tools: list[dict] | None, reading: server.Reading
               ) -> tuple[list[dict], list[Place]]:
    """The functions that the model may call, and where they are. Raises ApiError."""
    tools, places = [], []
    for i, sent in enumerate(sent_tools or ()):
        if tool := read_kind({"custom": CustomTool}, sent, f"tools[{i}]", reading, "custom"):
            at = f"tools[{len(tools)}]"
            places += [(f"{at}.function.parameters", f"tools[{i}].input_schema"),
                       (f"{at}.function", f"tools[{i}]"), (at, f"tools[{i}]")]
            tools.append({"type": "function", "function": {
                "name": tool.name, "description": tool.description,
                "parameters": tool.input_schema, "strict": tool.strict}})
    return tools, places
