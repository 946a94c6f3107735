"""Environment: settings from environment variables, and from a `.env` file beside server.py.

What for: containers and services, and keys that belong into no file of settings. How it works: each
setting, also one of a feature, has a variable of its name in capitals, which wins over config.yaml;
what the environment itself has wins over `.env`. It is no feature by itself: features/__init__.py
asks it, as the features themselves may be named there (`FEATURES`). It costs nothing. It reads the
variables of all settings, and those that features export as `ALIASES`, and sends nothing.
"""

import difflib
import functools
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import server

ALMOST = 0.85  # how like a setting's a name is that is probably meant for it: API_KEY, N_CTXX
ENV_LINE = re.compile(
    r"""\s*(?:export\s+)?(\w+)\s*=\s*("[^"]*"|'[^']*'|(?!["']).*?)\s*(?:(?<=[\s"'])#.*)?""")


def features(environ: Mapping[str, str]) -> list[str] | None:
    """The names of features; None where it has none. Raises ConfigError."""
    return read_variable("FEATURES", list[str], with_file(environ))


def settings(house: server.House, environ: Mapping[str, str]) -> dict[str, tuple[str, Any]]:
    """{key: (the variable that has it, value)}. Raises ConfigError."""
    environ, found, told_by = with_file(environ), {}, {}
    hints = house.hints(house.Config)
    aliases = functools.reduce(dict.__or__, house.having("ALIASES"), {})
    for variable, name in [*aliases.items(), *((name.upper(), name) for name in hints)]:
        if environ.get(variable):
            if name in told_by:
                raise server.ConfigError(f"environment variables {told_by[name]} and {variable} "
                                         "mean the same; set one of them")
            told_by[name], is_secret = variable, house.settings[name].get("secret", False)
            found[name] = (f"environment variable {variable}",
                           read_variable(variable, hints[name], environ, is_secret))
    variables = [*aliases, *map(str.upper, hints)]
    for variable in read_env_file(server.HERE / ".env"):
        near = difflib.get_close_matches(variable.upper(), variables, n=1, cutoff=ALMOST)
        if near and variable not in variables:
            server.log.warning("warning: %s in .env is no setting; the nearest is %s", variable,
                               near[0])
    return found


def read_variable(name: str, hint, environ: Mapping[str, str], is_secret: bool = False):
    """An environment variable as a setting of a type; None where it is not set, or empty. Raises
    ConfigError."""
    text = environ.get(name)
    if not text:
        return None
    try:
        if hint == list[str] and not text.lstrip().startswith("["):  # a,b or [a, b]
            return [item.strip() for item in text.split(",") if item.strip()]
        if bool in (hint, *typing.get_args(hint)) and text.strip() in ("0", "1"):
            return text.strip() == "1"
        return text if hint in (str, str | None) else yaml.safe_load(text)
    except Exception as error:  # as server.read_yaml has it
        sent = "what is there" if is_secret else repr(text)
        raise server.ConfigError(f"environment variable {name}: {sent} is not a value") from error


def with_file(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment, and behind it what the file `.env` has. Raises ConfigError."""
    return {**read_env_file(server.HERE / ".env"), **environ}


def read_env_file(file: Path) -> dict[str, str]:
    """The variables of a .env file: NAME=VALUE lines, in quotes or not; `#` begins a comment, in
    front of the line or behind a blank. Raises ConfigError."""
    found = {}
    try:
        lines = file.read_text("utf-8-sig").splitlines() if file.exists() else []
    except (OSError, ValueError) as error:
        raise server.ConfigError(f"cannot read {file}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            match = ENV_LINE.fullmatch(line)
            if not match:  # the line itself may be a secret
                raise server.ConfigError(f"{file}: line {number} is not like NAME=VALUE")
            name, text = match.groups()
            found[name] = text[1:-1] if text[:1] in ("'", '"') else text
    return found
