"""Engines elsewhere: models that another OpenAI-compatible server runs, under names of ours.

What for: one address for the small model on this machine and the large one on another box, in vLLM,
llama-server or LM Studio. How it works: a request for such a model is passed on as it came but for
the model's name, and the reply as it arrives, byte by byte; who hangs up here hangs up there. An
entry of `models` with a `base_url` is such a model; `openai_base_url` takes all names that nobody
here has. It costs a connection per request and no model. It reads the settings `openai_base_url`
and `openai_api_key` and the entries' `base_url`, `api_key`, `model` and `timeout`, and sends
requests there.
"""

import contextlib
import dataclasses
import http.client
import json
import math
import re
import secrets
import threading
import time
import urllib.parse
import weakref
from collections.abc import Iterator

import server
from features.web import Unreachable, read_all, read_lines, read_pieces, request_elsewhere

NEEDS = ("models",)
LIST_SECONDS = 5.0  # for the list of models elsewhere
PASSED_ON = ("Content-Type", "Content-Encoding", "Retry-After", "Location")  # of its headers
MAX_FAR_LINE = 2**20  # bytes of an event from an engine elsewhere
MAX_FAR_BODY = 2**26  # bytes of a reply of its that we read, in place of passing it on
OTHERS = "upstream"  # the name of the one in openai_base_url

# By server, how it names itself in what it relays (RFC 9110, 7.6.3).
names: "weakref.WeakKeyDictionary[server.Server, str]" = weakref.WeakKeyDictionary()


@dataclasses.dataclass
class Settings:
    """Where models are that have no name here."""

    openai_base_url: str | None = server.setting("model", None)
    openai_api_key: str | None = server.setting("model", None, secret=True)

    def check(self, _at: str) -> None:
        """Refuse an address that cannot be used."""
        check_upstream("openai_base_url", self.openai_base_url, self.openai_api_key)


@dataclasses.dataclass
class FarEntry:
    """What an entry of `models` may say of an engine elsewhere."""

    base_url: str | None = None
    api_key: str | None = server.option(secret=True)
    model: str | None = None  # its name there
    timeout: float | None = server.option(low=0.1, high=server.DAY)

    def is_here(self) -> bool:
        """Whether it is a model of this machine."""
        return self.base_url is None

    def check(self, at: str) -> None:
        """Refuse what is neither here nor there, or both."""
        local = self.given_settings()
        if self.base_url and self.model_path:
            raise server.invalid(at, f"{at}: name either a model_path or a base_url")
        if self.base_url and local:
            raise server.invalid(at, f"{at}: {min(local)} means nothing beside a base_url")
        for name in ("api_key", "model", "timeout"):
            if self.base_url is None and getattr(self, name) is not None:
                raise server.invalid(at, f"{at}: {name} means nothing beside a model_path")
        check_upstream(f"{at}.base_url", self.base_url, self.api_key)


FIELDS = {"ModelEntry": FarEntry}


def check_upstream(at: str, base_url: str | None, api_key: str | None) -> None:
    """Refuse an address or key that cannot be used."""
    if base_url is not None:
        try:
            is_right = re.fullmatch(r"https?://[^\s/@?#]+(/[^\s?#]*)?", base_url) \
                and urllib.parse.urlsplit(base_url).port != 0
        except ValueError:  # [abc, or port 99999
            is_right = False
        if not is_right:
            raise server.invalid(at, f"{at}: must be like http://box:8000/v1, without user or "
                                 "query")
    if api_key is not None and not re.fullmatch("[!-~]+", api_key):
        raise server.invalid(at, f"{at}: the key beside it must be printable ASCII without spaces")


@dataclasses.dataclass(frozen=True)
class Upstream:
    """An engine elsewhere: any OpenAI-compatible server."""

    name: str
    base_url: str
    api_key: str | None = None
    model: str | None = None  # what it calls the model; None: as the request does
    timeout: float = 600.0  # seconds without a byte from it

    def answer(self, handler, route, sent: dict, body: bytes) -> None:
        """Pass a request on as it came, but for the model's name."""
        relay(handler, self, sent, body)

    def entry(self, name: str) -> dict:
        """Its entry in the list of models."""
        return {"id": name, "object": "model", "created": server.STARTED, "owned_by": self.name,
                "root": self.model or name, "parent": None}

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def mask(self, text: str) -> str:
        """A text of its for our clients and the log: it may quote our key."""
        return text.replace(self.api_key, "***") if self.api_key else text


