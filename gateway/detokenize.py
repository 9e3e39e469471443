"""Token ids to text while they come.

Law: the pieces of one stream, joined, are what `Tokenizer.decode` makes of all its tokens at once, however they were
batched. Text is given out when it is certain: the bytes of an unfinished character wait for the rest.
Pure. Work per token does not grow with the stream.
"""

import codecs
from collections.abc import Collection, Iterable

from gateway.tokenizer import Tokenizer

_Utf8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """One stream."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, shown: Collection[int] = ()) -> None:
        """`shown`: special tokens that are not skipped."""
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids.difference(shown) if skip_special else frozenset()
        self._decoder = _Utf8("replace")
        self._open = False  # a character has begun and is not complete

    def push(self, tokens: Iterable[int]) -> str:
        """The text these tokens complete; perhaps none."""
        data = self._tokenizer.spelt(tokens, self._skipped)
        if not self._open and data.isascii():
            return data.decode("ascii")
        text = self._decoder.decode(data)
        self._open = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        """What is left when no token follows: U+FFFD for an unfinished character, or nothing."""
        self._open = False
        return self._decoder.decode(b"", final=True)
