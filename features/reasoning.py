"""Reasoning: what a model thinks before it answers, apart from the answer.

What for: clients that show, hide or bound what a model writes between `<think>` and `</think>`, and
replies of a form, which begins after it. How it works: the chat template is rendered with a message
that has thought, and what stands around the thought are the model's tags (renderings.py); those
that a template only opens are known by name. A parser takes the reply apart as it comes, and holds
back only what may be part of a tag, or white space around one. Where the request wants no reasoning
and the template leaves it open, the prompt closes it; a budget closes it by writing the tag, token
by token. Learning takes some milliseconds when a model is loaded, reading microseconds a token. It
reads the fields `reasoning_effort`, which goes to the template with `enable_thinking`, and
`reasoning_budget`, the `reasoning_content` of messages, and the settings `split_reasoning` and
`reasoning_budget`; it sends `reasoning_content`.
"""

import dataclasses
import functools
import re
import typing
import weakref
from collections import deque
from collections.abc import Callable, Generator
from typing import Literal

import numpy as np

import engine
import server
from features.renderings import (
    ANSWER, LATER, THOUGHT, TOOL, Renderings, answer, common_start, segments, turn_end)

REASONING_TAGS = {  # open: close, for templates that open reasoning, and forget it in the history
    "<think>": "</think>", "[THINK]": "[/THINK]", "<seed:think>": "</seed:think>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|open|>think<|sep|>": "<|close|>think<|sep|>",  # for one that writes it in every message
}
REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")  # of it in messages, by template
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
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

    def is_empty(self) -> bool:
        """As Message.is_empty."""
        return super().is_empty() and not self.reasoning_content


FIELDS = {"ChatBody": ChatFields, "Message": MessageFields}


# ==== 1. What the template does ==========================================================


@dataclasses.dataclass(frozen=True)
class Thinking:
    """How a model thinks and answers, as its template writes it."""

    opening: str = ""  # the tags with the white space around them; "" where none were learned
    closing: str = ""
    head: str = ""  # what stands before every answer, ...
    tail: str = ""  # ... and behind it
    name: str = "reasoning_content"  # of the reasoning in a message
    is_free: bool = False  # no option tells the model whether to think
    refused: frozenset[str] = frozenset()  # values of reasoning_effort

    @functools.cached_property
    def tags(self) -> dict[str, str]:
        """Each open tag and its close tag."""
        learned = {self.opening.strip(): self.closing.strip()} if self.opening else {}
        return {**learned, **REASONING_TAGS}

    def unclosed(self, prompt: str) -> str:
        """The close tag of the reasoning that the last words of a prompt open, else ""."""
        return next((close for tag, close in self.tags.items()
                     if prompt.rstrip().endswith(tag)), "")

    def close(self, tag: str) -> str:
        """How the template would write a close tag."""
        return self.closing if tag == self.closing.strip() else f"\n{tag}\n\n"

    def end(self, prompt: str) -> str:
        """What closes the reasoning that a prompt opens, or keeps the model from opening it."""
        if tag := self.unclosed(prompt):
            return self.close(tag)
        return self.opening + self.closing if self.is_free else ""


def learn(model: engine.Model) -> Thinking:
    """What a model's template writes around thoughts and answers, and what its options change."""
    render = Renderings(model)
    prompts = [render(prompt=True, **options) for options in (
        {}, {"enable_thinking": True}, {"enable_thinking": False})]
    told, calls = render(answer()), {"tools": [TOOL]}
    call = {"id": "callcall1", "type": "function",
            "function": {"name": "called", "arguments": {"part": "text"}}}
    if prompts[0] is None or not told or ANSWER not in told:
        return Thinking()
    name, told_thought, call_thought = "reasoning_content", "", ""
    for name in REASONING_NAMES:
        thought = {name: THOUGHT}
        told_thought = render(answer(**thought)) or ""
        call_thought = render(answer(content="", tool_calls=[call], **thought), **calls) or ""
        if THOUGHT in told_thought + call_thought:
            break
    else:
        name = "reasoning_content"
    opening, closing = _tags(render, prompts, told_thought, call_thought)
    closes = {closing.strip(), *REASONING_TAGS.values()} - {""}
    head = _head(told, prompts[0], closes, {opening.strip(), *REASONING_TAGS})
    between = told_thought.partition(THOUGHT)[2].partition(ANSWER)[0]
    closing = between.removesuffix(head) if head and closing.startswith(between[:-len(head)]) \
        and between.endswith(head) else closing
    after, tail = told.partition(ANSWER)[2], ""
    called = render(answer(content="", tool_calls=[call]), **calls) if head else None
    if called:
        tail = after[:len(after) - len(turn_end([after, called], render.turn_end))]
    closed = any(prompts[0].rstrip().endswith(tag) for tag in closes)
    opened = any(prompts[0].rstrip().endswith(tag) for tag in REASONING_TAGS)
    is_free = bool(opening) and len(set(prompts)) == 1 and not (closed or opened)
    efforts = typing.get_args(Effort) if "reasoning_effort" in model.template_source else ()
    return Thinking(opening, closing, head, tail, name, is_free, frozenset(
        effort for effort in efforts if render(prompt=True, reasoning_effort=effort) is None))


