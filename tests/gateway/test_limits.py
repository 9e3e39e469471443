"""Token buckets and counts: never more than a minute's worth at once, never more than the rate in the long run."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.limits import Meter, TooMuch, span
from gateway.tenants import Limits
from shared.errors import RateLimited


def test_requests_are_refused_over_the_rate_and_let_in_when_the_answer_said_so() -> None:
    meter = Meter(Limits(requests_per_minute=60), 0.0)
    for _ in range(60):
        meter.count(0.0)
    with pytest.raises(RateLimited) as refused:
        meter.count(0.25)
    assert refused.value.retry_after_s == pytest.approx(0.75)
    meter.count(1.0 + 1e-9)
    with pytest.raises(RateLimited):
        meter.count(1.0)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 50), st.lists(st.floats(0, 20), min_size=1, max_size=200))
def test_no_minute_and_a_half_has_more_than_two_and_a_half_minutes_worth(most: int, pauses: list[float]) -> None:
    """A full bucket, and what flows in meanwhile."""
    meter, now_s = Meter(Limits(requests_per_minute=most), 0.0), 0.0
    taken: list[float] = []
    for pause_s in pauses:
        now_s += pause_s
        try:
            meter.count(now_s)
        except RateLimited as error:
            assert error.retry_after_s is not None and 0 < error.retry_after_s <= 60 / most + 1e-6
        else:
            taken.append(now_s)
        assert sum(now_s - 90 <= at for at in taken) <= 2.5 * most + 1


def test_streams_are_all_let_in_or_none_and_what_can_never_be_is_told_apart() -> None:
    meter = Meter(Limits(concurrency=4), 0.0)
    meter.enter(3)
    with pytest.raises(RateLimited, match="3 streams of this tenant are under way, and it may have 4") as refused:
        meter.enter(2)
    assert refused.value.retry_after_s and refused.value.retryable
    assert meter.streams == 3
    with pytest.raises(TooMuch) as never:
        meter.enter(5)
    assert (never.value.retryable, never.value.retry_after_s) == (False, None)
    meter.leave(3)
    meter.enter(4)


def test_tokens_are_set_aside_whole_and_what_was_not_used_comes_back() -> None:
    meter = Meter(Limits(tokens_per_minute=600), 0.0)
    meter.reserve(500, 0.0)
    with pytest.raises(RateLimited, match="100 of its 600") as refused:
        meter.reserve(110, 0.0)
    assert refused.value.retry_after_s == pytest.approx(1.0)
    meter.settle(500, 20, 0.0)
    meter.reserve(580, 0.0)
    with pytest.raises(TooMuch, match="601 tokens, and this tenant has 600"):
        meter.reserve(601, 0.0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400), st.floats(0, 30)), max_size=50))
def test_what_was_given_back_late_is_never_more_than_a_minutes_worth(history: list[tuple[int, int, float]]) -> None:
    meter, now_s = Meter(Limits(tokens_per_minute=400), 0.0), 0.0
    for reserved, used, pause_s in history:
        try:
            meter.reserve(reserved, now_s)
        except RateLimited:
            continue
        now_s += pause_s
        meter.settle(reserved, min(used, reserved), now_s)
        said = dict(meter.headers(now_s))
        assert 0 <= int(said[b"x-ratelimit-remaining-tokens"]) <= 400
    now_s += 60
    assert dict(meter.headers(now_s))[b"x-ratelimit-remaining-tokens"] == b"400"
    meter.reserve(400, now_s)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 500), st.lists(st.tuples(
    st.sampled_from(["begin", "end", "burst"]), st.sampled_from([0.1, 0.5, 1.0]) | st.floats(0, 1),
    st.sampled_from([0.0, 1.0]) | st.floats(0, 1), st.sampled_from([0.0, 30.0, 60.0]) | st.floats(0, 90)), max_size=80))
def test_however_requests_overlap_what_was_really_used_is_never_over_the_rate_and_one_minutes_worth(
        most: int, history: list[tuple[str, float, float, float]]) -> None:
    """Between any two moments; a request's use may fall on any moment of its run, so on the worst: all at its end."""
    meter, now_s = Meter(Limits(tokens_per_minute=most), 0.0), 0.0
    under_way: list[int] = []
    used: list[tuple[float, int]] = []
    for what, part, share, pause_s in history:
        now_s += pause_s
        count = round(part * most)
        if what != "end":
            with contextlib.suppress(RateLimited):
                meter.reserve(count, now_s)
                under_way.append(count)
        ended = under_way[:] if what == "burst" else [under_way[count % len(under_way)]] if under_way else []
        for reserved in ended if what != "begin" else []:
            under_way.remove(reserved)
            tokens = round(share * reserved)
            meter.settle(reserved, tokens, now_s)
            used.append((now_s, tokens))
    for first, (from_s, _) in enumerate(used):
        total = 0
        for at_s, tokens in used[first:]:
            total += tokens
            assert total <= most + most * (at_s - from_s) / 60 + 1e-6


