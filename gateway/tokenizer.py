"""Text to token ids, and token ids to bytes.

Rule: a token stands for bytes, never for text: a character may be spread over several tokens. Who wants text gathers
bytes until they are whole characters (`detokenize.py`).
"""

from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path

import tokenizers

from gateway.model_files import load_card, load_tokenizer
from gateway.token_bytes import byte_characters, token_bytes
from gateway.words import Words
from shared.errors import BadRequest


class Tokenizer:
    """One model's vocabulary. Safe to share between threads; loading takes about 0.1 s."""

    def __init__(self, library: tokenizers.Tokenizer, vocabulary_size: int) -> None:
        self._library = library
        self._learns = True
        characters = {byte: character for character, byte in byte_characters().items() if byte < 128}
        self._words = Words.of(library, characters)
        self._adds_none = library.post_processor is None
        added = library.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self._bytes = token_bytes(library, vocabulary_size)

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer of a prepared model. Raises UnusableModel."""
        return cls(load_tokenizer(folder), load_card(folder).vocabulary_size)

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The ids of `text`.

        `add_special` puts the model's `bos` token first where the model wants one; a rendered chat template holds it
        already. `parse_special` reads `<|im_end|>` as that token and not as its letters (tokens that were added to a
        vocabulary but are not special are always read). Raises BadRequest for text that is not Unicode.
        """
        if self._words is not None and parse_special and (self._adds_none or not add_special):
            known = self._words.encode(text)
            if known is not None:
                return known
        library = self._library if parse_special else self._plain
        try:
            # the fast way keeps no offsets (2.5 times as fast at 10,000 tokens) and lets other threads run meanwhile
            return list(library.encode_batch_fast([text], add_special_tokens=add_special)[0].ids)
        except (TypeError, UnicodeEncodeError):
            if not any("\ud800" <= c <= "\udfff" for c in text):
                raise
            raise BadRequest("the text holds half of a surrogate pair: send whole Unicode characters") from None

    def learn_nothing(self) -> None:
        """From now on no text makes another one quicker: it would tell a tenant of another's words (law 10)."""
        self._learns = False
        self.__dict__.pop("_plain", None)
        _forget_words(self._library)
        if self._words is not None:
            self._words.learn_nothing(text.decode("ascii", "replace") for text in self._bytes)

    def token_bytes(self, id: int) -> bytes:
        """What one token stands for; nothing for an id without a token."""
        return self._bytes[id] if id < len(self._bytes) else b""

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = False) -> bytes:
        """What these tokens stand for together; special ones as they are written, or not at all."""
        return self.spelt(ids, self.special_ids if skip_special else ())

    def spelt(self, ids: Iterable[int], skipped: Collection[int]) -> bytes:
        """What these tokens stand for together, but for those of `skipped`."""
        return b"".join([self.token_bytes(id) for id in ids if id not in skipped])

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Their text; U+FFFD for what is no UTF-8."""
        return self.decode_bytes(ids, skip_special).decode("utf-8", "replace")

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        # a copy: the switch is a property of the library's object, which others use at the same time
        copy = tokenizers.Tokenizer.from_str(self._library.to_str())
        copy.encode_special_tokens = True
        if not self._learns:
            _forget_words(copy)
        return copy


def _forget_words(library: tokenizers.Tokenizer) -> None:
    """What the library keeps of words it has merged goes, and it keeps no more."""
    resize = getattr(library.model, "_resize_cache", None)  # of BPE and Unigram, which keep any
    if resize is not None:
        resize(0)
