"""JSON Schema as llguidance should read it: what replies.py compiles.

llguidance (https://github.com/guidance-ai/llguidance) makes a grammar of a schema. It knows most of
JSON Schema, and refuses the rest; but some of what it takes, it takes otherwise than it was meant,
and it trusts what it is given. `Schema` stands between: it

- bounds the size of everything, in a walk of its own, before anything is compiled;
- says in other words what has them (negation.py), and refuses by its place, such as
  `schema.properties.age.contains`, what no reply can be held to token by token, and what is no JSON
  Schema; or, if it is not strict, leaves out just that keyword, and notes its place;
- leaves out unknown keywords and formats, which are annotations (JSON Schema 2020-12, 6.5 and 7.2),
  `x-guidance` among them, which would set llguidance's options;
- follows `$ref` by JSON Pointer, `$anchor` and `$id`, and turns the dialects of drafts 4 to 7 into
  that of 2020-12;
- gives numbers and dates bounds that llguidance honours to the letter.

It costs about 10 us for each subschema.
"""

import collections
import contextlib
import functools
import json
import re
import urllib.parse
from collections.abc import Iterator, Set
from decimal import Decimal

from features.bounds import MAX_BOUND, exact, limit_numbers
from features.keywords import (
    BOUNDS, COUNTS, EXPANDABLE, FORMATS, KNOWN, KNOWN_FORMATS, LISTS, MAPS, OVERLAP, REFUSED,
    REPLACED, TOO_LARGE, TYPES, UNSATISFIABLE, VOID, SchemaError, Unholdable, causes_of,
    in_ecmascript, in_json, joined)
from features.negation import Negation, at_least_one, is_case

MAX_FORM = 2**18  # bytes of a schema; a quarter of it for a grammar
MAX_NODES, MAX_DEPTH = 4000, 48  # subschemas looked at; one inside the other
MAX_PATTERN = 4000  # characters of a regular expression; 200,000 take 6 s and 2 GB for one token
MAX_NAME_PATTERNS = 64  # in one patternProperties: each two of them are compared
MAX_DIVISOR = 10_000  # multipleOf without its decimal point: so many states has its automaton
MAX_COUNT = 2**31  # of items, characters, members
# Once where JSON may have white space, so that a model that likes blanks comes to an end.
WHITE_SPACE = r"\r?\n[ \t]{0,40}|[ \t]{1,2}"
OPTIONS = {"whitespace_pattern": WHITE_SPACE, "json_allow_general_unicode_escapes": True}


