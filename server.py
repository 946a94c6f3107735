"""An OpenAI-compatible HTTP server for local models: `python server.py`.

This file knows nothing of KV caches or batches; engine.py does that. The order of the file is
the way of a request:

    1  settings     config.yaml, environment, flags
    2  errors       every refusal is an ApiError, raised anywhere, written in one place
    3  validation   JSON into dataclasses, driven by the fields' types and metadata
    4  bodies       what a client may send, field by field
    5  the wire     heads and bodies as they arrive; names, addresses, a rate limit
    6  models       names, and what they stand for: a model here or an engine elsewhere
    7  HTTP         connection, route, guards, and how an answer is written
    8  generation   prompt, submit, events
    9  routes       the table of paths; metrics
    10 chat         messages into what templates take; text into content, reasoning and calls
    11 rendering    events into chunks; the unstreamed reply is folded from the chunks
    12 main         start, signals, drain

Threads: the main thread waits for the end, others for signals, for new connections and for models
to load; each connection has one that handles its requests, and each engine has its own.
"""

import argparse
import base64
import collections
import contextlib
import dataclasses
import difflib
import email.utils
import functools
import hashlib
import hmac
import http.client
import http.server
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
import ssl
import string
import sys
import threading
import time
import types
import typing
import urllib.parse
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

import engine
from features import structured

NAME, VERSION = "twofile", "0.1.0"
HERE = Path(__file__).resolve().parent
INT32_MAX = 2**31 - 1  # what fits the C API's int
DAY = 86400.0  # seconds
log = logging.getLogger("server")

# ==== 1. Settings =======================================================================


def setting(section: str, default, **limits):
    """A field of Config: its section in config.yaml, its default, and its limits (part 3)."""
    return dataclasses.field(default=default, metadata={"section": section, **limits})


def option(default=None, **limits):
    """An optional field of a body or an entry of `models`, with its limits."""
    return dataclasses.field(default=default, metadata=limits)


MODEL_NAME = r"[A-Za-z0-9][\w./:@+-]*"
MAX_N_CTX = 2**23  # tokens; times 256 slots that fits llama.cpp's 32 bits


@dataclasses.dataclass
class ModelEntry:
    """A model with a name: a GGUF file, with what differs from the settings of the section
    `model`, or an engine elsewhere."""

    model_path: str | None = None
    mmproj: str | None = None
    chat_template_file: str | None = None
    n_ctx: int | None = option(low=0, high=MAX_N_CTX)
    parallel: int | None = option(low=1, high=256)
    n_gpu_layers: int | None = option(low=-1, high=INT32_MAX)
    draft_model_path: str | None = None
    base_url: str | None = None
    api_key: str | None = option(secret=True)
    model: str | None = None  # its name there
    timeout: float | None = option(low=0.1, high=DAY)

    def check(self, at: str) -> None:
        """Refuse what is neither here nor there, or both."""
        if (self.model_path is None) == (self.base_url is None):
            raise invalid(at, f"{at}: name either a model_path or a base_url")
        here = {"mmproj", "chat_template_file", "n_ctx", "parallel", "n_gpu_layers",
                "draft_model_path"}
        there = {"api_key", "model", "timeout"}
        for name in here if self.base_url else there:
            if getattr(self, name) is not None:
                what = "a base_url" if self.base_url else "a model_path"
                raise invalid(at, f"{at}: {name} means nothing beside {what}")
        check_upstream(f"{at}.base_url", self.base_url, self.api_key)


def check_upstream(at: str, base_url: str | None, api_key: str | None) -> None:
    """Refuse an address or key that cannot be used."""
    if base_url is not None:
        try:
            is_right = re.fullmatch(r"https?://[^\s/@?#]+(/[^\s?#]*)?", base_url) \
                and urllib.parse.urlsplit(base_url).port != 0
        except ValueError:  # [abc, or port 99999
            is_right = False
        if not is_right:
            raise invalid(at, f"{at}: must be like http://box:8000/v1, without user or query")
    if api_key is not None and not re.fullmatch("[!-~]+", api_key):
        raise invalid(at, f"{at}: the key beside it must be printable ASCII without spaces")


@dataclasses.dataclass
class Config:
    """Every setting; config.yaml explains each. A key is unique, so sections are optional; inside
    its section, `auth_enabled` is just `enabled`."""

    host: str = setting("server", "127.0.0.1")
    port: int = setting("server", 8080, low=0, high=65535)
    log_messages: bool = setting("server", False)
    cors_origins: list[str] = setting("server", ())
    allowed_hosts: list[str] = setting("server", ())
    max_connections: int = setting("server", 512, low=1, high=2**15)
    max_body_mb: float = setting("server", 16.0, low=0.001, high=1024)
    max_queue: int = setting("server", 128, low=1)
    client_timeout: float = setting("server", 60.0, low=0.1, high=DAY)
    keep_alive_timeout: float = setting("server", 75.0, low=0.1, high=DAY)
    ping_interval: float = setting("server", 15.0, low=0, high=DAY)
    stall_seconds: float = setting("server", 120.0, low=1, high=DAY)
    drain_seconds: float = setting("server", 30.0, low=0, high=DAY)
    allow_image_urls: bool = setting("server", False)

    auth_enabled: bool | None = setting("auth", None)
    api_keys: list[str] = setting("auth", (), secret=True)
    public_metrics: bool = setting("auth", False)

    rate_limiting_enabled: bool = setting("rate_limiting", False)
    requests_per_minute: int = setting("rate_limiting", 60, low=1, high=10**6)

    model_path: str | None = setting("model", None)
    model_aliases: list[str] = setting("model", ())
    mmproj: str | None = setting("model", None)
    n_ctx: int = setting("model", 4096, low=0, high=MAX_N_CTX)
    parallel: int = setting("model", 4, low=1, high=256)  # llama.cpp's LLAMA_MAX_SEQ
    n_batch: int = setting("model", 256, low=1, high=2**16)
    n_ubatch: int = setting("model", 512, low=1, high=2**16)
    prefill_chunk: int = setting("model", 96, low=1)
    n_threads: int = setting("model", 0, low=0, high=512)  # ggml's GGML_MAX_N_THREADS
    n_gpu_layers: int = setting("model", -1, low=-1, high=INT32_MAX)
    flash_attn: bool | Literal["auto"] = setting("model", "auto")
    cache_ram_mib: float = setting("model", 512.0, low=0, high=2**20)
    draft: Literal["prompt-lookup"] | None = setting("model", "prompt-lookup")
    draft_model_path: str | None = setting("model", None)
    draft_n_ctx: int = setting("model", 0, low=0, high=MAX_N_CTX)
    draft_n_gpu_layers: int = setting("model", -1, low=-1, high=INT32_MAX)
    chat_template_file: str | None = setting("model", None)
    models_dir: str | None = setting("model", None)
    max_loaded: int = setting("model", 1, low=1, high=64)
    turn_seconds: float = setting("model", 10.0, low=0, high=DAY)
    default_regular_model: str | None = setting("model", None)
    default_vision_model: str | None = setting("model", None)
    openai_base_url: str | None = setting("model", None)
    openai_api_key: str | None = setting("model", None, secret=True)
    models: dict[str, ModelEntry] = dataclasses.field(
        default_factory=dict, metadata={"section": "model", "secret": True})

    split_reasoning: bool = setting("generation", True)
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
        if not self.host:
            raise invalid("host", "host is empty; name an address, such as 127.0.0.1")
        for name, pattern, example in (
                ("allowed_hosts", r"[^\s/:@]+|\[\S+\]", "box.example, without a port"),
                ("cors_origins", r"\*|null|[a-z][a-z0-9+.-]*://[^\s/]+", "https://app.example")):
            for value in getattr(self, name):
                if not re.fullmatch(pattern, value):
                    raise invalid(name, f"{name}: {describe(value)} must be like {example}")
        check_upstream("openai_base_url", self.openai_base_url, self.openai_api_key)
        for name, entry in self.models.items():
            if not isinstance(name, str) or not re.fullmatch(MODEL_NAME, name):
                raise invalid("models", f"models: {describe(name)} is no name for a model; use "
                                        "letters, digits and ./:@+_-, in quotes if need be")
            if (entry.parallel or 0) > self.n_batch:
                raise invalid(f"models.{name}", f"models.{name}.parallel is {entry.parallel}, but "
                                                f"n_batch is only {self.n_batch}")
        if self.auth_enabled and not self.api_keys:
            raise invalid("auth_enabled", "auth is enabled, but there are no api_keys")
        for number, key in enumerate(self.api_keys, start=1):
            if not re.fullmatch("[!-~]+", key):
                raise invalid("api_keys", f"api_keys: number {number} must be printable ASCII "
                                          "without spaces")


class ConfigError(Exception):
    """A setting is wrong; the message says where, what was found, and what is allowed."""


ALIASES = {"MODEL_ID": "model_path", "BATCH_MAX": "parallel"}  # variables of local apps
PATHS = ("model_path", "mmproj", "chat_template_file", "draft_model_path", "models_dir")
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)  # ValueError: 2024-13-45 is no date


def load_config(argv: list[str], environ: Mapping[str, str]) -> Config:
    """Defaults, then config.yaml, environment variables, flags; the later wins. Raises
    ConfigError; exits like argparse for a bad flag or --help."""
    parser = argparse.ArgumentParser(prog="server.py", description=__doc__.splitlines()[0])
    parser.add_argument("--config", help="settings file (default: config.yaml beside server.py)")
    parser.add_argument("--host", help="address to listen on")
    parser.add_argument("--port", type=int, help="port to listen on, 0 for any free one")
    parser.add_argument("--model", dest="model_path", help="GGUF file, or a folder with one")
    parser.add_argument("--version", action="version", version=f"{NAME} {VERSION}")
    flags = vars(parser.parse_args(argv))
    found = read_config_file(flags.pop("config"))  # {key: (where it was set, value)}
    hints = typing.get_type_hints(Config)
    fields = {field.name: field for field in dataclasses.fields(Config)}
    for variable, name in ALIASES.items():
        if environ.get(variable) and environ.get(name.upper()):
            raise ConfigError(f"environment variables {variable} and {name.upper()} mean the same; "
                              "set one of them")
    for variable, name in [*ALIASES.items(), *((name.upper(), name) for name in hints)]:
        hint = hints[name]
        if text := environ.get(variable):  # an empty one is none
            source = f"environment variable {variable}"
            try:
                if hint == list[str] and not text.lstrip().startswith("["):  # a,b or [a, b]
                    value = [item.strip() for item in text.split(",") if item.strip()]
                else:
                    value = text if hint in (str, str | None) else yaml.safe_load(text)
                found[name] = (source, value)
            except NOT_YAML as error:
                sent = "what is there" if fields[name].metadata.get("secret") else repr(text)
                raise ConfigError(f"{source}: {sent} is not a value") from error
    found |= {name: ("flag", value) for name, value in flags.items() if value is not None}
    unknown: list[str] = []
    try:
        config = read_object(Config, {name: value for name, (_, value) in found.items()}, "",
                             unknown)
        if unknown:
            raise invalid(unknown[0], f"unknown key {unknown[0]!r}")
    except ApiError as error:
        source, _ = found.get(re.split(r"[.\[]", error.param)[0], ("settings", None))
        raise ConfigError(f"{source}: {error.message}") from error
    return config


def read_config_file(path: str | None) -> dict[str, tuple[str, Any]]:
    """Return {key: (file, value)} from a YAML file with keys in their sections or flat."""
    file = Path(path or HERE / "config.yaml")
    if not path and not file.exists():
        return {}
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except (OSError, *NOT_YAML) as error:
        why = f"line {error.problem_mark.line + 1}: {error.problem}" if isinstance(
            error, yaml.MarkedYAMLError) and error.problem_mark else str(error)  # quotes no line
        raise ConfigError(f"cannot read {file}: {' '.join(why.split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected `key: value` lines")
    sections = {field.name: field.metadata["section"] for field in dataclasses.fields(Config)}
    found: dict[str, tuple[str, Any]] = {}
    for key, content_of_key in content.items():
        section = key if key in sections.values() else None
        values = (content_of_key or {}) if section else {key: content_of_key}
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: section {key} holds `key: value` lines, nothing else")
        for name, value in values.items():
            if name == "enabled" and f"{section}_enabled" in sections:
                name = f"{section}_{name}"
            if name not in sections:
                names = [*sections, *sections.values()]
                near = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0)[0]
                raise ConfigError(f"{file}: unknown key {name!r}; the nearest is {near!r}")
            if section not in (None, sections[name]):
                right = sections[name]
                raise ConfigError(f"{file}: {name} belongs in section {right}, not {section}")
            if name in found:
                raise ConfigError(f"{file}: {name} is set twice")
            found[name] = (str(file), resolve_paths(name, value, file.parent))
    return found


def resolve_paths(name: str, value, folder: Path):
    """A setting, its paths made relative to a folder; so are those of the entries of `models`."""
    if name == "models" and isinstance(value, dict):
        return {key: {name: resolve_paths(name, inner, folder) for name, inner in entry.items()}
                if isinstance(entry, dict) else entry for key, entry in value.items()}
    is_path = name in PATHS and isinstance(value, str) and not value.startswith(engine.HUB)
    return str(folder / os.path.expanduser(value)) if is_path else value


ENV_LINE = re.compile(
    r"""\s*(?:export\s+)?(\w+)\s*=\s*("[^"]*"|'[^']*'|(?!["']).*?)\s*(?:(?<=[\s"'])#.*)?""")


def read_env_file(file: Path) -> dict[str, str]:
    """The variables of a .env file: NAME=VALUE lines, in quotes or not; `#` begins a comment, in
    front of the line or behind a blank. Raises ConfigError."""
    found = {}
    try:
        lines = file.read_text().splitlines() if file.exists() else []
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            match = ENV_LINE.fullmatch(line)
            if not match:  # the line itself may be a secret
                raise ConfigError(f"{file}: line {number} is not like NAME=VALUE")
            name, text = match.groups()
            found[name] = text[1:-1] if text[:1] in ("'", '"') else text
    return found


# ==== 2. Errors =========================================================================

RETRY_SOON = {"Retry-After": "2"}  # seconds: about one short reply


class ApiError(Exception):
    """A refusal that is also its own response, in the OpenAI error shape:
    https://platform.openai.com/docs/guides/error-codes"""

    def __init__(self, status: int, message: str, param: str | None = None,
                 code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict:
        kind = "requests" if self.status == 429 else \
            "server_error" if self.status in (500, 502, 503, 504, 508) else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param,
                          "code": self.code}}


def invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """400: a field has a wrong type or value."""
    return ApiError(400, message, param, code)


def unavailable(message: str, code: str) -> ApiError:
    """503: come back in a moment."""
    return ApiError(503, message, code=code, headers=RETRY_SOON)


# ==== 3. Validation: JSON into dataclasses ==============================================
#
# A field's type says what JSON it takes. Its metadata may say:
#   low, high              inclusive limits of a number, also inside a list or object
#   min_length, max_length items of a list
#   refused                why a field of the OpenAI API is not served, ...
#   harmless               ... and its values that ask for nothing, besides null and empty
#   no_effect              accepted for compatibility; changes nothing here
#   secret                 no message shows a value

KINDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
UNIONS = (typing.Union, types.UnionType)


def describe(value, most: float = 60) -> str:
    """A value as JSON on one line, cut after `most` characters: no newline or escape sequence of
    a client's gets through."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        text = f"a {type(value).__name__}, nested too deeply"
    except (TypeError, ValueError):  # YAML knows keys and cycles that JSON doesn't
        text = repr(value)
    return text if len(text) <= most else text[:most] + "..."


def expected(hint) -> str:
    """A type in words: `str | list[int]` is "a string or a list of integers"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in UNIONS:
        return " or ".join(expected(arg) for arg in args if arg is not types.NoneType)
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is list:
        return f"a list (each item {expected(args[0])})"
    return KINDS.get(hint, "an object")


