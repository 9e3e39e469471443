"""A request goes where it is served soonest, never where it may not go, and a refusal says why."""

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from msgspec.structs import replace

from router.placement import POLICIES, Candidate, Decision, Refused, decide, expected_output
from router.view import View
from shared.messages import Adjust, Generate, Grammar, Placement, Residency
from tests.router.builders import request, status


def placed(ask: Generate, workers: list[Candidate], seed: int = 0, **options: Any) -> Decision:
    verdict = decide(ask, workers, wall_s=0.0, rng=random.Random(seed), **options)
    assert isinstance(verdict, Decision), verdict
    return verdict


def refused(ask: Generate, workers: list[Candidate], wall_s: float = 0.0, **options: Any) -> Refused:
    verdict = decide(ask, workers, wall_s=wall_s, rng=random.Random(0), **options)
    assert isinstance(verdict, Refused), verdict
    return verdict


zones = st.sampled_from(["eu", "eu-north1", "europe", "us", "us-east1", "local", "EU-west2"])
states = st.sampled_from(["starting", "ready", "draining"])
candidates = st.builds(
    lambda zone, state, model, running, queued, rate, cached, sent: Candidate(
        status("w", zone=zone, state=state, model=model, running=running, queued_tokens=queued, prefill_tok_s=rate),
        cached, sent, sent * 50, sent * 100),
    zones, states, st.sampled_from(["m", "other"]), st.integers(0, 20), st.integers(0, 5000),
    st.sampled_from([0.0, 100.0, 5000.0]), st.integers(0, 12), st.integers(0, 5))
fleets = st.lists(candidates, max_size=6).map(
    lambda fleet: [worker._replace(status=replace(worker.status, id=f"w{i}")) for i, worker in enumerate(fleet)])
policies = st.sampled_from(sorted(POLICIES))


@given(fleets, policies, st.lists(zones, max_size=2), st.lists(st.sampled_from(["w0", "w1", "w2"]), max_size=3),
       st.integers(0, 50))
def test_nothing_is_placed_outside_its_walls(fleet: list[Candidate], policy: str, allowed: list[str],
                                             excluded: list[str], turn: int) -> None:
    ask = request(residency=Residency(tuple(allowed)), exclude_workers=tuple(excluded))
    verdict = decide(ask, fleet, wall_s=0.0, rng=random.Random(turn), policy=policy, turn=turn)

    def may(worker: Candidate) -> bool:
        zone = worker.status.zone.lower()
        inside = not allowed or any(zone == wide.lower() or zone.startswith(wide.lower() + "-") for wide in allowed)
        return inside and worker.status.model == "m" and worker.status.state == "ready"

    open_to = {worker.status.id for worker in fleet if may(worker)}
    if isinstance(verdict, Refused):
        assert not open_to
        return
    assert verdict.chosen.worker in open_to
    if open_to - set(excluded):
        assert verdict.chosen.worker not in excluded


