"""Negation: what a schema forbids, said as what it allows.

A grammar says what may be written, and knows no "not". But most of what real schemas forbid has a
positive form: not a string is any other type, not without `a` is with `a`, and no word of an enum
is a pattern. So `not`, `if`, `dependencies` and `propertyNames` become other keywords that mean
exactly the same, and alternatives of a `oneOf` that may overlap become ones that do not. What has
no such form (a number that is no integer, an array with an item that is no ...) is Unholdable. This
is a part of schemas.py, no feature by itself. It costs about 10 us for each subschema.

>>> Negation(lambda ref: True).negated({"required": ["a"]})
{'type': 'object', 'properties': {'a': False}}
"""

import itertools
import json
import re
from collections.abc import Callable

from features.keywords import COUNTS, FORMATS, KNOWN, KNOWN_FORMATS, VOID, Unholdable

MAX_NEGATED = 1000  # subschemas; references make few bytes many
MAX_FOLLOWED = 32  # references, one inside the other
MAX_COMPARED = 4  # levels of members that are looked at to tell alternatives apart
MAX_WORD = 200  # characters of a word that a string must not be: its pattern is nested as deeply
VALUES = ("null", "boolean", "string", "array", "object", "number")  # what any value is one of
COUNTED = {"Items": "array", "Length": "string", "Properties": "object"}
OPPOSITE = {"minimum": "exclusiveMaximum", "maximum": "exclusiveMinimum",
            "exclusiveMinimum": "maximum", "exclusiveMaximum": "minimum"}
Part = dict | bool  # a schema