def read_value(hint, value, at: str, limits: Mapping, ignored: list[str]):
    """Return `value` as the type `hint`, or raise a 400 that names the place `at`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    reason = None
    if hint in (bool, types.NoneType) and isinstance(value, hint):
        return value
    if hint is Any:
        try:
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
            raise invalid(at, f"{at}: is not JSON with valid Unicode: {error}"[:MAX_LINE]) from None
        return value
    if origin is Literal and value in args and type(value) in map(type, args):
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return read_object(hint, value, at, ignored)
    if origin is list and isinstance(value, list):
        low, high = limits.get("min_length", 0), limits.get("max_length", math.inf)
        if not low <= len(value) <= high:
            bounds = f"at least {low}" if len(value) < low else f"at most {high}"
            raise invalid(at, f"{at} must have {bounds} items, got {len(value)}")
        return [read_value(args[0], item, f"{at}[{i}]", limits, ignored)
                for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: read_value(args[1], item, f"{at}.{key}", limits, ignored)
                for key, item in value.items()}
    if hint is str and isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON's \ud800 escapes can smuggle in half a character
            raise invalid(at, f"{at}: contains an unpaired surrogate (half of a UTF-16 pair), "
                              "which is not text") from None
        return value
    if hint in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        if hint is float or isinstance(value, int) or (
                math.isfinite(value) and value == int(value)):
            low, high = limits.get("low", -math.inf), limits.get("high", math.inf)
            if not low <= value <= high:
                bounds = f"at least {low}" if high == math.inf else f"between {low} and {high}"
                raise invalid(at, f"{at} must be {bounds}, got {describe(value)}")
            return hint(value)
    if origin in UNIONS:  # the first that fits; else the one of the same JSON kind knows why not
        for option in args:
            try:
                return read_value(option, value, at, limits, ignored)
            except ApiError as error:
                if error.code != "invalid_type" or error.param != at:
                    reason = reason or error
    got = "something else" if limits.get("secret") else describe(value)
    raise reason or invalid(at, f"{at}: expected {expected(hint)}, got {got}", "invalid_type")


def read_object(cls, value: dict, at: str, ignored: list[str]):
    """An instance of dataclass `cls`; fields it does not know are added to `ignored` by name."""
    prefix = f"{at}." if at else ""
    hints = typing.get_type_hints(cls)
    given = {}
    for field in dataclasses.fields(cls):
        name, sent = prefix + field.name, value.get(field.name)
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in value:
            raise invalid(name, f"{name} is required", "missing_field")
        if sent is None and not required:  # null means "not given"; in the settings also "none"
            if name in value and "section" in field.metadata and type(None) in typing.get_args(
                    hints[field.name]):
                given[field.name] = None
            continue
        refused = field.metadata.get("refused")
        nothing = (False, "", [], {}, *field.metadata.get("harmless", ()))
        if refused and not any(type(sent) is type(no) and sent == no for no in nothing):  # 0 is no
            raise invalid(name, f"{name}: {refused}; got {describe(sent)}, leave it out",
                          "unsupported_parameter")
        given[field.name] = read_value(hints[field.name], sent, name, field.metadata, ignored)
    ignored += [prefix + name for name in value if name not in hints]
    whole = cls(**given)
    if hasattr(whole, "check"):  # what no single field can tell
        whole.check(at)
    return whole


# ==== 4. Bodies: what a client may send =================================================
# Field by field from https://platform.openai.com/docs/api-reference


@dataclasses.dataclass
class ImageUrl:
    """Where an image is: a data: URI, or an address on the web."""

    url: str
    detail: Literal["auto", "low", "high"] | None = option(no_effect=True)


@dataclasses.dataclass
class Part:
    """One part of a message's content."""

    type: Literal["text", "refusal", "image_url"]
    text: str = ""
    refusal: str = ""
    image_url: ImageUrl | None = None
    file = b""  # what is there; Handler.read_images gets it

    def check(self, at: str) -> None:
        """Refuse an image without an address, and the other way round."""
        if (self.type == "image_url") != (self.image_url is not None):
            raise invalid(f"{at}.image_url", f"{at}: the type image_url and a field image_url, "
                          'like {"url": "data:image/png;base64,..."}, belong together',
                          "missing_field")


@dataclasses.dataclass
class CalledFunction:
    """What an assistant called: `arguments` is JSON, as text."""

    name: str
    arguments: str


@dataclasses.dataclass
class ToolCall:
    """A call in an assistant's message."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


@dataclasses.dataclass
class Message:
    """One turn of a conversation. `developer` is OpenAI's newer name for `system`, `function` the
    older one for `tool`."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: CalledFunction | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    audio: Any = option(refused="only text and images are supported")

    def check(self, at: str) -> None:
        """Refuse what type and role together make impossible."""
        calls = self.tool_calls or self.function_call
        if self.role != "user" and isinstance(self.content, list):
            for i, part in enumerate(self.content):
                if part.image_url:
                    raise invalid(f"{at}.content[{i}]", f"{at}.content[{i}]: a {self.role} message "
                                                        "cannot have images; a user message can")
        if calls and self.role != "assistant":
            raise invalid(f"{at}.tool_calls", f"{at}: a {self.role} message cannot call tools")
        if self.content is None and not (calls or self.refusal or self.reasoning_content):
            raise invalid(f"{at}.content", f"{at}.content is required", "missing_field")
        for role, needed in (("tool", "tool_call_id"), ("function", "name")):
            if self.role == role and getattr(self, needed) is None:
                raise invalid(f"{at}.{needed}", f"{at}.{needed} is required", "missing_field")


@dataclasses.dataclass
class Function:
    """A function that the model may call, or just its name; `parameters` is a JSON Schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = option(False, no_effect=True)  # the arguments always validate


@dataclasses.dataclass
class Tool:
    """A tool; functions are the only kind here."""

    type: Literal["function"]
    function: Function


@dataclasses.dataclass
class AllowedTools:
    """Those tools that may be called this time."""

    mode: Literal["auto", "required"]
    tools: list[Tool]


@dataclasses.dataclass
class ToolChoice:
    """A named tool, or a choice of them."""

    type: Literal["function", "allowed_tools"]
    function: Function | None = None
    allowed_tools: AllowedTools | None = None


@dataclasses.dataclass
class JsonSchema:
    """A schema that the reply must satisfy."""

    name: str
    schema: dict[str, Any] | None = None
    description: str | None = option(no_effect=True)
    strict: bool = option(False, no_effect=True)  # the reply always validates


@dataclasses.dataclass
class ResponseFormat:
    """The form of the reply. `schema` beside `json_object` is llama-server's."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema: dict[str, Any] | None = None


@dataclasses.dataclass
class Prediction:
    """A text that the reply may be like in many places: what it shares with it comes faster."""

    type: Literal["content"]
    content: str | list[Part]

    def check(self, at: str) -> None:
        """Refuse images."""
        if any(part.image_url for part in self.content if isinstance(part, Part)):
            raise invalid(f"{at}.content", f"{at}.content: only text can be predicted")

    def text(self) -> str:
        return text_of(dataclasses.asdict(self)["content"])


@dataclasses.dataclass
class StreamOptions:
    """What a stream carries besides the text."""

    include_usage: bool = False
    include_obfuscation: bool = option(False, no_effect=True)


