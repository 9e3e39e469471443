"""How busy a process says it is."""

import pytest

from shared.busy import LATELY_S, Busy


def test_a_process_that_always_takes_half_a_core_says_so_whatever_the_beat():
    for beat_s in (0.1, 0.5, 3.0):
        busy = Busy(7.0, 100.0)
        told = [busy.share(7.0 + 0.5 * beat_s * i, 100.0 + beat_s * i) for i in range(1, 20)]
        assert told == pytest.approx([0.5] * 19)


def test_what_was_long_ago_is_forgotten_and_a_moment_weighs_little():
    busy = Busy(0.0, 0.0)
    assert busy.share(10.0, 10.0) == pytest.approx(1.0)
    assert busy.share(10.0, 10.5) > 0.9
    assert busy.share(10.0, 10.5 + 5 * LATELY_S) < 0.01


def test_without_time_passed_it_says_what_it_said():
    busy = Busy(0.0, 0.0)
    assert busy.share(1.0, 0.0) == 0.0
    assert busy.share(1.0, 2.0) == busy.share(5.0, 2.0) == pytest.approx(0.5)
