"""Law 5, without a mesh: the client's tokens are the true ones, each once, whatever happens to messages and workers."""

import heapq
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.failover import (
    PROGRESS_TOKENS,
    Action,
    Deliver,
    Fail,
    Finish,
    Limits,
    SendCancel,
    Senders,
    StreamState,
    Submit,
)
from shared.blocks import hash_chain, join_hashes
from shared.errors import DeadlineExceeded, MeshUnavailable, NoEligibleWorker, Overloaded, WorkerFailed
from shared.messages import Accepted, Cancel, Failed, Finished, Generate, Reply, StepReplies, Tokens
from shared.tokens import pack, unpack

PROMPT = list(range(100, 140))
LIMITS = Limits(accept_s=2.0, stall_s=20.0, max_attempts=4)


def request(**more: Any) -> Generate:
    fields = dict(request_id="r", attempt=1, gateway="g", model="m", tokens=pack(PROMPT), max_tokens=8, deadline=0.0,
                  cache_salt=b"salt", block_hashes=join_hashes(hash_chain(PROMPT, b"salt")), stop_token_ids=(2,))
    return Generate(**(fields | more))


def stream(limits: Limits = LIMITS, deadline_s: float = 600.0, **more: Any) -> StreamState:
    state = StreamState(request(**more), limits, deadline_s)
    assert state.start(0.0) == [Submit(state.request)]
    return state


def accepted(attempt: int = 1) -> Accepted:
    return Accepted("r", attempt, "w1", 16)


def tokens(index: int, *ids: int, attempt: int = 1) -> Tokens:
    return Tokens("r", attempt, index, pack(ids))


def finished(count: int, attempt: int = 1, **more: Any) -> Finished:
    return Finished("r", attempt, **({"reason": "length", "completion_tokens": count} | more))


def running(*ids: int, **more: Any) -> StreamState:
    """A stream that w1 works on, with these tokens delivered at second 1."""
    state = stream(**more)
    assert state.hear(accepted(), "w1", 5, 1.0) == []
    if ids:
        assert state.hear(tokens(0, *ids), "w1", 5, 1.0) == [Deliver(list(ids))]
    return state


def test_a_calm_stream_delivers_and_finishes() -> None:
    state = running(7, 8)
    assert state.hear(tokens(2, 9), "w1", 5, 1.1) == [Deliver([9])]
    assert state.hear(finished(3, reason="stop"), "w1", 5, 1.1) == [Finish(finished(3, reason="stop"))]
    assert state.hear(tokens(3, 1), "w1", 5, 1.2) == []
    assert state.tick(10_000.0) == []


def test_what_came_before_is_trimmed_by_index() -> None:
    state = running(7, 8)
    assert state.hear(tokens(0, 7, 8), "w1", 5, 1.1) == []
    assert state.hear(tokens(1, 8, 9), "w1", 5, 1.2) == [Deliver([9])]


def test_a_gap_resubmits_behind_what_was_delivered() -> None:
    state = running(7, 8)
    assert state.hear(tokens(3, 10), "w1", 5, 1.1) == []
    assert state.tick(1.25) == []
    cancel, submit = state.tick(1.3)
    assert cancel == SendCancel("w1", Cancel("r", 1))
    assert isinstance(submit, Submit) and submit.cause == "gap"
    again = submit.message
    assert (again.attempt, unpack(again.generated), again.exclude_workers) == (2, [7, 8], ())
    assert again.block_hashes == join_hashes(hash_chain([*PROMPT, 7, 8], b"salt"))
    assert state.hear(tokens(2, 9), "w1", 5, 1.2) == [SendCancel("w1", Cancel("r", 1))]
    assert state.delivered == [7, 8]
    assert state.hear(tokens(2, 9, attempt=2), "w2", 1, 1.3) == [Deliver([9])]


