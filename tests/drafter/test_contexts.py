"""A context is the stream as its worker has it, or it is gone."""

from hypothesis import given
from hypothesis import strategies as st

from drafter.contexts import Context, Contexts, Key
from drafter.suffix import Match
from shared.messages import Close, Commit, Follow, Open
from shared.tokens import pack
from tests.drafter.builders import Teller, closed, commit, opened

S = Key("w0", "s", 1)


def contexts(max_contexts: int = 8, max_tokens: int = 10_000) -> Contexts:
    return Contexts(max_contexts, max_tokens)


def text(held: Contexts, key: Key = S) -> list[int] | None:
    context = held.get(key)
    return context.history.tokens.tolist() if context else None


def test_a_stream_is_followed_from_open_to_close() -> None:
    held, worker = contexts(), Teller()
    assert held.follow(worker.tell(opened([1, 2, 3])), 0.0).touched == [S]
    assert held.follow(worker.tell(commit(3, [4, 5])), 0.0).touched == [S]
    assert text(held) == [1, 2, 3, 4, 5]
    assert held.tokens == 5
    followed = held.follow(worker.tell(commit(5, [6]), closed()), 0.0)
    assert followed.touched == []
    assert [(len(ended.context), ended.why) for ended in followed.ended] == [(6, "closed")]
    assert len(held) == 0 and held.tokens == 0


def test_a_message_that_comes_twice_counts_once() -> None:
    held, worker = contexts(), Teller()
    held.follow(worker.tell(opened([1, 2, 3])), 0.0)
    message = worker.tell(commit(3, [4]))
    held.follow(message, 0.0)
    assert held.follow(message, 0.0).touched == []
    assert text(held) == [1, 2, 3, 4]


def test_a_gap_drops_all_streams_of_that_worker_and_of_no_other() -> None:
    held, worker, other = contexts(), Teller("w0"), Teller("w1")
    held.follow(worker.tell(opened([1, 2, 3]), opened([4], "t")), 0.0)
    held.follow(other.tell(opened([1, 2, 3])), 0.0)
    worker.tell(commit(3, [4]))  # lost
    followed = held.follow(worker.tell(commit(4, [5]), opened([9], "u")), 0.0)
    assert {ended.why for ended in followed.ended} == {"lost"}
    assert followed.touched == [Key("w0", "u", 1)]
    assert text(held) is None and text(held, Key("w1", "s", 1)) == [1, 2, 3]
    assert held.gaps_total == 1
    assert held.lost  # the worker believes that s is open


def test_a_gap_that_is_followed_by_a_fresh_start_loses_nothing() -> None:
    held, worker = contexts(), Teller()
    held.follow(worker.tell(opened([1])), 0.0)
    worker.seq += 10  # told to another drafter
    held.follow(worker.tell(opened([1, 2]), commit(2, [3])), 0.0)
    assert text(held) == [1, 2, 3]
    assert not held.lost


def test_a_commit_that_does_not_fit_drops_the_stream_until_it_is_opened_again() -> None:
    held, worker = contexts(), Teller()
    held.follow(worker.tell(opened([1, 2, 3])), 0.0)
    held.follow(worker.tell(commit(2, [3, 4])), 0.0)
    assert text(held) is None and held.lost
    held.lost = False
    held.follow(worker.tell(opened([1, 2, 3, 4])), 0.0)
    held.follow(worker.tell(commit(4, [5])), 0.0)
    assert text(held) == [1, 2, 3, 4, 5]
    assert not held.lost


def test_a_stream_opened_again_as_it_stands_keeps_what_was_learned() -> None:
    held, worker = contexts(), Teller()
    held.follow(worker.tell(opened([1, 2, 3])), 0.0)
    before = held.get(S)
    held.follow(worker.tell(opened([1, 2, 3])), 0.0)
    assert held.get(S) is before
    held.follow(worker.tell(opened([1, 2, 4])), 0.0)
    assert text(held) == [1, 2, 4]


def test_a_worker_that_started_again_has_no_streams_here() -> None:
    held = contexts()
    held.follow(Teller(epoch=1).tell(opened([1])), 0.0)
    held.follow(Teller(epoch=2).tell(opened([2], "t")), 0.0)
    assert text(held) is None and text(held, Key("w0", "t", 1)) == [2]
    assert held.follow(Teller(epoch=1).tell(opened([3])), 0.0).touched == []
    assert held.drop_worker("w0", before_epoch=2) == []
    assert [ended.why for ended in held.drop_worker("w0")] == ["silent"]
    assert len(held) == 0


