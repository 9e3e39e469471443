"""What a router knows, from whom, and for how long."""

from msgspec.structs import replace

from router.view import View
from shared.blocks import join_hashes, split_hashes
from shared.messages import Generate, KvEvents, Placement, Stored
from tests.router.builders import blocks, request, status


def view(*workers: str) -> View:
    fresh = View(silence_s=2.0)
    for name in workers:
        fresh.on_status(status(name), 0.0)
    return fresh


def sent_to(worker: str, ask: Generate | None = None, router: str = "r0", cached_tokens: int = 0) -> Generate:
    return replace(ask or request(), placement=Placement(router, worker, cached_tokens))


def seen(known: View, now: float, ask: Generate | None = None) -> dict[str, tuple[int, int, int]]:
    hashes = split_hashes((ask or request()).block_hashes)
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
    assert known.candidates([], 0.2)[0].status.running == 0


def test_events_and_placements_of_unknown_workers_leave_no_trace() -> None:
    known = view()
    known.on_kv(KvEvents("ghost", 1, 1, (Stored(join_hashes(blocks(6))),)), 0.0)
    known.on_placed(sent_to("ghost"), 160, 0.1)
    known.on_unheard(sent_to("ghost"), "ghost")
    assert len(known.index) == 0
    assert seen(known, 0.1) == {}
    assert known.on_status(status("ghost", kv_seq=1), 0.2) == ["ghost"]


def test_the_recipe_of_a_stream_that_began_is_that_of_the_worker_it_lost() -> None:
    known = View(silence_s=2.0)
    known.on_status(status("a", recipe="int4"), 0.0)
    known.forget_silent(10.0)
    begun = request(generated=b"\0\0\0\0", exclude_workers=("unknown", "a"))
    assert known.recipe_of(begun) == "int4"
    assert known.recipe_of(replace(begun, generated=b"")) == ""
    assert known.recipe_of(replace(begun, exclude_workers=("unknown",))) == ""


def test_a_model_is_expected_back_for_a_minute() -> None:
    known = view("a")
    known.forget_silent(10.0)
    assert known.served_lately("m", 60.0)
    assert not known.served_lately("m", 61.0)
    assert not known.served_lately("other", 0.0)
