"""What usually followed is what is said, as far as it is worth it, and what else may come is prepared for."""

import random
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from drafter.automaton import SEPARATOR
from drafter.drafting import Ask, Audience, Continuation, Key, Stream
from drafter.suffix import ABSORB_TOKENS, LEAST_SURVIVAL, SuffixDraftsman

S, T = Key("w0", "s", 1), Key("w0", "t", 1)
ACME = Audience("acme", "m", "eu")
NO_LIMIT = float("inf")


def said(draftsman: SuffixDraftsman, key: Key = S, length: int = 18, lead: int = 0, branches: int = 0,
         audience: Audience | None = None) -> list[Continuation]:
    return draftsman.propose([Ask(key, length, lead, branches, audience)], NO_LIMIT)


def first(draftsman: SuffixDraftsman, key: Key = S, length: int = 18, lead: int = 0,
          audience: Audience | None = None) -> list[int]:
    found = said(draftsman, key, length, lead, 0, audience)
    return list(found[0].tokens) if found else []


def opened(tokens: list[int], prompt_tokens: int | None = None, prediction: list[int] | None = None,
           key: Key = S, draftsman: SuffixDraftsman | None = None) -> SuffixDraftsman:
    draftsman = draftsman or SuffixDraftsman()
    draftsman.open(key, Stream(tokens, len(tokens) if prompt_tokens is None else prompt_tokens,
                               prediction=prediction or ()))
    return draftsman


def test_repetitive_text_goes_on_as_it_did_beyond_its_own_end() -> None:
    assert first(opened([1, 2, 3, 4, 5] * 6), length=12) == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2]
    assert first(opened([7] * 20), length=4) == [7, 7, 7, 7]


def test_a_quotation_goes_on_as_its_source() -> None:
    source = list(range(100, 140))
    found = first(opened([*source, 1, 2, 3, *source[10:20]]))
    assert found == source[20:20 + len(found)]
    assert len(found) >= 4


def test_text_without_repetition_gives_silence() -> None:
    assert said(opened(list(range(1000)))) == []
    assert said(opened([])) == []
    assert said(opened([1, 2])) == []


def test_one_word_is_a_weak_reason_and_two_are_a_better_one() -> None:
    (one,) = said(opened([1, 2, 3, 4, 9, 9, 8, 4]))
    (two,) = said(opened([1, 2, 3, 4, 9, 9, 8, 3, 4]))
    assert one.tokens[0] == two.tokens[0] == 9
    assert one.confidence[0] < two.confidence[0] < 0.6


def test_the_longest_phrase_decides_over_the_latest() -> None:
    assert first(opened([1, 2, 3, 4, 5, 77, 0, 9, 3, 4, 5, 88, 0, 1, 2, 3, 4, 5]), length=1) == [77]


def test_of_what_followed_a_phrase_the_usual_is_said_and_of_equals_the_latest() -> None:
    often = [10, 1, 2, 3, 5, 11, 1, 2, 3, 5, 12, 1, 2, 3, 6, 13, 1, 2, 3]
    assert first(opened(often), length=1) == [5]
    assert first(opened([10, 1, 2, 3, 5, 11, 1, 2, 3, 6, 13, 1, 2, 3]), length=1) == [6]


def test_a_proposal_ends_where_little_of_it_is_likely_to_be_reached() -> None:
    source = list(range(100, 200))
    short, long = (said(opened([*source, 1, *source[:matched]]), length=90)[0] for matched in (2, 30))
    assert 0 < len(short.tokens) < len(long.tokens)
    for continuation in (short, long):
        reach = 1.0
        for right in continuation.confidence:
            reach *= right
        assert reach >= LEAST_SURVIVAL


def test_what_will_have_been_said_when_the_answer_comes_does_not_shorten_what_is_behind_it() -> None:
    source = list(range(100, 200))
    text = [*source, 1, *source[:3]]
    lengths = [len(first(opened(text), length=60, lead=lead)) for lead in (0, 2, 4, 60)]
    assert lengths[0] < lengths[1] <= lengths[2] <= lengths[3] < 60  # nor is what will hardly be reached said


def test_a_stream_that_is_predictable_is_told_more_and_one_that_is_not_less() -> None:
    rng = random.Random(1)
    source = [rng.randrange(1000) for _ in range(400)]
    copy = opened([*source, 5001, *source[:8]], prompt_tokens=401)
    before = len(first(copy, length=80))
    for at in range(8, 100):
        copy.advance(S, 401 + at, [source[at]])
        said(copy)
    assert len(first(copy, length=80)) > before
    wrong = opened([*source, 5001, *source[:8]], prompt_tokens=401)
    for at in range(8, 100, 4):
        # two words of the source, then others
        wrong.advance(S, 0, [*source[at:at + 3], 6000 + at])
        said(wrong)
    wrong.advance(S, 0, source[200:203])
    assert len(first(wrong, length=80)) < before


def test_streams_of_an_audience_help_each_other_and_nobody_else() -> None:
    answer = list(range(500, 560))
    draftsman = opened([1, 2, 3, *answer], prompt_tokens=3)
    draftsman.close(S, ACME)
    opened([9, *answer[:8]], draftsman=draftsman)
    assert first(draftsman, audience=ACME)[:4] == answer[8:12]
    assert first(draftsman, audience=Audience("rival", "m", "eu")) == []
    assert first(draftsman) == []
    # and one that was closed for nobody is forgotten
    opened([4, *range(700, 760)], prompt_tokens=1, key=T, draftsman=draftsman)
    draftsman.close(T, None)
    opened([4, *range(700, 708)], key=T, draftsman=draftsman)
    assert first(draftsman, T, audience=ACME) == []


