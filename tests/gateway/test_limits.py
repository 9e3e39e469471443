"""Token buckets and counts: never more than a minute's worth at once, never more than the rate in the long run."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.limits import Meter, TooMuch, span
from gateway.tenants import Limits
from shared.errors import RateLimited


def test_requests_are_refused_over_the_rate_and_let_in_when_the_answer_said_so() -> None:
    meter, limits = Meter(0.0), Limits(requests_per_minute=60)
    for _ in range(60):
        meter.count(limits, 0.0)
    with pytest.raises(RateLimited) as refused:
        meter.count(limits, 0.25)
    assert refused.value.retry_after_s == pytest.approx(0.75)
    meter.count(limits, 1.0 + 1e-9)
    with pytest.raises(RateLimited):
        meter.count(limits, 1.0)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 50), st.lists(st.floats(0, 20), min_size=1, max_size=200))
def test_no_minute_and_a_half_has_more_than_two_and_a_half_minutes_worth(most: int, pauses: list[float]) -> None:
    """A full bucket, and what flows in meanwhile."""
    meter, limits, now_s = Meter(0.0), Limits(requests_per_minute=most), 0.0
    taken: list[float] = []
    for pause_s in pauses:
        now_s += pause_s
        try:
            meter.count(limits, now_s)
        except RateLimited as error:
            assert error.retry_after_s is not None and 0 < error.retry_after_s <= 60 / most + 1e-6
        else:
            taken.append(now_s)
        assert sum(now_s - 90 <= at for at in taken) <= 2.5 * most + 1


def test_streams_are_all_let_in_or_none_and_what_can_never_be_is_told_apart() -> None:
    meter, limits = Meter(0.0), Limits(concurrency=4)
    meter.enter(limits, 3)
    with pytest.raises(RateLimited, match="3 streams of this tenant are under way, and it may have 4") as refused:
        meter.enter(limits, 2)
    assert refused.value.retry_after_s and refused.value.retryable
    assert meter.streams == 3
    with pytest.raises(TooMuch) as never:
        meter.enter(limits, 5)
    assert (never.value.retryable, never.value.retry_after_s) == (False, None)
    meter.leave(3)
    meter.enter(limits, 4)


def test_tokens_are_set_aside_whole_and_what_was_not_used_comes_back() -> None:
    meter, limits = Meter(0.0), Limits(tokens_per_minute=600)
    meter.reserve(limits, 500, 0.0)
    with pytest.raises(RateLimited, match="100 of its 600") as refused:
        meter.reserve(limits, 110, 0.0)
    assert refused.value.retry_after_s == pytest.approx(1.0)
    meter.settle(limits, 500, 20)
    meter.reserve(limits, 580, 0.0)
    with pytest.raises(TooMuch, match="601 tokens, and this tenant has 600"):
        meter.reserve(limits, 601, 0.0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400), st.floats(0, 30)), max_size=50))
def test_what_was_given_back_late_is_never_more_than_a_minutes_worth(history: list[tuple[int, int, float]]) -> None:
    meter, limits, now_s = Meter(0.0), Limits(tokens_per_minute=400), 0.0
    for reserved, used, pause_s in history:
        try:
            meter.reserve(limits, reserved, now_s)
        except RateLimited:
            continue
        now_s += pause_s
        meter.settle(limits, reserved, min(used, reserved))
        said = dict(meter.headers(limits, now_s))
        assert 0 <= int(said[b"x-ratelimit-remaining-tokens"]) <= 400
    now_s += 60
    assert dict(meter.headers(limits, now_s))[b"x-ratelimit-remaining-tokens"] == b"400"
    meter.reserve(limits, 400, now_s)


def test_the_headers_say_what_is_left_and_nothing_of_what_has_no_limit() -> None:
    meter, limits = Meter(0.0), Limits(requests_per_minute=60, tokens_per_minute=600)
    meter.count(limits, 0.0)
    meter.reserve(limits, 150, 0.0)
    assert dict(meter.headers(limits, 0.0)) == {
        b"x-ratelimit-limit-requests": b"60", b"x-ratelimit-remaining-requests": b"59",
        b"x-ratelimit-reset-requests": b"1s", b"x-ratelimit-limit-tokens": b"600",
        b"x-ratelimit-remaining-tokens": b"450", b"x-ratelimit-reset-tokens": b"15s"}
    assert meter.headers(Limits(concurrency=4), 0.0) == []
    assert not Limits() and Limits(concurrency=1)


def test_no_limit_is_no_limit() -> None:
    meter = Meter(0.0)
    for _ in range(1000):
        meter.count(Limits(), 0.0)
        meter.enter(Limits(), 100)
        meter.reserve(Limits(), 1 << 40, 0.0)
    assert meter.streams == 100_000


@pytest.mark.parametrize(("seconds", "said"), [(0, "0ms"), (0.0001, "1ms"), (0.02, "20ms"), (1.0, "1s"), (1.5, "1.5s"),
                                               (59.9996, "1m0s"), (360, "6m0s"), (61.25, "1m1.25s")])
def test_a_time_is_written_as_openai_writes_it(seconds: float, said: str) -> None:
    assert span(seconds) == said