def test_hashes_of_a_resubmission_reach_over_blocks_of_delivered_tokens() -> None:
    generated = list(range(40))
    state = running(*generated, max_tokens=100, stop_token_ids=())
    state.hear(tokens(50, 1), "w1", 5, 2.0)
    _, submit = state.tick(2.2)
    assert isinstance(submit, Submit)
    assert submit.message.block_hashes == join_hashes(hash_chain(PROMPT + generated, b"salt"))


def test_nobody_accepts_so_it_is_sent_again_and_at_last_refused() -> None:
    state = stream()
    assert state.tick(1.9) == []
    for attempt in (2, 3, 4):
        (submit,) = state.tick(2.0 * (attempt - 1))
        assert isinstance(submit, Submit)
        assert (submit.message.attempt, submit.cause) == (attempt, "not_accepted")
    (fail,) = state.tick(8.0)
    assert isinstance(fail, Fail) and isinstance(fail.error, MeshUnavailable) and fail.error.retry_after_s


def test_a_long_stream_may_lose_more_attempts_than_a_short_one_if_each_made_progress() -> None:
    state = running(max_tokens=1000)
    done = 0
    for attempt in range(1, 20):
        state.hear(tokens(done, *range(100, 100 + PROGRESS_TOKENS), attempt=attempt), "w1", 5, float(attempt))
        done += PROGRESS_TOKENS
        lost = finished(0, attempt=attempt, reason="cancelled")
        assert isinstance(state.hear(lost, "w1", 5, attempt + 0.5)[-1], Submit)
    for attempt in range(20, 23):
        (submit,) = state.tick(state._since_s + 2.0)
        assert isinstance(submit, Submit) and submit.message.attempt == attempt + 1
    (fail,) = state.tick(state._since_s + 2.0)
    assert isinstance(fail, Fail) and isinstance(fail.error, WorkerFailed)


def test_messages_that_get_lost_between_tokens_do_not_use_up_the_attempts() -> None:
    state = running(max_tokens=1000)
    for done in range(20):
        attempt, now_s = done + 1, 2.0 + done
        assert state.hear(tokens(done, 7, attempt=attempt), "w1", 5, now_s)[0] == Deliver([7])
        state.hear(tokens(done + 2, 7, attempt=attempt), "w1", 5, now_s)
        assert isinstance(state.tick(now_s + LIMITS.reorder_s)[-1], Submit)


def test_tokens_stand_for_a_lost_accepted() -> None:
    state = stream()
    assert state.hear(tokens(0, 7), "w1", 5, 1.0) == [Deliver([7])]
    assert (state.worker, state.epoch) == ("w1", 5)
    assert state.tick(3.5) == []


def test_a_dead_worker_is_avoided_and_not_cancelled() -> None:
    state = running(7)
    (submit,) = state.worker_died("w1", 2.0)
    assert isinstance(submit, Submit)
    assert (submit.cause, submit.message.exclude_workers, submit.message.attempt) == ("worker_died", ("w1",), 2)


def test_a_restarted_worker_may_have_the_stream_again() -> None:
    state = running(7)
    assert state.worker_died("w1", 2.0, back_in_epoch=5) == []
    (submit,) = state.worker_died("w1", 2.0, back_in_epoch=6)
    assert isinstance(submit, Submit)
    assert submit.message.exclude_workers == ()


def test_a_request_that_kills_two_workers_at_once_is_stopped() -> None:
    state = running()
    state.worker_died("w1", 2.0)
    state.hear(accepted(2), "w2", 1, 2.1)
    (fail,) = state.worker_died("w2", 3.0)
    assert isinstance(fail, Fail) and isinstance(fail.error, WorkerFailed)


def test_a_stream_that_makes_progress_survives_two_deaths_and_not_three() -> None:
    state = running(7)
    state.worker_died("w1", 2.0)
    state.hear(tokens(1, 8, attempt=2), "w2", 1, 2.1)
    (submit,) = state.worker_died("w2", 3.0)
    assert isinstance(submit, Submit)
    assert submit.message.exclude_workers == ("w1", "w2")
    state.hear(tokens(2, 9, attempt=3), "w3", 1, 3.1)
    (fail,) = state.worker_died("w3", 4.0)
    assert isinstance(fail, Fail) and isinstance(fail.error, WorkerFailed)


