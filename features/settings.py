"""Settings: what is said of a wrong key, and what else than a path may name a file.

What for: who mistypes a key is told the nearest one; in a section, its `enabled` has no need of the
section's name; and any setting for a model's file, also one in an entry of `models`, may have a
name (hf:...) for which a feature that exports `fetch` gets the file. How it works: the House of
features/__init__.py asks it, and the methods of FoundModel stand in front of those of each model.
It is no feature by itself, costs nothing, and sends nothing.
"""

import difflib
import re
from collections.abc import Callable
from pathlib import Path

import engine
import server

NO_PATH = re.compile("[A-Za-z]{2,}:")  # begins another kind of name for a file; C: begins a path


def nearest(house: server.House, name) -> str:
    """A few words about the setting or section that may be meant, or none."""
    names = [*house.settings, *(metadata["section"] for metadata in house.settings.values())]
    near = difflib.get_close_matches(str(name).lower(), names, n=1)
    return f"; the nearest is {near[0]!r}" if near else ""


def in_sections(house: server.House, file: Path, content: dict) -> dict:
    """What a file holds, the `enabled` of a section under its whole name. Refuses a section that is
    none, and a key in a section of others. Raises ConfigError."""
    homes = {name: metadata["section"] for name, metadata in house.settings.items()}
    for section in (content.keys() & {*homes.values()}) - homes.keys():
        if not isinstance(content[section], dict | None):
            raise server.ConfigError(f"{file}: section {section} holds `key: value` lines, nothing "
                                     "else")
        keys = {f"{section}_enabled" if name == "enabled" and f"{section}_enabled" in homes else
                name: value for name, value in (content[section] or {}).items()}
        if len(keys) < len(content[section] or ()):
            raise server.ConfigError(f"{file}: {section}_enabled is set twice")
        for name in keys:
            if homes.get(name, section) != section:
                raise server.ConfigError(f"{file}: {name} belongs in section {homes[name]}, not "
                                         f"{section}")
        content = {**content, section: keys}
    return content


def with_paths(house: server.House, name: str, value: dict, file: Path) -> dict:
    """A setting that is an object, as House.located has those that are not. Raises ConfigError."""
    try:
        return {key: house.located(key if key in house.settings else name, inner, file)
                for key, inner in value.items()}
    except RecursionError:  # YAML knows cycles
        raise server.ConfigError(f"{file}: {name} is nested too deeply") from None


def find_file(house: server.House, path: str | None, folder: Path, setting: str = "model_path",
              go_on: Callable[[], bool] = lambda: True) -> Path:
    """The GGUF file that a setting means, which a feature may have to fetch; else as
    engine.find_model_file has it. go_on: False may interrupt a fetch. Raises ModelError."""
    found = (fetch(path, folder, go_on) for fetch in house.having("fetch"))
    file = next(filter(None, found), path)
    if file and NO_PATH.match(file):
        raise engine.ModelError(f"{file} (of {setting}) is no path, and no feature that is on "
                                "fetches it")
    return engine.find_model_file(file, folder, setting)


class FoundModel(server.LocalModel):
    """A model whose file may have to be fetched."""

    def load(self, go_on: Callable[[], bool]) -> engine.Engine:
        """As LocalModel.load."""
        self.path = str(find_file(self.house, self.path, server.HERE / "models", go_on=go_on))
        return super().load(go_on)
