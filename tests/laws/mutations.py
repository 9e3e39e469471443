"""Documents and bytes that are bent, by a chooser: what fuzzers feed to those who read what others wrote.

Pure: the same chooser gives the same.
"""

import copy
import random
from collections.abc import Sequence
from typing import Any

DEEP = 20_000  # levels; no reader of ours needs twenty
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**70, -2**63, 10**400, 0.0, -0.0, 1.5,
    1e308, -1e308, float("inf"), float("nan"), "", "x", "\ud800", "\x00", "..", "../../etc/passwd", "/dev/zero", "none",
    "x" * 70_000, "{", "\u202e", [], [1], [None], [[]], ["x"] * 1000, {}, {"type": "x"}, {"": {}}, {"a": [{}]},
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all that stands in a document."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [found for key, inner in below for found in places(inner, (*path, key))]


def changed(document: Any, chooser: random.Random, odd: Sequence[Any] = ODD, most: int = 3) -> Any:
    """`document` with one to `most` values that are something else, gone, there twice or from elsewhere in it."""
    made = copy.deepcopy(document)
    for _ in range(chooser.randint(1, most)):
        everywhere = places(made)
        if not everywhere:
            return chooser.choice(odd)
        *way, last = chooser.choice(everywhere)
        inside = at(made, way)
        what = chooser.random()
        if what < 0.1:
            del inside[last]
        elif what < 0.2 and isinstance(inside, list):
            inside += [inside[last]] * chooser.choice((1, 2, 50))
        elif what < 0.3:
            inside[last] = copy.deepcopy(at(made, chooser.choice(everywhere)))
        elif what < 0.4 and isinstance(inside[last], int | float):
            inside[last] = chooser.choice((-inside[last], inside[last] + 1, inside[last] * 1000, str(inside[last])))
        else:
            inside[last] = copy.deepcopy(chooser.choice(odd))
    return made


def at(document: Any, path: Sequence[Any]) -> Any:
    """What stands there."""
    for key in path:
        document = document[key]
    return document


def nested(levels: int, chooser: random.Random) -> bytes:
    """JSON of so many levels, closed or not."""
    opening, closing = chooser.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")))
    return opening * levels + b"1" + closing * levels * chooser.randrange(2)


def bent(data: bytes, chooser: random.Random, within: int | None = None) -> bytes:
    """`data` with one to four changes in its first `within` bytes: other bits, numbers; parts gone or there twice."""
    made = bytearray(data)
    for _ in range(chooser.randint(1, 4)):
        end = min(len(made), within or len(made))
        if not end:
            return chooser.randbytes(8)
        place = chooser.randrange(end)
        match chooser.randrange(6):
            case 0:
                made[place] ^= 1 << chooser.randrange(8)
            case 1:
                made[place] = chooser.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                number = chooser.choice((0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1))
                made[place:place + 8] = number.to_bytes(8, "little")
            case 3:
                del made[place:place + chooser.choice((1, 8, 100))]
            case 4:
                made[place:place] = made[place:place + chooser.choice((1, 8, 100))]
            case _:
                del made[place:]
    return bytes(made)
