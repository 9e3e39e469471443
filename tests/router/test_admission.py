"""Who has room, as far as a router can know between two heartbeats."""

import random
from typing import Any

import pytest

from router.admission import Admission
from router.placement import Candidate, Decision, decide
from shared.messages import Generate
from tests.router.builders import request, status


def weighed(asked: Generate, *workers: Candidate) -> Decision:
    decision = decide(asked, workers, wall_s=0.0, rng=random.Random(1))
    assert isinstance(decision, Decision)
    return decision


def has_room(admission: Admission[int], now: float, sent: int = 0, asked: Generate | None = None, **said: Any) -> bool:
    asked = asked or request(prompt_tokens=16, max_tokens=1000)
    worker = Candidate(status(**said), 0, sent, 16 * sent, 256 * sent)
    return admission.finds_room(asked, weighed(asked, worker), [worker], now)


def heard(now: float = 10.0, **said: Any) -> Admission[int]:
    admission: Admission[int] = Admission(100, 60.0, {})
    admission.on_status(status(**said), now)
    return admission


def test_a_worker_has_room_until_three_rounds_of_its_slots_wait_there() -> None:
    assert has_room(heard(), 10.0, running=8, waiting=23)
    assert not has_room(heard(), 10.0, running=8, waiting=24)
    assert not has_room(heard(), 10.0, running=8, waiting=16, sent=9)


def test_a_worker_with_two_seconds_of_prompts_ahead_has_none_until_they_are_over() -> None:
    admission = heard()
    assert not has_room(admission, 10.0, running=2, queued_tokens=2500)
    assert has_room(admission, 10.6, running=2, queued_tokens=2500)


@pytest.mark.parametrize(("said", "room"), [({"running": 7}, True), ({"running": 8}, False),
                                            ({"running": 2, "queued_tokens": 300}, False)])
def test_flex_finds_room_only_where_a_slot_is_free_and_no_prompt_waits(said: dict[str, int], room: bool) -> None:
    flex = request(prompt_tokens=16, tier="flex")
    assert has_room(heard(), 10.0, asked=flex, **said) == room


def test_what_a_worker_has_worked_off_since_it_spoke_makes_room() -> None:
    admission = heard(running=8, waiting=40)
    for _ in range(100):
        admission.on_placed("w0")
    admission.on_status(status(running=8, waiting=40), 11.0)  # a hundred came and a hundred went
    assert not has_room(admission, 11.0, running=8, waiting=40)
    assert has_room(admission, 11.2, running=8, waiting=40)


def test_streams_too_short_to_be_seen_in_statuses_do_not_fill_a_worker() -> None:
    short = request(prompt_tokens=16, max_tokens=4)
    assert has_room(heard(running=8, waiting=8), 10.4, sent=60, asked=short, running=8, waiting=8)


def test_a_worker_that_was_taken_for_full_and_ran_dry_is_trusted_with_more() -> None:
    admission = heard(running=8)
    assert not has_room(admission, 10.0, sent=60, running=8)
    admission.on_status(status(running=8, waiting=1), 10.05)
    assert not has_room(admission, 10.05, sent=60, running=8)
    admission.on_status(status(running=8), 10.08)
    assert has_room(admission, 10.08, sent=60, running=8)
    admission.on_status(status(running=8, waiting=30), 10.09)
    assert not has_room(admission, 10.09, sent=60, running=8)


def test_a_worker_that_starts_again_is_not_judged_by_its_former_life() -> None:
    admission = heard(running=8, waiting=40)
    for _ in range(1000):
        admission.on_placed("w0")
    admission.on_status(status(running=8, waiting=40), 11.0)
    admission.on_status(status(epoch=2, running=8, waiting=40), 12.0)
    assert not has_room(admission, 12.2, epoch=2, running=8, waiting=40)