class FarModels(server.Models):
    """Models, some of whose names stand for engines elsewhere."""

    def __init__(self, config: server.Config, house: server.House, stopping: threading.Event):
        super().__init__(config, house, stopping)
        for name, entry in config.models.items():
            if entry.base_url:
                chosen = {key: value for key in ("api_key", "model", "timeout")
                          if (value := getattr(entry, key)) is not None}
                self.named[name] = Upstream(name, entry.base_url.rstrip("/"),
                                            **{"model": name, **chosen})
        if config.openai_base_url:
            self.named[server.ANY] = Upstream(OTHERS, config.openai_base_url.rstrip("/"),
                                              config.openai_api_key)
        for upstream in self.named.values():
            print(f"elsewhere: {upstream.name} at {upstream.base_url}", flush=True)
            if not urllib.parse.urlsplit(upstream.base_url).path:
                server.log.warning("warning: the address of %s has no path; most servers want /v1 "
                                   "behind it", upstream.name)
        if config.openai_base_url:
            print("models without a name here are looked for at "
                  f"{self.named[server.ANY].base_url}", flush=True)

    is_over = False  # what is under way has had its time

    def close(self) -> bool:
        """As Models.close."""
        self.is_over = True
        return super().close()

    def find(self, name: str | None):
        """As Models.find; the engine that has all other names is asked for this one."""
        target = super().find(name)
        if isinstance(target, Upstream) and target.model is None:
            return dataclasses.replace(target, model=name)
        return target

    def entries(self, handler) -> list[dict]:
        """As Models.entries."""
        return super().entries(handler) + self.others(handler)

    def others(self, handler) -> list[dict]:
        """The models that the engine for all other names lists, but for names that are known here;
        none when it does not answer, but a warning."""
        upstream = self.named.get(server.ANY)
        if not isinstance(upstream, Upstream):
            return []
        try:
            listed, known = list_elsewhere(handler, upstream), self.names()
        except server.ApiError as error:
            server.log.warning("%s cannot list the models elsewhere: %s", handler.tally.id, error)
            return []
        return [entry for entry in listed if entry["id"] not in known]


METHODS = {"Models": FarModels}


def list_elsewhere(handler, upstream: "Upstream") -> list[dict]:
    """The entries of an engine's own list of models. Raises ApiError."""
    with ask(handler, upstream, "GET", "/models", None, seconds=LIST_SECONDS) as response:
        if response.status != 200:
            raise server.ApiError(502, f"{upstream.name} answers {response.status} when asked for "
                                  "its models")
        try:
            entries = json.loads(read_all(response, MAX_FAR_BODY))["data"]
            return [entry for entry in entries if isinstance(entry["id"], str)]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise server.ApiError(502, f"{upstream.name} sent no list of models") from None


def relay(handler, upstream: "Upstream", sent: dict, body: bytes) -> None:
    """Pass a request on as it came, but for the model's name, and the reply as it arrives."""
    path = handler.path.rstrip("/").removeprefix("/v1")
    if ("POST", f"/v1{path}") not in handler.server.house.routes:
        raise server.invalid("model", f"{server.describe(sent.get('model'))} is an engine "
                             f"elsewhere; it takes /v1 and /chat, not {server.describe(path)}")
    handler.streams = sent.get("stream") is True
    handler.receive(sent, upstream)
    if upstream.model not in (None, sent.get("model")):
        body = for_upstream(upstream, sent)
    with ask(handler, upstream, "POST", path, body) as response:
        headers = {name: " ".join(value.split()) for name in PASSED_ON
                   if (value := response.headers.get(name))}
        if response.status in (204, 205, 304):  # they have no body, and no length
            return handler.send_head(response.status, headers)
        if response.length is None:
            handler.start_stream(headers, response.status)
        else:
            handler.send_head(response.status, {**headers, "Content-Length": str(response.length)})
            handler.is_chunked = False
        try:
            for piece in read_pieces(response):
                handler.write_piece(piece)
        except (http.client.HTTPException, TimeoutError, server.ApiError):
            if handler.has_events:
                handler.write_piece(b"\n\n")  # behind half a line: the error is its own event
            raise
        handler.write_piece(b"", is_last=True)


