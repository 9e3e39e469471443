"""Who is followed, and which answers are for us: what is late, stale, repeated or another's falls out."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from shared.messages import Commit, DrafterStatus, Drafts, Open, Proposal
from shared.tokens import digest, pack
from tests.worker.builders import make_scheduler, mock_decoder, request
from worker.drafts import PROPOSALS_PER_STREAM
from worker.events import Advanced, Started
from worker.following import REMEMBERED_COMMITS, Following, nearness
from worker.outbox import Outgoing
from worker.scheduler import Scheduler
from worker.sequence import Sequence

FAR = 1e9
PROMPT = [5, 6, 7]


def follower(zone: str = "eu-north1-a", vocabulary: str = "v") -> Following:
    return Following("w1", 9, zone, vocabulary, 8, 2.0)


def told(outgoing: list[Outgoing]) -> list[Any]:
    return [event for _, message in outgoing for event in message.events]  # type: ignore[attr-defined]


class Stream:
    """A worker with one stream that a drafter follows."""

    def __init__(self) -> None:
        self.following = follower()
        self.scheduler: Scheduler = make_scheduler(mock_decoder())
        sequence = self.scheduler.add(request(max_tokens=400), 0.0, FAR)
        assert sequence is not None
        self.sequence: Sequence = sequence
        self.scheduler.plan(0.0)
        self.following.hear(DrafterStatus("d1", 3), 0.0)
        self.following.follow([], [])
        (self.opened,) = told(self.following.follow([Started(sequence)], [sequence]))

    @property
    def text(self) -> list[int]:
        return self.sequence.tokens

    def says(self, *tokens: int) -> Commit:
        index = self.sequence.delivered
        self.sequence.tokens += tokens
        (commit,) = told(self.following.follow([Advanced(self.sequence, index, list(tokens))], [self.sequence]))
        assert isinstance(commit, Commit)
        return commit

    def proposal(self, base: int | None = None, **fields: Any) -> Proposal:
        base = len(self.text) if base is None else base
        values = {"tokens": pack([1, 2]), "digest": digest(pack(self.text[:base]))} | fields
        return Proposal("r", 1, base, **values)

    def admit(self, *proposals: Proposal, drafter: str = "d1", epoch: int = 3, worker_epoch: int = 9) -> int:
        """How many of them are for us."""
        drafts = Drafts(drafter, epoch, proposals, worker_epoch)
        ours = self.following.admit(drafts, self.scheduler.length_of, 1.0)
        return 0 if ours is None else len(ours.proposals)


def test_what_is_told_names_the_text_that_it_goes_on_from() -> None:
    stream = Stream()
    assert isinstance(stream.opened, Open) and stream.opened.tokens == pack(PROMPT)
    assert stream.says(8, 9).digest == digest(pack(PROMPT))
    assert stream.says(10).digest == digest(pack([*PROMPT, 8, 9]))


def test_a_predicted_answer_goes_on_to_the_drafter() -> None:
    following, scheduler = follower(), make_scheduler(mock_decoder())
    sequence = scheduler.add(request(prediction=pack([1, 2])), 0.0, FAR)
    assert sequence is not None
    following.hear(DrafterStatus("d1", 3), 0.0)
    following.follow([], [])
    (opened,) = told(following.follow([Started(sequence)], [sequence]))
    assert opened.prediction == pack([1, 2])


def test_an_answer_to_what_was_told_is_for_us_now_and_a_few_steps_later() -> None:
    stream = Stream()
    assert stream.admit(stream.proposal()) == 1
    stream.says(8, 9)
    late = stream.proposal()
    stream.says(10)
    stream.says(11)
    assert stream.admit(late) == 1
    assert stream.following.alien == stream.following.strange == stream.following.repeated == 0


@pytest.mark.parametrize("who", [{"drafter": "d2"}, {"epoch": 2}, {"worker_epoch": 8}])
def test_an_answer_of_another_drafter_or_another_life_is_not_for_us(who: dict[str, Any]) -> None:
    stream = Stream()
    assert stream.admit(stream.proposal(), stream.proposal(assumed=pack([3])), **who) == 0
    assert stream.following.alien == 2


def test_a_drafter_that_does_not_say_whom_it_means_or_which_text_is_believed() -> None:
    stream = Stream()
    assert stream.admit(stream.proposal(digest=0), worker_epoch=0) == 1


def test_a_drafter_that_is_newer_than_its_last_heartbeat_is_heard() -> None:
    stream = Stream()
    assert stream.admit(stream.proposal(), epoch=4) == 1


def test_without_a_drafter_nothing_is_for_us() -> None:
    stream = Stream()
    stream.following.hear(DrafterStatus("d1", 3, state="draining"), 0.1)
    assert stream.admit(stream.proposal()) == 0


@pytest.mark.parametrize("change", [
    lambda proposal: replace(proposal, request_id="other"),
    lambda proposal: replace(proposal, attempt=2),
    lambda proposal: replace(proposal, digest=proposal.digest ^ 1),
    lambda proposal: replace(proposal, base_length=4),
    lambda proposal: replace(proposal, base_length=10**6),
    lambda proposal: replace(proposal, base_length=-1),
])
def test_a_proposal_for_another_text_falls_out_and_the_others_of_its_message_stay(
        change: Callable[[Proposal], Proposal]) -> None:
    stream = Stream()
    stream.says(8, 9)
    good = stream.proposal()
    assert stream.admit(change(good), good) == 1
    assert stream.following.alien + stream.following.strange == 1


def test_a_proposal_that_comes_twice_counts_once_and_another_for_the_same_text_counts_too() -> None:
    stream = Stream()
    one = stream.proposal()
    assert stream.admit(one, one) == 1
    assert stream.admit(one) == 0
    assert stream.following.repeated == 2
    assert stream.admit(replace(one, assumed=pack([3])), replace(one, tokens=pack([4]))) == 2


@pytest.mark.parametrize(("said", "counts"), [(0.25, 0.25), (-1.0, 0.0), (float("nan"), 0.0), (float("inf"), 2.0),
                                              (float("-inf"), 0.0), (1e9, 2.0)])
def test_of_a_drafters_seconds_no_more_count_than_have_passed_and_never_less_than_none(
        said: float, counts: float) -> None:
    stream = Stream()
    ours = stream.following.admit(Drafts("d1", 3, (stream.proposal(),), 9, said), stream.scheduler.length_of, 2.0)
    assert ours is not None and ours.seconds == counts
    more = stream.proposal(tokens=pack([4]))
    ours = stream.following.admit(Drafts("d1", 3, (more,), 9, 1e9), stream.scheduler.length_of, 2.5)
    assert ours is not None and ours.seconds == 2.5 - counts


@pytest.mark.parametrize("usd", [-1.0, float("nan"), float("inf")])
def test_a_price_that_is_none_costs_nothing(usd: float) -> None:
    following = follower()
    following.hear(DrafterStatus("d1", 3, price_usd_per_hour=usd), 0.0)
    assert (following.name, following.usd_per_hour) == ("d1", 0.0)


def test_a_flood_of_answers_to_one_text_is_cut_off() -> None:
    stream = Stream()
    assert stream.admit(*(stream.proposal(tokens=pack([token])) for token in range(100))) == PROPOSALS_PER_STREAM


def test_what_may_be_answered_is_bounded() -> None:
    stream = Stream()
    first = stream.proposal()
    bases = []
    for token in range(3 * REMEMBERED_COMMITS):
        stream.says(token % 100)
        bases.append(stream.proposal())
        assert stream.admit(bases[-1]) == 1
    assert stream.admit(first) == 0
    (known,) = stream.following._open.values()
    assert len(known.texts) == REMEMBERED_COMMITS and len(known.answers) <= REMEMBERED_COMMITS
    stream.following.follow([], [])


def test_the_lead_is_what_streams_went_on_by_until_answers_came() -> None:
    stream = Stream()
    assert stream.following.lead_tokens == 0
    for _ in range(40):
        late = stream.proposal()
        stream.says(1, 2, 3)
        assert stream.admit(late) == 1
    assert stream.following.lead_tokens == 3
    stream.sequence.tokens.append(4)
    (message,) = stream.following.follow([Advanced(stream.sequence, stream.sequence.delivered - 1, [4])],
                                         [stream.sequence])
    assert message.message.lead_tokens == 3  # type: ignore[attr-defined]
    for _ in range(200):
        stream.says(1)
        assert stream.admit(stream.proposal()) == 1
    assert stream.following.lead_tokens == 0
    stream.following.hear(DrafterStatus("d1", 3, state="draining"), 0.1)
    stream.following.hear(DrafterStatus("d2", 1), 0.1)
    assert stream.following.lead_tokens == 0


def test_a_conditional_proposal_says_nothing_about_the_lead() -> None:
    stream = Stream()
    late = stream.proposal(assumed=pack([1]))
    stream.says(1, 2, 3)
    assert stream.admit(late) == 1 and stream.following.lead_tokens == 0


@pytest.mark.parametrize(("statuses", "best"), [
    ([DrafterStatus("d1", 1, zone="us"), DrafterStatus("d2", 1, zone="eu-north1-b")], "d2"),
    ([DrafterStatus("d1", 1, zone="eu-north1-b"), DrafterStatus("d2", 1, zone="eu-north1-a")], "d2"),
    ([DrafterStatus("d1", 1, zone="eu"), DrafterStatus("d2", 1, zone="eu-north1")], "d2"),
    ([DrafterStatus("d1", 1, zone="eu", following=9), DrafterStatus("d2", 1, zone="eu", following=3)], "d2"),
    ([DrafterStatus("d1", 1, zone="eu", busy=0.97), DrafterStatus("d2", 1, zone="eu", following=3)], "d2"),
    ([DrafterStatus("d1", 1, vocabulary="other"), DrafterStatus("d2", 1, vocabulary="v", zone="us")], "d2"),
    ([DrafterStatus("d1", 1, state="starting"), DrafterStatus("d2", 1, zone="us")], "d2"),
    ([DrafterStatus("d1", 1, vocabulary="other")], ""),
])
def test_the_nearest_drafter_that_fits_is_taken_and_of_those_the_one_with_the_least_to_do(
        statuses: list[DrafterStatus], best: str) -> None:
    following = follower()
    for status in statuses:
        following.hear(replace(status, state="draining"), 0.0)
    following._heard = {status.id: (status, 0.0) for status in statuses}
    following.choose(0.0)
    assert following.name == best


def test_a_drafter_is_kept_while_it_lives_and_left_when_it_falls_silent() -> None:
    following = follower()
    following.hear(DrafterStatus("d1", 1, zone="us"), 0.0)
    following.hear(DrafterStatus("d2", 1, zone="eu-north1-a"), 0.5)
    assert following.name == "d1"
    following.hear(DrafterStatus("d2", 1, zone="eu-north1-a"), 2.4)
    assert following.name == "d2"


words = st.lists(st.sampled_from(["a", "b"]), min_size=1, max_size=3)


@given(words, words)
def test_nearness_is_what_two_zones_have_in_common(one: list[str], other: list[str]) -> None:
    common = next((place for place, (mine, theirs) in enumerate(zip(one, other, strict=False)) if mine != theirs),
                  min(len(one), len(other)))
    assert nearness("-".join(one), "-".join(other).upper()) == common + (one == other)
