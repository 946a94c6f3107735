"""Structured output, without HTTP up to part 6: what may be written, what is refused, and that what
is written validates.

    1  tables       of each keyword: texts that may be written, texts that may not
    2  right values are never turned into others
    3  refusals     name the place
    4  limits       a hostile schema or grammar is refused, or compiled, at once
    5  random       schemas, and random walks through what they allow
    6  GBNF         as llama.cpp reads it
    7  the model    what SmolLM2 writes at temperature 1 validates, 100 of 100 (POST)
"""

import codecs
import concurrent.futures
import contextlib
import datetime
import functools
import gc
import json
import os
import random
import re
import resource
import signal
import sys
import time
import types
import weakref
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import conftest  # noqa: E402
import engine  # noqa: E402
import small_templates  # noqa: E402
from features import calls, grammars, replies, schemas, structured  # noqa: E402
from features.trial import Trial  # noqa: E402

FORMATS = Draft202012Validator.FORMAT_CHECKER
PROPERTY = settings(database=None, deadline=None, print_blob=True,
                    suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def model():
    model = engine.Model(conftest.default_model())
    yield model
    model.close()


def compiled(model, schema, is_strict: bool = True):
    """What makes a Reply that is held to a schema."""
    form = structured.Form()
    form.root = form.add_schema(schema, "schema", is_strict)
    return form.replies(model, must_trigger=True)


def takes(model, new_reply, text: str) -> bool:
    """Whether a reply may be this text, and end there."""
    reply, end = new_reply(), min(model.end_tokens)
    tokens = model.tokenize(text, bos=False, special=False).tolist()
    return all(reply.take(token) for token in tokens) and reply.take(end)


def problem(schema, text: str) -> str | None:
    """Why a text is not JSON of this schema, or None."""
    try:
        value = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    except ValueError as error:
        return f"no JSON: {error}"
    errors = [*Draft202012Validator(schema, format_checker=FORMATS).iter_errors(value)]
    return errors[0].message if errors else None


def obj(**properties) -> dict:
    """A closed object schema whose properties are all required."""
    return {"type": "object", "properties": properties, "required": list(properties),
            "additionalProperties": False}


# ==== 1. Tables ===========================================================================

NULL, BOOLEAN, INTEGER = ({"type": name} for name in ("null", "boolean", "integer"))
TREE = {"$defs": {"n": {"type": "object", "required": ["v"], "properties": {
    "v": INTEGER, "kids": {"type": "array", "items": {"$ref": "#/$defs/n"}}}}},
    "$ref": "#/$defs/n"}
ABC = {"type": "object", "properties": {"a": NULL, "b": NULL, "c": NULL}}
TABLE = [  # schema, what may be written, what may not
    (True, ["1", "{}", '"x"', '{"a": [1, {"b": null}]}'], ["", "{", "01", "1.", "nul", '"\n"']),
    ({}, ["null", "[]"], ["[1,]"]),
    ({"description": "d", "title": "t", "default": 1, "$comment": "c"}, ["true"], ["True"]),
    (NULL, ["null"], ["0", '"null"']),
    (BOOLEAN, ["true", "false"], ["1", "null"]),
    ({"type": ["boolean", "null"]}, ["true", "null"], ["0", '""']),
    ({"type": ["string", "null"], "maxLength": 2}, ["null", '"ab"'], ['"abc"', "1"]),
    (INTEGER, ["0", "-7", "123456789012345678901"], ["00", "1.5", "+1", "1e3"]),
    ({"type": "integer", "minimum": -7, "maximum": 123}, ["-7", "-1", "0", "99", "100", "123"],
     ["-8", "-10", "124", "130", "200", "1000", "05", "1.0"]),
    ({"type": "integer", "minimum": 1, "maximum": 10}, ["1", "9", "10"], ["0", "11", "-1"]),
    ({"type": "integer", "exclusiveMinimum": -7, "exclusiveMaximum": -5}, ["-6"], ["-7", "-5", "6"]),
    ({"type": "integer", "exclusiveMaximum": 0}, ["-1", "-999"], ["0", "1"]),
    ({"type": "integer", "minimum": 0.5, "maximum": 2.5}, ["1", "2"], ["0", "3", "1.5"]),
    ({"type": "integer", "minimum": 5}, ["5", "10", "99999"], ["4", "-5"]),
    ({"type": "integer", "multipleOf": 1, "maximum": 2}, ["2", "-9"], ["3", "1.5"]),
    ({"type": "number"}, ["0", "-0.5", "12.25", "1e5", "-1.5E-07"], [".5", "1.", "NaN"]),
    ({"type": "number", "minimum": 0, "maximum": 1}, ["0", "1", "0.5", "0.0625"],
     ["1.5", "-0.5", "2", "1.000001"]),
    ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 2}, ["1", "0.5", "1.99"],
     ["0", "2", "0.0", "2.5", "-0.1"]),
    ({"type": "number", "minimum": -3.5}, ["-3", "-2.5", "0.5", "7"], ["-4", "-3.75"]),
    ({"type": "number", "maximum": -2}, ["-2", "-2.5", "-30"], ["-1", "-1.5", "0"]),
    ({"minimum": 3}, ["3", "3.5"], ["2"]),
    ({"type": "string"}, ['""', '"é漢👩"', r'"a\"b\\\n\u00e9\ud83d\ude00"'], ['"', '"\t"', r'"\x"', r'"\ud83d"']),
    ({"type": "string", "maxLength": 3}, ['""', '"abc"', r'"\"\\é"'], ['"abcd"']),
    ({"type": "string", "minLength": 2, "maxLength": 2}, ['"👩漢"'], ['"a"', '"abc"']),
    ({"type": "string", "minLength": 130, "maxLength": 131},
     [f'"{"x" * n}"' for n in (130, 131)], [f'"{"x" * n}"' for n in (129, 132)]),
    ({"type": "string", "minLength": 65}, [f'"{"x" * n}"' for n in (65, 200)], [f'"{"x" * 64}"']),
    ({"type": "string", "maxLength": 0}, ['""'], ['"a"']),
    ({"type": "string", "pattern": "^a\\d+[^\\d\"]$"}, ['"a12x"', '"a0é"'], ['"ax"', '"a1"', '"ba1x"']),
    ({"type": "string", "pattern": "b"}, ['"b"', '"abc"'], ['"ac"', '""']),
    ({"type": "string", "pattern": "^b"}, ['"b"', '"bc"'], ['"ab"']),
    ({"type": "string", "pattern": "b$"}, ['"b"', '"ab"'], ['"bc"']),
    ({"type": "string", "pattern": "^x?$|^y{2,3}?z$"}, ['""', '"x"', '"yyz"', '"yyyz"'], ['"yz"', '"xx"']),
    ({"type": "string", "pattern": "^(a|b)(?:c|)$"}, ['"a"', '"bc"'], ['"c"', '"ab"']),
    ({"type": "string", "pattern": "(^a|b$)"}, ['"ax"', '"xb"'], ['"xa"', '"bx"']),
    ({"type": "string", "pattern": "^\\\\\"\\n\\t\\/$"}, [r'"\\\"\n\t/"'], [r'"\\\"\n\t"']),
    ({"type": "string", "pattern": "^[^a-z]\\w[\\w.-]$"}, ['"A_-"', '"éa."'], ['"aaa"', '"Aé."']),
    ({"type": "string", "pattern": "^(a*)*$"}, ['""', '"aaa"'], ['"b"']),
    ({"type": "string", "pattern": "^a{70,71}$"}, [f'"{"a" * 70}"', f'"{"a" * 71}"'],
     [f'"{"a" * 69}"', f'"{"a" * 72}"']),
    ({"pattern": "^a$"}, ['"a"', "1", "{}"], ['"b"']),
    ({"type": "string", "format": "date"}, ['"2024-02-28"', '"1999-12-30"'],
     ['"2024-02-30"', '"2024-13-01"', '"24-01-01"', '"2024-1-1"']),
    ({"type": "string", "format": "time"}, ['"23:59:59Z"', '"00:00:00.5+01:00"'], ['"24:00:00Z"', '"1:0"']),
    ({"type": "string", "format": "date-time"}, ['"2024-01-30T00:00:00Z"'], ['"2024-01-30 00:00:00Z"', '"2024-01-30"']),
    ({"type": "string", "format": "uuid"}, ['"01234567-89ab-cdef-0123-456789abcdef"'], ['"0123"']),
    ({"type": "string", "format": "ipv4"}, ['"127.0.0.1"', '"255.250.199.0"'], ['"256.0.0.1"', '"1.2.3"']),
    ({"type": "string", "format": "email"}, ['"a.b@c-d.org"', '"a@b"'], ['"a@"', '"@b.org"']),
    ({"type": "string", "format": "hostname"}, ['"a.b-c.d"'], ['"-a"', '"a..b"']),
    ({"type": "string", "format": "uri"}, ['"https://a.org:80/x/y.z"', '"ftp://a"'], ['"a.org"', '"https://a b"']),
    ({"type": "string", "format": "unheard-of"}, ['"anything"'], ["1"]),
    ({"enum": ["a", "ab\"", "\\", "é\n", 1, 2.5, None, True, {"x": [1]}]},
     ['"a"', r'"ab\""', r'"\\"', r'"é\n"', "1", "2.5", "null", "true", '{"x": [1]}'],
     ['"b"', '"ab"', "false", "2", "12.5"]),
    ({"type": ["string", "null"], "enum": ["a", 1, None]}, ['"a"', "null"], ["1"]),
    ({"type": "number", "enum": [1, 2.5]}, ["1", "2.5"], ["2"]),
    ({"const": {"a": 'q"\\'}}, [r'{"a": "q\"\\"}'], ['{}']),
    ({"const": ""}, ['""'], ['"a"']),
    ({"type": "object"}, ["{}", '{"a": 1, "b": {"c": []}}', '{\n  "a":1}'], ["[]", "{,}", '{"a"}']),
    (obj(), ["{}"], ['{"a": 1}']),
    (obj(a=NULL, b=BOOLEAN), ['{"a": null, "b": true}', '{"a":null,"b":false}'],
     ["{}", '{"a": null}', '{"b": true, "a": null}', '{"a": null, "b": true, "c": 1}']),
    (ABC, ["{}", '{"a": null}', '{"b": null}', '{"a": null, "c": null}', '{"c": null}',
           '{"a": null, "b": null, "c": null}'],
     ['{"c": null, "a": null}', '{, "a": null}', '{"a": null,}', '{"d": 1, "a": null}']),
    ({**ABC, "required": ["b"]}, ['{"b": null}', '{"a": null, "b": null}', '{"b": null, "c": null}'],
     ["{}", '{"a": null}', '{"a": null, "c": null}']),
    ({**ABC, "additionalProperties": BOOLEAN},
     ["{}", '{"d": true}', '{"a": null, "dd": true, "": false}', '{"aa": true}'],
     ['{"a": true}', '{"d": null}', '{"b": null, "c": true}']),
    ({"type": "object", "required": ["z"], "additionalProperties": NULL},
     ['{"z": null}', '{"z": null, "y": null}'], ["{}", '{"y": null}', '{"z": 1}']),
    ({"type": "object", "properties": {'n"\\é\n': NULL}}, [r'{"n\"\\é\n": null}'], [r'{"n\"\\é\n": 1}']),
    ({"type": "object", "properties": {"a": False, "b": True}}, ["{}", '{"b": [1]}'], ['{"a": 1}']),
    ({**obj(a=NULL), "minProperties": 1, "maxProperties": 1}, ['{"a": null}'], ["{}"]),
    ({"type": "array"}, ["[]", '[1, "a", []]', "[\n1,\n2]"], ["[,]", "[1 2]", "{}"]),
    ({"type": "array", "items": NULL, "minItems": 2, "maxItems": 3}, ["[null, null]", "[null,null, null]"],
     ["[]", "[null]", "[null, null, null, null]"]),
    ({"type": "array", "items": INTEGER, "minItems": 1}, ["[1]", "[1, 2, 3, 4]"], ["[]"]),
    ({"type": "array", "items": INTEGER, "maxItems": 1}, ["[]", "[1]"], ["[1, 2]"]),
    ({"type": "array", "items": False}, ["[]"], ["[1]"]),
    ({"type": "array", "maxItems": 0}, ["[]"], ["[1]"]),
    ({"type": "array", "items": {"const": 1}, "minItems": 70, "maxItems": 71},
     [json.dumps([1] * n) for n in (70, 71)], [json.dumps([1] * n) for n in (69, 72)]),
    ({"type": "array", "prefixItems": [NULL, BOOLEAN]}, ["[null, true]", "[]", "[null, true, 1]"], ["[true, null]"]),
    ({"type": "array", "prefixItems": [NULL], "items": BOOLEAN, "minItems": 2, "maxItems": 3},
     ["[null, true]", "[null, true, false]"], ["[null]", "[null, null]", "[null, true, true, true]"]),
    ({"type": "array", "items": NULL, "uniqueItems": False}, ["[null, null]"], ["[1]"]),
    ({"anyOf": [NULL, obj(a=INTEGER), {"type": "string", "maxLength": 1}]}, ["null", '{"a": 1}', '"x"'],
     ["1", '"xx"']),
    ({"anyOf": [obj(k={"const": "a"}, x=INTEGER), obj(k={"const": "b"})]},
     ['{"k": "a", "x": 1}', '{"k": "b"}'], ['{"k": "a"}', '{"k": "b", "x": 1}']),
    ({"oneOf": [NULL, BOOLEAN, {"const": "x"}]}, ["null", "true", '"x"'], ['"y"']),
    ({"oneOf": [obj(a={}), obj(b={})]}, ['{"a": 1}', '{"b": 1}'], ['{"a": 1, "b": 1}', "{}"]),
    ({"discriminator": {"propertyName": "k"}, "oneOf": [obj(k={"const": "a"}), obj(k={"const": "b"})]},
     ['{"k": "a"}', '{"k": "b"}'], ['{"k": "c"}']),
    ({**ABC, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
     ['{"a": null}', '{"b": null, "c": null}'], ["{}", '{"c": null}']),
    ({"type": "object", "allOf": [
        {"properties": {"a": INTEGER}, "required": ["a"]},
        {"properties": {"b": {"type": "integer", "minimum": 4}}, "required": ["b"]}]},
     ['{"a": 1, "b": 4}'], ['{"a": 1}', '{"a": 1, "b": 3}']),
    ({"allOf": [{"enum": ["r", "g"]}], "default": "r", "title": "C"}, ['"r"'], ['"b"']),
    (TREE, ['{"v": 1}', '{"v": 1, "kids": [{"v": 2, "kids": []}, {"v": 3}]}'], ["{}", '{"v": 1, "kids": [1]}']),
    ({"definitions": {"a/b c": NULL}, "$ref": "#/definitions/a~1b%20c"}, ["null"], ["1"]),
    ({"type": "object", "properties": {"next": {"$ref": "#"}}}, ["{}", '{"next": {"next": {}}}'],
     ['{"next": 1}']),
    ({"$defs": {"c": {"type": "integer"}}, "$ref": "#/$defs/c", "minimum": 3, "title": "t"}, ["3"], ["2"]),
]