@given(st.integers(0, 7), st.integers(1, 60), st.integers(0, 20_000), st.integers(1, 400))
def test_cache_wins_unless_queueing_costs_more_than_the_prefill_it_saves(
        running: int, cached: int, queued: int, prompt_blocks: int) -> None:
    prompt_tokens = prompt_blocks * 16
    ask = request(prompt_tokens=prompt_tokens)
    holder = Candidate(status("holder", running=running, queued_tokens=queued), cached)
    empty = Candidate(status("empty", running=running))
    saved_s = min(cached * 16, (prompt_tokens - 1) // 16 * 16) / 1000.0
    queue_s = queued / 1000.0
    verdict = placed(ask, [holder, empty])
    if queue_s <= saved_s and saved_s > 0:
        assert verdict.chosen.worker == "holder"
    terms = {terms.worker: terms for terms in verdict.candidates}
    # the prefill it saves counts for the streams beside it and for those who come later, too
    saved_by_all_s = saved_s * (1 + running) + terms["empty"].later_s
    tie_s = 0.01 * terms["empty"].cost_s + 0.001
    if queue_s > saved_by_all_s + tie_s:
        assert verdict.chosen.worker == "empty"


@given(fleets, st.sampled_from(["cost", "prefix", "least_loaded"]), st.integers(0, 10), st.integers(1, 12),
       st.integers(0, 100))
def test_a_better_cache_never_makes_a_worker_less_likely(fleet: list[Candidate], policy: str, which: int, more: int,
                                                         seed: int) -> None:
    assume(fleet)
    which %= len(fleet)
    improved = fleet[which]._replace(cached_blocks=fleet[which].cached_blocks + more)
    better = [*fleet[:which], improved, *fleet[which + 1:]]
    name = fleet[which].status.id

    def share(workers: list[Candidate]) -> float:
        hits = 0
        for attempt in range(40):
            verdict = decide(request(cache_hint="h" if seed % 2 else ""), workers, wall_s=0.0,
                             rng=random.Random(seed * 1000 + attempt), policy=policy)
            hits += isinstance(verdict, Decision) and verdict.chosen.worker == name
        return hits / 40

    before, after = share(fleet), share(better)
    # chance decides between equals only; a share may only wobble where it is chance before and after
    assert after >= before or (0 < after < 1 and 0 < before < 1)


def test_a_burst_spreads_over_equal_workers_before_any_status_arrives() -> None:
    sent = Counter[str]()
    rng = random.Random(1)
    for number in range(32):
        fleet = [Candidate(status(f"w{i}"), 0, sent[f"w{i}"], sent[f"w{i}"] * 160, sent[f"w{i}"] * 100)
                 for i in range(4)]
        verdict = decide(request(start=number * 1000), fleet, wall_s=0.0, rng=rng)
        assert isinstance(verdict, Decision)
        sent[verdict.chosen.worker] += 1
    assert set(sent.values()) == {8}


def test_at_least_one_prompt_token_is_computed() -> None:
    verdict = placed(request(prompt_tokens=160), [Candidate(status(), cached_blocks=10)])
    assert verdict.chosen.cached_tokens == 144
    assert verdict.chosen.prefill_s > 0


def test_a_full_worker_is_passed_over_for_one_with_a_free_slot() -> None:
    full = Candidate(status("full", running=8, waiting=4), cached_blocks=10)
    slow = Candidate(status("slow", prefill_tok_s=200.0))
    assert placed(request(), [full, slow]).chosen.worker == "slow"


def test_what_was_sent_since_the_last_status_counts_like_what_the_status_says() -> None:
    told = Candidate(status("w", waiting=30, queued_tokens=480))
    sent = Candidate(status("w"), 0, 30, 480, 30 * 256)
    assert placed(request(), [told]).chosen == placed(request(), [sent]).chosen


@given(st.integers(0, 40), st.integers(0, 40), st.lists(st.integers(1, 1000), max_size=80), st.integers(0, 79),
       st.sampled_from([0.0, 3.5, 90.0, 2000.0]))
def test_a_slot_is_waited_for_as_long_as_streams_may_speak_and_have_spoken(
        running: int, waiting: int, may_say: list[int], shorter: int, said: float) -> None:
    def slot_s(may_say: list[int], stream_tokens: float) -> float:
        told = status(running=running, waiting=waiting, stream_tokens=stream_tokens)
        output = sum(expected_output(request(max_tokens=tokens)) for tokens in may_say)
        return placed(request(), [Candidate(told, 0, len(may_say), 0, output)]).chosen.slot_s

    waits_s, streams = slot_s(may_say, said), running + waiting + len(may_say)
    each = min(said or 256.0, 256.0)
    step_s = 0.01 + 0.0001 * min(streams + 1, 8)
    longest = (running + waiting) * each + sum(min(tokens, each) for tokens in may_say)
    assert waits_s <= max(0, streams - 7) * 256 * step_s / 8 * 1.000001
    assert waits_s >= max(0, streams - 7) * longest / max(1, streams) * step_s / 8 * 0.999999
    assert slot_s(may_say, 0.0) >= waits_s
    if may_say:
        fewer = [*may_say]
        fewer[shorter % len(may_say)] = 1
        assert slot_s(fewer, said) <= waits_s


def test_a_thousand_short_requests_between_two_statuses_find_a_worker() -> None:
    """Each counted for 256 tokens: behind a few hundred "the shortest queue takes 60 s", and the rest was refused."""
    view = View(silence_s=2.0)
    for number in range(2):
        view.on_status(status(f"w{number}"), 0.0)
    for number in range(1000):
        now = number * 0.0005
        ask = request(prompt_tokens=16, request_id=f"r{number}", max_tokens=4)
        chosen = placed(ask, view.candidates(ask.block_hashes, now), max_queue_s=60.0).chosen
        view.on_placed(replace(ask, placement=Placement("r", chosen.worker)), 16, now)
    # 62 rounds of eight streams, of 4 steps each
    assert sum(worker.sent_requests for worker in view.candidates(b"", 0.5)) == 1000
    assert chosen.slot_s == pytest.approx(62 * 4 * 0.0108, rel=0.05)


def test_a_cache_hit_weighs_more_where_many_streams_decode() -> None:
    def gain_s(running: int) -> float:
        with_cache, without = (placed(request(), [Candidate(status("w", running=running), cached)]).chosen
                               for cached in (9, 0))
        return without.cost_s - with_cache.cost_s

    assert gain_s(6) > 7 * gain_s(0) - 1e-9 > 0


def test_a_worker_that_has_not_measured_yet_is_tried_not_starved() -> None:
    fleet = [Candidate(status("old", running=1)),
             Candidate(status("new", prefill_tok_s=0.0, step_base_s=0.0, step_row_s=0.0))]
    assert placed(request(), fleet).chosen.worker == "new"


def test_an_unmeasured_fleet_still_spreads() -> None:
    fleet = [Candidate(status("a", prefill_tok_s=0.0, step_base_s=0.0), 0, 1, 160),
             Candidate(status("b", prefill_tok_s=0.0, step_base_s=0.0))]
    assert placed(request(), fleet).chosen.worker == "b"


def test_between_equals_the_hint_sends_a_session_to_one_place() -> None:
    fleet = [Candidate(status(f"w{i}")) for i in range(5)]
    by_hint = {hint: {placed(request(start=s * 1000, cache_hint=hint), fleet, seed=s).chosen.worker for s in range(20)}
               for hint in ("alice", "bob", "carol", "dave")}
    assert all(len(workers) == 1 for workers in by_hint.values())
    assert len(set.union(*by_hint.values())) > 1
    (home,) = by_hint["alice"]
    others = [worker for worker in fleet if worker.status.id != home]
    (second,) = {placed(request(cache_hint="alice"), others, seed=s).chosen.worker for s in range(9)}
    for gone in others:
        if gone.status.id != second:
            left = [worker for worker in fleet if worker is not gone]
            assert placed(request(cache_hint="alice"), left).chosen.worker == home


def test_between_equals_without_a_hint_chance_decides() -> None:
    fleet = [Candidate(status(f"w{i}")) for i in range(3)]
    assert len({placed(request(), fleet, seed=seed).chosen.worker for seed in range(40)}) == 3


def test_the_cheaper_of_two_that_are_about_as_soon() -> None:
    dear = Candidate(status("dear", price_usd_per_hour=4.0))
    cheap = Candidate(status("cheap", price_usd_per_hour=1.0, prefill_tok_s=900.0))
    slow = Candidate(status("slow", price_usd_per_hour=0.1, prefill_tok_s=50.0))
    assert placed(request(), [dear, cheap, slow]).chosen.worker == "cheap"


def test_a_worker_that_failed_a_request_is_taken_only_when_nobody_else_is_left() -> None:
    fleet = [Candidate(status("a"), 10), Candidate(status("b", running=7, queued_tokens=2000))]
    verdict = placed(request(exclude_workers=("a",)), fleet)
    assert verdict.chosen.worker == "b"
    assert verdict.turned_away == {"a": "it failed this request before"}
    assert placed(request(exclude_workers=("a", "b")), fleet).chosen.worker == "a"


def test_a_stream_that_has_begun_moves_only_between_equal_recipes() -> None:
    fleet = [Candidate(status("a", recipe="int4"), 10), Candidate(status("b", recipe="fp16"))]
    assert placed(request(), fleet, recipe="fp16").chosen.worker == "b"
    nobody = refused(request(), fleet, recipe="int8")
    assert nobody.code == "no_eligible_worker"
    assert "recipe" in nobody.message


def test_a_worker_with_another_vocabulary_is_walled_off() -> None:
    nobody = refused(request(vocabulary="v1"), [Candidate(status(vocabulary="v2"))])
    assert nobody.code == "no_eligible_worker"
    assert "vocabulary v2, not v1" in nobody.message
    assert placed(request(), [Candidate(status(vocabulary="v2"))]).chosen.worker == "w0"
    assert placed(request(vocabulary="v1"), [Candidate(status())]).chosen.worker == "w0"


@pytest.mark.parametrize(("worker", "ask", "code", "retryable", "says"), [
    ({"model": "x"}, {}, "no_eligible_worker", False, "no worker serves m"),
    ({"zone": "us"}, {"residency": Residency(("eu",))}, "no_eligible_worker", False, "zone us is not allowed"),
    ({"state": "draining"}, {}, "overloaded", True, "draining"),
    ({"state": "starting"}, {}, "overloaded", True, "starting"),
    ({"context_length": 160}, {}, "context_length_exceeded", False, "context of 160 tokens"),
])
def test_a_refusal_names_the_wall(worker: dict[str, Any], ask: dict[str, Any], code: str, retryable: bool,
                                  says: str) -> None:
    verdict = refused(request(**ask), [Candidate(status(**worker))])
    assert (verdict.code, verdict.retryable) == (code, retryable)
    assert says in verdict.message
    assert (verdict.retry_after_s > 0) == (retryable or says.startswith("no worker"))


def test_what_an_older_worker_would_ignore_is_placed_only_on_those_that_name_it() -> None:
    """During a rollout a request for JSON was answered with anything, and nobody said so."""
    old, new = Candidate(status("old"), 10), Candidate(status("new", abilities=("adjust", "grammar"), running=7))
    structured = request(grammar=Grammar("regex", "a"), adjust=Adjust(min_tokens=1))
    assert placed(structured, [old, new]).chosen.worker == "new"
    assert placed(request(), [old, new]).chosen.worker == "old"
    nobody = refused(structured, [old])
    assert nobody.code == "no_eligible_worker" and "keeps to no adjust and no grammar" in nobody.message
    assert "no logprobs" in refused(request(logprobs=0), [new]).message
    assert "no logprobs" in refused(request(prompt_logprobs=3), [new]).message


def test_a_residency_refusal_does_not_turn_into_a_context_error_of_a_worker_that_is_not_allowed() -> None:
    fleet = [Candidate(status("us", zone="us", context_length=10)), Candidate(status("eu", zone="eu"))]
    assert placed(request(residency=Residency(("eu",))), fleet).chosen.worker == "eu"
    assert refused(request(residency=Residency(("de",))), fleet).code == "no_eligible_worker"


def test_a_model_whose_workers_have_just_gone_can_be_retried() -> None:
    assert refused(request(), [], served_lately=True).retryable
    assert not refused(request(), []).retryable


def test_when_every_queue_is_too_long_the_shortest_says_when_to_come_back() -> None:
    fleet = [Candidate(status("a", queued_tokens=90_000)), Candidate(status("b", queued_tokens=75_000))]
    verdict = refused(request(), fleet, max_queue_s=60.0)
    assert (verdict.code, verdict.retryable) == ("overloaded", True)
    assert verdict.retry_after_s == pytest.approx(15.0)


def test_a_long_prompt_alone_is_no_queue() -> None:
    assert placed(request(prompt_tokens=90_000), [Candidate(status())], max_queue_s=60.0)


def test_a_deadline_out_of_reach_is_refused_at_once_and_one_in_reach_is_met_elsewhere() -> None:
    near, far = Candidate(status("near")), Candidate(status("far", queued_tokens=5000), 10)
    assert placed(request(deadline=1.0), [near, far], policy="prefix").chosen.worker == "near"
    verdict = refused(request(deadline=1.0), [far])
    assert (verdict.code, verdict.retryable) == ("overloaded", True)
    assert verdict.retry_after_s == pytest.approx(5.0)


def test_a_deadline_that_has_passed_is_said_so() -> None:
    assert refused(request(deadline=100.0), [Candidate(status())], wall_s=100.0).code == "deadline_exceeded"


def test_prefix_follows_the_cache_into_any_queue() -> None:
    fleet = [Candidate(status("a", running=7, queued_tokens=9000), 2), Candidate(status("b"), 1)]
    assert placed(request(), fleet, policy="prefix").chosen.worker == "a"


def test_least_loaded_ignores_the_cache() -> None:
    fleet = [Candidate(status("a", running=1), 10), Candidate(status("b"))]
    assert placed(request(), fleet, policy="least_loaded").chosen.worker == "b"


def test_round_robin_takes_turns_in_any_order_of_hearing() -> None:
    fleet = [Candidate(status(name)) for name in ("c", "a", "b")]
    assert [placed(request(), fleet, policy="round_robin", turn=turn).chosen.worker for turn in range(4)] == [
        "a", "b", "c", "a"]


def test_random_reaches_everybody() -> None:
    fleet = [Candidate(status("a", running=7)), Candidate(status("b"))]
    assert {placed(request(), fleet, seed=seed, policy="random").chosen.worker for seed in range(30)} == {"a", "b"}


def test_a_resubmission_is_weighed_with_what_was_generated() -> None:
    ask = request(prompt_tokens=160)
    again = replace(ask, generated=request(prompt_tokens=64, start=500).tokens)
    first, second = (placed(one, [Candidate(status())]).chosen for one in (ask, again))
    assert second.prefill_s == pytest.approx(first.prefill_s + 0.064)
