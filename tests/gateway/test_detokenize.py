"""Text comes out while tokens come in, and nothing depends on how they were batched."""

from functools import cache
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.detokenize import Detokenizer
from gateway.tokenizer import Tokenizer
from tests.models import default_folder

IM_END = 2


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(default_folder())


@cache
def byte_tokens() -> list[int]:
    """Tokens that are a single byte: any order of them is any sequence of bytes, mostly no UTF-8."""
    return [id for id in range(49152) if len(tokenizer().token_bytes(id)) == 1]


def pushed(ids: list[int], cuts: list[int], skip_special: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer(), skip_special)
    bounds = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    pieces = [detokenizer.push(ids[low:high]) for low, high in pairwise(bounds)]
    return [*pieces, detokenizer.flush()]


any_ids = st.lists(st.integers(0, 49160), max_size=40)
byte_ids = st.lists(st.integers(0, 10**6), max_size=40).map(
    lambda numbers: [byte_tokens()[n % len(byte_tokens())] for n in numbers]
)
text_ids = st.text(max_size=30).map(lambda text: tokenizer().encode(text, add_special=False))


@settings(deadline=None)
@given(any_ids | byte_ids | text_ids, st.lists(st.integers(0, 100), max_size=10), st.booleans())
def test_any_tokens_in_any_batches_give_the_text_of_all_at_once(
    ids: list[int], cuts: list[int], skip_special: bool
) -> None:
    assert "".join(pushed(ids, cuts, skip_special)) == tokenizer().decode(ids, skip_special)


@settings(deadline=None)
@given(st.text(max_size=30))
def test_a_character_spread_over_tokens_never_shows_a_replacement(text: str) -> None:
    text = text.replace("\N{REPLACEMENT CHARACTER}", "")
    ids = tokenizer().encode(text, add_special=False, parse_special=False)
    if tokenizer().decode(ids) == text:  # a few control characters have no token
        detokenizer = Detokenizer(tokenizer())
        assert all("\N{REPLACEMENT CHARACTER}" not in detokenizer.push([id]) for id in ids)
        assert detokenizer.flush() == ""


def test_an_emoji_appears_with_its_last_byte() -> None:
    ids = tokenizer().encode("🫠", add_special=False)
    assert len(ids) > 1
    detokenizer = Detokenizer(tokenizer())
    assert [detokenizer.push([id]) for id in ids] == [""] * (len(ids) - 1) + ["🫠"]


def test_bytes_that_no_character_begins_with_are_replaced_at_once() -> None:
    continuation = next(id for id in byte_tokens() if tokenizer().token_bytes(id) == b"\x80")
    assert Detokenizer(tokenizer()).push([continuation]) == "\N{REPLACEMENT CHARACTER}"


def test_an_unfinished_character_is_replaced_when_the_stream_ends() -> None:
    detokenizer = Detokenizer(tokenizer())
    assert detokenizer.push(tokenizer().encode("🫠", add_special=False)[:-1]) == ""
    assert detokenizer.flush() == "\N{REPLACEMENT CHARACTER}"
    assert detokenizer.flush() == ""


def test_special_tokens_are_shown_only_when_asked_for() -> None:
    ids = [*tokenizer().encode("hello", add_special=False), IM_END]
    assert Detokenizer(tokenizer()).push(ids) == "hello"
    assert Detokenizer(tokenizer(), skip_special=False).push(ids) == "hello<|im_end|>"
