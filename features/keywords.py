"""Keywords: the words of JSON Schema, which of them bind, and what the formats mean.

schemas.py reads schemas by these tables, and negation.py turns their meaning around. It is no
feature by itself. The words are those of JSON Schema 2020-12, and what drafts 4 to 7 had in their
place.
"""

import re
import urllib.parse


class SchemaError(ValueError):
    """A schema or grammar that cannot be honoured; the message starts with the place."""


class Unholdable(SchemaError):
    """It asks for something that no reply can be held to token by token; without it, it could be
    honoured."""


COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
LISTS, MAPS = ("allOf", "anyOf", "oneOf", "prefixItems"), ("properties", "patternProperties")
TYPES = ("null", "boolean", "string", "array", "object", "integer", "number")
REFUSED = frozenset(  # they bind, and no reply can be held to them token by token
    "contains uniqueItems unevaluatedItems unevaluatedProperties $dynamicRef $recursiveRef".split())
REPLACED = frozenset(  # they bind, and negation.py may have other words for them
    "not if dependencies dependentRequired dependentSchemas propertyNames".split())
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
KNOWN = REFUSED.union(REPLACED, COUNTS, BOUNDS, LISTS, MAPS, (
    "$ref type const enum items additionalItems additionalProperties required pattern format "
    "multipleOf then else").split())

OVERLAP = "the alternatives may overlap: write anyOf, or give each a type or a constant of its own"
UNSATISFIABLE, TOO_LARGE = "Unsatisfiable schema", "schema too large"
EXPANDABLE = {"oneOf", "minProperties"}  # if llguidance does not take them as they are
CAUSES = {  # what llguidance says, and the keywords that it may mean
    "oneOf constraints": ("oneOf",), "min/maxProperties": ("minProperties", "maxProperties"),
    "regex": ("pattern", "patternProperties"), "lookarounds": ("pattern", "patternProperties"),
    "patternProperties": ("patternProperties",)}


def causes_of(error: str) -> set[str]:
    """The keywords that llguidance may mean."""
    return next((set(keys) for said, keys in CAUSES.items() if said in error), set())


ESCAPED_OR_CLASS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)


def in_ecmascript(pattern: str) -> str:
    """A regular expression as Rust should read it. What Rust reads otherwise than ECMAScript means
    itself there: in a class `[`, `&`, `~` and `--`, outside `\\<` and `\\>`."""
    return ESCAPED_OR_CLASS.sub(_as_in_ecmascript, pattern)


def _as_in_ecmascript(match: re.Match) -> str:
    """An escape or a class of a pattern, as Rust should read it."""
    if match[0][0] == "\\":
        return match[0].lstrip("\\") if match[0] in ("\\<", "\\>") else match[0]
    inner = re.sub(r"\\.|[\[&~]|--", lambda part: part[0] if part[0][0] == "\\" else
                   "".join("\\" + char for char in part[0]), match[0][1:])
    return "[" + inner


def in_json(pattern: str) -> str:
    """A regular expression for what a JSON string says. subtle: derivre, where it quotes, takes a
    class that has all control characters for one that has `"` and `\\`, too. So one that has not
    loses the last of them, which nobody writes."""
    return ESCAPED_OR_CLASS.sub(_without_last_control, pattern)


def _without_last_control(match: re.Match) -> str:
    if match[0][0] != "[":
        return match[0]
    try:
        chars = re.compile(match[0])
    except re.error:  # Rust's own escapes
        return f"[{match[0]}--\\x1f]"
    is_taken_for_more = chars.match("\x1f") and not (chars.match('"') and chars.match("\\"))
    return f"[{match[0]}--\\x1f]" if is_taken_for_more else match[0]


def joined(base: str, uri: str) -> str:
    """A URI as it is meant beside another one; one that is none stands for itself."""
    try:
        return urllib.parse.urljoin(base, uri)
    except ValueError:  # such as http://[
        return uri
