"""JSON Schema as llguidance should read it: what structured.py compiles.

llguidance (https://github.com/guidance-ai/llguidance) makes a grammar of a schema. It knows most of
JSON Schema, and refuses the rest; but some of what it takes, it takes otherwise than it was meant,
and it trusts what it is given. `Schema` stands between: it

- bounds the size of everything, in a walk of its own, before anything is compiled;
- refuses by its place, such as `schema.properties.age.not`, what no reply can be held to token by
  token, and what is no JSON Schema;
- leaves out unknown keywords and formats, which are annotations (JSON Schema 2020-12, 6.5 and 7.2),
  `x-guidance` among them, which would set llguidance's options;
- follows `$ref` by JSON Pointer, `$anchor` and `$id`, and turns the dialects of drafts 4 to 7 into
  that of 2020-12;
- gives numbers and dates bounds that llguidance honours to the letter.

It costs about 10 us for each subschema.
"""

import functools
import json
import math
import re
import urllib.parse
from collections.abc import Iterator
from decimal import Decimal

MAX_FORM = 2**18  # bytes of a schema; a quarter of it for a grammar
MAX_NODES, MAX_DEPTH = 4000, 48  # subschemas looked at; one inside the other
MAX_PATTERN = 4000  # characters of a regular expression; 200,000 take 6 s and 2 GB for one token
MAX_NAME_PATTERNS = 64  # in one patternProperties: each two of them are compared
MAX_DIVISOR = 10_000  # multipleOf without its decimal point: so many states has its automaton
MAX_COUNT = 2**31  # of items, characters, members
# llguidance counts in doubles. Bounds from MAX_BOUND on, int64's own, are left out.
MAX_EXACT, MAX_BOUND = 2**53, 2**63 - 1
# Once where JSON may have white space, so that a model that likes blanks comes to an end.
WHITE_SPACE = r"\r?\n[ \t]{0,40}|[ \t]{1,2}"
OPTIONS = {"whitespace_pattern": WHITE_SPACE, "json_allow_general_unicode_escapes": True}


class SchemaError(ValueError):
    """A schema or grammar that cannot be honoured; the message starts with the place."""


COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
LISTS, MAPS = ("allOf", "anyOf", "oneOf", "prefixItems"), ("properties", "patternProperties")
TYPES = ("null", "boolean", "string", "array", "object", "integer", "number")
REFUSED = frozenset(  # they bind, and llguidance cannot hold a reply to them token by token
    "not if dependencies dependentRequired dependentSchemas propertyNames contains uniqueItems "
    "unevaluatedItems unevaluatedProperties $dynamicRef $recursiveRef".split())
VOID = {"uniqueItems": (False,), "propertyNames": (True, {}), "unevaluatedItems": (True, {}),
        "unevaluatedProperties": (True, {}), "dependencies": ({},), "dependentRequired": ({},),
        "dependentSchemas": ({},)}  # what says nothing there

DATE = (r"([0-9]{4}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
        r"|02-(0[1-9]|1[0-9]|2[0-8]))|([0-9]{2}(0[48]|[2468][048]|[13579][26])"
        r"|([02468][048]|[13579][26])00)-02-29)")  # the Gregorian leap years
TIME = (r"(([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]+)?([zZ]|[+-]([01][0-9]|2[0-3]):"
        r"[0-5][0-9])|23:59:60(\.[0-9]+)?[zZ])")
BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
IPV4, GROUP = rf"{BYTE}(\.{BYTE}){{3}}", "[0-9a-fA-F]{1,4}"


def ipv6_pattern() -> str:
    """The addresses of RFC 4291, 2.2: eight groups, of which `::` stands for one or more, and the
    last two may be an IPv4 address."""
    ways = [f"({GROUP}:){{7}}{GROUP}", f"({GROUP}:){{6}}{IPV4}"]
    for n in range(8):  # groups before the ::
        before = f"{GROUP}(:{GROUP}){{{n - 1}}}" if n else ""
        ways.append(f"{before}::" + (f"({GROUP}(:{GROUP}){{0,{6 - n}}})?" if n < 7 else ""))
        ways += [f"{before}::({GROUP}:){{0,{5 - n}}}{IPV4}"] if n < 6 else []
    return "|".join(ways)


FORMATS = {  # ours, where llguidance's take what is no date, or no IPv4 inside of IPv6; ...
    "date": DATE, "time": TIME, "date-time": f"{DATE}[tT]{TIME}", "ipv6": ipv6_pattern()}
KNOWN_FORMATS = ("duration", "email", "hostname", "ipv4", "uuid", "uri")  # ... and its own