def test_streams_are_bounded_by_number_and_the_one_heard_of_longest_ago_goes() -> None:
    held, worker = contexts(max_contexts=3), Teller()
    for name in "abc":
        held.follow(worker.tell(opened([1], name)), 0.0)
    held.follow(worker.tell(commit(1, [2], "a")), 0.0)
    followed = held.follow(worker.tell(opened([1], "d")), 0.0)
    assert [(ended.context.key.request_id, ended.why) for ended in followed.ended] == [("b", "evicted")]
    # its commits still come; that is no reason to ask for everything again
    held.follow(worker.tell(commit(1, [2], "b")), 0.0)
    assert not held.lost


def test_streams_are_bounded_by_tokens() -> None:
    held, worker = contexts(max_tokens=100), Teller()
    for name in "abcdef":
        held.follow(worker.tell(opened([1] * 30, name)), 0.0)
        assert held.tokens <= 100
    assert len(held) == 3
    held.follow(worker.tell(opened([1] * 101, "huge")), 0.0)
    assert held.tokens <= 100 and held.get(Key("w0", "huge", 1)) is None


packed = st.one_of(st.binary(max_size=9), st.lists(st.integers(0, 3), max_size=4).map(pack))
streams = st.sampled_from(["s", "t"])
garbage = st.one_of(
    st.builds(Open, streams, st.integers(-1, 2), packed, prompt_tokens=st.integers(-5, 10**6),
              max_draft_tokens=st.integers(-3, 10**6)),
    st.builds(Commit, streams, st.integers(-1, 2), st.integers(-5, 8), packed),
    st.builds(Close, streams, st.integers(-1, 2)),
)


@given(st.lists(st.builds(Follow, st.sampled_from(["w0", "w1"]), st.integers(-1, 2), st.integers(-1, 6),
                          st.lists(garbage, max_size=6).map(tuple)), max_size=20))
def test_whatever_is_told_nothing_breaks_and_the_books_balance(messages: list[Follow]) -> None:
    held = contexts(max_contexts=2, max_tokens=20)
    for message in messages:
        for key in held.follow(message, 0.0).touched:
            context = held.get(key)
            assert context is not None
            context.history.longest_match(context.history.tokens, 9)
        assert len(held) <= 2 and held.tokens <= 20
    kept = [context for worker in ("w0", "w1") for ended in held.drop_worker(worker) for context in [ended.context]]
    assert held.tokens == 0 and len(held) == 0
    assert len(kept) <= 2


def context() -> Context:
    return Context(S, opened([1, 2, 3]), [1, 2, 3], 0.0)


def test_right_guesses_make_proposals_longer_and_wrong_ones_shorter_until_silence() -> None:
    stream = context()
    guess = Match(4, list(range(10, 40)))
    first = len(stream.expect(guess))
    for _ in range(4):
        stream.expect(guess)
        stream.commit([10, 11, 12, 13])
    longer = len(stream.expect(guess))
    assert 0 < first < longer
    for _ in range(60):
        stream.expect(guess)
        stream.commit([99])
    assert stream.expect(guess) == []
    # what is not said is judged all the same, and a stream that became predictable is spoken to again
    for _ in range(4):
        stream.expect(guess)
        stream.commit([10, 11, 12])
    assert stream.expect(guess) != []


def test_a_long_match_is_trusted_apart_from_short_ones() -> None:
    stream = context()
    for _ in range(60):
        stream.expect(Match(3, [10, 11]))
        stream.commit([99])
    assert stream.expect(Match(3, [10, 11])) == []
    assert stream.expect(Match(30, [10, 11])) == [10, 11]


def test_a_guess_is_judged_over_several_commits_and_only_what_was_said_is_counted() -> None:
    stream = context()
    said = stream.expect(Match(30, [10, 11, 12, 13]))
    assert said == [10, 11, 12, 13]
    stream.commit([10])
    stream.commit([11, 12])
    stream.commit([99, 13])
    stream.commit([13])
    assert (stream.judged_tokens, stream.right_tokens, stream.proposed_tokens) == (4, 3, 4)
