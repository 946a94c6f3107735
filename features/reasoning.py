"""Reasoning: what a model thinks before it answers, apart from the answer.

What for: clients that show, hide or bound what a model writes between `<think>` and `</think>`, and
replies of a form, which begins after it. How it works: the chat template is rendered with a message
that has thought, and what stands around the thought are the model's tags (renderings.py); those
that a template only opens are known by name (thinking.py). A parser takes the reply apart as it
comes, and holds back only what may be part of a tag, or white space around one; tools has another
parser put in its place, which finds calls, too. Where the request wants no reasoning
and the template leaves it open, the prompt closes it; a budget closes it by writing the tag, token
by token. Learning takes some milliseconds when a model is loaded, reading microseconds a token. It
reads the fields `reasoning_effort`, which goes to the template with `enable_thinking`, and
`reasoning_budget`, the `reasoning_content` of messages, and the settings `split_reasoning` and
`reasoning_budget`; it sends `reasoning_content`.
"""

import dataclasses
import functools
import re
from collections import deque
from collections.abc import Callable, Generator, Iterator

import numpy as np

import engine
import server
from features.thinking import (
    Effort, Thinking, known, learn, show_control_tokens, thinking_of)

MAX_HELD = 96  # characters; the tags are shorter, and more white space than that goes on
UNBOUNDED = -1  # a reasoning_budget, as llama-server says it


@dataclasses.dataclass
class Settings:
    """Whether reasoning is told apart, and how much of it there may be."""

    split_reasoning: bool = server.setting("generation", True)
    reasoning_budget: int = server.setting("generation", UNBOUNDED, low=UNBOUNDED)


@dataclasses.dataclass
class ChatFields:
    """How much to think."""

    reasoning_effort: Effort | None = None
    reasoning_budget: int | None = server.option(low=UNBOUNDED)


@dataclasses.dataclass
class MessageFields:
    """What an assistant thought before."""

    reasoning_content: str | None = None

    def check(self, _at: str) -> None:
        """Let it stand alone."""
        if self.reasoning_content and self.content is None:
            self.content = ""


FIELDS = {"ChatBody": ChatFields, "Message": MessageFields}


# ==== 1. Replies =========================================================================


class ReplyParser:
    """Turns a reply that arrives in pieces into OpenAI deltas: reasoning, then content.

    Holds back only what may be part of a tag, or white space around one: the work for a piece does
    not depend on the text before. The generators yield where they need more text.

    >>> parser = ReplyParser()
    >>> parser.feed("<thi"), parser.feed("nk>Hm.</think> Yes"), parser.finish()
    ([], [{'reasoning_content': 'Hm.'}, {'content': 'Yes'}], [])
    """

    def __init__(self, unclosed: str = "", split_reasoning: bool = True,
                 thinking: Thinking = Thinking()):
        """unclosed: what Thinking.unclosed says of the prompt."""
        self._unclosed, self._thinking = unclosed, thinking
        self._tags = thinking.tags if split_reasoning else {}
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

    def finish_reason(self, reason: str) -> str:
        """Why it ended; `reason` is the engine's."""
        return reason

    def whole(self, message: dict) -> dict:
        """The message that the deltas make, put together."""
        return message

    def _reply(self) -> Generator:
        close = self._unclosed or self._tags.get((yield from self._choose(*self._tags)))
        if close:
            yield from self._until(close, add=functools.partial(self._say, "reasoning_content"),
                                   strip="both")
        yield from self._answer("both" if close else "end")

    def _answer(self, strip: str) -> Generator:
        """What follows the reasoning. strip: the white space that goes, as for _until."""
        yield from self._content(strip)

    def _content(self, strip: str, trigger: str = "") -> Generator:
        """Content up to a trigger ("" for none), without what the template writes around it;
        None if the reply ends before it."""
        head, tail = self._thinking.head, self._thinking.tail
        if head and (yield from self._choose(head)):
            strip = "both"
        markers = [marker for marker in (trigger, tail) if marker]
        while True:
            found = yield from self._until(
                *markers, add=functools.partial(self._say, "content"), strip=strip)
            if found is None or found == trigger:
                return found
            strip = "both"

    def _until(self, *markers: str, add: Callable[[str], None], strip: str = "") -> Generator:
        """Pass text on to `add` up to one of the markers, which is returned; None if the reply ends
        before it. strip: whether white space goes at its "end" or "both"."""
        while True:
            places = [(self._pending.find(marker), marker) for marker in markers]
            at, found = min([place for place in places if place[0] >= 0],
                            key=lambda place: (place[0], -len(place[1])), default=(0, None))
            text, rest = (self._pending[:at], self._pending[at + len(found):]) if found else \
                (self._pending, "")
            text = text.lstrip() if strip == "both" else text
            if found:
                text = text.rstrip() if strip else text
            elif markers and not (self._ended and strip):  # only prose gets back what was held
                held = _beginning(markers, bool(strip)).search(text, max(0, len(text) - MAX_HELD))
                text, rest = text[:held.start()], held.group()
            self._pending = rest
            if text:
                add(text)
                strip = strip and "end"
            if found or self._ended:
                return found
            yield

    def _choose(self, *literals: str) -> Generator:
        """Read and return one of the literals, the longest that comes, white space in front or
        not; None if none comes."""
        while True:
            text = self._pending.lstrip()
            come = [each for each in literals if text.startswith(each.lstrip())]
            longest = max(come, key=len, default=None)
            may_come = any(each.lstrip().startswith(text) and len(each) > len(longest or "")
                           for each in literals)
            if longest is not None and (self._ended or not may_come):
                self._pending = text[len(longest.lstrip()):] if longest else self._pending
                return longest
            if self._ended or not may_come or len(self._pending) > MAX_HELD:
                return None
            yield

    def _say(self, key: str, value) -> None:
        self._deltas.append({key: value})


