"""Of two that draft the better one goes on, by what their words turned out to mean."""

import random
from collections.abc import Sequence

from drafter.drafting import Ask, Audience, Continuation, Key, Stream
from drafter.hybrid import HybridDraftsman

S = Key("w0", "s", 1)


class Says:
    """A draftsman that says what it is told to."""

    threaded = False
    vocabulary = ""

    def __init__(self, kind: str = "says") -> None:
        self.kind = kind
        self.tokens: list[int] = []
        self.stated: list[float] = []
        self.branches: list[tuple[list[int], list[int]]] = []
        self.heard: list[tuple[object, ...]] = []
        self.asked = 0
        self.behind: set[Key] = set()

    def open(self, key: Key, stream: Stream) -> None:
        self.heard.append(("open", key, list(stream.tokens)))

    def advance(self, key: Key, base: int, tokens: Sequence[int]) -> None:
        self.heard.append(("advance", key, base, list(tokens)))

    def close(self, key: Key, audience: Audience | None) -> None:
        self.heard.append(("close", key, audience))

    def propose(self, asks: Sequence[Ask], budget_s: float) -> list[Continuation]:
        self.asked += len(asks)
        found = []
        for ask in asks:
            if self.tokens:
                found.append(Continuation(ask.key, 3, (), self.tokens[:ask.length], self.stated[:ask.length]))
            found += [Continuation(ask.key, 3, assumed, tokens, [0.5] * len(tokens))
                      for assumed, tokens in self.branches[:ask.branches]]
        return found


def pair() -> tuple[Says, Says, HybridDraftsman]:
    quick, slow = Says("quick"), Says("slow")
    hybrid = HybridDraftsman(quick, slow)
    hybrid.open(S, Stream([1, 2, 3], 3))
    return quick, slow, hybrid


def say(who: Says, tokens: list[int], stated: float) -> None:
    who.tokens, who.stated = tokens, [stated] * len(tokens)


def test_both_hear_everything_in_order() -> None:
    quick, slow, hybrid = pair()
    hybrid.advance(S, 3, [4])
    hybrid.close(S, None)
    assert quick.heard == slow.heard == [("open", S, [1, 2, 3]), ("advance", S, 3, [4]), ("close", S, None)]


def test_it_is_behind_where_one_of_them_is() -> None:
    quick, slow, hybrid = pair()
    assert not hybrid.behind
    slow.behind, quick.behind = {S}, {Key("w0", "t", 1)}
    assert set(hybrid.behind) == {S, Key("w0", "t", 1)}


def test_where_one_says_nothing_the_other_is_heard() -> None:
    quick, slow, hybrid = pair()
    assert hybrid.propose([Ask(S, 4)], 1.0) == []
    say(slow, [7, 8], 0.6)
    (alone,) = hybrid.propose([Ask(S, 4)], 1.0)
    assert list(alone.tokens) == [7, 8]
    say(quick, [5, 6], 0.6)
    slow.tokens = []
    (alone,) = hybrid.propose([Ask(S, 4)], 1.0)
    assert list(alone.tokens) == [5, 6]


def test_where_they_part_the_one_that_expects_more_goes_on_and_the_other_is_prepared_for() -> None:
    quick, slow, hybrid = pair()
    say(quick, [5, 6, 7, 8], 0.3)
    say(slow, [5, 6, 9, 10, 11], 0.8)
    main, branch = hybrid.propose([Ask(S, 8, branches=2)], 1.0)
    assert list(main.tokens) == [5, 6, 9, 10, 11] and not main.assumed
    assert list(branch.assumed) == [5, 6, 7] and list(branch.tokens) == [8]
    (main,) = hybrid.propose([Ask(S, 8)], 1.0)
    say(quick, [5, 6, 7, 8], 0.8)
    say(slow, [5, 6, 9, 10, 11], 0.3)
    (main,) = hybrid.propose([Ask(S, 8)], 1.0)
    assert list(main.tokens) == [5, 6, 7, 8]


def test_what_both_say_goes_on_with_whoever_says_more() -> None:
    quick, slow, hybrid = pair()
    say(quick, [5, 6], 0.6)
    say(slow, [5, 6, 7, 8], 0.5)
    (main,) = hybrid.propose([Ask(S, 8, branches=3)], 1.0)
    assert list(main.tokens) == [5, 6, 7, 8]
    assert len(main.confidence) == 4


def test_one_that_boasts_is_believed_less_and_less() -> None:
    rng = random.Random(1)
    quick, slow, hybrid = pair()
    say(quick, [5], 0.95)
    say(slow, [6], 0.65)
    (main,) = hybrid.propose([Ask(S, 4)], 1.0)
    assert list(main.tokens) == [5]
    for _ in range(300):
        hybrid.advance(S, 3, [5 if rng.random() < 0.2 else 6])
        hybrid.propose([Ask(S, 4)], 1.0)
    (main,) = hybrid.propose([Ask(S, 4)], 1.0)
    assert list(main.tokens) == [6]
    assert main.confidence[0] > 0.7


def test_what_both_say_is_believed_as_often_as_it_was_right_when_both_said_it() -> None:
    quick, slow, hybrid = pair()
    say(quick, [5], 0.55)
    say(slow, [5], 0.55)
    for _ in range(300):
        hybrid.propose([Ask(S, 4)], 1.0)
        hybrid.advance(S, 3, [5])
    (main,) = hybrid.propose([Ask(S, 4)], 1.0)
    assert main.confidence[0] > 0.9


def test_the_outcomes_of_both_are_prepared_for_once_and_no_more_than_asked() -> None:
    quick, slow, hybrid = pair()
    say(quick, [5, 6, 7], 0.6)
    say(slow, [5, 6, 7], 0.6)
    quick.branches = [([9], [1]), ([5, 8], [2])]
    slow.branches = [([9], [3]), ([5], [6]), ([5, 6, 4], [5])]
    _, *branches = hybrid.propose([Ask(S, 8, branches=5)], 1.0)
    assert [list(branch.assumed) for branch in branches] == [[9], [5, 8], [5, 6, 4]]
    assert list(branches[0].tokens) == [1]
    assert len(hybrid.propose([Ask(S, 8, branches=1)], 1.0)) == 2


def test_the_slow_one_is_not_asked_of_a_stream_that_the_quick_one_is_sure_of() -> None:
    quick, slow, hybrid = pair()
    say(quick, [5, 6, 7, 8], 0.99)
    say(slow, [5, 6, 7, 8], 0.5)
    for _ in range(100):
        hybrid.propose([Ask(S, 4)], 1.0)
        hybrid.advance(S, 3, [5, 6, 7, 8])
    asked = slow.asked
    (main,) = hybrid.propose([Ask(S, 4)], 1.0)
    assert list(main.tokens) == [5, 6, 7, 8] and slow.asked == asked
    # it says less than what is wanted
    hybrid.propose([Ask(S, 6)], 1.0)
    assert slow.asked == asked + 1
