"""The automaton knows of every phrase of its text what looking through the text would find."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafter.automaton import MOST_LINKS, SEPARATOR, Automaton, Cursor

texts = st.lists(st.integers(0, 3), max_size=MOST_LINKS)


def automaton(tokens: Sequence[int]) -> Automaton:
    made = Automaton()
    made.extend(tokens)
    return made


def ends(text: Sequence[int], phrase: Sequence[int]) -> list[int]:
    """Where `phrase` ends in `text`."""
    return [end for end in range(len(phrase), len(text) + 1) if list(text[end - len(phrase):end]) == list(phrase)]


def state_of(made: Automaton, phrase: Sequence[int]) -> int | None:
    state = 0
    for token in phrase:
        state = made.step(state, token)
        if not state:
            return None
    return state


@given(texts)
def test_every_phrase_is_known_with_its_places_and_what_followed(text: list[int]) -> None:
    made = automaton(text)
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            phrase = text[start:end]
            places = ends(text, phrase)
            state = state_of(made, phrase)
            assert state is not None
            assert made.latest(state) == places[-1]
            after = {text[place] for place in places if place < len(text)}
            found = made.continuations(state)
            assert {token for token, _, _ in found} == after
            for token, behind, times in found:
                assert times == len(ends(text, [*phrase, token]))
                assert behind == state_of(made, [*phrase, token])
            usual = [(times, made.latest(behind)) for _, behind, times in found]
            assert usual == sorted(usual, reverse=True)
            assert made.likeliest(state) == ((*found[0], sum(times for times, _ in usual)) if found else None)


@given(texts, st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_a_phrase_that_was_never_said_is_not_known(text: list[int], phrase: list[int]) -> None:
    assert (state_of(automaton(text), phrase) is not None) == bool(ends(text, phrase))


@given(texts)
def test_the_longest_end_that_stood_before_is_known_after_every_token(text: list[int]) -> None:
    made = Automaton()
    for length, token in enumerate(text, 1):
        made.append(token)
        said = text[:length]
        longest = max(size for size in range(length) if size == 0 or len(ends(said, said[length - size:])) > 1)
        assert made.length(made.before) == longest
        assert len(made) == length


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2)), max_size=60))
def test_a_cursor_stands_at_the_longest_end_while_the_automaton_grows(turns: list[tuple[bool, int]]) -> None:
    made = Automaton()
    cursor = Cursor(made)
    text: list[int] = []
    followed: list[int] = []
    longest = 0
    for grows, token in turns:
        if grows:
            text.append(token)
            made.append(token)
            continue
        followed.append(token)
        cursor.follow(token)
        # a phrase that came into the text later is found from its next token on
        longest = max(size for size in range(min(longest + 1, len(followed)) + 1)
                      if size == 0 or ends(text, followed[len(followed) - size:]))
        assert cursor.length == longest
        if longest:
            assert cursor.settled() == state_of(made, followed[len(followed) - longest:])


def test_nothing_is_guessed_past_a_separator() -> None:
    made = automaton([SEPARATOR, 1, 2, SEPARATOR, 1, 3, SEPARATOR])
    one = made.step(0, 1)
    assert {token for token, _, _ in made.continuations(one)} == {2, 3}
    for last in (2, 3):
        state = made.step(one, last)
        assert made.continuations(state) == [] and made.likeliest(state) is None
    assert SEPARATOR not in {token for token, _, _ in made.continuations(0)}


def test_a_text_of_one_word_takes_no_longer_than_any_other() -> None:
    made = automaton([7] * 20_000)
    assert made.length(made.before) == 19_999
    assert made.bytes_estimate < 20_000 * 40


@pytest.mark.parametrize("token", [-1, 2**32])
def test_what_is_no_token_is_refused_and_changes_nothing(token: int) -> None:
    made = automaton([1, 2, 1])
    with pytest.raises(OverflowError, match="no token id"):
        made.append(token)
    assert len(made) == 3 and made.length(made.before) == 1


def test_a_token_costs_less_than_two_hundred_bytes() -> None:
    rng = random.Random(3)
    words = [[rng.randrange(50_000) for _ in range(rng.randrange(1, 9))] for _ in range(400)]
    made = Automaton()
    while len(made) < 20_000:
        made.extend(rng.choice(words) if rng.random() < 0.7 else [rng.randrange(50_000)])
    assert made.bytes_estimate / len(made) < 200
