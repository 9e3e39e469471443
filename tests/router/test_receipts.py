"""A receipt has what was weighed, and is small whatever the fleet."""

import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from router.placement import Candidate, Decision, Refused, Terms, decide
from router.receipts import TERMS, receipt_of, refusal_of
from shared.receipts import MOST_CANDIDATES, MOST_NAMES, MOST_WALLS, Receipt, pack, unpack
from tests.router.builders import request, status


def placed(workers: list[Candidate], **fields: Any) -> tuple[Receipt, Decision]:
    verdict = decide(request(**fields), workers, wall_s=0.0, rng=random.Random(1))
    assert isinstance(verdict, Decision)
    return receipt_of("r0", 160, verdict, workers, 0.0004, fields.get("cache_hint", "")), verdict


def test_terms_add_up_to_the_cost_in_microseconds() -> None:
    workers = [Candidate(status("a", running=3, queued_tokens=50), 2, 1, 40),
               Candidate(status("b"), 4, certain_blocks=2)]
    told, verdict = placed(workers)
    assert told.terms == TERMS == tuple(name.removesuffix("_s") for name in Terms._fields
                                         if name.endswith("_s") and name != "cost_s")
    assert {row.worker for row in told.candidates} == {"a", "b"}
    for row, terms in zip(told.candidates, sorted(verdict.candidates, key=lambda terms: terms.cost_s), strict=True):
        assert (row.worker, row.cached_tokens, row.cost_us) == (
            terms.worker, terms.cached_tokens, round(1e6 * terms.cost_s))
        assert row.terms_us == tuple(round(1e6 * getattr(terms, f"{name}_s")) for name in TERMS)
    (busy,) = [row for row in told.candidates if row.worker == "a"]
    assert (busy.sent_requests, busy.sent_tokens) == (1, 40)
    assert (told.worker, told.runner_up, told.because) == ("b", "a", "cost")
    assert (told.cached_tokens, told.most_cached_tokens, told.certain_tokens) == (64, 64, 32)
    assert told.decision_us == 400


def test_what_decided_between_near_equals_is_named() -> None:
    cheap = Candidate(status("cheap", price_usd_per_hour=1.0, step_base_s=0.0101))
    dear = Candidate(status("dear", price_usd_per_hour=2.0))
    assert placed([cheap, dear])[0].because == "price"
    twins = [Candidate(status(name)) for name in ("a", "b", "c", "d")]
    causes = {placed(twins)[0].because, placed(twins, cache_hint="session 1")[0].because,
              placed(twins, cache_hint="session 2")[0].because, placed(twins, cache_hint="session 3")[0].because}
    assert causes <= {"cost", "chance", "hint"} and "hint" in causes
    slower = Candidate(status("slower", prefill_tok_s=901.0), 1)
    assert placed([Candidate(status("quick")), slower])[0].because in ("cache", "cost")
    verdict = decide(request(), twins, wall_s=0.0, rng=random.Random(1), policy="round_robin", turn=2)
    assert isinstance(verdict, Decision)
    assert receipt_of("r0", 160, verdict, twins, 0.0).because == "round_robin"


def test_a_worker_that_had_more_and_was_too_busy_shows() -> None:
    full = Candidate(status("full", running=8, waiting=30, queued_tokens=50_000), 9)
    told, _ = placed([full, Candidate(status("b"))])
    assert (told.worker, told.cached_tokens, told.most_cached_tokens) == ("b", 0, 144)


@given(st.integers(1, 80), st.integers(0, 200), st.integers(0, 2**32))
def test_a_receipt_is_small_and_names_the_chosen_and_counts_the_rest(eligible: int, walled: int, seed: int) -> None:
    rng = random.Random(seed)
    workers = [Candidate(status(f"worker-{number}", running=rng.randrange(8)), rng.randrange(10))
               for number in range(eligible)]
    workers += [Candidate(status(f"far-{number}", zone="us", model=rng.choice(("m", "n", "o"))))
                for number in range(walled)]
    verdict = decide(request(), workers, wall_s=0.0, rng=rng, policy=rng.choice(("cost", "random")))
    assert isinstance(verdict, Decision)
    told = receipt_of("r0", 160, verdict, workers, 0.001)
    assert unpack(pack(told)) == told
    assert len(pack(told)) < 1500
    assert len(told.candidates) <= MOST_CANDIDATES and told.worker in {row.worker for row in told.candidates}
    assert told.considered + told.turned_away == len(workers)
    assert len(told.walls) <= MOST_WALLS and all(len(wall.workers) <= MOST_NAMES for wall in told.walls)
    assert sum(wall.count for wall in told.walls) == told.turned_away


def test_a_refusal_counts_who_stood_behind_which_wall() -> None:
    away = {f"w{number}": f"wall {number % 2}" for number in range(7)}
    told = refusal_of("r0", "cost", 160, Refused("no_eligible_worker", "nobody", False, 0.0, away), 0.001)
    assert (told.worker, told.refused, told.turned_away) == ("", "no_eligible_worker", 7)
    assert [(wall.reason, wall.count) for wall in told.walls] == [("wall 0", 4), ("wall 1", 3)]
    assert unpack(pack(told)) == told