def _head(told: str, prompt: str, closes: set[str], opens: set[str]) -> str:
    """What stands before every answer, behind the prompt and any reasoning. told: an answer as the
    template writes it."""
    before = told.partition(ANSWER)[0]
    shared = common_start([before, prompt])
    shared = prompt if before.startswith(prompt) else shared
    head, begun = before[len(shared):], prompt[len(shared):]
    for tag in closes | opens - {""}:
        head, begun = head.rpartition(tag)[2], begun.replace(tag, "")
    return head if head.strip() and not begun.strip() else ""


def _tags(render: Renderings, prompts: list[str | None], told: str, call: str) -> tuple[str, str]:
    """What stands before a thought and behind it; told, call: a message with a thought and an
    answer, or a call, as the template writes them."""
    before = (told if THOUGHT in told else call).partition(THOUGHT)[0]
    ends = [told.partition(THOUGHT)[2].partition(ANSWER)[0]] * (THOUGHT in told)
    rest = [call.partition(THOUGHT)[2]] * (THOUGHT in call)
    closing = common_start(ends + rest) if ends else "".join(rest)
    if not ends:  # up to the end of the first tag: the call comes behind
        parts = segments(closing)
        tag = next((i for i, part in enumerate(parts) if len(part) > 1), -1)
        closing = "".join(parts[:tag + 1])
    if not closing.strip():
        return "", ""
    for tag in REASONING_TAGS:
        if before.rstrip().endswith(tag):
            close = REASONING_TAGS[tag]
            text, found, rest = closing.partition(close)
            space = rest[:len(rest) - len(rest.lstrip())]
            return before[before.rindex(tag):], text + found + space if found else closing
    shorter = [len(prompt) for prompt in prompts if prompt and before.startswith(prompt)]
    opening = before[min(shorter):] if shorter else ""
    if not opening.strip():  # the prompt has opened it, or an answer before the last has none
        longer = [each[len(before):] for each in prompts if each and each.startswith(before)]
        past = render(answer(), {"role": "user", "content": LATER}) or ""
        forgotten = past.partition(ANSWER)[0]
        named = re.search(r"<([^<>/]+)>\s*\Z", before)
        opening = next((text for text in (
            named[0] if named and f"</{named[1]}>" in closing else "",
            before[len(common_start([before, forgotten])):], *longer) if text.strip()), "")
    return (opening, closing) if opening.strip() else ("", "")


_thinking: "weakref.WeakKeyDictionary[engine.Engine, Thinking]" = weakref.WeakKeyDictionary()


def thinking_of(loaded: engine.Engine) -> Thinking:
    """How a loaded model thinks."""
    return _thinking[loaded]


def show_control_tokens(model: engine.Model, *texts: str) -> None:
    """Let control tokens that stand in these texts show in a reply."""
    tokens = {token for text in texts if text for token in model.tokenize(text, False).tolist()}
    model.show(model.piece(token, special=True).decode("utf-8", "replace") for token in tokens)


# ==== 2. Replies =========================================================================


class ReplyParser(server.TextParser):
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


# ==== 3. A budget ========================================================================


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


def within_budget(chat: "server.Chat", constrain: Callable) -> Callable:
    """A Chat.constrain that keeps the reasoning within its budget, and the reply to another."""
    n_tokens = server.given(chat.body.reasoning_budget, chat.config.reasoning_budget)
    if n_tokens == UNBOUNDED:
        return constrain

    def bounded(prompt: str) -> Callable[[], engine.Constraint]:
        new, thinking = constrain(prompt), thinking_of(chat.loaded)
        return lambda: Budget(chat.model, thinking, n_tokens, thinking.unclosed(prompt),
                              new() if new else None)

    return bounded


# ==== 4. Plugging in =====================================================================


def equip(loaded: engine.Engine, _settings) -> None:
    """Learn how the model's template makes it think, and let control tokens that are tags show in
    a reply."""
    _thinking[loaded] = thinking = learn(loaded.model) if loaded.model.generates else Thinking()
    show_control_tokens(loaded.model, *thinking.tags, *thinking.tags.values(), thinking.head,
                        thinking.tail)


def join(wanted: "server.Generation") -> None:
    """Tell the template how much to think, and take the reply apart."""
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
    wanted.lead = thinking.unclosed
    wanted.constrain = within_budget(wanted, wanted.constrain)
    wanted.parse = lambda prompt: functools.partial(
        ReplyParser, thinking.unclosed(prompt), wanted.config.split_reasoning, thinking)


def _render(chat: "server.Chat", thinking: Thinking, render: Callable[[], str]) -> str:
    """The prompt; where no reasoning is wanted, and the template leaves it open, it is closed."""
    prompt = render()
    is_off = chat.adds_prompt and chat.options.get("enable_thinking") is False
    return prompt + thinking.end(prompt) if is_off else prompt
