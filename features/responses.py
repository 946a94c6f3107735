"""Responses: the newer API of OpenAI, at /v1/responses.

What for: Codex, and the libraries that ask this API first. How it works: a body becomes a chat's
(items.py), a chat's chunks become items and their events (telling.py); nothing here generates. A
response is kept in memory, with the conversation before it, unless `store` is false; so the next
request may name it in `previous_response_id`, or its items by their ids. Those kept longest go when
there are too many, or too many bytes of them; a conversation that goes on holds what it needs, so
no running reply loses anything. It costs these bytes, and nothing else beside the chat. It reads
the bodies of `/v1/responses` and `/v1/responses/input_tokens`, by
https://platform.openai.com/docs/api-reference/responses, and the settings `max_responses` and
`max_responses_mib`; it sends responses, their input items, and streams.

What differs: tools that OpenAI's servers or the client's model run are left out, and named in
`x-ignored-fields`; nothing is ever cut from a conversation (`truncation`); what a developer says in
the middle of one is said with the user's words. A stream whose prompt does not fit ends in a
response that has failed, as there; for all other refusals the status is a 4xx.
"""

import dataclasses
import functools
import re
import threading
import time
import urllib.parse
import weakref
from typing import Any, Literal

import server
from features import protocols
from features.items import Tools, listed, new_id, read_turns
from features.telling import Events, Response

NEEDS = ("structured", "reasoning", "tools", "pings")
EFFORTS = {"max": "xhigh"}  # whose names a chat does not know
LOGPROBS = "message.output_text.logprobs"  # in `include`
MAX_LISTED = 100  # items in one list, as the reference has it


@dataclasses.dataclass
class Settings:
    """How much is kept."""

    max_responses: int = server.setting("server", 1000, low=0)
    max_responses_mib: float = server.setting("server", 64.0, low=0, high=2**20)


# ==== 1. Bodies ==========================================================================


@dataclasses.dataclass
class Reasoning:
    """How much to think, and whether to sum it up."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: str | None = server.option(no_effect=True)
    mode: str | None = server.option(no_effect=True)


@dataclasses.dataclass
class TextFormat:
    """The form of the reply's text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = server.option(no_effect=True)
    strict: bool | None = server.option(no_effect=True)  # the reply always validates

    def check(self, at: str) -> None:
        """Refuse a schema that is not there."""
        if self.type == "json_schema" and self.schema is None:
            raise server.invalid(f"{at}.schema", f"{at}.schema is required", "missing_field")

    def field(self) -> dict:
        """It as a field of a chat."""
        schema = {"name": self.name or "reply", "schema": self.schema}
        return {"type": self.type, **({"json_schema": schema} if self.schema is not None else {})}


@dataclasses.dataclass
class TextConfig:
    """What the reply's text is to be like."""

    format: TextFormat | None = None
    verbosity: str | None = server.option(no_effect=True)


@dataclasses.dataclass
class NamedTool:
    """A function, by its name."""

    type: Literal["function"]
    name: str

    def field(self) -> dict:
        """It as in a field of a chat."""
        return {"type": "function", "function": {"name": self.name}}