def test_what_an_audience_says_while_a_stream_is_open_helps_it() -> None:
    answer = list(range(500, 560))
    draftsman = opened([9, *answer[:4]])
    opened([1, *answer], prompt_tokens=1, key=T, draftsman=draftsman)
    assert first(draftsman, audience=ACME) == []
    draftsman.close(T, ACME)
    assert first(draftsman, audience=ACME)[:4] == answer[4:8]
    draftsman.advance(S, 5, answer[4:6])
    assert first(draftsman, audience=ACME)[:4] == answer[6:10]


PREDICTED = list(range(800, 840))


def test_a_predicted_answer_is_proposed_from_its_beginning_on() -> None:
    draftsman = opened([1, 2, 3], prediction=PREDICTED)
    found = first(draftsman)
    assert found and found == PREDICTED[:len(found)]
    assert first(opened([1, 2, 3])) == []
    for at in range(6):
        draftsman.advance(S, 3 + at, [PREDICTED[at]])
        found = first(draftsman)
        assert found and found == PREDICTED[at + 1:at + 1 + len(found)]


def test_behind_a_difference_a_prediction_is_taken_up_again() -> None:
    draftsman = opened([1, 2, 3], prediction=PREDICTED)
    draftsman.advance(S, 3, [*PREDICTED[:5], 9, 8, *PREDICTED[10:12]])
    assert first(draftsman)[:2] == PREDICTED[12:14]


def test_a_prediction_counts_from_the_answer_on_also_for_a_stream_that_began_elsewhere() -> None:
    # the prompt quotes it, and ten tokens were said by an earlier attempt
    draftsman = opened([1, *PREDICTED[20:22], 2, *PREDICTED[:10]], prompt_tokens=4, prediction=PREDICTED)
    assert first(draftsman)[:3] == PREDICTED[10:13]


def test_the_likeliest_outcomes_of_a_wrong_guess_are_prepared_for() -> None:
    a, b = [1, 2, 3, 4, 50, 51, 52, 53], [1, 2, 3, 4, 60, 61, 62, 63]
    draftsman = opened([9, *a, 8, *a, 7, *b, 6, *a, 5, 1, 2, 3])
    main, *branches = said(draftsman, branches=4)
    assert list(main.tokens)[:3] == [4, 50, 51] and not main.assumed
    assert branches
    (other,) = (branch for branch in branches if list(branch.assumed) == [4, 60])
    assert list(other.tokens)[:2] == [61, 62]
    for branch in branches:
        agreed = len(branch.assumed) - 1
        assert list(branch.assumed[:agreed]) == list(main.tokens[:agreed])
        assert branch.assumed[agreed] != main.tokens[agreed]
        assert branch.base == main.base
    assert len(said(draftsman, branches=1)) <= 2
    assert len(said(draftsman, branches=0)) == 1


def test_what_another_source_says_is_an_outcome_too() -> None:
    source = list(range(100, 160))
    draftsman = opened([*source, 1], prediction=[*source[:3], *PREDICTED])
    draftsman.advance(S, 61, source[:3])
    main, *branches = said(draftsman, branches=4)
    starts = {tuple(main.tokens[:1])} | {tuple(branch.assumed) for branch in branches}
    assert {(source[3],), (PREDICTED[0],)} <= starts


def test_a_very_long_prompt_is_taken_in_over_several_calls_while_others_are_answered() -> None:
    draftsman = opened([*range(3 * ABSORB_TOKENS), 1, 2, 3])
    opened([1, 2, 3, 4, 5] * 6, key=T, draftsman=draftsman)
    asks = [Ask(S, 4), Ask(T, 4)]
    assert not draftsman.behind
    answered = [[continuation.key for continuation in draftsman.propose(asks, NO_LIMIT)] for _ in range(4)]
    assert answered[0] == [T] and answered[-1] == [S, T]
    assert not draftsman.behind
    opened([*range(3 * ABSORB_TOKENS)], draftsman=draftsman)
    draftsman.propose(asks, NO_LIMIT)
    assert list(draftsman.behind) == [S]
    draftsman.close(S, None)
    assert not draftsman.behind


def test_a_separator_in_a_text_is_never_proposed() -> None:
    assert first(opened([1, 2, SEPARATOR] * 6 + [1, 2])) == []


@settings(max_examples=60)
@given(st.lists(st.integers(0, 3), max_size=80), st.integers(0, 40), st.lists(st.integers(0, 3), max_size=20),
       st.integers(1, 12), st.integers(0, 5))
def test_whatever_is_said_is_what_followed_somewhere(tokens: list[int], cut: int, predicted: list[int], length: int,
                                                     branches: int) -> None:
    draftsman = opened(tokens[:cut], prompt_tokens=min(cut, 5), prediction=predicted)
    for at in range(cut, len(tokens)):
        draftsman.advance(S, at, tokens[at:at + 1])
        said(draftsman)
    sources = [tokens, [SEPARATOR, *predicted]]
    found = said(draftsman, length=length, branches=branches)
    assert len(found) <= 1 + branches
    # one without condition at most, and that first
    assert all(continuation.assumed for continuation in found[1:])
    assert len({tuple(continuation.assumed) for continuation in found}) == len(found)
    for continuation in found:
        assert continuation.base == len(tokens)
        assert 1 <= len(continuation.tokens) <= length
        assert len(continuation.confidence) == len(continuation.tokens)
        assert all(0.0 < right <= 1.0 for right in continuation.confidence)
        # each token followed the one before it in some source
        whole = [*continuation.assumed, *continuation.tokens]
        for pair in pairwise(whole):
            assert any(tuple(source[place:place + 2]) == pair for source in sources for place in range(len(source)))
