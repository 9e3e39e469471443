"""How often caches were written over, and what placement makes of it."""

import random
from collections import Counter
from typing import Any

import pytest
from msgspec.structs import replace

from router.placement import EVICT_WEIGHT, Candidate, Decision, decide
from router.turnover import Turnover
from router.view import View
from shared.blocks import hash_chain, join_hashes
from shared.messages import Placement
from shared.tokens import pack
from tests.router.builders import request, status


def spread(workers: list[str], blocks: int, rounds: int, capacity: int = 1000) -> Turnover:
    turnover = Turnover()
    for _ in range(rounds):
        for worker in workers:
            turnover.write(worker, "m", blocks, capacity, capacity * len(workers))
    return turnover


def test_workers_that_share_the_work_evenly_are_written_over_as_often_as_their_fleet() -> None:
    turnover = spread(["a", "b", "c", "d"], 10, 1000)
    assert [turnover.of(worker, "m") for worker in "abcd"] == [pytest.approx(1.0, abs=0.02)] * 4


def test_a_cache_that_was_never_filled_has_room() -> None:
    turnover = spread(["a", "b"], 10, 20)
    assert turnover.of("a", "m") == pytest.approx(0.18, abs=0.02)
    assert turnover.of("new", "m") == 0.0


def test_one_that_takes_all_the_work_is_written_over_as_often_as_there_are_caches() -> None:
    turnover = Turnover()
    for _ in range(4000):
        turnover.write("a", "m", 10, 1000, 4000)
    assert turnover.of("a", "m") == pytest.approx(4.0, abs=0.05)
    assert turnover.of("b", "m") == 0.0


def test_what_was_written_long_ago_counts_no_more() -> None:
    turnover = spread(["a", "b"], 10, 500)
    before = turnover.of("a", "m")
    for _ in range(1000):
        turnover.write("b", "m", 10, 1000, 2000)
    assert turnover.of("a", "m") < 0.01 * before


def test_fleets_do_not_wear_each_other() -> None:
    turnover = spread(["a", "b"], 10, 500)
    before = turnover.of("a", "m")
    for _ in range(1000):
        turnover.write("c", "other", 10, 1000, 1000)
    assert turnover.of("a", "m") == before
    assert turnover.of("a", "other") == 0.0


def test_a_worker_that_is_gone_comes_back_with_an_empty_cache() -> None:
    turnover = spread(["a", "b"], 10, 500)
    turnover.forget("a")
    assert turnover.of("a", "m") == 0.0
    turnover.forget("b")
    assert turnover.of("b", "m") == 0.0
    turnover.write("a", "m", 10, 1000, 2000)
    assert turnover.of("a", "m") == 0.01


def test_a_worker_that_does_not_say_its_size_is_left_out() -> None:
    turnover = Turnover()
    turnover.write("a", "m", 10, 0, 0)
    assert turnover.of("a", "m") == 0.0


# --- what placement makes of it


def chosen(workers: list[Candidate], **fields: Any) -> str:
    verdict = decide(request(**fields), workers, wall_s=0.0, rng=random.Random(0))
    assert isinstance(verdict, Decision)
    return verdict.chosen.worker


def test_a_new_prompt_goes_where_it_pushes_out_least() -> None:
    assert chosen([Candidate(status("worn"), turnover=1.5), Candidate(status("fresh"), turnover=0.5)]) == "fresh"


def test_a_full_cache_lets_a_conversation_wait_longer_before_it_is_computed_anew_elsewhere() -> None:
    def bears(turnover: float, queued_tokens: int) -> bool:
        holder = Candidate(status("holder", queued_tokens=queued_tokens), 9, turnover=turnover)
        return chosen([holder, Candidate(status("empty"), turnover=turnover)]) == "holder"

    saved_tokens = 144
    assert bears(0.0, saved_tokens - 30) and not bears(0.0, saved_tokens + 60)
    assert bears(1.0, int((1 + EVICT_WEIGHT) * saved_tokens) - 60)
    # no longer than what it saves is worth
    assert not bears(1.0, int((1 + EVICT_WEIGHT) * saved_tokens) + 120)


def test_a_system_prompt_on_one_worker_does_not_draw_every_conversation_there() -> None:
    known = View(silence_s=1e9)
    for name in "abcd":
        known.on_status(status(name, blocks_total=100), 0.0)
    rng, placed = random.Random(0), Counter[str]()
    system = list(range(16))
    for number in range(400):
        now = 10.0 * number  # everyone is idle again
        for name in "abcd":
            known.on_status(status(name, blocks_total=100), now)
        tokens = system + list(range(1000 * (number + 1), 1000 * (number + 1) + 144))
        hashes = hash_chain(tokens, b"salt")
        ask = request(request_id=str(number), tokens=pack(tokens), block_hashes=join_hashes(hashes))
        verdict = decide(ask, known.candidates(join_hashes(hashes), now), wall_s=0.0, rng=rng)
        assert isinstance(verdict, Decision)
        worker = verdict.chosen.worker
        known.index.store(worker, hashes[0])
        known.on_placed(replace(ask, placement=Placement("r", worker, verdict.chosen.cached_tokens)), 160, now)
        placed[worker] += 1
    assert len(placed) == 4
    assert max(placed.values()) < 1.3 * min(placed.values())


def test_a_worker_that_starts_again_has_room_again() -> None:
    known = View(silence_s=1e9)
    for name in "ab":
        known.on_status(status(name, blocks_total=100), 0.0)
    for number in range(30):
        known.on_placed(request(request_id=str(number), placement=Placement("r", "a", 0)), 160, 0.0)
    turnover = {one.status.id: one.turnover for one in known.candidates(b"", 0.0)}
    assert turnover["a"] > 1.0 and turnover["b"] == 0.0
    known.on_status(status("a", epoch=2, blocks_total=100), 0.1)
    assert {one.turnover for one in known.candidates(b"", 0.1)} == {0.0}
