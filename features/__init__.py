"""Features: how the files of this folder plug into server.py and engine.py.

A feature is a module that exports some of EXPORTS; docs/features.md tells what they mean, and what
else it may have. The other files are parts of features. The settings, which settings.py and
environment.py help to read, name the features that are on; those are imported, behind what they
need, and make a House. Those that are off are read, but not imported, so that a request or setting
which needs one can be told its name. (This file also makes the folder a package of its own: another
one of this name, wherever it is installed, is not taken for it.)
"""

import ast
import dataclasses
import difflib
import importlib
import inspect
import re
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import engine
import server
from features import environment, settings

FOLDER = Path(__file__).resolve().parent
EXPORTS = ("Settings", "ROUTES", "FIELDS", "METHODS", "equip", "receive", "join", "start", "fetch")
CALLED = {"equip": 2, "receive": 3, "join": 1, "start": 1, "fetch": 3, "files_of": 1}  # arguments
EXTENDED = ("Handler", "Models", "LocalModel", "Generation", "Chat", "Completion")  # by METHODS


class House(server.House):
    """What the features that are switched on add to the two files."""

    def __init__(self, modules: Iterable[types.ModuleType], off: dict[tuple[str, str], tuple]):
        """off: by a class and the name of a field, the feature that would add the field to it but
        is off, and the field's default."""
        self.modules, self.off = list(modules), off
        self.extensions: dict[str, list[type]] = {}  # by the name of the class that they extend
        for module in self.modules:
            for target, extension in _added(module).items():
                self.extensions.setdefault(target, []).append(extension)
        self.extensions.setdefault("LocalModel", []).append(settings.FoundModel)
        self._types: dict[type, type] = {}
        super().__init__()

    def having(self, name: str) -> list:
        """As server.House.having."""
        return [getattr(module, name) for module in self.modules if hasattr(module, name)]

    def type_of(self, cls: type) -> type:
        """As server.House.type_of."""
        if cls not in self._types:
            bases = [extension for each in cls.__mro__
                     for extension in self.extensions.get(each.__name__, ())]
            new = type(cls.__name__, (*bases, cls), {
                "house": self, "__doc__": cls.__doc__, "__module__": cls.__module__})
            has_fields = cls is server.Config or any("__dataclass_fields__" in vars(base)
                                                     for base in bases)
            self._types[cls] = dataclasses.dataclass(new) if has_fields else new if bases else cls
        return self._types[cls]

    def read_settings(self, file: Path, content: dict, environ: Mapping[str, str]
                      ) -> dict[str, tuple[str, Any]]:
        """As server.House.read_settings; also from environment variables."""
        for (target, name), (feature, _) in self.off.items():
            if target == "Config" and environ.get(name.upper()):
                server.log.warning("warning: environment variable %s is ignored: it needs the "
                                   "feature %s, which is off", name.upper(), feature)
        content = settings.in_sections(self, file, content)
        found = super().read_settings(file, content, environ)
        for name in found:
            if name not in self.settings:
                raise server.ConfigError(f"{file}: {self.unknown_setting(name, content)}")
        return found | environment.settings(self, environ)

    def located(self, name: str, value, file: Path):
        """As server.House.located; also the paths in objects, but no names that are no paths."""
        if isinstance(value, dict):
            return settings.with_paths(self, name, value, file)
        is_path = not (isinstance(value, str) and settings.NO_PATH.match(value))
        return super().located(name, value, file) if is_path else value

    def feature_of(self, cls: type, field: str) -> tuple[str | None, Any]:
        """The feature that would honour a field, and is off; and the field's default."""
        return next((self.off[each.__name__, field] for each in cls.__mro__
                     if (each.__name__, field) in self.off), (None, None))

    def check_unknown(self, cls: type, sent: dict, prefix: str) -> None:
        """As server.House.check_unknown. What asks for nothing needs nothing."""
        for name in sent.keys() - self.hints(cls).keys():
            feature, default = self.feature_of(cls, name)
            if feature and not any(type(sent[name]) is type(nothing) and sent[name] == nothing
                                   for nothing in (None, "", [], {}, default)):  # 0 is not False
                raise server.invalid(
                    prefix + name, f"{prefix}{name}: needs the feature {feature}, which is off; "
                    "leave it out, or have it named in `features` of the settings", "feature_off")

    def unknown_setting(self, name, others: Mapping = types.MappingProxyType({})) -> str:
        """What to say about a key of the settings that there is not, or the section of a feature
        that is off. others: what else is set."""
        feature = self.feature_of(server.Config, name)[0] or next((
            feature for (target, _), (feature, section) in self.off.items()
            if target == "Config" and section == name), None)
        if not feature:
            return f"unknown key {name!r}{settings.nearest(self, name)}"
        keys = [f"{key}_{each}" if each == "enabled" else each for key, inner in others.items()
                for each in (inner if isinstance(inner, dict) else [key])]
        more = [f"{each} ({found})" for each in keys
                if each != name and (found := self.feature_of(server.Config, each)[0])]
        return f"unknown key {name!r}: it needs the feature {feature} (see `features`)" + (
            f"; take it out, and likewise {', '.join(more)}" if more else "")


