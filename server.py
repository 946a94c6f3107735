"""The server: HTTP in, OpenAI JSON checked by dataclasses, tokens out as they come.

This file is all of HTTP; engine.py knows nothing of it. What not every server needs is a feature: a
file in features/, which plugs in at part 4 if the settings name it. Parts 1 to 9 are what must be
known first; a request begins in part 10.

A chat's way: the Server gives its connection a thread, `Connection.handle_one_request` reads its
head, `Handler.answer` its body, and checks it; `Models.find` names who answers, `LocalModel.answer`
makes a ChatBody of it, `Chat` a prompt; `Handler.generate` submits that, and writes what
`Handler.events` and `Chat.chunks` yield.

Threads: the main thread waits for the end; others load the model and wait for new connections; each
connection has one that handles its requests, and each engine has its own.
"""

import argparse
import collections
import contextlib
import dataclasses
import email.errors
import functools
import hmac
import http.server
import importlib
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import queue
import re
import secrets
import select
import signal
import socket
import socketserver
import sys
import threading
import time
import types
import typing
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

import engine

NAME, VERSION = "twofile", "0.1.0"
HERE = Path(__file__).resolve().parent
INT32_MAX = 2**31 - 1  # what fits the C API's int
MAX_N_CTX = 2**23  # tokens; times 256 slots that fits llama.cpp's 32 bits
DAY = 86400.0  # seconds
STARTED = int(time.time())
log = logging.getLogger("server")

# ==== 1. Settings =======================================================================


def setting(section: str, default, **limits):
    """A field of Config or of a feature's Settings. limits: see part 3; path: it names a file."""
    return dataclasses.field(default=default, metadata={"section": section, **limits})


def option(default=None, **limits):
    """An optional field of a body, with its limits."""
    return dataclasses.field(default=default, metadata=limits)


@dataclasses.dataclass
class Config:
    """Every setting of the two files; features add theirs. Keys are unique, sections optional."""

    features: list[str] = setting("features", ())
    host: str = setting("server", "127.0.0.1", like=(r"\S+", "an address, such as 127.0.0.1"))
    port: int = setting("server", 8080, low=0, high=65535)
    allowed_hosts: list[str] = setting("server", (), like=(
        r"[^\s/:@]+|\[\S+\]", "like box.example, without a port"))
    max_body_mb: float = setting("server", 16.0, low=0.001, high=1024)
    max_queue: int = setting("server", 128, low=1)
    client_timeout: float = setting("server", 60.0, low=0.1, high=DAY)
    keep_alive_timeout: float = setting("server", 75.0, low=0.1, high=DAY)
    stall_seconds: float = setting("server", 120.0, low=1, high=DAY)
    drain_seconds: float = setting("server", 30.0, low=0, high=DAY)

    auth_enabled: bool | None = setting("auth", None)
    api_keys: list[str] = setting("auth", (), secret=True, like=(
        "[!-~]+", "printable ASCII without spaces"))
    public_metrics: bool = setting("auth", False)

    model_path: str | None = setting("model", None, path="file")
    model_aliases: list[str] = setting("model", ())
    n_ctx: int = setting("model", 4096, low=0, high=MAX_N_CTX)
    parallel: int = setting("model", 4, low=1, high=256)  # llama.cpp's LLAMA_MAX_SEQ
    n_batch: int = setting("model", 256, low=1, high=2**16)
    n_ubatch: int = setting("model", 512, low=1, high=2**16)
    prefill_chunk: int = setting("model", 96, low=1)
    n_threads: int = setting("model", 0, low=0, high=512)  # ggml's GGML_MAX_N_THREADS
    n_gpu_layers: int = setting("model", -1, low=-1, high=INT32_MAX)
    flash_attn: bool | Literal["auto"] = setting("model", "auto")
    chat_template_file: str | None = setting("model", None, path="file")

    max_tokens: int | None = setting("generation", 1024, low=1)
    temperature: float = setting("generation", 0.7, low=0, high=2)
    top_p: float = setting("generation", 0.95, low=0, high=1)
    top_k: int = setting("generation", 40, low=-1, high=INT32_MAX)
    min_p: float = setting("generation", 0.05, low=0, high=1)

    def check(self, _at: str) -> None:
        """Refuse what settings together make impossible."""
        if self.parallel > self.n_batch:
            raise invalid("n_batch", f"n_batch is {self.n_batch} but must be at least parallel "
                                     f"({self.parallel}): each slot needs a row in the batch")
        if self.auth_enabled and not self.api_keys:
            raise invalid("auth_enabled", "auth is enabled, but there are no api_keys")


class ConfigError(Exception):
    """A setting is wrong; the message says where, what was found, and what is allowed."""


def load_config(argv: list[str], environ: Mapping[str, str]) -> Config:
    """Defaults, then config.yaml, what features read of the environment, flags; the later wins.
    Raises ConfigError; exits like argparse for a bad flag or --help."""
    parser = argparse.ArgumentParser(prog="server.py", description=__doc__.splitlines()[0])
    parser.add_argument("--config", help="settings file (default: config.yaml beside server.py)")
    parser.add_argument("--host", help="address to listen on")
    parser.add_argument("--port", type=int, help="port to listen on, 0 for any free one")
    parser.add_argument("--model", dest="model_path", help="model_path: a GGUF file, or a folder")
    parser.add_argument("--version", action="version", version=f"{NAME} {VERSION}")
    flags = vars(parser.parse_args(argv))
    named = flags.pop("config")
    file = Path(named or HERE / "config.yaml")
    content = read_yaml(file) if named or file.exists() else {}
    # Which features there are decides which settings there are.
    house = load_features(content.get("features") or [], environ)
    found = house.read_settings(file, content, environ)
    found |= {name: ("flag", value) for name, value in flags.items() if value is not None}
    values, reading = {name: value for name, (_, value) in found.items()}, Reading(house)
    try:
        config = read_object(house.Config, values, "", reading)
        if reading.ignored:
            raise invalid(reading.ignored[0], f"unknown key {reading.ignored[0]!r}")
        return config
    except ApiError as error:
        source, _ = found.get(re.split(r"[.\[]", error.param)[0], ("settings", None))
        raise ConfigError(f"{source}: {error.message}") from error


