"""Laws 1, 2, 4, 5, 6, 7, 9 and 10 over seeded schedules of delay, loss, duplication, reordering and crashes.

`make simulate SEEDS=1000` plays more of them. A seed that breaks a law stays here under its own name.
"""

import contextlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.laws.plain import mock_stream, plain_stream
from tests.laws.simulation import VOCABULARY, Blow, Schedule, run, violations
from worker.mock_decoder import MockDecoder

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("seed", range(24))
def test_whatever_dies_or_gets_lost_every_stream_is_whole_and_unchanged(seed: int) -> None:
    assert violations(run(Schedule.draw(seed))) == []


@pytest.mark.parametrize("seed", range(9000, 9012))
def test_whatever_dies_or_gets_lost_every_vector_is_that_of_its_prompt_and_comes_once(seed: int) -> None:
    history = run(Schedule.draw(seed, vectors=True))
    assert violations(history) == [] and any(told.ask.pooling for told in history.told)


@pytest.mark.parametrize("seed", range(1000, 1008))
def test_a_mesh_without_faults_sends_nothing_twice(seed: int) -> None:
    history = run(Schedule.draw(seed, blows=False, loss=False))
    assert violations(history) == []
    assert history.resubmissions == 0


@pytest.mark.parametrize("seed", range(3000, 3006))
def test_a_worker_that_stays_away_costs_its_streams_a_pause_and_nothing_else(seed: int) -> None:
    schedule = replace(Schedule.draw(seed, loss=False, walls=False), blows=(Blow(2.2, "worker-1", 24.0),))
    assert schedule.someone_always_serves
    assert violations(run(schedule)) == []


@pytest.mark.parametrize("seed", range(2000, 2006))
def test_drafters_change_no_token(seed: int) -> None:
    with_drafts = run(Schedule.draw(seed, drafters=1))
    without = run(Schedule.draw(seed, drafters=0))
    assert violations(with_drafts) == violations(without) == []


def test_drafts_are_accepted_somewhere_or_the_law_about_them_is_empty() -> None:
    assert sum(run(Schedule.draw(seed, blows=False, loss=False, drafters=1)).accepted_drafts for seed in range(4)) > 20


@pytest.mark.parametrize("seed", range(7000, 7016))
def test_no_token_is_computed_or_drafted_or_even_heard_outside_the_zones_of_its_policy(seed: int) -> None:
    history = run(Schedule.draw(seed, walls=True))
    assert violations(history) == []
    assert history.under_policy > 10


@pytest.mark.parametrize("seed", range(7000, 7006))
def test_a_service_that_comes_back_elsewhere_under_its_name_hears_nothing_of_what_was_meant_for_it(seed: int) -> None:
    assert violations(run(moving(seed))) == []


@pytest.mark.parametrize(("wall", "without", "schedule"), [
    ("router.placement.allows", lambda residency, zone: True, Schedule.draw(7003, walls=True)),
    ("worker.following.allows", lambda residency, zone: True, Schedule.draw(7014, walls=True)),
    ("shared.subjects._in", lambda zone: "", None),
])
def test_without_any_one_of_its_walls_law_7_is_seen_to_break(
        wall: str, without: Callable[..., Any], schedule: Schedule | None) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch(wall, without))
        assert any("law 7" in complaint for complaint in violations(run(schedule or moving(7006))))


def moving(seed: int) -> Schedule:
    """Workers and a drafter that die and are back at once in another zone, while statuses take up to 1.2 s."""
    schedule = Schedule.draw(seed, loss=False, drafters=1, walls=True)
    slow = (("mill.v1.status.>", replace(schedule.faults, delay_s=(0.0, 1.2))),)
    moves = ((2.0, "worker-1", "us-east1"), (2.6, "drafter-1", "us-east1"), (3.5, "worker-1", "eu-north1"),
             (4.0, "drafter-1", "eu-north1"), (4.6, "worker-2", "us-east1"), (5.0, "drafter-1", "us-east1"))
    return replace(schedule, faults=replace(schedule.faults, overrides=slow),
                   blows=tuple(Blow(at_s, who, 0.05, None, zone) for at_s, who, zone in moves),
                   zones=tuple((name, "eu-north1") for name, _ in schedule.zones))


def test_the_truth_that_streams_are_held_to_is_what_the_simplest_loop_gives() -> None:
    decoder = MockDecoder(blocks=64, vocabulary_size=VOCABULARY)
    for ask in Schedule.draw(3).asks:
        how = ask.prompt, ask.sampling, min(ask.max_tokens, 60), ask.stop_token_ids
        assert mock_stream(decoder, *how) == plain_stream(decoder, *how)


def test_the_same_seed_is_the_same_history() -> None:
    first, second = run(Schedule.draw(5)), run(Schedule.draw(5))
    assert [told.tokens for told in first.told] == [told.tokens for told in second.told]
    assert (first.lost_messages, first.resubmissions) == (second.lost_messages, second.resubmissions)


def test_nobody_on_the_path_waits_for_a_reply() -> None:
    """Law 4, as far as the source can show it: no request-reply call of the bus exists, and none is made."""
    for package in ("gateway", "router", "worker", "drafter"):
        for file in (ROOT / package).rglob("*.py"):
            assert not re.search(r"\bbus\.request\(|\.request\(subject", file.read_text()), file
    assert "def request" not in (ROOT / "shared" / "bus.py").read_text()