def load(names, environ: Mapping[str, str]) -> House:
    """The house with the features of these names, or of those that the environment has. Raises
    ConfigError."""
    modules: list[types.ModuleType] = []
    chosen = environment.features(environ)
    names = names if chosen is None else chosen
    names = names if isinstance(names, list) else [names]
    for name in names:
        n_before = len(modules)
        _add(modules, name, ())
        for module in modules[n_before:]:
            if (added := module.__name__.removeprefix("features.")) not in names:
                server.log.info("features: %s is on, too: %s needs it", added, name)
    _check_claims(modules)
    if not modules:
        server.log.info("features: none is on, as `features` of the settings names none")
    return House(modules, fields_of_others({module.__name__ for module in modules}))


def _is_feature(file: Path) -> bool:
    """Whether a file looks like a feature, and not like a part of others."""
    exports = "|".join(EXPORTS).encode()
    return file.is_file() and bool(re.search(
        rb"(?m)^((%b)\b|(def|class) (%b)\b)" % (exports, exports), file.read_bytes()))


def _add(modules: list[types.ModuleType], name, wanted_by: tuple[str, ...]) -> None:
    """Import a feature, behind those that it needs."""
    if name in wanted_by:
        raise server.ConfigError(f"features: {name} needs itself, by way of {', '.join(wanted_by)}")
    if not isinstance(name, str) or not name.isidentifier() \
            or not (FOLDER / f"{name}.py").is_file():
        there = sorted(file.stem for file in FOLDER.glob("[!_]*.py") if _is_feature(file))
        near = difflib.get_close_matches(str(name), there, n=1)
        raise server.ConfigError(
            f"features: {server.describe(name)} is not in the folder features, "
            + (f"but {near[0]} is" if near else f"which has {', '.join(there) or 'none'}"))
    if any(module.__name__ == f"features.{name}" for module in modules):
        return
    try:
        module = importlib.import_module(f"features.{name}")
    except (Exception, SystemExit) as error:
        raise server.ConfigError(f"features: {name} cannot be imported: {type(error).__name__}: "
                                 f"{error}") from error
    if not any(hasattr(module, export) for export in EXPORTS):
        raise server.ConfigError(f"features: {name} is a part of other features, and none by "
                                 "itself")
    needs = getattr(module, "NEEDS", ())
    for needed in [needs] if isinstance(needs, str) else needs:
        _add(modules, needed, (*wanted_by, name))
    modules.append(module)


def _added(module: types.ModuleType) -> dict[str, type]:
    """The classes that a feature adds to others, by the names of those."""
    settings = {"Config": module.Settings} if hasattr(module, "Settings") else {}
    return {**getattr(module, "FIELDS", {}), **getattr(module, "METHODS", {}), **settings}