def for_upstream(upstream: Upstream, sent: dict) -> bytes:
    """A body with the model's name there. Raises ApiError."""
    named = {**sent, "model": upstream.model or sent.get("model")}
    try:
        return json.dumps(named, allow_nan=False).encode()
    except ValueError:  # such as 1e999
        raise server.ApiError(400, "bad JSON: a number is too large", code="invalid_json") from None


@contextlib.contextmanager
def ask(handler, upstream: Upstream, method: str, path: str, body: bytes | None,
        seconds: float | None = None,
        reads_errors: bool = False) -> Iterator[http.client.HTTPResponse]:
    """The response of an engine elsewhere, while our client is there. seconds: for all of
    it, besides its timeout. reads_errors: its refusals are errors here, too. Raises ApiError."""
    via, until = handler.headers.get("via", ""), time.monotonic() + (seconds or math.inf)
    own = names.setdefault(handler.server, f"1.1 {server.NAME}-{secrets.token_hex(4)}")
    if own in via:
        raise server.ApiError(508, f"{upstream.name} leads back to this server", code="relay_loop")
    handler.tally.notes["upstream"] = upstream.name
    headers = {"Content-Type": "application/json", **upstream.headers(),
               "Via": f"{via}, {own}" if via else own}

    def check() -> None:
        handler.check_connection()
        if handler.server.models.is_over:
            raise server.unavailable("the server is shutting down", "shutting_down")
        if time.monotonic() > until:
            raise TimeoutError

    try:
        with request_elsewhere(method, upstream.base_url + path, body, headers,
                               upstream.timeout, check) as response:
            if response.status >= 400 and reads_errors:
                wait = response.headers.get("Retry-After")
                text = upstream.mask(error_in(read_all(response, MAX_FAR_LINE)))
                raise server.ApiError(response.status, f"{upstream.name}: {text}",
                               headers={"Retry-After": wait} if wait else None)
            yield response
    except TimeoutError:
        raise server.ApiError(504, f"{upstream.name} sent nothing for "
                            f"{seconds or upstream.timeout:g} seconds",
                       code="upstream_timeout") from None
    except Unreachable as error:
        raise server.ApiError(502, f"Could not connect to {upstream.name}: {error}",
                       code="upstream_unreachable") from None
    except http.client.HTTPException as error:
        raise server.ApiError(502, f"{upstream.name} broke off or sent no HTTP: "
                            f"{type(error).__name__}", code="upstream_failed") from None


@dataclasses.dataclass
class FarDelta:
    """What a chunk from an engine elsewhere adds to a choice."""

    content: str | None = None


@dataclasses.dataclass
class FarChoice:
    """One choice in such a chunk."""

    delta: FarDelta | None = None
    finish_reason: str | None = None


@dataclasses.dataclass
class FarUsage:
    """The token counts of the whole reply."""

    completion_tokens: int | None = None


@dataclasses.dataclass
class FarChunk:
    """A chunk of a chat completion; what an app's reply has no place for is left out."""

    choices: list[FarChoice] | None = None
    usage: FarUsage | None = None


def read_chunks(response: http.client.HTTPResponse, upstream: "Upstream",
                house: "server.House") -> Iterator[dict]:
    """The chunks of a streamed chat completion. Raises ApiError."""
    for line in read_lines(response, MAX_FAR_BODY):
        if not line.startswith(b"data:"):
            continue
        text = line.removeprefix(b"data:").strip()
        if text == b"[DONE]":
            return
        try:
            chunk = json.loads(text)
            if isinstance(chunk, dict) and chunk.get("error"):
                raise server.ApiError(502, upstream.mask(f"{upstream.name}: {error_in(text)}"))
            yield dataclasses.asdict(server.read_value(
                FarChunk, chunk, "the event", {}, server.Reading(house)))
        except (ValueError, RecursionError):
            raise server.ApiError(502, f"{upstream.name} sent an event that is not JSON") from None
        except server.ApiError as error:
            raise error if error.status == 502 else server.ApiError(
                502, upstream.mask(f"{upstream.name} sent an odd event: {error.message}")) from None
    raise server.ApiError(502, f"{upstream.name} broke off")


def error_in(body: bytes) -> str:
    """The message in an error's body, whoever wrote it."""
    try:
        sent = json.loads(body)
        error = sent.get("error", sent.get("detail", sent))
        return str(error["message"] if isinstance(error, dict) and "message" in error else error)
    except (ValueError, AttributeError, RecursionError):
        return server.printable(body.decode("utf-8", "replace"))
