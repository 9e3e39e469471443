"""What a router knows, from whom, and for how long."""

from typing import Any

import pytest
from msgspec.structs import replace

from router.prefix_index import PrefixIndex
from router.view import View
from shared.blocks import fold, join_hashes
from shared.messages import Generate, KvEvents, KvSnapshot, Placement, Removed, Stored
from shared.parity import expected_answer
from tests.router.builders import blocks, request, status


def view(*workers: str) -> View:
    fresh = View(silence_s=2.0)
    for name in workers:
        fresh.on_status(status(name), 0.0)
    return fresh


def sent_to(worker: str, ask: Generate | None = None, router: str = "r0", cached_tokens: int = 0) -> Generate:
    return replace(ask or request(), placement=Placement(router, worker, cached_tokens))


def seen(known: View, now: float, ask: Generate | None = None) -> dict[str, tuple[int, int, int]]:
    hashes = (ask or request()).block_hashes
    return {worker.status.id: (worker.cached_blocks, worker.sent_requests, worker.sent_tokens)
            for worker in known.candidates(hashes, now)}


def test_what_was_placed_counts_as_load_and_as_cache_to_come() -> None:
    known = view("a", "b")
    known.on_placed(sent_to("a"), 160, 0.1)
    assert seen(known, 0.1) == {"a": (10, 1, 160), "b": (0, 0, 0)}
    known.on_status(status("a", running=1, queued_tokens=160), 0.5)
    assert seen(known, 0.5)["a"] == (10, 0, 0)


def test_a_cache_that_did_not_come_is_not_counted_on_for_long() -> None:
    known = view("a")
    known.on_placed(sent_to("a"), 160, 0.1)
    for at in range(1, 8):
        known.on_status(status("a"), float(at))
    assert seen(known, 7.0) == {"a": (0, 0, 0)}


def test_only_what_is_not_cached_has_to_be_computed() -> None:
    known = view("a")
    known.on_kv(KvEvents("a", 1, 1, (Stored(join_hashes(blocks(6))),)), 0.0)
    known.on_placed(sent_to("a", cached_tokens=96), 160, 0.1)
    assert seen(known, 0.1) == {"a": (10, 1, 64)}


def test_a_worker_nobody_heard_where_a_request_was_sent_waits_for_its_next_word() -> None:
    known = view("a", "b")
    known.on_placed(sent_to("a"), 160, 0.1)
    known.on_unheard(sent_to("a"), "a")
    assert seen(known, 0.1) == {"b": (0, 0, 0)}
    known.on_status(status("a"), 0.5)
    assert seen(known, 0.5)["a"] == (0, 0, 0)


def test_a_worker_is_no_candidate_from_the_moment_it_is_silent_too_long() -> None:
    known = view("a")
    assert seen(known, 2.0) == {"a": (0, 0, 0)}
    assert seen(known, 2.1) == {}
    assert known.forget_silent(2.1) == ["a"]


def test_what_was_sent_to_a_worker_that_started_again_is_forgotten() -> None:
    known = view("a")
    known.on_placed(sent_to("a"), 160, 0.1)
    known.on_status(status("a", epoch=2), 0.11)
    assert seen(known, 0.11) == {"a": (0, 0, 0)}
    known.on_status(status("a", epoch=1, running=9), 0.2)
    assert known.candidates(b"", 0.2)[0].status.running == 0


def test_events_and_placements_of_unknown_workers_leave_no_trace() -> None:
    known = view()
    known.on_kv(KvEvents("ghost", 1, 1, (Stored(join_hashes(blocks(6))),)), 0.0)
    known.on_placed(sent_to("ghost"), 160, 0.1)
    known.on_unheard(sent_to("ghost"), "ghost")
    assert len(known.index) == 0
    assert seen(known, 0.1) == {}
    assert known.on_status(status("ghost", kv_seq=1), 0.2) == ["ghost"]


def drift_of(known: View) -> list[tuple[str, str]]:
    found = [(alarm.kind, alarm.worker) for alarm in known.alarms]
    known.alarms.clear()
    return found


def digest(hashes: list[bytes]) -> bytes:
    return fold(join_hashes(hashes)).to_bytes(16, "little")


def test_a_worker_whose_hashes_are_ours_is_trusted_and_nothing_is_said() -> None:
    known = View(silence_s=2.0)
    known.on_status(status("a", epoch=7, parity=expected_answer("a", 7, 16)), 0.0)
    known.on_kv(KvEvents("a", 7, 1, (Stored(join_hashes(blocks(6))),)), 0.0)
    assert seen(known, 0.1)["a"] == (6, 0, 0)
    assert not known.alarms and not known.blind


@pytest.mark.parametrize("claim", [
    {"parity": b"another answer.."}, {"parity": expected_answer("a", 6, 16)}, {"parity": expected_answer("b", 7, 16)},
    {"block_size_tokens": 32}, {"block_size_tokens": 32, "parity": expected_answer("a", 7, 32)}])