def _check_kinds(module: types.ModuleType, known: set[str]) -> None:
    """Refuse exports that are not what docs/features.md says. known: names of classes."""
    said = f"features: {module.__name__.removeprefix('features.')}:"
    for name in ("FIELDS", "METHODS", "ROUTES"):
        if not isinstance(getattr(module, name, {}), dict):
            raise server.ConfigError(f"{said} {name} must be a dict")
    added = _added(module)
    for target, extension in added.items():
        if target not in known:
            raise server.ConfigError(f"{said} it extends {target}, which there is not")
        if target in getattr(module, "METHODS", {}):
            if target not in EXTENDED or not isinstance(extension, type):
                raise server.ConfigError(f"{said} METHODS must have classes for "
                                         f"{', '.join(EXTENDED)}")
        elif not (isinstance(extension, type) and dataclasses.is_dataclass(extension)):
            raise server.ConfigError(f"{said} what it adds to {target} must be a dataclass")
    for key, route in getattr(module, "ROUTES", {}).items():
        if not isinstance(route, server.Route):
            raise server.ConfigError(f"{said} what answers {key} must be a server.Route")
    for field in dataclasses.fields(added["Config"]) if "Config" in added else ():
        if "section" not in field.metadata:
            raise server.ConfigError(f"{said} the setting {field.name} must be a server.setting")
    for name, n_arguments in CALLED.items():
        try:
            if hasattr(module, name):
                inspect.signature(getattr(module, name)).bind(*range(n_arguments))
        except TypeError as error:
            raise server.ConfigError(f"{said} {name} is called with {n_arguments} arguments: "
                                     f"{error}") from None


def _check_claims(modules: list[types.ModuleType]) -> None:
    """A path, and a field or setting of a feature, is its own; a field that the two files declare
    may be widened."""
    paths = set(server.ROUTES)
    fields = {("Config", field.name) for field in dataclasses.fields(server.Config)}
    texts = [file.read_bytes() for file in FOLDER.glob("*.py") if file.is_file()]
    known = {*vars(server), *vars(engine)} | {  # one may extend a feature that is off
        name.decode() for text in texts for name in re.findall(rb"(?m)^class (\w+)", text)}
    for module in modules:
        _check_kinds(module, known)
        routes = getattr(module, "ROUTES", {}).keys()
        for key in paths & routes:
            raise server.ConfigError(f"features: {module.__name__} claims the path "
                                     f"{' '.join(key)}, which is there already")
        claimed = {(target, name) for target, extension in _added(module).items()
                   for name in getattr(extension, "__annotations__", ())}
        for target, name in sorted(fields & claimed):
            raise server.ConfigError(f"features: {module.__name__} claims the field {name} of "
                                     f"{target}, which is there already")
        paths |= routes
        fields |= claimed


def fields_of_others(modules: set[str]) -> dict[tuple[str, str], tuple[str, Any]]:
    """The fields that features add which are off: by the class that they extend and their name, the
    feature and the field's default, if that is written as it is."""
    found: dict[tuple[str, str], tuple[str, Any]] = {}
    for file in sorted(FOLDER.glob("[!_]*.py")):
        if f"features.{file.stem}" in modules:
            continue
        try:
            tree = ast.parse(file.read_text()).body
        except (OSError, ValueError, SyntaxError) as error:
            server.log.warning("warning: %s cannot be read: %s", file, error)
            continue
        classes = {node.name: node for node in tree if isinstance(node, ast.ClassDef)}
        extended = [("Config", "Settings")] + [
            (key.value, value.id) for node in tree if isinstance(node, (ast.Assign, ast.AnnAssign))
            and "FIELDS" in map(ast.unparse, getattr(node, "targets", [getattr(node, "target", 0)]))
            and isinstance(node.value, ast.Dict)
            for key, value in zip(node.value.keys, node.value.values)
            if isinstance(key, ast.Constant) and isinstance(value, ast.Name)]
        for target, name in extended:
            for node in classes[name].body if name in classes else ():
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    found[target, node.target.id] = file.stem, default_of(node.value)
    return found


def default_of(node: ast.expr | None) -> Any:
    """The default of a field: a constant, or the first of a call's arguments; else None."""
    if isinstance(node, ast.Call):
        node = node.args[0] if node.args else None
    return node.value if isinstance(node, ast.Constant) else None