@pytest.mark.parametrize("schema, written, refused", TABLE, ids=lambda value: json.dumps(value)[:60])
def test_what_may_be_written(model, schema, written, refused):
    new_reply = compiled(model, schema)
    assert [text for text in written if not takes(model, new_reply, text)] == []
    assert [text for text in refused if takes(model, new_reply, text)] == []
    assert [text for text in written if problem(schema, text)] == [], "the table is wrong"


# Each of these keywords binds; where the engine cannot honour it beside the other it must refuse.
MUST_NOT = [  # schema, texts that do not validate
    ({"type": ["integer", "null"], "minimum": 0}, ["0.5", "1.25"]),
    ({"type": ["integer"], "maximum": 9}, ["0.5"]),
    ({"type": "integer", "enum": [1, 2.5]}, ["2.5"]),
    ({"type": ["integer", "number"], "enum": [1, "abc"]}, ['"abc"']),
    ({"enum": ["a", "bbb"], "maxLength": 1}, ['"bbb"']),
    ({"enum": ["a", "b"], "pattern": "a"}, ['"b"']),
    ({"type": "integer", "enum": [1, 20], "minimum": 10}, ["1"]),
    ({"allOf": [{"enum": [1, 20]}, {"maximum": 10}]}, ["20"]),
    ({"oneOf": [INTEGER, {"type": "number"}]}, ["5"]),
    ({"oneOf": [INTEGER, {"const": 1.0}]}, ["1"]),
    ({"type": "object", "required": ["a"], "additionalProperties": False}, ['{"a": 1}', "{}"]),
    ({"type": "object", "properties": {"b": NULL}, "required": ["a"], "additionalProperties": False},
     ['{"a": 1}', '{"b": null, "a": 1}', "{}"]),
    ({"type": "object", "additionalProperties": {}, "maxProperties": 0}, ['{"a": 1}']),
    ({**ABC, "required": ["a"], "additionalProperties": {}, "maxProperties": 3},
     ['{"a": null, "b": null, "c": null, "d": 1}']),
    ({"allOf": [{"required": ["a"]}, {"required": ["a", "b"]}], **ABC, "minProperties": 3},
     ['{"a": null, "b": null}']),
    ({"type": "array", "prefixItems": [NULL, NULL], "items": False, "maxItems": 1}, ["[null, null]"]),
    ({"type": "array", "prefixItems": [NULL, NULL], "maxItems": 1}, ["[null, null]"]),
    ({"allOf": [{"type": "object", "properties": {"a": NULL}, "additionalProperties": False},
                {"properties": {"b": NULL}}]}, ['{"a": null, "b": null}', '{"b": null}']),
    ({"type": "object", "properties": {"a": NULL}, "additionalProperties": False,
      "anyOf": [{"properties": {"b": NULL}}]}, ['{"b": null}', '{"a": null, "b": null}']),
    ({"$defs": {"p": {"type": "object", "properties": {"a": NULL}, "additionalProperties": False}},
      "$ref": "#/$defs/p", "properties": {"b": NULL}}, ['{"b": null}']),
    ({"allOf": [{"type": "array", "items": INTEGER}, {"prefixItems": [{"type": "string"}]}]}, ['["a"]']),
    ({"allOf": [{"const": 1}, {"const": True}]}, ["1", "true"]),
    ({"type": "string", "pattern": "^\\x01$"}, ['""']),
    ({"type": "string", "pattern": "^a[\\x00-\\x07\\x7f]b$"}, ['"ab"']),
    ({"type": "string", "pattern": "^\\S$"}, ['"\xa0"', '"\u2003"']),
    ({"type": "object", "properties": {'a"': NULL}, "additionalProperties": NULL},
     [r'{"a\": null}', r'{"a\z": null}', r'{"a\x": null}']),
    ({"type": "object", "properties": {"\\": NULL, "\n": NULL}, "additionalProperties": BOOLEAN},
     [r'{"\": true}', r'{"\z": true}', r'{"\n": true}', r'{"\\": true}']),
]