class Negation:
    """Other words for keywords of one schema."""

    def __init__(self, follow: Callable[[object], Part], ignores_beside_ref: bool = False):
        """follow: what a $ref names. ignores_beside_ref: as drafts up to 7 do."""
        self._follow, self._ignores_beside_ref = follow, ignores_beside_ref
        self._n_negated = 0
        self._following: list[int] = []  # ids of what references name, one inside the other

    def replaced(self, key: str, schema: dict) -> list[Part]:
        """Subschemas that together say what a keyword of REPLACED says. Raises Unholdable."""
        value = schema[key]
        if key == "not":
            return [self.negated(value)]
        if key == "propertyNames":
            return [self._of_names(value)]
        if key == "if":
            then, otherwise = schema.get("then", True), schema.get("else", True)
            if then is True or otherwise is True:  # one way is open: the other needs no `if`
                return [{"anyOf": [value, otherwise] if then is True
                         else [then, self.negated(value)]}]
            return [{"anyOf": [{"allOf": [value, then]},
                               {"allOf": [self.negated(value), otherwise]}]}]
        parts: list[Part] = []  # dependencies, by the name that has them
        for name, needed in (value.items() if isinstance(value, dict) else ()):
            own = {"required": [name, *needed]} if isinstance(needed, list) else \
                {"allOf": [{"required": [name]}, needed]}
            parts.append({"anyOf": [{"properties": {name: False}}, {"type": "object", **own}]})
        return parts

    def cases(self, parts: list[dict]) -> list[Part]:
        """Subschemas for the cases (`is_case`) in an allOf: one way for each value of the member
        that they ask for. (One by one they would be as many ways as there are mixtures.)"""
        grouped: dict[str, list[dict]] = {}
        for part in parts:
            grouped.setdefault(_case(part)[0], []).append(part)
        return [self._ways_of_cases(name, group) for name, group in grouped.items()]

    def _ways_of_cases(self, name: str, group: list[dict]) -> Part:
        cases = [_case(part) for part in group]
        values = list({json.dumps(value): value for _, listed, _ in cases for value in listed}
                      .values())

        def way(are_true, more: dict) -> Part:
            """A way in which these of the cases are true."""
            parts = [part.get("then" if is_true else "else", True)
                     for part, is_true in zip(group, are_true)]
            return {**more, "allOf": parts}

        has = {"type": "object", "required": [name]}
        ways = [way((json.dumps(value) in map(json.dumps, listed) for _, listed, _ in cases),
                    {**has, "properties": {name: {"enum": [value]}}}) for value in values]
        other = self.negated({"enum": values})
        ways += [way(itertools.repeat(False), {**has, "properties": {name: other}})]
        ways += [way((not is_required for *_, is_required in cases),
                     {"type": "object", "properties": {name: False}})]
        return {"anyOf": [*ways, way(itertools.repeat(True), {"type": [
            kind for kind in VALUES if kind != "object"]})]}

    def one_of(self, parts: list[Part]) -> list[Part]:
        """Alternatives of which no two overlap, for an anyOf in place of a oneOf. Raises
        Unholdable."""
        return [{"allOf": [part, *(self.negated(other) for j, other in enumerate(parts)
                                   if j != i and not self._apart(part, other))]}
                for i, part in enumerate(parts)]

    def _apart(self, one, other, depth: int = 0) -> bool:
        """Whether it is plain to see that no value satisfies both schemas."""
        one, other = self._resolved(one), self._resolved(other)
        kinds, values = kinds_of(one) & kinds_of(other), [values_of(one), values_of(other)]
        if not kinds or None not in values and not values[0] & values[1]:
            return True
        if depth == MAX_COMPARED or {"object"} not in (kinds_of(one), kinds_of(other)):
            return False
        names = [name for part in (one, other) for name in part.get("required", ())]
        inner = [part.get("properties", {}) for part in (one, other)]
        return any(name in inner[0] and name in inner[1]
                   and self._apart(inner[0][name], inner[1][name], depth + 1) for name in names)

    def _resolved(self, schema) -> dict:
        """What a schema says, or refers to, as an object."""
        if isinstance(schema, dict) and schema.keys() & KNOWN == {"$ref"}:
            schema = self._follow(schema["$ref"])
        return schema if isinstance(schema, dict) else {}

    def negated(self, schema) -> Part:
        """A schema of the values that do not satisfy a schema. Raises Unholdable."""
        self._n_negated += 1
        if self._n_negated > MAX_NEGATED:
            raise Unholdable(f"forbids more than {MAX_NEGATED} subschemas")
        if isinstance(schema, bool):
            return not schema
        if not isinstance(schema, dict):
            return False  # nobody negates what is wrong: schemas.py refuses it
        if "$ref" in schema and self._ignores_beside_ref:
            schema = {"$ref": schema["$ref"]}
        ways = [way for key in schema if key in KNOWN for way in self._ways(key, schema)
                if way is not False]
        return any_of(ways)

    def _ways(self, key: str, schema: dict) -> list[Part]:
        """In which ways a value may fail a keyword."""
        value = schema[key]
        if key == "type":
            kinds = value if isinstance(value, list) else [value]
            if "integer" in kinds and "number" not in kinds:
                raise Unholdable("no form has numbers that are no integers")
            others = [kind for kind in VALUES if kind not in kinds]
            return [{"type": others}] if others else []
        if key in ("const", "enum"):
            return other_values(value if key == "enum" else [value])
        if key == "required":
            return [{"type": "object", "properties": {name: False}} for name in value]
        if key == "properties":
            inner = [(name, self.negated(part)) for name, part in value.items()]
            return [{"type": "object", "required": [name], "properties": {name: part}}
                    for name, part in inner if part is not False]
        if key in COUNTS:
            limit, kind = key[:3], COUNTED[key[3:]]
            if limit == "max":
                return [{"type": kind, f"min{key[3:]}": value + 1}]
            return [{"type": kind, f"max{key[3:]}": value - 1}] if value > 0 else []
        if key in OPPOSITE:
            return self._beyond(key, schema)
        if key in ("allOf", "anyOf"):
            parts = [self.negated(part) for part in value]
            return parts if key == "allOf" else [{"allOf": parts}]
        if key == "not":
            return [value]
        if key == "$ref":
            return [self._negated_target(value)]
        if key == "if":
            then, otherwise = schema.get("then", True), schema.get("else", True)
            return [{"allOf": [value, self.negated(then)]},
                    {"allOf": [self.negated(value), self.negated(otherwise)]}]
        if key in ("then", "else") or any(value == void for void in VOID.get(key, ())) \
                or key in ("items", "additionalProperties") and value in (True, {}) \
                or key == "format" and value not in FORMATS and value not in KNOWN_FORMATS:
            return []  # says nothing by itself
        if key == "dependentRequired":
            return [{"type": "object", "required": [name], "properties": {other: False}}
                    for name, others in value.items() for other in others]
        if value is False and key == "items" and "prefixItems" not in schema:
            return [{"type": "array", "minItems": 1}]
        if value is False and key == "additionalProperties" and not schema.keys() & {
                "properties", "patternProperties"}:
            return [{"type": "object", "minProperties": 1}]
        raise Unholdable(f"{key} has no opposite that a reply could be held to")

    def _negated_target(self, ref) -> Part:
        """The opposite of what a reference names."""
        target = self._follow(ref)
        if id(target) in self._following or len(self._following) == MAX_FOLLOWED:
            raise Unholdable("forbids what refers to itself, or refers too far")
        self._following.append(id(target))
        negated = self.negated(target)
        self._following.pop()
        return negated

    @staticmethod
    def _beyond(key: str, schema: dict) -> list[Part]:
        """The numbers on the other side of a bound, which draft 4 has in two keywords."""
        value, exclusive = schema[key], "exclusive" + key[0].upper() + key[1:]
        if isinstance(value, bool):
            return []
        opposite = OPPOSITE[key]
        if schema.get(exclusive) is True:
            opposite = OPPOSITE[exclusive]
        return [{"type": "number", opposite: value}]

    def _of_names(self, schema) -> Part:
        """An object all of whose names satisfy a schema."""
        if isinstance(schema, dict) and "$ref" in schema:
            schema = self._follow(schema["$ref"])
        if schema is False or not isinstance(schema, dict):
            return {"additionalProperties": False} if schema is False else True
        rules = {key: value for key, value in schema.items() if key in KNOWN - {"type"}}
        if rules.keys() <= {"enum"} or rules.keys() <= {"const"}:
            words = [value for value in rules.get("enum", [rules.get("const")])
                     if isinstance(value, str)]
            return {"properties": dict.fromkeys(words, True), "additionalProperties": False} \
                if rules else True
        pattern = rules.get("pattern")
        if rules.keys() <= {"minLength", "maxLength"}:
            low, high = rules.get("minLength", 0), rules.get("maxLength", "")
            pattern = rf"^(?s:.){{{low},{high}}}$"
        elif rules.keys() == {"format"}:
            pattern = FORMATS.get(rules["format"]) and f"^({FORMATS[rules['format']]})$"
        elif rules.keys() == {"not"}:
            opposite = self.negated(rules["not"])
            ways = opposite.get("anyOf", [opposite]) if isinstance(opposite, dict) else []
            pattern = next((way["pattern"] for way in ways if way.keys() == {"type", "pattern"}),
                           None)
        elif rules.keys() != {"pattern"}:
            pattern = None
        if not isinstance(pattern, str):
            raise Unholdable("names can be held to one pattern, format, length or list of words")
        return {"patternProperties": {pattern: True}, "additionalProperties": False}


