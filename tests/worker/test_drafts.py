"""Which drafts are used, and how many."""

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from shared.messages import Proposal
from shared.tokens import pack
from worker.drafts import CAUTION, HOPED_FOR, PROPOSALS_PER_STREAM, DraftBook, can_pay, rows_worth_verifying
from worker.sequence import Key
from worker.survival import UNSAID

KEY = Key("r", 1)


def best(book: DraftBook, committed: list[int], most: int) -> list[int]:
    found = book.best(KEY, committed, most)
    return found.tokens if found is not None else []


def book_with(*proposals: tuple[int, list[int], list[int]]) -> DraftBook:
    book = DraftBook(100)
    book.open(KEY)
    for base, assumed, tokens in proposals:
        assert book.offer(Proposal("r", 1, base, pack(tokens), pack(assumed)))
    return book


def test_a_proposal_is_used_as_far_as_it_continues_what_was_committed() -> None:
    book = book_with((3, [4], [5, 6, 7]))
    assert best(book, [1, 2, 3], 8) == [4, 5, 6, 7]
    assert best(book, [1, 2, 3, 4, 5], 8) == [6, 7]
    assert best(book, [1, 2, 3, 4, 5], 1) == [6]


def test_a_proposal_that_was_contradicted_falls_out() -> None:
    book = book_with((3, [4], [5, 6, 7]))
    assert best(book, [1, 2, 3, 9], 8) == []
    assert book.stale == 1
    assert best(book, [1, 2, 3], 8) == []


def test_a_proposal_that_is_used_up_falls_out() -> None:
    book = book_with((3, [], [4]))
    assert best(book, [1, 2, 3, 4], 8) == []
    assert book.stale == 1


def test_a_proposal_for_a_length_not_yet_known_here_waits() -> None:
    book = book_with((5, [], [6]))
    assert best(book, [1, 2, 3], 8) == []
    assert best(book, [1, 2, 3, 4, 5], 8) == [6]


def test_of_several_branches_the_one_that_came_true_is_taken() -> None:
    book = book_with((2, [8], [80, 81]), (2, [9], [90, 91]))
    assert best(book, [1, 2, 9], 8) == [90, 91]


def test_the_youngest_proposal_goes_first() -> None:
    book = book_with((4, [], [50, 51]), (2, [3], [4, 60, 61]))
    assert best(book, [1, 2, 3, 4], 8) == [50, 51]


def test_what_cannot_be_is_not_kept() -> None:
    book = DraftBook(100)
    book.open(KEY)
    assert not book.offer(Proposal("unknown", 1, 3, pack([1])))
    assert not book.offer(Proposal("r", 2, 3, pack([1])))
    assert not book.offer(Proposal("r", 1, 3, pack([100])))
    assert not book.offer(Proposal("r", 1, 3, b""))
    assert not book.offer(Proposal("r", 1, 3, b"abc"))
    assert not book.offer(Proposal("r", 1, -1, pack([1])))
    assert not book.offer(Proposal("r", 1, 3, pack([1] * 1000)))
    book.close(KEY)
    assert not book.offer(Proposal("r", 1, 3, pack([1])))


def test_a_flood_of_proposals_keeps_the_latest() -> None:
    book = book_with(*[(base, [], [base]) for base in range(3, 3 + 2 * PROPOSALS_PER_STREAM)])
    assert book.stale == PROPOSALS_PER_STREAM
    last = 2 + 2 * PROPOSALS_PER_STREAM
    assert best(book, list(range(last)), 8) == [last]


def test_what_a_drafter_says_of_its_tokens_stays_with_them() -> None:
    book = DraftBook(100)
    book.open(KEY)
    assert book.offer(Proposal("r", 1, 3, pack([5, 6]), pack([4]), confidence=bytes([200, 100, 50])))
    found = book.best(KEY, [1, 2, 3, 4], 8)
    assert found is not None and (found.tokens, found.stated) == ([5, 6], [100, 50])


def test_a_drafter_that_says_nothing_of_its_tokens_or_something_else_is_not_guessed_at() -> None:
    for said in (b"", b"x", bytes(9)):
        book = DraftBook(100)
        book.open(KEY)
        assert book.offer(Proposal("r", 1, 3, pack([5, 6]), confidence=said))
        found = book.best(KEY, [1, 2, 3], 8)
        assert found is not None and found.stated == [UNSAID, UNSAID]


