"""What an answer is made of: text, thoughts, and calls of tools.

Law: the parts of a stream, adjacent ones of a kind joined, do not depend on how its text was cut into pieces.
Pure.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple


class Said(NamedTuple):
    """Text for the client."""

    text: str


class Thought(NamedTuple):
    """Text that the model wrote for itself."""

    text: str


class Called(NamedTuple):
    """A call of this tool begins; what is `Argued` up to its `CallEnded` are its arguments, a JSON object."""

    name: str


class Argued(NamedTuple):
    text: str


class CallEnded(NamedTuple):
    """The arguments are whole. A call that was cut off has no end."""


Part = Said | Thought | Called | Argued | CallEnded
Pieces = Said | Thought | Argued  # of which several in a row are one text


class Reader(ABC):
    """One stream of text, read into parts."""

    thinking = False  # what comes next belongs to a thought, as far as was read

    @abstractmethod
    def push(self, text: str) -> list[Part]:
        """What is certain with this text. What may still become a call, or the mark of one, is held back."""

    @abstractmethod
    def flush(self) -> list[Part]:
        """What was held back, now that no text follows."""


def joined(parts: Iterable[Part]) -> list[Part]:
    """Adjacent pieces of one text as one; empty ones left out."""
    found: list[Part] = []
    for kind, alike in groupby((part for part in parts if not isinstance(part, Pieces) or part.text), type):
        if issubclass(kind, Pieces):
            found.append(kind("".join(part.text for part in alike if isinstance(part, Pieces))))
        else:
            found += alike
    return found


def could_begin(text: str, marks: Iterable[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `marks`, all of it not yet there."""
    longest = 0
    for mark in marks:
        for length in range(min(len(mark) - 1, len(text)), longest, -1):
            if text.endswith(mark[:length]):
                longest = length
                break
    return longest


def first_of(text: str, marks: Iterable[str]) -> tuple[int, str] | None:
    """Where the first of `marks` stands in `text`, and which it is; the longer of two at one place."""
    found = [(place, -len(mark), mark) for mark in marks if (place := text.find(mark)) >= 0]
    if not found:
        return None
    place, _, mark = min(found)
    return place, mark