@dataclasses.dataclass
class ToolSelection:
    """Functions that may be called this time."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedTool]

    def field(self) -> dict:
        """It as a field of a chat."""
        return {"type": "allowed_tools", "allowed_tools": {
            "mode": self.mode, "tools": [tool.field() for tool in self.tools]}}


@dataclasses.dataclass
class InputBody:
    """POST /v1/responses/input_tokens"""

    input: str | list[dict[str, Any]] = ""
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | ToolSelection | None = None
    parallel_tool_calls: bool | None = None  # as a chat's
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    truncation: Literal["auto", "disabled"] | None = server.option(no_effect=True)
    conversation: Any = server.option(refused=True)

    chat = places = None  # the same as the body of a chat, and of what, which `receive` makes
    known = items = None  # the functions, and the conversation; these, too

    def check(self, _at: str) -> None:
        """Refuse what is not served."""
        for field in dataclasses.fields(self):
            if "refused" in field.metadata and getattr(self, field.name):
                raise server.invalid(field.name, f"{field.name}: is not supported; leave it out",
                                     "unsupported_parameter")

    def own_fields(self) -> dict:
        """Fields of a chat that only one of the bodies has."""
        return {}


@dataclasses.dataclass
class ResponsesBody(InputBody):
    """POST /v1/responses"""

    max_output_tokens: int | None = server.option(low=1)
    temperature: float | None = server.option(low=0, high=2)
    top_p: float | None = server.option(low=0, high=1)
    top_logprobs: int | None = server.option(low=0, high=20)
    include: list[str] | None = None
    store: bool = True
    metadata: dict[str, str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = server.option(no_effect=True)
    background: bool = server.option(False, refused=True)
    prompt: Any = server.option(refused=True)
    max_tool_calls: int | None = server.option(no_effect=True)
    user: str | None = server.option(no_effect=True)
    service_tier: str | None = server.option(no_effect=True)
    safety_identifier: str | None = server.option(no_effect=True)
    prompt_cache_key: str | None = server.option(no_effect=True)
    prompt_cache_retention: str | None = server.option(no_effect=True)
    prompt_cache_options: Any = server.option(no_effect=True)
    context_management: Any = server.option(no_effect=True)
    moderation: Any = server.option(no_effect=True)
    client_metadata: Any = server.option(no_effect=True)

    def own_fields(self) -> dict:
        """As InputBody.own_fields."""
        with_logprobs = bool(self.top_logprobs) or LOGPROBS in (self.include or ())
        return {"max_tokens": self.max_output_tokens, "temperature": self.temperature,
                "top_p": self.top_p, "stream": self.stream, "logprobs": with_logprobs or None,
                "top_logprobs": self.top_logprobs if with_logprobs else None}


PLACES = [("messages", "input"), ("response_format.json_schema", "text.format"),
          ("response_format", "text.format")]


def receive(handler: server.Handler, body, target) -> None:
    """Make the body of a chat, refused or ready before the model must be there. Raises ApiError."""
    if not isinstance(body, InputBody):
        return
    store, reading = stores[handler.server], server.Reading(handler.server.house)
    owner = handler.key
    before = store.find(body.previous_response_id, "previous_response_id", owner).conversation() \
        if body.previous_response_id else []
    items = [*((item, "previous_response_id") for item in before),
             *listed(body.input, functools.partial(store.find_item, owner=owner))]
    body.items, body.known = [item for item, _ in items], Tools(body.tools, reading)
    turns = read_turns(body.instructions, items, body.known, reading)
    handler.tally.ignored += reading.ignored
    body.places = [*turns.places, *body.known.places, *PLACES]
    choice, form = body.tool_choice, body.text and body.text.format
    effort = body.reasoning and body.reasoning.effort
    body.chat = protocols.read_chat(handler, {
        "model": body.model, "messages": turns.messages, "tools": body.known.chat or None,
        "tool_choice": choice.field() if hasattr(choice, "field") else choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": EFFORTS.get(effort, effort),
        "response_format": form and form.field(), **body.own_fields()}, body.places, target)


# ==== 2. What is kept ====================================================================


@dataclasses.dataclass(frozen=True)
class Kept:
    """A response, and the items that it replies to."""

    response: dict
    items: list[dict]
    owner: str = ""  # the key that it was made with; who has another does not see it

    def conversation(self) -> list[dict]:
        """Everything that was said."""
        return [*self.items, *self.response["output"]]


class Store:
    """Responses by their ids, within limits of number and bytes. Handler threads."""

    def __init__(self, most: int, most_bytes: float):
        self.most, self.most_bytes = most, most_bytes
        self.lock = threading.Lock()  # guards the fields below
        self.kept: dict[str, tuple[Kept, int]] = {}  # and its bytes as JSON; oldest first
        self.holders: dict[str, str] = {}  # by an item that was put out, the response with it
        self.n_bytes = 0

    def add(self, kept: Kept) -> None:
        """Keep a response; those kept longest go for it. What it shares with others counts for
        each."""
        size, name = len(server.to_json([kept.response, kept.items])), kept.response["id"]
        if size > self.most_bytes:
            server.log.warning("warning: %s is not kept: it has %d bytes with its conversation; "
                               "the limit is max_responses_mib", name, size)
            return
        with self.lock:
            self.kept[name] = kept, size
            self.holders |= {item["id"]: name for item in kept.response["output"]}
            self.n_bytes += size
            while len(self.kept) > self.most or self.n_bytes > self.most_bytes:
                self._drop(next(iter(self.kept)))

    def find(self, name: str, param: str | None = None, owner: str = "") -> Kept:
        """A response. 404 for one that is not kept, or is another's."""
        with self.lock:
            if name not in self.kept or self.kept[name][0].owner != owner:
                raise server.ApiError(
                    404, f"the response {server.describe(name)} is not kept: it was made with "
                         f"store: false, deleted, or is older than the {len(self.kept)} that are "
                         "(max_responses, max_responses_mib)", param, "response_not_found")
            return self.kept[name][0]

    def find_item(self, name, at: str, owner: str = "") -> dict:
        """An item that was put out. 404 for one that is not kept, or is another's."""
        with self.lock:
            found = self.kept.get(self.holders.get(name) if isinstance(name, str) else None)
        for item in found[0].response["output"] if found and found[0].owner == owner else ():
            if item["id"] == name:
                return item
        raise server.ApiError(404, f"{at}.id: the item {server.describe(name)} is not kept; send "
                                   "it whole", f"{at}.id", "item_not_found")

    def remove(self, name: str, owner: str = "") -> None:
        """Forget a response. 404 for one that is not kept, or is another's."""
        self.find(name, owner=owner)
        with self.lock:
            self._drop(name)

    def _drop(self, name: str) -> None:
        kept, size = self.kept.pop(name, (None, 0))
        self.n_bytes -= size
        for item in kept.response["output"] if kept else ():
            self.holders.pop(item["id"], None)


stores: "weakref.WeakKeyDictionary[server.Server, Store]" = weakref.WeakKeyDictionary()