@pytest.mark.parametrize("schema, texts", MUST_NOT, ids=lambda value: json.dumps(value)[:70])
def test_no_keyword_is_dropped_in_silence(model, schema, texts):
    """A schema is honoured whole or refused: 400 is a fine answer, a text that breaks it is not."""
    assert all(problem(schema, text) for text in texts), "the table is wrong"
    try:
        new_reply = compiled(model, schema)
    except schemas.SchemaError as error:
        assert str(error).startswith("schema")
        return
    assert [text for text in texts if takes(model, new_reply, text)] == []


def test_two_schemas_keep_their_own_definitions(model):
    form = structured.Form()
    one, two = (form.add_schema({"$defs": {"x": {"const": n}}, "$ref": "#/$defs/x"}, f"s{n}")
                for n in (1, 2))
    form.root = f'{one} "," {two}'
    new_reply = form.replies(model, must_trigger=True)
    assert takes(model, new_reply, "1,2") and not takes(model, new_reply, "2,1")


# ==== 2. Right values are never turned into others ========================================
#
# Each of these was once written as something else, in silence: 2024-12-31 became 2024-12-30.


def text(**rules) -> dict:
    return {"type": "string", **rules}


def number(**rules) -> dict:
    return {"type": "number", **rules}


def strings(*values) -> list[str]:
    return [json.dumps(value, ensure_ascii=False) for value in values]


def day(number: int, year: int = 2024) -> str:
    return str(datetime.date(year, 1, 1) + datetime.timedelta(days=number))


RIGHT = {  # schema, what must be writable
    "each day of a leap year": (text(format="date"), strings(*map(day, range(366)))),
    "each day of 1900, which was none": (text(format="date"), strings(*(day(n, 1900) for n in range(365)))),
    "other leap days": (text(format="date"), strings("2000-02-29", "1996-02-29", "2400-02-29")),
    "times": (text(format="time"), strings(
        "00:00:00Z", "23:59:59z", "12:30:00.5Z", "12:30:00.123456789+05:30", "01:02:03-11:59", "23:59:60Z")),
    "instants": (text(format="date-time"), strings(
        "2024-12-31T23:59:59Z", "2024-02-29t00:00:00.000001+01:00", "1985-04-12T23:20:50.52Z")),
    "durations": (text(format="duration"), strings("P1Y2M3DT4H5M6S", "PT36H", "P4W", "P1D")),
    "addresses of mail": (text(format="email"), strings(
        "first_last@example.org", "a+b.c-d@x-y.example.co.uk", "o'neil!#$%@a.io", "1@2.museum", "x@localhost")),
    "addresses of mail within a length": (text(format="email", minLength=6, maxLength=20), strings("a_b@example.org")),
    "URIs": (text(format="uri"), strings(
        "https://a.org/search?q=a%20b&x=1", "http://h:65535/p;v=1/~u/?a=b&c#frag-1", "https://user:pw@a.org",
        "ftp://a.org/x.tar.gz", "mailto:a_b@c.org", "urn:isbn:0451450523", "http://[2001:db8::1]:8080/", "file:///etc/x",
        "https://a-b--c.example.org/x_y/%E6%BC%A2?#")),
    "hostnames": (text(format="hostname"), strings("a-b-c-d.example.org", "xn--bcher-kva.example", "a.b.c.d.e.f", "x1")),
    "addresses": (text(format="ipv4"), strings("0.0.0.0", "255.255.255.255", "10.1.20.199")),
    "newer addresses": (text(format="ipv6"), strings(
        "::", "::1", "2001:db8::8a2e:370:7334", "1:2:3:4:5:6:7:8", "fe80::", "::ffff:192.0.2.1", "1:2:3:4:5:6:7::",
        "64:ff9b::10.0.0.1", "1::8", "1:2::7:8", "A:b:C:d:E:f:1.2.3.4")),
    "UUIDs": (text(format="uuid"), strings("01234567-89AB-cdef-0123-456789abcdef")),
    "formats that nobody knows": (text(format="phone"), strings("+49 (0) 30/123-456")),
    "a pattern beside a length": (text(pattern="^[a-z]+$", minLength=2, maxLength=3), strings("ab", "abc")),
    "a pattern beside a format": (text(pattern="^20", format="date"), strings("2024-02-29")),
    "escapes": (text(pattern=r"^\&\<b\>\-\/\_$"), strings("&<b>-/_")),
    "classes without some letters": (text(pattern=r"^[^a\\][^\"]$"), ['"b\\\\"', '"\\"\\n"', '"\\ta"', '"漢 "']),
    "classes": (text(pattern=r"^[\w.+&~[-]+$"), strings("a_b.c+d&e~f[g-h")),
    "prices": (number(minimum=0), ["20.00", "0", "0.00", "0.99", "1234567.89", "0.000001", "100"]),
    "prices above a cent": (number(minimum=0.01), ["0.01", "0.010", "0.99", "1.99", "19.90", "1"]),
    "above zero": (number(exclusiveMinimum=0), ["0.10", "0.1", "0.000000001", "5", "5.0", "10.50"]),
    "probabilities": (number(minimum=0, maximum=1), ["0", "0.0", "1", "1.0", "1.00", "0.5", "0.50", "0.999", "0.001"]),
    "up to a decimal": (number(minimum=0.1, maximum=2.53), [
        "0.1", "0.10", "2.53", "2.5", "2.50", "2.529999", "2", "2.0", "1.75"]),
    "below a decimal": (number(exclusiveMaximum=2.53), ["2.5", "2.52", "2.529", "-1", "-1.50", "0", "0.0", "-12.75"]),
    "below zero": (number(maximum=0), ["0", "-0.10", "-0.1", "-1", "-1.0", "-12.50"]),
    "latitudes": (number(minimum=-90, maximum=90), ["-90", "90", "-89.9999999", "0.10", "-0.10", "52.520008", "90.0"]),
    "between neighbours": (number(minimum=-0.25, maximum=-0.125), ["-0.25", "-0.2", "-0.20", "-0.125", "-0.13"]),
    "any number": (number(), ["-0.0", "1e-07", "6.02214076E+23", "1.50", "12345678901234567890.5", "-1e5"]),
    "any integer": ({"type": "integer"}, ["0", "-7", "12345678901234567890123"]),
    "64 bits": ({"type": "integer", "minimum": -2**63, "maximum": 2**63 - 1}, [str(-2**63), str(2**63 - 1), "0", "-1"]),
    "64 bits without a sign": ({"type": "integer", "minimum": 0, "maximum": 2**64 - 1}, [str(2**64 - 1), "0"]),
    "floats of 64 bits": (number(maximum=1.7976931348623157e308), ["1.5e300", "5", "-2.5"]),
    "ports": ({"type": "integer", "minimum": 1, "maximum": 65535}, ["1", "9", "80", "443", "8080", "65535", "59999"]),
    "some integers": ({"type": "integer", "minimum": -12, "exclusiveMaximum": 105}, [*map(str, range(-12, 105))]),
    "bounds as draft 4 has them": ({"minimum": 3, "exclusiveMinimum": True, "type": "integer"}, ["4", "10"]),
    "multiples": (number(multipleOf=0.01), ["19.99", "20", "20.0", "-0.01"]),
    "letters": (text(maxLength=4), strings("é漢👩", "a\"b\\") + [r'"\u00e9\ud83d\ude00"', r'"\n\t\b\f"']),
    "lengths in characters": (text(minLength=3, maxLength=3), strings("👩漢é") + [r'"\ud83d\udc69\u6f22\u00e9"']),
    "one of some values": ({"enum": ["é\n", 1.0, 2.5, -3, None, {"b": 1, "a": [True]}]},
                           [json.dumps("é\n", ensure_ascii=False), "1", "2.5", "-3", "null", '{"b": 1, "a": [true]}']),
    "exact integers": ({"enum": [2**53, -2**53, 2**60]}, [str(2**53), str(-2**53), str(2**60)]),
    "annotations": ({"id": "x", "self": {}, "x-order": 1, "example": 3, "nullable": True, "type": "null",
                     "x-guidance": {"whitespace_flexible": False}}, ["null"]),
    "names that are not declared": ({"type": "object", "properties": {"a": NULL}, "required": ["b", "a"]},
                                    ['{"a": null, "b": 1}', '{"a": null, "b": {"c": []}, "d": 2}']),
    "a count as a float": ({"type": "array", "maxItems": 2.0}, ["[1, 2]", "[]"]),
    "white space": ({"type": "object"}, ['{\n  "a": [\n    1,\n    2\n  ]\n}', '{"a":1,"b":[]}', '{ "a" : 1 }',
                                         '{\r\n\t"a": 1\r\n}']),
    "references through lists": ({"anyOf": [NULL, {"type": "array", "items": {"$ref": "#/anyOf/0"}}]}, ["[null]"]),
    "references by anchor": ({"$defs": {"a": {"$anchor": "here", "type": "null"}}, "$ref": "#here"}, ["null"]),
    "references by URI": ({"$id": "http://x.org/s.json", "$ref": "s.json#/$defs/a", "$defs": {"a": NULL}}, ["null"]),
    "references into a document inside": (
        {"$id": "http://x.org/s", "$defs": {"t": {"$id": "t", "$ref": "#/$defs/n", "$defs": {"n": NULL}}, "n": BOOLEAN},
         "items": {"$ref": "t"}}, ["[null]"]),
    "what stands beside a reference in draft 7": (
        {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"a": NULL},
         "items": {"$ref": "#/definitions/a", "type": "string"}}, ["[null]"]),
    "tagged alternatives": (
        {"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "$defs": {
            "a": obj(kind={"const": "a"}, x=INTEGER), "b": obj(kind={"const": "b"}, y=INTEGER)}},
        ['{"kind": "a", "x": 1}', '{"kind": "b", "y": 2}']),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_value_can_be_written(model, name):
    schema, values = RIGHT[name]
    new_reply = compiled(model, schema)
    assert [value for value in values if not takes(model, new_reply, value)] == []


