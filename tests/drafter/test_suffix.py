"""What was seen before is found again, and nothing else."""

import random
from array import array

from hypothesis import given
from hypothesis import strategies as st

from drafter.suffix import MAX_MATCH, MIN_MATCH, REACH, SEPARATOR, History, Match, RecentTexts, longer


def history(tokens: list[int]) -> History:
    text = History()
    text.extend(tokens)
    return text


def expected(text: History, most: int = 100) -> list[int]:
    match = text.longest_match(text.tokens, most)
    return match.tokens if match else []


def test_repetitive_text_goes_on_as_it_did_beyond_its_own_end() -> None:
    assert expected(history([1, 2, 3, 4, 5] * 3), 12) == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2]
    assert expected(history([7] * 10), 4) == [7, 7, 7, 7]


def test_a_quotation_goes_on_as_its_source() -> None:
    source = list(range(100, 140))
    text = history([*source, 1, 2, 3, *source[10:16]])
    assert expected(text, 6) == source[16:22]


def test_text_without_repetition_gives_silence() -> None:
    assert expected(history(list(range(1000)))) == []
    assert expected(history([])) == []
    assert expected(history([1, 2])) == []


def test_a_match_shorter_than_the_minimum_is_no_reason() -> None:
    assert expected(history([1, 2, 3, 4, 9, 9, 8, 4])) == []
    assert expected(history([1, 2, 3, 4, 9, 9, 8, 3, 4])) == [9, 9, 8, 3]


def test_the_longest_match_decides_over_the_latest() -> None:
    text = history([1, 2, 3, 4, 5, 77, 0, 9, 3, 4, 5, 88, 0, 1, 2, 3, 4, 5])
    match = text.longest_match(text.tokens, 1)
    assert match == Match(5, [77])


def test_among_equally_long_matches_the_most_frequent_then_the_latest() -> None:
    often = [10, 1, 2, 3, 5, 11, 1, 2, 3, 5, 12, 1, 2, 3, 6, 13, 1, 2, 3]
    assert expected(history(often), 1) == [5]
    once = [10, 1, 2, 3, 5, 11, 1, 2, 3, 6, 13, 1, 2, 3]
    assert expected(history(once), 1) == [6]


def test_a_short_match_reaches_less_far_than_a_long_one() -> None:
    source = list(range(100, 200))
    assert len(expected(history([*source, 1, *source[:3]]), 90)) == 3 * REACH
    assert len(expected(history([*source, 1, *source[:10]]), 90)) == 10 * REACH


def test_nothing_is_matched_or_continued_across_a_separator() -> None:
    text = history([SEPARATOR, 1, 2, 3, 4, SEPARATOR, 5, 6, 7, 8, SEPARATOR])
    assert text.longest_match(array("I", [9, 2, 3, 4]), 9) is None
    assert text.longest_match(array("I", [0, 1, 2, 3]), 9) == Match(3, [4])
    assert text.longest_match(array("I", [3, 4, SEPARATOR]), 9) is None


def test_a_token_that_is_none_is_refused_and_changes_nothing() -> None:
    text = history([1, 2, 3])
    for bad in ([4, -1], [4, 2**32]):
        try:
            text.extend(bad)
        except OverflowError:
            pass
        else:
            raise AssertionError("accepted")
    assert text.tokens.tolist() == [1, 2, 3]


@given(st.lists(st.integers(0, 3), max_size=120), st.integers(1, 12))
def test_a_proposal_is_always_what_followed_an_occurrence_of_the_end(tokens: list[int], most: int) -> None:
    text = history(tokens)
    match = text.longest_match(text.tokens, most)
    best = 0
    followed: set[int] = set()
    for end in range(len(tokens)):
        length = 0
        while length < min(end, MAX_MATCH) and tokens[end - 1 - length] == tokens[len(tokens) - 1 - length]:
            length += 1
        if length >= MIN_MATCH and length >= best:
            followed = followed if length == best else set()
            best = length
            followed.add(tokens[end])
    if match is None:
        assert best == 0
        return
    # only the latest candidates are tried, so the match may be shorter than the best
    assert MIN_MATCH <= match.length <= best
    assert 1 <= len(match.tokens) <= most
    said = tokens[len(tokens) - match.length:]
    assert any(tokens[i:i + match.length + 1] == [*said, match.tokens[0]] for i in range(len(tokens)))
    if match.length == best:
        assert match.tokens[0] in followed


@given(st.lists(st.lists(st.integers(0, 5), max_size=30), max_size=12))
def test_a_text_that_grows_in_pieces_is_the_text(pieces: list[list[int]]) -> None:
    grown = History()
    for piece in pieces:
        grown.extend(piece)
    whole = history([token for piece in pieces for token in piece])
    assert grown.tokens == whole.tokens
    assert grown.longest_match(grown.tokens, 9) == whole.longest_match(whole.tokens, 9)


def test_a_token_costs_less_than_twenty_bytes() -> None:
    rng = random.Random(3)
    text = History()
    for _ in range(1000):
        text.extend([rng.randrange(50_000) for _ in range(20)])
    assert text.bytes_estimate / len(text) < 20


def test_recent_texts_are_found_until_they_are_pushed_out() -> None:
    recent = RecentTexts(max_tokens=200)
    first = list(range(1000, 1050))
    recent.add(first)
    assert recent.longest_match(array("I", first[:10]), 5) == Match(10, first[10:15])
    for number in range(10):
        recent.add(list(range(number * 100, number * 100 + 50)))
        assert len(recent) <= 202
    assert recent.longest_match(array("I", first[:10]), 5) is None
    assert recent.longest_match(array("I", range(900, 910)), 3) == Match(10, [910, 911, 912])


def test_of_a_text_too_long_to_remember_the_end_is_remembered() -> None:
    recent = RecentTexts(max_tokens=100)
    recent.add(list(range(1000)))
    assert recent.longest_match(array("I", [990, 991, 992]), 3) == Match(3, [993, 994, 995])
    assert len(recent) <= 102


def test_the_longer_of_two_matches_and_the_first_of_equals() -> None:
    short, long, empty = Match(3, [1]), Match(5, [2]), Match(9, [])
    assert longer(short, long) == long == longer(long, short)
    assert longer(short, Match(3, [9])) == short
    assert longer(short, empty) == short == longer(empty, short)
    assert longer(None, None) is None and longer(None, empty) is None