@functools.cache
def _beginning(markers: tuple[str, ...], trim: bool) -> re.Pattern:
    """What may become a marker, at the end of a text; with the white space in front, if `trim`."""
    beginnings = {marker[:n] for marker in markers for n in range(1, len(marker))}
    prefixes = "|".join(map(re.escape, sorted(beginnings, key=len, reverse=True)))
    return re.compile((r"\s*" if trim else "") + f"(?:{prefixes})?" + r"\Z")


class ParsedReply:
    """What a chat does in other ways, whose replies are taken apart."""

    def parse(self, prompt: str) -> Callable[[], ReplyParser]:
        """What makes the parser of each choice's text. Another feature may set it anew."""
        thinking = thinking_of(self.loaded)
        return functools.partial(ReplyParser, thinking.unclosed(prompt),
                                 self.config.split_reasoning, thinking)

    def make_choices(self) -> None:
        """As Generation.make_choices."""
        super().make_choices()
        new_parser = self.parse(self.prompt)
        self.parsers = [new_parser() for _ in self.choices]

    def deltas(self, event: engine.Event) -> list[dict]:
        """As Chat.deltas: those that are certain now."""
        parser = self.parsers[event.request.index]
        return parser.feed(event.text) + (parser.finish() if event.finish_reason else [])

    def chunk(self, choice: engine.Request, part: dict, reason: str | None = None) -> dict:
        """As Generation.chunk; the parser knows why the reply has ended."""
        return super().chunk(choice, part, reason and self.parsers[choice.index].finish_reason(
            reason))

    def fold(self, chunks: Iterator[dict]) -> dict:
        """As Generation.fold."""
        reply = super().fold(chunks)
        for choice, parser in zip(reply["choices"], self.parsers):
            choice["message"] = parser.whole(choice["message"])
        return reply


# ==== 2. A budget ========================================================================


