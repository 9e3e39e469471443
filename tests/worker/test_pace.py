"""How often a drafter is told."""

import itertools

from worker.pace import PACES, Pace

SLOWEST = PACES[-1][1]


def test_while_drafts_are_accepted_it_is_told_of_every_step() -> None:
    pace = Pace()
    assert all(pace.tell(1, (step + 1) // 4) for step in range(100))


def test_while_none_is_it_is_told_less_and_less_often() -> None:
    pace = Pace()
    told = [step for step in range(400) if pace.tell(1, 7)]
    gaps = [late - early for early, late in itertools.pairwise(told)]
    assert gaps == sorted(gaps) and gaps[0] == 1 and gaps[-1] == SLOWEST
    assert len(told) < 400 / SLOWEST + 40


def test_one_that_is_accepted_or_a_stream_that_is_new_is_told_at_once() -> None:
    pace = Pace()
    for _ in range(200):
        pace.tell(1, 0)
    while pace.tell(1, 0):
        pass
    assert pace.tell(1, 0, urgent=True)
    assert not pace.tell(1, 0)
    assert pace.tell(1, 1) and pace.tell(1, 1) and pace.tell(1, 1)


def test_a_crowd_without_help_is_told_of_seldom_within_a_few_steps_and_one_right_draft_does_not_change_that() -> None:
    pace = Pace()
    told = [pace.tell(32, step // 2) for step in range(100)]
    assert sum(told[:6]) <= 3
    assert sum(told) <= 100 / SLOWEST + 4
    assert [pace.tell(32, 50 + 8 * step) for step in range(1, 9)] == [True] * 8