def test_a_worker_that_hashes_otherwise_is_placed_by_load_alone_and_reported_once(claim: dict[str, Any]) -> None:
    known = View(silence_s=2.0)
    known.on_status(status("a", epoch=7, state="starting"), 0.0)
    known.on_kv(KvEvents("a", 7, 1, (Stored(join_hashes(blocks(6))),)), 0.0)
    for at in range(3):
        assert known.on_status(status("a", epoch=7, kv_seq=9, **claim), float(at)) == []
    assert drift_of(known) == [("kv_blind", "a")]
    known.on_kv(KvEvents("a", 7, 2, (Stored(join_hashes(blocks(6))),)), 2.0)
    known.on_placed(sent_to("a"), 160, 2.1)
    assert seen(known, 2.1)["a"] == (0, 1, 160)
    assert known.complete
    # it comes back mended
    known.on_status(status("a", epoch=8, parity=expected_answer("a", 8, 16)), 2.5)
    known.on_kv(KvEvents("a", 8, 1, (Stored(join_hashes(blocks(6))),)), 2.5)
    assert seen(known, 2.6)["a"][0] == 6
    assert not known.blind and not known.alarms


def test_a_worker_unlike_its_peers_is_reported() -> None:
    known = View(silence_s=2.0)
    known.on_status(status("a", recipe="int8", vocabulary="v1"), 0.0)
    known.on_status(status("b", recipe="int8", vocabulary="v1"), 0.0)
    known.on_status(status("other", model="n", recipe="fp16", vocabulary="v2"), 0.0)
    known.on_status(status("old"), 0.0)
    assert not known.alarms
    for at in range(3):
        known.on_status(status("c", recipe="fp16", vocabulary="v2"), float(at))
    assert drift_of(known) == [("recipe", "c"), ("vocabulary", "c")]


def test_a_cache_that_is_not_what_its_events_told_is_dropped_and_asked_for() -> None:
    known = view("a")
    known.on_kv(KvEvents("a", 1, 1, (Stored(join_hashes(blocks(6))),)), 0.0)
    assert known.on_status(status("a", kv_seq=1, kv_digest=digest(blocks(6))), 0.1) == []
    assert not known.alarms
    assert known.on_status(status("a", kv_seq=1, kv_digest=digest(blocks(5))), 0.6) == ["a"]
    assert drift_of(known) == [("drift", "a")]
    assert known.resync.drifts_total == 1
    assert seen(known, 0.6)["a"][0] == 0
    known.on_kv(KvSnapshot("a", 1, 1, join_hashes(blocks(5))), 0.7)
    assert seen(known, 0.7)["a"][0] == 5
    assert known.on_status(status("a", kv_seq=1, kv_digest=digest(blocks(5))), 2.0) == []
    assert not known.alarms


def test_digests_are_compared_at_equal_numbers_only() -> None:
    known = view("a")
    chain = blocks(6)
    known.on_kv(KvEvents("a", 1, 1, (Stored(join_hashes(chain[:3])),)), 0.0)
    assert known.on_status(status("a", kv_seq=2, kv_digest=digest(chain[:5])), 0.1) == []  # event 2 is under way
    known.on_kv(KvEvents("a", 1, 2, (Stored(join_hashes(chain[3:5])),)), 0.2)
    known.on_kv(KvEvents("a", 1, 3, (Removed(join_hashes(chain[4:5])),)), 0.3)
    assert known.on_status(status("a", kv_seq=2, kv_digest=digest(chain[:5])), 0.4) == []  # it was overtaken
    assert not known.alarms
    known.on_status(status("a", kv_seq=4, kv_digest=digest(chain)), 0.5)
    assert known.on_kv(KvEvents("a", 1, 4, (Stored(join_hashes(chain[4:5])),)), 0.6) == ["a"]
    assert drift_of(known) == [("drift", "a")]


def test_a_worker_that_always_contradicts_itself_costs_fewer_and_fewer_snapshots() -> None:
    known = view("a")
    asked = 0
    for tick in range(1, 1200):
        now = tick / 2
        for _ in known.on_status(status("a", kv_seq=1, kv_digest=digest(blocks(2))), now) + known.snapshots_due(now):
            asked += 1
            known.on_kv(KvSnapshot("a", 1, 1, join_hashes(blocks(3))), now)
    assert 5 <= asked <= 14


def test_an_index_that_is_full_compares_nothing() -> None:
    known = view("a")
    known.index = PrefixIndex(max_bytes=PrefixIndex().nbytes)
    many = [block for start in range(60) for block in blocks(10, start)]
    known.on_kv(KvEvents("a", 1, 1, (Stored(join_hashes(many)),)), 0.0)
    assert known.index.count("a") < len(many)
    assert known.on_status(status("a", kv_seq=1, kv_digest=digest(many)), 0.1) == []
    assert not known.alarms


def test_a_model_is_expected_back_for_a_minute() -> None:
    known = view("a")
    known.forget_silent(10.0)
    assert known.served_lately("m", 60.0)
    assert not known.served_lately("m", 61.0)
    assert not known.served_lately("other", 0.0)
