"""Protocols: what the translators of other APIs have in common.

A protocol is a dialect with a body and a stream of its own: responses.py and messages.py. Its body
becomes that of a chat: `Turns` collects the conversation, `read_chat` checks it as any chat is
checked, and `told_as` gives errors the names that the client knows. A chat's chunks become its
stream: a `Story` tells them as both APIs want them, one block after the other, and is folded into
the unstreamed reply while it is told. Nothing here generates. It is no feature by itself.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator

import engine
import server

Place = tuple[str, str]  # a place in the body of a chat, and the one that it was made of


# ==== 1. Bodies ==========================================================================


def read_kind(kinds: dict[str, type], sent: dict, at: str, reading: server.Reading,
              default: str | None = None):
    """An object as the dataclass of its `type`; None for one of a kind that is not known here,
    which is noted as ignored. Raises ApiError."""
    kind = sent.get("type") or default
    if not isinstance(kind, str):
        raise server.invalid(f"{at}.type", f"{at}.type is required", "missing_field")
    if kind not in kinds:
        reading.ignored.append(f"{at} ({kind})")
        return None
    return server.read_object(reading.house.type_of(kinds[kind]), {**sent, "type": kind}, at,
                              reading)


@dataclasses.dataclass
class Said:
    """A piece of what somebody says: a part of a message of a chat, and where it was sent."""

    part: dict
    at: str

    @classmethod
    def text(cls, text: str, at: str) -> "Said":
        return cls({"type": "text", "text": text}, at)

    @classmethod
    def image(cls, url: str, at: str) -> "Said":
        return cls({"type": "image_url", "image_url": {"url": url}}, at)


class Turns:
    """A conversation as the messages of a chat. Many templates want the roles to take turns, and
    the system to speak first: neighbours of one role become one message, and what the system says
    later is said with the user's words, in a tag."""

    def __init__(self):
        self.messages: list[dict] = []
        self.places: list[Place] = []
        self.images: list[Said] = []  # of results, not shown yet

    def say(self, role: str, said: Iterable[Said], at: str) -> None:
        """Add what a role says."""
        said, role = list(said), "system" if role == "developer" else role
        if role == "system" and any(message["role"] != "system" for message in self.messages):
            role = "user"
            said = [dataclasses.replace(each, part={
                **each.part, "text": f"<system-reminder>\n{each.part['text']}\n</system-reminder>"})
                if each.part["type"] == "text" else each for each in said]
        parts = self._turn(role, at).setdefault("content", [])
        for each in said:
            self.places.append((f"messages[{len(self.messages) - 1}].content[{len(parts)}]",
                                each.at))
            parts.append(each.part)

    def think(self, text: str, at: str) -> None:
        """Add what the assistant thought."""
        turn = self._turn("assistant", at)
        turn["reasoning_content"] = "\n".join(filter(None, (turn.get("reasoning_content"), text)))

    def call(self, call_id: str, name: str, arguments: str, at: str) -> None:
        """Add a call of the assistant's; arguments: JSON, as text."""
        calls = self._turn("assistant", at).setdefault("tool_calls", [])
        self.places.append((f"messages[{len(self.messages) - 1}].tool_calls[{len(calls)}]", at))
        calls.append({"id": call_id, "type": "function",
                      "function": {"name": name, "arguments": arguments}})

    def result(self, call_id: str, said: list[Said], at: str) -> None:
        """Add what a call gave. Only users show images, so those come behind all results."""
        texts = [each.part for each in said if each.part["type"] == "text"]
        self._turn("tool", at, tool_call_id=call_id)["content"] = texts or ""
        self.images += [each for each in said if each.part["type"] != "text"]

    def end(self) -> "Turns":
        """The conversation is whole."""
        if self.images:
            images, self.images = self.images, []
            self.say("user", images, images[0].at)
        return self

    def _turn(self, role: str, at: str, **more) -> dict:
        """The message to which a role adds: the last one if that is its own, else a new one."""
        if role != "tool":
            self.end()
        last = self.messages[-1] if self.messages else {"role": None}
        if last["role"] != role or role == "tool":
            self.places.append((f"messages[{len(self.messages)}]", at))
            self.messages.append({"role": role, **more})
        return self.messages[-1]


@contextlib.contextmanager
def told_as(places: Iterable[Place]) -> Iterator[None]:
    """Let a refusal of a chat name the place that the client sent."""
    try:
        yield
    except server.ApiError as error:
        found = [place for place in places if error.param and error.param.startswith(place[0])]
        if found:
            ours, theirs = max(found, key=lambda place: len(place[0]))
            error.param = theirs + error.param[len(ours):]
            error.message = error.message.replace(ours, theirs, 1)
        raise