def is_case(part) -> bool:
    """Whether a schema is no more than an `if` about the values of one member."""
    if not isinstance(part, dict) or not {"if"} < part.keys() & KNOWN <= {"if", "then", "else"}:
        return False
    asked = part["if"]
    if not isinstance(asked, dict) or not asked.keys() & KNOWN <= {"properties", "required"}:
        return False
    members = asked.get("properties")
    if not isinstance(members, dict) or len(members) != 1:
        return False
    [(name, member)] = members.items()
    return asked.get("required", [name]) == [name] and isinstance(member, dict) \
        and (member.keys() & KNOWN) in ({"const"}, {"enum"}) \
        and isinstance(member.get("enum", []), list) and bool(values := values_of(member)) \
        and max(map(len, values)) <= MAX_WORD


def _case(part: dict) -> tuple[str, list, bool]:
    """The member that a case asks for, its values, and whether it must be there."""
    [(name, member)] = part["if"]["properties"].items()
    return name, member.get("enum", [member.get("const")]), "required" in part["if"]


def at_least_one(n: int, schema: dict) -> Part:
    """What `minProperties: 1` says of an object: one of those that `properties` names, or another,
    without them."""
    names = schema.get("properties", {})
    return {"anyOf": [*({"required": [name]} for name in names),
                      {"properties": dict.fromkeys(names, False), "minProperties": n}]}


