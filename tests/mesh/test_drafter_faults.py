"""Law 2 on real processes and a real NATS: `python -m tests.mesh.drafter_schedules` plays more of them."""

import pytest

from tests.mesh.drafter_schedules import play

pytestmark = pytest.mark.slow


@pytest.mark.timeout(180)
async def test_drafters_that_die_freeze_lie_and_are_misheard_change_no_token() -> None:
    faults, violations, accepted = await play(range(9000, 9006))
    assert violations == 0
    assert faults > 0 and accepted > 0
