"""What is sent ends at the leftmost stop string, however the text was cut into pieces."""

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.stops import StopMatcher
from shared.errors import BadRequest


def one_shot(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The specification: look at the whole text at once."""
    places = [(text.find(stop), len(stop)) for stop in stops if stop in text]
    if not places:
        return text, None
    start, length = min(places)
    return text[: start + length if include else start], text[start : start + length]


def streamed(pieces: list[str], stops: list[str], include: bool) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, include)
    sent = []
    for piece in pieces:
        text, stopped = matcher.push(piece)
        sent.append(text)
        assert stopped == (matcher.stopped is not None)
        if stopped:
            assert matcher.push("more") == ("", True)
            break
    return "".join([*sent, matcher.flush()]), matcher.stopped


letters = st.text("ab", max_size=30) | st.text("abc\n<", max_size=40) | st.text(max_size=20)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=6) | st.text("abc\n<", min_size=1, max_size=4), max_size=5)


@settings(deadline=None)
@given(letters, stop_lists, st.lists(st.integers(0, 40), max_size=12), st.booleans())
@example("xabcx", ["abcd", "bc"], [1, 2, 3, 4], False)
@example("abc", ["abcd", "bc"], [1, 2], True)
@example("aab", ["aab", "ab"], [1, 2], False)
@example("abab", ["ab", "aba"], [], True)
def test_any_pieces_give_the_answer_of_the_whole_text(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [text[low:high] for low, high in pairwise(bounds)]
    assert streamed(pieces, stops, include) == one_shot(text, stops, include)
    assert streamed(list(text), stops, include) == one_shot(text, stops, include)


@settings(deadline=None)
@given(letters, stop_lists)
def test_nothing_is_held_back_that_could_not_begin_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    sent = ""
    for i, character in enumerate(text, 1):
        piece, stopped = matcher.push(character)
        sent += piece
        if stopped:
            return
        held = text[len(sent) : i]
        if matcher._match is None:
            assert not held or any(stop.startswith(held) for stop in stops)
        assert len(held) < max(map(len, stops), default=1)


def test_text_without_a_stop_passes_at_once() -> None:
    assert StopMatcher([]).push("anything") == ("anything", False)
    assert StopMatcher(["\n\n"]).push("one line\nanother") == ("one line\nanother", False)


def test_a_possible_beginning_waits_and_comes_out_when_it_is_none() -> None:
    matcher = StopMatcher(["</answer>"])
    assert matcher.push("42</ans") == ("42", False)
    assert matcher.push("W") == ("</ansW", False)
    assert matcher.push("</") == ("", False)
    assert matcher.flush() == "</"
    assert matcher.stopped is None


def test_the_leftmost_wins_though_another_is_complete_earlier() -> None:
    matcher = StopMatcher(["abcd", "bc"])
    assert matcher.push("abc") == ("", False)
    assert matcher.push("d") == ("", True)
    assert matcher.stopped == "abcd"


def test_a_match_that_waited_counts_when_the_stream_ends() -> None:
    matcher = StopMatcher(["abcd", "bc"])
    assert matcher.push("abc") == ("", False)
    assert matcher.flush() == "a"
    assert matcher.stopped == "bc"


def test_the_stop_string_is_sent_only_when_asked_for() -> None:
    assert StopMatcher(["END"]).push("the END of it") == ("the ", True)
    assert StopMatcher(["END"], include=True).push("the END of it") == ("the END", True)


def test_an_empty_stop_string_is_the_clients_error() -> None:
    with pytest.raises(BadRequest, match="stop string"):
        StopMatcher([""])


def test_a_long_stop_string_costs_a_constant_amount_per_character() -> None:
    steps = _Counted("a" * 5000 + "b")
    matcher = StopMatcher([steps])
    for _ in range(200):
        matcher.push("a" * 100)
    assert steps.looked_at < 6 * (20_000 + 5_001)


class _Counted(str):
    """Counts how often one of its characters was looked at."""

    looked_at = 0

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        self.looked_at += 1
        return super().__getitem__(index)
