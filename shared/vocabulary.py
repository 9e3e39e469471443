"""A model's vocabulary as bytes: what a worker must know of text to keep to a grammar, and all it ever knows.

The gateway writes it beside the model when that is prepared; a worker reads it when the first grammar comes.
"""

from pathlib import Path

import msgspec
from msgspec import Struct

FILE = "vocabulary.msgpack"


class Vocabulary(Struct, frozen=True):
    """By token id. `digest` is that of the model's card; `end_ids` end a turn; `special_ids` stand for no text."""

    digest: str
    tokens: list[bytes]
    end_ids: list[int]
    special_ids: list[int]


def encode_vocabulary(vocabulary: Vocabulary) -> bytes:
    """The bytes of the file."""
    return msgspec.msgpack.encode(vocabulary)


def load_vocabulary(path: Path) -> Vocabulary | None:
    """What the file holds; None where there is none. Raises ValueError for a damaged one."""
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=Vocabulary)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path} is no vocabulary ({error}): run `tokenmill pull` again") from None
