"""Tokens to text: neither text nor count may depend on how tokens were batched."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from gateway.detokenize import Detokenizer
from gateway.dialects.dialect import Dialect
from gateway.replies import Choice, ReadChoice
from gateway.stops import StopMatcher
from tests.gateway.fake_mesh import END, byte_tokenizer

TOKENIZER = byte_tokenizer()


def choice(*stops: str) -> Choice:
    return Choice(Detokenizer(TOKENIZER), StopMatcher(stops) if stops else None, (END,))


def said(text: str, cuts: list[int], *stops: str, shows_thoughts: bool = True) -> tuple[str, str | None]:
    """What is shown of an answer in harmony that is read for thoughts, and the stop string that ended it."""
    reader = Dialect("harmony", "harmony").reader((), False)
    assert reader is not None
    made = ReadChoice(reader, Detokenizer(TOKENIZER), StopMatcher(stops), (END,), shows_thoughts=shows_thoughts)
    tokens, shown = [*text.encode(), END], ""
    for start, end in pairwise([0, *sorted(cut % (len(tokens) + 1) for cut in cuts), len(tokens)]):
        piece = made.push(tokens[start:end])
        shown += piece.text
        if piece.stopped:
            return shown, made.stopped
    return shown + made.flush().text, made.stopped


def message(channel: str, text: str) -> str:
    return f"<|channel|>{channel}<|message|>{text}<|end|>"


@given(cuts=st.lists(st.integers(0, 300), max_size=6), shows_thoughts=st.booleans())
def test_a_stop_string_does_not_reach_across_a_thought(cuts: list[int], shows_thoughts: bool) -> None:
    text = message("commentary", "ab") + message("analysis", "bc b") + message("final", "cd.")
    for stop, found in (("bc", ("abcd.", None)), ("d", ("abc", "d")), ("b", ("a", "b")), ("ab", ("", "ab"))):
        assert said(text, cuts, stop, shows_thoughts=shows_thoughts) == found
    # one that waits for an earlier one, which the thought cuts off
    assert said(message("final", "abc") + message("analysis", "hm"), cuts, "abcd", "c") == ("ab", "c")


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
