"""Which drafts are used, and how many."""

from hypothesis import given
from hypothesis import strategies as st

from shared.messages import Proposal
from shared.tokens import pack
from worker.drafts import (
    PROPOSALS_PER_STREAM,
    Candidate,
    DraftBook,
    can_pay,
    drifted_acceptance,
    rows_worth_verifying,
    updated_acceptance,
)
from worker.sequence import Key

KEY = Key("r", 1)


def book_with(*proposals: tuple[int, list[int], list[int]]) -> DraftBook:
    book = DraftBook(100)
    book.open(KEY)
    for base, assumed, tokens in proposals:
        assert book.offer(Proposal("r", 1, base, pack(tokens), pack(assumed)))
    return book


def test_a_proposal_is_used_as_far_as_it_continues_what_was_committed() -> None:
    book = book_with((3, [4], [5, 6, 7]))
    assert book.best(KEY, [1, 2, 3], 8) == [4, 5, 6, 7]
    assert book.best(KEY, [1, 2, 3, 4, 5], 8) == [6, 7]
    assert book.best(KEY, [1, 2, 3, 4, 5], 1) == [6]


def test_a_proposal_that_was_contradicted_falls_out() -> None:
    book = book_with((3, [4], [5, 6, 7]))
    assert book.best(KEY, [1, 2, 3, 9], 8) == []
    assert book.stale == 1
    assert book.best(KEY, [1, 2, 3], 8) == []


def test_a_proposal_that_is_used_up_falls_out() -> None:
    book = book_with((3, [], [4]))
    assert book.best(KEY, [1, 2, 3, 4], 8) == []
    assert book.stale == 1


def test_a_proposal_for_a_length_not_yet_known_here_waits() -> None:
    book = book_with((5, [], [6]))
    assert book.best(KEY, [1, 2, 3], 8) == []
    assert book.best(KEY, [1, 2, 3, 4, 5], 8) == [6]


def test_of_several_branches_the_one_that_came_true_is_taken() -> None:
    book = book_with((2, [8], [80, 81]), (2, [9], [90, 91]))
    assert book.best(KEY, [1, 2, 9], 8) == [90, 91]


def test_the_youngest_proposal_goes_first() -> None:
    book = book_with((4, [], [50, 51]), (2, [3], [4, 60, 61]))
    assert book.best(KEY, [1, 2, 3, 4], 8) == [50, 51]


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
    assert book.best(KEY, list(range(last)), 8) == [last]


def test_acceptance_follows_what_happens_and_ignores_what_was_not_tried() -> None:
    sure = doubtful = 0.6
    for _ in range(50):
        sure = updated_acceptance(sure, 4, 4)
        doubtful = updated_acceptance(doubtful, 0, 4)
    assert sure > 0.99
    assert doubtful < 0.01
    assert updated_acceptance(0.5, 0, 8) == updated_acceptance(0.5, 0, 1)
    for _ in range(200):
        doubtful = drifted_acceptance(doubtful)
    assert doubtful > 0.5


def rate(taken: list[int], candidates: list[Candidate], sure: int, step_s: float, row_s: float) -> float:
    tokens = sure + sum(candidate.acceptance ** (place + 1)
                        for candidate, count in zip(candidates, taken, strict=True) for place in range(count))
    return tokens / (step_s + row_s * sum(taken))


candidates_ = st.lists(st.builds(Candidate, st.floats(0.0, 0.99), st.integers(0, 4)), min_size=1, max_size=3)


@given(candidates_, st.integers(0, 20), st.floats(0.001, 0.1), st.floats(0.0, 0.02), st.integers(0, 12))
def test_the_choice_is_the_best_there_is_and_never_slower_than_none(
        candidates: list[Candidate], others: int, step_s: float, row_s: float, budget: int) -> None:
    sure = len(candidates) + others
    taken = rows_worth_verifying(candidates, sure, step_s, row_s, budget)
    assert sum(taken) <= budget
    assert all(count <= candidate.length for count, candidate in zip(taken, candidates, strict=True))
    mine = rate(taken, candidates, sure, step_s, row_s)
    every = [[]]
    for candidate in candidates:
        every = [[*some, count] for some in every for count in range(candidate.length + 1)]
    best = max(rate(some, candidates, sure, step_s, row_s) for some in every if sum(some) <= budget)
    assert mine >= best * (1 - 1e-9)


def test_speculation_fades_as_the_batch_grows() -> None:
    def rows_per_stream(streams: int) -> float:
        taken = rows_worth_verifying([Candidate(0.7, 8)] * streams, streams, 0.006 + streams * 0.0012, 0.0012, 10**6)
        return sum(taken) / streams
    assert rows_per_stream(1) >= 3
    assert rows_per_stream(1) > rows_per_stream(8) > rows_per_stream(64)


@given(st.integers(1, 256), st.floats(0.0001, 0.1), st.floats(0.0, 0.02), st.integers(1, 8))
def test_where_drafts_cannot_pay_even_right_ones_would_save_little(
        streams: int, base_s: float, row_s: float, drafts: int) -> None:
    step_s = base_s + streams * row_s
    saving = (1 + drafts) * step_s / (step_s + streams * drafts * row_s)
    assert can_pay(streams, step_s, row_s) or saving < 1.25 + 1e-9
    assert can_pay(1, 0.0, 0.0)  # nothing is known yet
