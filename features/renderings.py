"""Renderings: what a chat template writes around words that nothing else contains.

A template is a program, and the only one that knows how its model was trained to think, to answer
and to call. What it does is learned as from any program, by trying: conversations whose question,
answer, thought, functions and arguments are unmistakable words are rendered, and what stands around
the words is compared. forms.py learns calls in this way, reasoning.py the tags of reasoning. It is
no feature by itself. A rendering takes about a millisecond; the same one is made once.
"""

import functools
import json
import re
import time
from collections.abc import Iterable

import engine

QUESTION, ANSWER, THOUGHT, LATER = "QUESTIONQ", "ANSWERA", "THOUGHTT", "LATERQ"
TOOL = {"type": "function", "function": {  # another name than those of calls: it stands elsewhere
    "name": "offered", "description": "Offered.", "parameters": {
        "type": "object", "required": ["part"],
        "properties": {"part": {"type": "string", "description": "A part."}}}}}
# Tags are not cut through when two texts are compared; other text is compared by characters.
SEGMENT = re.compile(r"""</?[][\w:|｜▁=."/\ue000-\ue003-]+(?:[ ][^<>]*)?> # \ue000: calls.py
                     |\[/?[A-Z_]+\]|.""", re.DOTALL | re.VERBOSE)
MAX_SECONDS = 2.0  # of the processor, for all that one of these renders; the largest take 0.2


class Renderings:
    """What one model's template makes of conversations, from behind the question on."""

    def __init__(self, model: engine.Model):
        self.model, self._seconds = model, 0.0  # that they have taken
        self._made: dict[str, str | None] = {}

    def whole(self, *turns: dict, prompt: bool = False, **options) -> str | None:
        """A question, then `turns`, as a text; None where the template refuses. prompt: with the
        beginning of a reply."""
        key = json.dumps([turns, prompt, options])
        if key not in self._made and self.is_slow:
            return None
        if key not in self._made:
            began = time.thread_time()
            messages = [{"role": "user", "content": QUESTION}, *turns]
            try:
                self._made[key] = self.model.render_chat(messages, prompt, options)
            except engine.TemplateError:
                self._made[key] = None
            self._seconds += time.thread_time() - began
        return self._made[key]

    @property
    def is_slow(self) -> bool:
        """Whether the template has had its time; then nothing more is rendered."""
        return self._seconds > MAX_SECONDS

    @functools.cached_property
    def turn_end(self) -> str:
        """What ends a user's turn."""
        return self() or ""

    def __call__(self, *turns: dict, prompt: bool = False, **options) -> str | None:
        """As `whole`, but only what follows the question."""
        text = self.whole(*turns, prompt=prompt, **options)
        return text.partition(QUESTION)[2] if text and QUESTION in text else None


def answer(**fields) -> dict:
    """An assistant's message."""
    return {"role": "assistant", "content": ANSWER, **fields}


def segments(text: str) -> list[str]:
    """A text as tags and characters."""
    return SEGMENT.findall(text)


def common_start(texts: Iterable[str]) -> str:
    """What texts begin with alike, up to the end of a tag or of a character outside of tags."""
    start = ""
    for column in zip(*map(segments, texts)):
        if len(set(column)) > 1:
            break
        start += column[0]
    return start


def turn_end(texts: Iterable[str], user: str) -> str:
    """How an assistant's turns end that go on with `texts` behind what was said. user: how a user's
    ends, which may be the same; then this is not more than that."""
    ends = [common_end(texts), common_end([*texts, user])]
    return min(filter(str.strip, ends), key=len, default="")


def common_end(texts: Iterable[str]) -> str:
    """What texts end with alike, in the same way."""
    end = ""
    for column in zip(*(reversed(segments(text)) for text in texts)):
        if len(set(column)) > 1:
            break
        end = column[0] + end
    return end
