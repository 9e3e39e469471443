"""However events are lost, doubled and reordered, the index ends equal to the worker's cache, or empty."""

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from router.resync import ApplyEvents, AskSnapshot, DropBlocks, ReplaceBlocks, Resync
from router.view import View
from shared.blocks import join_hashes
from shared.messages import Cleared, KvEvent, KvEvents, KvMessage, KvSnapshot, Removed, Stored, WorkerStatus
from tests.router.builders import blocks, named, status

CHAIN = blocks(20)


def events(seq: int, *changes: KvEvent, epoch: int = 1) -> KvEvents:
    return KvEvents("w0", epoch, seq, changes or (Stored(CHAIN[seq]),))


def snapshot(seq: int, hashes: list[bytes], epoch: int = 1, part: int = 0, parts: int = 1) -> KvSnapshot:
    return KvSnapshot("w0", epoch, seq, join_hashes(hashes), part, parts)


def test_a_worker_heard_from_its_first_event_needs_no_snapshot() -> None:
    resync = Resync()
    first, second = events(1), events(2)
    assert resync.on_events(first, 0.0) == [ApplyEvents("w0", first.events)]
    assert resync.on_events(second, 0.0) == [ApplyEvents("w0", second.events)]
    assert not list(resync.awaiting())


def test_a_gap_drops_the_blocks_and_asks() -> None:
    resync = Resync()
    resync.on_events(events(1), 0.0)
    assert resync.on_events(events(3), 0.0) == [DropBlocks("w0"), AskSnapshot("w0")]
    assert resync.gaps_total == 1


def test_what_arrives_while_a_snapshot_is_awaited_is_played_after_it() -> None:
    resync = Resync()
    resync.on_events(events(1), 0.0)
    for seq in (4, 5, 6):
        resync.on_events(events(seq), 0.0)
    actions = resync.on_snapshot(snapshot(5, CHAIN[:3]), 0.1)
    assert actions == [ReplaceBlocks("w0", join_hashes(CHAIN[:3])), ApplyEvents("w0", events(6).events)]
    assert resync.on_events(events(7), 0.2) == [ApplyEvents("w0", events(7).events)]


def test_a_snapshot_older_than_a_hole_behind_it_is_asked_for_again() -> None:
    resync = Resync()
    resync.on_events(events(5), 0.0)
    resync.on_events(events(8), 0.0)
    actions = resync.on_snapshot(snapshot(5, CHAIN[:3]), 0.1)
    assert actions[-2:] == [DropBlocks("w0"), AskSnapshot("w0")]
    assert resync.on_snapshot(snapshot(7, CHAIN[:4]), 0.2) == [
        ReplaceBlocks("w0", join_hashes(CHAIN[:4])), ApplyEvents("w0", events(8).events)]


def test_parts_of_a_snapshot_come_in_any_order_with_events_between() -> None:
    resync = Resync()
    resync.on_events(events(4), 0.0)
    assert resync.on_snapshot(snapshot(4, CHAIN[2:4], part=1, parts=3), 0.0) == []
    assert resync.on_events(events(5), 0.0) == []
    assert resync.on_snapshot(snapshot(4, CHAIN[4:5], part=2, parts=3), 0.0) == []
    assert resync.on_snapshot(snapshot(4, CHAIN[4:5], part=2, parts=3), 0.0) == []
    assert resync.on_snapshot(snapshot(4, CHAIN[:2], part=0, parts=3), 0.0) == [
        ReplaceBlocks("w0", join_hashes(CHAIN[:5])), ApplyEvents("w0", events(5).events)]


def test_parts_of_two_snapshots_are_not_mixed() -> None:
    resync = Resync()
    resync.on_events(events(4), 0.0)
    resync.on_snapshot(snapshot(4, CHAIN[:1], part=0, parts=2), 0.0)
    resync.on_snapshot(snapshot(6, CHAIN[:2], part=0, parts=2), 0.0)
    assert resync.on_snapshot(snapshot(4, CHAIN[1:2], part=1, parts=2), 0.0) == []
    assert resync.on_snapshot(snapshot(6, CHAIN[2:3], part=1, parts=2), 0.0) == [
        ReplaceBlocks("w0", join_hashes(CHAIN[:3]))]


def test_a_snapshot_with_impossible_parts_is_ignored() -> None:
    resync = Resync()
    resync.on_events(events(4), 0.0)
    for bad in (snapshot(4, [], part=1, parts=1), snapshot(4, [], part=0, parts=0), snapshot(4, [], part=-1),
                snapshot(4, [], parts=10**9), KvSnapshot("w0", 1, 4, b"odd")):
        assert resync.on_snapshot(bad, 0.0) == []
    assert list(resync.awaiting()) == ["w0"]


def test_a_snapshot_that_another_router_asked_for_changes_nothing_here() -> None:
    resync = Resync()
    resync.on_events(events(1), 0.0)
    assert resync.on_snapshot(snapshot(1, CHAIN[:1]), 0.0) == []


def test_a_snapshot_that_knows_more_than_we_heard_is_taken() -> None:
    resync = Resync()
    resync.on_events(events(1), 0.0)
    assert resync.on_snapshot(snapshot(3, CHAIN[:5]), 0.0) == [
        DropBlocks("w0"), ReplaceBlocks("w0", join_hashes(CHAIN[:5]))]