def test_workers_that_were_only_silent_were_not_killed() -> None:
    state = running(7)
    for attempt in (2, 3, 4):
        (submit,) = state.worker_died("w1", 2.0)
        assert isinstance(submit, Submit)
        state.lives("w1", 5)
        assert state.hear(tokens(attempt - 1, 8, attempt=attempt), "w1", 5, 2.1) == [Deliver([8])]


def test_a_worker_that_is_back_in_another_life_had_died() -> None:
    state = running(7)
    for attempt, worker in ((2, "w2"), (3, "w3")):
        state.worker_died(state.worker, 2.0)
        state.lives("w1", 6)
        state.hear(tokens(attempt - 1, 8, attempt=attempt), worker, 1, 2.1)
    (fail,) = state.worker_died("w3", 3.0)
    assert isinstance(fail, Fail) and isinstance(fail.error, WorkerFailed)


def test_a_stall_sends_it_elsewhere_and_cancels_the_silent_attempt() -> None:
    state = running(7)
    assert state.tick(20.9) == []
    cancel, submit = state.tick(21.0)
    assert cancel == SendCancel("w1", Cancel("r", 1))
    assert isinstance(submit, Submit)
    assert (submit.cause, submit.message.exclude_workers) == ("stalled", ("w1",))


def test_an_accepted_stream_may_queue_for_its_first_token_longer_than_a_stall() -> None:
    state = running()
    assert state.tick(80.0) == []
    assert isinstance(state.tick(92.0)[-1], Submit)


def test_a_suspect_that_goes_on_is_cleared() -> None:
    state = running(7)
    state.lost_reply("w1", 2.0)
    state.hear(tokens(1, 8), "w1", 5, 2.5)
    assert state.tick(4.0) == []


def test_a_suspect_that_stays_silent_is_sent_again_after_a_second() -> None:
    state = running(7)
    state.lost_reply("w1", 2.0)
    state.lost_reply("w1", 2.9)
    assert state.tick(2.9) == []
    assert isinstance(state.tick(3.0)[-1], Submit)


def test_a_suspect_that_still_queues_is_left_in_its_place() -> None:
    state = running()
    state.lost_reply("w1", 2.0)
    assert state.tick(4.0, queueing=True) == []
    assert isinstance(state.tick(4.1, queueing=False)[-1], Submit)


def test_a_lost_reply_of_another_worker_is_no_concern() -> None:
    state = running(7)
    state.lost_reply("w2", 2.0)
    assert state.tick(4.0) == []


def test_a_lost_last_word_ends_the_stream_all_the_same() -> None:
    for ids, reason in ((range(10, 18), "length"), ((5, 2), "stop")):
        state = running(*ids)
        assert state.tick(1.5) == []
        _, finish = state.tick(2.1)
        assert isinstance(finish, Finish)
        assert (finish.message.reason, finish.message.completion_tokens) == (reason, len(ids))
        assert (finish.message.cached_tokens, finish.message.prompt_tokens) == (16, 40)


def test_a_last_word_that_counts_otherwise_is_a_gap() -> None:
    state = running(7)
    assert state.hear(finished(3), "w1", 5, 1.1) == []
    assert isinstance(state.tick(1.3)[-1], Submit)
    assert isinstance(running(7, 8).hear(finished(1), "w1", 5, 1.1)[-1], Submit)


def test_what_was_overtaken_is_waited_for_and_put_in_its_place() -> None:
    state = running(7)
    assert state.hear(tokens(4, 11), "w1", 5, 1.1) == []
    assert state.hear(tokens(2, 9, 10), "w1", 5, 1.1) == []
    assert state.hear(finished(5), "w1", 5, 1.15) == []
    assert state.hear(tokens(1, 8), "w1", 5, 1.2) == [Deliver([8, 9, 10, 11]), Finish(finished(5))]