def test_an_outcome_is_a_hit_when_it_was_prepared_for_and_none_when_all_was_known() -> None:
    book = book_with((3, [], [4, 5, 6]))
    best(book, [1, 2, 3], 8)
    assert (book.prepared, book.hits) == (0, 0)
    best(book, [1, 2, 3, 4], 8)
    assert (book.prepared, book.hits) == (1, 1)
    best(book, [1, 2, 3, 4, 9], 8)
    assert (book.prepared, book.hits) == (2, 1)
    best(book, [1, 2, 3, 4, 9, 9], 8)
    assert (book.prepared, book.hits) == (2, 1)


def rate(taken: list[int], candidates: list[list[float]], sure: int, costs: list[float]) -> float:
    tokens = sure + sum(sum(candidate[:count]) for candidate, count in zip(candidates, taken, strict=True))
    return tokens / costs[sum(taken)]


def falling(chances: list[float]) -> list[float]:
    reach = 1.0
    return [reach := reach * chance for chance in chances]


candidates_ = st.lists(st.lists(st.floats(0.01, 0.99), max_size=4).map(falling), min_size=1, max_size=3)
# what a step costs with 0, 1, 2, ... drafts: any steps up, as rows come in blocks
costs_ = st.lists(st.sampled_from((0.0, 0.001, 0.01)), min_size=13, max_size=13).map(
    lambda rises: [0.005 + sum(rises[:count]) for count in range(13)])


@given(candidates_, st.integers(0, 20), costs_, st.integers(0, 12))
def test_the_choice_is_the_best_there_is_and_never_slower_than_none(
        candidates: list[list[float]], others: int, costs: list[float], budget: int) -> None:
    sure = len(candidates) + others
    taken = rows_worth_verifying(candidates, sure, costs.__getitem__, budget)
    assert sum(taken) <= budget
    assert all(count <= len(candidate) for count, candidate in zip(taken, candidates, strict=True))
    feared = [costs[0] + CAUTION * (cost - costs[0]) for cost in costs]
    every: list[list[int]] = [[]]
    for candidate in candidates:
        every = [[*some, count] for some in every for count in range(len(candidate) + 1)]
    best_rate = max(rate(some, candidates, sure, feared) for some in every if sum(some) <= budget)
    assert rate(taken, candidates, sure, feared) >= best_rate * (1 - 1e-9)
    nothing = rate([0] * len(candidates), candidates, sure, costs)
    assert rate(taken, candidates, sure, costs) >= nothing * (1 - 1e-9)


def test_a_row_that_does_not_pay_is_taken_for_the_sake_of_those_behind_it_in_its_block() -> None:
    def cost(drafts: int) -> float:
        return 1.0 if drafts == 0 else 1.7 if drafts < 4 else 3.0

    assert rows_worth_verifying([[0.6, 0.5, 0.45, 0.1]], 1, cost, 8) == [3]


def linear(base_s: float, row_s: float) -> Callable[[int], float]:
    return lambda rows: base_s + rows * row_s


def test_speculation_fades_as_the_batch_grows() -> None:
    def rows_per_stream(streams: int) -> float:
        reach = falling([0.7] * 8)
        taken = rows_worth_verifying([reach] * streams, streams, linear(0.006 + streams * 0.0012, 0.0012), 10**6)
        return sum(taken) / streams
    assert rows_per_stream(1) >= 3
    assert rows_per_stream(1) > rows_per_stream(8) > rows_per_stream(64)


@given(st.integers(1, 256), st.floats(0.0001, 0.1), st.floats(0.0, 0.02), st.sampled_from(HOPED_FOR))
def test_where_drafts_cannot_pay_even_right_ones_would_save_little(
        streams: int, base_s: float, row_s: float, drafts: int) -> None:
    seconds = linear(base_s, row_s)
    saving = (1 + drafts) * seconds(streams) / seconds(streams * (1 + drafts))
    assert can_pay(streams, seconds, now=True) or saving < 1.25 + 1e-9
    assert can_pay(1, lambda rows: 0.0)  # nothing is known yet


@given(st.floats(0.001, 0.1), st.floats(0.0001, 0.02))
def test_a_batch_at_the_edge_does_not_flap(base_s: float, row_s: float) -> None:
    seconds = linear(base_s, row_s)
    ends = max((streams for streams in range(1, 400) if can_pay(streams, seconds, now=True)), default=0)
    begins = max((streams for streams in range(1, 400) if can_pay(streams, seconds)), default=0)
    assert begins <= ends
    # one stream that comes and goes at the edge changes nothing, where an edge is wider than a stream
    if 4 < ends < 399:
        assert begins < ends
        now, changes = True, 0
        for number in range(100):
            before, now = now, can_pay(ends + number % 2, seconds, now)
            changes += now != before
        assert changes <= 1
