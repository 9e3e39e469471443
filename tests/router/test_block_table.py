"""The table equals a dictionary of sets, whatever is done to it, in a loop or in arrays."""

import random
from typing import Any

import numpy as np
import pytest

from router import block_table
from router.block_table import SLOTS, BlockTable, Names

ROOM = 1 << 24


def names(values: list[int]) -> Names:
    return np.array(values, np.uint64)


def check(table: BlockTable, truth: dict[int, set[int]], workers: range) -> None:
    """Holders, counts and names are those of `truth`: name -> workers."""
    known = [*sorted(truth), 1 << 63 | 12345, 77]
    for word in range(max(workers) // 64 + 1):
        held = table.holders(names(known), word).tolist()
        assert held == [sum(1 << worker - 64 * word for worker in truth.get(name, ()) if worker // 64 == word)
                        for name in known]
        for start in range(0, len(known), 3):
            held, alive = [], -1
            for name in known[start:start + 5]:
                alive &= sum(1 << worker - 64 * word for worker in truth.get(name, ()) if worker // 64 == word)
                if not alive:
                    break
                held.append(alive)
            assert table.leading(names(known[start:start + 5]), word) == held
    assert table.count == len(truth)
    for worker in workers:
        assert sorted(table.names(worker).tolist()) == sorted(name for name, by in truth.items() if worker in by)


def play(seed: int, draw: Any, workers: range, most: int) -> None:
    rng = random.Random(seed)
    table, truth = BlockTable(ROOM), dict[int, set[int]]()
    pool = [draw(rng) for _ in range(4 * most)]
    for _ in range(30):
        worker, count = rng.choice(workers), rng.choice((0, 1, 2, 5, most // 4, most))
        chosen = [rng.choice(pool) for _ in range(count)]  # some of them twice
        match rng.choice(("add", "add", "add", "remove", "drop")):
            case "add":
                before = {name for name in chosen if worker in truth.get(name, ())}
                fresh, refused = table.add(names(chosen), worker)
                assert refused == 0
                assert sorted(chosen[index] for index in fresh.tolist()) == sorted(set(chosen) - before)
                for name in chosen:
                    truth.setdefault(name, set()).add(worker)
            case "remove":
                held = {name for name in chosen if worker in truth.get(name, ())}
                gone = table.remove(names(chosen), worker)
                assert sorted(chosen[index] for index in gone.tolist()) == sorted(held)
                for name in held:
                    truth[name].discard(worker)
            case "drop":
                table.drop(worker)
                for by in truth.values():
                    by.discard(worker)
        truth = {name: by for name, by in truth.items() if by}
        check(table, truth, workers)


@pytest.mark.parametrize("few", [0, 48, 1 << 20])
@pytest.mark.parametrize("workers", [range(3), range(62, 67)])
def test_the_table_equals_a_dictionary_of_sets(few: int, workers: range, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_table, "FEW", few)
    for seed in range(12):
        play(seed, lambda rng: rng.getrandbits(64) | 1, workers, 300)


@pytest.mark.parametrize("few", [0, 1 << 20])
def test_names_that_begin_alike_are_told_apart_by_what_follows(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_table, "FEW", few)
    for seed in range(6):
        play(seed, lambda rng: 0xAB << 56 | rng.getrandbits(56) | 1, range(3), 40)


def test_names_nobody_can_tell_apart_fill_a_bucket_and_no_memory() -> None:
    table = BlockTable(ROOM)
    alike = list(range(1, 200))  # the first 56 bits are equal
    fresh, refused = table.add(names(alike), 0)
    assert len(fresh) == SLOTS and refused == len(alike) - SLOTS
    assert table.nbytes < 1 << 20
    others = [number << 40 for number in range(1, 100)]
    assert table.add(names([name << 17 for name in others]), 0)[1] == 0


def test_a_table_takes_no_more_memory_than_it_may_and_keeps_what_it_has() -> None:
    rng = random.Random(5)
    for most in (BlockTable(ROOM).nbytes, 100_000, 300_001):
        table = BlockTable(most)
        values = [rng.getrandbits(64) | 1 for _ in range(40_000)]
        kept: set[int] = set()
        for start in range(0, len(values), 1000):
            part = values[start:start + 1000]
            fresh, refused = table.add(names(part), 0)
            assert len(fresh) + refused == len(part)
            kept.update(part[index] for index in fresh.tolist())
            assert table.nbytes <= most
        assert len(kept) > 0.6 * most / 16 / 1.2
        assert set(table.names(0).tolist()) == kept
        assert table.count == len(kept)


def test_a_table_that_only_changes_hardly_grows() -> None:
    rng = random.Random(6)
    table = BlockTable(ROOM)
    held = [rng.getrandbits(64) | 1 for _ in range(10_000)]
    table.add(names(held), 0)
    for _ in range(100):
        table.remove(names(held[:500]), 0)
        held = held[500:] + [rng.getrandbits(64) | 1 for _ in range(500)]
        table.add(names(held[-500:]), 0)
    assert table.count == 10_000
    # buckets part and never join again: a third full in the long run
    assert table.nbytes < 70 * 10_000