WRONG = {  # schema, what must not be writable
    "days that are none": (text(format="date"), strings(
        "2023-02-29", "1900-02-29", "2024-02-30", "2024-04-31", "2024-13-01", "2024-00-10", "24-01-01")),
    "times that are none": (text(format="time"), strings("24:00:00Z", "12:60:00Z", "12:00:60Z", "12:00:00", "1:00:00Z")),
    "newer addresses": (text(format="ipv6"), strings("1:2:3", ":::", "1::2::3", "12345::", "::256.0.0.1", "1:2:3:4:5:6:7:8:9")),
    "beside the bounds": (number(minimum=0.1, maximum=2.53), ["0.09", "0.0999", "2.531", "2.54", "3", "-1", "0"]),
    "above zero": (number(exclusiveMinimum=0, maximum=0.3), ["0", "0.0", "-0.1", "0.31", "1"]),
    "below zero": (number(exclusiveMaximum=0), ["0", "0.0", "0.1", "1"]),
    "ports": ({"type": "integer", "minimum": 1, "maximum": 65535}, ["0", "65536", "99999", "-1", "1.5", "080"]),
    "other values": ({"enum": [2**53, 1.5, "a"]}, [str(2**53 + 1), "1.50001", "1", '"b"']),
    "draft 4": ({"minimum": 3, "exclusiveMinimum": True, "type": "integer"}, ["3", "2"]),
    "a class without a quote": (text(pattern="^[^\"]+$"), strings('"', 'a"b')),
    "classes without a backslash": (text(pattern=r"^([^\\]|[^\\\n]|[\s\S&&[^\\]])+$"), strings("\\", "a\\")),
    "names without a backslash": ({"type": "object", "patternProperties": {r"^[^\\]+$": {}}, "additionalProperties": False},
                                  [r'{"a\\": 1}', r'{"\\": 1}']),
    "blanks without end": ({"type": "object"}, ["{" + " " * 9 + "}", "{" + "\n" * 2 + "}"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_cannot_be_written(model, name):
    schema, values = WRONG[name]
    new_reply = compiled(model, schema)
    assert [value for value in values if takes(model, new_reply, value)] == []


@settings(PROPERTY, max_examples=150)
@given(bounds=st.dictionaries(st.sampled_from(schemas.BOUNDS), st.sampled_from(
    [0, 1, -1, 5, 100, -180, 0.1, 0.3, 0.01, -0.5, 2.5, 2.534, 99.99, -12.75, 1000000, 1e-7]), max_size=2),
    near=st.sampled_from([0, 0.1, -0.1, 0.01, -0.01, 1, -1, 0.001, -0.001]))
def test_decimals_at_and_beside_bounds(model, bounds, near):
    """Each number within them can be written, each other one cannot. Zeros behind a bound's last
    decimal may be refused: the number is the same without."""
    try:
        new_reply = compiled(model, number(**bounds))
    except schemas.SchemaError:
        return
    for bound in [0, *bounds.values()]:
        value = Decimal(repr(bound)) + Decimal(repr(near))
        written = f"{value.normalize():f}"
        assert takes(model, new_reply, written) == (problem(number(**bounds), written) is None), written
        assert not takes(model, new_reply, written + "0" * ("." in written) or "x") \
            or problem(number(**bounds), written) is None


def accepting(value):
    """Random schemas that accept a value: of its type, with bounds around it, or anything."""
    exact = st.one_of(st.just({"const": value}), st.just({"enum": ["?", value, 0.125]}), st.just({}), st.just(True))
    if isinstance(value, bool) or value is None:
        own = st.just({"type": "null" if value is None else "boolean"})
    elif isinstance(value, (int, float)):
        whole, room = value == int(value), st.sampled_from([0, 1, 17.5, 1000])
        own = st.builds(
            lambda kind, below, above: {"type": kind, **({"minimum": value - below} if below != 1 else {}),
                                        **({"maximum": value + above} if above != 1 else {})},
            st.sampled_from(["number", ["number", "null"], *["integer"] * (whole and isinstance(value, int))]),
            room, room) if abs(value) >= 1e-4 or value == 0 else st.just({"type": "number"})
    elif isinstance(value, str):
        n, pattern = len(value), re.escape(value[:1]).replace("\\\n", "\n")
        own = st.sampled_from([{"type": "string"}, {"type": ["null", "string"], "maxLength": n + 1},
                               {"type": "string", "minLength": n, "maxLength": n},
                               {"type": "string", "pattern": f"^{pattern}"}])
    elif isinstance(value, list):
        own = st.tuples(*map(accepting, value), st.integers(0, len(value))).map(lambda drawn: {
            "type": "array", "prefixItems": list(drawn[:-1][:drawn[-1]]),
            "items": {"anyOf": list(drawn[:-1][drawn[-1]:])} if drawn[-1] < len(value) else False,
            "minItems": len(value), "maxItems": len(value) + 2})
    else:
        own = st.tuples(st.tuples(*map(accepting, value.values())), st.booleans(), st.booleans()).map(
            lambda drawn: {"type": "object", "properties": dict(zip(value, drawn[0])) | {"\0more": NULL},
                           "required": list(value)[:1] if drawn[1] else [], "additionalProperties": drawn[2]})
    return st.one_of(own, own, own, own.map(lambda part: {"anyOf": [part, {"const": "other"}]}),
                     own.map(lambda part: {"allOf": [part, True]}), exact)


DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers(-10**15, 10**15) | st.floats(-1e9, 1e9).map(lambda x: round(x, 6) + 0.0)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x7f"), max_size=6)
    | st.sampled_from(["2024-12-31", "a_b@c.org", "\"\\/\b\f\n\r\t", "漢é👩"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab\"\\é_ -", max_size=4), inner, max_size=3),
    max_leaves=8)


@settings(PROPERTY, max_examples=250)
@given(st.data())
def test_what_a_schema_accepts_and_json_writes_can_be_written(model, data):
    """Members in the schema's order; indented or not. Numbers are written as the schema's reader has
    them: 2 or 2.0, 0.000001 or 1e-6 or 1e-06, which are the same values."""
    value = data.draw(DOCUMENTS)
    schema = data.draw(accepting(value))
    if data.draw(st.booleans()):
        schema = {"$defs": {"a b/c": schema}, "$ref": "#/$defs/a%20b~1c"}
    if problem(schema, json.dumps(value)):
        return  # a pattern of its first character may be about something else
    new_reply = compiled(model, schema)
    for style in ({}, {"indent": 2}, {"separators": (",", ":")}):
        written = json.dumps(value, ensure_ascii=False, **style)
        if b"".join(map(model.piece, model.tokenize(written, bos=False).tolist())) != written.encode():
            return  # this vocabulary has no tokens for it
        whole = re.sub(r"(?<=\d)\.0\b(?!\d)", "", written)
        short = re.sub(r"(?<=\de)\+?(-?)0*(?=\d)", r"\1", whole)
        plain = re.sub(r"-?\d+(\.\d+)?e-\d+", lambda number: f"{Decimal(number[0]):f}", whole)
        assert any(takes(model, new_reply, each) for each in (written, whole, short, plain)), (schema, written)


def test_a_long_text_under_a_hard_pattern_is_never_refused_in_silence(model):
    """llguidance counts what a token may cost from one mask to the next: many tokens that were
    taken without one used it up, and then a right word was refused."""
    schema = {"items": text(pattern=r"^(?:\S+\s+){0,29}\S+$", maxLength=300), "type": "array"}
    words = "This is a sample of a text with many words that goes on for a while, and then some more."
    assert takes(model, compiled(model, schema), json.dumps([words] * 4))


# ==== 3. Refusals =========================================================================

TEXT = {"type": "string"}
REFUSED = [  # schema, the place, words
    (False, "schema", "false"), ([], "schema", "object"), (None, "schema", "object"),
    (3, "schema", "object"), ("x", "schema", "object"),
    *[({key: value}, f"schema.{key}", "cannot be held") for key, value in {
        "not": {"type": "integer"}, "contains": {}, "uniqueItems": True,
        "propertyNames": {"pattern": "a", "maxLength": 1}, "unevaluatedProperties": False, "unevaluatedItems": False, "$dynamicRef": "#a",
        "$recursiveRef": "#"}.items()],
    ({"if": INTEGER, "then": False}, "schema.if", "cannot be held"),
    ({"type": "integer", "multipleOf": 10_001}, "schema.multipleOf", "digits"),
    ({"type": "integer", "multipleOf": True}, "schema.multipleOf", "number"),
    (obj(a=obj(b={"type": "array", "items": {"not": INTEGER}})),
     "schema.properties.a.properties.b.items.not", ""),
    ({"anyOf": [NULL, {"contains": 1}]}, "schema.anyOf[1].contains", ""),
    ({"type": "array", "prefixItems": [NULL, {"not": 1}]}, "schema.prefixItems[1].not", ""),
    ({"type": "array", "items": [NULL, {"not": 1}]}, "schema.items[1].not", ""),
    ({"type": "object", "additionalProperties": {"not": 1}}, "schema.additionalProperties.not", ""),
    ({"patternProperties": {"^a": {"not": 1}}}, "schema.patternProperties.^a.not", ""),
    ({"$defs": {"n": {"type": "object", "properties": {"x": {"not": INTEGER}}}}, "$ref": "#/$defs/n"},
     "schema.$defs.n.properties.x.not", ""),
    ({"type": "float"}, "schema.type", "float"), ({"type": 3}, "schema.type", "3"),
    ({"type": ["string", 1]}, "schema.type", "1"), ({"type": [["a"]]}, "schema.type", ""),
    ({"type": []}, "schema.type", ""),
    ({"properties": []}, "schema.properties", ""), ({"properties": {"a": 3}}, "schema.properties.a", ""),
    ({"required": "a"}, "schema.required", "list"), ({"required": [1]}, "schema.required", "names"),
    ({"items": 3}, "schema.items", "object"), ({"prefixItems": {}}, "schema.prefixItems", "list"),
    ({"additionalProperties": 1}, "schema.additionalProperties", "object"),
    ({"anyOf": []}, "schema.anyOf", "nothing"), ({"anyOf": {}}, "schema.anyOf", "list"),
    ({"anyOf": [1]}, "schema.anyOf[0]", "object"), ({"allOf": 1}, "schema.allOf", "list"),
    ({"enum": []}, "schema.enum", "nothing"), ({"enum": "a"}, "schema.enum", ""),
    ({"type": "string", "enum": [1]}, "schema", "unsatisfiable"),
    *[({key: value}, f"schema.{key}", "") for key, value in {
        "minLength": -1, "maxLength": True, "minItems": 2**31, "maxItems": 2.5, "minProperties": [],
        "maximum": "1", "minimum": None, "pattern": 1, "format": {}}.items()],
    ({"minimum": float("nan")}, "schema", ""), ({"maximum": float("inf")}, "schema", ""),
    ({"type": "integer", "minimum": float("-inf")}, "schema", ""),
    ({"const": float("nan")}, "schema", ""), ({"const": float("inf")}, "schema", ""),
    ({"enum": ["\ud800"]}, "schema", ""), (obj(**{"\ud800": NULL}), "schema", ""),
    ({"$ref": "http://x/y"}, "schema.$ref", "http://x/y"), ({"$ref": "#/$defs/x"}, "schema.$ref", ""),
    ({"$ref": "#x"}, "schema.$ref", ""), ({"$ref": 1}, "schema.$ref", ""),
    ({"$ref": "#/allOf/1", "allOf": [NULL]}, "schema.$ref", ""),
    ({"$ref": "#"}, "schema.$ref", "itself"),
    ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
     "schema.$ref", "itself"),
    ({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}, "schema", ""),
    *[({"type": "string", "pattern": pattern}, "schema.pattern", words) for pattern, words in {
        "(?=a)b": "look", "(a)\\1": "backref", "\\bx": "look", "[": "", "a^b": "look",
        "a$b": "look", "(^a)*": "look", "a**b(": "", "(?P<n>a)(?P=n)": "", "(?>a)": ""}.items()],
    (obj(a={"type": "array", "items": {"pattern": "\\bx"}}), "schema.properties.a.items.pattern", "look"),
    ({"type": "string", "pattern": "a" * 4001}, "schema.pattern", "4001"),
    ({"patternProperties": {f"^{i}$": NULL for i in range(65)}}, "schema.patternProperties", "65"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "schema", "minLength"),
    ({"type": "string", "pattern": "^abc$", "maxLength": 2}, "schema", "empty"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "schema", "minimum"),
    ({"type": "number", "minimum": 3, "maximum": 2}, "schema.maximum", "nothing"),
    ({"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 4}, "schema", "no integer"),
    ({"type": "integer", "maximum": 2**53 + 1}, "schema.maximum", "2**53"),
    ({"const": 2**53 + 1}, "schema.const", "2**53"), ({"enum": [{"a": [2**60 + 1]}]}, "schema.enum", "2**53"),
    ({"type": "array", "minItems": 3, "maxItems": 2}, "schema", "items"),
    ({"type": "array", "prefixItems": [NULL], "items": False, "minItems": 2}, "schema", ""),
    ({"type": "object", "properties": {"a": {}}, "minProperties": 2}, "schema.minProperties", ""),
    (obj(a=False), "schema.properties.a", "false"),
    ({"oneOf": [TEXT, TEXT]}, "schema", "unsatisfiable"),
    ({"oneOf": [INTEGER, {"type": "number"}]}, "schema.oneOf", "anyOf"),
    (obj(a={"anyOf": [NULL, {"oneOf": [INTEGER, {}]}]}), "schema.properties.a.anyOf[1].oneOf", ""),
    ({"$defs": {"a": {"oneOf": [INTEGER, {}]}}, "items": {"$ref": "#/$defs/a"}}, "schema.$defs.a.oneOf", ""),
    ({"oneOf": [{"$ref": "#/$defs/t"}, INTEGER, {}], "$defs": {"t": {"oneOf": [NULL, {"items": {"$ref": "#"}}]}}},
     "schema.oneOf", "anyOf"),
    ({"allOf": [{"type": "string"}, {"type": "null"}]}, "schema", "incompatible"),
    ({"allOf": [True, False]}, "schema", "false"),
]


@pytest.mark.parametrize("schema, place, words", REFUSED, ids=lambda value: str(value)[:60])
def test_a_refusal_names_the_place(model, schema, place, words):
    with pytest.raises(schemas.SchemaError) as caught:
        compiled(model, schema)
    named, _, said = str(caught.value).partition(": ")
    assert named == place or (place == "schema" and named.startswith("schema"))
    assert words.lower() in said.lower()


XML = small_templates.FORMS["qwen3-coder"]


@pytest.mark.parametrize("form", [calls.GENERIC, XML], ids=["json", "xml"])
@pytest.mark.parametrize("parameters", [
    {"properties": 3}, {"properties": {"a": 1}}, {"properties": {"a": False}, "required": ["a"]},
    {"properties": {"a": NULL}, "required": 3}, {"properties": {"a": {"type": "string", "enum": 3}}},
    {"not": INTEGER}, {"properties": {"a": {"contains": {}}}}], ids=str)
def test_arguments_that_cannot_be_honoured_are_refused(model, form, parameters):
    with pytest.raises(schemas.SchemaError, match=r"^here\b"):
        reply = structured.Form()
        reply.root = grammars.add_arguments(reply, form, parameters, "here")
        reply.replies(model, must_trigger=True)


# ==== 4. Limits ===========================================================================


def nested(depth: int) -> dict:
    schema: dict = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema, "minItems": 1}
    return schema


HOSTILE = {
    "deep": nested(40), "deeper": nested(400),
    "wide": {"type": "object", "properties": {f"p{i}": {"type": "string", "maxLength": i % 900}
                                              for i in range(3000)}},
    "doubling": {"$defs": {"d30": {}} | {f"d{i}": {"anyOf": [
        {"type": "object", "properties": {"v": {"$ref": f"#/$defs/d{i + 1}"}, "w": {"const": j}}}
        for j in (1, 2)]} for i in range(30)}, "$ref": "#/$defs/d0"},
    "all of": {"$defs": {"d40": {}} | {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2}
                                       for i in range(40)}, "$ref": "#/$defs/d0"},
    "any of": {"$defs": {"d20": {"type": "null"}} | {
        f"d{i}": {"anyOf": [{"allOf": [{"$ref": f"#/$defs/d{i + 1}"}]}] * 3} for i in range(20)},
        "$ref": "#/$defs/d0"},
    "enum": {"enum": [f"{i:05}" * 4 for i in range(20000)]},
    "alternatives": {"anyOf": [{"const": i} for i in range(3900)]},
    "optional": {"type": "object", "properties": {f"p{i}": NULL for i in range(250)}},
    "too optional": {"type": "object", "properties": {f"p{i}": NULL for i in range(3000)}},
    "brackets": {"type": "string", "pattern": "(" * 3000 + ")" * 3000},
    "regex": {"type": "string", "pattern": "(.*a.*b.*c.*d){40}"},
    "repeat": {"type": "string", "pattern": "^(([a-z]{1,90}){1,90}){1,90}$"},
    "long repeat": {"type": "string", "pattern": "^[a-z]{90000}$"},
    "long text": {"const": "x" * 900000}, "long name": obj(**{"x" * 90000: NULL}),
    "long other name": {"type": "object", "properties": {"x" * 5000: NULL}, "additionalProperties": NULL},
    "long string": {"type": "string", "minLength": 2**31 - 1},
    "long array": {"type": "array", "minItems": 10**6, "maxItems": 2 * 10**6},
    "arrays": {"type": "array", "prefixItems": [{"type": "array", "maxItems": 1990 + i}
                                                for i in range(200)]},
}


def cases(n: int) -> list[dict]:
    return [{"if": {"properties": {"k": {"const": i}}, "required": ["k"]}, "then": {"required": [f"p{i}"]},
             "else": {"properties": {f"p{i}": False}}} for i in range(n)]


HOSTILE |= {  # with words that negation.py turns around, or that are left out where that is allowed
    "not of all": {"not": {"$ref": "#/$defs/d0"}, **HOSTILE["all of"], "$ref": "#/$defs/d40"},
    "not not": functools.reduce(lambda part, _: {"not": part}, range(45), NULL),
    "not not not": functools.reduce(lambda part, _: {"not": part}, range(400), NULL),
    "not itself": {"not": {"$ref": "#"}}, "not each other": {"not": {"$ref": "#/$defs/a"}, "$defs": {
        "a": {"not": {"$ref": "#/$defs/b"}}, "b": {"not": {"$ref": "#/$defs/a"}}}},
    "a chain that is not": {"not": {"$ref": "#/$defs/d0"}, "$defs": {"d900": NULL} | {
        f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(900)}},
    "no word of many": {"not": {"enum": [f"{i:05}" * 4 for i in range(8000)]}},
    "no long word": {"not": {"enum": ["ab" * 5000]}}, "no number of many": {"not": {"enum": [*range(2000)]}},
    "none of many": {"not": {"anyOf": [{"required": [f"p{i}"]} for i in range(900)]}},
    "not with all": {"not": {"required": [f"p{i}" for i in range(900)]}},
    "one of many": {"type": "object", "oneOf": [{"required": [f"p{i}"]} for i in range(60)]},
    "one of more": {"oneOf": [{"type": "object", "properties": {f"p{i}": NULL}} for i in range(900)]},
    "cases": {"type": "object", "allOf": cases(12)}, "many cases": {"type": "object", "allOf": cases(300)},
    "dependencies": {"type": "object", "dependentRequired": {f"p{i}": [f"p{i + 1}"] for i in range(40)}},
    "names": {"type": "object", "propertyNames": {"enum": [f"p{i}" for i in range(3000)]}},
    "bad patterns": {"properties": {f"p{i}": {"pattern": "\\bx"} for i in range(1000)}},
    "bad alternatives": {"properties": {f"p{i}": {"oneOf": [INTEGER, {}]} for i in range(500)}},
}


@pytest.mark.parametrize("is_strict", [True, False], ids=["strict", "loose"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_is_refused_or_compiled_at_once(model, name, is_strict):
    """No RecursionError, no minutes, and what is accepted takes a moment for each token."""
    began = time.monotonic()
    try:
        new_reply = compiled(model, HOSTILE[name], is_strict)
    except schemas.SchemaError as error:
        assert str(error).startswith("schema")
        assert time.monotonic() - began < 5
        return
    assert time.monotonic() - began < 5
    step_lightly(model, new_reply)


def step_lightly(model, new_reply, n: int = 8) -> None:
    """Write some tokens; each takes a moment."""
    reply = new_reply()
    for _ in range(n):
        began = time.thread_time()
        try:
            allowed = may_come(model, reply)
        except engine.GrammarError:  # llguidance's own limit of what a token may take
            break
        finally:
            assert time.thread_time() - began < 0.3
        assert allowed and reply.take(allowed[len(allowed) // 2])
        if allowed[len(allowed) // 2] in model.end_tokens:
            break


# ==== 5. Random schemas ===================================================================

PATTERNS = ["^[a-c]+$", "^a|^b{2}", "x", "^\\d{2}-\\w?$", "^(\\d{2}-)+$", "^(yes|no)?$", "z$"]


def ranges(kind):
    """Of integers or numbers, open or closed at either end or not at all."""
    def make(low, size, lower, upper):
        limits = {lower: low, upper: low + size}  # an integer lies between, whichever the keys
        return {"type": kind, **{key: limit for key, limit in limits.items() if key}}

    return st.builds(make, st.integers(-200, 198), st.integers(2, 300),
                     st.sampled_from([None, "minimum", "exclusiveMinimum"]),
                     st.sampled_from([None, "maximum", "exclusiveMaximum"]))


def leaves():
    values = st.integers(-50, 50) | st.text("ab\"\\é\n ", max_size=4) | st.none() | st.booleans()
    return st.one_of(
        st.sampled_from([NULL, BOOLEAN, INTEGER, {"type": "number"}, {"type": ["boolean", "null"]}]),
        ranges("integer"), ranges("number"), ranges(["integer", "null"]),
        st.builds(lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
                  st.integers(0, 4), st.integers(0, 12)),
        st.builds(lambda high: {"type": ["string", "null"], "maxLength": high}, st.integers(0, 12)),
        st.sampled_from(PATTERNS).map(lambda pattern: {"type": "string", "pattern": pattern}),
        st.sampled_from(sorted([*schemas.FORMATS, *schemas.KNOWN_FORMATS])).map(lambda name: {"type": "string", "format": name}),
        st.lists(values, min_size=1, max_size=4).map(lambda values: {"enum": values}),
        st.lists(st.text("abc", max_size=3), min_size=1, max_size=3).map(
            lambda values: {"type": "string", "enum": values}),
        values.map(lambda value: {"const": value}))


def nodes(depth: int, leaf):
    if depth == 0:
        return leaf
    inner = nodes(depth - 1, leaf)
    names = st.text("ab\"\\é/ ", min_size=1, max_size=3)

    def make_object(properties, requires, more):
        required = [name for name, must in zip(properties, requires) if must]
        return {"type": "object", "properties": properties, "required": required} | more

    def make_array(items, low, more, first):
        return {"type": "array", "items": items, "minItems": low + len(first),
                "maxItems": low + more + len(first)} | ({"prefixItems": first} if first else {})

    return st.one_of(
        leaf,
        st.builds(make_object, st.dictionaries(names, inner, max_size=3),
                  st.tuples(*[st.booleans()] * 3), st.sampled_from(
                      [*[{"additionalProperties": False}] * 3, {"additionalProperties": NULL},
                       {"additionalProperties": {"type": "integer", "maximum": 3}}])),
        st.builds(make_array, inner, st.integers(0, 1), st.integers(0, 2), st.lists(leaf, max_size=2)),
        st.lists(inner, min_size=1, max_size=3).map(lambda ways: {"anyOf": ways}),
        st.just({"oneOf": [NULL, {"type": "boolean"}, {"type": "string", "maxLength": 5}]}),
        st.just({"type": "object", "properties": {"a": NULL, "b": NULL},
                 "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}),
        inner.map(lambda part: {"allOf": [part], "description": "d"}),
        st.builds(lambda a, b: {"allOf": [obj_open("a", a), obj_open("b", b)]}, inner, inner))


def obj_open(name, schema) -> dict:
    return {"type": "object", "properties": {name: schema}, "required": [name]}


def random_schema(depth: int = 2):
    """Random schemas of supported features, small enough for a model to end them soon."""
    referring = nodes(depth, leaves() | st.just({"$ref": "#/$defs/d"}))
    recursive = {**TREE, "$defs": {"n": {**TREE["$defs"]["n"], "properties": {
        "v": {"type": "integer", "minimum": 0, "maximum": 9},
        "kids": {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 2}}}}}
    return st.one_of(
        nodes(depth, leaves()),
        st.builds(lambda body, defined: {**body, "$defs": {"d": defined}}, referring, leaves()),
        st.just(recursive))


def may_come(model, reply) -> list[int]:
    """Every token that may come next."""
    logits = np.zeros(model.n_vocab, dtype=np.float32)
    reply.restrict(logits)
    return np.flatnonzero(np.isfinite(logits)).tolist()


@functools.cache
def pieces_of(model) -> list[bytes]:
    """Each token's bytes, once: at each step of a walk most of them are looked at."""
    return [model.piece(token) for token in range(model.n_vocab)]


def walk(model, new_reply, rng: random.Random, n_free: int = 12, n_most: int = 60) -> str | None:
    """Write at random what a schema allows; None if that does not end. After n_free tokens those
    are preferred that close something."""
    reply, utf8, text = new_reply(), codecs.getincrementaldecoder("utf-8")(), ""
    pieces = pieces_of(model)
    for n in range(n_most):
        allowed = may_come(model, reply)
        assert allowed, f"nothing may follow {text!r}"
        ends = [token for token in allowed if token in model.end_tokens]
        if ends and (len(ends) == len(allowed) or n > n_free or rng.random() < 0.3):
            assert reply.take(ends[0])
            return text + utf8.decode(b"", final=True)
        allowed = [token for token in allowed if token not in model.end_tokens]
        if n > n_free and rng.random() < 0.8:
            closing = [token for token in allowed if pieces[token] in (b'"', b"]", b"}")]
            allowed = closing or allowed
        elif rng.random() < 0.5:  # else most are long words
            allowed = [token for token in allowed if len(pieces[token]) < 3] or allowed
        token = rng.choice(allowed)
        text += utf8.decode(pieces[token])  # raises where it is no UTF-8
        assert reply.take(token)
    return None


@settings(PROPERTY, max_examples=20)
@given(schema=random_schema(), seed=st.integers(0, 2**32))
def test_what_a_random_walk_writes_validates(model, schema, seed):
    new_reply, rng = compiled(model, schema), random.Random(seed)
    for _ in range(2):
        text = walk(model, new_reply, rng)
        assert text is None or problem(schema, text) is None, (text, problem(schema, text))


@pytest.mark.parametrize("schema", [row[0] for row in TABLE], ids=lambda value: json.dumps(value)[:60])
def test_what_a_random_walk_through_the_tables_writes_validates(model, schema):
    new_reply, rng = compiled(model, schema), random.Random(1)
    text = walk(model, new_reply, rng)
    assert text is None or problem(schema, text) is None, (text, problem(schema, text))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=3)
    | st.sampled_from([*sorted(schemas.KNOWN), *schemas.TYPES, "#", "#/$defs/a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from([*sorted(schemas.KNOWN), "$defs", "a", "zz"]), inner, max_size=4),
    max_leaves=12)


@settings(PROPERTY, max_examples=300)
@given(JSON)
def test_whatever_is_sent_as_a_schema_only_a_schema_error_comes_of_it(model, value):
    try:
        compiled(model, value)
    except schemas.SchemaError:
        pass


# ==== 6. GBNF =============================================================================

GBNF = [  # grammar, what may be written, what may not
    ('root ::= "yes" | "no, " [0-9]+ "!"', ["yes", "no, 12!"], ["no", "no, !", "yes!"]),
    ("root ::= item{2,3}  # a comment with \"quotes\" and [brackets]\nitem ::= \"- \" [^\\n]+ \"\\n\"",
     ["- a\n- b\n", "- a\n- b\n- c\n"], ["- a\n", "- a"]),
    ('root ::= (\n  "a" |\n  "b"\n)? "c"', ["c", "ac", "bc"], ["abc", "a"]),
    ('root ::= . "." [.]', ["a..", "\n..", "é.."], ["..", "ab."]),
    (r'root ::= "\x41\u00e9\U0001F469" [\x42-\x44] [\u4e00-\u9fff]', ["Aé👩C漢"], ["Aé👩A漢", "Aé👩Ca"]),
    (r'root ::= "\"\\/" [\]\[^-] [^"\\]', ['"\\/]a', '"\\/-/', '"\\/^é'], ['"\\/a"', '"\\/]"']),
    ('root ::= expr\nexpr ::= term ([-+*/] term)*\nterm ::= num | "(" expr ")"\nnum ::= [0-9]+',
     ["1+2*(3-4)", "((7))"], ["1+", "(1", "1 + 2"]),
    ('root ::= "a"{0,} "b"{2} "c"{,2}'.replace("{,2}", "{0,2}"), ["bb", "aabbcc"], ["b", "bbccc"]),
    ("root ::= a-b\na-b ::= UPPER\nUPPER ::= [A-Z]+ lower?\nlower ::= [a-z]", ["ABC", "Ab"], ["a", "Abc"]),
]


@pytest.mark.parametrize("grammar, written, refused", GBNF, ids=range(len(GBNF)))
def test_a_grammar_is_read_as_llama_cpp_reads_it(model, grammar, written, refused):
    form = structured.Form()
    form.set_gbnf(grammar)
    new_reply = form.replies(model, must_trigger=True)
    assert [text for text in written if not takes(model, new_reply, text)] == []
    assert [text for text in refused if takes(model, new_reply, text)] == []


REFUSED_GRAMMARS = [  # grammar, words
    ('root ::= "a', "end of input"), ("root ::= missing", "missing"), ('start ::= "a"', "root"),
    ("root ::= <think>", ""), ("nonsense", "::="), (" ", "root"), ('root ::= "a\0"', "NUL"),
    ('root ::= "a" # \0', "NUL"), ('root ::= [\0]', "NUL"),
    (r'root ::= "\q"', "escape"), ("root ::= " + "(" * 101 + '"a"' + ")" * 101, "brackets"),
    ('root ::= "' + "a" * 70_000 + '"', "bytes"), ("root ::= root", ""), ('root ::= [z-a]', "")]


@pytest.mark.parametrize("grammar, words", REFUSED_GRAMMARS)
def test_a_grammar_that_cannot_be_honoured_is_refused_with_the_reason(model, grammar, words):
    with pytest.raises(schemas.SchemaError, match="^grammar: ") as caught:
        form = structured.Form()
        form.set_gbnf(grammar)
        form.replies(model, must_trigger=True)
    assert words in str(caught.value)


LARK = [  # what vLLM takes besides GBNF: grammar, what may be written, what may not
    ('start: "yes" | "no, " NUMBER "!"\nNUMBER: /[0-9]+/', ["yes", "no, 12!"], ["no", "yes!"]),
    ('?start: select\n?select: "SELECT " name ("," name)* " FROM " name\n?name: /[a-z_]+/  // a name',
     ["SELECT a,b FROM c_d"], ["SELECT a, FROM c", "select a FROM b"]),
    ('start: expr\nexpr: term (/[-+*\\/]/ term)*\nterm: /[0-9]+/ | "(" expr ")"', ["1+2*(3-4/5)"], ["1+", "(1"]),
    ('start: %json {"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": false}',
     ['{"a": null}', "{}"], ['{"b": 1}']),
    ('start: "[" "]" | "(" "))))"', ["[]", "())))"], ["["]),
]


@pytest.mark.parametrize("grammar, written, refused", LARK, ids=range(len(LARK)))
def test_a_grammar_in_larks_syntax(model, grammar, written, refused):
    form = structured.Form()
    form.set_lark(grammar, "guided_grammar")
    new_reply = form.replies(model, must_trigger=True)
    assert [text for text in written if not takes(model, new_reply, text)] == []
    assert [text for text in refused if takes(model, new_reply, text)] == []


HOSTILE_LARK = {  # grammar: words
    'start: "a': "", "start: missing": "missing", 'begin: "a"': "start", "start: start": "", "nonsense": "",
    'start: "a\0"': "NUL", "start: /\0/": "NUL", "start: " + "(" * 101 + '"a"' + ")" * 101: "brackets",
    'start: "' + "a" * 70_000 + '"': "bytes", "start: <[7]>": "<[", 'start: <|im_end|>': "special",
    '%llguidance {"no_forcing": false}\nstart: "a"': "%llguidance",
    'start: %json {"type": "string", "pattern": "(a|b)*a(a|b){999}"}': "", "start: /(?=a)b/": "look-ahead",
    "start: /(([a-z]{1,90}){1,90}){1,90}/": "", "start: /(.*a.*b.*c.*d){40}/": "", 'start: "a"{1,999999999}': "",
    "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(3000)) + 'r3000: "a"': "",
    "start: " + "start? " * 300 + '"a"': "", "start: /" + "(a?){50}" * 400 + "/": "",
    'start: "a" ' + '("b" | "c")?' * 3000: "", '%import common.NOTHING\nstart: NOTHING': "",
    "start[lazy]: /.*/": "", 'start: @other': ""}


@pytest.mark.parametrize("grammar", HOSTILE_LARK, ids=lambda grammar: grammar[:50])
def test_a_hostile_grammar_is_refused_or_harmless_in_time(model, grammar):
    began, words = time.monotonic(), HOSTILE_LARK[grammar]
    with pytest.raises(schemas.SchemaError, match="^guided_grammar: ") if words else contextlib.suppress(
            schemas.SchemaError) as caught:
        form = structured.Form()
        form.set_lark(grammar, "guided_grammar")
        step_lightly(model, form.replies(model, must_trigger=True))
    assert time.monotonic() - began < 5
    assert not words or words in str(caught.value)


PATTERNED = [  # a regular expression for the whole reply, what may be written, what may not
    (r"\w+@\w+\.com\n", ["ab@c.com\n"], ["ab@c.com", "ab@c.org\n"]), ("^(yes|no)$", ["yes", "no"], ["maybe", "yesno"]),
    ("a/b\n[/&~]", ["a/b\n/", "a/b\n&"], ["a/b/", "a/b\nx"]), (r"\/\d{2}", ["/12"], ["12", "/1"]),
    ("[^\\n]+", ["漢\\\""], ["a\nb", ""]), ("(a|b)*c?", ["", "abac"], ["cc"]), ("(?i)ab", ["aB"], ["ac"]),
]


@pytest.mark.parametrize("pattern, written, refused", PATTERNED, ids=range(len(PATTERNED)))
def test_a_reply_is_held_to_a_pattern_from_end_to_end(model, pattern, written, refused):
    form = structured.Form()
    form.root = form.add_pattern(pattern, "guided_regex")
    new_reply = form.replies(model, must_trigger=True)
    assert [text for text in written if not takes(model, new_reply, text)] == []
    assert [text for text in refused if takes(model, new_reply, text)] == []


@pytest.mark.parametrize("pattern", [
    "(?=a)b", "[", "a**b(", "(a", r"\bx", r"(a)\1", "a" * 4001, "(([a-z]{1,90}){1,90}){1,90}", "(.*a.*b.*c.*d){40}",
    "(a?){50}" * 400, "(a|b)*a(a|b){99}", "a{99999}", "(" * 1900 + ")" * 1900, "\0", "(x+x+)+y"])
def test_a_hostile_pattern_is_refused_or_harmless_in_time(model, pattern):
    began = time.monotonic()
    for white_space in (False, True):
        form = structured.Form()
        with contextlib.suppress(schemas.SchemaError):
            if white_space:
                form.set_white_space(pattern, "guided_whitespace_pattern")
            form.root = form.add_schema({"items": {}}, "schema") if white_space else \
                form.add_pattern(pattern, "guided_regex")
            step_lightly(model, form.replies(model, must_trigger=True))
    assert time.monotonic() - began < 10


def test_a_reply_is_one_of_some_texts(model):
    choices = ["yes", "yes, please", "no", "", "a\nb", 'say "no"', "漢", "\\", "/x/"]
    form = structured.Form()
    form.root = form.add_choice(choices, "guided_choice")
    new_reply = form.replies(model, must_trigger=True)
    assert [choice for choice in choices if not takes(model, new_reply, choice)] == []
    assert [text for text in ("y", "yes,", "maybe", "nono", "a") if takes(model, new_reply, text)] == []
    many = structured.Form()
    many.root = many.add_choice([f"{i:05}" for i in range(20_000)], "guided_choice")
    assert takes(model, many.replies(model, must_trigger=True), "12345")
    with pytest.raises(schemas.SchemaError, match="^guided_choice: has 300000 bytes"):
        many.add_choice(["x" * 300_000], "guided_choice")


@pytest.mark.parametrize("pattern, written, refused", [
    ("", ['{"a":1,"b":[]}'], ['{"a": 1,"b":[]}']), ("[ ]?", ['{"a": 1, "b":[]}'], ['{"a":\n1}', '{"a":  1}']),
    ("[\n\t ]*", ['{"a":\n\n   1}'], ['{"a"_1}'])])
def test_the_white_space_of_json_may_be_chosen(model, pattern, written, refused):
    form = structured.Form()
    form.set_white_space(pattern, "guided_whitespace_pattern")
    form.root = form.add_schema({"type": "object"}, "schema")
    new_reply = form.replies(model, must_trigger=True)
    assert [text for text in written if not takes(model, new_reply, text)] == []
    assert [text for text in refused if takes(model, new_reply, text)] == []


@pytest.mark.parametrize("marker", ["\n</parameter>\n", "/a/", "[END]", "aab"])
def test_text_until_a_marker_ends_at_its_first(model, marker):
    """Whatever comes before: the text of an XML parameter may hold any part of the end tag."""
    form = structured.Form()
    form.root = form.add_text_until(marker)
    new_reply = form.replies(model, must_trigger=True)
    for text in ("", "x", "\n", "\n\n", "\n<", "漢", marker[:-1], marker[1:], '"\\é'):
        if marker in (text + marker)[:-1]:
            continue  # it would end before
        assert takes(model, new_reply, text + marker), text
        assert not takes(model, new_reply, text), text
        assert not takes(model, new_reply, f"{text}{marker}x"), text


# ---- the trial


HEAVY = {  # what llguidance itself hangs on, dies of, or fills the memory with
    "a divisor": {"type": "integer", "multipleOf": 9999991},
    "a larger divisor": {"type": "integer", "multipleOf": 123456789},
    "a chain of references": {"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}", "title": "t", "maxLength": i}
                                        for i in range(1000)} | {"d1000": TEXT}, "$ref": "#/$defs/d0"},
    "patterns of names": {"patternProperties": {f"^{i}": NULL for i in range(1000)}},
    "some patterns of names": {"patternProperties": {f"^{i}.*{i}": NULL for i in range(60)}},
    "a long pattern": {"type": "string", "pattern": "(a|b)?" * 33_000},
    "a pattern": {"type": "string", "pattern": "(a?b?){9}" * 400},
    "patterns that meet": {"allOf": [{"pattern": f"(a|b)*{c}(a|b){{{n}}}"} for c in "ab" for n in range(9, 30)]},
}


@pytest.mark.parametrize("name", HEAVY)
def test_what_is_too_heavy_for_llguidance_is_refused_in_time(model, name):
    """Or honoured, if it comes to that; the next schema is none the wiser."""
    began = time.monotonic()
    with contextlib.suppress(schemas.SchemaError):
        compiled(model, HEAVY[name])
    assert time.monotonic() - began < 5
    assert takes(model, compiled(model, NULL), "null")


@pytest.mark.parametrize("n", [3400, 10_000])
def test_a_chain_of_rules_is_refused_in_time_or_harmless(model, n):
    form, began = structured.Form(), time.monotonic()
    with contextlib.suppress(schemas.SchemaError):
        form.set_gbnf("root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(n)) + f'r{n} ::= "a"')
        assert takes(model, form.replies(model, must_trigger=True), "a")
    assert time.monotonic() - began < 5


def test_a_trial_that_ends_is_started_again(model):
    """Killed from outside, or by its own limits."""
    trial = Trial()
    assert "lark" in trial.run({"lark": 'start: "a"'})
    first = trial._child
    first.kill()
    first.wait()
    assert "lark" in trial.run({"lark": 'start: "a"'}) and trial._child is not first
    trial._end()


def test_a_trial_that_does_not_start_is_a_limit_and_not_a_wait(monkeypatch):
    """All requests with a schema would wait for it."""
    monkeypatch.setattr("features.trial.CHILD", "import time; time.sleep(60)")
    monkeypatch.setattr(Trial, "START_SECONDS", 0.2)
    began = time.monotonic()
    assert "ends as soon as it is started" in Trial().run({"lark": 'start: "a"'})["limit"]
    assert time.monotonic() - began < 10


def test_a_trial_works_with_a_thousand_connections_open(model):
    """select.select cannot wait for descriptors beyond 1023, and raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    files = [open(os.devnull) for _ in range(1100)]
    try:
        trial = Trial()
        assert "lark" in trial.run({"lark": 'start: "a"'})
        trial._end()
    finally:
        for file in files:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_answer_nobody_waited_for_is_nobody_elses(model, monkeypatch):
    trial = Trial()
    assert "lark" in trial.run({"lark": 'start: "a"'})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("features.trial.has_answered", lambda *_: (_ for _ in ()).throw(
            KeyboardInterrupt))
        trial.run({"lark": 'start: "first"'})
    assert "second" in trial.run({"lark": 'start: "second"'})["lark"]
    trial._end()


def test_a_trial_whose_server_is_gone_ends_itself(monkeypatch):
    """A schema that hangs must not compute for ever after a crash."""
    monkeypatch.setattr(Trial, "SECONDS", 0.3)  # the child's own alarm: twice that, rounded up
    trial = Trial()
    child = trial._start()
    slow = json.dumps(HEAVY["a larger divisor"])
    question = {"lark": f"start: %json {slow}", "n_steps": 0}
    child.stdin.write(json.dumps(question).encode() + b"\n")
    child.stdin.close()  # the server is gone
    assert child.wait(timeout=10) == -signal.SIGALRM
    child.stdout.close()


def test_a_model_that_was_unloaded_leaves_no_vocabulary():
    """llguidance keeps the tokens it was given, and Python's collector does not see that."""
    model = engine.Model(conftest.default_model())
    gone = weakref.ref(replies.Vocabulary.of(model))
    model.close()
    del model
    gc.collect()
    assert gone() is None


class Picky(engine.Constraint):
    """Refuses what it has not ruled out: the first tokens that are tried."""

    def __init__(self, n_refused: int):
        self.n_left = n_refused

    def take(self, token: int) -> bool:
        self.n_left -= 1
        return self.n_left < 0

    def restrict(self, logits: np.ndarray) -> None:
        pass


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_refused_token_is_not_the_end_of_a_reply(model, temperature):
    """A token that ends a trigger and begins the form wrongly is refused, but another may come."""
    rows = np.zeros((1, model.n_vocab), dtype=np.float32)
    rows[0, [10, 11, 12]] = 90, 80, 70
    params = engine.SamplingParams(temperature=temperature)
    sampler = engine.Sampler(model, params, 512, [], Picky(2))
    context = types.SimpleNamespace(logits=lambda row: rows[row])
    assert sampler.sample(context, 0) == 12


def test_a_trial_has_a_limit_of_time_and_of_memory(monkeypatch):
    trial = Trial()
    monkeypatch.setattr(trial, "SECONDS", 0.01)
    slow = json.dumps({"type": "integer", "multipleOf": 999_983})
    assert "0.01 seconds" in trial.run({"lark": f"start: %json {slow}"})["limit"]
    monkeypatch.undo()
    monkeypatch.setattr(trial, "MAX_BYTES", 2**26)  # less than Python and llguidance take
    assert "memory" in trial.run({"lark": f"start: %json {slow}"})["limit"]


def test_many_threads_may_ask_at_once(model):
    def ask(i: int) -> bool:
        return takes(model, compiled(model, {"const": i}), str(i)) and not takes(
            model, compiled(model, {"const": i}), str(i + 1))
    assert ask(0)
    child = replies.trial._child
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(64)))
    assert replies.trial._child is child, "one process serves all"


def test_without_llguidance_one_sentence_says_what_to_install(model, monkeypatch):
    replies.library.cache_clear()
    monkeypatch.setitem(sys.modules, "llguidance", None)
    try:
        with pytest.raises(schemas.SchemaError, match="^schema: needs the llguidance library on the "
                                                      "server: pip install -r features/requirements.txt$"):
            compiled(model, NULL)
    finally:
        replies.library.cache_clear()


# ==== 7. The model ========================================================================

N_WHOLE, N_SCHEMAS, N_THREADS = 75, 150, 16


def random_schemas(n: int) -> list[dict]:
    found: list[dict] = []

    @settings(PROPERTY, max_examples=2 * n, phases=[Phase.generate])
    @given(random_schema())
    def collect(schema):
        found.append(schema)

    collect()
    return random.sample(found, n)


@pytest.mark.slow
def test_what_the_model_writes_at_temperature_1_validates(start_server):
    """75 of 75 whole replies to random schemas, many at a time. A reply cut by `length` says nothing:
    at temperature 1 digits may go on and on. Half of the schemas may make such."""
    http = start_server(PARALLEL=str(N_THREADS), N_CTX="512")

    def ask(schema) -> tuple:
        response = http.post("/v1/chat/completions", json={
            "messages": [{"role": "user", "content": "Write JSON."}], "temperature": 1, "top_p": 1,
            "top_k": 0, "min_p": 0, "max_tokens": 100, "response_format": {
                "type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}})
        if response.status_code != 200:
            return schema, response.text, f"status {response.status_code}"
        [choice] = response.json()["choices"]
        text = choice["message"]["content"]
        return schema, text, "length" if choice["finish_reason"] == "length" else problem(schema, text)

    whole = []
    with concurrent.futures.ThreadPoolExecutor(N_THREADS) as pool:
        asked = [pool.submit(ask, schema) for schema in random_schemas(N_SCHEMAS)]
        for future in concurrent.futures.as_completed(asked):
            if future.result()[2] != "length":
                whole.append(future.result())
            if len(whole) == N_WHOLE:
                break
        pool.shutdown(cancel_futures=True)
    wrong = [reply for reply in whole if reply[2]]
    assert not wrong, "\n\n".join(f"{json.dumps(schema)}\n  {text}\n  {why}" for schema, text, why in wrong)
    assert len(whole) == N_WHOLE


@pytest.mark.slow
def test_streams_go_on_while_a_hostile_schema_is_tried_out(http):
    """The longest gap of a stream beside two of them; each is refused within its time."""
    body = {"messages": [{"role": "user", "content": "Count."}], "temperature": 0, "max_tokens": 90,
            "stream": True, "ignore_eos": True}
    heavy = {"messages": body["messages"], "max_tokens": 2, "json_schema": HEAVY["patterns that meet"]}

    def refuse(_) -> tuple[int, float]:
        began = time.monotonic()
        return http.post("/v1/chat/completions", json=heavy, timeout=60).status_code, time.monotonic() - began

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        refused = [pool.submit(refuse, n) for n in range(2)]
        times = []
        with http.stream("POST", "/v1/chat/completions", json=body, timeout=60) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    times.append(time.monotonic())
        assert [future.result()[0] for future in refused] == [400, 400]
    assert len(times) > 60 and max(b - a for a, b in zip(times, times[1:])) < 2
