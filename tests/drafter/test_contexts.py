"""A context is the stream as its worker has it, or it is gone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafter.contexts import Advanced, Context, Contexts, Ended, Followed, News, Opened
from drafter.drafting import Key
from shared.messages import Close, Commit, Follow, Open, Sampling
from shared.tokens import digest, pack
from tests.drafter.builders import Teller, closed, commit, opened

S = Key("w0", "s", 1)


class Held(Contexts):
    """Contexts, and the texts that their news add up to."""

    def __init__(self, max_contexts: int = 8, max_tokens: int = 10_000) -> None:
        super().__init__(max_contexts, max_tokens)
        self.texts: dict[Key, list[int]] = {}

    def follow(self, message: Follow, now: float = 0.0) -> Followed:
        followed = super().follow(message, now)
        self.hear(followed.news)
        return followed

    def hear(self, news: list[News]) -> None:
        for happened in news:
            match happened:
                case Opened(key, stream):
                    assert key not in self.texts
                    self.texts[key] = list(stream.tokens)
                case Advanced(key, base, tokens):
                    assert len(self.texts[key]) == base
                    self.texts[key] += tokens
                case Ended(context, _):
                    assert len(self.texts.pop(context.key)) == len(context)


def ends(followed: Followed) -> list[tuple[str, str]]:
    return [(happened.context.key.request_id, happened.why) for happened in followed.news
            if isinstance(happened, Ended)]


def test_a_stream_is_followed_from_open_to_close() -> None:
    held, worker = Held(), Teller()
    assert held.follow(worker.tell(opened([1, 2, 3]))).touched == [S]
    assert held.follow(worker.tell(commit(3, [4, 5]))).touched == [S]
    assert held.texts[S] == [1, 2, 3, 4, 5]
    assert held.tokens == 5
    context = held.get(S)
    assert context is not None and (len(context), context.digest) == (5, digest(pack([1, 2, 3, 4, 5])))
    followed = held.follow(worker.tell(commit(5, [6]), closed()))
    assert followed.touched == []
    assert ends(followed) == [("s", "closed")]
    assert len(held) == 0 and held.tokens == 0


def test_what_a_stream_is_opened_with_goes_on_to_whoever_drafts() -> None:
    held, worker = Held(), Teller()
    sampling = Sampling(temperature=0.5, seed=7)
    (happened,) = held.follow(worker.tell(opened([1, 2], prompt_tokens=1, sampling=sampling,
                                                 prediction=pack([8, 9])))).news
    assert isinstance(happened, Opened)
    assert happened.stream == ([1, 2], 1, sampling, [8, 9])
    (happened,) = held.follow(worker.tell(opened([1, 2], "t", prediction=b"odd"))).news
    assert isinstance(happened, Opened) and not happened.stream.prediction


def test_a_message_that_comes_twice_counts_once() -> None:
    held, worker = Held(), Teller()
    held.follow(worker.tell(opened([1, 2, 3])))
    message = worker.tell(commit(3, [4]))
    held.follow(message)
    assert held.follow(message) == ([], [])
    assert held.texts[S] == [1, 2, 3, 4]


def test_a_gap_drops_all_streams_of_that_worker_and_of_no_other() -> None:
    held, worker, other = Held(), Teller("w0"), Teller("w1")
    held.follow(worker.tell(opened([1, 2, 3]), opened([4], "t")))
    held.follow(other.tell(opened([1, 2, 3])))
    worker.tell(commit(3, [4]))  # lost
    followed = held.follow(worker.tell(commit(4, [5]), opened([9], "u")))
    assert ends(followed) == [("s", "lost"), ("t", "lost")]
    assert followed.touched == [Key("w0", "u", 1)]
    assert held.texts == {Key("w0", "u", 1): [9], Key("w1", "s", 1): [1, 2, 3]}
    assert held.gaps_total == 1
    assert held.lost  # the worker believes that s is open


def test_a_gap_that_is_followed_by_a_fresh_start_loses_nothing() -> None:
    held, worker = Held(), Teller()
    held.follow(worker.tell(opened([1])))
    worker.seq += 10  # told to another drafter
    held.follow(worker.tell(opened([1, 2]), commit(2, [3])))
    assert held.texts[S] == [1, 2, 3]
    assert not held.lost


def test_a_commit_that_does_not_fit_drops_the_stream_until_it_is_opened_again() -> None:
    held, worker = Held(), Teller()
    held.follow(worker.tell(opened([1, 2, 3])))
    held.follow(worker.tell(commit(2, [3, 4])))
    assert held.texts == {} and held.lost and held.diverged_total == 1
    held.lost = False
    held.follow(worker.tell(opened([1, 2, 3, 4])))
    held.follow(worker.tell(commit(4, [5])))
    assert held.texts[S] == [1, 2, 3, 4, 5]
    assert not held.lost


def test_a_commit_behind_another_text_of_the_same_length_drops_the_stream() -> None:
    held, worker = Held(), Teller()
    held.follow(worker.tell(opened([1, 2, 3])))
    held.follow(worker.tell(Commit("s", 1, 3, pack([4]), digest(pack([1, 2, 3])))))
    assert held.texts[S] == [1, 2, 3, 4]
    followed = held.follow(worker.tell(Commit("s", 1, 4, pack([5]), digest(pack([1, 2, 9, 4])))))
    assert ends(followed) == [("s", "lost")] and followed.touched == []
    assert held.lost and held.diverged_total == 1


def test_a_stream_opened_again_as_it_stands_keeps_what_was_learned() -> None:
    held, worker = Held(), Teller()
    held.follow(worker.tell(opened([1, 2, 3])))
    before = held.get(S)
    followed = held.follow(worker.tell(opened([1, 2, 3])))
    assert held.get(S) is before and followed.news == [] and followed.touched == [S]
    held.follow(worker.tell(opened([1, 2, 4])))
    assert held.texts[S] == [1, 2, 4]


def test_a_worker_that_started_again_has_no_streams_here() -> None:
    held = Held()
    held.follow(Teller(epoch=1).tell(opened([1])))
    held.follow(Teller(epoch=2).tell(opened([2], "t")))
    assert held.texts == {Key("w0", "t", 1): [2]}
    assert held.follow(Teller(epoch=1).tell(opened([3]))).touched == []
    assert held.drop_worker("w0", before_epoch=2) == []
    assert [happened.why for happened in held.drop_worker("w0") if isinstance(happened, Ended)] == ["silent"]
    assert len(held) == 0


def test_streams_are_bounded_by_number_and_the_one_heard_of_longest_ago_goes() -> None:
    held, worker = Held(max_contexts=3), Teller()
    for name in "abc":
        held.follow(worker.tell(opened([1], name)))
    held.follow(worker.tell(commit(1, [2], "a")))
    assert ends(held.follow(worker.tell(opened([1], "d")))) == [("b", "evicted")]
    # its commits still come; that is no reason to ask for everything again
    held.follow(worker.tell(commit(1, [2], "b")))
    assert not held.lost


def test_streams_are_bounded_by_tokens() -> None:
    held, worker = Held(max_tokens=100), Teller()
    for name in "abcdef":
        held.follow(worker.tell(opened([1] * 30, name)))
        assert held.tokens <= 100
    assert len(held) == 3
    held.follow(worker.tell(opened([1] * 101, "huge")))
    assert held.tokens <= 100 and held.get(Key("w0", "huge", 1)) is None


packed = st.one_of(st.binary(max_size=9), st.lists(st.integers(0, 3), max_size=4).map(pack))
streams = st.sampled_from(["s", "t"])
garbage = st.one_of(
    st.builds(Open, streams, st.integers(-1, 2), packed, prompt_tokens=st.integers(-5, 10**6),
              max_draft_tokens=st.integers(-3, 10**6), prediction=packed),
    st.builds(Commit, streams, st.integers(-1, 2), st.integers(-5, 8), packed, st.sampled_from([0, 1])),
    st.builds(Close, streams, st.integers(-1, 2)),
)


@given(st.lists(st.builds(Follow, st.sampled_from(["w0", "w1"]), st.integers(-1, 2), st.integers(-1, 6),
                          st.lists(garbage, max_size=6).map(tuple)), max_size=20))
def test_whatever_is_told_nothing_breaks_and_the_books_balance(messages: list[Follow]) -> None:
    held = Held(max_contexts=2, max_tokens=20)
    for message in messages:
        for key in held.follow(message).touched:
            assert held.get(key) is not None
        assert len(held) <= 2 and held.tokens <= 20
        assert held.tokens == sum(map(len, held.texts.values()))
        for key, tokens in held.texts.items():
            context = held.get(key)
            assert context is not None and context.digest == digest(pack(tokens))
    for worker in ("w0", "w1"):
        held.hear(held.drop_worker(worker))
    assert held.tokens == 0 and len(held) == 0 and held.texts == {}


def context() -> Context:
    return Context(S, opened([1, 2, 3]), 0.0)


def test_a_guess_is_judged_over_several_commits_and_up_to_the_first_wrong_token() -> None:
    stream = context()
    stream.ask()
    stream.expect([10, 11, 12, 13])
    for tokens in ([10], [11, 12], [99, 13], [13]):
        stream.commit(tokens, pack(tokens))
    assert (stream.judged_tokens, stream.right_tokens, stream.proposed_tokens) == (4, 3, 4)


@pytest.mark.parametrize(("since", "proposed", "fits"), [
    ([], [4, 5], True), ([4], [4, 5], True), ([4, 5], [4, 5], False), ([9], [4, 5], False), ([4, 9], [4, 5, 6], False),
])
def test_a_stream_that_went_on_while_a_proposal_was_made_may_have_left_it_behind(
        since: list[int], proposed: list[int], fits: bool) -> None:
    stream = context()
    stream.ask()
    if since:
        stream.commit(since, pack(since))
    assert stream.still_open(proposed) is fits
    assert stream.digest_at(3) == digest(pack([1, 2, 3]))
    assert stream.digest_at(3 + len(since) + 1) is None
    if fits:
        stream.expect(proposed)
        stream.commit(proposed[len(since):], pack(proposed[len(since):]))
        assert stream.right_tokens == len(proposed) - len(since)