class Budget(engine.Constraint):
    """Closes reasoning that has taken its tokens by writing the close tag; `inner` holds the reply
    to a form besides. Engine thread only, after it was made."""

    def __init__(self, model: engine.Model, thinking: Thinking, n_tokens: int, unclosed: str,
                 inner: engine.Constraint | None):
        """unclosed: as for ReplyParser. n_tokens: of reasoning."""
        self._model, self._thinking, self._n_left, self._inner = model, thinking, n_tokens, inner
        self._tail = b""  # the end of the text so far: of a tag that may come
        self._close = unclosed.encode()  # the tag that ends the reasoning, once that has begun
        self._is_over = False  # the reasoning, or there is none
        self._forced: deque[int] = deque()  # tokens that must come
        if unclosed and n_tokens == 0:
            self._force()

    def take(self, token: int) -> bool:
        """As Constraint.take."""
        if self._forced and token != self._forced[0]:
            return False
        if self._inner and not self._inner.take(token):
            return False
        if self._forced:
            self._forced.popleft()
        elif not self._is_over:
            self._note(self._model.piece(token))
        return True

    def restrict(self, logits: np.ndarray) -> None:
        """As Constraint.restrict."""
        if self._forced:
            logit = logits[self._forced[0]]
            logits[:] = -np.inf
            logits[self._forced[0]] = logit
        elif self._inner:
            self._inner.restrict(logits)

    def _note(self, piece: bytes) -> None:
        """Read what was written, until the reasoning is over."""
        self._tail += piece
        if not self._close:
            text = self._tail = self._tail.lstrip()
            tags = {tag.encode(): close for tag, close in self._thinking.tags.items()}
            begun = next((tag for tag in tags if text.startswith(tag)), None)
            may_come = len(text) < MAX_HELD and any(tag.startswith(text) for tag in tags)
            self._is_over = begun is None and not may_come
            if begun is None:
                return
            self._close, self._tail = tags[begun].encode(), text[len(begun):]
        if self._close in self._tail:
            self._is_over = True
            return
        self._n_left -= 1
        # subtle: a tag in the middle of a character would break both.
        if self._n_left <= 0 and _ends_whole(self._tail):
            self._force()
        else:
            self._tail = self._tail[-max(len(self._close), MAX_CHARACTER):]

    def _force(self) -> None:
        text = self._thinking.close(self._close.decode())
        self._forced.extend(self._model.tokenize(text, False).tolist())
        self._is_over = True


MAX_CHARACTER = 4  # bytes of UTF-8


def _ends_whole(data: bytes) -> bool:
    """Whether bytes do not end inside a character."""
    for n, byte in enumerate(reversed(data[-MAX_CHARACTER:]), start=1):
        if byte & 0xC0 != 0x80:  # the first byte of one: tells how many there are
            return n == (1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
    return True


def within_budget(chat: server.Chat, constrain: Callable) -> Callable:
    """A Chat.constrain that keeps the reasoning within its budget, and the reply to another."""
    n_tokens = server.given(chat.body.reasoning_budget, chat.config.reasoning_budget)
    if n_tokens == UNBOUNDED:
        return constrain

    def bounded(prompt: str) -> Callable[[], engine.Constraint]:
        new, thinking = constrain(prompt), thinking_of(chat.loaded)
        return lambda: Budget(chat.model, thinking, n_tokens, thinking.unclosed(prompt),
                              new() if new else None)

    return bounded


# ==== 3. Plugging in =====================================================================

METHODS = {"Chat": ParsedReply}


def equip(loaded: engine.Engine, _settings) -> None:
    """Learn how the model's template makes it think, and let control tokens that are tags show in
    a reply."""
    known[loaded] = thinking = learn(loaded.model) if loaded.model.generates else Thinking()
    show_control_tokens(loaded.model, *thinking.tags, *thinking.tags.values(), thinking.head,
                        thinking.tail)


def join(wanted: server.Generation) -> None:
    """Tell the template how much to think."""
    if not isinstance(wanted, server.Chat):
        return
    thinking = thinking_of(wanted.loaded)
    if effort := wanted.body.reasoning_effort:
        said = {} if effort in thinking.refused else {"reasoning_effort": effort}
        wanted.options = {"enable_thinking": effort not in ("none", "minimal"), **said,
                          **wanted.options}
    for message in wanted.messages:
        has_both = message.get("content") and message.get("tool_calls")
        if message.get("reasoning_content") and not has_both:  # some refuse to render all three
            message[thinking.name] = message["reasoning_content"]
    wanted.render = functools.partial(_render, wanted, thinking, wanted.render)
    wanted.constrain = within_budget(wanted, wanted.constrain)


def _render(chat: server.Chat, thinking: Thinking, render: Callable[[], str]) -> str:
    """The prompt; where no reasoning is wanted, and the template leaves it open, it is closed."""
    prompt = render()
    is_off = chat.adds_prompt and chat.options.get("enable_thinking") is False
    return prompt + thinking.end(prompt) if is_off else prompt
