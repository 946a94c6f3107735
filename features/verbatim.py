"""Verbatim: what a message says is text, also where it spells a special token.

What for: a chat template writes special tokens (`<|im_end|>`, `[INST]`, `<start_of_turn>`) between
the turns, and who writes such a token into a message, a tool's description or its result could end
his turn and speak as somebody else. How it works: where a text that goes to the template spells a
special token, the span is put between two characters that occur in no text of the chat, so the
template still sees the text, and may trim it, cut it or make JSON of it. A text whose end or
beginning may become a token with what the template writes beside it (`<parameter=` and `>` around
an argument's name) gets such a character there. When the prompt becomes tokens, whatever stands
between two special tokens of the template and has such a mark in it is read without special tokens,
as if the vocabulary had none; then the marks are gone. It costs a search in the chat's texts, 10 ns
a character and 10 us a text, and nothing else where they spell no special token. White space, of
which some vocabularies have tokens, is left alone. It reads the messages, tools and template
variables of chats, and sends nothing. Prompts of /v1/completions are the client's own, with all
their tokens.
"""

import itertools
import re
import weakref
from collections.abc import Iterable, Iterator

import numpy as np
from llama_cpp import llama_cpp as lib

import engine
import server
from features import marks

# Unicode's noncharacters, which are for a program's own use, then its private ones: white space to
# nobody, and one \uXXXX each where a template escapes them.
MARKS = [*map(chr, range(0xFDD0, 0xFDF0)), *map(chr, range(0xE000, 0xF900))]
ESCAPE = re.compile(r"\\u([0-9a-f]{4})")  # as JSON of ASCII has them


# ==== 1. The vocabulary ==================================================================


class Specials:
    """The special tokens of a model that a text can spell."""

    def __init__(self, model: engine.Model, texts: list[str], always_read: dict[int, str]):
        """always_read: those of the tokens that llama.cpp reads in any text; by id, their text."""
        self.model, self.always_read = model, always_read
        self.pattern = re.compile(any_of(texts) or "(?!)")  # the longest that begins at a place
        # What is to become one with what stands before it, and with what stands behind it; words
        # alone do not count, since templates compare them.
        self.ends = {text[n:] for text in texts for n in range(1, len(text))
                     if not text[n:].isalnum()}
        self.beginnings = {text[:n] for text in texts for n in range(1, len(text))
                           if not text[:n].isalnum()}
        self.lengths = range(1, max(map(len, texts), default=1))
        self._spelled: dict[int, np.ndarray] = {}  # tokens of those that are always read

    def begins_in(self, text: str) -> bool:
        """Whether a special token may begin at the end of a text, and end behind it."""
        return any(text[-n:] in self.beginnings for n in self.lengths)

    def ends_in(self, text: str) -> bool:
        """Whether a special token may begin before a text, and end at its beginning."""
        return any(text[:n] in self.ends for n in self.lengths)

    def touches(self, text: str) -> bool:
        """Whether a special token may come of a text."""
        return bool(self.pattern.search(text)) or self.begins_in(text) or self.ends_in(text)

    def plain(self, text: str) -> np.ndarray:
        """The token ids (int32) of a text, none of them special."""
        tokens = self.model.tokenize(text, bos=False, special=False)
        found = np.flatnonzero(np.isin(tokens, [*self.always_read]))
        parts: list[np.ndarray] = []
        taken = 0
        for place in found:
            parts += [tokens[taken:place], self._spell(int(tokens[place]))]
            taken = place + 1
        return np.concatenate([*parts, tokens[taken:]])

    def _spell(self, token: int) -> np.ndarray:
        """The tokens of the text of one that is always read, which is cut behind its first
        letter."""
        if token not in self._spelled:
            text = self.always_read[token]
            self._spelled[token] = np.concatenate([self.plain(text[:1]), self.plain(text[1:])])
        return self._spelled[token]


def specials_of(model: engine.Model) -> Specials:
    """Read a vocabulary: a quarter of a second for 250,000 tokens."""
    texts, always_read = [], {}
    for token in range(model.n_vocab):
        attributes = lib.llama_vocab_get_attr(model.vocab, token)
        if attributes & engine.SPECIAL_TOKEN:
            text = model.piece(token, special=True).decode("utf-8", "replace")
            if len(text) > 1 and not text.isspace():  # a single letter cannot be spelled otherwise
                texts.append(text)
                if attributes & lib.LLAMA_TOKEN_ATTR_USER_DEFINED:
                    always_read[token] = text
    return Specials(model, texts, always_read)


def any_of(texts: Iterable[str]) -> str:
    """A pattern for the longest of some texts that fits. What they begin with alike is looked at
    once, since there may be thousands.

    >>> any_of(["<s>", "<a", "<a>"])
    '<(?:s>|a(?:>)?)'
    """
    rests: dict[str, list[str]] = {}
    is_end = False
    for text in texts:
        if text:
            rests.setdefault(text[0], []).append(text[1:])
        is_end = is_end or not text
    pattern = "|".join(re.escape(first) + any_of(rest) for first, rest in rests.items())
    if pattern and (is_end or len(rests) > 1):
        pattern = f"(?:{pattern})"
    return pattern + "?" * (bool(pattern) and is_end)


# ==== 2. A chat ==========================================================================