class OnceLoader(yaml.SafeLoader):
    """YAML, but no key stands twice in a mapping: SafeLoader would take the last."""

    def construct_mapping(self, node, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for number, (key, _) in enumerate(node.value):
            if key.value in keys[:number]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {describe(key.value)} is there twice", key.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> dict:
    """What a settings file holds. Raises ConfigError, which quotes no line: it may have a key."""
    try:
        content = yaml.load(file.read_text("utf-8-sig"), OnceLoader) or {}
    except Exception as error:  # not only YAMLError: 2024-13-45 is no date, [[[[... too deep
        mark = getattr(error, "problem_mark", None)
        why = f"line {mark.line + 1}: {error.problem}" if mark else str(error)
        raise ConfigError(f"cannot read {file}: {' '.join(why.split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected `key: value` lines")
    return content


# ==== 2. Errors =========================================================================

RETRY_SOON = {"Retry-After": "2"}  # seconds: about one short reply
LINE_ENDS = "\x85\u2028\u2029"  # in a JSON string, to some readers; json.dumps escapes \n and \r
MAX_LINE = 200  # characters of what a client sent that are told again, to it or in the log


class ApiError(Exception):
    """A refusal that is also its own response: Dialect.error writes it."""

    def __init__(self, status: int, message: str, param: str | None = None,
                 code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}


def invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """400: a field has a wrong type or value."""
    return ApiError(400, message, param, code)


def unavailable(message: str, code: str) -> ApiError:
    """503: come back in a moment."""
    return ApiError(503, message, code=code, headers=RETRY_SOON)


def to_json(value) -> bytes:
    """Compact JSON on one line, UTF-8."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for end in LINE_ENDS:
        text = text.replace(end, f"\\u{ord(end):04x}")
    return text.encode(errors="replace")  # an error may quote half a character


def printable(text: str) -> str:
    """A client's text for the log: one line, not too long, no escape sequences."""
    return "".join(char if char.isprintable() else "?" for char in text[:MAX_LINE])


# ==== 3. Validation: JSON into dataclasses ==============================================
# A field's type says what JSON it takes. Its metadata may say:
#   low, high              inclusive limits of a number, also inside a list or object
#   min_length, max_length items of a list
#   like                   a pattern that strings follow, and in words what does
#   secret                 no message shows a value

KINDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
UNIONS = (typing.Union, types.UnionType)


@dataclasses.dataclass
class Reading:
    """What belongs to one reading of a body: which types there are, and what was ignored."""

    house: "House"
    ignored: list[str] = dataclasses.field(default_factory=list)  # fields that nobody knows


def describe(value, most: float = 60) -> str:
    """A value as JSON on one line, cut after `most` characters, nothing in it unprintable."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (RecursionError, TypeError, ValueError):  # YAML knows keys and cycles that JSON doesn't
        text = f"a {type(value).__name__} that is no JSON"
    text = text if len(text) <= most else text[:most] + "..."
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)


def expected(hint) -> str:
    """A type in words: `str | list[int]` is "a string or a list (each item an integer)"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in UNIONS:
        return " or ".join(expected(arg) for arg in args if arg is not types.NoneType)
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is list:
        return f"a list (each item {expected(args[0])})"
    return KINDS.get(hint, "an object")


def read_value(hint, value, at: str, limits: Mapping, reading: Reading):
    """Return `value` as the type `hint`, or raise a 400 that names the place `at`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    reason = None
    if hint in (bool, types.NoneType) and isinstance(value, hint):
        return value
    if hint is Any or hint is str and isinstance(value, str):
        try:  # a text, or for features anything; JSON's \ud800 can smuggle in half a character
            text = value if hint is str else json.dumps(value, ensure_ascii=False, allow_nan=False)
            text.encode()
        except (ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
            raise invalid(at, f"{at}: is not JSON with valid Unicode: {error}"[:MAX_LINE]) from None
        pattern, example = limits.get("like", ("(?s:.*)", ""))
        if hint is str and not re.fullmatch(pattern, value):
            sent = "what was sent" if limits.get("secret") else describe(value)
            raise invalid(at, f"{at}: {sent} must be {example}")
        return value
    if origin is Literal and value in args and type(value) in map(type, args):
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return read_object(reading.house.type_of(hint), value, at, reading)
    if origin is list and isinstance(value, list):
        low, high = limits.get("min_length", 0), limits.get("max_length", math.inf)
        if not low <= len(value) <= high:
            bounds = f"at least {low}" if len(value) < low else f"at most {high}"
            raise invalid(at, f"{at} must have {bounds} items, got {len(value)}")
        return [read_value(args[0], item, f"{at}[{i}]", limits, reading)
                for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {read_value(str, key, at, {}, reading): read_value(
            args[1], item, f"{at}.{key}", limits, reading) for key, item in value.items()}
    if hint in (int, float) and type(value) in (int, float) and (hint is float or value % 1 == 0):
        low, high = limits.get("low", -math.inf), limits.get("high", math.inf)
        if not low <= value <= high:
            bounds = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise invalid(at, f"{at} must be {bounds}, got {describe(value)}")
        return hint(value)
    if origin in UNIONS:  # the first that fits; else the one of the same JSON kind knows why not
        for each in args:
            try:
                return read_value(each, value, at, limits, reading)
            except ApiError as error:
                if error.code != "invalid_type" or error.param != at:
                    reason = reason or error
    got = "something else" if limits.get("secret") else describe(value)
    raise reason or invalid(at, f"{at}: expected {expected(hint)}, got {got}", "invalid_type")


def read_object(cls, value: dict, at: str, reading: Reading):
    """An instance of dataclass `cls`; fields that nobody knows are noted as ignored."""
    prefix, hints, fields = f"{at}." if at else "", reading.house.hints(cls), {}
    reading.house.check_unknown(cls, value, prefix)
    for field in dataclasses.fields(cls):
        name, sent = prefix + field.name, value.get(field.name)
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in value:
            raise invalid(name, f"{name} is required", "missing_field")
        if sent is not None or required:
            fields[field.name] = read_value(hints[field.name], sent, name, field.metadata, reading)
        elif field.name in value and "section" in field.metadata and type(None) in typing.get_args(
                hints[field.name]):  # null means "not given"; in the settings also "none"
            fields[field.name] = None
    reading.ignored += [f"{prefix}{name}" for name in value if name not in hints]
    whole = cls(**fields)
    for each in cls.__mro__:  # what no single field can tell
        if "check" in vars(each):
            each.check(whole, at)
    return whole


# ==== 4. Features: files that plug in ====================================================


class House:
    """What features add to the two files: here, nothing. features/__init__.py has the one for
    those that are switched on; docs/features.md tells what a feature may export."""

    def __init__(self):
        self.Config: type[Config] = self.type_of(Config)
        self.settings = {field.name: field.metadata for field in dataclasses.fields(self.Config)}
        self.routes = functools.reduce(dict.__or__, self.having("ROUTES"), ROUTES)
        self.dialects = {path: route.dialect for (_, path), route in self.routes.items()}

    def having(self, name: str) -> list:
        """What the features export under a name, in their order."""
        return []

    def type_of(self, cls: type) -> type:
        """A class with what features add to it and to those that it is made of."""
        return cls

    hints = staticmethod(functools.cache(typing.get_type_hints))  # of a dataclass's fields

    def read_settings(self, file: Path, content: dict, environ: Mapping[str, str]
                      ) -> dict[str, tuple[str, Any]]:
        """{key: (where it was set, value)}: here, only in a file. Raises ConfigError."""
        sections = {metadata["section"] for metadata in self.settings.values()} - {*self.settings}
        found: dict[str, tuple[str, Any]] = {}
        for key, inner in content.items():
            is_section = key in sections and isinstance(inner, dict | None)
            for name, value in ((inner or {}) if is_section else {key: inner}).items():
                if name in found:
                    raise ConfigError(f"{file}: {name} is set twice")
                if is_section and self.settings.get(name, {"section": key})["section"] != key:
                    raise ConfigError(f"{file}: {name} does not belong in section {key}")
                found[str(name)] = str(file), self.located(name, value, file)
        return found

    def located(self, name: str, value, file: Path):
        """A setting as a file has it; a relative path begins at the file's folder."""
        is_path = "path" in self.settings.get(name, ()) and isinstance(value, str)
        return str(file.parent / os.path.expanduser(value)) if is_path else value

    def check_unknown(self, cls: type, sent: dict, prefix: str) -> None:
        """400 for a field that a feature would honour, but is off; here none is known."""


def load_features(names, environ: Mapping[str, str] = types.MappingProxyType({})) -> House:
    """The house with the features of these names. Raises ConfigError."""
    if (HERE / "features" / "__init__.py").is_file():
        return importlib.import_module("features").load(names, environ)
    if names:
        raise ConfigError(f"features: {describe(names)}: there is no {HERE}/features/__init__.py")
    return House()


# ==== 5. Bodies: what a client may send =================================================
# Field by field from https://platform.openai.com/docs/api-reference


@dataclasses.dataclass
class Part:
    """One part of a message's content; a refusal is what the assistant said, too."""

    type: Literal["text", "refusal"]
    text: str = ""
    refusal: str = ""

    def check(self, _at: str) -> None:
        """Take a refusal for text."""
        if self.type == "refusal":
            self.type, self.text = "text", self.refusal


@dataclasses.dataclass
class Message:
    """One turn of a conversation. `developer` is OpenAI's newer name for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None

    def check(self, at: str) -> None:
        """Refuse what says nothing."""
        if self.content is None:
            raise invalid(f"{at}.content", f"{at}.content is required", "missing_field")


@dataclasses.dataclass
class StreamOptions:
    """What a stream carries besides the text."""

    include_usage: bool = False


@dataclasses.dataclass
class GenerationBody(engine.SamplingParams):
    """What chat and plain completions have in common, besides how to choose tokens."""

    model: str | None = None
    max_tokens: int | None = option(low=1)
    n: int = option(1, low=1, high=128)
    stop: str | list[str] | None = option(max_length=16, like=(
        "(?s:.{1,1000})", "1 to 1000 characters long"))
    stream: bool = False
    stream_options: StreamOptions | None = None

    def check(self, _at: str) -> None:
        """Refuse what fields together make impossible."""
        if self.stream_options and not self.stream:
            raise invalid("stream_options", "stream_options needs stream: true")


@dataclasses.dataclass
class ChatBody(GenerationBody):
    """POST /v1/chat/completions"""

    messages: list[Message] = dataclasses.field(kw_only=True, metadata={"min_length": 1})
    max_completion_tokens: int | None = option(low=1)

    def check(self, _at: str) -> None:
        """The newer name wins over the older one."""
        self.max_tokens = given(self.max_completion_tokens, self.max_tokens)


MAX_CHOICES = 512  # replies to one request: prompts times n
DEFAULTED = ("temperature", "top_p", "top_k", "min_p")  # settings, where a body does not say
LEGACY_MAX_TOKENS = 16  # the OpenAI reference's default for /v1/completions


@dataclasses.dataclass
class CompletionBody(GenerationBody):
    """POST /v1/completions"""

    prompt: str | list[str] = dataclasses.field(kw_only=True, metadata={
        "min_length": 1, "max_length": MAX_CHOICES})
    max_tokens: int | None = option(LEGACY_MAX_TOKENS, low=0)


# ==== 6. Sockets and addresses ===========================================================

MAX_TARGET = 65536  # bytes of a request line, and of each header (http.server's own limit)
SMALL_BODY = 65536  # bytes; read also where the request is refused, to keep the connection
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^][:/?#@\s]*)(:[0-9]*)?")


class DeadlineReader(io.RawIOBase):
    """The bytes from a socket, until a deadline: a client that sends one byte a second must not
    hold its thread for hours. Raises ApiError 408."""

    def __init__(self, connection: socket.socket):
        self.connection = connection

    def allow(self, seconds: float) -> None:
        """So long it may take from now on."""
        self.seconds, self.deadline = seconds, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        with contextlib.suppress(TimeoutError):
            if (left := self.deadline - time.monotonic()) > 0:
                self.connection.settimeout(left)
                return self.connection.recv_into(buffer)
        raise ApiError(408, f"the rest of the request did not arrive within {self.seconds:g} "
                            "seconds", code="request_timeout")


def read_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address without its zone, an IPv4 one also where it came as IPv6; None for a name."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def is_this_machine(name: str) -> bool:
    """Whether a host name or address means this machine, whatever a DNS server says."""
    address = read_address(name)
    return address.is_loopback if address else f".{name}".endswith(".localhost")


# ==== 7. Models: which names there are ===================================================

ANY = "*"  # among model_aliases: every name that nothing else has
POLL_SECONDS = 0.1  # how often who waits looks whether its client is still there


@dataclasses.dataclass(eq=False)
class LocalModel:
    """A model that can be loaded, and how it stands."""

    path: str | None  # as engine.find_model_file takes it
    settings: Config
    house: House
    engine: "engine.Engine | None" = None
    progress: float | None = None  # 0 to 1, while it loads

    def load(self, go_on: Callable[[], bool]) -> "engine.Engine":
        """Load it, and give it what features add. go_on: False interrupts. Raises ModelError."""
        def on_progress(fraction: float) -> bool:
            self.progress = fraction
            return go_on()

        path = engine.find_model_file(self.path, HERE / "models")
        log.info("loading %s", path.name)
        names = ("n_ctx", "parallel", "n_batch", "n_ubatch", "n_threads", "n_gpu_layers",
                 "flash_attn", "prefill_chunk", "max_queue", "chat_template_file")
        return engine.load_engine(path, on_progress=on_progress, equip=self.equip,
                                  **{name: getattr(self.settings, name) for name in names})

    def equip(self, loaded: "engine.Engine") -> None:
        """Give its engine what features add."""
        for give in self.house.having("equip"):
            give(loaded, self.settings)

    def answer(self, handler: "Handler", route: "Route", sent: dict, body: bytes) -> None:
        """Read a request for this model, and answer it while the model stays loaded."""
        request = handler.read_fields(route.reads, sent)
        handler.receive(request, self)
        with handler.lease(self):
            route.answer(handler, request)

    def entry(self, name: str) -> dict:
        """Its entry in the list of models; `max_model_len`, as vLLM has it, once it is loaded."""
        loaded = self.engine  # read once: it may be unloaded right now
        return {"id": name, "object": "model", "created": STARTED, "owned_by": NAME,
                **({"max_model_len": loaded.n_ctx} if loaded else {})}


class Models:
    """The models that requests may name: here one, which is loaded at the start and stays."""

    is_starting = True  # until the default model has been loaded

    def __init__(self, config: Config, house: House, stopping: threading.Event):
        """stopping: ends everything; set here where the model cannot be loaded."""
        self.config, self.house, self.stopping = config, house, stopping
        # Who answers: it has an `entry` and an `answer` like LocalModel's.
        self.default: Any = house.type_of(LocalModel)(config.model_path, config, house)
        self.named: dict[str, Any] = {}  # by name; ANY: who has the names that are not known
        self.fatal_error: str | None = None

    def start(self) -> None:
        """Load the model. Where that fails, `fatal_error` says why, and `stopping` is set."""
        try:
            loaded = self.default.load(lambda: not self.stopping.is_set())
            names = [loaded.model.name, *self.config.model_aliases]
            self.named |= dict.fromkeys(names, self.default)
            self.default.engine, self.is_starting = loaded, False
        except Exception as error:
            if not self.stopping.is_set():  # else that interrupted the loading
                if not isinstance(error, engine.ModelError):
                    log.exception("loading the model failed")
                self.fatal_error = str(error)
                self.stopping.set()

    def check(self) -> None:
        """Raise ApiError when everything stops, or before the default model has been loaded."""
        if self.stopping.is_set():
            raise unavailable("the server is shutting down", "shutting_down")
        if self.is_starting:
            raise unavailable(f"the model is still loading ({self.default.progress or 0:.0%}), try "
                              "again soon", "loading")

    def names(self) -> dict[str, Any]:
        """Every name that is known, and what it stands for."""
        return {name: target for name, target in self.named.items() if name != ANY}

    def entries(self, handler: "Handler") -> list[dict]:
        """The list of models."""
        return [target.entry(name) for name, target in self.names().items()]

    def find(self, name: str | None) -> Any:
        """What a name stands for; for None the default. Raises ApiError."""
        target = self.default if name is None else self.named.get(name) or self.named.get(ANY)
        if not target:
            if not self.names():
                self.check()  # the names are known once the model has been loaded
            raise ApiError(404, f"the model {describe(name)} does not exist; this server has "
                                f"{', '.join(self.names()) or 'none'}; with `model_aliases: "
                                f"[\"{ANY}\"]` any name will do", "model", "model_not_found")
        return target

    def engines(self) -> dict[str, engine.Engine]:
        """The engines of loaded models, by their names."""
        loaded = self.default.engine
        return {loaded.model.name: loaded} if loaded else {}

    def stats(self) -> engine.Stats:
        """The counts of all engines."""
        return sum((loaded.stats for loaded in self.engines().values()), engine.Stats())

    def health(self) -> dict:
        """The body of /health: the status ok, loading, stalled or draining, and more about it."""
        if self.is_starting and not self.stopping.is_set():
            return {"status": "loading", "progress": round(self.default.progress or 0.0, 2)}
        engines = list(self.engines().values())
        stats = sum((each.stats for each in engines), engine.Stats())  # self.stats() may wait
        is_stalled = any(each.seconds_in_step() > self.config.stall_seconds for each in engines)
        status = "draining" if self.stopping.is_set() else "stalled" if is_stalled else "ok"
        about = {"model": engines[0].model.name, "busy": stats.n_busy, "slots": len(stats.slots),
                 "waiting": sum(each.n_waiting for each in engines)} if engines else {}
        return {"status": status, **about}

    def samples(self) -> dict[str, tuple[str, Any]]:
        """What /metrics has of them: by name, what it is, and a number or an engine.Histogram."""
        stats = self.stats()
        return {
            "prompt_tokens_total": ("tokens of prompts", stats.n_prompt),
            "cached_tokens_total": ("of these, tokens that the KV cache held", stats.n_cached),
            "generated_tokens_total": ("tokens generated", stats.n_generated),
            "steps_total": ("turns of the engine's loop", stats.n_steps),
            "decode_errors_total": ("batches that llama_decode refused", stats.n_decode_errors),
            "waiting_requests": ("choices that wait for a slot", sum(
                each.n_waiting for each in self.engines().values())),
            "busy_slots": ("slots with a request", stats.n_busy),
            "slots": ("slots", len(stats.slots)),
            "batch_tokens": ("tokens in each batch", stats.batch),
            "time_to_first_token_seconds": ("from queue to first token", stats.first_token),
            "inter_token_seconds": ("from a reply's token to its next", stats.inter_token)}

    def close(self) -> bool:
        """End every engine at once, as Engine.close does. The server must be stopping."""
        return all([loaded.close(0) for loaded in self.engines().values()])


# ==== 8. The server: what handlers share ==================================================

LAST_WRITES_SECONDS = 5.0  # for handlers to write their last event when the engine has stopped


class Dialect:
    """How the errors and streams of some paths are written; this is the OpenAI API's way:
    server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

    content_type = "text/event-stream"

    def error(self, error: ApiError) -> dict:
        """The body of an error: https://platform.openai.com/docs/guides/error-codes"""
        kind = "requests" if error.status == 429 else \
            "server_error" if error.status in (500, 502, 503, 504, 508) else "invalid_request_error"
        return {"error": {"message": error.message, "type": kind, "param": error.param,
                          "code": error.code}}

    def event(self, data: dict | str) -> bytes:
        """A piece of a stream."""
        return b"data: %b\n\n" % (data.encode() if isinstance(data, str) else to_json(data))

    def error_event(self, error: ApiError) -> bytes:
        """The last piece of a stream that failed."""
        return self.event(self.error(error))


OPENAI = Dialect()


class Server(http.server.ThreadingHTTPServer):
    """The listening socket, and what handlers share: settings, features, models, state."""

    daemon_threads = True
    request_queue_size = 128  # connections the kernel holds while they are accepted one by one

    def __init__(self, config: Config):
        """Raises ConfigError: it cannot listen there, or a feature cannot start."""
        self.config = config
        self.house: House = getattr(config, "house", None) or House()
        self.stopping = threading.Event()  # set by a signal or a fatal error
        self.keys = [key.encode() for key in config.api_keys if config.auth_enabled is not False]
        # Guards the two below, and is notified when a request has been answered.
        self.changed = threading.Condition()
        self.in_flight = 0
        self.answered: collections.Counter[tuple[str, int]] = collections.Counter()
        self.models = self.house.type_of(Models)(config, self.house, self.stopping)
        for start in self.house.having("start"):
            start(self)
        self.address_family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        try:
            super().__init__((config.host, config.port), self.house.type_of(Handler))
        except (OSError, ValueError) as error:  # ValueError: a host that cannot be a name
            raise ConfigError(f"cannot listen on host {config.host!r}, port {config.port}: "
                              f"{getattr(error, 'strerror', error)} (see --host/--port)") from error
        self.is_local = is_this_machine(self.server_address[0])

    def server_bind(self) -> None:
        """Bind without the reverse DNS look-up of HTTPServer, which can take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_port = self.server_address[1]

    def handle_error(self, request, client_address) -> None:
        """What fails around requests; that the client has gone is nothing to tell."""
        has_gone = isinstance(sys.exc_info()[1], OSError)
        log.log(logging.DEBUG if has_gone else logging.ERROR, "connection from %s",
                client_address[0], exc_info=True)

    @property
    def url(self) -> str:
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"http://{host}:{self.server_port}"

    def drain(self) -> bool:
        """Refuse new requests, let running ones finish for `drain_seconds`, free the engine. False
        when the engine is stuck in a step: then only the end of the process ends it."""
        self.stopping.set()
        with self.changed:
            self.changed.wait_for(lambda: self.in_flight == 0, timeout=self.config.drain_seconds)
        closed = self.models.close()
        with self.changed:
            self.changed.wait_for(lambda: self.in_flight == 0, timeout=LAST_WRITES_SECONDS)
        self.shutdown()
        self.server_close()
        return closed


# ==== 9. Replies: a body becomes a prompt, events become chunks ============================

SEED_STRIDE = 0x9E3779B9  # 2**32 / golden ratio: choice 2 of a seed is not choice 1 of the next
NEW_ROLES = {"developer": "system"}


class Generation:
    """One reply: its prompts, the choices that the engine gets, their chunks; the unstreamed one is
    folded from these. In the thread of its request. Until `read`, features may change all of it."""

    id_prefix = stream_object = reply_object = ""  # the API's names for what it sends
    opening: tuple[dict, ...] = ()  # what the first chunks of a choice carry, ...
    closing: dict  # ... and the last one
    prompt = ""  # of a chat, when it has been read

    def __init__(self, handler: "Handler", body: GenerationBody):
        self.handler, self.body, self.loaded = handler, body, handler.loaded
        self.model, self.config = handler.loaded.model, handler.server.config
        self.n_each = body.n  # choices for each prompt
        self.choices: list[engine.Request] = []
        self.more: dict[str, Any] = {}  # what else each engine.Request is told
        self.with_usage = bool(body.stream_options and body.stream_options.include_usage)

    def read(self) -> list[np.ndarray]:
        """The tokens of its prompts. Raises ApiError."""
        raise NotImplementedError

    def constrain(self, prompt: str) -> Callable[[], engine.Constraint] | None:
        """What makes the Constraint of each choice; here, nothing does. Raises ApiError."""

    def make_choices(self) -> None:
        """Make the requests for the engine; whatever can be refused is, here. Raises ApiError."""
        body, loaded = self.body, self.loaded
        prompts = [prompt for prompt in self.read() for _ in range(self.n_each)]
        if len(prompts) > MAX_CHOICES:
            raise invalid("n", f"n: {len(prompts)} replies were asked for, more than {MAX_CHOICES}")
        new_constraint = self.constrain(self.prompt)
        new_params = self.handler.server.house.type_of(engine.SamplingParams)
        params = new_params(**{field.name: getattr(body, field.name)
                               for field in dataclasses.fields(new_params)})
        limit = given(body.max_tokens, given(self.config.max_tokens, loaded.n_ctx))
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        events: queue.SimpleQueue = queue.SimpleQueue()
        for index, prompt in enumerate(prompts):
            if body.seed is not None:
                params.seed = body.seed + index * SEED_STRIDE
            sampler = engine.Sampler(self.model, params, loaded.n_ctx, prompt,
                                     new_constraint() if new_constraint else None)
            self.choices.append(engine.Request(prompt, sampler, limit, stops, index=index,
                                               events=events, **self.more))

    def chunks(self, events: Iterator[engine.Event]) -> Iterator[dict]:
        """Yield the reply's stream, one chunk after the other, without [DONE]."""
        self.head = {"id": f"{self.id_prefix}-{secrets.token_hex(12)}",
                     "object": self.stream_object, "created": int(time.time()),
                     "model": self.body.model or self.model.name,
                     "system_fingerprint": f"{NAME}-{VERSION}"}
        begun: set[int] = set()
        for event in events:
            choice = event.request
            if choice.index not in begun:
                begun.add(choice.index)
                yield from (self.chunk(choice, part) for part in self.opening)
            for part in self.parts(event):
                yield self.chunk(choice, part)
            if event.finish_reason:
                yield self.chunk(choice, self.closing, event.finish_reason)
        if self.with_usage:
            yield {**self.head, "choices": [], "usage": self.usage()}

    def chunk(self, choice: engine.Request, part: dict, reason: str | None = None) -> dict:
        """One chunk."""
        return {**self.head, **({"usage": None} if self.with_usage else {}), "choices": [
            {"index": choice.index, **part, "logprobs": None, "finish_reason": reason}]}

    def parts(self, event: engine.Event) -> Iterable[dict]:
        """What the chunks of an event carry."""
        raise NotImplementedError

    def fold(self, chunks: Iterator[dict]) -> dict:
        """The unstreamed reply: the stream's chunks put together."""
        wholes: list[dict] = [{} for _ in self.choices]
        for chunk in chunks:
            for choice in chunk["choices"]:
                merge(wholes[choice["index"]], choice)
        return {**self.head, "object": self.reply_object, "choices": wholes, "usage": self.usage()}

    def usage(self) -> dict:
        """Token counts; a prompt with several choices counts once."""
        prompts = self.choices[:: self.n_each]
        n_prompt = sum(choice.n_prompt for choice in prompts)
        n_generated = sum(choice.n_generated for choice in self.choices)
        return {"prompt_tokens": n_prompt, "completion_tokens": n_generated,
                "total_tokens": n_prompt + n_generated, "prompt_tokens_details": {
                    "cached_tokens": sum(choice.n_reused for choice in prompts)}}


class Chat(Generation):
    """A conversation: its messages become a prompt, its reply deltas.
    https://platform.openai.com/docs/api-reference/chat"""

    id_prefix = "chatcmpl"
    stream_object, reply_object = "chat.completion.chunk", "chat.completion"
    opening = ({"delta": {"role": "assistant", "content": "", "refusal": None}},)
    closing = {"delta": {}}

    def __init__(self, handler: "Handler", body: ChatBody):
        super().__init__(handler, body)
        self.messages = [dataclasses.asdict(message) for message in body.messages]
        self.adds_prompt = True  # the prompt ends with the opening of the reply's turn
        self.options: dict[str, Any] = {}  # what else the template may read
        self.tokenize = self.model.tokenize  # the text of the prompt, or a part of it

    def read(self) -> list[np.ndarray]:
        """As Generation.read."""
        self.prompt = self.render()
        return [self.handler.tokenize(self.prompt, "messages", read=self.tokenize)]

    def render(self) -> str:
        """The prompt, as the model's chat template writes it. Raises ApiError."""
        try:
            return self.model.render_chat(prepare_messages(self.messages), self.adds_prompt,
                                          self.options)
        except engine.TemplateError as error:
            raise invalid("messages", f"messages: the model's chat template refuses them: {error}",
                          "template_error") from None

    def parts(self, event: engine.Event) -> Iterable[dict]:
        """As Generation.parts."""
        return ({"delta": delta} for delta in self.deltas(event))

    def deltas(self, event: engine.Event) -> list[dict]:
        """What an event adds to the message."""
        return [{"content": event.text}] if event.text else []

    def fold(self, chunks: Iterator[dict]) -> dict:
        """As Generation.fold; a delta becomes a message."""
        reply = super().fold(chunks)
        reply["choices"] = [{"index": choice["index"], "message": choice.pop("delta"), **choice}
                            for choice in reply["choices"]]
        return reply


class Completion(Generation):
    """Texts that go on. https://platform.openai.com/docs/api-reference/completions"""

    id_prefix = "cmpl"
    stream_object = reply_object = "text_completion"
    closing = {"text": ""}

    def read(self) -> list[np.ndarray]:
        """As Generation.read."""
        prompts = self.body.prompt if isinstance(self.body.prompt, list) else [self.body.prompt]
        return [self.handler.tokenize(text, "prompt") for text in prompts]

    def parts(self, event: engine.Event) -> Iterable[dict]:
        """As Generation.parts."""
        return [{"text": event.text}] if event.text else []


def given(value, default):
    """`value`, or the default where the client sent none."""
    return default if value is None else value


def merge(whole: dict, part: dict) -> dict:
    """Fold in a delta: text and lists grow, null changes nothing."""
    for name, value in part.items():
        old = whole.get(name)
        if isinstance(value, dict):
            whole[name] = merge(old or {}, value)
        elif isinstance(old, (str, list)) and value is not None:
            whole[name] = old + value
        elif value is not None or name not in whole:
            whole[name] = value
    return whole


def prepare_messages(messages: list[dict]) -> list[dict]:
    """Messages for a chat template: content is text, and what is not there is left out."""
    return [{**{key: value for key, value in message.items() if value is not None},
             "role": NEW_ROLES.get(message["role"], message["role"]),
             "content": text_of(message["content"]) if "content" in message else None}
            for message in messages]  # None: as some templates want it beside calls


def text_of(content: str | list[dict] | None) -> str:
    """A message's content: texts joined by newlines, what stands for another part as it is."""
    if not isinstance(content, list):
        return content or ""
    runs = itertools.groupby(content, key=lambda part: part["type"] == "text")
    return "".join(("\n" * is_text).join(part["text"] for part in run) for is_text, run in runs)


# ==== 10. The handler: reads a request, finds what answers it, writes =====================

BAD_LINES = (email.errors.MissingHeaderBodySeparatorDefect,  # others are of bodies of e-mails
             email.errors.FirstHeaderLineIsContinuationDefect)
LINGER_SECONDS = 2.0  # how long a refused upload is still read, so that the refusal arrives
STATUS_CLIENT_GONE = 499  # nginx's name for a client that hung up; only ever in the log


@dataclasses.dataclass
class Tally:
    """What is noted about a request while it is answered, for its head and its access line."""

    id: str = dataclasses.field(default_factory=lambda: f"req_{secrets.token_hex(8)}")
    started: float = dataclasses.field(default_factory=time.monotonic)
    ignored: list[str] = dataclasses.field(default_factory=list)  # fields we do not know
    route: str = "unknown"  # METHOD PATTERN
    status: int = 0  # 0 until the head is sent
    prompt: int = 0  # tokens
    cached: int = 0
    generated: int = 0
    first_token: float | None = None  # seconds after the start
    notes: dict[str, str] = dataclasses.field(default_factory=dict)

    def line(self, method: str, path: str) -> str:
        """The access line: nothing in it can forge or flood the log."""
        first = "-" if self.first_token is None else f"{self.first_token:.3f}s"
        notes = "".join(f" {name}={value}" for name, value in self.notes.items())
        return (f"{self.id} {printable(f'{method} {path}')} {self.status} prompt={self.prompt} "
                f"cached={self.cached} generated={self.generated} first={first} "
                f"total={time.monotonic() - self.started:.3f}s{notes}")


class Connection(http.server.BaseHTTPRequestHandler):
    """One connection, on its own thread: one request after the other, until a side closes it."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a token must not wait for the next one

    def setup(self) -> None:
        super().setup()
        self.input = DeadlineReader(self.connection)
        self.rfile = io.BufferedReader(self.input)
        self.patience = self.server.config.client_timeout  # seconds, until a request begins
        self.hangup = select.poll()
        self.hangup.register(self.connection, getattr(select, "POLLRDHUP", select.POLLHUP))

    def finish(self) -> None:
        """Close. After a refused upload, read on for a moment: closing with unread bytes would
        reset the connection, and the client would never see why."""
        with contextlib.suppress(OSError, ApiError):
            self.connection.shutdown(socket.SHUT_WR)
            self.input.allow(LINGER_SECONDS)
            while not self.has_arrived and self.rfile.read1():
                pass
        super().finish()

    def handle_one_request(self) -> None:
        """Answer one request, whatever happens, count it and log it."""
        self.close_connection = self.has_arrived = True  # the whole request has been read
        if not self.await_request():
            return
        self.has_arrived = False
        self.tally, self.answer_headers, self.dialect = Tally(), {}, OPENAI
        self.command, self.path, self.request_version = "-", "-", "HTTP/1.1"
        self.has_events = False  # a stream has begun, and an error can be one of them
        try:
            self.input.allow(self.server.config.client_timeout)
            self.read_head()
            self.answer()
        except ApiError as error:
            self.send_api_error(error)
        except engine.QueueFull as error:
            self.send_api_error(unavailable(str(error), "queue_full"))
        except engine.EngineClosed as error:
            self.send_api_error(unavailable(str(error), "shutting_down"))
        except engine.EngineFault as error:
            self.send_api_error(ApiError(500, str(error), code="engine_error"))
        except ConnectionError:  # the client hung up, or does not read
            self.tally.status = STATUS_CLIENT_GONE
            self.close_connection = True
        except RecursionError:  # in what walks a body; what is deeper still ends in json.loads
            self.send_api_error(ApiError(400, "the body is nested too deeply", code="invalid_json"))
        except Exception as error:
            log.exception("%s failed", self.tally.id)
            self.send_api_error(ApiError(500, f"internal error: {type(error).__name__}"))
        finally:
            with self.server.changed:
                self.server.in_flight -= self.has_arrived  # as read_body has counted it
                self.server.answered[self.tally.route, self.tally.status] += 1
                self.server.changed.notify_all()
            log.info("%s", self.tally.line(self.command or "-", self.path))

    def await_request(self) -> bool:
        """Whether the first byte of a request comes."""
        self.input.allow(self.patience)
        self.patience = self.server.config.keep_alive_timeout
        try:
            return bool(self.rfile.peek(1))
        except (OSError, ApiError):  # gone, or too late
            return False

    def read_head(self) -> None:
        """The first line and the headers, as http.server reads them. Raises ApiError, which quotes
        no line: it is logged, and a key may stand there."""
        self.raw_requestline = self.rfile.readline(MAX_TARGET + 1)
        if len(self.raw_requestline) > MAX_TARGET:
            raise ApiError(414, f"the request line is longer than {MAX_TARGET} bytes")
        if not self.parse_request() or self.request_version == "HTTP/0.9":
            raise ApiError(400, "the request line is not `METHOD TARGET HTTP/1.1`")
        # Without query, and without the address that a proxy's client puts first.
        self.path = re.split("[?#]", re.sub("(?i)^https?://[^/?]*", "", self.path))[0] or "/"
        self.path = urllib.parse.unquote(self.path)
        if any(isinstance(defect, BAD_LINES) for defect in self.headers.defects) or any(
                re.search("[\r\n\0]", value) for value in self.headers.values()):
            raise ApiError(400, "a line of the headers is malformed")

    def send_error(self, code: int, message=None, explain=None) -> None:
        """What http.server finds wrong with a head."""
        raise ApiError(code, f"the head of the request is refused: {self.responses[code][1]}")

    def body_size(self) -> float:
        """Bytes of the body; a feature may read to its end (infinite). Raises ApiError."""
        length = self.headers.get("content-length", None if self.command == "POST" else "0")
        if "transfer-encoding" in self.headers:
            raise ApiError(501, "a body with Transfer-Encoding was sent; send a Content-Length")
        if length is None:
            raise ApiError(411, "send a Content-Length header", code="length_required")
        if not re.fullmatch("[0-9]+", length):
            raise ApiError(400, f"Content-Length is {describe(length)}, not a number of bytes")
        return int(length.lstrip("0")[:18] or 0)  # what has more digits is too large, too

    def read_body(self, size: float, limit: int) -> bytes:
        """The request body, also where the route ignores it: the next request starts behind it."""
        self.input.allow(self.server.config.client_timeout)
        body = self.receive_body(size, limit)
        self.has_arrived = True  # the end of the server waits for its answer
        with self.server.changed:
            self.server.in_flight += 1
        return body

    def receive_body(self, size: float, limit: int) -> bytes:
        """So many bytes. Raises ApiError for more than `limit`, ConnectionError when fewer come."""
        if size > limit:
            why = "max_body_mb" if limit != SMALL_BODY else "as nothing is read from it"
            raise ApiError(413, f"the body has {size} bytes, the limit is {limit} ({why})",
                           code="body_too_large")
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionError("the client hung up")
        return body

    def write(self, data: bytes) -> None:
        """Write to the client. Raises ConnectionError when it is gone or does not read."""
        try:
            self.wfile.write(data)
        except TimeoutError:
            raise ConnectionError("the client does not read") from None

    def send_head(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        """Write the response head, and the body in the same packet."""
        self.tally.status = status
        self.close_connection |= self.server.stopping.is_set() or not self.has_arrived
        headers = {"Date": self.date_time_string(), "x-request-id": self.tally.id,
                   **self.answer_headers, **headers}
        if self.tally.ignored:
            shown = ", ".join(ascii(name)[1:-1] for name in self.tally.ignored)[:MAX_LINE]
            self.tally.notes["ignored"] = headers["x-ignored-fields"] = shown
        headers["Connection"] = "close" if self.close_connection else "keep-alive"
        lines = [f"HTTP/1.1 {status} {self.responses.get(status, [''])[0]}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.connection.settimeout(self.server.config.client_timeout)  # of each write
        self.write("\r\n".join([*lines, "\r\n"]).encode("latin-1", "replace") + body)

    def send_json(self, value, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_body(to_json(value) + b"\n", "application/json", status, headers)

    def send_body(self, body: bytes, content_type: str, status: int = 200,
                  headers: dict[str, str] | None = None) -> None:
        about = {"Content-Type": content_type, "Content-Length": str(len(body))}
        self.send_head(status, about | (headers or {}), b"" if self.command == "HEAD" else body)

    def send_api_error(self, error: ApiError) -> None:
        """Write an error: as a response, or as an event when a stream has begun."""
        self.tally.notes["error"] = printable(error.message)
        with contextlib.suppress(OSError):
            if not self.tally.status:
                return self.send_json(self.dialect.error(error), error.status, error.headers)
            if self.has_events:  # else a body that ends too early says it
                self.write_piece(self.dialect.error_event(error), True)
        self.close_connection = True

    def write_event(self, data: dict | str, is_last: bool = False) -> None:
        """Write an event; the first one starts the stream."""
        self.write_piece(self.dialect.event(data), is_last)

    def write_piece(self, piece: bytes, is_last: bool = False) -> None:
        """Write a piece of a stream, as a chunk (RFC 9112, 7.1); the first one sends the head."""
        if not self.tally.status:
            self.start_stream({"Content-Type": f"{self.dialect.content_type}; charset=utf-8"})
        if self.is_chunked:
            end = b"0\r\n\r\n" if is_last else b""
            piece = b"%x\r\n%b\r\n%b" % (len(piece), piece, end) if piece else end
        self.write(piece)

    def start_stream(self, headers: dict[str, str], status: int = 200) -> None:
        """Send the head of a reply whose length is not known yet."""
        self.is_chunked = self.request_version != "HTTP/1.0"
        self.close_connection |= not self.is_chunked
        self.has_events = self.dialect.content_type in headers.get("Content-Type", "")
        headers |= {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx: no waiting
        if self.is_chunked:
            headers["Transfer-Encoding"] = "chunked"
        self.send_head(status, headers)

    def check_connection(self) -> None:
        """Raise ConnectionError when the client has closed its side."""
        if self.hangup.poll(0):  # it says so even behind bytes that the client sent before
            raise ConnectionError("the client hung up")


class Handler(Connection):
    """Answers requests: who may ask, what they ask for, and what all routes need of a model."""

    loaded: engine.Engine  # of the model asked for, within `lease`

    def answer(self) -> None:
        """Each check stands before what costs more; a large body is read last."""
        house, limit = self.server.house, int(self.server.config.max_body_mb * 2**20)
        self.dialect = house.dialects.get(self.path.rstrip("/"), OPENAI)
        self.check_origin(self.check_host())
        size, body = self.body_size(), None
        if size <= min(SMALL_BODY, limit):
            body = self.read_body(size, limit)
        found = self.routes_here()
        if self.command not in found:
            methods = ", ".join(sorted(found))
            raise ApiError(405, f"{describe(self.path)} does not take {self.command}, but "
                                f"{methods}", None, "method_not_allowed", {"Allow": methods})
        pattern, route, rest = found[self.command]
        self.tally.route = f"{self.command} {pattern}"
        if not (route.is_public or self.server.config.public_metrics and pattern == "/metrics"):
            self.authorise()
        if body is None:
            body = self.read_body(size, limit if route.reads else SMALL_BODY)
        if route.reads is None:
            return route.answer(self, *rest)
        sent = read_json(body)
        if not route.needs_model:
            return route.answer(self, self.read_fields(route.reads, sent))
        name = sent.get("model")
        target = self.server.models.find(name if isinstance(name, str) and name else None)
        target.answer(self, route, sent, body)

    def routes_here(self) -> dict[str, tuple[str, "Route", tuple[str, ...]]]:
        """By method, the pattern and route of the path, and what stands at its {id}. Raises 404."""
        path, found = self.path.rstrip("/") or "/", {}
        for (method, pattern), route in self.server.house.routes.items():
            match = (path == pattern or "{id}" in pattern) and re.fullmatch(
                re.escape(pattern).replace(re.escape("{id}"), "(.+)"), path, re.S)
            if match:
                found[method] = pattern, route, match.groups()
        if not found:
            raise ApiError(404, f"unknown path {describe(path)}; GET / lists all", code="not_found")
        return found | ({"HEAD": found["GET"]} if "GET" in found else {})

    def check_host(self) -> bool:
        """On a loopback address, or with allowed_hosts, refuse other names: a page whose name was
        pointed here (DNS rebinding, CVE-2024-28224) could read all. Return whether it is ours."""
        sent, config = self.headers.get("host"), self.server.config
        match = HOST.fullmatch(sent or "")
        if not match or sent is None and self.request_version != "HTTP/1.0":
            raise ApiError(400, f"the Host header, {describe(sent)}, is malformed or missing")
        name = match[1].strip("[]").lower().removesuffix(".")
        known = {host.strip("[]").lower() for host in (config.host, *config.allowed_hosts)}
        is_guarded = self.server.is_local or bool(config.allowed_hosts)
        if sent and is_guarded and not (is_this_machine(name) or name in known):
            raise ApiError(403, f"the Host {describe(name)} is not this server's; if it should be, "
                                "add it to allowed_hosts", code="host_not_allowed")
        return is_guarded or read_address(name) is not None  # no DNS server points an address here

    def check_origin(self, knows_host: bool) -> None:
        """Refuse web pages from elsewhere. knows_host: one whose origin is this Host is ours."""
        origin = self.headers.get("origin", "http://localhost")  # without one, it is no page
        with contextlib.suppress(ValueError):
            page = urllib.parse.urlsplit(origin)
            is_here = knows_host and page.netloc == self.headers.get("host")
            if page.netloc and is_here or is_this_machine(page.hostname or ""):
                return
        raise ApiError(403, f"pages from {describe(origin)} may not use this server",
                       code="origin_not_allowed")

    def authorise(self) -> None:
        """Check the key. Raises 401."""
        bearer = re.fullmatch("(?i)bearer +(.*)", self.headers.get("authorization", ""))
        sent = [bearer[1] if bearer else "", self.headers.get("x-api-key", "")]
        valid = [key for key in sent  # each is compared with every one, wherever it matches
                 if any([hmac.compare_digest(key.encode(), one) for one in self.server.keys])]
        self.key = valid[0] if valid else ""
        if self.server.keys and not valid:
            what = "the API key is wrong" if any(sent) else "an API key is missing"
            raise ApiError(401, f"{what}; send `Authorization: Bearer KEY`, or `x-api-key: KEY`",
                           code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def read_fields(self, cls: type, sent: dict):
        """A body as dataclass `cls`; what nobody knows is named in the head and the access line."""
        if issubclass(cls, GenerationBody):
            sent = {**sent, **{name: getattr(self.server.config, name) for name in DEFAULTED
                               if sent.get(name) is None}}
        reading = Reading(self.server.house)
        request = read_object(reading.house.type_of(cls), sent, "", reading)
        self.tally.ignored += reading.ignored
        return request

    def receive(self, body, target) -> None:
        """Let features see a body before its model must be there. Raises ApiError."""
        for receive in self.server.house.having("receive"):
            receive(self, body, target)

    @contextlib.contextmanager
    def lease(self, model: LocalModel) -> Iterator[None]:
        """Within this, `loaded` is the engine of a model, which stays loaded. Raises ApiError."""
        self.server.models.check()
        self.loaded = model.engine
        yield

    def tokenize(self, text: str, param: str, n_reply: int = 1, read=None) -> np.ndarray:
        """The tokens of a text, as `read` has them; 400 for none, or no room for `n_reply` more."""
        self.check_fewest(text, param, n_reply)
        tokens = (read or self.loaded.model.tokenize)(text)
        self.check_length(len(tokens), param, n_reply)
        return tokens

    def check_fewest(self, text: str, param: str, n_reply: int) -> None:
        """400 for a text that surely has too many tokens."""
        if len(text) > self.loaded.n_ctx:  # characters: it may or may not fit
            self.check_length(self.loaded.model.fewest_tokens(text) or 1, param, n_reply, "over ")

    def check_length(self, n_tokens: int, param: str, n_reply: int, over: str = "") -> None:
        """400 for no tokens, or more than the context holds."""
        n_ctx = self.loaded.n_ctx
        if n_tokens > n_ctx - n_reply:
            reply = ", one of them for the reply" * n_reply
            raise invalid(param, f"{param}: the text has {over}{n_tokens} tokens, but the context "
                                 f"is {n_ctx} tokens{reply}; shorten the text or raise n_ctx",
                          "context_length_exceeded")
        if n_tokens == 0:
            raise invalid(param, f"{param}: the text is empty; send at least one token")

    def join(self, kind: type[Generation], body: GenerationBody) -> Any:
        """What a body wants, when features have had their say. Raises ApiError."""
        model = self.loaded.model
        if not model.generates:
            raise invalid("model", f"{model.name} makes embeddings, and no text")
        wanted = self.server.house.type_of(kind)(self, body)
        for join in self.server.house.having("join"):
            join(wanted)
        return wanted

    def generate(self, wanted: Generation, write: Callable | None = None) -> None:
        """Submit the choices, and write the reply; write: does that, as another API wants it."""
        wanted.make_choices()
        choices, prompts = wanted.choices, wanted.choices[:: wanted.n_each]
        self.tally.prompt = sum(choice.n_prompt for choice in prompts)
        try:
            self.loaded.submit(choices)
            chunks = wanted.chunks(self.events(choices))
            if write:
                write(chunks)
            elif wanted.body.stream:
                for chunk in chunks:  # the first one decides the status
                    self.write_event(chunk)
                self.write_event("[DONE]", is_last=True)
            else:
                self.send_json(wanted.fold(chunks))
        finally:
            for choice in choices:
                choice.cancel()
            self.tally.cached = sum(choice.n_reused for choice in prompts)
            self.tally.generated = sum(choice.n_generated for choice in choices)

    def events(self, choices: list[engine.Request]) -> Iterator[engine.Event]:
        """Yield the engine's events until each choice has ended. Raises ConnectionError as soon as
        the client closes its side, and what the engine says of a choice that failed."""
        unfinished = len(choices)
        while unfinished:
            event = None
            with contextlib.suppress(queue.Empty):
                event = choices[0].events.get(timeout=POLL_SECONDS)
            self.check_connection()
            if event is None:
                continue
            event.request.n_read += 1
            if event.error:
                raise event.error
            if self.tally.first_token is None:
                self.tally.first_token = time.monotonic() - self.tally.started
            unfinished -= event.finish_reason is not None
            yield event

    # ---- what the routes answer ---------------------------------------------------------

    def post_chat(self, body: ChatBody, write: Callable | None = None) -> None:
        self.generate(self.join(Chat, body), write)

    def post_completion(self, body: CompletionBody) -> None:
        self.generate(self.join(Completion, body))

    def get_models(self) -> None:
        self.server.models.check()
        self.send_json({"object": "list", "data": self.server.models.entries(self)})

    def get_model(self, name: str) -> None:
        self.server.models.check()
        self.send_json(self.server.models.find(name).entry(name))

    def get_root(self) -> None:
        self.send_json({"name": NAME, "version": VERSION, "openai_base_url": "/v1", "links": list(
            dict.fromkeys(path for _, path in self.server.house.routes))})

    def get_health(self) -> None:
        """200 when requests are served, else 503. Waits for nothing."""
        body = self.server.models.health()
        self.send_json(body, *((200,) if body["status"] == "ok" else (503, RETRY_SOON)))

    def get_slots(self) -> None:
        self.server.models.check()
        self.send_json([{"model": name, **dataclasses.asdict(slot)}
                        for name, loaded in self.server.models.engines().items()
                        for slot in loaded.stats.slots])

    def get_metrics(self) -> None:
        """The text that Prometheus reads:
        https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format"""
        with self.server.changed:
            answered = sorted(self.server.answered.items())
        requests = {f'{{route="{route}",status="{status}"}}': n for (route, status), n in answered}
        rows, lines = self.server.models.samples(), []
        rows["requests_total"] = "requests by route and status", requests
        for name, (about, value) in rows.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            samples = value if isinstance(value, dict) else {"": value}  # by what follows the name
            if isinstance(value, engine.Histogram):
                kind, sums = "histogram", list(itertools.accumulate(value.counts))
                bounds = zip([*value.bounds, "+Inf"], sums)
                samples = {f'_bucket{{le="{bound}"}}': n for bound, n in bounds} | {
                    "_sum": value.total, "_count": sums[-1]}
            lines += [f"# HELP {NAME}_{name} {about}", f"# TYPE {NAME}_{name} {kind}"]
            lines += [f"{NAME}_{name}{labels} {sample}" for labels, sample in samples.items()]
        self.send_body("\n".join([*lines, ""]).encode(),
                       "text/plain; version=0.0.4; charset=utf-8")


def read_json(body: bytes) -> dict:
    """The object in a body, JSON by RFC 8259 (no NaN, no Infinity)."""
    def refuse_constant(name):
        raise ValueError(f"{name} is not JSON")
    try:
        sent = json.loads(body.decode("utf-8-sig"), parse_constant=refuse_constant)
        if not isinstance(sent, dict):
            raise ValueError(f"the body must be an object, got {describe(sent)}")
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"bad JSON: {error}", code="invalid_json") from None
    return sent


# ==== 11. Routes: what answers which path =================================================


@dataclasses.dataclass(frozen=True)
class Route:
    """What answers a method and path."""

    answer: Callable  # takes the handler, and the body or what stands at the path's {id}
    about: str
    reads: type | None = None  # the body's dataclass
    needs_model: bool = True  # the body names a model, which must be there to answer it
    dialect: Dialect = OPENAI
    is_public: bool = False  # without a key


ROUTES = {
    ("GET", "/"): Route(Handler.get_root, "name, version, paths", is_public=True),
    ("GET", "/health"): Route(Handler.get_health, "whether requests are served", is_public=True),
    ("GET", "/metrics"): Route(Handler.get_metrics, "counts and times, for Prometheus"),
    ("GET", "/slots"): Route(Handler.get_slots, "what each slot does"),
    ("GET", "/v1/models"): Route(Handler.get_models, "all models"),
    ("GET", "/v1/models/{id}"): Route(Handler.get_model, "one model"),
    ("POST", "/v1/chat/completions"): Route(
        Handler.post_chat, "conversations, streamed or not", ChatBody),
    ("POST", "/v1/completions"): Route(
        Handler.post_completion, "texts, one or a list of them, streamed or not", CompletionBody),
}


# ==== 12. Main: start, signals, drain ====================================================

EXIT_OK, EXIT_UNUSABLE = 0, 2
WAKE_SECONDS = 1.0  # a signal that another thread got is handled when the main thread wakes
EXAMPLE_BODY = '{"messages": [{"role": "user", "content": "What is gravity?"}], "max_tokens": 64}'


def load(server: Server) -> None:
    """Load the model, and say how to use it."""
    server.models.start()
    for name, loaded in server.models.engines().items():
        url = server.url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
        key = " -H 'Authorization: Bearer KEY'" * bool(server.keys)
        where = "the GPU" if loaded.model.on_gpu else f"{loaded.context.n_threads} CPU threads"
        print(f"ready: {name} on {where}, {loaded.context.parallel} slots of "
              f"{loaded.n_ctx} tokens\ntry: curl {url}/v1/chat/completions "
              f"-H 'Content-Type: application/json'{key} -d '{EXAMPLE_BODY}'", flush=True)


def serve(server: Server) -> int:
    """Serve until something stops the server, then drain it. Returns the exit code."""
    threading.Thread(target=server.serve_forever, args=(POLL_SECONDS,), name="accept",
                     daemon=True).start()
    print(f"{NAME} {VERSION} listens on {server.url}", flush=True)
    if not server.is_local and not server.keys:
        log.warning("warning: %s can be reached from the network, and asks for no key; set "
                    "api_keys", server.url)
    loading = threading.Thread(target=load, args=(server,), name="load", daemon=True)
    loading.start()
    with contextlib.suppress(KeyboardInterrupt):
        while not server.stopping.wait(WAKE_SECONDS):
            pass
    if server.models.fatal_error:
        print(f"error: {server.models.fatal_error}", file=sys.stderr)
        return EXIT_UNUSABLE
    log.info("shutting down: running requests have %g seconds", server.config.drain_seconds)
    server.stopping.set()  # interrupts the loading
    loading.join(server.config.drain_seconds + LAST_WRITES_SECONDS)
    if loading.is_alive() or not server.drain():
        log.error("the engine is stuck in a step, or in loading: ending without it")
        os._exit(EXIT_OK)
    return EXIT_OK


def main(argv: list[str] | None = None) -> int:
    """Serve until a signal: the first SIGINT or SIGTERM drains, the second ends at once. Returns
    the exit code: 0, or 2 for unusable settings or model."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a console may know ASCII only
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(message)s")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # raises KeyboardInterrupt here
    try:
        return serve(Server(load_config(sys.argv[1:] if argv is None else argv, os.environ)))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_UNUSABLE
    except KeyboardInterrupt:  # the second one, or before there is anything to drain
        os._exit(EXIT_OK)


if __name__ == "__main__":
    import server  # this file, as features import it: its classes must not be there twice

    sys.exit(server.main())
