"""Whatever the bus and the workers do, the index is at every moment what some moment of the worker was, or empty.

A plain dictionary of everything each worker ever was stands beside the router's view: (worker, epoch, number) -> the
set of its blocks. Messages are lost, doubled, and taken out of order; workers change, start again, come back under
the id of one that left, and the clock of one may be set back.
"""

import random
from collections.abc import Iterator
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from router.block_table import names_of
from router.prefix_index import NAME_BYTES
from router.view import View
from shared.blocks import fold, join_hashes
from shared.messages import Cleared, KvEvent, KvEvents, KvMessage, KvSnapshot, Removed, Stored, WorkerStatus
from tests.router.builders import blocks, named, status

CHAIN = blocks(12)
WORKERS = ("a", "b")
SILENCE_S = 2.0
Message = KvMessage | WorkerStatus

HAPPENINGS = ("change",) * 6 + ("status",) * 4 + ("deliver",) * 16 + (
    "lose", "double", "overtake", "overtake", "restart", "clear", "leave", "snapshot", "wait", "lie")


class Truth:
    """The workers as they are, and all that they were."""

    def __init__(self) -> None:
        self.epochs = dict.fromkeys(WORKERS, 1)
        self.seqs = dict.fromkeys(WORKERS, 0)
        self.held: dict[str, frozenset[bytes]] = dict.fromkeys(WORKERS, frozenset())
        self.ever: dict[tuple[str, int, int], frozenset[bytes]] = {
            (worker, 1, 0): frozenset() for worker in WORKERS}

    def change(self, worker: str, draw: int, cleared: bool = False) -> KvEvents:
        stored = [block for i, block in enumerate(CHAIN) if draw >> i & 1 and block not in self.held[worker]]
        gone = [block for i, block in enumerate(CHAIN) if draw >> (i // 2 + 12) & 1 and block in self.held[worker]]
        changes: list[KvEvent] = [Removed(join_hashes(gone)), Stored(join_hashes(stored))]
        held = self.held[worker] - set(gone) | set(stored)
        if cleared:
            changes.append(Cleared())
            held = frozenset()
        self.seqs[worker] += 1
        self.held[worker] = held
        self._note(worker)
        return KvEvents(worker, self.epochs[worker], self.seqs[worker], tuple(changes))

    def restart(self, worker: str) -> None:
        self.epochs[worker] += 1
        self.seqs[worker], self.held[worker] = 0, frozenset()
        self._note(worker)

    def snapshot(self, worker: str, parts: int) -> Iterator[KvSnapshot]:
        held = sorted(self.held[worker])
        for part in range(parts):
            hashes = join_hashes(held[part::parts])
            yield KvSnapshot(worker, self.epochs[worker], self.seqs[worker], hashes, part, parts)

    def status(self, worker: str) -> WorkerStatus:
        digest = fold(join_hashes(sorted(self.held[worker]))).to_bytes(16, "little")
        return status(worker, epoch=self.epochs[worker], kv_seq=self.seqs[worker], kv_digest=digest)

    def _note(self, worker: str) -> None:
        self.ever[worker, self.epochs[worker], self.seqs[worker]] = self.held[worker]


def check(view: View, truth: Truth, tampered: set[str]) -> None:
    """Every worker's blocks are those behind the number that the view stands at; prefixes follow."""
    awaiting = set(view.resync.awaiting())
    full = {block[:NAME_BYTES]: block for block in CHAIN}
    expected: dict[str, int] = {}
    for worker in WORKERS:
        thought = frozenset(full[name] for name in view.index.blocks(worker))
        assert view.index.count(worker) == len(thought)
        position = view.resync.position(worker)
        if worker in awaiting or position == (0, 0):
            assert thought == frozenset(), "a worker whose count is lost is credited with blocks"
        elif worker not in tampered:
            assert thought == truth.ever[(worker, *position)]
        assert view.index.digest(worker) == fold(join_hashes(sorted(thought)))
        depth = next((i for i, block in enumerate(CHAIN) if block not in thought), len(CHAIN))
        if depth:
            expected[worker] = depth
    assert view.index.longest_prefix(names_of(join_hashes(CHAIN))) == expected
    assert len(view.index) == len(frozenset().union(*(view.index.blocks(worker) for worker in WORKERS)))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_the_index_equals_a_plain_dictionary_of_what_every_worker_was(seed: int) -> None:
    rng = random.Random(seed)
    truth, view = Truth(), View(SILENCE_S)
    flying: list[Message] = []
    tampered: set[str] = set()
    now = 0.0

    def hear(message: Message) -> None:
        asked = (view.on_status(message, now) if isinstance(message, WorkerStatus) else view.on_kv(message, now))
        for worker in asked:
            tampered.discard(worker)
            flying.extend(truth.snapshot(worker, 1 + len(flying) % 3))

    for worker in WORKERS:
        hear(truth.status(worker))
    for _ in range(rng.randrange(200)):
        worker, happens, draw = rng.choice(WORKERS), rng.choice(HAPPENINGS), rng.getrandbits(20)
        match happens:
            case "change":
                flying.append(truth.change(worker, draw))
            case "clear":
                flying.append(truth.change(worker, draw, cleared=True))
            case "status":
                flying.append(truth.status(worker))
            case "snapshot":
                flying.extend(truth.snapshot(worker, 1 + draw % 3))
            case "restart":
                truth.restart(worker)
            case "deliver" if flying:
                hear(flying.pop(0))
            case "lose" if flying:
                flying.pop(draw % len(flying))
            case "double" if flying:
                hear(flying[draw % len(flying)])
            case "overtake" if flying:
                hear(flying.pop(draw % len(flying)))
            case "wait":
                now += 0.3
                flying.extend(truth.status(name) for name in view.snapshots_due(now))
            case "leave":
                # it falls silent, and something else comes back under its name
                truth.restart(worker)
                now += 2 * SILENCE_S
                view.forget_silent(now)
                assert len(view.index) == 0 and not list(view.resync.awaiting())
                tampered.clear()
            case "lie" if view.index.count(worker):
                # memory goes bad: only the digest can tell
                gone = min(view.index.blocks(worker))
                view.index.remove(worker, next(block for block in CHAIN if block.startswith(gone)))
                tampered.add(worker)
        check(view, truth, tampered)
    settle(view, truth, flying, now)


def settle(view: View, truth: Truth, flying: list[Message], now: float) -> None:
    """The bus is calm again: within the longest pause everything is known as it is, also what had gone bad."""
    flying.clear()
    for _ in range(60):
        now += 0.5
        asked: list[str] = list(view.snapshots_due(now))
        for worker in WORKERS:
            asked += view.on_status(truth.status(worker), now)
        waiting: list[Any] = [part for worker in asked for part in truth.snapshot(worker, 2)]
        for message in waiting:
            view.on_kv(message, now)
    for worker in WORKERS:
        assert view.index.blocks(worker) == named(truth.held[worker])
    assert view.complete
    check(view, truth, set())
