"""Whatever the schedule, each stream is the one its request would have had alone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from shared.blocks import split_hashes
from shared.messages import Cancel, Failed, Finished, Generate, Proposal, Removed, Sampling, Stored
from shared.tokens import pack
from tests.worker.builders import BLOCK, VOCABULARY, Bench, mock_decoder, plain, request
from worker.kv_blocks import Ownership

prompts = st.one_of(
    st.lists(st.integers(0, 3), min_size=1, max_size=40),
    st.integers(1, 40).map(lambda length: list(range(length))),
)


@st.composite
def requests(draw: st.DrawFn) -> list[Generate]:
    return [
        request(
            f"r{number}", draw(prompts), draw(st.integers(1, 30)), tenant=draw(st.sampled_from("ab")),
            cache_salt=draw(st.sampled_from([b"x", b"y"])), priority=draw(st.integers(0, 1)),
            sampling=Sampling(temperature=draw(st.sampled_from([0.0, 1.0])), seed=draw(st.integers(0, 3))),
            stop_token_ids=tuple(draw(st.lists(st.integers(64, VOCABULARY - 1), max_size=3))))
        for number in range(draw(st.integers(1, 6)))]


def check_blocks(bench: Bench) -> None:
    scheduler, pool = bench.scheduler, bench.scheduler.pool
    assert scheduler.audit().repairs == 0
    states = [pool.ownership(block) for block in range(pool.blocks)]
    assert states.count(Ownership.FREE) + states.count(Ownership.CACHED) == pool.available
    for sequence in scheduler.running:
        assert len(sequence.blocks) * BLOCK >= sequence.computed


def test_the_devices_time_is_split_among_streams_by_their_rows_and_none_of_it_is_lost() -> None:
    bench = Bench(mock_decoder(), max_running=4, step_tokens=8, max_draft_tokens=0)
    alone = request("alone", list(range(12)), 1)
    bench.add(alone)
    assert len(list(bench.steps())) == 2  # of a prompt of 12 in steps of 8
    for number in range(4):
        bench.add(request(f"r{number}", [number] * 3, 5 + number))
    list(bench.steps())
    spent = {key: end.worker_s for key, ends in bench.ends.items() for end in ends if isinstance(end, Finished)}
    assert spent["alone", 1] == pytest.approx(2 * 0.01)
    assert sum(spent.values()) == pytest.approx(bench.busy_s)
    assert spent["r0", 1] < spent["r3", 1] < bench.busy_s / 2


@settings(max_examples=150, deadline=None)
@given(requests(), st.data())
def test_every_stream_is_the_plain_one_under_any_schedule(wanted: list[Generate], data: st.DataObject) -> None:
    expected = {(one.request_id, one.attempt): plain(one) for one in wanted}
    max_running = data.draw(st.integers(1, 6))
    step_tokens = data.draw(st.integers(max_running, 24))
    bench = Bench(mock_decoder(blocks=data.draw(st.integers(18, 40))), max_running=max_running,
                  step_tokens=step_tokens, max_draft_tokens=data.draw(st.integers(0, 5)))
    rng = data.draw(st.randoms(use_true_random=False))
    waiting = list(wanted)
    cancelled = set()
    for _ in range(3000):
        if waiting and rng.random() < 0.5:
            bench.add(waiting.pop(0))
        for sequence in list(bench.scheduler.live):
            if rng.random() < 0.02:
                cancelled.add(sequence.key)
                bench.scheduler.cancel(Cancel(*sequence.key), bench.now)
                break
            offer_drafts(bench, sequence.key, expected[sequence.key], rng)
        check_blocks(bench)
        if not bench.step() and not waiting:
            break
    assert bench.largest_step <= step_tokens
    assert not list(bench.scheduler.live)
    assert bench.scheduler.pool.available == bench.scheduler.pool.blocks
    for key, stream in expected.items():
        (end,) = bench.ends[key]
        assert isinstance(end, Finished)
        got = bench.streams.get(key, [])
        if end.reason == "cancelled":
            assert key in cancelled
            assert got == stream[:len(got)]
        else:
            assert got == stream
            assert end.completion_tokens == len(stream)


def offer_drafts(bench: Bench, key: tuple[str, int], stream: list[int], rng: object) -> None:
    """Right ones, wrong ones, late and early ones, some behind an assumption."""
    sequence = next(one for one in bench.scheduler.live if one.key == key)
    done = max(0, sequence.delivered + rng.randint(-3, 2))  # type: ignore[attr-defined]
    tokens = stream[done:done + rng.randint(1, 6)]  # type: ignore[attr-defined]
    if tokens and rng.random() < 0.3:  # type: ignore[attr-defined]
        tokens[rng.randrange(len(tokens))] = rng.randrange(VOCABULARY)  # type: ignore[attr-defined]
    if tokens:
        cut = rng.randint(0, len(tokens) - 1)  # type: ignore[attr-defined]
        bench.scheduler.speculation.drafts.offer(Proposal(*key, sequence.prompt_length + done, pack(tokens[cut:]),
                                              pack(tokens[:cut])))


@settings(max_examples=60, deadline=None)
@given(requests(), st.integers(1, 20))
def test_a_stream_handed_to_another_worker_goes_on_exactly(wanted: list[Generate], steps: int) -> None:
    first = Bench(mock_decoder(), step_tokens=64)
    second = Bench(mock_decoder(blocks=40), step_tokens=24, max_running=4)
    for one in wanted:
        first.add(one)
    for _ in range(steps):
        first.step()
    for one in wanted:
        delivered = first.streams.get((one.request_id, 1), [])
        second.add(replace(one, attempt=2, generated=pack(delivered)))
    second.finish()
    for one in wanted:
        delivered = first.streams.get((one.request_id, 1), [])
        (end,) = second.ends[one.request_id, 2]
        assert isinstance(end, Finished)
        assert delivered + second.streams.get((one.request_id, 2), []) == plain(one)
        assert end.completion_tokens == len(plain(one))


def test_right_drafts_save_steps_and_are_counted() -> None:
    one = request(max_tokens=24)
    stream = plain(one)
    bench = Bench(mock_decoder(), max_draft_tokens=4)
    bench.add(one)
    steps = 0
    while bench.step():
        steps += 1
        for base in range(len(stream)):
            bench.scheduler.speculation.drafts.offer(Proposal("r", 1, 3 + base, pack(stream[base:base + 5])))
    assert bench.streams["r", 1] == stream
    assert steps < len(stream) / 2
    (end,) = bench.ends["r", 1]
    assert end.draft_tokens >= end.accepted_draft_tokens > len(stream) / 2


@pytest.mark.parametrize(("row_s", "others", "drafted"),
                         [(0.0001, 0, True), (0.0001, 30, True), (0.001, 0, True), (0.001, 30, False)])
def test_drafts_are_verified_only_where_the_streams_that_run_or_wait_leave_something_to_save(
        row_s: float, others: int, drafted: bool) -> None:
    bench = Bench(mock_decoder(blocks=256), step_tokens=64, max_running=32)
    for _ in range(200):
        for rows in (1, 8, 32):
            bench.scheduler.cost.observe(rows, 0, 0.003 + rows * row_s)
    wanted = request(max_tokens=20)
    stream = plain(wanted)
    bench.add(wanted)
    bench.step()
    for number in range(others):
        bench.add(request(f"other{number}", [number] * 40))
    bench.scheduler.speculation.drafts.offer(Proposal("r", 1, 4, pack(stream[1:6])))
    step = bench.scheduler.plan(bench.now)
    assert step is not None
    assert bool(step.works[0].drafts) is bench.scheduler.speculation.wanted is drafted


@pytest.mark.parametrize(("token_s", "chunk"), [(0.00001, 128), (0.001, 52), (0.05, BLOCK)])
def test_a_long_prompt_takes_no_more_of_a_step_than_running_streams_can_bear(token_s: float, chunk: int) -> None:
    bench = Bench(mock_decoder(blocks=256), step_tokens=256)
    for _ in range(200):
        for rows, tokens in ((1, 0), (1, 64), (4, 16), (8, 128)):
            bench.scheduler.cost.observe(rows, tokens, 0.004 + rows * 0.002 + tokens * token_s)
    bench.add(request("stream", max_tokens=50))
    bench.step()
    bench.add(request("long", list(range(200))))
    step = bench.scheduler.plan(bench.now)
    assert step is not None
    stream, prompt = step.works
    assert (stream.rows, prompt.rows) == (1, chunk)


def test_a_full_hit_recomputes_one_token_and_no_more() -> None:
    bench = Bench(mock_decoder())
    prompt = list(range(4 * BLOCK + 1))
    bench.add(request("a", prompt))
    bench.finish()
    bench.add(request("b", prompt))
    step = bench.scheduler.plan(bench.now)
    assert step is not None
    (work,) = step.works
    assert (work.start, work.rows) == (4 * BLOCK, 1)


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    bench = Bench(mock_decoder(), step_tokens=64)
    prompt = list(range(10 * BLOCK + 2))
    for name in "abcd":
        bench.add(request(name, prompt, max_tokens=2))
    rows = 0
    while (step := bench.scheduler.plan(bench.now)) is not None:
        rows += step.rows
        bench.take(bench.scheduler.commit(step, bench.decoder.step(bench.batch.build(step)).tolist(), bench.now))
    assert rows == 10 * BLOCK + 4 * 2 + 4
    assert len({tuple(stream) for stream in bench.streams.values()}) == 1


def test_tenants_with_different_salts_share_nothing() -> None:
    bench = Bench(mock_decoder())
    prompt = list(range(4 * BLOCK + 1))
    bench.add(request("a", prompt, cache_salt=b"one"))
    bench.finish()
    bench.add(request("b", prompt, cache_salt=b"two"))
    bench.finish()
    (end,) = bench.ends["b", 1]
    assert end.cached_tokens == 0


def test_names_leave_for_the_routers_only_when_a_block_is_computed() -> None:
    bench = Bench(mock_decoder(), step_tokens=2 * BLOCK, max_running=4)
    bench.add(request("a", list(range(4 * BLOCK)), max_tokens=1))
    named = []
    for _ in bench.steps():
        named.append(sum(len(split_hashes(event.hashes)) for event in bench.scheduler.pool.take_events()
                         if isinstance(event, Stored | Removed)))
    assert named == [2, 2]


def test_a_cancel_that_overtakes_its_request_ends_it_on_arrival() -> None:
    bench = Bench(mock_decoder())
    bench.scheduler.cancel(Cancel("r", 1), 0.0)
    bench.add(request())
    bench.finish()
    assert [end.reason for end in bench.ends["r", 1]] == ["cancelled"]
    bench.add(request(attempt=2))
    bench.finish()
    assert [end.reason for end in bench.ends["r", 2]] == ["length"]


def test_a_duplicate_is_ignored_while_it_runs_and_after() -> None:
    bench = Bench(mock_decoder())
    bench.add(request())
    bench.step()
    bench.add(request())
    bench.finish()
    bench.add(request())
    bench.finish()
    assert len(bench.ends["r", 1]) == 1
    assert bench.streams["r", 1] == plain(request())


def test_a_higher_attempt_replaces_the_lower_and_a_lower_one_is_ignored() -> None:
    bench = Bench(mock_decoder())
    bench.add(request(attempt=2))
    bench.step()
    bench.add(request(attempt=1))
    bench.add(request(attempt=3))
    bench.finish()
    assert [end.reason for end in bench.ends["r", 2]] == ["cancelled"]
    assert [end.reason for end in bench.ends["r", 3]] == ["length"]
    assert ("r", 1) not in bench.ends


def test_a_stop_token_is_delivered_and_ends_the_stream() -> None:
    stream = plain(request(max_tokens=20))
    bench = Bench(mock_decoder())
    bench.add(request(max_tokens=20, stop_token_ids=(stream[5],)))
    bench.finish()
    (end,) = bench.ends["r", 1]
    assert end.reason == "stop"
    assert bench.streams["r", 1] == stream[:stream.index(stream[5]) + 1]


@pytest.mark.parametrize(("other", "reason"), [
    ({"generated": [9, 8], "stop_token_ids": (8,)}, "stop"),
    ({"generated": [9, 8, 7], "max_tokens": 3}, "length"),
    ({"max_tokens": 0}, "length"),
])
def test_a_stream_with_nothing_left_to_do_finishes_at_once(other: dict[str, object], reason: str) -> None:
    bench = Bench(mock_decoder())
    bench.add(request(**other))  # type: ignore[arg-type]
    assert not bench.step()
    (end,) = bench.ends["r", 1]
    assert end.reason == reason
    assert end.completion_tokens == len(other.get("generated", []))  # type: ignore[arg-type]


@pytest.mark.parametrize(("blocks", "context_length", "length"), [(64, 32, 32), (5, 512, 20), (64, 32, 400)])
def test_a_prompt_that_cannot_fit_is_refused_by_name(blocks: int, context_length: int, length: int) -> None:
    bench = Bench(mock_decoder(blocks, context_length))
    bench.add(request(prompt=[1] * length))
    bench.finish()
    (end,) = bench.ends["r", 1]
    assert isinstance(end, Failed)
    assert end.code == "context_length_exceeded" and not end.retryable
    assert bench.scheduler.pool.available == blocks


def test_a_stream_ends_with_length_where_context_or_memory_end() -> None:
    for decoder in (mock_decoder(64, 32), mock_decoder(8, 512)):
        bench = Bench(decoder)
        bench.add(request(prompt=[1] * 10, max_tokens=100))
        bench.finish()
        (end,) = bench.ends["r", 1]
        assert (end.reason, end.completion_tokens) == ("length", 22)


@pytest.mark.parametrize("other", [{"prompt": [VOCABULARY]}, {"prompt": []}, {"generated": b"abc"},
                                   {"generated": [VOCABULARY]}, {"cache_salt": bytes(65), "prompt": [1] * 4 * BLOCK}])
def test_tokens_and_salts_that_cannot_be_are_refused_and_change_nothing(other: dict[str, object]) -> None:
    bench = Bench(mock_decoder())
    bench.add(request(**other))  # type: ignore[arg-type]
    assert not bench.step()
    (end,) = bench.ends["r", 1]
    assert (end.code, end.retryable) == ("invalid_request", False)
    assert not list(bench.scheduler.live)


def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    bench = Bench(mock_decoder(), max_running=1, max_waiting=2)
    for number in range(4):
        bench.add(request(f"r{number}"))
    bench.take(bench.scheduler.take_events())
    refused = [key for key, ends in bench.ends.items() if isinstance(ends[0], Failed)]
    assert refused == [("r2", 1), ("r3", 1)]
    end = bench.ends["r2", 1][0]
    assert isinstance(end, Failed)
    assert (end.code, end.retryable) == ("overloaded", True) and end.retry_after_s >= 1.0
    bench.finish()
    assert bench.streams["r0", 1] == bench.streams["r1", 1] == plain(request())


def test_a_passed_deadline_ends_running_waiting_and_late_requests() -> None:
    bench = Bench(mock_decoder(), max_running=1)
    bench.add(request("running", max_tokens=100, deadline=0.05))
    bench.add(request("waiting", deadline=0.05))
    for _ in range(5):
        bench.step()
    bench.add(request("late", deadline=0.05))
    bench.finish()
    for name in ("running", "waiting", "late"):
        (end,) = bench.ends[name, 1]
        assert (end.code, end.retryable) == ("deadline_exceeded", False)
    assert len(bench.streams["running", 1]) == 5


def test_a_long_prompt_does_not_hold_up_a_running_stream() -> None:
    bench = Bench(mock_decoder(128), step_tokens=16, max_running=8)
    bench.add(request("stream", max_tokens=60))
    bench.step()
    bench.add(request("long", prompt=[9] * 200, max_tokens=1))
    while ("long", 1) not in bench.ends:
        before = len(bench.streams["stream", 1])
        step = bench.scheduler.plan(bench.now)
        assert step is not None and step.rows <= 1 + 8
        bench.take(bench.scheduler.take_events())
        bench.take(bench.scheduler.commit(step, bench.decoder.step(bench.batch.build(step)).tolist(), bench.now))
        assert len(bench.streams["stream", 1]) == before + 1


def test_when_memory_runs_out_the_youngest_waits_and_finds_its_blocks_again() -> None:
    bench = Bench(mock_decoder(blocks=12), max_running=4)
    wanted = [request(name, prompt=list(range(start, start + 8)), max_tokens=30)
              for start, name in enumerate(["old", "young"])]
    for one in wanted:
        bench.add(one)
    bench.finish()
    assert bench.scheduler.preemptions > 0
    assert list(bench.ends) == [("old", 1), ("young", 1)]
    for one in wanted:
        assert bench.streams[one.request_id, 1] == plain(one)


def test_a_higher_priority_is_admitted_first() -> None:
    bench = Bench(mock_decoder(), max_running=1)
    for name, priority in [("first", 0), ("low", 0), ("high", 5)]:
        bench.add(request(name, priority=priority))
        bench.step()
    bench.finish()
    assert [key[0] for key in bench.ends] == ["first", "high", "low"]


def test_a_tenant_with_many_requests_does_not_starve_one_with_few() -> None:
    bench = Bench(mock_decoder(), max_running=1)
    for number in range(10):
        bench.add(request(f"many{number}", prompt=[number] * 20, tenant="many", max_tokens=1))
    bench.add(request("few", tenant="few", max_tokens=1))
    bench.finish()
    assert [key[0] for key in bench.ends].index("few") <= 1


def test_a_budget_too_small_for_the_streams_is_refused_at_start() -> None:
    with pytest.raises(ValueError, match="step_tokens=8 is less than max_running=64"):
        Bench(mock_decoder(), step_tokens=8)


def test_a_sequence_that_gave_way_names_its_blocks_again_when_it_computes_them_again() -> None:
    bench = Bench(mock_decoder(blocks=17), max_running=4, step_tokens=16)
    for name, first in (("older", 10), ("younger", 100)):
        bench.add(request(name, list(range(first, first + 8)), 60))
    sequences = list(bench.scheduler.live)
    bench.finish()
    assert bench.scheduler.preemptions > 0
    last = sequences[1]
    assert last.preemptions > 0
    names = set(bench.scheduler.pool.names())
    assert all(last.name(index, BLOCK) in names for index in range((len(last.tokens) - 1) // BLOCK))


def test_blocks_that_nobody_returns_are_an_audit_away_from_use_and_no_endless_loop() -> None:
    bench = Bench(mock_decoder(blocks=8))
    assert bench.scheduler.pool.allocate(8)  # leaked: no sequence holds them
    bench.add(request(prompt=[100, 101, 102]))
    assert bench.scheduler.plan(0.0) is None
    assert bench.scheduler.audit().repairs
    bench.finish()
    assert isinstance(bench.ends["r", 1][0], Finished)