class Marker:
    """Marks what the texts of a chat spell, and reads the prompt that a template makes of them."""

    def __init__(self, chat: server.Chat, specials: Specials):
        self.chat, self.specials = chat, specials
        # By special token that is spelled, the marks before and behind it. subtle: each has its
        # own, so that a mark from which the template has cut it off speaks of no other token.
        self.marks: dict[str, tuple[str, str]] = {}
        self.seam = ""  # the mark where a token may begin in a text and end in the template's
        self.mark = re.compile("(?!)")  # any of these
        self._render = chat.render
        chat.render, chat.tokenize = self.render, self.tokenize

    def render(self) -> str:
        """As Chat.render; the prompt has the marks."""
        chat = self.chat
        texts = [*texts_in(map(told, chat.messages)), *texts_in(chat.options)]
        if not self.seam and any(map(self.specials.touches, texts)):
            self._choose_marks(texts)
        if not self.seam:
            return self._render()
        given = chat.messages, chat.options
        chat.messages = [*map(self._marked_message, chat.messages)]
        chat.options = self._marked(chat.options)
        try:
            prompt = self._render()
        finally:  # it may be rendered again
            chat.messages, chat.options = given
        return ESCAPE.sub(self._unescaped, prompt)

    def _choose_marks(self, texts: list[str]) -> None:
        """A pair for each special token that is spelled. Raises ApiError."""
        taken = set().union(*texts, *(map(unescaped, ESCAPE.finditer(text)) for text in texts))
        free = [mark for mark in MARKS if mark not in taken]
        self.seam, pairs = "".join(free[:1]), [*zip(free[1::2], free[2::2])]
        if not pairs:
            raise server.invalid("messages", "messages: they spell special tokens, and have all of "
                                 "Unicode's private characters, too; leave one or the other out")
        spelled = dict.fromkeys(
            found[0] for text in texts for found in self.specials.pattern.finditer(text))
        self.marks = dict(zip(spelled, itertools.cycle(pairs)))
        self.mark = re.compile(f"[{self.seam}{''.join(map(''.join, self.marks.values()))}]")
        marks.hide(self.chat, self.mark, "")

    def _marked_message(self, message: dict) -> dict:
        """A message with what it spells between marks."""
        marked, content = self._marked(told(message)), message.get("content")
        if isinstance(content, list):
            texts = iter(marked["content"])
            marked["content"] = [next(texts) if is_text(part) else part for part in content]
        return {**message, **marked}

    def _marked(self, value):
        """A value with what its texts spell between marks."""
        if isinstance(value, str):
            marked = self.specials.pattern.sub(
                lambda found: found[0].join(self.marks[found[0]]), value)
            return (self.seam * self.specials.ends_in(value) + marked
                    + self.seam * self.specials.begins_in(value))
        if isinstance(value, list):
            return [*map(self._marked, value)]
        if isinstance(value, dict):
            return {self._marked(key): self._marked(inner) for key, inner in value.items()}
        return value

    def _unescaped(self, found: re.Match) -> str:
        """A mark that the template has escaped; other characters stay as they are."""
        return mark if self.mark.match(mark := unescaped(found)) else found[0]

    def tokenize(self, text: str, bos: bool = True) -> np.ndarray:
        """As Chat.tokenize, of a text with marks."""
        model = self.specials.model
        if not self.seam:
            return model.tokenize(text, bos)
        return np.concatenate([
            self.specials.plain(self.mark.sub("", part)) if is_plain else
            model.tokenize(part, bos and not place)
            for place, (part, is_plain) in enumerate(self._parts(text))])

    def _parts(self, text: str) -> Iterator[tuple[str, bool]]:
        """A text in parts, and for each whether no special token counts in it. Such a part goes
        from one of the template's tokens to the next one, as llama.cpp's tokenizer would have it,
        which has rules for what stands behind a special token."""
        taken = end = 0
        for start, next_end in [*self._templates_own(text), (len(text), len(text))]:
            if self.mark.search(text, end, start):
                yield text[taken:end], False
                yield text[end:start], True
                taken = start
            end = next_end
        yield text[taken:], False

    def _templates_own(self, text: str) -> Iterator[tuple[int, int]]:
        """Where the template's own special tokens begin and end. subtle: one of its two marks is
        enough to make a token the client's, since the template may have cut the other one off."""
        for found in self.specials.pattern.finditer(text):
            start, end = found.span()
            before, behind = self.marks.get(found[0], ("", ""))
            if not before or text[start - 1:start] != before and text[end:end + 1] != behind:
                yield start, end


def told(message: dict) -> dict:
    """What a client wrote into a message; what stands for an image is the server's."""
    texts = {name: value for name, value in message.items() if name != "role"}
    if isinstance(texts.get("content"), list):
        texts["content"] = [*filter(is_text, texts["content"])]
    return texts


def is_text(part: dict) -> bool:
    """Whether a part of a message's content is text."""
    return part["type"] == "text"


def texts_in(value) -> Iterator[str]:
    """All texts in a value, the names of its fields, too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from texts_in(value.keys())
        yield from texts_in(value.values())
    elif isinstance(value, Iterable):
        for inner in value:
            yield from texts_in(inner)


def unescaped(found: re.Match) -> str:
    """The character of an ESCAPE."""
    return chr(int(found[1], 16))


# ==== 3. The feature =====================================================================

# By engine; each is set before handlers have that engine.
known: "weakref.WeakKeyDictionary[engine.Engine, Specials]" = weakref.WeakKeyDictionary()


def equip(loaded: engine.Engine, _settings) -> None:
    """Learn which special tokens the model has."""
    known[loaded] = specials_of(loaded.model)


def join(wanted: server.Generation) -> None:
    """Mark a chat's texts when they are rendered, behind what other features do to them."""
    if isinstance(wanted, server.Chat):
        Marker(wanted, known[wanted.loaded])