def test_a_lost_request_is_sent_again_each_time_later() -> None:
    resync = Resync()
    resync.on_events(events(3), 0.0)
    asked = [0.0]
    for tick in range(1, 400):
        if resync.due(tick * 0.1):
            asked.append(tick * 0.1)
    waits = [round(b - a, 1) for a, b in pairwise(asked)]
    assert waits[0] < 1.0
    assert waits == sorted(waits)
    assert waits[-1] == 5.0
    resync.forget("w0")
    assert resync.due(1e9) == []


def test_a_snapshot_that_is_arriving_is_not_asked_for_again() -> None:
    resync = Resync()
    resync.on_events(events(3), 0.0)
    for part in range(5):
        assert resync.due(0.7 * part) == []
        resync.on_snapshot(snapshot(3, CHAIN[part:part + 1], part=part, parts=9), 0.7 * part)
    assert resync.due(0.7 * 4 + 1.6) == [AskSnapshot("w0")]


def test_a_worker_that_starts_again_loses_its_blocks_and_its_numbers() -> None:
    resync = Resync()
    for seq in range(1, 8):
        resync.on_events(events(seq), 0.0)
    again = events(1, epoch=2)
    assert resync.on_events(again, 0.0) == [DropBlocks("w0"), ApplyEvents("w0", again.events)]
    assert resync.on_events(events(8, epoch=1), 0.0) == []
    assert resync.on_snapshot(snapshot(9, CHAIN, epoch=1), 0.0) == []
    assert resync.on_events(events(2, epoch=2), 0.0) == [ApplyEvents("w0", events(2).events)]


def test_a_status_betrays_a_loss_that_no_event_follows() -> None:
    resync = Resync()
    resync.on_events(events(1), 0.0)
    assert resync.on_status("w0", 1, 2, 0.5) == []  # event 2 may still be under way
    assert resync.on_status("w0", 1, 2, 1.0) == [DropBlocks("w0"), AskSnapshot("w0")]


def test_a_status_that_overtakes_its_events_costs_nothing() -> None:
    resync = Resync()
    resync.on_events(events(1), 0.0)
    assert resync.on_status("w0", 1, 2, 0.5) == []
    resync.on_events(events(2), 0.51)
    assert resync.on_status("w0", 1, 3, 1.0) == []
    assert resync.gaps_total == 0


def test_an_unknown_worker_with_a_past_is_asked_at_once_and_one_without_is_not() -> None:
    resync = Resync()
    assert resync.on_status("w0", 1, 7, 0.0) == [AskSnapshot("w0")]
    assert resync.on_status("w1", 1, 0, 0.0) == []


def test_waiting_for_a_snapshot_keeps_a_bounded_number_of_events() -> None:
    resync = Resync()
    for seq in range(2, 3000):
        resync.on_events(events(seq, Cleared()), 0.0)
    kept = resync.on_snapshot(snapshot(1999, []), 0.0)
    assert len(kept) == 1001
    assert resync.on_events(events(3000, Cleared()), 0.0)


@given(st.integers(0, 2**32))
def test_whatever_the_bus_does_the_index_ends_as_the_workers_cache(seed: int) -> None:
    rng = random.Random(seed)
    view = View(silence_s=1e9)
    worker = _Worker(rng)
    view.on_status(worker.status(), 0.0)
    now = 0.0
    flying: list[KvMessage | WorkerStatus] = []
    for step in range(60):
        now += 0.25
        if step < 45:
            flying.append(worker.change())
            if rng.random() < 0.03:
                worker.restart()
        if step % 2:
            flying.append(worker.status())
        calm = step >= 50
        asked = view.snapshots_due(now)
        while flying and (calm or rng.random() < 0.8):
            message = flying.pop(0 if calm or rng.random() < 0.8 else rng.randrange(len(flying)))
            fate = 1.0 if calm else rng.random()
            for _ in range(0 if fate < 0.2 else 2 if fate < 0.3 else 1):
                asked += (view.on_status(message, now) if isinstance(message, WorkerStatus)
                          else view.on_kv(message, now))
        for _ in asked:
            if calm or rng.random() < 0.7:
                flying += worker.snapshot()
    # the last retry is at most five seconds away
    for _ in range(60):
        now += 0.25
        asked = view.snapshots_due(now) + view.on_status(worker.status(), now)
        while flying:
            message = flying.pop(0)
            assert not isinstance(message, WorkerStatus)
            asked += view.on_kv(message, now)
        for _ in asked:
            flying += worker.snapshot()
    assert view.index.blocks("w0") == named(worker.held)
    assert view.complete


class _Worker:
    """A cache that changes at random and tells of it."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.epoch = 1
        self.seq = 0
        self.held: set[bytes] = set()

    def change(self) -> KvEvents:
        stored = self.rng.sample(CHAIN, 3)
        removed = self.rng.sample(sorted(self.held), min(len(self.held), 2))
        self.held = (self.held | set(stored)) - set(removed)
        changes: list[KvEvent] = [Stored(join_hashes(stored)), Removed(join_hashes(removed))]
        if self.rng.random() < 0.05:
            self.held = set()
            changes.append(Cleared())
        self.seq += 1
        return KvEvents("w0", self.epoch, self.seq, tuple(changes))

    def snapshot(self) -> list[KvMessage]:
        held = sorted(self.held)
        middle = len(held) // 2
        return [KvSnapshot("w0", self.epoch, self.seq, join_hashes(held[:middle]), 0, 2),
                KvSnapshot("w0", self.epoch, self.seq, join_hashes(held[middle:]), 1, 2)]

    def restart(self) -> None:
        self.epoch += 1
        self.seq = 0
        self.held = set()

    def status(self) -> WorkerStatus:
        return status("w0", epoch=self.epoch, kv_seq=self.seq)