def test_a_gap_that_closes_leaves_no_timer_behind() -> None:
    state = running(7)
    state.hear(tokens(2, 9), "w1", 5, 1.1)
    assert state.hear(tokens(1, 8), "w1", 5, 1.2) == [Deliver([8, 9])]
    assert state.tick(5.0) == []


def test_what_comes_too_early_is_kept_within_bounds() -> None:
    state = running(7, max_tokens=1000)
    actions: list[Action] = []
    for index in range(2, 100):
        actions += state.hear(tokens(2 * index, 1), "w1", 5, 1.1)
    assert [action.cause for action in actions if isinstance(action, Submit)] == ["gap"]
    assert len(state._early) == 0


def test_a_cancel_nobody_asked_for_is_no_end() -> None:
    state = running(7)
    assert isinstance(state.hear(finished(1, reason="cancelled"), "w1", 5, 1.1)[-1], Submit)


def test_more_tokens_than_asked_for_are_not_delivered() -> None:
    state = running(1, 1, 1, 1, 1, 1, 1)
    assert state.hear(tokens(7, 3, 4, 5), "w1", 5, 2.0) == [Deliver([3])]


def test_an_overloaded_mesh_refuses_before_the_first_token() -> None:
    state = stream()
    (fail,) = state.hear(Failed("r", 1, "overloaded", "full", True, 3.0), "router-1", 1, 0.1)
    assert isinstance(fail, Fail) and isinstance(fail.error, Overloaded)
    assert fail.error.retry_after_s == 3.0


def test_what_one_worker_refuses_is_offered_to_others_and_at_last_refused() -> None:
    state = stream()
    for attempt in (1, 2, 3):
        refusal = Failed("r", attempt, "overloaded", "leaving", True, 1.0)
        (submit,) = state.hear(refusal, f"w{attempt}", 1, 0.1, from_worker=True)
        assert isinstance(submit, Submit)
        assert submit.message.exclude_workers[-1] == f"w{attempt}"
    (fail,) = state.hear(Failed("r", 4, "overloaded", "full", True, 1.0), "w4", 1, 0.2, from_worker=True)
    assert isinstance(fail, Fail) and isinstance(fail.error, Overloaded)


def test_an_overloaded_mesh_is_asked_again_more_and_more_slowly_after_the_first_token() -> None:
    state = running(7)
    state.worker_died("w1", 2.0)
    now_s, pauses = 2.0, []
    for attempt in range(2, 8):
        assert state.hear(Failed("r", attempt, "overloaded", "full", True), "router-1", 1, now_s) == []
        start_s = now_s
        while not (actions := state.tick(now_s)):
            now_s += 0.05
        pauses.append(now_s - start_s)
        assert isinstance(actions[0], Submit)
        assert actions[0].message.attempt == attempt + 1
    assert pauses == sorted(pauses) and pauses[-1] > 4 * pauses[0]
    (fail,) = state.hear(Failed("r", 8, "overloaded", "full", True), "router-1", 1, 22.0)
    assert isinstance(fail, Fail) and isinstance(fail.error, Overloaded)


def test_no_eligible_worker_is_an_error_unless_one_was_excluded() -> None:
    refusal = Failed("r", 1, "no_eligible_worker", "nobody in zone eu")
    (fail,) = stream().hear(refusal, "router-1", 1, 0.1)
    assert isinstance(fail, Fail) and isinstance(fail.error, NoEligibleWorker)
    state = running(7)
    state.worker_died("w1", 2.0)
    assert state.hear(Failed("r", 2, "no_eligible_worker", "only w1"), "router-1", 1, 2.1) == []
    (submit,) = state.tick(2.3)
    assert isinstance(submit, Submit)
    assert submit.message.exclude_workers == ()


def test_a_fault_of_the_worker_is_tried_elsewhere_and_one_of_the_request_is_not() -> None:
    (submit,) = running().hear(Failed("r", 1, "worker_failed", "out of blocks", True), "w1", 5, 1.1)
    assert isinstance(submit, Submit)
    assert submit.message.exclude_workers == ("w1",)
    (fail,) = running(7).hear(Failed("r", 1, "invalid_request", "token id out of range"), "w1", 5, 1.1)
    assert isinstance(fail, Fail) and fail.error.status == 400


