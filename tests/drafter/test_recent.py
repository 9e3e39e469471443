"""What an audience said lately is found until it is pushed out, and by nobody else."""

from drafter.automaton import Cursor
from drafter.drafting import Audience
from drafter.recent import LEAD_TOKENS, Recent, RecentTexts

ACME, RIVAL = Audience("acme", "m", "eu"), Audience("rival", "m", "eu")


def found(recent: Recent, audience: Audience, said: list[int]) -> int:
    """How many tokens of the end of `said` are known."""
    longest = 0
    for automaton in recent.of(audience):
        cursor = Cursor(automaton)
        for token in said:
            cursor.follow(token)
        longest = max(longest, cursor.length)
    return longest


def test_an_output_and_the_end_of_its_prompt_are_found_by_its_audience_alone() -> None:
    recent = Recent()
    recent.add(ACME, list(range(100)), 60)
    assert found(recent, ACME, [60, 61, 62]) == 3
    assert found(recent, ACME, [60 - LEAD_TOKENS]) == 1
    assert found(recent, ACME, [59 - LEAD_TOKENS]) == 0
    for stranger in (RIVAL, Audience("acme", "n", "eu"), Audience("acme", "m", "us")):
        assert recent.of(stranger) == ()


def test_an_output_of_one_token_is_not_worth_remembering() -> None:
    recent = Recent()
    recent.add(ACME, [1, 2, 3], 2)
    assert len(recent) == 0 and recent.tokens == 0


def test_old_texts_make_room_for_new_ones() -> None:
    recent = Recent(tokens_per_audience=200)
    recent.add(ACME, list(range(1000, 1050)), 0)
    assert found(recent, ACME, [1000, 1001]) == 2
    for number in range(10):
        recent.add(ACME, list(range(number * 100, number * 100 + 50)), 0)
        assert recent.tokens <= 200
    assert found(recent, ACME, [1000, 1001]) == 0
    assert found(recent, ACME, [900, 901, 902]) == 3


def test_of_a_text_too_long_to_remember_the_end_is_remembered() -> None:
    texts = RecentTexts(100)
    texts.add(list(range(1000)))
    assert len(texts) <= 50
    assert texts.young.step(0, 999) and not texts.young.step(0, 100)


def test_audiences_are_bounded_by_number_and_by_tokens_and_those_unused_for_longest_go() -> None:
    recent = Recent(max_audiences=3, max_tokens=1000)
    for name in "abc":
        recent.add(Audience(name, "m", "eu"), list(range(50)), 0)
    assert recent.of(Audience("a", "m", "eu"))
    recent.add(Audience("d", "m", "eu"), list(range(50)), 0)
    assert recent.of(Audience("b", "m", "eu")) == ()
    assert recent.of(Audience("a", "m", "eu"))
    recent.add(Audience("e", "m", "eu"), list(range(960)), 0)
    assert recent.tokens <= 1000
    assert recent.of(Audience("e", "m", "eu"))