class Schema:
    """A JSON Schema as llguidance should read it: unknown keywords are left out, references lead
    into `$defs`, numbers are within its means, and what it cannot honour is refused by its place,
    or left out."""

    def __init__(self, root, at: str, is_strict: bool = True):
        """at: where the schema was sent. is_strict: what cannot be held to is refused."""
        try:
            size = len(json.dumps(root, allow_nan=False, ensure_ascii=False).encode())
        except RecursionError:
            raise SchemaError(f"{at}: is nested too deeply") from None
        except ValueError as error:  # infinity, or half a character
            raise SchemaError(f"{at}: is not JSON with valid Unicode: {error}") from None
        if size > MAX_FORM:
            raise SchemaError(f"{at}: the schema has {size} bytes, the limit is {MAX_FORM}")
        self.root, self.at, self.is_strict = root, at, is_strict
        self.loosened: dict[str, None] = {}  # places of what was left out
        self._places: dict[int, str] = {}  # by ids of subschemas inside of other words for them
        self.alone: tuple[int, Set[str]] | None = None  # keywords only one subschema may have
        self._dropped: set[tuple[int, str]] = set()  # id of a subschema, and its keyword
        self._expanded: set[tuple[int, str]] = set()  # likewise, of what takes other words
        draft = re.search(r"draft-0?(\d)/", str(root.get("$schema"))) if isinstance(root, dict) \
            else None
        self._ignores_beside_ref = draft is not None  # up to draft 7
        self._uri = self._id(root) or ""

    def compiled(self, part=None, at: str = "") -> dict:
        """The schema, or a part of it that stands at `at`, for llguidance. Raises SchemaError."""
        self._n_nodes, self._inlined = 0, []
        self._names: dict[int, str] = {}  # id of what a $ref names: its name in $defs
        self._waiting: list[tuple[str, object, str, object]] = []
        definitions = {}
        whole = self._visit(self.root if part is None else part, at or self.at, 0, self.root)
        while self._waiting:  # not by recursion: chains of references may be long
            name, target, place, document = self._waiting.pop()
            definitions[name] = self._visit(target, place, 0, document)
        return {"x-guidance": OPTIONS, "$defs": definitions, "allOf": [whole]} \
            if definitions or isinstance(whole, bool) else {"x-guidance": OPTIONS, **whole}

    def give_up(self, key: str, why: str) -> None:
        """Leave out a keyword of the root; if the schema is strict, refuse it."""
        if self.is_strict:
            raise SchemaError(f"{self.at}.{key}: {why}")
        self._drop(self.root, self.at, {key})

    def mend(self, part, at: str, error: str) -> bool:
        """Say a part that llguidance refused, which stands at `at`, in other words; unless the
        schema is strict, leave out of it what is refused. False: there is nothing to mend."""
        keys = causes_of(error)
        is_no_object = part is self.root and "incompatible types" in error  # but arguments are
        if not isinstance(part, dict) or UNSATISFIABLE in error and not is_no_object:
            return False
        for key in EXPANDABLE & keys & part.keys():
            if (id(part), key) not in self._expanded:
                self._expanded.add((id(part), key))
                return True
        if self.is_strict:
            return False
        if TOO_LARGE in error:  # other words take more room
            took = [self._drop(inner, place, REPLACED.union(
                key for key in EXPANDABLE if (id(inner), key) in self._expanded))
                for inner, place in self.all_parts()]
            if any(took):
                return True
        return self._drop(part, at, keys) or self._drop(part, at, REPLACED) \
            or self._drop(part, at, KNOWN - {"type"})

    def _drop(self, part: dict, at: str, keys: Set[str]) -> bool:
        """Leave these keywords out of a part that stands at `at`; whether it had some."""
        dropped = [key for key in part if key in keys and (id(part), key) not in self._dropped]
        self._dropped |= {(id(part), key) for key in dropped}
        self.loosened |= {f"{at}.{key}": None for key in dropped}
        return bool(dropped)

    def _visit(self, schema, at: str, depth: int, document):
        """A subschema; document: the root, or the nearest subschema around with an $id."""
        self._n_nodes += 1
        if depth > MAX_DEPTH or self._n_nodes > MAX_NODES:
            if self.is_strict:
                raise Unholdable(f"{at}: the schema is too large (limits: {MAX_NODES} subschemas, "
                                 f"{MAX_DEPTH} levels)")
            self.loosened[at] = None
            return True
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise SchemaError(f"{at}: a schema must be an object, got {schema!r:.60}")
        document = schema if self._id(schema) else document
        at = self._places.get(id(schema), at)
        made: dict = {}
        more: list = []  # what takes other words
        for key, value in schema.items():
            if key != "oneOf" and self._is_dropped(schema, key) \
                    or self._ignores_beside_ref and key != "$ref" and "$ref" in schema:
                continue
            try:
                self._visit_keyword(made, more, key, schema, f"{at}.{key}", depth, document)
            except Unholdable:
                if self.is_strict:
                    raise
                self.loosened[f"{at}.{key}"] = None
        if "patternProperties" in schema and "patternProperties" not in made:
            made.pop("additionalProperties", None)  # it would bind more names than were meant
        if made.keys() & set(BOUNDS):
            limit_numbers(made, at)
        return {"allOf": [made, *more]} if more else made

    def _is_dropped(self, schema: dict, key: str) -> bool:
        """Whether a keyword is left out; a oneOf becomes an anyOf instead."""
        return (id(schema), key) in self._dropped or self.alone is not None \
            and key in self.alone[1] and id(schema) != self.alone[0]

    def _visit_keyword(self, made: dict, more: list, key: str, schema: dict, place: str, depth: int,
                       document) -> None:
        """A keyword that stands at `place`, into `made` or `more`."""
        value = schema[key]
        if any(value == void for void in VOID.get(key, ())):
            return
        if key in REFUSED:
            raise Unholdable(f"{place}: a reply cannot be held to this keyword; leave it out")
        if key in REPLACED:
            more += self._in_other_words(key, schema, place, depth, document)
        elif key in MAPS:
            made[key] = {self._name(name, key, value, place): self._visit(
                part, f"{place}.{name}", depth + 1, document)
                for name, part in self._is(dict, value, place).items()}
        elif key in LISTS or key == "items" and isinstance(value, list):
            parts = self._is(list, value, place)
            if key == "allOf" and (cases := {i: part for i, part in enumerate(parts) if is_case(
                    part) and not self._is_dropped(part, "if")}):
                words = self._negation(place, document, "cases", list(cases.values()))
                inner = [(part[name], f"{place}[{i}].{name}") for i, part in cases.items()
                         for name in ("then", "else") if name in part]
                more += self._visit_words(words, place, inner, depth, document)
                parts = [True if i in cases else part for i, part in enumerate(parts)]
            if key == "anyOf" and not parts:
                raise SchemaError(f"{place}: nothing satisfies it")
            if (id(schema), key) in self._expanded or self._is_dropped(schema, key):
                more.append({"anyOf": self._expand(schema, place, depth, document)})
                return
            see = self._visit_inline if key == "oneOf" else self._visit
            parts = [see(part, f"{place}[{i}]", depth + 1, document)
                     for i, part in enumerate(parts)]
            is_tagged = key == "oneOf" and "discriminator" in schema
            made["anyOf" if is_tagged and "anyOf" not in schema else
                 "prefixItems" if key == "items" else key] = parts
        elif key in ("items", "additionalProperties"):
            made[key] = self._visit(value, place, depth + 1, document)
        elif key == "additionalItems" and isinstance(schema.get("items"), list):
            made["items"] = self._visit(value, place, depth + 1, document)
        elif key == "$ref":
            made[key] = self._refer(*self._target(value, place, document))
        else:
            self._take(made, key, value, place)
            if (id(schema), key) in self._expanded and value == 1:
                part = at_least_one(made.pop(key), schema)
                more.append(self._visit(part, place, depth + 1, document))

    def _in_other_words(self, key: str, schema: dict, place: str, depth: int, document) -> list:
        """What a keyword of REPLACED says, in subschemas. Raises Unholdable."""
        before, inner = dict(self.loosened), [(schema[key], place)]
        if key == "if":
            inner = [(schema[name], place[:-2] + name) for name in ("if", "then", "else")
                     if name in schema]
        if key.startswith("depend"):
            inner = [(part, f"{place}.{name}") for name, part in self._is(
                dict, schema[key], place).items() if not isinstance(part, list)]
        for part, at in inner:  # what is wrong in it is refused where it stands
            with contextlib.suppress(Unholdable):
                self._visit(part, at, depth + 1, document)
        self.loosened = before
        return self._visit_words(self._negation(place, document, "replaced", key, schema), place,
                                 inner, depth, document)

    def _visit_words(self, words: list, place: str, inner: list[tuple[object, str]], depth: int,
                     document) -> list:
        """Other words for what stands at `place`; inner: subschemas that they hold as they are, and
        their places. Of what is made for it, that place is named. Raises SchemaError."""
        def named(at: str) -> str:
            is_made = at.startswith((f"{place}.", f"{place}[")) and not any(
                at.startswith(known) for _, known in inner if known != place)
            return place if is_made else at

        before, places = self.loosened, self._places
        self.loosened = {}
        self._places = places | {id(part): at for part, at in inner if isinstance(part, dict)}
        try:
            return [self._visit(part, place, depth + 1, document) for part in words]
        except SchemaError as error:
            at, _, said = str(error).partition(": ")
            raise type(error)(f"{named(at)}: {said}") from None
        finally:
            self._places = places
            self.loosened = {**before, **{named(at): None for at in self.loosened}}

    def _expand(self, schema: dict, place: str, depth: int, document) -> list:
        """The alternatives of a oneOf, so that none overlap. Raises Unholdable; if the schema is
        not strict, they may."""
        try:
            parts = self._negation(place, document, "one_of", schema["oneOf"]) \
                if not self._is_dropped(schema, "oneOf") else schema["oneOf"]
            return [self._visit(part, place, depth + 1, document) for part in parts]
        except Unholdable:
            if self.is_strict:
                raise Unholdable(f"{place}: {OVERLAP}") from None
            self.loosened[place] = None
            return [self._visit(part, f"{place}[{i}]", depth + 1, document)
                    for i, part in enumerate(schema["oneOf"])]

    def _negation(self, place: str, document, method: str, *asked) -> list:
        """Ask a Negation. Raises Unholdable."""
        def follow(ref):
            target, _, other = self._target(ref, place, document)
            if other is not document:  # where its references would lead elsewhere
                raise Unholdable("refers to another document")
            return target
        try:
            return getattr(Negation(follow, self._ignores_beside_ref), method)(*asked)
        except Unholdable as error:
            raise Unholdable(f"{place}: a reply cannot be held to this keyword ({error}); leave it "
                             "out") from None
        except (AttributeError, KeyError, TypeError):  # it refers to what is no schema
            raise Unholdable(f"{place}: is about what is no schema") from None

    def _is(self, kind: type, value, at: str):
        """The value, which must be of a kind."""
        if not isinstance(value, kind):
            what = {dict: "an object", list: "a list", str: "a string"}[kind]
            raise SchemaError(f"{at}: must be {what}, got {value!r:.60}")
        return value

    def _name(self, name: str, key: str, siblings: dict, at: str) -> str:
        """A property's name, or the pattern of names."""
        if key == "properties":
            return name
        if len(siblings) > MAX_NAME_PATTERNS:
            raise Unholdable(f"{at}: has {len(siblings)} patterns, the limit is "
                              f"{MAX_NAME_PATTERNS}")
        return self._pattern(name, at)

    def _pattern(self, pattern: str, at: str) -> str:
        """A regular expression."""
        if len(self._is(str, pattern, at)) > MAX_PATTERN:
            raise Unholdable(f"{at}: has {len(pattern)} characters, the limit is {MAX_PATTERN}")
        return in_json(in_ecmascript(pattern))

    def _take(self, made: dict, key: str, value, at: str) -> None:
        """Copy a keyword without subschemas; one that is unknown is an annotation."""
        if key == "type":
            for kind in value if isinstance(value, list) and value else [value]:
                if kind not in TYPES:
                    raise SchemaError(f"{at}: {kind!r:.60} is not one of {', '.join(TYPES)}")
            made[key] = value
        elif key in ("const", "enum"):
            values = self._is(list, value, at) if key == "enum" else [value]
            if not values:
                raise SchemaError(f"{at}: nothing satisfies it")
            made["enum"] = [exact(each, at) for each in values]
        elif key in COUNTS:
            is_count = isinstance(value, (int, float)) and not isinstance(value, bool) \
                and value == int(value) and 0 <= value < MAX_COUNT
            if not is_count:
                raise SchemaError(f"{at}: must be a count, got {value!r:.60}")
            made[key] = int(value)
        elif key in BOUNDS or key == "multipleOf":
            is_old = key.startswith("exclusive") and isinstance(value, bool)  # as draft 4 has it
            if not isinstance(value, (int, float)) or isinstance(value, bool) and not is_old:
                raise SchemaError(f"{at}: must be a number, got {value!r:.60}")
            if key in BOUNDS and abs(value) < MAX_BOUND:
                exact(value, at)
            digits = Decimal(repr(value)).as_tuple().digits if key == "multipleOf" else ()
            if int("".join(map(str, digits)) or 0) > MAX_DIVISOR:
                raise Unholdable(f"{at}: {value!r} has too many digits; the limit is "
                                 f"{MAX_DIVISOR}")
            made[key] = value
        elif key == "required":
            if not all(isinstance(name, str) for name in self._is(list, value, at)):
                raise SchemaError(f"{at}: must be a list of names")
            made[key] = value
        elif key == "pattern":
            made[key] = self._pattern(value, at)
        elif key == "format" and self._is(str, value, at) in FORMATS:
            made.setdefault("allOf", []).append({"pattern": f"^({FORMATS[value]})$"})
        elif key == "format" and value in KNOWN_FORMATS:
            made[key] = value

    def parts(self, schema, at: str) -> Iterator[tuple[object, str]]:
        """The subschemas of a subschema, and their places."""
        for key, value in schema.items() if isinstance(schema, dict) else ():
            if key in MAPS:
                yield from ((part, f"{at}.{key}.{name}") for name, part in value.items())
            elif key in LISTS or key == "items" and isinstance(value, list):
                yield from ((part, f"{at}.{key}[{i}]") for i, part in enumerate(value))
            elif key in ("items", "additionalProperties", "additionalItems", "then", "else"):
                yield value, f"{at}.{key}"
            elif key == "$ref":
                with contextlib.suppress(SchemaError):  # it was left out
                    yield self._target(value, f"{at}.{key}", self.root)[:2]

    def all_parts(self) -> Iterator[tuple[dict, str]]:
        """All subschemas that are objects, and their places, the outer ones first."""
        waiting, seen = collections.deque([(self.root, self.at)]), {id(self.root)}
        while waiting:
            part, at = waiting.popleft()
            if isinstance(part, dict):
                yield part, at
            for inner, place in self.parts(part, at):
                if id(inner) not in seen:
                    seen.add(id(inner))
                    waiting.append((inner, place))

    # ---- references

    @staticmethod
    def _id(schema) -> str | None:
        """The URI of a subschema that is a document of its own."""
        uri = schema.get("$id", schema.get("id")) if isinstance(schema, dict) else None
        return uri.partition("#")[0] or None if isinstance(uri, str) else None

    def _target(self, ref, at: str, document) -> tuple[object, str, object]:
        """What a $ref names, its place, and its document. References to references are followed."""
        seen = set()
        while True:
            if self._is(str, ref, at) in seen:
                raise SchemaError(f"{at}: {ref} is only itself; describe a value")
            seen.add(ref)
            target, place, document = self._look_up(ref, at, document)
            if not isinstance(target, dict) or target.keys() & KNOWN != {"$ref"}:
                return target, place, document
            ref = target["$ref"]

    def _look_up(self, ref: str, at: str, document) -> tuple[object, str, object]:
        """The subschema at a URI with a JSON Pointer (RFC 6901) or an anchor."""
        uri, _, fragment = ref.partition("#")
        fragment, place = urllib.parse.unquote(fragment), ""
        if uri:
            whole = joined(self._uri, uri)
            document = self._documents.get(whole, MISSING) if whole != self._uri else self.root
        target = document
        if fragment and not fragment.startswith("/"):
            target = self._anchors.get(fragment, MISSING)
            place = f"#{fragment}"
        for key in fragment.split("/")[1:] if fragment.startswith("/") else ():
            key = key.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list):
                is_place = re.fullmatch("0|[1-9][0-9]{0,8}", key) and int(key) < len(target)
                target = target[int(key)] if is_place else MISSING
            else:
                target = target.get(key, MISSING) if isinstance(target, dict) else MISSING
            document = target if self._id(target) else document
            place += f".{key}"
        if target is MISSING:
            raise Unholdable(f"{at}: {ref!r:.200} is not a place in this schema, such as "
                              "#/$defs/name")
        return target, self.at + place, document

    @functools.cached_property
    def _subschemas(self) -> list[dict]:
        """All objects in the root, the deepest last."""
        found, waiting = [], [self.root]
        while waiting:
            value = waiting.pop()
            found += [value] if isinstance(value, dict) else []
            waiting += value.values() if isinstance(value, dict) else \
                value if isinstance(value, list) else ()
        return found

    @functools.cached_property
    def _documents(self) -> dict[str, dict]:
        return {joined(self._uri, uri): each for each in self._subschemas
                if (uri := self._id(each))}

    @functools.cached_property
    def _anchors(self) -> dict[str, dict]:
        names = [(each.get("$anchor") or str(each.get("$id", each.get("id")))[1:], each)
                 for each in self._subschemas]
        return {name: each for name, each in names if isinstance(name, str)}

    def _refer(self, target, place: str, document) -> str:
        """The `$ref` of a definition, which is compiled later."""
        if id(target) not in self._names:
            self._names[id(target)] = name = f"d{len(self._names)}"
            self._waiting.append((name, target, place, document))
        return f"#/$defs/{self._names[id(target)]}"

    def _visit_inline(self, schema, at: str, depth: int, document):
        """A part of a oneOf. What it refers to is put in its place, where that has an end: then
        llguidance may see that the parts exclude each other."""
        if not isinstance(schema, dict) or schema.keys() & KNOWN != {"$ref"}:
            return self._visit(schema, at, depth, document)
        target, place, document = self._target(schema["$ref"], f"{at}.$ref", document)
        if id(target) in self._inlined:
            return {"$ref": self._refer(target, place, document)}
        self._inlined.append(id(target))
        made = self._visit(target, place, depth, document)
        self._inlined.pop()
        return made


MISSING = object()  # where a reference leads nowhere
