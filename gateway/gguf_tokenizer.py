"""The tokenizer inside a GGUF file, as the document the `tokenizers` library reads.

A GGUF names its pre-tokeniser and leaves the meaning to the reader. `SPLITS` holds the names whose original tokenizer
is known; for any other a reader could only guess, and produce tokens the model was not trained on. Transformers'
reading is no guide for SmolLM2: it forgets that digits stand alone (tests/gateway/make_tokenizer_golden.py).
Pure.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

# token types of the format
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LOWER_WORD, _UPPER_WORD = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{case}" for case in (rf"*{_LOWER}+", rf"+{_LOWER}*")
)


class Split(Struct, frozen=True):
    """How text is cut before merges apply. No `pattern`: the one GPT-2 came with, built into the library."""

    pattern: str = ""
    single_digits: bool = False
    compose: bool = False  # normalise to NFC first
    whole_words: bool = False  # a piece that is a token is taken as it is, merges or not
    add_bos: bool = False  # where the metadata does not say


_LLAMA3 = Split(
    rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}",
    whole_words=True,
    add_bos=True,
)
SPLITS: Mapping[str, Split] = {
    "gpt-2": Split(),
    "gpt2": Split(),
    "smollm": Split(single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": Split(
        rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}", compose=True
    ),
    "gpt-4o": Split(
        rf"{_LOWER_WORD}{_ENGLISH}?|{_UPPER_WORD}{_ENGLISH}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}",
        whole_words=True,
    ),
    "tekken": Split(
        rf"{_LOWER_WORD}|{_UPPER_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}", whole_words=True, add_bos=True
    ),
}


def tokenizer_document(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], split: Split, bos: int | None
) -> dict[str, Any]:
    """What `tokenizer.json` holds for a byte-level vocabulary. Encoded text begins with `bos` unless that is None.

    `types`: the format's type of each token; unused ones pad the embedding and are left out.
    """
    vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": types[i] == CONTROL,
            }
            for token, i in vocabulary.items()
            if types[i] in (CONTROL, USER_DEFINED)
        ],
        "normalizer": {"type": "NFC"} if split.compose else None,
        "pre_tokenizer": _pre_tokenizer(split),
        "post_processor": None if bos is None else _bos_first(tokens[bos], bos),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": split.whole_words,
            "vocab": vocabulary,
            "merges": [merge.split(" ") for merge in merges],
        },
    }


def _pre_tokenizer(split: Split) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not split.pattern}
    first: list[dict[str, Any]] = []
    if split.single_digits:
        first.append({"type": "Digits", "individual_digits": True})
    if split.pattern:
        first.append(
            {"type": "Split", "pattern": {"Regex": split.pattern}, "behavior": "Isolated", "invert": False}
        )
    return {"type": "Sequence", "pretokenizers": [*first, byte_level]} if first else byte_level


def _bos_first(token: str, id: int) -> dict[str, Any]:
    bos = {"SpecialToken": {"id": token, "type_id": 0}}
    one, two = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [bos, one],
        "pair": [bos, one, bos, two],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    }