def test_a_deaf_mesh_is_tried_for_as_long_as_acceptance_may_take() -> None:
    state = stream()
    now_s, attempts = 0.0, []
    actions: list[Action] = []
    while not any(isinstance(action, Fail) for action in actions):
        actions = state.unheard(state.attempt, now_s) or state.tick(now_s)
        attempts += [action.message.attempt for action in actions if isinstance(action, Submit)]
        now_s += 0.1
    assert isinstance(actions[0], Fail) and isinstance(actions[0].error, MeshUnavailable)
    assert set(attempts) == {1} and 3 <= len(attempts) <= 8
    assert 2.0 <= now_s <= 3.5


def test_unheard_of_an_older_attempt_or_an_accepted_one_means_nothing() -> None:
    state = running()
    assert state.unheard(1, 1.1) == []
    assert state.state == "running"


def test_the_deadline_ends_it_and_stops_the_worker() -> None:
    state = running(7, deadline_s=10.0)
    cancel, fail = state.tick(10.0)
    assert cancel == SendCancel("w1", Cancel("r", 1))
    assert isinstance(fail, Fail) and isinstance(fail.error, DeadlineExceeded)


def test_a_client_that_leaves_stops_the_worker() -> None:
    state = running(7)
    assert state.cancel() == [SendCancel("w1", Cancel("r", 1))]
    assert state.cancel() == []
    assert state.hear(tokens(1, 8), "w1", 5, 2.0) == []


def test_a_second_worker_of_one_attempt_is_stopped() -> None:
    state = running(7)
    assert state.hear(accepted(), "w2", 1, 1.1) == [SendCancel("w2", Cancel("r", 1))]
    assert state.hear(tokens(0, 7, 8), "w2", 1, 1.2) == [Deliver([8]), SendCancel("w2", Cancel("r", 1))]
    assert state.hear(tokens(5, 9), "w2", 1, 1.3) == [SendCancel("w2", Cancel("r", 1))]
    assert state.hear(Failed("r", 1, "overloaded", "second copy", True), "router-2", 1, 1.4) == []
    assert state.worker == "w1"


def test_senders_are_counted_per_life() -> None:
    senders = Senders()
    assert senders.heard("w", 1, 4) == "fine"
    assert senders.heard("w", 1, 5) == "fine"
    assert senders.heard("w", 1, 5) == "fine"
    assert senders.heard("w", 1, 7) == "gap"
    assert senders.heard("w", 1, 6) == "filled"
    assert senders.heard("w", 2, 1) == "restarted"
    assert senders.heard("w", 1, 9) == "fine"
    assert not senders.told("w", 2, 1)
    assert senders.told("w", 2, 2)
    assert not senders.told("w", 2, 2)
    assert not senders.told("w", 1, 50)
    assert not senders.told("unknown", 1, 50)


def test_a_message_that_was_only_late_clears_its_sender() -> None:
    senders = Senders()
    assert [senders.heard("w", 1, seq) for seq in (1, 3, 5, 2, 2, 4, 4)] == [
        "fine", "gap", "gap", "fine", "fine", "filled", "fine"]
    assert senders.told("w", 1, 6) and senders.heard("w", 1, 6) == "filled"
    assert senders.heard("w", 1, 9) == "gap" and senders.heard("w", 2, 1) == "restarted"
    assert senders.heard("w", 1, 8) == "fine"


def test_a_stream_that_waits_its_turn_is_not_sent_again_for_a_message_that_was_only_late() -> None:
    state = running(7)
    state.lost_reply("w1", 2.0)
    state.found_reply("w1")
    assert state.tick(4.0) == []
    whole = running(*range(20, 28))
    whole.found_reply("w1")
    assert isinstance(whole.tick(4.0)[-1], Finish)  # its last word is missing still