def start(running: "server.Server") -> None:
    """Give a server its store."""
    config = running.config
    stores[running] = Store(config.max_responses, config.max_responses_mib * 2**20)


# ==== 3. Routes ==========================================================================


def plain(sent) -> Any:
    """What was sent, as JSON, without what was left out."""
    if not dataclasses.is_dataclass(sent):
        return sent
    return dataclasses.asdict(sent, dict_factory=lambda items: {
        name: value for name, value in items if value is not None})


def begun(body: ResponsesBody, model: str) -> dict:
    """A response of which nothing is made yet."""
    reasoning = body.reasoning or Reasoning()
    return {
        "id": new_id("resp"), "object": "response", "created_at": int(time.time()),
        "completed_at": None, "status": "in_progress", "background": False, "error": None,
        "incomplete_details": None, "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens, "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {}, "model": body.model or model, "output": [],
        "parallel_tool_calls": server.given(body.parallel_tool_calls, True),
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": reasoning.effort,
                      "summary": reasoning.summary or reasoning.generate_summary},
        "safety_identifier": body.safety_identifier, "service_tier": "default",
        "store": body.store, "temperature": body.chat.temperature,
        "text": {"format": {"type": "text"}, **(plain(body.text) or {})},
        "tool_choice": plain(body.tool_choice) or "auto", "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0, "top_p": body.chat.top_p,
        "truncation": "disabled", "usage": None, "user": body.user}


def post_response(handler: server.Handler, body: ResponsesBody) -> None:
    """A response, streamed or not. Raises ApiError."""
    def keep(response: dict) -> None:
        if body.store:
            stores[handler.server].add(Kept(response, body.items, handler.key))

    reply = begun(body, handler.loaded.model.name)
    handler.dialect = Events(reply, keep)
    story_of = functools.partial(Response, reply=reply, tools=body.known, keep=keep,
                                 summarizes=bool(reply["reasoning"]["summary"]))
    try:
        protocols.answer(handler, body.chat, body.places, story_of)
    except server.ApiError as error:
        if error.code == "context_length_exceeded" and body.stream and not handler.tally.status:
            for name in ("created", "in_progress"):  # and then, as every stream, with the error
                handler.write_event({"type": f"response.{name}", "response": reply})
        raise


def post_input_tokens(handler: server.Handler, body: InputBody) -> None:
    """The tokens of a prompt. Raises ApiError."""
    handler.send_json({"object": "response.input_tokens", "input_tokens": protocols.count_tokens(
        handler, body.chat, body.places)})


def get_response(handler: server.Handler, name: str) -> None:
    """A response that is kept. Raises ApiError."""
    handler.send_json(stores[handler.server].find(name, owner=handler.key).response)


def delete_response(handler: server.Handler, name: str) -> None:
    """Forget a response. Raises ApiError."""
    stores[handler.server].remove(name, handler.key)
    handler.send_json({"id": name, "object": "response", "deleted": True})


def get_input_items(handler: server.Handler, name: str) -> None:
    """The items that a response replies to, newest first unless asked otherwise. Raises
    ApiError."""
    items = stores[handler.server].find(name, owner=handler.key).items
    target = handler.raw_requestline.split()[1].decode("latin-1")
    asked = dict(urllib.parse.parse_qsl(target.partition("?")[2].partition("#")[0]))
    order, limit, after = asked.get("order", "desc"), asked.get("limit", "20"), asked.get("after")
    if order not in ("asc", "desc"):
        raise server.invalid("order", f"order: expected asc or desc, got {server.describe(order)}")
    if not (re.fullmatch("[0-9]{1,3}", limit) and 1 <= int(limit) <= MAX_LISTED):
        raise server.invalid("limit", f"limit: must be between 1 and {MAX_LISTED}, got "
                                      f"{server.describe(limit)}")
    items = items if order == "asc" else items[::-1]
    if after is not None:
        places = [i for i, item in enumerate(items) if item["id"] == after]
        if not places:
            raise server.invalid("after", f"after: no item {server.describe(after)} is there")
        items = items[places[0] + 1:]
    shown = items[: int(limit)]
    handler.send_json({"object": "list", "data": shown, "has_more": len(shown) < len(items),
                       "first_id": shown[0]["id"] if shown else None,
                       "last_id": shown[-1]["id"] if shown else None})


RESPONSES = Events()
ROUTES = {
    ("POST", "/v1/responses"): server.Route(
        post_response, "conversations in OpenAI's newer API", ResponsesBody, dialect=RESPONSES),
    ("POST", "/responses"): server.Route(
        post_response, "as /v1/responses", ResponsesBody, dialect=RESPONSES),
    ("POST", "/v1/responses/input_tokens"): server.Route(
        post_input_tokens, "the tokens of such a conversation", InputBody),
    ("GET", "/v1/responses/{id}"): server.Route(get_response, "a response that is kept"),
    ("DELETE", "/v1/responses/{id}"): server.Route(delete_response, "forget it"),
    ("GET", "/v1/responses/{id}/input_items"): server.Route(
        get_input_items, "what it replies to"),
}
