"""How much streams say is learned from all of them, and soon."""

import pytest

from shared.messages import Cancel
from tests.worker.builders import Bench, mock_decoder, request
from worker.stream_length import StreamLength


def test_nothing_is_known_before_a_stream_has_ended() -> None:
    length = StreamLength()
    length.say(100)
    assert length.tokens == 0.0
    length.end()
    assert length.tokens == 100.0


def test_streams_of_one_length_have_it_and_a_new_length_is_learned_within_a_few_hundred() -> None:
    length = StreamLength()
    for _ in range(500):
        length.say(200)
        length.end()
        assert length.tokens == pytest.approx(200.0)
    for _ in range(500):
        length.say(4)
        length.end()
    assert length.tokens == pytest.approx(4.0, abs=0.1)


def test_long_streams_that_hold_most_slots_count_beside_short_ones_in_the_others() -> None:
    """Of 64 slots 60 say on; four have streams of five tokens: a slot is free every 5 / 4 steps, as if all said 80."""
    length = StreamLength()
    for step in range(1, 2001):
        length.say(64)
        if step % 5 == 0:
            for _ in range(4):
                length.end()
    assert length.tokens == pytest.approx(80.0, rel=0.05)


def test_a_scheduler_learns_what_its_streams_say_with_those_that_are_cancelled() -> None:
    bench = Bench(mock_decoder())
    for number in range(3):
        bench.add(request(f"r{number}", [number], max_tokens=4))
    bench.finish()
    assert bench.scheduler.stream_length.tokens == pytest.approx(4.0, rel=0.03)
    bench.add(request("never began"))
    bench.scheduler.cancel(Cancel("never began", 1), bench.now)
    assert bench.scheduler.stream_length.tokens == pytest.approx(4.0, rel=0.03)
    bench.add(request("cancelled", max_tokens=50))
    for _ in range(8):
        bench.step()
    bench.scheduler.cancel(Cancel("cancelled", 1), bench.now)
    assert bench.scheduler.stream_length.tokens == pytest.approx(5.0, rel=0.03)
