"""What a router holds the gateway waits for as long as it is told to, and takes back when nobody needs it."""

import pytest

from gateway.failover import Fail, SendCancel, Submit, Withdraw
from shared.errors import DeadlineExceeded, RateLimited
from shared.messages import Accepted, Cancel, Failed, Queued
from tests.gateway.test_failover import stream, tokens


def test_a_request_that_is_held_waits_without_using_up_its_attempts() -> None:
    state = stream()
    for half_second in range(1, 81):
        assert state.hear(Queued("r", 1), "router-a", 1, half_second / 2) == []
        assert state.tick(half_second / 2 + 0.4) == []
    assert state.hear(Accepted("r", 1, "w1"), "w1", 5, 41.0) == []
    assert (state.worker, state.held_by, state.attempt) == ("w1", "", 1)


def test_a_router_that_falls_silent_loses_what_it_holds_to_the_next_attempt() -> None:
    state = stream()
    state.hear(Queued("r", 1), "router-a", 1, 10.0)
    assert state.tick(11.9) == []
    withdraw, submit = state.tick(12.0)
    assert withdraw == Withdraw("router-a", Cancel("r", 1))
    assert isinstance(submit, Submit) and (submit.message.attempt, submit.cause) == (2, "not_accepted")
    # it was only slow: what it still holds is not wanted
    assert state.hear(Queued("r", 1), "router-a", 1, 12.1) == [Withdraw("router-a", Cancel("r", 1))]


def test_a_client_that_leaves_takes_its_request_out_of_the_routers_queue() -> None:
    state = stream()
    state.hear(Queued("r", 1), "router-a", 1, 0.5)
    assert state.cancel() == [Withdraw("router-a", Cancel("r", 1))]


def test_a_deadline_that_passes_in_a_queue_takes_the_request_out() -> None:
    state = stream(deadline_s=5.0)
    state.hear(Queued("r", 1), "router-a", 1, 4.5)
    withdraw, fail = state.tick(5.0)
    assert withdraw == Withdraw("router-a", Cancel("r", 1))
    assert isinstance(fail, Fail) and isinstance(fail.error, DeadlineExceeded)


def test_a_late_word_of_the_queue_changes_nothing_for_a_stream_under_way() -> None:
    state = stream()
    state.hear(tokens(0, 7), "w1", 5, 1.0)
    assert state.hear(Queued("r", 1), "router-a", 1, 1.1) == []
    assert state.cancel() == [SendCancel("w1", Cancel("r", 1))]


@pytest.mark.parametrize("held", [True, False])
def test_a_tenant_over_its_share_hears_so_at_once(held: bool) -> None:
    state = stream()
    if held:
        state.hear(Queued("r", 1), "router-a", 1, 0.5)
    (fail,) = state.hear(Failed("r", 1, "rate_limit_exceeded", "over its share", True, 7.5), "router-a", 1, 1.0)
    assert isinstance(fail, Fail) and isinstance(fail.error, RateLimited)
    assert fail.error.retry_after_s == 7.5


def test_a_router_that_leaves_hands_what_it_holds_to_the_next() -> None:
    state = stream()
    state.hear(Queued("r", 1), "router-a", 1, 0.5)
    (submit,) = state.hear(Failed("r", 1, "mesh_unavailable", "this router is leaving", True), "router-a", 1, 1.0)
    assert isinstance(submit, Submit) and submit.message.attempt == 2