class Schema:
    """A JSON Schema as llguidance should read it: unknown keywords are left out, references lead
    into `$defs`, numbers are within its means, and what it cannot honour is refused by its
    place."""

    def __init__(self, root, at: str):
        """at: where the schema was sent."""
        try:
            size = len(json.dumps(root, allow_nan=False, ensure_ascii=False).encode())
        except RecursionError:
            raise SchemaError(f"{at}: is nested too deeply") from None
        except ValueError as error:  # infinity, or half a character
            raise SchemaError(f"{at}: is not JSON with valid Unicode: {error}") from None
        if size > MAX_FORM:
            raise SchemaError(f"{at}: the schema has {size} bytes, the limit is {MAX_FORM}")
        self.root, self.at = root, at
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

    def _visit(self, schema, at: str, depth: int, document):
        """A subschema; document: the root, or the nearest subschema around with an $id."""
        self._n_nodes += 1
        if depth > MAX_DEPTH or self._n_nodes > MAX_NODES:
            raise SchemaError(f"{at}: the schema is too large (limits: {MAX_NODES} subschemas, "
                              f"{MAX_DEPTH} levels)")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise SchemaError(f"{at}: a schema must be an object, got {schema!r:.60}")
        document = schema if self._id(schema) else document
        if "$ref" in schema and self._ignores_beside_ref:
            schema = {"$ref": schema["$ref"]}
        made: dict = {}
        for key, value in schema.items():
            place = f"{at}.{key}"
            if key in REFUSED and not any(value == void for void in VOID.get(key, ())) \
                    and not (key == "if" and not schema.keys() & {"then", "else"}):
                raise SchemaError(f"{place}: a reply cannot be held to this keyword; leave it out")
            if key in MAPS:
                made[key] = {self._name(name, key, value, place): self._visit(
                    part, f"{place}.{name}", depth + 1, document)
                    for name, part in self._is(dict, value, place).items()}
            elif key in LISTS or key == "items" and isinstance(value, list):
                parts = self._is(list, value, place)
                if key == "anyOf" and not parts:
                    raise SchemaError(f"{place}: nothing satisfies it")
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
        if made.keys() & set(BOUNDS):
            limit_numbers(made, at)
        return made

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
            raise SchemaError(f"{at}: has {len(siblings)} patterns, the limit is "
                              f"{MAX_NAME_PATTERNS}")
        return self._pattern(name, at)

    def _pattern(self, pattern: str, at: str) -> str:
        """A regular expression. What Rust reads otherwise than ECMAScript means itself there: in a
        class `[`, `&`, `~` and `--`, outside `\\<` and `\\>`."""
        if len(self._is(str, pattern, at)) > MAX_PATTERN:
            raise SchemaError(f"{at}: has {len(pattern)} characters, the limit is {MAX_PATTERN}")
        return ESCAPED_OR_CLASS.sub(_as_in_ecmascript, pattern)

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
            digits = Decimal(repr(value)).as_tuple().digits if key == "multipleOf" else ()
            if int("".join(map(str, digits)) or 0) > MAX_DIVISOR:
                raise SchemaError(f"{at}: {value!r} has too many digits; the limit is "
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
            elif key in ("items", "additionalProperties", "additionalItems"):
                yield value, f"{at}.{key}"
            elif key == "$ref":
                yield self._target(value, f"{at}.{key}", self.root)[:2]

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
            whole = urllib.parse.urljoin(self._uri, uri)
            document = self._documents.get(whole, MISSING) if whole != self._uri else self.root
        target = document
        if fragment and not fragment.startswith("/"):
            target = self._anchors.get(fragment, MISSING)
            place = f"#{fragment}"
        for key in fragment.split("/")[1:] if fragment.startswith("/") else ():
            key = key.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list):
                target = target[int(key)] if key.isdecimal() and int(key) < len(target) else MISSING
            else:
                target = target.get(key, MISSING) if isinstance(target, dict) else MISSING
            document = target if self._id(target) else document
            place += f".{key}"
        if target is MISSING:
            raise SchemaError(f"{at}: {ref!r:.200} is not a place in this schema, such as "
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
        return {urllib.parse.urljoin(self._uri, uri): each for each in self._subschemas
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
KNOWN = REFUSED.union(COUNTS, BOUNDS, LISTS, MAPS, (
    "$ref type const enum items additionalItems additionalProperties required pattern format "
    "multipleOf then else").split())
ESCAPED_OR_CLASS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)


def _as_in_ecmascript(match: re.Match) -> str:
    """An escape or a class of a pattern, as Rust should read it."""
    if match[0][0] == "\\":
        return match[0].lstrip("\\") if match[0] in ("\\<", "\\>") else match[0]
    inner = re.sub(r"\\.|[\[&~]|--", lambda part: part[0] if part[0][0] == "\\" else
                   "".join("\\" + char for char in part[0]), match[0][1:])
    return "[" + inner


def exact(value, at: str):
    """A value of an enum, as llguidance can write it: 1.0 is the number 1, and an integer that is
    no double is refused, because it would become another one."""
    if isinstance(value, dict):
        return {key: exact(inner, at) for key, inner in value.items()}
    if isinstance(value, list):
        return [exact(inner, at) for inner in value]
    if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_EXACT:
        return int(value)
    if isinstance(value, int) and abs(value) > MAX_EXACT and int(float(value)) != value:
        raise SchemaError(f"{at}: {value} cannot be held to exactly; the limit is 2**53")
    return value


def limit_numbers(schema: dict, at: str) -> None:
    """Replace the bounds of a schema by ones that llguidance honours to the letter."""
    bounds = {key: schema.pop(key) for key in BOUNDS if key in schema}
    for key, other in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if bounds.get(key) is True and other in bounds:  # as draft 4 has it
            bounds[key] = bounds.pop(other)
        elif isinstance(bounds.get(key), bool):
            del bounds[key]
    bounds = {key: value for key, value in bounds.items() if abs(value) < MAX_BOUND}
    for key, value in bounds.items():
        if isinstance(value, int) and abs(value) > MAX_EXACT and int(float(value)) != value:
            raise SchemaError(f"{at}.{key}: {value} cannot be held to exactly; the limit is 2**53")
    types = schema.get("type", [kind for kind in TYPES if kind != "integer"])
    types = types if isinstance(types, list) else [types]
    others = [kind for kind in types if kind not in ("number", "integer")]
    if "number" not in types:
        ways = [{"type": "integer", **bounds}] if "integer" in types else []
    elif "multipleOf" in schema:
        ways = [{"type": "number", **bounds}]
    else:
        ways = [{"type": "number", **way} for way in number_ranges(bounds)] if bounds else \
            [{"type": "number"}]
    ways += [{"type": others}] if others else []
    if not ways:
        raise SchemaError(f"{at}.{min(bounds)}: nothing satisfies it")
    schema.setdefault("allOf", []).append({"anyOf": ways})


N_DIGITS = 15  # of a number, that surely survive in a double
MIRRORED = {"minimum": "maximum", "maximum": "minimum", "exclusiveMaximum": "exclusiveMinimum"}


def number_ranges(bounds: dict) -> list[dict]:
    """Bounds that cover, one or another, each number within `bounds`. subtle: alone, llguidance's
    own miss some (2.5 below 2.53; -0.10 up to 0) or take one too much (0 above 0, up to 0.3)."""
    low, above = bounds.get("minimum", -math.inf), bounds.get("exclusiveMinimum", -math.inf)
    high, below = bounds.get("maximum", math.inf), bounds.get("exclusiveMaximum", math.inf)
    low = _next(above) if above >= low and above > -math.inf else low
    is_open = below <= high and below < math.inf
    high = min(high, below)
    if low > high or low == high and is_open:
        return []
    ways = _positive_ranges(max(low, 0), high, is_open) if high > 0 else \
        [{"minimum": 0, "maximum": 0}] if high == 0 and not is_open else []
    if low < 0:
        least, top = max(-high, 0), -low  # seen from the other side
        least = _next(least) if is_open or least == 0 else least
        ways += [{MIRRORED[key]: -value for key, value in way.items()}
                 for way in _positive_ranges(least, top, False)]
    return ways


def _positive_ranges(low: float, high: float, is_open: bool) -> list[dict]:
    """As number_ranges, from `low` >= 0 to `high`."""
    if high == math.inf or low >= high:
        return [{"minimum": low, **({"maximum": low} if low == high else {})}] \
            if low == high or low < high else []
    ways = [{"minimum": low, "exclusiveMaximum" if is_open else "maximum": high}]
    whole, _, decimals = f"{Decimal(repr(high)):f}".partition(".")
    for n in range(1, len(decimals)):  # 2.5 and 2.53, where 2.534 is the end
        value = float(f"{whole}.{decimals[:n]}")
        ways += [{"minimum": value, "maximum": value}] if low <= value < high else []
    return ways


def _next(value: float) -> float:
    """The next number above one, at N_DIGITS digits."""
    exact_value = Decimal(repr(value))
    n_before = exact_value.adjusted() + 1 if value else 0
    return float(exact_value + Decimal(1).scaleb(n_before - N_DIGITS))