def test_senders_are_bounded() -> None:
    senders = Senders(most=8)
    for number in range(100):
        senders.heard(f"w{number}", 1, 1)
    assert len(senders._last) == 8


# --- any seeded history ----------------------------------------------------------------------------------------------


class World:
    """One stream and a few workers under an unkind network; everything follows from one seed."""

    def __init__(self, seed: int, loss: float, duplication: float, reordering: float, deaths: int) -> None:
        self.rng = random.Random(seed)
        self.loss, self.duplication, self.reordering = loss, duplication, reordering
        self.truth = [self.rng.randrange(3, 1000) for _ in range(self.rng.randrange(1, 60))]
        self.stops = self.rng.random() < 0.5
        if self.stops:
            self.truth[-1] = 2
        self.max_tokens = len(self.truth) + (self.rng.randrange(1, 9) if self.stops else 0)
        self.now_s = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.serial = itertools.count()
        self.workers = {f"w{i}": 1 for i in range(3)}  # name -> epoch
        self.seq = dict.fromkeys(self.workers, 0)
        self.cancelled: set[tuple[str, int, int]] = set()  # worker, epoch, attempt
        self.heard_s = dict.fromkeys(self.workers, 0.0)
        self.delivered: list[int] = []
        self.terminals: list[Action] = []
        self.senders = Senders()
        self.state = StreamState(request(max_tokens=self.max_tokens), LIMITS, 120.0)
        for _ in range(deaths):
            self.after(self.rng.uniform(0, 5), self._kill)

    def run(self) -> None:
        self.perform(self.state.start(0.0))
        self.after(0.1, self._tick)
        for worker in self.workers:
            self.after(self.rng.uniform(0, 0.5), lambda worker=worker: self._status(worker))
        while self.events and self.now_s < 200.0:
            self.now_s, _, event = heapq.heappop(self.events)
            event()

    def after(self, delay_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now_s + delay_s, next(self.serial), event))

    def send(self, receive: Callable[[], None]) -> None:
        if self.rng.random() < self.loss:
            return
        for _ in range(2 if self.rng.random() < self.duplication else 1):
            self.after(self.rng.uniform(0.05, 0.4) if self.rng.random() < self.reordering else 0.01, receive)

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Deliver(ids):
                    assert not self.terminals
                    self.delivered += ids
                case Submit(message):
                    self.send(lambda message=message: self._place(message))
                case SendCancel(worker, message):
                    epoch = self.workers.get(worker, 0)
                    self.send(lambda worker=worker, epoch=epoch, message=message: self.cancelled.update(
                        (worker, epoch, attempt) for attempt in range(message.attempt + 1)))
                case Finish() | Fail():
                    self.terminals.append(action)

    def _place(self, message: Generate) -> None:
        free = [worker for worker in self.workers if worker not in message.exclude_workers]
        if not free or self.rng.random() < 0.05:
            code = "overloaded" if free else "no_eligible_worker"
            self.send(lambda: self._hear("router", 1, 0, (Failed("r", message.attempt, code, "", bool(free)),)))
            return
        worker = self.rng.choice(free)
        self.send(lambda: self._work(worker, self.workers[worker], message))

    def _work(self, worker: str, epoch: int, message: Generate) -> None:
        generated = unpack(message.generated)
        assert generated == self.truth[:len(generated)]
        self._reply(worker, epoch, Accepted("r", message.attempt, worker))
        self.after(self.rng.uniform(0, 0.5), lambda: self._step(worker, epoch, message.attempt, len(generated)))

    def _step(self, worker: str, epoch: int, attempt: int, at: int) -> None:
        if self.workers[worker] != epoch or (worker, epoch, attempt) in self.cancelled:
            return
        upto = min(len(self.truth), at + self.rng.randrange(1, 5))
        replies: list[Reply] = [Tokens("r", attempt, at, pack(self.truth[at:upto]))]
        if upto == len(self.truth):
            replies.append(finished(upto, attempt, reason="stop" if self.stops else "length", worker=worker))
        self._reply(worker, epoch, *replies)
        if upto < len(self.truth):
            self.after(self.rng.uniform(0.01, 0.2), lambda: self._step(worker, epoch, attempt, upto))

    def _reply(self, worker: str, epoch: int, *replies: Reply) -> None:
        if self.workers[worker] != epoch:
            return
        self.seq[worker] += 1
        seq = self.seq[worker]
        self.send(lambda: self._hear(worker, epoch, seq, replies))

    def _hear(self, sender: str, epoch: int, seq: int, replies: tuple[Reply, ...]) -> None:
        message = StepReplies(sender, epoch, seq, replies)
        match self.senders.heard(sender, epoch, seq) if seq else "fine":
            case "gap":
                self.perform(self.state.lost_reply(sender, self.now_s))
            case "restarted":
                self.perform(self.state.worker_died(sender, self.now_s, back_in_epoch=epoch))
        for reply in message.replies:
            self.perform(self.state.hear(reply, sender, epoch, self.now_s))

    def _status(self, worker: str) -> None:
        epoch, sent = self.workers[worker], self.seq[worker]

        def receive() -> None:
            self.heard_s[worker] = self.now_s
            self.perform(self.state.worker_died(worker, self.now_s, back_in_epoch=epoch))
            if self.senders.told(worker, epoch, sent):
                self.perform(self.state.lost_reply(worker, self.now_s))

        self.send(receive)
        self.after(0.5, lambda: self._status(worker))

    def _kill(self) -> None:
        worker = self.state.worker or self.rng.choice(list(self.workers))
        if worker in self.workers:
            self.workers[worker] += 1
            self.seq[worker] = 0

    def _tick(self) -> None:
        worker = self.state.worker
        if worker in self.heard_s and self.now_s - self.heard_s[worker] > 2.0:
            self.perform(self.state.worker_died(worker, self.now_s))
        self.perform(self.state.tick(self.now_s))
        if not self.terminals:
            self.after(0.1, self._tick)


