"""Tokens to text: neither text nor count may depend on how tokens were batched."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from gateway.detokenize import Detokenizer
from gateway.replies import Choice
from gateway.stops import StopMatcher
from tests.gateway.fake_mesh import END, byte_tokenizer

TOKENIZER = byte_tokenizer()


def choice(*stops: str) -> Choice:
    return Choice(Detokenizer(TOKENIZER), StopMatcher(stops) if stops else None, (END,))


def read(tokens: list[int], cuts: list[int], *stops: str) -> tuple[str, int, bool]:
    """The text, count and end of `tokens`, pushed in pieces cut at `cuts`."""
    made, text = choice(*stops), ""
    edges = [0, *sorted(cut % (len(tokens) + 1) for cut in cuts), len(tokens)]
    for start, end in pairwise(edges):
        piece = made.push(tokens[start:end])
        text += piece.text
        if piece.stopped:
            return text, made.completion_tokens, True
    last = made.flush()
    return text + last.text, made.completion_tokens, last.stopped


@given(text=st.text(alphabet="abc é世", max_size=30), cuts=st.lists(st.integers(0, 100), max_size=6))
def test_pieces_do_not_matter(text: str, cuts: list[int]) -> None:
    tokens = [*text.encode(), END]
    assert read(tokens, cuts) == (text, len(tokens), False)
    for stops in (("bc",), ("ab", "b"), ("世",)):
        assert read(tokens, cuts, *stops) == read(tokens, [], *stops)


def test_a_stop_token_counts_and_shows_nothing() -> None:
    assert read([72, 105, END], []) == ("Hi", 3, False)


def test_a_stop_string_counts_up_to_the_token_that_completes_it() -> None:
    assert read([*b"one two three", END], [], "two") == ("one ", 7, True)


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    assert read([*"é".encode()[:1]], []) == ("\ufffd", 1, False)