@dataclasses.dataclass
class GenerationBody(engine.SamplingParams):
    """What chat and plain completions have in common, besides how to choose tokens."""

    model: str | None = None
    max_tokens: int | None = option(low=1)
    n: int = option(1, low=1, high=128)
    stop: str | list[str] | None = option(max_length=16)
    logit_bias: dict[str, float] | None = option(low=-100, high=100)  # JSON's keys are strings
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    cache_prompt: bool = True
    grammar: str | None = None  # GBNF
    json_schema: dict[str, Any] | None = None
    user: str | None = option(no_effect=True)

    def stops(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if "" in stops:
            raise invalid("stop", "stop: an empty stop sequence was sent; it would end every reply "
                                  "before its first token")
        if max(map(len, stops), default=0) > MAX_STOP:
            raise invalid("stop", "stop: a stop sequence is longer than the limit of "
                                  f"{MAX_STOP} characters")
        return stops

    def constrained_by(self) -> str | None:
        """The field that holds the reply to a grammar."""
        fields = ("grammar", "json_schema", "response_format", "tools", "functions")
        return next((name for name in fields if getattr(self, name, None) is not None), None)

    def plain_constraint(self) -> structured.Form | None:
        """The form that `grammar` or `json_schema` asks for."""
        if self.grammar is not None and self.json_schema is not None:
            raise invalid("grammar", "grammar and json_schema were sent; the reply can follow only "
                                     "one of them")
        if self.grammar == "":
            raise invalid("grammar", "grammar: is empty; leave it out")
        if self.grammar is None and self.json_schema is None:
            return None
        form = structured.Form()
        with schema_errors():
            if self.grammar is not None:
                form.set_gbnf(self.grammar)
            else:
                form.root = form.add_schema(self.json_schema, "json_schema")
        return form


@dataclasses.dataclass
class ChatBody(GenerationBody):
    """POST /v1/chat/completions"""

    messages: list[Message] = dataclasses.field(kw_only=True, metadata={"min_length": 1})
    max_completion_tokens: int | None = option(low=1)
    logprobs: bool = False
    top_logprobs: int | None = option(low=0, high=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = option(max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool = True
    functions: list[Function] | None = option(max_length=128)
    function_call: Literal["none", "auto"] | Function | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    metadata: dict[str, str] | None = option(no_effect=True)
    safety_identifier: str | None = option(no_effect=True)
    prompt_cache_key: str | None = option(no_effect=True)
    prompt_cache_retention: str | None = option(no_effect=True)
    service_tier: str | None = option(no_effect=True)
    verbosity: str | None = option(no_effect=True)
    store: Any = option(refused="replies are not stored")
    modalities: Any = option(refused="only text is supported", harmless=(["text"],))
    audio: Any = option(refused="only text is supported")
    prediction: Prediction | None = None
    web_search_options: Any = option(refused="web search is not supported")

    def image_parts(self) -> Iterator[tuple[str, Part]]:
        """The parts that are images, and where they are."""
        for i, message in enumerate(self.messages):
            for j, part in enumerate(message.content if isinstance(message.content, list) else ()):
                if part.image_url:
                    yield f"messages[{i}].content[{j}]", part

    def reply_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def n_top_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs", f"top_logprobs: {self.top_logprobs} was sent, but it "
                                          "needs logprobs: true")
        return (self.top_logprobs or 0) if self.logprobs else None

    def scores_prompt(self) -> bool:
        return False

    @functools.cached_property
    def offer(self) -> "Offer":
        """The functions that the model may call."""
        old = self.functions is not None
        where = "functions" if old else "tools"
        functions = self.functions or [tool.function for tool in self.tools or ()]
        choice = self.function_call if old else self.tool_choice
        names = [function.name for function in functions]
        for i, name in enumerate(names):
            if not re.fullmatch(TOOL_NAME, name) or name in names[:i]:
                at = f"{where}[{i}]{'' if old else '.function'}.name"
                raise invalid(at, f"{at}: {describe(name)} must be 1 to 64 letters, digits, _ and "
                                  "-, and occur once")
        allowed, mode = names, choice if isinstance(choice, str) else "auto"
        if isinstance(choice, ToolChoice) and choice.type == "allowed_tools":
            listed = choice.allowed_tools or AllowedTools("auto", [])
            allowed, mode = [tool.function.name for tool in listed.tools], listed.mode
        elif choice is not None and not isinstance(choice, str):
            named = choice.function or Function("") if isinstance(choice, ToolChoice) else choice
            allowed, mode = [named.name], "required"
        param = "function_call" if old else "tool_choice"
        if missing := [name for name in allowed if name not in names]:
            raise invalid(param, f"{param}: {describe(missing[0])} is not among the {where}")
        if mode == "required" and not allowed:
            raise invalid(param, f"{param}: asks for a call, but there are no {where}")
        tools = [{"type": "function", "function": {
            key: value for key, value in dataclasses.asdict(function).items()
            if value is not None and key != "strict"}} for function in functions]
        is_named = mode == "required" and choice != "required" and len(allowed) == 1
        return Offer(tools if mode != "none" else [], allowed if mode != "none" else [],
                     mode == "required", self.parallel_tool_calls and not is_named, where)

    @property
    def may_answer_freely(self) -> bool:
        """Whether a reply that calls no function need not follow a grammar."""
        return bool(self.offer.allowed) and not self.offer.is_required and \
            self.constrained_by() in ("tools", "functions")

    def constraint(self, format: engine.ToolFormat, unclosed: str) -> structured.Form | None:
        """The form that the reply must have. unclosed: the tag that ends the reasoning with which
        the reply begins; what is asked for comes after it."""
        offer = self.offer
        wanted = [name for name in ("grammar", "json_schema") if getattr(self, name) is not None]
        if self.response_format and self.response_format.type != "text":
            wanted.append("response_format")
        if len(wanted) > 1 or (offer.allowed and self.grammar):
            sent = " and ".join([*wanted, *[offer.where] * bool(offer.allowed)])
            raise invalid(wanted[0], f"{sent} were sent; the reply can follow only one of them")
        if not wanted and not offer.allowed:
            return None
        after = (unclosed,) if unclosed else ()
        if self.grammar is not None:
            form = self.plain_constraint()
            form.triggers = after
            return form
        form = structured.Form()
        with schema_errors():
            ways = [form.add_schema(*self.schema())] if wanted else []
            functions = [(name, form.add_arguments(format, parameters, at))
                         for name, parameters, at in offer.rules()]
            if functions and not ways and not offer.is_required and not format.at_start:
                form.triggers = (*after, format.trigger)
                form.root = form.calls(format, functions, offer.is_parallel, True)
                return form
            if functions:
                calls = form.calls(format, functions, offer.is_parallel, False)
                ways = [calls] if offer.is_required else [calls, *(ways or [structured.NOT_A_CALL])]
            form.triggers = after
            form.root = "/[ \\n]{0,3}/ " * bool(after) + f"({' | '.join(ways)})"
        return form

    def schema(self) -> tuple[Any, str]:
        """The JSON Schema of the reply, and where it was sent."""
        wanted = self.response_format
        if self.json_schema is not None:
            return self.json_schema, "json_schema"
        if wanted.type == "json_schema":
            if wanted.json_schema is None:
                raise invalid("response_format.json_schema", "response_format.json_schema is "
                                                             "required", "missing_field")
            return given(wanted.json_schema.schema, True), "response_format.json_schema.schema"
        return given(wanted.schema, {"type": "object"}), "response_format.schema"


TEMPLATE_NAMES = {"messages", "tools", "functions", "function_call", "tool_choice", "bos_token",
                  "eos_token", "add_generation_prompt", "raise_exception", "strftime_now", "self"}
TOOL_NAME = "[a-zA-Z0-9_-]{1,64}"


@dataclasses.dataclass
class Offer:
    """The functions that the model may call this time."""

    tools: list[dict]  # all of them, for the template
    allowed: list[str]  # names of those that may be called
    is_required: bool
    is_parallel: bool  # several calls in one reply
    where: str  # "tools", or the deprecated "functions"

    def rules(self) -> Iterator[tuple[str, dict, str]]:
        """Each allowed function's name and parameters, and where these stand in the request. No
        parameters, as the OpenAI reference has it, are an empty list of them."""
        for i, tool in enumerate(self.tools):
            name, inner = tool["function"]["name"], ".function" if self.where == "tools" else ""
            if name in self.allowed:
                parameters = tool["function"].get("parameters") or {"additionalProperties": False}
                yield name, parameters, f"{self.where}[{i}]{inner}.parameters"


MAX_STOP = 1000  # characters of a stop sequence
MAX_CHOICES = 512  # replies to one request: prompts times n or best_of
DEFAULTED = ("temperature", "top_p", "top_k", "min_p")  # settings, where a body does not say
LEGACY_MAX_TOKENS = 16  # the OpenAI reference's default for /v1/completions
MAX_INPUTS = 2048  # texts in one request, as the OpenAI reference has it for embeddings
Prompts = str | list[str] | list[int] | list[list[int]]


@dataclasses.dataclass
class CompletionBody(GenerationBody):
    """POST /v1/completions"""

    prompt: Prompts = dataclasses.field(kw_only=True)
    max_tokens: int | None = option(low=0)
    logprobs: int | None = option(low=0, high=20)
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = option(low=1, high=128)

    def reply_limit(self) -> int | None:
        return LEGACY_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    def n_top_logprobs(self) -> int | None:
        return self.logprobs

    def scores_prompt(self) -> bool:
        return self.echo and self.logprobs is not None


@dataclasses.dataclass
class EmbeddingBody:
    """POST /v1/embeddings"""

    input: Prompts = dataclasses.field(kw_only=True)
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = option(low=1)
    user: str | None = option(no_effect=True)


@dataclasses.dataclass
class TokenizeBody:
    """POST /tokenize, as llama-server's"""

    content: str
    model: str | None = None
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


@dataclasses.dataclass
class DetokenizeBody:
    """POST /detokenize, as llama-server's"""

    tokens: list[int]
    model: str | None = None


# ---- the dialect of local apps


@dataclasses.dataclass
class AppImage:
    """An image: Base64, bare or as a data: URI."""

    data_base64: str
    mime_type: str = ""  # none: whatever it is


@dataclasses.dataclass
class AppMessage:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str = ""
    images: list[AppImage] | None = None

    def openai(self) -> dict:
        """The same in the OpenAI shape; images come before the text."""
        if not self.images:
            return {"role": self.role, "content": self.content}
        urls = [image.data_base64 if image.data_base64.startswith("data:") else
                f"data:{image.mime_type};base64,{image.data_base64}" for image in self.images]
        return {"role": self.role, "content": [
            *({"type": "image_url", "image_url": {"url": url}} for url in urls),
            *[{"type": "text", "text": self.content}] * bool(self.content)]}


@dataclasses.dataclass
class AppOptions:
    """How to choose tokens; the metadata has the OpenAI API's name."""

    temperature: float | None = option(low=0, high=2, openai="temperature")
    maxTokens: int | None = option(low=1, openai="max_tokens")
    topP: float | None = option(low=0, high=1, openai="top_p")
    presencePenalty: float | None = option(low=-2, high=2, openai="presence_penalty")
    frequencyPenalty: float | None = option(low=-2, high=2, openai="frequency_penalty")


@dataclasses.dataclass
class AppBody:
    """POST /chat and its variants"""

    messages: list[AppMessage] = dataclasses.field(kw_only=True, metadata={"min_length": 1})
    model_key: str | None = None
    config: AppOptions | None = None

    def openai(self, model: str) -> dict:
        """The same as the body of a streamed chat completion."""
        options = {field.metadata["openai"]: getattr(self.config or AppOptions(), field.name)
                   for field in dataclasses.fields(AppOptions)}
        return {"model": model, "messages": [message.openai() for message in self.messages],
                "stream": True, "stream_options": {"include_usage": True},
                **{name: value for name, value in options.items() if value is not None}}


@dataclasses.dataclass
class LoadBody:
    """POST /models/load"""

    model_key: str
    exclusive: bool = False


@dataclasses.dataclass
class UnloadBody:
    """POST /models/unload"""

    model_key: str | None = None
    unload_all: bool = False

    def check(self, _at: str) -> None:
        """Refuse what says nothing, or two things."""
        if (self.model_key is not None) == self.unload_all:
            raise invalid("model_key", "send either model_key or unload_all: true")


# ==== 5. The wire: heads, bodies, addresses, a rate limit ===============================

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
MAX_TARGET = 8192  # bytes of a request line; nginx has the same
MAX_HEAD = 32768  # bytes of a head
MAX_HEADERS = 100
MAX_CHUNK_LINE = 256  # bytes of a chunk's size and extensions
SMALL_BODY = 65536  # bytes; read also where the request is refused, to keep the connection
MAX_BUCKETS = 10_000  # clients that the rate limiter remembers
REQUEST_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/([0-9])\.([0-9])")
HEADER_LINE = re.compile(  # a value has no control characters but the tab
    r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\x00-\x08\x0a-\x1f\x7f]*)")
CHUNK_LINE = re.compile(r"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?")
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^][:/?#@\s]*)(:[0-9]*)?")
ONCE = {"host", "content-length", "transfer-encoding", "authorization", "x-api-key", "origin",
        "connection", "expect"}  # sent twice, two readers could choose differently


@dataclasses.dataclass
class Head:
    """A request's first line and headers."""

    method: str = "-"
    target: str = "-"
    version: str = "1.1"
    headers: dict[str, str] = dataclasses.field(default_factory=dict)  # by lower-case name

    @property
    def path(self) -> str:
        """The target without query, and without the address that a proxy's client puts first."""
        path = re.sub("(?i)^https?://[^/?]*", "", self.target)
        return urllib.parse.unquote(re.split("[?#]", path)[0] or "/")

    @property
    def keeps_alive(self) -> bool:
        wish = self.headers.get("connection", "").lower()
        return "close" not in wish and (self.version == "1.1" or "keep-alive" in wish)


class DeadlineReader(io.RawIOBase):
    """The bytes from a socket, until a deadline: a client that sends one byte a second must not
    hold its thread for hours. Raises TimeoutError."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.deadline = 0.0  # time.monotonic()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


def read_line(file: io.BufferedIOBase, limit: int, too_long: ApiError) -> str:
    """A line without its end, which is CR LF and nothing less."""
    line = file.readline(limit + 1)
    if len(line) > limit:
        raise too_long
    if not line.endswith(b"\n"):
        raise ConnectionError("the client hung up")
    if not line.endswith(b"\r\n"):
        raise ApiError(400, "a line ends in a bare LF, not in CR LF")
    return line[:-2].decode("latin-1")


def read_head(file: io.BufferedIOBase) -> Head:
    """The head of a request, by the letter of RFC 9112: what two servers could read differently
    (a bare CR or LF, a folded line, a length sent twice) is refused. Raises ApiError, whose message
    quotes no line: it is logged, and a key may stand in the line."""
    line = read_line(file, MAX_TARGET, ApiError(
        414, f"the request line is longer than {MAX_TARGET} bytes"))
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise ApiError(400, "the request line is not `METHOD TARGET HTTP/1.1`")
    method, target, major, minor = match.groups()
    if major != "1":
        raise ApiError(505, f"HTTP/{major}.{minor} was sent; this server speaks HTTP/1.1")
    if method not in METHODS:
        raise ApiError(501, f"unknown method {describe(method)}")
    if not re.match("(?i)/|https?://", target) and (method, target) != ("OPTIONS", "*"):
        raise ApiError(400, "the target of the request line is not a path")
    head = Head(method, target, "1.0" if minor == "0" else "1.1")
    room, n_lines = MAX_HEAD, 0
    while line := read_line(file, room, ApiError(431, f"the head is over {MAX_HEAD} bytes")):
        room, n_lines = room - len(line), n_lines + 1
        if n_lines > MAX_HEADERS:
            raise ApiError(431, f"the request has more than {MAX_HEADERS} headers")
        match = HEADER_LINE.fullmatch(line)
        if not match:
            raise ApiError(400, f"line {n_lines} of the headers is malformed")
        name, value = match[1].lower(), match[2].strip(" \t")
        if name in head.headers and name in ONCE:
            raise ApiError(400, f"the header {name} was sent twice")
        head.headers[name] = f"{head.headers[name]}, {value}" if name in head.headers else value
    if "host" not in head.headers and head.version != "1.0":
        raise ApiError(400, "the Host header is missing")
    return head


def body_size(head: Head, limit: int) -> int | None:
    """Bytes of the body, None for a chunked one of at most `limit`. Raises ApiError."""
    coding, length = head.headers.get("transfer-encoding"), head.headers.get("content-length")
    if coding is not None:
        if length is not None or head.version == "1.0":
            where = "beside Content-Length" if length is not None else "in HTTP/1.0"
            raise ApiError(400, f"Transfer-Encoding was sent {where}")
        if coding.lower() != "chunked":
            raise ApiError(501, f"Transfer-Encoding: {describe(coding)} was sent; only chunked is "
                                "served")
        return None
    if length is None:
        if head.method in ("POST", "PUT", "PATCH"):
            raise ApiError(411, "send a Content-Length header, or a chunked body",
                           code="length_required")
        return 0
    if not (length.isascii() and length.isdigit()):
        raise ApiError(400, f"Content-Length is {describe(length)}, not a number of bytes")
    if len(length) > len(str(limit)) or int(length) > limit:
        raise body_too_large(f"has {length[:MAX_LINE]} bytes", limit)
    return int(length)


def body_too_large(size: str, limit: int, why: str = "max_body_mb") -> ApiError:
    """413; size: what is known of the body's; limit: bytes."""
    return ApiError(413, f"the body {size}, the limit is {limit} ({why})", code="body_too_large")


def read_exactly(file: io.BufferedIOBase, size: int) -> bytes:
    """So many bytes. Raises ConnectionError when fewer come."""
    data = file.read(size)
    if len(data) < size:
        raise ConnectionError("the client hung up")
    return data


def read_chunked(file: io.BufferedIOBase, limit: int) -> bytes:
    """A body in chunked transfer coding (RFC 9112, 7.1). Extensions and trailers mean nothing
    here. Raises ApiError."""
    malformed = ApiError(400, "the chunked body is malformed")
    body = bytearray()
    while True:
        size = CHUNK_LINE.fullmatch(read_line(file, MAX_CHUNK_LINE, malformed))
        if not size:
            raise malformed
        n_bytes = int(size[1], 16)
        if n_bytes == 0:
            break
        if len(body) + n_bytes > limit:
            raise body_too_large(f"has more than {len(body)} bytes", limit)
        body += read_exactly(file, n_bytes)
        if read_exactly(file, 2) != b"\r\n":
            raise malformed
    for _ in range(MAX_HEADERS):
        line = read_line(file, MAX_TARGET, malformed)
        if not line:
            return bytes(body)
        if not HEADER_LINE.fullmatch(line):
            break
    raise malformed


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


def client_of(address: str) -> str:
    """Who an address belongs to: an IPv6 client has a whole /64 to come from."""
    ip = read_address(address)
    return str(ip) if ip.version == 4 else str(ipaddress.ip_network((ip, 64), strict=False))


class RateLimiter:
    """A token bucket for each client: it holds the requests of a minute, and fills evenly."""

    def __init__(self, per_minute: int):
        self.per_minute = per_minute
        self.lock = threading.Lock()
        self.buckets: dict[str, tuple[float, float]] = {}  # client: (requests left, when)

    def take(self, client: str) -> dict[str, str]:
        """Count one request; return the headers that tell what is left. Raises ApiError 429."""
        now, seconds_each = time.monotonic(), 60 / self.per_minute
        with self.lock:
            left, then = self.buckets.pop(client, (self.per_minute, now))
            left = min(self.per_minute, left + (now - then) / seconds_each)
            may = left >= 1
            left -= may
            self.buckets[client] = (left, now)  # the last place: seen last
            if len(self.buckets) > MAX_BUCKETS:
                del self.buckets[next(iter(self.buckets))]
        headers = {"x-ratelimit-limit-requests": str(self.per_minute),
                   "x-ratelimit-remaining-requests": str(int(left)),
                   "x-ratelimit-reset-requests":
                       f"{(self.per_minute - left) * seconds_each:.3f}s"}
        if not may:
            seconds = math.ceil((1 - left) * seconds_each)
            raise ApiError(429, f"{self.per_minute} requests a minute are allowed; the next one in "
                                f"{seconds} seconds", code="rate_limit_exceeded",
                           headers=headers | {"Retry-After": str(seconds)})
        return headers


# ---- requests of our own: to engines elsewhere, and of features

CONNECT_SECONDS = 10.0
LIST_SECONDS = 5.0  # for the list of models elsewhere
PASSED_ON = ("Content-Type", "Content-Encoding", "Retry-After", "Location")  # of its headers
PIECE = 65536  # bytes passed on at a time, at most
MAX_FAR_LINE = 2**20  # bytes of an event from an engine elsewhere
MAX_FAR_BODY = 2**26  # bytes of a reply of its that we read, in place of passing it on


class Unreachable(Exception):
    """No connection; the message is the system's reason."""


class WatchedConnection(io.RawIOBase):
    """A connection to another server. `check` is called all the time, and may raise. Raises
    TimeoutError after `seconds` without progress, http.client.HTTPException when it breaks."""

    def __init__(self, connection: socket.socket, seconds: float, check: Callable[[], None]):
        self.connection, self.seconds, self.check = connection, seconds, check
        connection.setblocking(False)
        self.file = io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def wait(self, event: int) -> None:
        """Wait until the connection can be read (select.POLLIN) or written (POLLOUT)."""
        poll, until = select.poll(), time.monotonic() + self.seconds
        poll.register(self.connection, event)
        while not poll.poll(POLL_SECONDS * 1000):
            self.check()
            if time.monotonic() > until:
                raise TimeoutError

    def readinto(self, buffer) -> int:
        self.check()
        while True:
            try:
                return self.connection.recv_into(buffer)
            except (BlockingIOError, ssl.SSLWantReadError):
                self.wait(select.POLLIN)
            except OSError as error:
                raise http.client.HTTPException(str(error)) from None

    def send(self, data: bytes) -> None:
        """Send it all, unless the other side closes: it may have answered already."""
        view = memoryview(data)
        with contextlib.suppress(ConnectionError):
            while view:
                try:
                    view = view[self.connection.send(view[:PIECE]):]
                except (BlockingIOError, ssl.SSLWantWriteError):
                    self.wait(select.POLLOUT)

    def makefile(self, _mode: str) -> io.BufferedReader:
        """What http.client asks of a socket; the same for a response that follows another."""
        return self.file


@functools.cache
def tls_context() -> ssl.SSLContext:
    """The system's certificates, read once."""
    return ssl.create_default_context()


@contextlib.contextmanager
def request_elsewhere(method: str, url: str, body: bytes | None, headers: dict[str, str],
                      seconds: float, check: Callable[[], None], address: str | None = None
                      ) -> Iterator[http.client.HTTPResponse]:
    """An HTTP request to another server, without following redirects. address: where to connect,
    in place of what the name in the URL resolves to. Raises Unreachable, TimeoutError (see
    WatchedConnection), http.client.HTTPException."""
    parts = urllib.parse.urlsplit(url)
    is_tls = parts.scheme == "https"
    with contextlib.ExitStack() as stack:
        try:
            client = http.client.HTTPConnection(parts.hostname, parts.port or (80, 443)[is_tls])
            client.default_port = (80, 443)[is_tls]  # is not named in the Host header
            connection = stack.enter_context(socket.create_connection(
                (address or parts.hostname, client.port), min(seconds, CONNECT_SECONDS)))
            if is_tls:
                connection = stack.enter_context(tls_context().wrap_socket(
                    connection, server_hostname=parts.hostname))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.sock = connection
            target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
            length = {"Content-Length": str(len(body))} if body is not None else {}
            client.request(method, target, None, headers | length)
        except (OSError, ValueError) as error:  # ValueError: a port or name that cannot be
            raise Unreachable(getattr(error, "strerror", None) or str(error)) from None
        watched = WatchedConnection(connection, seconds, check)
        watched.send(body or b"")
        stack.callback(watched.file.close)
        responses: list[http.client.HTTPResponse] = []  # one that is let go closes the connection
        while not responses or responses[-1].status < 200:  # 1xx are hints before the answer
            responses.append(http.client.HTTPResponse(watched, method=method))
            responses[-1].begin()
            if responses[-1].status == 101 or responses[-1].status >= 600:
                raise http.client.HTTPException(f"status {responses[-1].status}")
        yield responses[-1]


class TooLarge(http.client.HTTPException):
    """A body is larger than what we take."""


def read_pieces(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """A body as it arrives. Raises http.client.HTTPException when it is malformed or breaks off."""
    try:
        while piece := response.read1(PIECE):
            yield piece
    except ValueError as error:  # the size of a chunk is none
        raise http.client.HTTPException(str(error)) from None
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)


def read_all(response: http.client.HTTPResponse, limit: int) -> bytes:
    """A body of at most `limit` bytes. Raises TooLarge, http.client.HTTPException."""
    body = bytearray()
    for piece in read_pieces(response):
        body += piece
        if len(body) > limit:
            raise TooLarge
    return bytes(body)


def read_lines(response: http.client.HTTPResponse, limit: int) -> Iterator[bytes]:
    """The lines of a body of at most `limit` bytes, as read_all."""
    rest, n_bytes = b"", 0
    for piece in read_pieces(response):
        *lines, rest = (rest + piece).split(b"\n")
        n_bytes += len(piece)
        if n_bytes > limit or len(rest) > MAX_FAR_LINE:
            raise TooLarge
        yield from lines
    yield rest


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


def read_chunks(response: http.client.HTTPResponse, upstream: "Upstream") -> Iterator[dict]:
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
                raise ApiError(502, upstream.mask(f"{upstream.name}: {error_in(text)}"))
            yield dataclasses.asdict(read_value(FarChunk, chunk, "the event", {}, []))
        except (ValueError, RecursionError):
            raise ApiError(502, f"{upstream.name} sent an event that is not JSON") from None
        except ApiError as error:
            raise error if error.status == 502 else ApiError(
                502, upstream.mask(f"{upstream.name} sent an odd event: {error.message}")) from None
    raise ApiError(502, f"{upstream.name} broke off")


def error_in(body: bytes) -> str:
    """The message in an error's body, whoever wrote it."""
    try:
        sent = json.loads(body)
        error = sent.get("error", sent.get("detail", sent))
        return str(error["message"] if isinstance(error, dict) and "message" in error else error)
    except (ValueError, AttributeError, RecursionError):
        return printable(body.decode("utf-8", "replace"))


# ==== 6. Models: which names there are ===================================================


@dataclasses.dataclass(frozen=True)
class Upstream:
    """An engine elsewhere: any OpenAI-compatible server."""

    name: str
    base_url: str
    api_key: str | None = None
    model: str | None = None  # what it calls the model; None: as the request does
    timeout: float = 600.0  # seconds without a byte from it

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def mask(self, text: str) -> str:
        """A text of its for our clients and the log: it may quote our key."""
        return text.replace(self.api_key, "***") if self.api_key else text


UPSTREAM = "upstream"  # the name of the one in openai_base_url


class Models:
    """The names that requests may use, and what they stand for; `pool` loads those that are
    here."""

    def __init__(self, config: Config, stopping: threading.Event):
        self.config = config
        if config.models_dir and not Path(os.path.expanduser(config.models_dir)).is_dir():
            raise ConfigError(f"models_dir: {config.models_dir} is not a folder")
        self.upstreams = {name: self.upstream(name, entry)
                          for name, entry in config.models.items() if entry.base_url}
        url = config.openai_base_url
        self.others = Upstream(UPSTREAM, url.rstrip("/"), config.openai_api_key) if url else None
        local = {name: self.local(name, entry)
                 for name, entry in config.models.items() if entry.model_path}
        wanted = config.default_regular_model
        own = model_name(config.model_path)
        if config.model_path or not (wanted or config.models) or wanted == own and not url:
            local = {own: self.local(own, config), **local}
        self.pool = engine.Pool(
            list(local.values()), stopping, self.scan, HERE / "models",
            max_loaded=config.max_loaded, max_queue=config.max_queue,
            turn_seconds=config.turn_seconds, equip=equip)
        self.fixed = {**local, **self.upstreams}
        self.regular = self.default("default_regular_model", next(iter(self.fixed), None))
        self.fixed |= dict.fromkeys(config.model_aliases if self.regular else (), self.regular)
        see = [name for name, model in self.pool.models().items() if model.mmproj]
        self.vision = self.default("default_vision_model", next(iter(see), None))
        if isinstance(self.regular, engine.LocalModel):
            self.pool.set_default(self.regular)

    def default(self, setting: str, otherwise: str | None
                ) -> "engine.LocalModel | Upstream | None":
        """The model that a setting names, or else that of another name. Raises ConfigError."""
        name = getattr(self.config, setting) or otherwise
        try:
            found = self.find(name) if name else None
        except ApiError as error:
            raise ConfigError(f"{setting}: {error.message}") from None
        return dataclasses.replace(found, model=name) if found and found is self.others else found

    def local(self, name: str, entry: "Config | ModelEntry", is_in_folder: bool = False
              ) -> engine.LocalModel:
        settings = {key: getattr(self.config, key)
                    for key in ("cache_ram_mib", "draft", "draft_n_ctx", "draft_n_gpu_layers")}
        return engine.LocalModel(
            name, entry.model_path, self.load_options(entry),
            settings | {"draft_model_path": entry.draft_model_path}, ("draft_model_path",),
            mmproj=entry.mmproj or mmproj_beside(entry.model_path), is_in_folder=is_in_folder)

    def load_options(self, entry: "Config | ModelEntry") -> dict:
        """For engine.load_engine: the settings, unless the entry has its own."""
        names = ("n_ctx", "parallel", "n_batch", "n_ubatch", "n_threads", "n_gpu_layers",
                 "flash_attn", "prefill_chunk", "max_queue")
        options = {name: given(getattr(entry, name, None), getattr(self.config, name))
                   for name in names}
        return options | {"chat_template_file": entry.chat_template_file}

    @staticmethod
    def upstream(name: str, entry: ModelEntry) -> Upstream:
        chosen = {key: value for key in ("api_key", "model", "timeout")
                  if (value := getattr(entry, key)) is not None}
        return Upstream(name, entry.base_url.rstrip("/"), **{"model": name, **chosen})

    def scan(self) -> list[engine.LocalModel]:
        """The GGUF files in models_dir, by their names without the ending."""
        folder = Path(os.path.expanduser(self.config.models_dir or ""))
        files = engine.model_files(folder) if self.config.models_dir else []
        return [self.local(file.stem, ModelEntry(str(file)), is_in_folder=True)
                for file in files if re.fullmatch(MODEL_NAME, file.stem)]

    def names(self) -> dict[str, "engine.LocalModel | Upstream"]:
        """Every name that is ours."""
        return {**self.pool.models(), **self.fixed}

    def find(self, name: str | None, sees: bool = False) -> "engine.LocalModel | Upstream":
        """What a name stands for; for None the default model (for images, if it `sees`), or in
        place of one that was unloaded by hand any that is loaded. Raises ApiError."""
        if name is not None:
            known = self.fixed if name in self.fixed else self.names()  # which looks at models_dir
            if name not in known and self.others:
                return self.others
            if name not in known:
                raise ApiError(404, f"the model {describe(name)} does not exist; this server has "
                                    f"{', '.join(known) or 'none'}", "model", "model_not_found")
            return known[name]
        default = self.vision if sees else self.regular
        if isinstance(default, engine.LocalModel) and default.is_off:
            loaded = [model for model in self.pool.loaded() if model.mmproj or not sees]
            default = next(iter(loaded), None)
        if default is None:
            raise unavailable("No model loaded" if not sees or self.vision else "No vision model "
                              "(set default_vision_model)", "no_model_loaded")
        return default


def mmproj_beside(path: str | None) -> str | None:
    """NAME.mmproj.gguf or mmproj-NAME.gguf beside a file NAME.gguf: what it sees with."""
    file = Path(os.path.expanduser(path or engine.HUB))
    projectors = [file.with_name(f"{file.stem}.mmproj.gguf"), file.with_name(f"mmproj-{file.name}")]
    return next((str(each) for each in projectors if each.is_file()), None)


def equip(model: engine.LocalModel, loaded: engine.Engine) -> None:
    """Give a model what features add to it. Loader thread. Raises engine.ModelError."""
    from features import drafts, memory
    options = model.options | model.settings
    drafts.equip(loaded, options)
    memory.equip(loaded, options)
    if mmproj := model.mmproj:  # read once: a look at models_dir may change it
        from features import vision
        vision.equip(loaded, mmproj)


def model_name(path: str | None) -> str:
    """The name of a model that has none in the settings: its file's, without the ending."""
    with contextlib.suppress(engine.ModelError):
        if path and Path(os.path.expanduser(path)).is_dir():
            return engine.find_model_file(path, HERE).stem
    return Path(path or engine.DEFAULT_MODEL).stem


# ==== 7. HTTP: connection, route, answer ================================================

LOADING_NEWS_SECONDS = 1.0  # between two comments in a stream that waits for its model
LINGER_SECONDS = 2.0  # how long a refused upload is still read, so that the refusal arrives
LAST_WRITES_SECONDS = 5.0  # for handlers to write their last event when the engine has stopped
ACCEPT_PAUSE_SECONDS = 0.1  # when the process has no file descriptor left for a connection
MAX_REFUSALS = 64  # connections above max_connections that are still told why they are refused
MAX_LINE = 200  # characters of a request line or an error in the log
STATUS_CLIENT_GONE = 499  # nginx's name for a client that hung up; only ever in the log


class Server(http.server.ThreadingHTTPServer):
    """The listening socket, and what handlers share: settings, engine, state."""

    daemon_threads = True
    request_queue_size = 128  # connections the kernel holds while they are accepted one by one

    def __init__(self, config: Config):
        """Raises ConfigError when it cannot listen there."""
        self.config = config
        self.started = int(time.time())
        self.stopping = threading.Event()  # set by a signal or a fatal error
        self.is_over = False  # running requests have had their time
        self.models = Models(config, self.stopping)
        self.pool = self.models.pool
        self.via = f"1.1 {NAME}-{secrets.token_hex(4)}"  # who relayed a request (RFC 9110, 7.6.3)
        wanted = config.auth_enabled is not False
        self.key_digests = [digest(key) for key in config.api_keys] if wanted else []
        self.public = PUBLIC | ({"/metrics"} if config.public_metrics else set())
        self.limiter = RateLimiter(config.requests_per_minute) \
            if config.rate_limiting_enabled else None
        # Guards the fields below, and is notified when a request has been answered.
        self.changed = threading.Condition()
        self.in_flight = 0
        self.answered: collections.Counter[tuple[str, int]] = collections.Counter()
        self.connections: set[socket.socket] = set()
        self.excess: set[socket.socket] = set()  # those above the limit: to be refused
        self.unready: dict[socket.socket, None] = {}  # those that keep us waiting, oldest first
        self.address_family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        try:
            super().__init__((config.host, config.port), Handler)
        except (OSError, ValueError) as error:  # ValueError: a host that cannot be a name
            reason = getattr(error, "strerror", error)
            raise ConfigError(f"cannot listen on host {config.host!r}, port {config.port}: "
                              f"{reason} (choose others with --host and --port)") from error
        self.is_local = is_this_machine(self.server_address[0])

    def server_bind(self) -> None:
        """Bind without the reverse DNS look-up of HTTPServer, which can take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.config.host, self.server_address[1]

    def get_request(self):
        """Accept a connection. When that fails, the listening socket stays readable: without a
        pause the loop would spin."""
        try:
            return super().get_request()
        except OSError as error:
            log.warning("cannot accept a connection: %s", error)
            time.sleep(ACCEPT_PAUSE_SECONDS)
            raise

    def process_request(self, connection: socket.socket, client_address) -> None:
        """A thread for each connection. At the limit the client that has kept us waiting for
        longest, with its request or by not reading an answer, makes room, so that slow ones keep
        nobody out; if there is none, the newcomer is refused."""
        limit, oldest = self.config.max_connections, None
        with self.changed:
            if len(self.connections) >= limit and self.unready:
                oldest = next(iter(self.unready))
                del self.unready[oldest]
                self.connections.remove(oldest)
            if len(self.connections) >= limit + MAX_REFUSALS:
                self.shutdown_request(connection)
                return
            if len(self.connections) >= limit:
                self.excess.add(connection)
            self.connections.add(connection)
        if oldest:
            with contextlib.suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)  # its thread's read ends now
        super().process_request(connection, client_address)

    def shutdown_request(self, connection: socket.socket) -> None:
        """Close a connection, and forget it."""
        with self.changed:
            self.connections.discard(connection)
            self.excess.discard(connection)
            self.unready.pop(connection, None)
        super().shutdown_request(connection)

    def keeps_waiting(self, connection: socket.socket, is_so: bool) -> None:
        """Note whether it is the client that must act."""
        with self.changed:
            if not is_so:
                self.unready.pop(connection, None)
            elif connection in self.connections:  # not yet told to make room
                self.unready[connection] = None

    def handle_error(self, request, client_address) -> None:
        """A connection that broke is worth a line, not a traceback."""
        error = sys.exc_info()[1]
        log.log(logging.DEBUG if isinstance(error, OSError) else logging.ERROR,
                "connection from %s: %s: %s", client_address[0], type(error).__name__, error)

    @property
    def url(self) -> str:
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"http://{host}:{self.server_port}"

    def state(self) -> str:
        """What /health says: ok, loading, failed, stalled or draining."""
        if self.stopping.is_set():
            return "draining"
        if self.pool.is_starting:
            return "failed" if self.pool.default.error else "loading"
        limit = self.config.stall_seconds
        is_stalled = any(each.seconds_in_step() > limit for each in self.pool.engines().values())
        return "stalled" if is_stalled else "ok"

    def drain(self) -> bool:
        """Refuse new requests, let running ones finish for `drain_seconds`, free the engine. False
        when the engine is stuck in a step: then only the end of the process ends it."""
        self.stopping.set()
        with self.changed:
            self.changed.wait_for(lambda: self.in_flight == 0, timeout=self.config.drain_seconds)
        self.is_over = True  # for what runs elsewhere
        closed = self.pool.close()
        with self.changed:
            self.changed.wait_for(lambda: self.in_flight == 0, timeout=LAST_WRITES_SECONDS)
        self.shutdown()
        self.server_close()
        return closed


def digest(key: str) -> bytes:
    """What is compared in place of an API key: of one length, and of no use to a thief."""
    return hashlib.sha256(key.encode("latin-1")).digest()


def printable(text: str) -> str:
    """A client's text for the log: one line, not too long, no escape sequences."""
    return "".join(char if char.isprintable() else "?" for char in text[:MAX_LINE])


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
    upstream: str = ""  # the engine elsewhere that was asked
    error: str = ""

    def shown_ignored(self) -> str:
        """The ignored fields for a header or the log: printable ASCII, and not too many."""
        return ", ".join(ascii(name)[1:-1] for name in self.ignored).replace(",,", ",")[:MAX_LINE]

    def line(self, head: Head) -> str:
        """The access line: nothing in it can forge or flood the log. Without the query, where
        some clients put their key."""
        route = printable(f"{head.method} {head.path}")
        first = "-" if self.first_token is None else f"{self.first_token:.3f}s"
        total = time.monotonic() - self.started
        return (f"{self.id} {route} {self.status} prompt={self.prompt} cached={self.cached} "
                f"generated={self.generated} first={first} total={total:.3f}s"
                f"{' upstream=' if self.upstream else ''}{self.upstream}"
                f"{' error=' if self.error else ''}{self.error}")


class Handler(socketserver.StreamRequestHandler):
    """One connection, on its own thread: reads heads and bodies, finds the route, answers."""

    server: Server
    disable_nagle_algorithm = True  # a token must not wait for the next one

    def setup(self) -> None:
        super().setup()
        self.input = DeadlineReader(self.connection)
        self.rfile = io.BufferedReader(self.input)
        self.closes = self.lingers = False
        self.hangup = select.poll()
        self.hangup.register(self.connection, getattr(select, "POLLRDHUP", select.POLLHUP))

    def handle(self) -> None:
        """One request after the other, until one side closes the connection."""
        self.await_request(self.server.config.client_timeout)
        while not self.closes:
            self.handle_one()
            if not self.closes:
                self.await_request(self.server.config.keep_alive_timeout)

    def finish(self) -> None:
        """Close. After a refused upload, read on for a moment: closing with unread bytes would
        reset the connection, and the client would never see why."""
        with contextlib.suppress(OSError):
            if self.lingers:
                until = time.monotonic() + LINGER_SECONDS
                self.connection.shutdown(socket.SHUT_WR)
                self.connection.settimeout(LINGER_SECONDS)
                while time.monotonic() < until and self.connection.recv(1 << 16):
                    pass
        with contextlib.suppress(OSError):
            super().finish()

    # ---- one request -----------------------------------------------------------------

    def await_request(self, seconds: float) -> None:
        """Wait for the first byte of a request; `closes` when it does not come."""
        self.input.deadline = time.monotonic() + seconds
        self.server.keeps_waiting(self.connection, True)
        try:
            if self.rfile.peek(1)[:2] == b"\r\n":  # old clients send one behind a body
                self.rfile.read(2)
            self.closes = not self.rfile.peek(1)
        except OSError:  # too late, or gone
            self.closes = True

    def handle_one(self) -> None:
        """Answer one request, whatever happens, count it and log it."""
        self.tally, self.head, self.answer_headers = Tally(), Head(), {}
        self.is_app = self.streams = self.has_events = False
        self.last_write = 0.0
        self.closes = self.lingers = True  # until the whole request has been read
        has_begun = False
        try:
            with self.in_time("head"):
                self.head = read_head(self.rfile)
            with self.server.changed:
                has_begun = True
                self.server.in_flight += 1
            self.answer()
        except ApiError as error:
            self.send_api_error(error)
        except ConnectionError:  # the client hung up, or does not read
            self.tally.status = STATUS_CLIENT_GONE
            self.closes = True
        except RecursionError:  # while it is read; what is deeper than that ends in json.loads
            self.send_api_error(ApiError(400, "the request is nested too deeply",
                                         code="invalid_json"))
        except Exception as error:
            log.exception("%s failed", self.tally.id)
            self.send_api_error(ApiError(500, f"internal error: {type(error).__name__}"))
        finally:
            with self.server.changed:
                self.server.in_flight -= has_begun
                self.server.answered[self.tally.route, self.tally.status] += 1
                self.server.changed.notify_all()
            log.info("%s", self.tally.line(self.head))

    def answer(self) -> None:
        """Each check stands before what costs more. A large body is read last; who is refused
        before that loses the connection: the body would be taken for the next request."""
        self.is_app = self.head.path.rstrip("/") in APP_PATHS
        self.check_origin(self.check_host())
        limit = int(self.server.config.max_body_mb * 2**20)
        size, body = body_size(self.head, limit), None
        if size is not None and size <= SMALL_BODY:
            body = self.read_body(size, limit)
        if self.connection in self.server.excess:
            self.closes = True
            raise unavailable(f"{self.server.config.max_connections} connections are open, which "
                              "is the limit (max_connections)", "too_many_connections")
        pattern, route, rest = find_route(self.head.method, self.head.path)
        self.tally.route = f"{self.head.method} {pattern}"
        if self.head.method != "OPTIONS" and pattern not in self.server.public:
            self.authorise()
        if body is None:
            if route.reads is None and size is not None:
                raise body_too_large(f"has {size} bytes", SMALL_BODY, "as nothing is read from it")
            body = self.read_body(size, limit if route.reads else SMALL_BODY)
        if route.reads is None:
            route.answer(self, *rest)
        else:
            self.answer_post(route, self.read_json(body), body)

    def answer_post(self, route: "Route", sent: dict, body: bytes) -> None:
        """What names a model is passed on as it is to an engine elsewhere; for one that is here it
        is read, and answered while the model stays loaded."""
        if route.is_app:
            return route.answer(self, self.read_fields(route.reads, sent))
        name = sent.get("model")
        target = self.server.models.find(name if isinstance(name, str) else None)
        if isinstance(target, Upstream):
            return self.relay(target, sent, body)
        request = self.read_fields(route.reads, sent)
        if isinstance(request, ChatBody):
            self.read_images(request, target)
        with self.lease(target):
            route.answer(self, request)

    @contextlib.contextmanager
    def lease(self, model: engine.LocalModel) -> Iterator[None]:
        """Within this, `loaded` is the engine of a model, which is loaded first if need be. From
        its second second on, that shows in a stream."""
        began = time.monotonic()

        def wait() -> None:
            self.check_connection()
            seconds = time.monotonic() - max(began, self.last_write)
            if self.streams and seconds > LOADING_NEWS_SECONDS:
                progress = model.progress or 0.0
                self.write_sign(f"loading {model.name} {progress:.0%}", {
                    "type": "loading", "model": model.name, "progress": round(progress, 2)})

        with engine_errors(), self.server.pool.lease(model, wait) as self.loaded:
            yield

    @contextlib.contextmanager
    def in_time(self, what: str):
        """Within this, the rest of a head or body must arrive before client_timeout is over."""
        seconds = self.server.config.client_timeout
        self.input.deadline = time.monotonic() + seconds
        try:
            yield
        except TimeoutError:
            raise ApiError(408, f"the {what} did not arrive within {seconds:g} seconds",
                           code="request_timeout") from None

    def read_body(self, size: int | None, limit: int) -> bytes:
        """The request body, also where the route ignores it: the next request starts behind it."""
        expects = self.head.headers.get("expect", "").lower() if self.head.version == "1.1" else ""
        if expects == "100-continue":
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        with self.in_time("body"):
            body = read_chunked(self.rfile, limit) if size is None else \
                read_exactly(self.rfile, size)
        self.closes = self.lingers = False
        self.server.keeps_waiting(self.connection, False)
        return body

    def check_host(self) -> bool:
        """Refuse names that are not ours, on a loopback address or where allowed_hosts says which
        are: a web page whose name has been pointed here (DNS rebinding, CVE-2024-28224) could read
        everything. Return whether the name is surely ours."""
        sent, config = self.head.headers.get("host", ""), self.server.config
        match = HOST.fullmatch(sent)
        if not match:
            raise ApiError(400, f"the Host header {describe(sent)} is malformed")
        name = match[1].strip("[]").lower().removesuffix(".")
        known = {host.strip("[]").lower() for host in (config.host, *config.allowed_hosts)}
        is_guarded = self.server.is_local or bool(config.allowed_hosts)
        if sent and is_guarded and not (is_this_machine(name) or name in known):
            raise ApiError(403, f"the Host {describe(name)} is not this server's; if it should be, "
                                "add it to allowed_hosts", code="host_not_allowed")
        return is_guarded or read_address(name) is not None  # no DNS server points an address here

    def check_origin(self, knows_host: bool) -> None:
        """Refuse web pages from elsewhere, and tell browsers which may read the answer
        (https://fetch.spec.whatwg.org/#http-cors-protocol; never with credentials). knows_host: a
        page whose origin is this Host comes from here."""
        origin, allowed = self.head.headers.get("origin"), self.server.config.cors_origins
        if origin is None:
            return
        try:
            page = urllib.parse.urlsplit(origin)
            is_ours = bool(page.netloc) and (
                is_this_machine(page.hostname or "")
                or knows_host and page.netloc == self.head.headers.get("host"))
        except ValueError:
            is_ours = False
        if not (is_ours or origin in allowed or "*" in allowed):
            raise ApiError(403, f"pages from {describe(origin)} may not use this server; if they "
                                "should, add the origin to cors_origins", code="origin_not_allowed")
        self.answer_headers |= {"Access-Control-Allow-Origin": "*" if "*" in allowed else origin,
                                "Access-Control-Expose-Headers": "*", "Vary": "Origin"}

    def options(self, methods: str) -> None:
        """What a path takes; to a browser, that a page may send it (a preflight)."""
        asked = self.head.headers
        headers = {"Allow": methods}
        if "origin" in asked and "access-control-request-method" in asked:
            headers |= {"Access-Control-Allow-Methods": methods, "Access-Control-Max-Age": "600",
                        "Access-Control-Allow-Headers":
                            asked.get("access-control-request-headers", "Authorization")}
            if "access-control-request-private-network" in asked:
                headers["Access-Control-Allow-Private-Network"] = "true"
        self.send_head(204, headers)

    def authorise(self) -> None:
        """Check the key and count the request, for the key or else the address. Raises 401, 429."""
        headers, known = self.head.headers, self.server.key_digests
        bearer = re.fullmatch("(?i)bearer +(.*)", headers.get("authorization", ""))
        sent = [bearer[1] if bearer else "", headers.get("x-api-key", "")]
        valid = [key for key in map(digest, sent)  # every key is compared, wherever it matches
                 if any([hmac.compare_digest(key, one) for one in known])]
        client = valid[0].hex() if valid else client_of(self.client_address[0])
        if self.server.limiter:  # before the 401, so that guessing keys is limited too
            self.answer_headers |= self.server.limiter.take(client)
        if known and not valid:
            what = "the API key is wrong" if any(sent) else "an API key is missing"
            raise ApiError(401, f"{what}; send `Authorization: Bearer KEY`, or `x-api-key: KEY`",
                           code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def read_json(self, body: bytes) -> dict:
        """The object in a body, JSON by RFC 8259 (no NaN, no Infinity)."""
        def refuse_constant(name):
            raise ValueError(f"{name} is not JSON")
        try:
            sent = json.loads(body.decode(), parse_constant=refuse_constant)
            if not isinstance(sent, dict):
                raise ValueError(f"the body must be an object, got {describe(sent)}")
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"bad JSON: {error}", code="invalid_json") from None
        return sent

    def read_fields(self, cls, sent: dict):
        """A body as dataclass `cls`; fields that we do not know are named to the client and in the
        log."""
        if issubclass(cls, GenerationBody):
            defaults = {name: getattr(self.server.config, name) for name in DEFAULTED}
            sent = {**sent, **{name: default for name, default in defaults.items()
                               if sent.get(name) is None}}
        n_ignored = len(self.tally.ignored)
        request = read_object(cls, sent, "", self.tally.ignored)
        if len(self.tally.ignored) > n_ignored:
            log.warning("%s ignored unknown fields: %s", self.tally.id, self.tally.shown_ignored())
        self.streams = bool(getattr(request, "stream", False))
        return request

    # ---- answers ---------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Write to the client. Raises ConnectionError when it is gone or does not read."""
        try:
            self.wfile.write(data)
        except TimeoutError:
            raise ConnectionError("the client does not read") from None

    def send_head(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        """Write the response head, and the body in the same packet."""
        self.tally.status = status
        self.closes |= self.server.stopping.is_set() or not self.head.keeps_alive
        headers = {"Date": email.utils.formatdate(usegmt=True), "x-request-id": self.tally.id,
                   **self.answer_headers, **headers}
        if self.tally.ignored:
            headers["x-ignored-fields"] = self.tally.shown_ignored()
        if self.closes or self.head.version == "1.0":
            headers["Connection"] = "close" if self.closes else "keep-alive"
        lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, '')}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.connection.settimeout(self.server.config.client_timeout)  # of each write
        self.server.keeps_waiting(self.connection, True)
        self.write("\r\n".join([*lines, "\r\n"]).encode("latin-1", "replace") + body)
        self.server.keeps_waiting(self.connection, False)

    def send_json(self, value, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_body(to_json(value) + b"\n", "application/json", status, headers)

    def send_body(self, body: bytes, content_type: str, status: int = 200,
                  headers: dict[str, str] | None = None) -> None:
        about = {"Content-Type": content_type, "Content-Length": str(len(body))}
        self.send_head(status, about | (headers or {}), b"" if self.head.method == "HEAD" else body)

    def send_api_error(self, error: ApiError) -> None:
        """Write an error: as a response, or as an event when a stream has begun."""
        self.tally.error = printable(error.message)
        body = {"detail": error.message} if self.is_app else error.body()
        try:
            if not self.tally.status:
                self.send_json(body, error.status, error.headers)
            else:
                self.closes = True
                if self.has_events:  # else a body that ends too early says it
                    self.write_event({"type": "error", **body} if self.is_app else body, True)
        except OSError:
            self.closes = True

    # Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html), or for
    # apps lines of JSON, in chunked transfer coding (RFC 9112, 7.1). An HTTP/1.0 client gets them
    # bare, to the end.

    def write_event(self, data: dict | str, is_last: bool = False) -> None:
        """Write an event; the first one starts the stream."""
        text = data.encode() if isinstance(data, str) else to_json(data)
        self.write_piece(text + b"\n" if self.is_app else b"data: %b\n\n" % text, is_last)

    def write_sign(self, text: str, data: dict | None) -> None:
        """Write a sign of life: a comment, or to an app `data`, if there is any."""
        if not self.is_app:
            self.write_piece(f": {text}\n\n".encode())
        elif data:
            self.write_event(data)

    def write_piece(self, piece: bytes, is_last: bool = False) -> None:
        """Write a piece of a stream; the first one sends the head."""
        if not self.tally.status:
            kind = "application/x-ndjson" if self.is_app else "text/event-stream"
            self.start_stream({"Content-Type": f"{kind}; charset=utf-8"})
        if self.is_chunked:
            end = b"0\r\n\r\n" if is_last else b""
            piece = b"%x\r\n%b\r\n%b" % (len(piece), piece, end) if piece else end
        self.write(piece)
        self.last_write = time.monotonic()

    def start_stream(self, headers: dict[str, str], status: int = 200) -> None:
        """Send the head of a reply whose length is not known yet."""
        self.is_chunked = self.head.version != "1.0"
        self.closes |= not self.is_chunked
        self.has_events = self.is_app or "event-stream" in headers.get("Content-Type", "")
        headers |= {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx: no waiting
        if self.is_chunked:
            headers["Transfer-Encoding"] = "chunked"
        self.send_head(status, headers)

    # ---- routes ----------------------------------------------------------------------

    def get_root(self) -> None:
        self.send_json({"name": NAME, "version": VERSION, "openai_base_url": "/v1",
                        "links": list(dict.fromkeys(path for _, path in ROUTES))})

    def get_help(self) -> None:
        """The route table, and what the bodies hold."""
        self.send_json({"name": NAME, "version": VERSION, "routes": [
            {"method": method, "path": path, "about": route.about,
             "body": sorted(typing.get_type_hints(route.reads)) if route.reads else []}
            for (method, path), route in ROUTES.items()]})

    def get_health(self) -> None:
        """200 when requests are served, else 503. Waits for nothing."""
        pool, state = self.server.pool, self.server.state()
        body: dict[str, Any] = {"status": state}
        if state == "loading":
            body["progress"] = round(pool.default.progress or 0.0, 2)
        if state == "failed":
            body["error"] = pool.default.error
        if engines := list(pool.engines().values()):
            stats = [each.stats for each in engines]
            body |= {"model": engines[0].model.name, "busy": sum(each.n_busy for each in stats),
                     "slots": sum(len(each.slots) for each in stats),
                     "waiting": sum(each.n_waiting for each in engines)}
        if state == "ok" and (coming := pool.coming()):
            body["loading"] = {"model": coming.name, "progress": round(coming.progress or 0.0, 2)}
        self.send_json(body, *((200, {}) if state == "ok" else (503, RETRY_SOON)))

    def get_slots(self) -> None:
        self.check_started()
        self.send_json([{"model": name, **dataclasses.asdict(slot)}
                        for name, loaded in self.server.pool.engines().items()
                        for slot in loaded.stats.slots])

    def get_metrics(self) -> None:
        self.send_body(metrics(self.server).encode(), "text/plain; version=0.0.4; charset=utf-8")

    def get_models(self) -> None:
        self.check_started()
        names = self.server.models.names()
        data = [self.model_entry(*item) for item in names.items()]
        data += [entry for entry in self.names_elsewhere() if entry["id"] not in names]
        self.send_json({"object": "list", "data": data})

    def get_model(self, name: str) -> None:
        self.check_started()
        self.send_json(self.model_entry(name, self.server.models.find(name)))

    def check_started(self) -> None:
        """503 at the start, while what will be loaded first is not."""
        with engine_errors():
            if self.server.stopping.is_set():
                raise engine.EngineClosed("the server is shutting down")
            self.server.pool.check_started()

    def names_elsewhere(self) -> list[dict]:
        """The models that openai_base_url lists; none when it does not answer, but a warning."""
        upstream = self.server.models.others
        try:
            return self.list_elsewhere(upstream) if upstream else []
        except ApiError as error:
            log.warning("%s cannot list the models elsewhere: %s", self.tally.id, error)
            return []

    def list_elsewhere(self, upstream: Upstream) -> list[dict]:
        """The entries of an engine's own list of models. Raises ApiError."""
        with self.ask(upstream, "GET", "/models", None, seconds=LIST_SECONDS) as response:
            if response.status != 200:
                raise ApiError(502, f"{upstream.name} answers {response.status} when asked for its "
                                    "models")
            try:
                entries = json.loads(read_all(response, MAX_FAR_BODY))["data"]
                return [entry for entry in entries if isinstance(entry["id"], str)]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ApiError(502, f"{upstream.name} sent no list of models") from None

    def model_entry(self, name: str, target: "engine.LocalModel | Upstream") -> dict:
        """A model in the list; what only a loaded model tells is left out for others.
        `max_model_len` is vLLM's name for the context length of a request, `meta` has
        llama-server's names."""
        created = self.server.started
        entry = {"id": name, "object": "model", "created": created}
        if isinstance(target, Upstream):
            return {**entry, "owned_by": target.name, "root": target.model or name, "parent": None}
        may = {f"allow_{what}": what not in ("create_engine", "fine_tuning", "search_indices")
               for what in ("create_engine", "sampling", "logprobs", "search_indices", "view",
                            "fine_tuning")}
        entry |= {"owned_by": NAME, "root": target.name, "parent": None, "permission": [
            {"id": f"modelperm-{NAME}", "object": "model_permission", "created": created,
             **may, "organization": "*", "group": None, "is_blocking": False}]}
        loaded = target.engine  # read once: it may be unloaded right now
        if loaded is None:
            return entry
        model = loaded.model
        return {**entry, "max_model_len": loaded.n_ctx, "meta": {
            "n_ctx": loaded.n_ctx, "n_ctx_train": model.n_ctx_train, "n_params": model.n_params,
            "size": model.size_bytes, "n_vocab": model.n_vocab, "n_embd": model.n_embd,
            "architecture": model.architecture, "quantization": model.quantization,
            "capabilities": [*["completion", "tools"] * model.generates,
                             *["vision"] * bool(target.mmproj), "embedding"]}}

    def log_messages(self, messages) -> None:
        """Log the text of messages as they were sent, if the settings say so."""
        if not self.server.config.log_messages or not isinstance(messages, list):
            return
        for message in messages:
            if isinstance(message, dict):
                content = message.get("content")
                for text in content if isinstance(content, list) else [content]:
                    if isinstance(text, dict):  # a part; an image would fill the log
                        text = text.get("text") or f"<{text.get('type')}>"
                    log.info("%s %s: %s", self.tally.id, printable(str(message.get("role"))),
                             describe(text, most=math.inf))

    def post_chat(self, chat: ChatBody, write: Callable | None = None) -> None:
        """write: takes the chunks, in place of our own ways to send them."""
        prompt, marked = self.render(chat)
        form = self.loaded.model.tool_format
        unclosed = engine.unclosed_reasoning(prompt)
        constraint = chat.constraint(form, unclosed)
        tokens, images = self.read_prompt(prompt, marked)
        parse = functools.partial(ChatParser, form if chat.offer.allowed else None,
                                  chat.offer.tools, unclosed, self.server.config.split_reasoning)
        self.generate(chat, [tokens], constraint, functools.partial(
            ChatRenderer, parse, old_style=chat.offer.where == "functions"), images=images,
            write=write)

    def render(self, chat: ChatBody) -> tuple[str, dict[str, list]]:
        """The prompt of a conversation, and its images by the marks in their places."""
        model, images = self.loaded.model, {}
        self.log_messages([dataclasses.asdict(message) for message in chat.messages])
        n_tokens = 0
        for at, part in chat.image_parts():
            part.text = f"<image {secrets.token_hex(16)}>"  # a mark that nobody else can write
            images[part.text] = pieces = self.encode_image(part.file, at)
            n_tokens += sum(len(getattr(piece, "rows", piece)) for piece in pieces)
            self.check_length(n_tokens, at, 1)
        messages = [dataclasses.asdict(message) for message in chat.messages]
        begun = messages.pop() if chat.continue_final_message else None
        if begun and begun["role"] != "assistant":
            raise invalid("continue_final_message", "continue_final_message: the last message is "
                                                    f"the {begun['role']}'s, not the assistant's")
        if taken := TEMPLATE_NAMES & (chat.chat_template_kwargs or {}).keys():
            raise invalid("chat_template_kwargs", f"chat_template_kwargs: {min(taken)!r} is set by "
                                                  "the server; leave it out")
        form = model.tool_format
        turns = prepare_messages(messages, chat.offer.tools, model.template_source, form)
        options = {"enable_thinking": chat.reasoning_effort not in ("none", "minimal"),
                   "reasoning_effort": chat.reasoning_effort} if chat.reasoning_effort else {}
        try:
            options |= {**(chat.chat_template_kwargs or {}),
                        "tools": prepare_tools(chat.offer.tools, form)}
            prompt = model.render_chat(turns, chat.add_generation_prompt or begun is not None,
                                       options)
        except engine.TemplateError as error:
            raise invalid("messages", f"messages: the model's chat template refuses them: {error}",
                          "template_error") from None
        if any(prompt.count(mark) != 1 for mark in images):
            raise invalid("messages", "messages: the model's chat template does not write each "
                                      "image once", "template_error")
        return prompt + (text_of(begun["content"] or "") if begun else ""), images

    def read_prompt(self, prompt: str, marked: dict[str, list]
                    ) -> tuple[np.ndarray, dict[int, engine.Piece]]:
        """The tokens of a prompt, and the images in it by where they begin."""
        if not marked:
            return self.tokenize(prompt, "messages"), {}
        parts = re.split(f"({'|'.join(map(re.escape, marked))})", prompt)
        self.check_fewest("".join(part for part in parts if part not in marked), "messages", 1)
        tokens, images = self.loaded.model.tokenize_parts(
            [marked.get(part, part) for part in parts])
        self.check_length(len(tokens) + engine.extra_tokens(images), "messages", 1)
        if tokens[-1] < 0:
            raise invalid("messages", "messages: the prompt ends with an image; add text")
        return tokens, images

    def read_images(self, chat: ChatBody, model: engine.LocalModel) -> None:
        """Get the files of all images, before the model must be there. Raises ApiError."""
        at = next((at for at, _ in chat.image_parts()), None)
        if at is None:
            return
        if not model.mmproj:
            raise invalid(at, f"{at}: {model.name} reads no images; ask a vision model (one with "
                              "an mmproj)", "unsupported_image")
        from features import vision
        vision.read_files(chat, self.server.config.allow_image_urls, self.check_connection)

    def encode_image(self, file: bytes, at: str) -> list[np.ndarray | engine.Piece]:
        """An image as the model reads it. Raises ApiError."""
        from features import vision
        self.check_connection()
        return vision.encode(self.loaded, file, at)

    def post_completion(self, completion: CompletionBody) -> None:
        loaded, best_of = self.loaded, completion.best_of or completion.n
        if best_of < completion.n or (best_of > completion.n and completion.stream):
            raise invalid("best_of", f"best_of: {best_of} was sent; it must be at least n "
                                     f"({completion.n}), and equal to n in a stream")
        prompts = self.read_prompts(completion.prompt, "prompt")
        if completion.suffix is not None:
            if not isinstance(completion.prompt, str):
                raise invalid("suffix", "suffix: the prompt must be one string")
            prompt = loaded.model.infill(completion.prompt, completion.suffix)
            if prompt is None:
                raise invalid("suffix", "suffix: this model was not trained to fill in; leave it "
                                        "out, or load one with fill-in-the-middle tokens")
            self.check_length(len(prompt), "prompt", 1)
            prompts = [prompt]
        self.generate(completion, prompts, completion.plain_constraint(), TextRenderer, best_of)

    def post_embeddings(self, request: EmbeddingBody) -> None:
        """https://platform.openai.com/docs/api-reference/embeddings"""
        loaded = self.loaded
        size = loaded.model.n_embd
        if (request.dimensions or 0) > size:
            raise invalid("dimensions", f"dimensions: {request.dimensions} was sent, this model's "
                                        f"vectors have {size}")
        texts = self.read_prompts(request.input, "input", n_reply=0)
        self.tally.prompt = sum(map(len, texts))
        from features import embeddings
        with engine_errors():
            vectors = embeddings.embed(loaded, texts, self.check_connection)
        if request.dimensions:  # a shorter vector is the longer one's beginning, of length 1 again
            vectors = vectors[:, : request.dimensions]
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        as_text = request.encoding_format == "base64"
        self.send_json({
            "object": "list", "model": request.model or loaded.model.name,
            "data": [{"object": "embedding", "index": index,
                      "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode()
                      if as_text else vector.tolist()} for index, vector in enumerate(vectors)],
            "usage": {"prompt_tokens": self.tally.prompt, "total_tokens": self.tally.prompt}})

    def post_tokenize(self, request: TokenizeBody) -> None:
        model = self.loaded.model
        tokens = model.tokenize(request.content, request.add_special, request.parse_special)
        self.send_json({"tokens": [
            {"id": token, "piece": piece_json(model.piece(token, special=True))}
            if request.with_pieces else token for token in tokens.tolist()]})

    def post_detokenize(self, request: DetokenizeBody) -> None:
        model = self.loaded.model
        self.check_tokens(request.tokens, "tokens")
        pieces = b"".join(model.piece(token, special=True) for token in request.tokens)
        self.send_json({"content": pieces.decode("utf-8", "replace")})

    def post_template(self, chat: ChatBody) -> None:
        prompt, marked = self.render(chat)
        for mark in marked:
            prompt = prompt.replace(mark, "<image>")
        self.send_json({"prompt": prompt})

    # ---- the dialect of local apps ---------------------------------------------------------

    def get_app_models(self) -> None:
        """Those that are loaded, and all that a request may ask for."""
        entries = [{"model_key": name, "vision": bool(target.mmproj), "loaded":
                    target.engine is not None} if isinstance(target, engine.LocalModel) else
                   {"model_key": name, "engine": target.name} for name, target
                   in self.server.models.names().items()]
        entries += [{"model_key": entry["id"], "engine": UPSTREAM}
                    for entry in self.names_elsewhere()]
        self.send_json({"loaded": [each for each in entries if each.get("loaded")],
                        "available": entries})

    def post_load(self, request: LoadBody) -> None:
        """Load a model; one elsewhere must just answer."""
        try:
            target, pool = self.server.models.find(request.model_key), self.server.pool
            if isinstance(target, Upstream):
                listed = [entry["id"] for entry in self.list_elsewhere(target)]
                if target is self.server.models.others and request.model_key not in listed:
                    raise ApiError(404, "Model not found")
            with engine_errors():
                if isinstance(target, engine.LocalModel):
                    pool.load(target, request.exclusive, self.check_connection)
                elif request.exclusive:
                    pool.unload(pool.loaded(), self.check_connection)
        except ApiError as error:
            why = "Model not found" if error.code == "model_not_found" else error.message
            return self.send_json({"loaded": False, "error": f"Failed to load model: {why}"},
                                  error.status, error.headers)
        self.send_json({"loaded": True, "model": request.model_key})

    def post_unload(self, request: UnloadBody) -> None:
        """Give the memory of one model or of all back, when their running work is done."""
        models = list(self.server.pool.models().values())
        if request.model_key is not None:
            target = self.server.models.find(request.model_key)
            if isinstance(target, Upstream):
                raise invalid("model_key", f"{describe(request.model_key)} is an engine elsewhere: "
                                           "it cannot be unloaded from here")
            models = [target]
        names = [model.name for model in models if model.engine]
        with engine_errors():
            self.server.pool.unload(models, self.check_connection)
        self.send_json({"unloaded": True, "models": names})

    def post_app_chat(self, request: AppBody, **how) -> None:
        """A chat, as answer_app says."""
        try:
            self.answer_app(request, **how)
        except ApiError as error:
            if error.status == 503:
                error.message = f"Chat service unavailable: {error.message}"
            raise

    def answer_app(self, request: AppBody, sees: bool = False, streams: bool = False) -> None:
        """A chat; sees: the default model is the one for images."""
        target = self.server.models.find(request.model_key, sees)
        name = request.model_key or (target.model if isinstance(target, Upstream) else target.name)
        body = request.openai(name)
        if isinstance(target, Upstream):
            self.log_messages(body["messages"])
            with self.ask(target, "POST", "/chat/completions", self.for_upstream(target, body)) \
                    as response:
                return self.write_app_reply(name, streams, read_chunks(response, target))
        chat = self.read_fields(ChatBody, body)
        self.streams = streams
        self.read_images(chat, target)
        with self.lease(target):
            self.post_chat(chat, functools.partial(self.write_app_reply, name, streams))

    def write_app_reply(self, name: str, streams: bool, chunks: Iterator[dict]) -> None:
        """Write a reply from the chunks of a chat completion."""
        reason, told, texts = "stop", None, []
        for chunk in chunks:
            for choice in chunk["choices"] or ():
                reason = choice.get("finish_reason") or reason
                if text := (choice.get("delta") or {}).get("content"):
                    texts.append(text)
                    if streams:
                        self.write_event({"type": "fragment", "content": text})
            told = (chunk.get("usage") or {}).get("completion_tokens", told)
        n_predicted = len(texts) if told is None else told
        if streams:
            self.write_event({"type": "done", "model": name, "predicted_tokens": n_predicted,
                              "stop_reason": reason}, is_last=True)
        else:
            self.send_json({"model": name, "content": "".join(texts), "stop_reason": reason,
                            "predicted_tokens": n_predicted})

    # ---- engines elsewhere ---------------------------------------------------------------

    def relay(self, upstream: Upstream, sent: dict, body: bytes) -> None:
        """Pass a request on as it came, but for the model's name, and the reply as it arrives."""
        path = self.head.path.rstrip("/")
        if not path.startswith("/v1/"):
            raise invalid("model", f"{describe(sent.get('model'))} is an engine elsewhere; it "
                                   f"takes /v1 and /chat, not {describe(path)}")
        self.streams = sent.get("stream") is True
        self.log_messages(sent.get("messages"))
        if upstream.model not in (None, sent.get("model")):
            body = self.for_upstream(upstream, sent)
        with self.ask(upstream, "POST", path.removeprefix("/v1"), body) as response:
            headers = {name: " ".join(value.split()) for name in PASSED_ON
                       if (value := response.headers.get(name))}
            if response.status in (204, 205, 304):  # they have no body, and no length
                return self.send_head(response.status, headers)
            if response.length is None:
                self.start_stream(headers, response.status)
            else:
                self.send_head(response.status, {**headers, "Content-Length": str(response.length)})
                self.is_chunked = False
            try:
                for piece in read_pieces(response):
                    self.write_piece(piece)
            except (http.client.HTTPException, TimeoutError, ApiError):
                if self.has_events:
                    self.write_piece(b"\n\n")  # behind half a line: the error is its own event
                raise
            self.write_piece(b"", is_last=True)

    @staticmethod
    def for_upstream(upstream: Upstream, sent: dict) -> bytes:
        """A body with the model's name there. Raises ApiError."""
        named = {**sent, "model": upstream.model or sent.get("model")}
        try:
            return json.dumps(named, allow_nan=False).encode()
        except ValueError:  # such as 1e999
            raise ApiError(400, "bad JSON: a number is too large", code="invalid_json") from None

    @contextlib.contextmanager
    def ask(self, upstream: Upstream, method: str, path: str, body: bytes | None,
            seconds: float | None = None) -> Iterator[http.client.HTTPResponse]:
        """The response of an engine elsewhere, while our client is there. seconds: for all of
        it, besides its timeout. Raises ApiError; an error of its own is one only for apps."""
        via, until = self.head.headers.get("via", ""), time.monotonic() + (seconds or math.inf)
        if self.server.via in via:
            raise ApiError(508, f"{upstream.name} leads back to this server", code="relay_loop")
        self.tally.upstream = upstream.name
        headers = {"Content-Type": "application/json", **upstream.headers(),
                   "Via": f"{via}, {self.server.via}" if via else self.server.via}

        def check() -> None:
            self.check_connection()
            if self.server.is_over:
                raise unavailable("the server is shutting down", "shutting_down")
            if time.monotonic() > until:
                raise TimeoutError

        try:
            with request_elsewhere(method, upstream.base_url + path, body, headers,
                                   upstream.timeout, check) as response:
                if response.status >= 400 and self.is_app:
                    wait = response.headers.get("Retry-After")
                    text = upstream.mask(error_in(read_all(response, MAX_FAR_LINE)))
                    raise ApiError(response.status, f"{upstream.name}: {text}",
                                   headers={"Retry-After": wait} if wait else None)
                yield response
        except TimeoutError:
            raise ApiError(504, f"{upstream.name} sent nothing for "
                                f"{seconds or upstream.timeout:g} seconds",
                           code="upstream_timeout") from None
        except Unreachable as error:
            raise ApiError(502, f"Could not connect to {upstream.name}: {error}",
                           code="upstream_unreachable") from None
        except http.client.HTTPException as error:
            raise ApiError(502, f"{upstream.name} broke off or sent no HTTP: "
                                f"{type(error).__name__}", code="upstream_failed") from None

    # ==== 8. Generation: prompt, submit, events =========================================

    def generate(self, body: GenerationBody, prompts: list[np.ndarray],
                 constraint: structured.Form | None, renderer: Callable, best_of: int | None = None,
                 images: dict[int, engine.Piece] | None = None,
                 write: Callable | None = None) -> None:
        """Submit the choices, and write their reply. images: those of the only prompt. write:
        takes the chunks, in place of our own ways to send them."""
        if body.stream_options and not body.stream:
            raise invalid("stream_options", "stream_options needs stream: true")
        loaded, n_each = self.loaded, best_of or body.n
        choices = self.make_choices(loaded, body, prompts, n_each, constraint)
        for choice in choices:
            choice.images = images or {}
        self.tally.prompt = sum(choice.n_prompt for choice in choices[::n_each])
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        reply = renderer(body, choices, loaded.model, with_usage)
        try:
            with engine_errors(body.constrained_by()):
                loaded.submit(choices)
                chunks = reply.chunks(self.events(choices, self.streams))
                if write:
                    write(chunks)
                elif body.stream:
                    self.write_stream(chunks)
                else:
                    self.send_json(reply.fold(chunks, n_each))
        finally:
            for choice in choices:
                choice.cancel()
            self.tally.cached = sum(choice.n_reused for choice in choices[::n_each])
            self.tally.generated = sum(choice.n_generated for choice in choices)

    def write_stream(self, chunks: Iterator[dict]) -> None:
        """Write a reply's chunks; the first one decides the status."""
        for chunk in chunks:
            self.write_event(chunk)
        self.write_event("[DONE]", is_last=True)

    def make_choices(self, loaded: engine.Engine, body: GenerationBody, prompts: list[np.ndarray],
                     n_each: int, constraint: structured.Form | None) -> list[engine.Request]:
        """n_each requests for each prompt. Everything that can be refused is refused here, before
        the engine hears of it."""
        must_trigger = not (isinstance(body, ChatBody) and body.may_answer_freely)
        model, stops, n_top = loaded.model, body.stops(), body.n_top_logprobs()
        if not model.generates:
            raise invalid("model", f"{model.name} makes embeddings only; ask /v1/embeddings")
        n_vocab, bias = model.n_vocab, body.logit_bias or {}
        for token in bias:  # JSON's keys are strings; a wrong id must not reach the model
            is_number = token.isascii() and token.isdigit() and len(token) < 12
            if not (is_number and int(token) < n_vocab):
                raise invalid("logit_bias", f"logit_bias: the key {describe(token)} is not a token "
                                            f"id of this model (0 to {n_vocab - 1})")
        ends = dict.fromkeys(model.end_tokens, -math.inf) if body.ignore_eos else {}
        params = {field.name: getattr(body, field.name)
                  for field in dataclasses.fields(engine.SamplingParams)}
        params["logit_bias"] = {int(token): value for token, value in bias.items()} | ends
        limit = given(body.reply_limit(), self.server.config.max_tokens)
        limit = loaded.n_ctx if limit is None else limit
        events: queue.SimpleQueue = queue.SimpleQueue()
        choices, n_choices = [], n_each * len(prompts)
        if n_choices > MAX_CHOICES:
            param = "n" if n_each > 1 else "prompt"
            raise invalid(param, f"{param}: {len(prompts)} prompts with {n_each} replies each were "
                                 f"asked for; the limit is {MAX_CHOICES} replies in one request")
        expected, new_reply = self.read_prediction(body), None
        if constraint:
            with schema_errors():
                new_reply = constraint.replies(model, must_trigger)
        for index in range(n_choices):
            prompt = prompts[index // n_each]
            if body.seed is not None:
                params["seed"] = body.seed + index * SEED_STRIDE
            sampler = engine.Sampler(model, engine.SamplingParams(**params), loaded.n_ctx, prompt,
                                     new_reply() if new_reply else None)
            choices.append(engine.Request(
                prompt, sampler, limit, stops, 0 if n_each > body.n and n_top is None else n_top,
                index, scores_prompt=body.scores_prompt() and index % n_each == 0,
                reuses=body.cache_prompt, events=events,
                expected=expected))
        return choices

    def read_prediction(self, body: GenerationBody) -> np.ndarray | None:
        """The tokens of what a chat's reply may be like."""
        predicted = body.prediction.text() if getattr(body, "prediction", None) else ""
        if not predicted:
            return None
        self.check_fewest(predicted, "prediction", 0)
        tokens = self.loaded.model.tokenize(predicted, bos=False, special=False)
        self.check_length(len(tokens), "prediction", 0)
        return tokens

    def read_prompts(self, prompts: Prompts, param: str, n_reply: int = 1) -> list[np.ndarray]:
        """The tokens of a text or a list of tokens, or of each in a list. n_reply: tokens of the
        context that a reply needs."""
        if isinstance(prompts, str) or prompts and isinstance(prompts[0], int):
            prompts = [prompts]
        if not 0 < len(prompts) <= MAX_INPUTS:
            raise invalid(param, f"{param}: {len(prompts)} texts were sent; send 1 to {MAX_INPUTS}")
        return [self.tokenize(prompt, param, n_reply) if isinstance(prompt, str) else
                self.read_tokens(prompt, param, n_reply) for prompt in prompts]

    def read_tokens(self, tokens: list[int], param: str, n_reply: int) -> np.ndarray:
        """Token ids from a client; 400 when there are none, or too many."""
        self.check_tokens(tokens, param)
        self.check_length(len(tokens), param, n_reply)
        return np.array(tokens, dtype=np.int32)

    def check_tokens(self, tokens: list[int], param: str) -> None:
        """400 for a token outside the vocabulary, which would end the process in C."""
        n_vocab = self.loaded.model.n_vocab
        if wrong := [token for token in tokens if not 0 <= token < n_vocab]:
            raise invalid(param, f"{param}: {describe(wrong[0])} is not a token id of this model "
                                 f"(0 to {n_vocab - 1})")

    def tokenize(self, text: str, param: str, n_reply: int = 1) -> np.ndarray:
        """The tokens of a text; 400 when there are none, or too many."""
        self.check_fewest(text, param, n_reply)
        tokens = self.loaded.model.tokenize(text)
        self.check_length(len(tokens), param, n_reply)
        return tokens

    def check_fewest(self, text: str, param: str, n_reply: int) -> None:
        """400 for a text that surely has too many tokens."""
        n_ctx = self.loaded.n_ctx
        if len(text) > n_ctx:  # characters: it may or may not fit
            fewest = self.loaded.model.fewest_tokens(text)
            if fewest > n_ctx - n_reply:
                self.check_length(fewest, param, n_reply, "over ")

    def check_length(self, n_tokens: int, param: str, n_reply: int, over: str = "") -> None:
        """400 for no tokens, or more than the context holds."""
        n_ctx = self.loaded.n_ctx
        if n_tokens > n_ctx - n_reply:
            reply = ", one of them for the reply" * n_reply
            raise invalid(param, f"{param}: the text has {over}{n_tokens} tokens, but the "
                                 f"context is {n_ctx} tokens{reply}; shorten the text or raise "
                                 "n_ctx", "context_length_exceeded")
        if n_tokens == 0:
            raise invalid(param, f"{param}: the text is empty; send at least one token")

    def check_connection(self) -> None:
        """Raise ConnectionError when the client has closed its side."""
        if self.hangup.poll(0):  # it says so even behind bytes that the client sent before
            raise ConnectionError("the client hung up")

    def events(self, choices: list[engine.Request], streams: bool) -> Iterator[engine.Event]:
        """Yield the engine's events until each choice has ended; in a stream that has been silent
        for ping_interval, write a comment. Raises ConnectionError as soon as the client closes
        its side, and the engine's own EngineFault or EngineClosed."""
        unfinished, self.last_write = len(choices), time.monotonic()
        silence = self.server.config.ping_interval if streams else 0
        while unfinished:
            try:
                event = choices[0].events.get(timeout=POLL_SECONDS)
            except queue.Empty:
                event = None
            self.check_connection()
            if silence and time.monotonic() - self.last_write > silence:
                self.write_sign("ping", None)
            if event is None:
                continue
            event.request.n_read += 1
            if event.error:
                raise event.error
            if self.tally.first_token is None:
                self.tally.first_token = time.monotonic() - self.tally.started
            unfinished -= event.finish_reason is not None
            yield event


SEED_STRIDE = 0x9E3779B9  # 2**32 / golden ratio: choice 2 of a seed is not choice 1 of the next
POLL_SECONDS = engine.POLL_SECONDS


UNAVAILABLE = {engine.QueueFull: "queue_full", engine.EngineClosed: "shutting_down",
               engine.ModelLoading: "loading", engine.ModelFailed: "model_failed"}


@contextlib.contextmanager
def schema_errors():
    """A schema's or a grammar's refusal as a 400 at its place, with which its message starts."""
    try:
        yield
    except structured.SchemaError as error:
        raise invalid(str(error).split(":")[0], str(error)) from None


@contextlib.contextmanager
def engine_errors(grammar_from: str | None = None):
    """The engine's refusals and faults as ApiErrors; grammar_from: the field of the grammar."""
    try:
        yield
    except tuple(UNAVAILABLE) as error:
        raise unavailable(str(error), UNAVAILABLE[type(error)]) from None
    except engine.GrammarError as error:
        raise invalid(grammar_from, f"{grammar_from}: the grammar is refused: {error}") from None
    except engine.EngineFault as error:
        raise ApiError(500, str(error), code="engine_error") from None


def given(value, default):
    """`value`, or the default where the client sent none."""
    return default if value is None else value


# ==== 9. Routes and metrics ===============================================================

@dataclasses.dataclass(frozen=True)
class Route:
    """What answers a method and path."""

    answer: Callable  # takes the handler, and the body or what stands at the path's {id}
    about: str
    reads: type | None = None  # the body's dataclass
    is_app: bool = False  # local apps' dialect: errors are {"detail": ...}


def app_chat(about: str, **how) -> Route:
    """A chat in the dialect of local apps; how: the arguments of Handler.answer_app."""
    return Route(functools.partial(Handler.post_app_chat, **how), about, AppBody, True)


ROUTES = {
    ("GET", "/"): Route(Handler.get_root, "name, version, paths"),
    ("GET", "/help"): Route(Handler.get_help, "this list", None, True),
    ("GET", "/health"): Route(Handler.get_health, "whether requests are served"),
    ("GET", "/metrics"): Route(Handler.get_metrics, "counts and times, for Prometheus"),
    ("GET", "/slots"): Route(Handler.get_slots, "what each slot does"),
    ("GET", "/v1/models"): Route(Handler.get_models, "all models"),
    ("GET", "/v1/models/{id}"): Route(Handler.get_model, "one model"),
    ("POST", "/v1/chat/completions"): Route(
        Handler.post_chat, "conversations, with images, tools, structured output and reasoning, "
        "streamed or not", ChatBody),
    ("POST", "/v1/completions"): Route(
        Handler.post_completion, "texts or token ids, one or a list of them, streamed or not",
        CompletionBody),
    ("POST", "/v1/embeddings"): Route(
        Handler.post_embeddings, "vectors of texts or token ids, one or a list of them",
        EmbeddingBody),
    ("POST", "/tokenize"): Route(Handler.post_tokenize, "content to tokens", TokenizeBody),
    ("POST", "/detokenize"): Route(Handler.post_detokenize, "tokens to content", DetokenizeBody),
    ("POST", "/apply-template"): Route(
        Handler.post_template, "the body of a chat to the prompt that the model would read",
        ChatBody),
    ("GET", "/models"): Route(
        Handler.get_app_models, "the models that are loaded, and those available", None, True),
    ("POST", "/models/load"): Route(
        Handler.post_load, "load a model; exclusive: unload the others", LoadBody, True),
    ("POST", "/models/unload"): Route(
        Handler.post_unload, "unload a model, or all", UnloadBody, True),
    ("POST", "/chat"): app_chat("a chat with any model"),
    ("POST", "/chat/stream"): app_chat("the same, streamed as lines of JSON", streams=True),
    ("POST", "/chat/regular"): app_chat("a chat with the default text model"),
    ("POST", "/chat/regular/stream"): app_chat("the same, streamed", streams=True),
    ("POST", "/chat/vision"): app_chat("a chat with the default vision model", sees=True),
    ("POST", "/chat/vision/stream"): app_chat("the same, streamed", sees=True, streams=True),
}


APP_PATHS = {path for (_, path), route in ROUTES.items() if route.is_app}
PUBLIC = {"/", "/health", "/help"}  # without a key, and not counted by the rate limit


def find_route(method: str, path: str) -> tuple[str, Route, list[str]]:
    """The pattern and route for a method and path, and what stands at the path's {id}. 404 or
    405."""
    path = path.rstrip("/") or "/"
    allowed = set()
    for (route_method, pattern), route in ROUTES.items():
        stem, has_id, _ = pattern.partition("{id}")
        rest = path.removeprefix(stem)
        if path != "*" and (not path.startswith(stem) or bool(rest) != bool(has_id)):
            continue
        if method == route_method or (method, route_method) == ("HEAD", "GET"):
            return pattern, route, [rest] if has_id else []
        allowed |= {route_method, "OPTIONS"} | ({"HEAD"} if route_method == "GET" else set())
        matched = pattern
    methods = ", ".join(sorted(allowed))
    if allowed and method == "OPTIONS":
        about = "what a path takes"
        return path if path == "*" else matched, Route(Handler.options, about), [methods]
    if allowed:
        raise ApiError(405, f"{describe(path)} does not take {method}, but {methods}",
                       code="method_not_allowed", headers={"Allow": methods})
    raise ApiError(404, f"unknown path {describe(path)}; GET / lists all", code="not_found")


def metrics(server: Server) -> str:
    """The text that Prometheus reads:
    https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format"""
    pool, stats, loaded = server.pool, server.pool.stats(), server.pool.engines()
    with server.changed:
        answered, n_connections = dict(server.answered), len(server.connections)
    requests = {f'{{route="{route}",status="{status}"}}': count
                for (route, status), count in sorted(answered.items())}
    lines = []
    for name, kind, about, samples in (
            ("requests_total", "counter", "requests by route and status", requests),
            ("prompt_tokens_total", "counter", "tokens of prompts", stats.n_prompt),
            ("cached_tokens_total", "counter", "of these, tokens that the KV cache held already",
             stats.n_cached),
            ("generated_tokens_total", "counter", "tokens generated", stats.n_generated),
            ("accepted_draft_tokens_total", "counter", "of these, tokens that were drafted",
             stats.n_accepted),
            ("rejected_draft_tokens_total", "counter", "tokens that were drafted in vain",
             stats.n_rejected),
            ("restored_prefixes_total", "counter", "prefixes that came back from host memory",
             stats.n_restored),
            ("steps_total", "counter", "turns of the engine's loop", stats.n_steps),
            ("decode_errors_total", "counter", "batches that llama_decode refused",
             stats.n_decode_errors),
            ("waiting_requests", "gauge", "choices that wait for a slot",
             sum(each.n_waiting for each in loaded.values())),
            ("model_loads_total", "counter", "models loaded", pool.n_loads),
            ("loaded_models", "gauge", "models that are loaded now", len(loaded)),
            ("waiting_for_model", "gauge", "requests that wait for a model to be loaded",
             pool.n_waiting),
            ("busy_slots", "gauge", "slots with a request", stats.n_busy),
            ("slots", "gauge", "slots", len(stats.slots)),
            ("connections", "gauge", "open connections", n_connections),
            ("batch_tokens", "histogram", "tokens in each batch", buckets(stats.batch)),
            ("time_to_first_token_seconds", "histogram", "from the queue to the first token",
             buckets(stats.first_token)),
            ("inter_token_seconds", "histogram", "from one token of a reply to the next",
             buckets(stats.inter_token))):
        lines += [f"# HELP {NAME}_{name} {about}", f"# TYPE {NAME}_{name} {kind}"]
        samples = samples if isinstance(samples, dict) else {"": samples}
        lines += [f"{NAME}_{name}{labels} {value}" for labels, value in samples.items()]
    return "\n".join([*lines, ""])


def buckets(values: engine.Histogram) -> dict[str, float]:
    """The samples of a histogram, by what follows its name."""
    sums = list(itertools.accumulate(values.counts))
    bounds = [*map(str, values.bounds), "+Inf"]
    return {**{f'_bucket{{le="{bound}"}}': count for bound, count in zip(bounds, sums)},
            "_sum": values.total, "_count": sums[-1]}


# ==== 10. Chat: messages into what templates take, text into deltas ======================

NEW_ROLES = {"developer": "system", "function": "tool"}
TOOLS_TEXT = ("You can call these functions, described with JSON Schema:\n\n{}\n\nTo call one, "
              "write its name and arguments in exactly this form:\n{}\nIf none helps, just answer.")


def prepare_tools(tools: list[dict] | None, form: engine.ToolFormat) -> list[dict] | None:
    """The tools as a template takes them, with nothing left out; None where it takes none."""
    blank = {"name": "", "description": "", "parameters": {"type": "object", "properties": {}}}
    return [{"type": "function", "function": {**blank, **tool["function"]}}
            for tool in tools] if tools and form.native else None


def prepare_messages(messages: list[dict], tools: list[dict] | None, template_source: str | None,
                     form: engine.ToolFormat) -> list[dict]:
    """OpenAI messages for a chat template. Where that is not native, calls and results become
    text, and the system message describes the tools. Where it refuses system messages, they
    become the beginning of the next user message."""
    joined = {("system", "system")}  # roles of neighbours that become one message
    joined |= set() if form.native else {("tool", "tool"), ("tool", "user")}
    joined |= {("system", "user")} if engine.NO_SYSTEM in (template_source or "") else set()
    messages = list(messages)
    if tools and not form.native:
        lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        text = TOOLS_TEXT.format(lines, _write_calls(form, [("NAME", "{...}")]))
        has_system = bool(messages) and messages[0]["role"] in ("system", "developer")
        messages.insert(has_system, {"role": "system", "content": text})
    turns, before = [], None
    for message in messages:
        turn, role = _prepare(message, form), NEW_ROLES.get(message["role"], message["role"])
        if (before, role) in joined:
            turn["content"] = f"{turns.pop()['content']}\n\n{turn['content']}"
        turns.append(turn)
        before = role
    return turns


def _prepare(message: dict, form: engine.ToolFormat) -> dict:
    """One message. The old function_call and role function have no ids: the name serves."""
    def new_id(call_id: str) -> str:
        fits = not form.short_ids or re.fullmatch("[A-Za-z0-9]{9}", call_id)
        return call_id if fits else hashlib.sha256(call_id.encode()).hexdigest()[:9]

    role, content = message["role"], text_of(
        message.get("content") or message.get("refusal") or "")
    turn = {"role": NEW_ROLES.get(role, role), "content": content}
    if message.get("reasoning_content"):
        turn["reasoning_content"] = message["reasoning_content"]
    old = message.get("function_call")
    calls = message.get("tool_calls") or ([{"id": old["name"], "function": old}] if old else [])
    if turn["role"] == "tool":
        turn["tool_call_id"] = new_id(message.get("tool_call_id") or message.get("name") or "")
        if not form.native:
            turn = {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    elif calls and form.native:
        turn["tool_calls"] = [{"id": new_id(call["id"]), "type": "function", "function": {
            **call["function"], "arguments": _read_object(call["function"]["arguments"])}}
            for call in calls]
    elif calls:
        texts = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
        turn["content"] = f"{content}\n{_write_calls(form, texts)}".lstrip("\n")
    return turn


def text_of(content: str | list[dict]) -> str:
    """A message's content, its parts joined: texts by a newline, images as they are."""
    if isinstance(content, str):
        return content
    text = ""
    for before, part in zip([None, *content], content):
        is_image = "image_url" in (part["type"], before and before["type"])
        text += "" if before is None or is_image else "\n"
        text += part["text"] or part["refusal"]
    return text


def _read_object(text: str) -> dict | str:
    """Arguments as templates take them, by Hugging Face's convention; no object stays text."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _write_calls(form: engine.ToolFormat, calls: list[tuple[str, str]]) -> str:
    """Calls (name, arguments as JSON) as their model would have written them."""
    texts = [name + form.between + (arguments or "{}") + form.ending for name, arguments in calls]
    return form.trigger + form.opening + form.separator.join(texts) + form.closing


MAX_HELD = 96  # characters; the tags are shorter, and more white space than that goes on


class ChatParser:
    """Turns a reply that arrives in pieces into OpenAI deltas: content, reasoning, tool calls.

    Holds back only what may be part of a tag, or white space around one: the work for a piece does
    not depend on the text before. The generators yield where they need more text.

    >>> parser = ChatParser()
    >>> parser.feed("<thi"), parser.feed("nk>Hm.</think> Yes"), parser.finish()
    ([], [{'reasoning_content': 'Hm.'}, {'content': 'Yes'}], [])
    """

    def __init__(self, form: engine.ToolFormat | None = None, tools: list[dict] | None = None,
                 unclosed: str = "", split_reasoning: bool = True):
        """form: None where no calls are looked for. tools: for the types of XML parameters.
        unclosed: what unclosed_reasoning says of the prompt."""
        self.n_calls = self.n_whole = 0  # calls begun and ended
        self._form, self._unclosed = form, unclosed
        self._tags = engine.REASONING_TAGS if split_reasoning else {}
        functions = [tool["function"] for tool in tools or ()]
        self._schemas = {each["name"]: each.get("parameters") or {} for each in functions}
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
        """The reply has ended: return what was held back. A call cut off stays incomplete."""
        self._ended = True
        return self.feed("")

    def _reply(self) -> Generator:
        close = self._unclosed or self._tags.get((yield from self._choose(*self._tags)))
        if close:
            yield from self._until(close, functools.partial(self._say, "reasoning_content"), "both")
        form, strip = self._form or engine.NO_CALLS, "both" if close else "end"
        if form.at_start and (yield from self._choose(form.trigger)):
            yield from self._calls(form)
        trigger = "" if form.at_start else form.trigger
        say = functools.partial(self._say, "content")
        while (yield from self._until(trigger, say, strip)) is not None:
            yield from self._calls(form)
            strip = "both"

    def _calls(self, form: engine.ToolFormat) -> Generator:
        more = (yield from self._choose(form.opening)) is not None
        while more and (name := (yield from self._until(form.between))):
            self.n_calls += 1
            self._add_arguments("", id=new_call_id(form), type="function", function={"name": name})
            read = self._parameters(name, form) if form.xml else self._object(form)
            self.n_whole += bool((yield from read))
            ends = filter(None, (form.separator, form.closing))
            more = (yield from self._choose(*ends)) == form.separator
        if self._ended:
            self._pending = ""  # part of one of the literals

    def _object(self, form: engine.ToolFormat) -> Generator:
        """A JSON object, passed on as it comes, up to the brace that closes its first and the
        ending behind it; whether both came."""
        depth, in_string, escaped = 0, False, False
        while not self._ended:
            end = 0  # of what is read in this piece
            for end, char in enumerate(self._pending, start=1):
                if in_string:
                    in_string, escaped = escaped or char != '"', char == "\\" and not escaped
                else:
                    in_string = char == '"'
                    depth += (char in "{[") - (char in "]}")
                    if depth == 0:
                        break
            text, self._pending = self._pending[:end], self._pending[end:]
            self._add_arguments(text)
            if text and depth == 0:
                return (yield from self._choose(form.ending)) is not None
            yield

    def _parameters(self, function: str, form: engine.ToolFormat) -> Generator:
        """XML parameters, passed on as a JSON object, up to the ending; whether that came."""
        properties, before = self._schemas.get(function, {}).get("properties", {}), "{"
        start, end = engine.PARAMETER, engine.PARAMETER_END
        while (found := (yield from self._choose(start, form.ending))) == start:
            if not (name := (yield from self._until(form.between))):
                return False
            quote, convert = ('"', quoted) if engine.is_text(properties.get(name)) else ("", str)
            self._add_arguments(f'{before}"{quoted(name)}": {quote}')
            add = functools.partial(self._add_converted, convert)
            if (yield from self._until(end, add)) is not None:
                self._add_arguments(quote)
            before = ", "
        if found:
            self._add_arguments("{}" if before == "{" else "}")
        return bool(found)

    def _add_converted(self, convert: Callable[[str], str], text: str) -> None:
        self._add_arguments(convert(text))

    def _until(self, marker: str, add: Callable[[str], None] | None = None,
               strip: str = "") -> Generator:
        """Pass text on to `add` up to a marker ("" for none); None if the reply ends before it.
        Without `add`, return the text. strip: whether white space goes at its "end" or "both"."""
        parts: list[str] = []
        while True:
            text, found, rest = (self._pending.partition(marker) if marker
                                 else (self._pending, "", ""))
            text = text.lstrip() if strip == "both" else text
            if found:
                text = text.rstrip() if strip else text
            elif marker and not (self._ended and strip):  # only prose gets back what was held
                held = _beginning(marker, bool(strip)).search(text, max(0, len(text) - MAX_HELD))
                text, rest = text[:held.start()], held.group()
            self._pending = rest
            if text:
                (add or parts.append)(text)
                strip = strip and "end"
            if found or self._ended:
                return "".join(parts) if found else None
            yield

    def _choose(self, *literals: str) -> Generator:
        """Read and return one of the literals, white space in front or not; None if none comes."""
        while True:
            text = self._pending.lstrip()
            for literal in literals:
                if text.startswith(literal.lstrip()):
                    self._pending = text[len(literal.lstrip()):]
                    return literal
            may_come = any(literal.lstrip().startswith(text) for literal in literals)
            if self._ended or not may_come or len(self._pending) > MAX_HELD:
                return None
            yield

    def _say(self, key: str, value) -> None:
        self._deltas.append({key: value})

    def _add_arguments(self, text: str, **head) -> None:
        """A fragment of the last call's arguments; with a `head` also its beginning."""
        if text or head:
            part = {"function": {**head.pop("function", {}), "arguments": text}}
            self._say("tool_calls", [{"index": self.n_calls - 1, **head, **part}])


def quoted(text: str) -> str:
    """Text as it stands inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


@functools.cache
def _beginning(marker: str, trim: bool) -> re.Pattern:
    """What may become a marker, at the end of a text; with the white space in front, if `trim`."""
    prefixes = "|".join(re.escape(marker[:n]) for n in range(len(marker) - 1, 0, -1))
    return re.compile((r"\s*" if trim else "") + f"(?:{prefixes})?" + r"\Z")


def new_call_id(form: engine.ToolFormat) -> str:
    """A random id in the shape that the API, or the model's template, asks for."""
    letters = secrets.SystemRandom().choices(string.ascii_letters + string.digits, k=24)
    return "".join(letters[:9]) if form.short_ids else "call_" + "".join(letters)


# ==== 11. Rendering: events into chunks, chunks into a reply =============================

LOWEST_LOGPROB = -9999.0  # what the OpenAI API sends for an impossible token; JSON has no -inf


def to_json(value) -> bytes:
    """Compact JSON, UTF-8."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode(errors="replace")  # an error may quote half a character


def merge(whole: dict, part: dict) -> dict:
    """Fold a delta into what came before: text and lists grow, null changes nothing; the calls
    in a list of them are deltas themselves."""
    for name, value in part.items():
        old = whole.get(name)
        if isinstance(value, dict):
            whole[name] = merge(old or {}, value)
        elif name == "tool_calls":
            calls = whole.setdefault(name, [])
            for call in value:
                calls += [{} for _ in range(len(calls), call["index"] + 1)]
                merge(calls[call["index"]], {
                    key: inner for key, inner in call.items() if key != "index"})
        elif isinstance(old, (str, list)) and value is not None:
            whole[name] = old + value
        elif value is not None or name not in whole:
            whole[name] = value
    return whole


class Renderer:
    """Writes one reply. Subclasses give the two endpoints their shapes: `opening` is what the
    first chunk of a choice carries, `closing` the last one, `parts` what is between."""

    def __init__(self, body: GenerationBody, choices: list[engine.Request], model: engine.Model,
                 with_usage: bool):
        """with_usage: end the stream with the token counts."""
        self.body, self.choices, self.model, self.with_usage = body, choices, model, with_usage
        self.unsent: list[tuple[engine.TokenLogprob, ...]] = [()] * len(choices)
        self.head = {"id": f"{self.id_prefix}-{secrets.token_hex(12)}",
                     "object": self.stream_object, "created": int(time.time()),
                     "model": body.model or model.name,
                     "system_fingerprint": f"{NAME}-{VERSION}"}

    def chunks(self, events: Iterator[engine.Event]) -> Iterator[dict]:
        """Yield the reply's stream, one chunk after the other, without [DONE]."""
        begun: set[int] = set()
        unfinished = len(self.choices)
        for event in events:
            choice = event.request
            if choice.index not in begun:
                begun.add(choice.index)
                yield from self.opening(choice)
            self.unsent[choice.index] += event.logprobs
            for part in self.parts(event):
                yield self.chunk(choice, part)
            if event.finish_reason:
                unfinished -= 1
                is_last = not unfinished and not self.with_usage
                yield self.chunk(choice, self.closing, self.finish_reason(event)) | (
                    {"timings": self.timings()} if is_last else {})
        if self.with_usage:
            yield {**self.head, "choices": [], "usage": self.usage(), "timings": self.timings()}

    def chunk(self, choice: engine.Request, part: dict, reason: str | None = None) -> dict:
        """One chunk, with the log-probabilities that have waited for it."""
        logprobs = None
        if self.body.n_top_logprobs() is not None:
            logprobs = self.logprobs(choice.index, self.unsent[choice.index])
            self.unsent[choice.index] = ()
        return {**self.head, **({"usage": None} if self.with_usage else {}), "choices": [
            {"index": choice.index, **part, "logprobs": logprobs, "finish_reason": reason}]}

    def finish_reason(self, event: engine.Event) -> str:
        return event.finish_reason

    def usage(self) -> dict:
        """Token counts; a prompt with several choices counts once."""
        prompts = {id(choice.prompt): choice for choice in reversed(self.choices)}.values()
        n_prompt = sum(len(choice.prompt) for choice in prompts)
        n_generated = sum(choice.n_generated for choice in self.choices)
        return {"prompt_tokens": n_prompt, "completion_tokens": n_generated,
                "total_tokens": n_prompt + n_generated, "prompt_tokens_details": {
                    "cached_tokens": sum(choice.n_reused for choice in prompts)},
                "completion_tokens_details": {
                    f"{outcome}_prediction_tokens": sum(
                        getattr(choice, f"n_{outcome}") for choice in self.choices)
                    for outcome in ("accepted", "rejected")}}

    def timings(self) -> dict:
        """What the first choice's prompt and the slowest reply took, in llama-server's names."""
        first = self.choices[0]
        n_prompt, n_cached = len(first.prompt), first.n_reused
        prompt_ms = (first.first_token - first.placed) * 1000
        slowest = max(self.choices, key=lambda choice: choice.last_token - choice.first_token)
        return {"cache_n": n_cached, **timing("prompt", n_prompt - n_cached, prompt_ms),
                **timing("predicted", slowest.n_generated,
                         (slowest.last_token - slowest.first_token) * 1000)}

    def fold(self, chunks: Iterator[dict], n_each: int) -> dict:
        """The unstreamed reply: the stream's chunks put together; a delta becomes a message. Of
        n_each choices for a prompt the n likeliest stay."""
        wholes: list[dict] = [{} for _ in self.choices]
        for chunk in chunks:
            for choice in chunk["choices"]:
                merge(wholes[choice["index"]], choice)
        kept = []
        for start in range(0, len(wholes), n_each):
            group = range(start, start + n_each)
            if n_each > self.body.n:
                group = sorted(group, key=lambda index: -self.choices[index].sum_logprob / max(
                    1, self.choices[index].n_generated))[: self.body.n]
            kept += [{**self.whole(wholes[index]), "index": len(kept) + i}
                     for i, index in enumerate(group)]
        return {**self.head, "object": self.reply_object, "choices": kept, "usage": self.usage(),
                "timings": self.timings()}

    def whole(self, choice: dict) -> dict:
        return choice

    def token_text(self, token: int) -> str:
        return self.model.piece(token, special=True).decode("utf-8", "replace")


def timing(what: str, n: int, ms: float) -> dict:
    """n tokens in ms milliseconds, as llama-server says it."""
    return {f"{what}_n": n, f"{what}_ms": ms, f"{what}_per_token_ms": ms / max(n, 1),
            f"{what}_per_second": n * 1000 / max(ms, 0.001)}


class ChatRenderer(Renderer):
    """https://platform.openai.com/docs/api-reference/chat"""

    id_prefix = "chatcmpl"
    stream_object, reply_object = "chat.completion.chunk", "chat.completion"
    closing = {"delta": {}}

    def __init__(self, new_parser: Callable[[], ChatParser], *arguments, old_style: bool = False):
        """old_style: calls are told in the deprecated `function_call`."""
        super().__init__(*arguments)
        self.parsers = [new_parser() for _ in self.choices]
        self.old_style = old_style

    def opening(self, choice: engine.Request) -> Iterator[dict]:
        yield self.chunk(choice, {"delta": {"role": "assistant", "content": "", "refusal": None}})

    def parts(self, event: engine.Event) -> Iterator[dict]:
        parser = self.parsers[event.request.index]
        for delta in parser.feed(event.text) + (parser.finish() if event.finish_reason else []):
            if self.old_style and "tool_calls" in delta:
                delta = {"function_call": delta["tool_calls"][0]["function"]}
            yield {"delta": delta}

    def finish_reason(self, event: engine.Event) -> str:
        parser = self.parsers[event.request.index]
        if event.finish_reason != "stop" or not 0 < parser.n_calls == parser.n_whole:
            return event.finish_reason
        return "function_call" if self.old_style else "tool_calls"

    def whole(self, choice: dict) -> dict:
        message = choice.pop("delta")
        if message.get("tool_calls") or message.get("function_call"):
            message["content"] = message["content"] or None
        return {"index": 0, "message": message, **choice}

    def logprobs(self, index: int, tokens: tuple[engine.TokenLogprob, ...]) -> dict:
        return {"content": [{**self.token_entry(entry.token, entry.logprob),
                             "top_logprobs": [self.token_entry(*other) for other in entry.top]}
                            for entry in tokens], "refusal": None}

    def token_entry(self, token: int, logprob: float) -> dict:
        return {"token": self.token_text(token), "logprob": max(logprob, LOWEST_LOGPROB),
                "bytes": list(self.model.piece(token, special=True))}


class TextRenderer(Renderer):
    """https://platform.openai.com/docs/api-reference/completions"""

    id_prefix = "cmpl"
    stream_object = reply_object = "text_completion"
    closing = {"text": ""}

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.offsets = [0] * len(self.choices)  # of each choice's next token

    def opening(self, choice: engine.Request) -> Iterator[dict]:
        """With `echo`, the prompt; its first token has no log-probability."""
        if not self.body.echo:
            return
        first = engine.TokenLogprob(int(choice.prompt[0]), None, ())
        scored = next(c for c in self.choices if c.prompt is choice.prompt)
        self.unsent[choice.index] = (first, *scored.prompt_logprobs)
        text = b"".join(self.model.piece(int(token), special=True) for token in choice.prompt)
        yield self.chunk(choice, {"text": text.decode("utf-8", "replace")})

    def parts(self, event: engine.Event) -> Iterator[dict]:
        if event.text:
            yield {"text": event.text}

    def logprobs(self, index: int, tokens: tuple[engine.TokenLogprob, ...]) -> dict:
        """The legacy shape; offsets count characters from the start of the choice's text."""
        texts, offsets = [self.token_text(entry.token) for entry in tokens], []
        for text in texts:
            offsets.append(self.offsets[index])
            self.offsets[index] += len(text)
        return {"tokens": texts, "text_offset": offsets,
                "token_logprobs": [None if entry.logprob is None else
                                   max(entry.logprob, LOWEST_LOGPROB) for entry in tokens],
                "top_logprobs": [None if entry.logprob is None else {
                    self.token_text(token): max(logprob, LOWEST_LOGPROB)
                    for token, logprob in entry.top} for entry in tokens]}


def piece_json(piece: bytes) -> str | list[int]:
    """A token's bytes for JSON: as text, or one by one where they are only part of a character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


# ==== 12. Main: start, signals, drain ====================================================

EXIT_OK, EXIT_UNUSABLE = 0, 2
EXAMPLE_BODY = '{"messages": [{"role": "user", "content": "What is gravity?"}], "max_tokens": 64}'


def catch_signals() -> socket.socket:
    """Catch SIGINT and SIGTERM; return where a byte arrives for each. subtle: the kernel may give a
    signal to any thread, while Python runs its handlers in the main thread only, when that wakes;
    the byte is written at once, whichever thread it is."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    return reader


def watch_signals(stopping: threading.Event, signals: socket.socket) -> None:
    """Stop at the first signal, end at the second one."""
    signals.recv(1)
    stopping.set()
    signals.recv(1)
    os._exit(EXIT_OK)


def main(argv: list[str] | None = None) -> int:
    """Serve until a signal: the first SIGINT or SIGTERM drains, the second ends at once. Returns
    the exit code: 0, or 2 for unusable settings or model."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a console may know ASCII only
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(message)s")
    try:
        environ = {**read_env_file(HERE / ".env"), **os.environ}
        server = Server(load_config(sys.argv[1:] if argv is None else argv, environ))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_UNUSABLE

    threading.Thread(target=watch_signals, args=(server.stopping, catch_signals()), name="signals",
                     daemon=True).start()
    threading.Thread(target=server.serve_forever, name="accept", daemon=True).start()
    print(f"{NAME} {VERSION} listens on {server.url}", flush=True)
    if not server.is_local and not server.key_digests:
        log.warning("warning: %s can be reached from the network, and asks for no key; set "
                    "api_keys", server.url)
    for upstream in [*server.models.upstreams.values(), server.models.others]:
        if upstream:
            print(f"elsewhere: {upstream.name} at {upstream.base_url}", flush=True)
        if upstream and not urllib.parse.urlsplit(upstream.base_url).path:
            log.warning("warning: the address of %s has no path; most servers want /v1 behind it",
                        upstream.name)
    if server.models.others:
        print(f"models without a name here are looked for at {server.models.others.base_url}",
              flush=True)
    server.pool.start()
    for name, loaded in server.pool.engines().items():
        url = server.url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
        key = " -H 'Authorization: Bearer KEY'" * bool(server.key_digests)
        where = "the GPU" if loaded.model.on_gpu else f"{loaded.context.n_threads} CPU threads"
        print(f"ready: {name} on {where}, {loaded.context.parallel} slots of "
              f"{loaded.n_ctx} tokens\ntry: curl {url}/v1/chat/completions "
              f"-H 'Content-Type: application/json'{key} -d '{EXAMPLE_BODY}'", flush=True)
    server.stopping.wait()
    if server.pool.fatal_error:
        print(f"error: {server.pool.fatal_error}", file=sys.stderr)
        return EXIT_UNUSABLE
    log.info("shutting down: running requests have %g seconds", server.config.drain_seconds)
    if not server.drain():
        log.error("the engine is stuck in a step: ending without it")
        os._exit(EXIT_OK)
    if not server.pool.ended(LAST_WRITES_SECONDS):  # some steps of loading cannot be interrupted
        os._exit(EXIT_OK)
    return EXIT_OK


if __name__ == "__main__":
    import server  # this file, as features import it: its classes must not be there twice

    sys.exit(server.main())
