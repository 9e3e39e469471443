"""Names of services and of their starts."""

import pytest

from shared.clock import LoopClock
from shared.ids import new_epoch, new_id
from shared.subjects import check_id
from tests.virtual_time import run_virtual


def test_ids_are_fit_for_subjects_and_differ():
    made = {new_id("worker") for _ in range(1000)}
    assert len(made) == 1000
    for name in made:
        assert check_id(name) == name and name.startswith("worker-") and len(name) == 13


def test_a_kind_that_cannot_stand_in_a_subject_is_refused():
    with pytest.raises(ValueError):
        new_id("my.worker")


def test_a_later_start_has_a_larger_epoch():
    async def scenario():
        clock = LoopClock(wall_offset_s=1_700_000_000.0)
        first = new_epoch(clock)
        await clock.sleep(0.002)
        return first, new_epoch(clock)

    first, second = run_virtual(scenario())
    assert first == 1_700_000_000_000 and second > first
