"""Thinking: how a model reasons, as its chat template writes it.

The template is rendered with a message that has thought, and what stands around the thought are the
model's tags (renderings.py); those that a template only opens are known by name. It takes some
milliseconds when a model is loaded. It is no feature by itself; reasoning.py is, and what must know
where an answer begins asks here, whether that is on or not.
"""

import dataclasses
import functools
import re
import typing
import weakref
from typing import Literal

import engine
from features.renderings import (
    ANSWER, LATER, THOUGHT, TOOL, Renderings, answer, common_start, segments, turn_end)

REASONING_TAGS = {  # open: close, for templates that open reasoning, and forget it in the history
    "<think>": "</think>", "[THINK]": "[/THINK]", "<seed:think>": "</seed:think>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|open|>think<|sep|>": "<|close|>think<|sep|>",  # for one that writes it in every message
}
REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")  # of it in messages, by template
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


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


# By engine; reasoning.py sets each before handlers have that engine.
known: "weakref.WeakKeyDictionary[engine.Engine, Thinking]" = weakref.WeakKeyDictionary()


def thinking_of(loaded: engine.Engine) -> Thinking:
    """How a loaded model thinks."""
    return known[loaded]


def lead_of(loaded: engine.Engine, prompt: str) -> str:
    """What must come before an answer, as the prompt has begun to think: the close tag; "" where it
    has not, or where reasoning is not told apart."""
    return known[loaded].unclosed(prompt) if loaded in known else ""


def show_control_tokens(model: engine.Model, *texts: str) -> None:
    """Let control tokens that stand in these texts show in a reply."""
    tokens = {token for text in texts if text for token in model.tokenize(text, False).tolist()}
    model.show(model.piece(token, special=True).decode("utf-8", "replace") for token in tokens)
