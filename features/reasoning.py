"""Reasoning: what a model thinks before it answers, apart from the answer.

What for: clients that show or hide what a model writes between `<think>` and `</think>`, and
replies of a form, which begins after it. How it works: the tags are known by name; a parser takes
the reply apart as it comes, and holds back only what may be part of a tag, or white space around
one. It costs microseconds a token. It reads the field `reasoning_effort`, which goes to the
template with `enable_thinking`, the `reasoning_content` of messages, and the setting
`split_reasoning`; it sends `reasoning_content`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Generator
from typing import Literal

import server

REASONING_TAGS = {  # open: close
    "<think>": "</think>", "[THINK]": "[/THINK]", "<seed:think>": "</seed:think>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|channel|>analysis<|message|>": "<|end|><|start|>assistant<|channel|>final<|message|>",
    "<|channel|>final<|message|>": "",  # gpt-oss without reasoning: only the tag goes
}
MAX_HELD = 96  # characters; the tags are shorter, and more white space than that goes on


@dataclasses.dataclass
class Settings:
    """Whether reasoning is told apart."""

    split_reasoning: bool = server.setting("generation", True)


@dataclasses.dataclass
class ChatFields:
    """How much to think."""

    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


@dataclasses.dataclass
class MessageFields:
    """What an assistant thought before."""

    reasoning_content: str | None = None

    def is_empty(self) -> bool:
        """As Message.is_empty."""
        return super().is_empty() and not self.reasoning_content


FIELDS = {"ChatBody": ChatFields, "Message": MessageFields}


def unclosed_reasoning(prompt: str) -> str:
    """The close tag of the reasoning that the last words of a prompt open, else ""."""
    return next((close for tag, close in REASONING_TAGS.items()
                 if prompt.rstrip().endswith(tag)), "")


class ReplyParser(server.TextParser):
    """Turns a reply that arrives in pieces into OpenAI deltas: reasoning, then content.

    Holds back only what may be part of a tag, or white space around one: the work for a piece does
    not depend on the text before. The generators yield where they need more text.

    >>> parser = ReplyParser()
    >>> parser.feed("<thi"), parser.feed("nk>Hm.</think> Yes"), parser.finish()
    ([], [{'reasoning_content': 'Hm.'}, {'content': 'Yes'}], [])
    """

    def __init__(self, unclosed: str = "", split_reasoning: bool = True):
        """unclosed: what unclosed_reasoning says of the prompt."""
        self._unclosed, self._tags = unclosed, REASONING_TAGS if split_reasoning else {}
        self._pending, self._ended = "", False  # text not read yet; whether that is all
        self._deltas: list[dict] = []
        self._story = self._reply()

    def feed(self, text: str) -> list[dict]:
        """Take the next piece of the reply; return the deltas that are certain now."""
        self._pending += text
        next(self._story, None)
        deltas, self._deltas = self._deltas, []
        return deltas

    def finish(self) -> list[dict]:
        """The reply has ended: return what was held back."""
        self._ended = True
        return self.feed("")

    def _reply(self) -> Generator:
        close = self._unclosed or self._tags.get((yield from self._choose(*self._tags)))
        if close:
            yield from self._until(close, functools.partial(self._say, "reasoning_content"), "both")
        yield from self._answer("both" if close else "end")

    def _answer(self, strip: str) -> Generator:
        """What follows the reasoning. strip: the white space that goes, as for _until."""
        yield from self._until("", functools.partial(self._say, "content"), strip)

    def _until(self, marker: str, add: Callable[[str], None] | None = None,
               strip: str = "") -> Generator:
        """Pass text on to `add` up to a marker ("" for none); None if the reply ends before it.
        Without `add`, return the text. strip: whether white space goes at its "end" or "both"."""
        parts: list[str] = []
        while True:
            text, found, rest = (self._pending.partition(marker) if marker
                                 else (self._pending, "", ""))
            text = text.lstrip() if strip == "both" else text
            if found:
                text = text.rstrip() if strip else text
            elif marker and not (self._ended and strip):  # only prose gets back what was held
                held = _beginning(marker, bool(strip)).search(text, max(0, len(text) - MAX_HELD))
                text, rest = text[:held.start()], held.group()
            self._pending = rest
            if text:
                (add or parts.append)(text)
                strip = strip and "end"
            if found or self._ended:
                return "".join(parts) if found else None
            yield

    def _choose(self, *literals: str) -> Generator:
        """Read and return one of the literals, white space in front or not; None if none comes."""
        while True:
            text = self._pending.lstrip()
            for literal in literals:
                if text.startswith(literal.lstrip()):
                    self._pending = text[len(literal.lstrip()):]
                    return literal
            may_come = any(literal.lstrip().startswith(text) for literal in literals)
            if self._ended or not may_come or len(self._pending) > MAX_HELD:
                return None
            yield

    def _say(self, key: str, value) -> None:
        self._deltas.append({key: value})


@functools.cache
def _beginning(marker: str, trim: bool) -> re.Pattern:
    """What may become a marker, at the end of a text; with the white space in front, if `trim`."""
    prefixes = "|".join(re.escape(marker[:n]) for n in range(len(marker) - 1, 0, -1))
    return re.compile((r"\s*" if trim else "") + f"(?:{prefixes})?" + r"\Z")


def equip(loaded, _settings) -> None:
    """Let control tokens that are tags show in a reply."""
    loaded.model.show([*REASONING_TAGS, *REASONING_TAGS.values()])


def join(wanted: "server.Generation") -> None:
    """Tell the template how much to think, and take the reply apart."""
    if not isinstance(wanted, server.Chat):
        return
    if effort := wanted.body.reasoning_effort:
        wanted.options = {"enable_thinking": effort not in ("none", "minimal"),
                          "reasoning_effort": effort, **wanted.options}
    wanted.lead = unclosed_reasoning
    wanted.parse = lambda prompt: functools.partial(
        ReplyParser, unclosed_reasoning(prompt), wanted.config.split_reasoning)