@given(seed=st.integers(0, 2**32), loss=st.sampled_from([0.0, 0.02, 0.1, 0.3]), duplication=st.sampled_from([0.0, 0.2]),
       reordering=st.sampled_from([0.0, 0.1, 0.4]), deaths=st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_any_history_of_loss_duplication_reordering_and_death_delivers_the_truth_and_one_end(
    seed: int, loss: float, duplication: float, reordering: float, deaths: int
) -> None:
    world = World(seed, loss, duplication, reordering, deaths)
    world.run()
    assert world.delivered == world.truth[:len(world.delivered)]
    assert len(world.terminals) == 1
    (end,) = world.terminals
    if isinstance(end, Finish):
        assert world.delivered == world.truth
        assert end.message.completion_tokens == len(world.truth)
        assert end.message.reason == ("stop" if world.stops else "length")


@given(seed=st.integers(0, 2**32), deaths=st.integers(0, 1))
@settings(max_examples=100, deadline=None)
def test_one_death_without_loss_always_ends_well(seed: int, deaths: int) -> None:
    world = World(seed, 0.0, 0.0, 0.0, deaths)
    world.run()
    (end,) = world.terminals
    assert isinstance(end, Finish) or isinstance(end.error, Overloaded)


def test_most_histories_with_a_little_loss_end_well() -> None:
    ends = []
    for seed in range(200):
        world = World(seed, 0.02, 0.02, 0.02, 1)
        world.run()
        ends += world.terminals
    assert sum(isinstance(end, Finish) for end in ends) > 160


@pytest.mark.parametrize("attempts", [1, 2])
def test_attempts_are_bounded(attempts: int) -> None:
    state = stream(Limits(max_attempts=attempts))
    for _ in range(attempts - 1):
        assert isinstance(state.tick(state._since_s + 2.0)[0], Submit)
    assert isinstance(state.tick(state._since_s + 2.0)[0], Fail)


def test_a_stream_that_began_asks_for_its_recipe_and_one_that_did_not_asks_for_none() -> None:
    begun, waiting = stream(), stream()
    for state in (begun, waiting):
        state.hear(accepted(), "w1", 5, 1.0, recipe="int8")
    begun.hear(tokens(0, 7), "w1", 5, 1.0, recipe="int8")
    (again,) = begun.worker_died("w1", 2.0)
    (fresh,) = waiting.worker_died("w1", 2.0)
    assert isinstance(again, Submit) and isinstance(fresh, Submit)
    assert (again.message.recipe, fresh.message.recipe) == ("int8", "")
    # begun nowhere yet, it may begin anywhere
    assert waiting.hear(tokens(0, 9, attempt=2), "w2", 1, 2.1, recipe="fp16") == [Deliver([9])]
    assert waiting.recipe == "fp16"


def test_tokens_of_another_recipe_never_join_a_stream() -> None:
    state = stream()
    state.hear(accepted(), "w1", 5, 1.0, recipe="int8")
    state.hear(tokens(0, 7), "w1", 5, 1.0, recipe="int8")
    state.worker_died("w1", 2.0)
    cancel, submit = state.hear(tokens(1, 8, attempt=2), "w2", 1, 2.1, recipe="fp16")
    assert cancel == SendCancel("w2", Cancel("r", 2))
    assert isinstance(submit, Submit) and submit.cause == "other_recipe"
    assert submit.message.exclude_workers == ("w1", "w2") and submit.message.recipe == "int8"
    assert state.delivered == [7]
    assert state.hear(tokens(1, 9, attempt=3), "w3", 1, 2.2, recipe="int8") == [Deliver([9])]


def test_a_stream_without_a_worker_of_its_recipe_ends_with_that_reason() -> None:
    state = stream()
    state.hear(tokens(0, 7), "w1", 5, 1.0, recipe="int8")
    (submit,) = state.worker_died("w1", 2.0)
    now_s, ends = 2.0, []
    while not ends and now_s < 60.0:
        now_s += 0.1
        refused = Failed("r", state.attempt, "no_eligible_worker", "recipe fp16, not int8")
        for action in state.hear(refused, "router", 1, now_s) + state.tick(now_s):
            ends += [action] if isinstance(action, Fail) else []
    assert isinstance(submit, Submit)
    (end,) = ends
    assert isinstance(end.error, NoEligibleWorker) and "recipe fp16, not int8" in end.error.message
    assert now_s < 2.0 + LIMITS.stall_s


histories = st.lists(st.tuples(
    st.sampled_from(["accepted", "tokens", "tokens", "tokens", "finished", "tick"]),
    st.integers(0, 9),  # index, or count
    st.lists(st.sampled_from([2, 7, 8, 9]), max_size=3),
    st.sampled_from(["w1", "w1", "w1", "w2"]),
    st.sampled_from([1, 1, 1, 2]),  # attempt
    st.sampled_from(["r", "r", "r", "other", ""])), max_size=12)


@settings(deadline=None)
@given(histories)
def test_the_short_way_for_the_next_tokens_does_what_hear_would_do(history: list[Any]) -> None:
    short, long = stream(), stream()
    for number, (kind, at, ids, sender, attempt, recipe) in enumerate(history):
        now_s = 0.1 * number
        if kind == "tick":
            assert short.tick(now_s) == long.tick(now_s)
            continue
        reply: Reply = (accepted(attempt) if kind == "accepted" else finished(at, attempt) if kind == "finished"
                        else tokens(at if at == 9 else len(long.delivered), *ids, attempt=attempt))
        actions = long.hear(reply, sender, 5, now_s, recipe=recipe)
        fresh = short.hear_next(reply, sender, now_s, recipe) if isinstance(reply, Tokens) else None
        if fresh is None:
            assert short.hear(reply, sender, 5, now_s, recipe=recipe) == actions
        else:
            assert actions == [Deliver(fresh)]
        assert all(getattr(short, name) == getattr(long, name) for name in StreamState.__slots__)
