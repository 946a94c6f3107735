"""Messages: the Anthropic API, at /v1/messages.

What for: Claude Code, and all that speaks to that API. How it works: a body becomes a chat's, a
chat's chunks become blocks and their events (protocols.py); nothing here generates. It costs
nothing beside the chat. It reads the bodies of `/v1/messages` and `/v1/messages/count_tokens`, by
https://docs.anthropic.com/en/api/messages, and sends replies, streams, pings and errors in that
API's shape; to its clients, which send `anthropic-version`, also the list of models.

What differs: tools that only Anthropic's servers run are left out, and named in `x-ignored-fields`;
signatures are the same for all thinking, and nobody checks them; what the system says in the middle
of a conversation is said with the user's words.
"""

import dataclasses
import functools
import json
import secrets
import time
from collections.abc import Iterator
from typing import Any, Literal

import server
from features import protocols
from features.blocks import Turn, read_tools, read_turns

NEEDS = ("structured", "reasoning", "tools")
SIGNATURE = server.NAME  # of thinking: clients drop what has none
EFFORTS = {"max": "xhigh"}  # whose names a chat does not know


# ==== 1. Bodies ==========================================================================


@dataclasses.dataclass
class Choice:
    """Which tools to call."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False

    def check(self, at: str) -> None:
        """Refuse a tool without a name."""
        if self.type == "tool" and self.name is None:
            raise server.invalid(f"{at}.name", f"{at}.name is required", "missing_field")

    def fields(self) -> dict:
        """It as fields of a chat."""
        choice = {"type": "function", "function": {"name": self.name}} if self.type == "tool" \
            else {"any": "required"}.get(self.type, self.type)
        return {"tool_choice": choice,
                "parallel_tool_calls": False if self.disable_parallel_tool_use else None}


@dataclasses.dataclass
class Thinking:
    """Whether to think before the answer, and whether to show it."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = server.option(low=0)
    display: Literal["summarized", "omitted"] | None = None


@dataclasses.dataclass
class OutputFormat:
    """The form of the reply's text."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


@dataclasses.dataclass
class OutputConfig:
    """How much to think, and the form of the reply."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


@dataclasses.dataclass
class CountBody:
    """POST /v1/messages/count_tokens"""

    messages: list[Turn] = dataclasses.field(kw_only=True, metadata={"min_length": 1})
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: Any = server.option(no_effect=True)
    context_management: Any = server.option(no_effect=True)
    speed: str | None = server.option(no_effect=True)

    chat = places = None  # the same as the body of a chat, and of what, which `receive` makes

    def own_fields(self) -> dict:
        """Fields of a chat that only one of the bodies has."""
        return {}