def read_chat(handler: server.Handler, fields: dict, places: list[Place], target
              ) -> server.ChatBody:
    """The body of a chat, refused or made ready as if it had been sent; fields that are None are
    left out. Raises ApiError."""
    with told_as(places):
        chat = handler.read_fields(server.ChatBody, {
            name: value for name, value in fields.items() if value is not None})
        handler.receive(chat, target)
    return chat


def count_tokens(handler: server.Handler, chat: server.ChatBody, places: list[Place]) -> int:
    """The tokens of a chat's prompt. Raises ApiError."""
    with told_as(places):
        wanted = handler.join(server.Chat, chat)
        [tokens] = wanted.read()
    return len(tokens) + engine.extra_tokens(wanted.more.get("images", {}))


# ==== 2. Streams =========================================================================


class NamedEvents(server.Dialect):
    """Server-sent events that have a name: the type of what they carry."""

    def event(self, data: dict | str) -> bytes:
        """As Dialect.event."""
        return b"event: %b\ndata: %b\n\n" % (data["type"].encode(), server.to_json(data))


class Story:
    """A chat's chunks told as blocks: reasoning, text and calls, one after the other. Subclasses
    yield their protocol's events, and keep `reply`, the unstreamed one, up to date with them. In
    the thread of its request."""

    def __init__(self, wanted: server.Chat, reply: dict):
        self.wanted, self.reply = wanted, reply
        self.kind: str | None = None  # of the block that is open: "reasoning", "text" or "call"
        self.texts: list[str] = []  # of that block
        self.reasoning: list[str] = []  # all of it

    # ---- what a protocol says -----------------------------------------------------------

    def start(self) -> Iterator[dict]:
        """The events before the first block, when the prompt has been read."""
        yield from ()

    def open(self, call: dict) -> Iterator[dict]:
        """The events that begin a block of `kind`; call: a call's id and function."""
        raise NotImplementedError

    def add(self, text: str, logprobs: list[dict]) -> Iterator[dict]:
        """The events for more of the block that is open."""
        raise NotImplementedError

    def close(self, is_whole: bool) -> Iterator[dict]:
        """The events that end the block that is open."""
        raise NotImplementedError

    def end(self, reason: str) -> Iterator[dict]:
        """The events behind the last block; reason: the chat's finish_reason."""
        raise NotImplementedError

    # ---- telling ------------------------------------------------------------------------

    def events(self, chunks: Iterator[dict]) -> Iterator[dict]:
        """Yield the protocol's events for a chat's chunks."""
        for number, chunk in enumerate(chunks):
            if number == 0:
                yield from self.start()
            for choice in chunk["choices"]:
                logprobs = (choice["logprobs"] or {}).get("content", [])
                for kind, text, call in pieces(choice["delta"]):
                    if kind != self.kind or call:
                        yield from self._close(True)
                        self.kind = kind
                        yield from self.open(call)
                    if text:
                        self.texts.append(text)
                        yield from self.add(text, logprobs)
                if reason := choice["finish_reason"]:
                    yield from self._close(reason != "length")
                    yield from self.end(reason)

    def _close(self, is_whole: bool) -> Iterator[dict]:
        if self.kind:
            yield from self.close(is_whole)
        if self.kind == "reasoning":
            self.reasoning += self.texts
        self.kind, self.texts = None, []

    def write(self, handler: server.Handler, chunks: Iterator[dict]) -> None:
        """Write the reply, streamed or not."""
        for event in self.events(chunks):
            if self.wanted.body.stream:
                handler.write_event(event)
        if self.wanted.body.stream:
            handler.write_piece(b"", is_last=True)
        else:
            handler.send_json(self.reply)

    def counts(self) -> tuple[int, int, int, int]:
        """Tokens: of the prompt, of these cached, of the reply, of these reasoning, as they are
        counted when it is read again."""
        choice, text = self.wanted.choices[0], "".join(self.reasoning)
        n_thought = len(self.wanted.model.tokenize(text, False, False)) if text else 0
        return (choice.n_prompt, choice.n_reused, choice.n_generated,
                min(n_thought, choice.n_generated))


def pieces(delta: dict) -> Iterator[tuple[str, str, dict]]:
    """What a delta of a chat says: the kind of block, a text, and of a call that begins its id and
    function, else {}."""
    if text := delta.get("reasoning_content"):
        yield "reasoning", text, {}
    if text := delta.get("content"):
        yield "text", text, {}
    for call in delta.get("tool_calls", ()):
        yield "call", call["function"]["arguments"], call if "id" in call else {}


def answer(handler: server.Handler, chat: server.ChatBody, places: list[Place],
           story_of: Callable[[server.Chat], Story]) -> None:
    """Generate a chat's reply, and write it as a protocol tells it. Raises ApiError."""
    with told_as(places):
        wanted = handler.join(server.Chat, chat)
        handler.generate(wanted, lambda chunks: story_of(wanted).write(handler, chunks))
