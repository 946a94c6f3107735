"""How many of some JSON Schemas are served, and whether what is served holds.

    python tests/schema_share.py FILE
    python tests/schema_share.py --tools FILE

FILE has a line of JSON for each schema, as {"schema": ..., "tests": [[is_valid, document], ...]},
and may be gzipped. Prints the share that is served strictly, or as the parameters of tools without
`strict`; of the valid documents of those the share that can be written (with their members in the
schema's order), and how many invalid ones can be. With --names also each that is refused, loosened
or wrong.
"""

import argparse
import collections
import gzip
import itertools
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import engine  # noqa: E402
from features import downloads, schemas, structured  # noqa: E402

MAX_ORDERS = 24  # of a document's members that are tried
APPLICATORS = ("allOf", "anyOf", "oneOf")


class Orders:
    """The orders in which the members of a document may come, by its schema."""

    def __init__(self, schema):
        self._schema = schemas.Schema(schema, "schema")

    def of(self, document) -> list:
        """The document with its members in each of these orders, the likeliest first."""
        return list(itertools.islice(self._ordered([self._schema.root], document), MAX_ORDERS))

    def _ordered(self, parts: list, value):
        """The value in each order that subschemas, which all may apply to it, ask for."""
        if isinstance(value, list):
            inner = [list(itertools.islice(self._ordered(self._items(parts, i), item), 4))
                     for i, item in enumerate(value)]
            yield from (list(way) for way in itertools.product(*inner))
        elif isinstance(value, dict):
            for names in self._names(parts, set()):
                names = [*dict.fromkeys(name for name in names if name in value)]
                names += [name for name in value if name not in names]
                inner = [list(itertools.islice(self._ordered(self._members(parts, name),
                                                             value[name]), 4)) for name in names]
                for way in itertools.product(*inner):
                    yield dict(zip(names, way))
        else:
            yield value

    def _names(self, parts: list, seen: set) -> list[list[str]]:
        """Names of members as some subschemas order them: one list for each choice of parts."""
        ways: list[list[str]] = [[]]
        for part in parts:
            if not isinstance(part, dict) or id(part) in seen:
                continue
            for key, value in part.items():
                found: list[list[str]] = [[]]
                if key == "properties":
                    found = [list(value)]
                elif key == "$ref":
                    found = self._names([self._target(value)], seen | {id(part)})
                elif key == "allOf":
                    found = self._names(value, seen | {id(part)})
                elif key in APPLICATORS:
                    found = [names for each in value
                             for names in self._names([each], seen | {id(part)})]
                ways = [a + b for a in ways for b in found][:MAX_ORDERS]
            ways = [way + list(part.get("required", ())) for way in ways]
        return ways

    def _flat(self, parts: list, seen: frozenset = frozenset()) -> list[dict]:
        """Subschemas, and those that they apply to the same value."""
        flat = []
        for part in parts:
            if isinstance(part, dict) and id(part) not in seen:
                inner = [each for key in APPLICATORS for each in part.get(key, ())]
                inner += [self._target(part["$ref"])] if "$ref" in part else []
                flat += [part, *self._flat(inner, seen | {id(part)})]
        return flat

    def _members(self, parts: list, name: str) -> list:
        found = [part.get("properties", {}).get(name) for part in self._flat(parts)]
        return [each for each in found if each is not None] or [
            part["additionalProperties"] for part in self._flat(parts)
            if "additionalProperties" in part] + [
            each for part in self._flat(parts)
            for each in part.get("patternProperties", {}).values()]

    def _items(self, parts: list, index: int) -> list:
        found = []
        for part in self._flat(parts):
            first = part.get("prefixItems", part.get("items", []))
            if isinstance(first, list) and index < len(first):
                found.append(first[index])
            elif not isinstance(part.get("items", []), list):
                found.append(part["items"])
        return found

    def _target(self, ref):
        return self._schema._target(ref, "schema", self._schema.root)[0]


def can_be_written(model: engine.Model, new_reply, text: str) -> bool:
    """Whether a reply may be a text, and end there."""
    reply = new_reply()
    tokens = model.tokenize(text, bos=False, special=False).tolist()
    return all(reply.take(token) for token in tokens) and reply.take(min(model.end_tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--tools", action="store_true", help="as parameters, without strict")
    parser.add_argument("--names", action="store_true", help="print each refused or wrong one")
    options = parser.parse_args()
    model = engine.Model(Path(downloads.fetch(None, ROOT / "models")))
    counts: collections.Counter = collections.Counter()
    opened = gzip.open if options.file.suffix == ".gz" else open
    for line in opened(options.file, "rt"):
        row = json.loads(line)
        counts["schemas"] += 1
        try:
            form = structured.Form()
            form.root = form.add_part(structured.arguments_of(row["schema"], "schema", False)) \
                if options.tools else form.add_schema(row["schema"], "schema")
            new_reply = form.replies(model, must_trigger=True)
        except schemas.SchemaError as error:
            if options.names:
                print(f"{row.get('id')}: refused: {error}")
            continue
        counts["served"] += 1
        counts["loosened"] += bool(form.loosened)
        if options.names and form.loosened:
            print(f"{row.get('id')}: loosened: {', '.join(form.loosened)}")
        for is_valid, document in row["tests"]:
            if options.tools and not isinstance(document, dict):
                continue  # no arguments
            orders = Orders(row["schema"]).of(document) if is_valid else [document]
            written = any(can_be_written(model, new_reply, json.dumps(each, ensure_ascii=False))
                          for each in orders)
            counts[is_valid, written] += 1
            if options.names and written != is_valid:
                print(f"{row.get('id')}: {'not ' * is_valid}written: {json.dumps(document)[:300]}")
    n_valid = counts[True, True] + counts[True, False]
    how = f"as tools, {counts['loosened']} of them loosened" if options.tools else "strictly"
    print(f"served {how}: {counts['served']} of {counts['schemas']} "
          f"({counts['served'] / counts['schemas']:.1%})\n"
          f"valid documents that can be written: {counts[True, True]} of {n_valid} "
          f"({counts[True, True] / max(n_valid, 1):.2%})\n"
          f"invalid documents that can be written: {counts[False, True]} of "
          f"{counts[False, True] + counts[False, False]}")
    model.close()


if __name__ == "__main__":
    main()
