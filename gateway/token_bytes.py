"""The bytes that each token id stands for.

Byte-level vocabularies write each byte as one printable character; the table is the one GPT-2 introduced.
"""

import tokenizers


def token_bytes(library: tokenizers.Tokenizer, vocabulary_size: int) -> list[bytes]:
    """By id, `vocabulary_size` of them at least. An id without a token is padding of the embedding: no bytes."""
    added = library.get_added_tokens_decoder()
    found = [b""] * max(vocabulary_size, library.get_vocab_size())
    for token, id in library.get_vocab().items():
        found[id] = token.encode() if id in added else _bytes_of(token)
    return found


def byte_characters() -> dict[str, int]:
    """Character -> byte: printable Latin-1 stands for itself, the 68 others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = byte_characters()


def _bytes_of(token: str) -> bytes:
    """The bytes a vocabulary entry spells; an entry that is not spelt in byte characters is plain text."""
    try:
        return bytes([_BYTES[character] for character in token])
    except KeyError:
        return token.encode()