@dataclasses.dataclass
class MessagesBody(CountBody):
    """POST /v1/messages"""

    max_tokens: int | None = server.option(low=1)
    stop_sequences: list[str] | None = None
    stream: bool = False
    temperature: float | None = server.option(low=0, high=2)
    top_p: float | None = server.option(low=0, high=1)
    top_k: int | None = server.option(low=-1, high=server.INT32_MAX)
    metadata: Any = server.option(no_effect=True)
    service_tier: str | None = server.option(no_effect=True)
    container: Any = server.option(no_effect=True)
    inference_geo: str | None = server.option(no_effect=True)

    def own_fields(self) -> dict:
        """As CountBody.own_fields."""
        return {"max_tokens": self.max_tokens, "stop": self.stop_sequences, "stream": self.stream,
                "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


# ==== 2. A body becomes a chat's =========================================================


PLACES = [("stop", "stop_sequences"), ("response_format.json_schema", "output_config.format"),
          ("response_format", "output_config.format")]


def receive(handler: server.Handler, body, target) -> None:
    """Make the body of a chat, refused or ready before the model must be there. Raises ApiError."""
    if not isinstance(body, CountBody):
        return
    reading, wanted = server.Reading(handler.server.house), body.output_config or OutputConfig()
    turns = read_turns(body.system, body.messages, reading)
    tools, places = read_tools(body.tools, reading)
    handler.tally.ignored += reading.ignored
    handler.answer_headers["request-id"] = handler.tally.id
    effort, kind = wanted.effort, body.thinking and body.thinking.type
    effort = {"disabled": "none", "enabled": effort or "medium"}.get(kind, effort)
    body.places = [*turns.places, *places, *PLACES]
    body.chat = protocols.read_chat(handler, {
        "model": body.model, "messages": turns.messages, "tools": tools or None,
        "reasoning_effort": EFFORTS.get(effort, effort),
        "reasoning_budget": body.thinking.budget_tokens if kind == "enabled" else None,
        "response_format": {"type": "json_schema", "json_schema": {
            "name": "reply", "schema": wanted.format.schema}} if wanted.format else None,
        **(body.tool_choice.fields() if body.tool_choice else {}), **body.own_fields()},
        body.places, target)


# ==== 3. A chat's chunks become a message's blocks =======================================


class Message(protocols.Story):
    """A message of the assistant's."""

    def __init__(self, body: MessagesBody, wanted: server.Chat):
        super().__init__(wanted, {
            "id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant",
            "model": body.model or wanted.model.name, "content": [], "stop_reason": None,
            "stop_sequence": None})
        self.shows = not (body.thinking and body.thinking.display == "omitted")  # thinking

    def usage(self) -> dict:
        """Counts of tokens: what was cached is not among the input's."""
        n_prompt, n_cached, n_reply, n_thought = self.counts()
        return {"input_tokens": n_prompt - n_cached, "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": n_cached, "output_tokens": n_reply,
                "output_tokens_details": {"thinking_tokens": n_thought}}

    def start(self) -> Iterator[dict]:
        """As Story.start."""
        self.reply["usage"] = {**self.usage(), "output_tokens": 0, "service_tier": "standard"}
        yield {"type": "message_start", "message": self.reply}

    def open(self, call: dict) -> Iterator[dict]:
        """As Story.open."""
        self.block = {"text": {"type": "text", "text": ""},
                      "reasoning": {"type": "thinking", "thinking": "", "signature": ""},
                      "call": {"type": "tool_use", "id": call.get("id"), "name": call.get(
                          "function", {}).get("name"), "input": {}}}[self.kind]
        yield {**self.at("start"), "content_block": self.block}

    def add(self, text: str, logprobs: list[dict]) -> Iterator[dict]:
        """As Story.add."""
        kind, field = {"text": ("text_delta", "text"), "call": ("input_json_delta", "partial_json"),
                       "reasoning": ("thinking_delta", "thinking")}[self.kind]
        if self.kind != "reasoning" or self.shows:
            yield {**self.at("delta"), "delta": {"type": kind, field: text}}

    def close(self, is_whole: bool) -> Iterator[dict]:
        """As Story.close."""
        text = "".join(self.texts)
        if self.kind == "text":
            self.block["text"] = text
        elif self.kind == "call":
            self.block["input"] = read_input(text)
        else:
            self.block |= {"thinking": text if self.shows else "", "signature": SIGNATURE}
            yield {**self.at("delta"), "delta": {"type": "signature_delta", "signature": SIGNATURE}}
        yield self.at("stop")
        self.reply["content"].append(self.block)

    def end(self, reason: str) -> Iterator[dict]:
        """As Story.end."""
        found = self.wanted.choices[0].stopped_by if reason == "stop" else ""
        said = {"stop_reason": {"tool_calls": "tool_use", "length": "max_tokens"}.get(
            reason, "stop_sequence" if found else "end_turn"), "stop_sequence": found or None}
        self.reply |= said
        self.reply["usage"] |= self.usage()
        yield {"type": "message_delta", "delta": said, "usage": self.usage()}
        yield {"type": "message_stop"}

    def at(self, what: str) -> dict:
        """An event of the block that is open."""
        return {"type": f"content_block_{what}", "index": len(self.reply["content"])}


def read_input(arguments: str) -> dict:
    """What a call gives its function; {} where it was cut off."""
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return {}


# ==== 4. Routes ==========================================================================

ERRORS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
          408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error",
          503: "overloaded_error", 504: "timeout_error"}


class MessagesDialect(protocols.NamedEvents):
    """Errors and signs of life, by https://docs.anthropic.com/en/api/errors."""

    def error(self, error: server.ApiError) -> dict:
        """As Dialect.error."""
        kind = ERRORS.get(error.status, "api_error" if error.status >= 500 else
                          "invalid_request_error")
        # Clients know by these words when to make a conversation shorter.
        words = "prompt is too long: " * (error.code == "context_length_exceeded")
        return {"type": "error", "error": {"type": kind, "message": words + error.message}}

    def sign(self, text: str, data: dict | None) -> bytes:
        """A sign of life."""
        return self.event({"type": "ping"})


MESSAGES = MessagesDialect()


def post_message(handler: server.Handler, body: MessagesBody) -> None:
    """A reply, streamed or not. Raises ApiError."""
    protocols.answer(handler, body.chat, body.places, functools.partial(Message, body))


def post_count(handler: server.Handler, body: CountBody) -> None:
    """The tokens of a prompt. Raises ApiError."""
    handler.send_json({"input_tokens": protocols.count_tokens(handler, body.chat, body.places)})


def get_models(handler: server.Handler, *name: str) -> None:
    """The models, or one, as the client's API has them. Errors are OpenAI's: the path is."""
    if "anthropic-version" not in handler.headers:
        return handler.get_model(*name) if name else handler.get_models()
    models = handler.server.models
    models.check()
    entries = [models.find(each).entry(each) for each in name] or models.entries(handler)
    data = [{"type": "model", "id": entry["id"], "display_name": entry["id"], "created_at":
             time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(entry["created"]))}
            for entry in entries]
    handler.send_json(data[0] if name else {
        "data": data, "has_more": False, "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None})


def start(running: "server.Server") -> None:
    """Let both APIs' clients see the models at the one path that they have in common."""
    routes = running.house.routes
    for key in (("GET", "/v1/models"), ("GET", "/v1/models/{id}")):
        routes[key] = dataclasses.replace(routes[key], answer=get_models)


ROUTES = {
    ("POST", "/v1/messages"): server.Route(
        post_message, "conversations in the Anthropic API", MessagesBody, dialect=MESSAGES),
    ("POST", "/messages"): server.Route(
        post_message, "as /v1/messages", MessagesBody, dialect=MESSAGES),
    ("POST", "/v1/messages/count_tokens"): server.Route(
        post_count, "the tokens of such a conversation", CountBody, dialect=MESSAGES),
}
