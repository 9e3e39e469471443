"""Words looked up have the ids that the library computes, for every way of cutting text that is known here."""

import json
from functools import cache
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import gateway.words
from gateway.gguf_tokenizer import CONTROL, SPLITS, USER_DEFINED, tokenizer_document
from gateway.tokenizer import byte_characters
from gateway.words import Words
from tests.gateway.odd_strings import odd_strings
from tests.models import default_folder

SPELLING = {byte: character for character, byte in byte_characters().items() if byte < 128}
SPECIAL = ("<|a|>", "<|a|>b", "<|b|>", "\n\n\n")
PIECES = (" ", "  ", "\n", "\r\n", "\t", "\x0b", "\x1c", "\x00", "'", "'s", "'S", "'ll", "'LL", "a", "the", "The",
          "THE", "x", "0", "12", "12345", ".", "...", "/", "//\n", "_", "<|a|>", "<|a|>b", "<|b|>", "<|a", "|>",
          "\n\n\n", "\xe9", "\u017f")


@cache
def library_of(name: str) -> tokenizers.Tokenizer:
    """A small vocabulary with merges, cut as `name` says."""
    spelt = [character for character, _ in sorted(byte_characters().items(), key=lambda known: known[1])]
    space, line = (spelt[byte] for byte in b" \n")
    merges = [("t", "h"), ("th", "e"), (space, "the"), (space, space), (line, line), ("1", "2"), ("'", "s"), ("l", "l"),
              (".", "."), ("..", "."), (space, "a"), ("T", "h"), ("/", "/"), ("//", line), (space, "'")]
    tokens = [*spelt, *dict.fromkeys(left + right for left, right in merges)]
    types = [1] * len(tokens) + [CONTROL] * 3 + [USER_DEFINED]
    document = tokenizer_document([*tokens, *SPECIAL], types, [" ".join(merge) for merge in merges], SPLITS[name], None)
    return tokenizers.Tokenizer.from_str(json.dumps(document))


@cache
def words_of(name: str) -> Words:
    words = Words.of(library_of(name), SPELLING)
    assert words is not None
    return words


@settings(deadline=None)
@given(name=st.sampled_from(sorted(SPLITS)),
       text=st.lists(st.sampled_from(PIECES) | st.characters(max_codepoint=127), max_size=24).map("".join))
def test_any_text_has_the_librarys_ids_or_is_left_to_it(name: str, text: str) -> None:
    found = words_of(name).encode(text)
    if text.isascii():
        assert found == library_of(name).encode(text, add_special_tokens=False).ids
    else:
        assert found is None


@settings(deadline=None)
@given(name=st.sampled_from(sorted(SPLITS)), texts=st.lists(
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join), min_size=1, max_size=6))
def test_who_learns_nothing_gives_the_same_ids_and_knows_afterwards_what_it_knew(name: str, texts: list[str]) -> None:
    words = Words.of(library_of(name), SPELLING)
    assert words is not None
    words.encode("of before")
    words.learn_nothing(library_of(name).decode([id]) for id in range(library_of(name).get_vocab_size()))
    known = dict(words._known)
    assert known and "before" not in known and " before" not in known
    for text in texts:
        if text.isascii():
            assert words.encode(text) == library_of(name).encode(text, add_special_tokens=False).ids
    assert words._known == known


def test_the_default_models_odd_strings_have_the_librarys_ids() -> None:
    library = tokenizers.Tokenizer.from_file(str(default_folder() / "tokenizer.json"))
    words = Words.of(library, SPELLING)
    assert words is not None
    seen = 0
    for text in odd_strings(7, 3000):
        if (found := words.encode(text)) is not None:
            assert found == library.encode(text, add_special_tokens=False).ids, ascii(text)
            seen += 1
    assert seen > 300


def test_a_long_text_is_left_to_the_library() -> None:
    assert words_of("smollm").encode("a" * gateway.words.MOST_CHARACTERS) is not None
    assert words_of("smollm").encode("a" * (gateway.words.MOST_CHARACTERS + 1)) is None


def test_words_are_forgotten_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.words, "MOST_WORDS", 4)
    words = Words.of(library_of("smollm"), SPELLING)
    assert words is not None
    text = "one two three four five six one two"
    for _ in range(3):
        assert words.encode(text) == library_of("smollm").encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("change", [
    {"pre_tokenizer": {"type": "Whitespace"}},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
    {"normalizer": {"type": "Lowercase"}},
    {"padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "!"}},
])
def test_a_tokenizer_that_works_otherwise_is_left_alone(change: dict[str, Any]) -> None:
    document = json.loads(library_of("smollm").to_str()) | change
    assert Words.of(tokenizers.Tokenizer.from_str(json.dumps(document)), SPELLING) is None


@pytest.mark.parametrize("trait", ["lstrip", "rstrip", "single_word", "normalized"])
def test_special_tokens_that_look_around_them_are_left_to_the_library(trait: str) -> None:
    document = json.loads(library_of("smollm").to_str())
    document["added_tokens"][0][trait] = True
    assert Words.of(tokenizers.Tokenizer.from_str(json.dumps(document)), SPELLING) is None


@pytest.mark.parametrize("pattern", [r"\p{N}{1,3}+|\s+|\S+", r"(a)|\s+|\S+", r"[a&&[b]]|\S+", r"\p{Greek}+|\S+",
                                     r"\w+|\W+", "a|"])
def test_patterns_that_two_engines_may_read_differently_are_left_to_the_library(pattern: str) -> None:
    document = json.loads(library_of("qwen2").to_str())
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}
    words = Words.of(tokenizers.Tokenizer.from_str(json.dumps(document)), SPELLING)
    assert words is None or words.encode("some text") is None
