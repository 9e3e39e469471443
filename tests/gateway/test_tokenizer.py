"""The tokenizer equals the original one. data/tokenizer_golden.json says how that was established."""

import hashlib
import json
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.model_files import load_tokenizer
from gateway.tokenizer import Tokenizer
from shared.errors import BadRequest
from tests.gateway.odd_strings import odd_strings
from tests.models import default_folder

GOLDEN = json.loads((Path(__file__).parent / "data" / "tokenizer_golden.json").read_text())
IM_START, IM_END = 1, 2


@cache
def shared() -> Tokenizer:
    return Tokenizer.load(default_folder())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return shared()


@pytest.fixture(scope="module")
def library() -> tokenizers.Tokenizer:
    return load_tokenizer(default_folder())


@pytest.fixture(scope="module")
def strings() -> list[str]:
    strings = odd_strings(GOLDEN["seed"], GOLDEN["count"])
    digest = hashlib.sha256("\0".join(strings).encode()).hexdigest()
    assert digest == GOLDEN["strings_sha256"], "the generator changed: write the golden file anew"
    return strings


def test_thousands_of_odd_strings_have_the_ids_of_the_original_tokenizer(
    tokenizer: Tokenizer, strings: list[str]
) -> None:
    assert len(strings) >= 5000
    for text, expected in zip(strings, GOLDEN["ids_sha256"], strict=True):
        ids = tokenizer.encode(text, add_special=False)
        assert hashlib.sha256(repr(ids).encode()).hexdigest()[:8] == expected, ascii(text)


def test_sample_strings_have_exactly_these_ids(tokenizer: Tokenizer) -> None:
    for text, ids in GOLDEN["samples"]:
        assert tokenizer.encode(text, add_special=False) == ids, ascii(text)


def test_digits_are_single_tokens_also_behind_spaces(tokenizer: Tokenizer) -> None:
    # where GPT-2's pre-tokeniser alone, which some converters assume for this model, would cut differently
    ids = tokenizer.encode("a  12", add_special=False)
    assert [tokenizer.token_bytes(id) for id in ids] == [b"a", b"  ", b"1", b"2"]


def test_what_is_encoded_decodes_to_itself(tokenizer: Tokenizer, strings: list[str]) -> None:
    spelt = {bytes([byte]) for byte in range(256)} & {tokenizer.token_bytes(id) for id in range(49152)}
    whole = 0
    for text in strings:
        if all(bytes([byte]) in spelt for byte in text.encode()):  # this vocabulary has no token for some bytes
            whole += 1
            assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text
            assert tokenizer.decode(tokenizer.encode(text, add_special=False, parse_special=False)) == text
    assert whole > 5000


def test_our_bytes_are_the_librarys_text(
    tokenizer: Tokenizer, library: tokenizers.Tokenizer, strings: list[str]
) -> None:
    for text in strings[::10]:
        ids = tokenizer.encode(text, add_special=False)
        assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=False)
        assert tokenizer.decode(ids, skip_special=True) == library.decode(ids, skip_special_tokens=True)


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=30))
def test_any_ids_decode_as_the_library_decodes_them(library: tokenizers.Tokenizer, ids: list[int]) -> None:
    assert shared().decode(ids) == library.decode(ids, skip_special_tokens=False)


def test_special_tokens_are_read_or_spelt_as_asked(tokenizer: Tokenizer) -> None:
    text = "<|im_start|>user<|im_end|>"
    read = tokenizer.encode(text, add_special=False)
    spelt = tokenizer.encode(text, add_special=False, parse_special=False)
    assert read[0] == IM_START and read[-1] == IM_END
    assert not tokenizer.special_ids & set(spelt)
    assert tokenizer.encode(text, add_special=False) == read, "one way of reading must not change the other"
    assert tokenizer.decode(read) == tokenizer.decode(spelt) == text
    assert tokenizer.decode(read, skip_special=True) == "user"


def test_the_empty_string_has_no_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


def test_half_a_surrogate_pair_is_the_clients_error(tokenizer: Tokenizer) -> None:
    for parse_special in (True, False):
        with pytest.raises(BadRequest, match="surrogate"):
            tokenizer.encode("a\ud800b", parse_special=parse_special)


def test_an_id_without_a_token_has_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(10**6) == b""
    assert tokenizer.decode([28120, 10**6]) == "hello"