def kinds_of(schema: dict) -> set[str]:
    """The types that a value of a schema may have."""
    kinds = schema.get("type", VALUES)
    return {"number" if kind == "integer" else kind
            for kind in ([kinds] if isinstance(kinds, str) else kinds)}


def values_of(schema: dict) -> set[str] | None:
    """The values that a schema lists, as JSON; None if it lists none, or some that JSON may write
    in several ways."""
    values = [schema["const"]] if "const" in schema else schema.get("enum", [{}])
    is_plain = all(isinstance(value, str | int | None) for value in values)
    return {json.dumps(value) for value in values} if is_plain else None


def any_of(ways: list[Part]) -> Part:
    """One schema for several ways to satisfy it."""
    if True in ways or not ways:
        return bool(ways)
    return ways[0] if len(ways) == 1 else {"anyOf": ways}


def other_values(values: list) -> list[Part]:
    """In which ways a value may be none of some. Raises Unholdable."""
    words = [value for value in values if isinstance(value, str)]
    flags = [value for value in values if isinstance(value, bool)]
    numbers = sorted({value for value in values if isinstance(value, (int, float))
                      and not isinstance(value, bool)})
    kinds = {"string": words, "boolean": flags, "number": numbers, "null": [
        value for value in values if value is None], "array": [
        value for value in values if isinstance(value, list)], "object": [
        value for value in values if isinstance(value, dict)]}
    ways: list[Part] = []
    for kind, empty, count in (("array", [], "minItems"), ("object", {}, "minProperties")):
        if any(value != empty for value in kinds[kind]):
            raise Unholdable(f"no form has any {kind} but some")
        ways += [{"type": kind, count: 1}] if kinds[kind] else []
    ways += [{"type": kind} for kind in VALUES if not kinds[kind]]
    ways += [{"type": "string", "pattern": f"^{other_than(words)}$"}] if words else []
    ways += [{"enum": [value]} for value in (True, False) if flags and value not in flags]
    for low, high in zip([None, *numbers], [*numbers, None]) if numbers else ():
        ways.append({"type": "number", **({} if low is None else {"exclusiveMinimum": low}),
                     **({} if high is None else {"exclusiveMaximum": high})})
    return ways


def other_than(words: list[str]) -> str:
    """A regular expression for any text but some words: it leaves each of them at some letter, or
    ends inside, or goes on behind."""
    if any(len(word) > MAX_WORD for word in words):
        raise Unholdable(f"a word that is forbidden has more than {MAX_WORD} characters")
    following: dict[str, list[str]] = {}
    for word in words:
        if word:
            following.setdefault(word[0], []).append(word[1:])
    letters = "".join(rf"\U{ord(letter):08x}" for letter in following)
    ways = [rf"[^{letters}](?s:.)*" if letters else "(?s:.)+"]
    ways += [re.escape(letter) + other_than(rest) for letter, rest in following.items()]
    return f"(?:{'|'.join(ways)})" + ("" if "" in words else "?")
