"""What a schema forbids, said as what it allows: `not`, `if`, `dependencies`, `propertyNames` and
alternatives that may overlap. Without HTTP: what may be written is what validates.

    1  tables   of each keyword: values that may be written, values that may not
    2  random   schemas of these keywords, and random values
    3  the rest what has no such form is refused by its place, or left out just there
"""

import json
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from features import schemas, structured  # noqa: E402
from test_structured import PROPERTY, compiled, model  # noqa: E402, F401  model is a fixture


def takes(model, new_reply, value) -> bool:
    """Whether a reply may be this value, and end there."""
    reply, text = new_reply(), json.dumps(value, ensure_ascii=False)
    tokens = model.tokenize(text, bos=False, special=False).tolist()
    return all(reply.take(token) for token in tokens) and reply.take(min(model.end_tokens))


# ==== 1. Tables ===========================================================================

VALUES = [None, True, False, 0, 1, 2, 3.5, -1, 7, "", "a", "ab", "abc", "b", "x-1", "漢", [], [1], [1, 2], ["a"],
          {}, {"a": 1}, {"b": 1}, {"a": 1, "b": 2}, {"a": "x"}, {"a": 1, "b": "x", "c": None}, {"ab": 1}, {"c": 1}]
CLOSED = {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "additionalProperties": False}
TABLE = {  # name: schema
    "not a type": {"not": {"type": "string"}},
    "not several types": {"not": {"type": ["object", "array", "number"]}},
    "not a value": {"not": {"const": "ab"}},
    "none of some values": {"not": {"enum": ["", "a", "abc", 1, 3.5, None, True, [], {}]}},
    "no value of a typed enum": {"type": "string", "not": {"enum": ["a", "abc", "漢"]}},
    "without a member": {"type": "object", "not": {"required": ["a"]}},
    "not with both": {**CLOSED, "not": {"required": ["a", "b"]}},
    "neither": {"not": {"anyOf": [{"required": ["a"]}, {"type": "string"}]}},
    "not both": {**CLOSED, "not": {"allOf": [{"required": ["a"]}, {"required": ["b"]}]}},
    "not a member of a kind": {**CLOSED, "not": {"properties": {"a": {"type": "string"}}, "required": ["a"]}},
    "not without": {"not": {"not": {"type": "null"}}},
    "not within bounds": {"type": "number", "not": {"minimum": 1, "maximum": 3}},
    "not beyond bounds": {"not": {"exclusiveMinimum": 1}},
    "not as long": {"type": "string", "not": {"minLength": 2}},
    "not as short": {"type": "array", "not": {"maxItems": 0}},
    "not closed": {"type": "object", "not": {"additionalProperties": False}},
    "nothing but": {"not": False, "type": ["null", "string"]},
    "a reference": {"$defs": {"s": {"type": "string"}}, "not": {"$ref": "#/$defs/s"}},
    "if then": {**CLOSED, "if": {"required": ["a"]}, "then": {"required": ["b"]}},
    "if else": {**CLOSED, "if": {"required": ["a"]}, "else": {"required": ["c"]}},
    "if then else": {**CLOSED, "if": {"properties": {"a": {"const": 1}}, "required": ["a"]},
                     "then": {"required": ["b"]}, "else": {"properties": {"b": False}}},
    "cases": {**CLOSED, "required": ["a"], "allOf": [
        {"if": {"properties": {"a": {"const": 1}}}, "then": {"required": ["b"]}},
        {"if": {"properties": {"a": {"const": "x"}}}, "then": {"properties": {"b": False}}}]},
    "cases of some values": {**CLOSED, "allOf": [
        {"if": {"properties": {"a": {"enum": [1, None]}}, "required": ["a"]}, "then": {"required": ["b"]}, "else": {"properties": {"b": False}}},
        {"if": {"properties": {"a": {"enum": ["x", 1]}}}, "then": {"required": ["c"]}}]},
    "cases of any kind": {"allOf": [
        {"if": {"properties": {"a": {"const": 1}}}, "then": {"type": ["object", "string"]}, "else": {"required": ["b"]}},
        {"if": {"properties": {"a": {"const": "x"}}, "required": ["a"]}, "then": {"type": ["object", "null"]}}]},
    "dependencies": {"$schema": "http://json-schema.org/draft-07/schema#", **CLOSED, "dependencies": {"a": ["b"], "b": {"properties": {"b": {"type": "integer"}}}}},
    "dependent names": {**CLOSED, "dependentRequired": {"a": ["b", "c"]}},
    "dependent schemas": {**CLOSED, "dependentSchemas": {"b": {"required": ["a"]}}},
    "not nothing": {"anyOf": [{"type": "null"}, {"not": {"items": True, "additionalProperties": {}, "format": "odd"}}]},
    "names by pattern": {"type": "object", "propertyNames": {"pattern": "^a"}},
    "names by length": {"type": "object", "propertyNames": {"maxLength": 1}},
    "names by list": {"type": "object", "propertyNames": {"enum": ["a", "c"]}},
    "names but some": {"type": "object", "propertyNames": {"not": {"enum": ["a", "ab"]}}},
    "names beside members": {**CLOSED, "propertyNames": {"pattern": "^[ab]$"}},
    "no names": {"type": "object", "propertyNames": False},
    "one of two": {**CLOSED, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
    "one of three": {**CLOSED, "oneOf": [{"required": ["a"]}, {"required": ["b"]}, {"required": ["c"]}]},
    "one of some that overlap": {"oneOf": [{"type": "string", "minLength": 2}, {"enum": ["ab", "b", 1]}]},
    "one of nearly all": {"oneOf": [{"type": ["null", "string"]}, {"type": ["null", "number"]}]},
    "one of tagged ones": {"type": "object", "oneOf": [
        {"properties": {"a": {"const": 1}}, "required": ["a"]}, {"properties": {"a": {"const": "x"}, "b": {}}}]},
    "at least one": {"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 1},
    "at least one of some": {**CLOSED, "minProperties": 1},
    "draft 4 bounds": {"$schema": "http://json-schema.org/draft-04/schema#", "type": "number", "not": {"minimum": 1, "exclusiveMinimum": True}},
    "what says nothing": {"not": {"not": {}}, "if": {"type": "null"}, "dependencies": {}, "propertyNames": {}},
}


@pytest.mark.parametrize("name", TABLE)
def test_what_may_be_written_is_what_validates(model, name):
    schema, new_reply = TABLE[name], compiled(model, TABLE[name])
    validator = validator_for(schema, Draft202012Validator)(schema)
    wrong = [value for value in VALUES if takes(model, new_reply, value) != validator.is_valid(value)]
    assert wrong == []
    assert any(map(validator.is_valid, VALUES)), "the table has nothing to write"


def test_what_is_none_of_some_words_is_any_other(model):
    """Also what begins like them, and what they begin with."""
    words = ["a", "abc", "abd", "x.y", "]", "\\", "漢字", "🙂", "a b\n"]
    new_reply = compiled(model, {"type": "string", "not": {"enum": words}})
    near = {word[:n] + more for word in words for n in range(len(word) + 1) for more in ("", "z", "漢")}
    for word in near | set(words):
        assert takes(model, new_reply, word) == (word not in words), word


# ==== 2. Random ===========================================================================

WORDS = st.sampled_from(["", "a", "ab", "b"])
NAMES = st.sampled_from(["a", "b", "c"])
SCALARS = st.sampled_from([None, True, False, 0, 1, 2, -1, 0.5, "", "a", "ab", "b"])
INNER = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(NAMES, SCALARS, max_size=1)  # no order
DOCUMENTS = INNER | st.lists(INNER, max_size=2) | st.dictionaries(NAMES, INNER, max_size=3).map(
    lambda value: dict(sorted(value.items())))
LEAVES = st.one_of(
    st.booleans(), st.sampled_from(["string", "object", "array", "null", "number", "boolean"]).map(
        lambda kind: {"type": kind}),
    SCALARS.map(lambda value: {"const": value}),
    st.lists(SCALARS, min_size=1, max_size=3).map(lambda values: {"enum": values}),
    st.lists(NAMES, min_size=1, max_size=2, unique=True).map(lambda names: {"required": names}),
    st.builds(lambda key, n: {key: n}, st.sampled_from(["minLength", "maxLength", "minItems", "maxItems"]),
              st.integers(0, 2)),
    st.builds(lambda key, n: {key: n}, st.sampled_from(["minimum", "exclusiveMaximum"]), st.integers(-1, 2)))
SCHEMAS = st.recursive(LEAVES, lambda inner: st.one_of(
    st.lists(st.builds(lambda name, values, required, a, b: {
        "if": {"properties": {name: {"enum": values}}, **({"required": [name]} if required else {})}, "then": a, "else": b},
        NAMES, st.lists(st.sampled_from([1, "a", "ab", None]), min_size=1, max_size=2), st.booleans(), inner, inner),
        min_size=1, max_size=2).map(lambda parts: {"allOf": parts}),
    inner.map(lambda part: {"not": part}),
    st.builds(lambda name, part: {"properties": {name: part}}, NAMES, inner),
    st.builds(lambda key, parts: {key: parts}, st.sampled_from(["allOf", "anyOf", "oneOf"]),
              st.lists(inner, min_size=1, max_size=3)),
    st.builds(lambda a, b, c: {"if": a, "then": b, "else": c}, inner, inner, inner),
    st.builds(lambda name, part: {"dependentSchemas": {name: part}}, NAMES, inner),
    st.builds(lambda name, other: {"dependentRequired": {name: [other]}}, NAMES, NAMES)), max_leaves=4)
ORDER = {"type": ["object", "array", "null", "string", "number", "boolean"],  # members sorted by name
         "properties": {"a": {}, "b": {}, "c": {}}}


@settings(PROPERTY, max_examples=150)
@given(schema=SCHEMAS, values=st.lists(DOCUMENTS, min_size=8, max_size=8))
def test_any_mixture_of_them_holds_by_the_letter(model, schema, values):
    """Whatever is served can write what validates, and nothing else."""
    whole = {"allOf": [ORDER, schema]}
    try:
        new_reply = compiled(model, whole)
    except schemas.SchemaError:
        return
    validator = Draft202012Validator(whole)
    for value in values:
        assert takes(model, new_reply, value) == validator.is_valid(value), (schema, value)


@settings(PROPERTY, max_examples=100)
@given(schema=SCHEMAS, values=st.lists(DOCUMENTS, min_size=8, max_size=8))
def test_what_is_loosened_takes_whatever_validates(model, schema, values):
    try:
        new_reply = compiled(model, {"allOf": [ORDER, schema]}, is_strict=False)
    except schemas.SchemaError as error:
        assert "Unsatisfiable" in str(error) or "nothing satisfies" in str(error)
        return
    validator = Draft202012Validator({"allOf": [ORDER, schema]})
    for value in values:
        assert takes(model, new_reply, value) or not validator.is_valid(value), (schema, value)


# ==== 3. What has no other words ==========================================================

INTEGER, TEXT = {"type": "integer"}, {"type": "string"}
LOOSENED = {  # name: schema, places of what is left out, values that may be written then, values that may not
    "unique items": ({"type": "array", "items": TEXT, "uniqueItems": True}, ["uniqueItems"], [["a", "a"]], [[1]]),
    "a member inside": ({"type": "object", "properties": {"a": {"contains": {}, "maxItems": 1}}}, ["properties.a.contains"],
                        [{"a": []}], [{"a": [1, 2]}]),
    "not a kind of number": ({"type": "number", "not": INTEGER}, ["not"], [1, 1.5], ["a"]),
    "a pattern": ({"type": "string", "maxLength": 3, "pattern": "(?=a)b"}, ["pattern"], ["b"], ["abcd"]),
    "a pattern of names": ({"type": "object", "patternProperties": {"(?=a)b": TEXT}, "additionalProperties": False},
                           ["patternProperties"], [{"b": 1}], [1]),
    "too many patterns of names": ({"patternProperties": {f"^{i}$": {} for i in range(65)}, "additionalProperties": False},
                                   ["patternProperties"], [{"b": 1}], []),
    "alternatives": ({"type": ["number", "string"], "oneOf": [INTEGER, {"type": ["number", "string"]}]}, ["oneOf"],
                     [1, 1.5, "a"], [None]),
    "an alternative": ({"oneOf": [{"type": "array", "uniqueItems": True}, TEXT]}, ["oneOf[0].uniqueItems"],
                       [[1, 1], "a"], [1]),
    "a reference elsewhere": ({"type": "object", "properties": {"a": {"$ref": "http://x.org/y", "type": "null"}}},
                              ["properties.a.$ref"], [{"a": None}], [{"a": 1}]),
    "in a definition": ({"$defs": {"l": {"type": "array", "uniqueItems": True}}, "items": {"$ref": "#/$defs/l"}},
                        ["$defs.l.uniqueItems"], [[[1, 1]]], [[1]]),
    "a large divisor": ({"type": "integer", "multipleOf": 123457}, ["multipleOf"], [5], [1.5]),
    "a large integer": ({"type": "integer", "maximum": 2**53 + 1}, ["maximum"], [5], [1.5]),
    "how many members": ({"type": "object", "properties": {"a": {}, "b": {}}, "maxProperties": 1}, ["maxProperties"],
                         [{"a": 1, "b": 1}], [1]),
    "some of many": ({"items": {"properties": {"a": {"items": {"pattern": "\\bx"}}, "b": {"pattern": "x"},
                                               "c": {"pattern": "(?!x)"}}}},
                     ["items.properties.a.items.pattern", "items.properties.c.pattern"], [[{"a": ["y"], "b": "x"}]],
                     [[{"b": "y"}]]),
    "a case": ({"if": {"uniqueItems": True}, "then": {"maxItems": 1}, "type": "array"}, ["if"], [[1, 1]], [1]),
    "in what a case asks for": ({"type": "array", "if": {"maxItems": 1}, "then": {"items": {"contains": {}}}}, ["then.items.contains"],
                                [[[]]], [1]),
    "in what several cases ask for": (
        {"type": "object", "properties": {"k": {}}, "required": ["k"], "allOf": [
            {"if": {"properties": {"k": {"const": i}}}, "then": {"properties": {"a": {"not": INTEGER, "type": kind}}}}
            for i, kind in enumerate(["number", "string"])]},
        ["allOf[0].then.properties.a.not", "allOf[1].then.properties.a.not"], [{"k": 0, "a": 1}, {"k": 1, "a": "x"}],
        [{"k": 0, "a": "x"}, {"k": 1, "a": 1}]),
    "in what is forbidden": ({"type": "array", "not": {"not": {"items": {"not": {"not": {"contains": {}}}}}}},
                             ["not"], [[[]]], [1]),
    "nothing": ({"type": "object", "not": {"required": ["a"]}}, [], [{}], [{"a": 1}]),
}


@pytest.mark.parametrize("name", LOOSENED)
def test_what_cannot_be_held_is_left_out_just_there(model, name):
    """And no more than that; strictly, each of them is refused at one of these places."""
    schema, places, written, refused = LOOSENED[name]
    form = structured.Form()
    form.root = form.add_schema(schema, "schema", is_strict=False)
    new_reply = form.replies(model, must_trigger=True)
    assert sorted(form.loosened) == [f"schema.{place}" for place in places]
    assert [value for value in written if not takes(model, new_reply, value)] == []
    assert [value for value in refused if takes(model, new_reply, value)] == []
    if places:
        with pytest.raises(schemas.SchemaError) as caught:
            compiled(model, schema)
        at = str(caught.value).partition(": ")[0]
        assert any(place == at or place.startswith(at) or at.startswith(place) for place in form.loosened)


@pytest.mark.parametrize("schema", [
    False, {"type": "float"}, {"required": "a"}, {"properties": {"a": 1}}, {"not": 1}, {"if": {"type": 1}, "then": {}},
    {"dependencies": {"a": 1}}, {"$ref": "#"}, {"enum": []}, {"type": "integer", "minimum": 2, "maximum": 1},
    {"type": "object", "required": ["a"], "properties": {"a": False}}, {"propertyNames": {"pattern": 3}}], ids=str)
def test_what_is_wrong_is_refused_whether_strict_or_not(model, schema):
    """Nobody could say what was meant."""
    for is_strict in (True, False):
        with pytest.raises(schemas.SchemaError, match="^schema"):
            compiled(model, schema, is_strict)


def test_arguments_are_objects_whatever_their_schema_says(model):
    """Strictly, that is a refusal."""
    for schema, places in (({"type": "array", "items": TEXT}, ["type"]), ({"enum": ["a"]}, ["enum"]),
                           ({"allOf": [TEXT]}, ["allOf"]), ({"type": ["object", "null"]}, []), (
                               {"properties": {"b": {}}, "required": ["a", "b"]}, [])):
        form = structured.Form()
        form.root = form.add_part(structured.arguments_of(schema, "schema", False))
        new_reply = form.replies(model, must_trigger=True)
        assert form.loosened == [f"schema.{place}" for place in places]
        assert takes(model, new_reply, {"b": 1, "a": 2} if "required" in schema else {"a": 1})
        assert not takes(model, new_reply, ["a"]) and not takes(model, new_reply, "a")
        if places:
            with pytest.raises(schemas.SchemaError, match="^schema"):
                form.root = form.add_part(structured.arguments_of(schema, "schema", True))
                form.replies(model, must_trigger=True)


def test_many_places_are_left_out_in_time(model):
    """Each refusal of llguidance's is looked for, and there is an end to that."""
    began = time.monotonic()
    form = structured.Form()
    form.root = form.add_schema({"type": "object", "properties": {
        f"p{i}": {"type": "array", "uniqueItems": True, "items": {"not": INTEGER}} for i in range(300)}},
        "schema", is_strict=False)
    form.replies(model, must_trigger=True)
    assert len(form.loosened) == 600 and time.monotonic() - began < 5