def test_what_was_held_for_minutes_and_given_back_is_not_saved_up() -> None:
    """Nine minutes of reservations that used nothing once let a tenant use nine minutes' worth at one instant."""
    meter, under_way = Meter(Limits(tokens_per_minute=1000), 0.0), 0
    for minute in range(9):
        with contextlib.suppress(RateLimited):
            meter.reserve(1000, 60.0 * minute)
            under_way += 1
    used = 0
    for _ in range(9):
        if under_way:
            meter.settle(1000, 5, 540.0)
            under_way -= 1
            used += 5
        with contextlib.suppress(RateLimited):
            meter.reserve(995, 540.0)
            meter.settle(995, 995, 540.0)
            used += 995
    assert used == 1000


def test_what_was_used_flows_back_from_the_end_of_its_request_on() -> None:
    meter = Meter(Limits(tokens_per_minute=600), 0.0)
    meter.reserve(600, 0.0)
    meter.settle(600, 600, 60.0)
    with pytest.raises(RateLimited, match="0 of its 600"):
        meter.reserve(1, 60.0)


def test_what_waits_for_a_reservation_is_told_to_come_back_soon_and_gets_its_turn() -> None:
    meter = Meter(Limits(tokens_per_minute=600), 0.0)
    meter.reserve(600, 0.0)
    for now_s in (0.0, 300.0):
        with pytest.raises(RateLimited, match="0 of its 600") as refused:
            meter.reserve(100, now_s)
        assert refused.value.retry_after_s == 1.0
    meter.settle(600, 550, 300.0)
    with pytest.raises(RateLimited) as refused:
        meter.reserve(100, 300.0)
    assert refused.value.retry_after_s == pytest.approx(5.0)
    meter.reserve(100, 305.0 + 1e-9)


def test_a_lowered_limit_makes_a_tenant_wait_a_minute_at_most_for_what_it_used_before() -> None:
    """Once 100000 tokens of use at a new rate of 1000 a minute shut a tenant out for 99 minutes."""
    meter = Meter(Limits(requests_per_minute=600, tokens_per_minute=100_000), 0.0)
    for _ in range(600):
        meter.count(0.0)
    meter.reserve(60_000, 0.0)
    meter.reserve(40_000, 0.0)
    meter.settle(60_000, 60_000, 0.0)
    meter.change(Limits(requests_per_minute=6, tokens_per_minute=1000), 0.0)
    with pytest.raises(RateLimited) as refused:
        meter.count(0.0)
    assert refused.value.retry_after_s == pytest.approx(10.0)
    meter.settle(40_000, 40_000, 0.0)  # was under way
    with pytest.raises(RateLimited) as refused:
        meter.reserve(1000, 0.0)
    assert refused.value.retry_after_s == pytest.approx(60.0)
    meter.count(10.0)
    meter.reserve(1000, 60.0)


def test_limits_can_be_given_and_taken_away_while_requests_are_under_way() -> None:
    meter = Meter(Limits(), 0.0)
    meter.reserve(5000, 0.0)
    meter.change(Limits(tokens_per_minute=600), 0.0)
    with pytest.raises(RateLimited):
        meter.reserve(1, 0.0)
    meter.settle(5000, 100, 0.0)
    meter.reserve(500, 0.0)
    meter.change(Limits(), 0.0)
    meter.reserve(5000, 0.0)
    meter.settle(5000, 5000, 0.0)
    meter.settle(500, 500, 0.0)
    meter.change(Limits(tokens_per_minute=600), 0.0)
    meter.reserve(600, 0.0)


def test_the_headers_say_what_is_left_and_nothing_of_what_has_no_limit() -> None:
    meter = Meter(Limits(requests_per_minute=60, tokens_per_minute=600), 0.0)
    meter.count(0.0)
    meter.reserve(150, 0.0)
    assert dict(meter.headers(0.0)) == {
        b"x-ratelimit-limit-requests": b"60", b"x-ratelimit-remaining-requests": b"59",
        b"x-ratelimit-reset-requests": b"1s", b"x-ratelimit-limit-tokens": b"600",
        b"x-ratelimit-remaining-tokens": b"450", b"x-ratelimit-reset-tokens": b"15s"}
    assert Meter(Limits(concurrency=4), 0.0).headers(0.0) == []
    assert not Limits() and Limits(concurrency=1)


def test_no_limit_is_no_limit() -> None:
    meter = Meter(Limits(), 0.0)
    for _ in range(1000):
        meter.count(0.0)
        meter.enter(100)
        meter.reserve(1 << 40, 0.0)
        meter.settle(1 << 40, 1 << 40, 0.0)
    assert meter.streams == 100_000


@pytest.mark.parametrize(("seconds", "said"), [(0, "0ms"), (0.0001, "1ms"), (0.02, "20ms"), (1.0, "1s"), (1.5, "1.5s"),
                                               (59.9996, "1m0s"), (360, "6m0s"), (61.25, "1m1.25s")])
def test_a_time_is_written_as_openai_writes_it(seconds: float, said: str) -> None:
    assert span(seconds) == said
