"""JSON schemas by the number: random, but the same for the same number on every machine.

Rule: every schema has an end in sight (lengths and counts are bounded), so that even a model that chooses at random
finishes. Objects, arrays, enums, constants, bounded strings, patterns, formats, integers and numbers in ranges, anyOf,
null, nested and through $ref.
Pure.
"""

import random
from typing import Any

WORDS = ("name", "age", "city", "tags", "price", "unit", "id", "status", "note", "items", "größe", "a b", "x-1")
PATTERNS = ("^[a-z]{2,5}$", "^(ok|no) [0-9]{1,3}$", "^[A-F0-9]{4}-[A-F0-9]{4}$", "^#[0-9a-f]{6}$")
FORMATS = ("date", "time", "uuid", "ipv4")
DEEPEST = 3

Schema = dict[str, Any]


def schema(number: int) -> Schema:
    """Schema `number`: an object, or now and then something else."""
    chooser = random.Random(f"schema {number}")
    definitions: dict[str, Schema] = {}
    made = _object(chooser, 0, definitions) if chooser.random() < 0.85 else _any(chooser, 0, definitions)
    return {**made, "$defs": definitions} if definitions else made


def _any(chooser: random.Random, depth: int, definitions: dict[str, Schema]) -> Schema:
    kinds = [_string, _string, _integer, _number, _enum, _constant, _boolean, _pattern, _format]
    if depth < DEEPEST:
        kinds += [_object, _array, _either, _reference]
    return chooser.choice(kinds)(chooser, depth, definitions)


def _object(chooser: random.Random, depth: int, definitions: dict[str, Schema]) -> Schema:
    names = chooser.sample(WORDS, chooser.randint(1, 4 if depth == 0 else 2))
    properties = {name: _any(chooser, depth + 1, definitions) for name in names}
    required = [name for name in names if chooser.random() < 0.7]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(chooser: random.Random, depth: int, definitions: dict[str, Schema]) -> Schema:
    least = chooser.randint(0, 2)
    return {"type": "array", "items": _any(chooser, depth + 1, definitions), "minItems": least,
            "maxItems": least + chooser.randint(0, 2)}


def _either(chooser: random.Random, depth: int, definitions: dict[str, Schema]) -> Schema:
    return {"anyOf": [_any(chooser, depth + 1, definitions), {"type": "null"}]}


def _reference(chooser: random.Random, depth: int, definitions: dict[str, Schema]) -> Schema:
    name = f"part{len(definitions)}"
    definitions[name] = {}  # its place, before what it holds takes the next
    definitions[name] = _any(chooser, depth + 1, definitions)
    return {"$ref": f"#/$defs/{name}"}


def _string(chooser: random.Random, depth: int, definitions: dict[str, Schema]) -> Schema:
    least = chooser.choice([0, 0, 1, 3])
    return {"type": "string", "minLength": least, "maxLength": least + chooser.randint(1, 12)}


def _pattern(chooser: random.Random, depth: int, definitions: dict[str, Schema]) -> Schema:
    return {"type": "string", "pattern": chooser.choice(PATTERNS)}


def _format(chooser: random.Random, depth: int, definitions: dict[str, Schema]) -> Schema:
    return {"type": "string", "format": chooser.choice(FORMATS)}


def _integer(chooser: random.Random, depth: int, definitions: dict[str, Schema]) -> Schema:
    least = chooser.randint(-1000, 1000)
    return {"type": "integer", "minimum": least, "maximum": least + chooser.randint(0, 5000)}


def _number(chooser: random.Random, depth: int, definitions: dict[str, Schema]) -> Schema:
    least = chooser.randint(-100, 100)
    return {"type": "number", "minimum": least, "maximum": least + chooser.randint(1, 100)}


def _enum(chooser: random.Random, depth: int, definitions: dict[str, Schema]) -> Schema:
    return {"enum": chooser.sample(["red", "green", "a\"b", "", 1, 2.5, None, True], chooser.randint(1, 4))}


def _constant(chooser: random.Random, depth: int, definitions: dict[str, Schema]) -> Schema:
    return {"const": chooser.choice(["fixed", 7, None, False])}


def _boolean(chooser: random.Random, depth: int, definitions: dict[str, Schema]) -> Schema:
    return {"type": "boolean"}
