"""The block pool against a slow and obvious model of itself."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.blocks import split_hashes
from shared.messages import Cleared, KvEvent, Removed, Stored
from worker.kv_blocks import BlockPool, Ownership


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


def apply(known: set[bytes], events: tuple[KvEvent, ...]) -> set[bytes]:
    """What a router makes of events."""
    for event in events:
        if isinstance(event, Cleared):
            known = set()
        elif isinstance(event, Stored):
            known |= set(split_hashes(event.hashes))
        else:
            known -= set(split_hashes(event.hashes))
    return known


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**32))
def test_blocks_are_conserved_and_routers_know_exactly_what_can_be_reused(blocks: int, seed: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(blocks)
    tables: list[list[int]] = []
    known: set[bytes] = set()
    for number in range(120):
        match rng.randrange(6):
            case 0 | 1:
                count = rng.randint(1, 4)
                before = pool.available
                taken = pool.allocate(count)
                assert (taken is None) == (count > before)
                if taken is not None:
                    held = {block for table in tables for block in table}
                    assert len(set(taken)) == count and not held & set(taken)
                    tables.append(taken)
            case 2 if tables:
                pool.release(tables.pop(rng.randrange(len(tables))))
            case 3 if tables:
                pool.store(rng.choice(rng.choice(tables)), name(rng.randrange(20)), b"x")
            case 4 if pool.named:
                block = pool.find(rng.choice(pool.names()), b"x")
                assert block is not None
                pool.hold(block)
                tables.append([block])
            case 5 if number % 40 == 0:
                pool.clear()
        known = apply(known, pool.take_events())
        assert known == set(pool.names())
        held = {block for table in tables for block in table}
        for block in range(blocks):
            assert (pool.ownership(block) is Ownership.HELD) == (block in held)
        assert pool.available == blocks - len(held)
        assert pool.audit(tables).repairs == 0


def test_nameless_blocks_go_first_then_the_tail_of_the_oldest_prefix() -> None:
    pool = BlockPool(5)
    first, second = pool.allocate(2), pool.allocate(2)
    assert first is not None and second is not None
    for number, block in enumerate(first + second):
        pool.store(block, name(number), b"")
    pool.release(first)
    pool.release(second)
    pool.take_events()
    taken = pool.allocate(5)
    assert taken is not None
    assert taken[1:] == [first[1], first[0], second[1], second[0]]
    assert pool.take_events() == (Removed(name(1) + name(0) + name(3) + name(2)),)


def test_a_hit_needs_the_same_content_and_not_only_the_same_hash() -> None:
    pool = BlockPool(2)
    taken = pool.allocate(1)
    assert taken is not None
    pool.store(taken[0], name(7), b"parent and tokens")
    assert pool.find(name(7), b"parent and tokens") == taken[0]
    assert pool.find(name(7), b"parent and others") is None
    assert pool.find(name(8), b"parent and tokens") is None


def test_a_second_block_of_the_same_name_stays_nameless_and_is_not_announced() -> None:
    pool = BlockPool(2)
    taken = pool.allocate(2)
    assert taken is not None
    assert pool.store(taken[0], name(1), b"")
    pool.take_events()
    assert not pool.store(taken[1], name(1), b"")
    assert pool.take_events() == ()
    pool.release(taken)
    assert [pool.ownership(block) for block in taken] == [Ownership.CACHED, Ownership.FREE]


def test_asking_for_too_much_changes_nothing() -> None:
    pool = BlockPool(3)
    assert pool.allocate(4) is None
    assert pool.available == 3
    assert pool.take_events() == ()


@pytest.mark.parametrize("harm", ["count", "leak", "list", "name"])
def test_an_audit_finds_and_mends(harm: str) -> None:
    pool = BlockPool(6)
    table, gone = pool.allocate(3), pool.allocate(2)
    assert table is not None and gone is not None
    pool.store(table[0], name(1), b"")
    pool.take_events()
    pool.release(gone)
    match harm:
        case "count":
            pool._holders[table[0]] = 2
        case "leak":
            assert pool.allocate(1) is not None
        case "list":
            pool._unheld._next[pool.blocks] = pool.blocks
        case "name":
            pool._by_name[name(2)] = table[1]
    assert pool.audit([table]).repairs > 0
    assert pool.audit([table]).repairs == 0
    assert pool.available == 3
    rest = pool.allocate(3)
    assert rest is not None and sorted(rest + table) == list(range(6))
    assert pool.names() == [name(1)]


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="more KV memory"):
        BlockPool(0)


def test_a_flood_of_blocks_seen_once_leaves_those_that_came_back() -> None:
    pool = BlockPool(8)
    kept = pool.allocate(2)
    assert kept is not None
    for number, block in enumerate(kept):
        pool.store(block, name(number), b"")
    pool.release(kept)
    for block in kept:
        pool.hold(block)
    pool.release(kept)
    for number in range(2, 12):
        taken = pool.allocate(1)
        assert taken is not None and not set(taken) & set(kept)
        pool.store(taken[0], name(number), b"")
        pool.release(taken)
    assert {name(0), name(1)} <= set(pool.names())


def test_blocks_that_lost_their_names_together_are_used_up_first() -> None:
    pool = BlockPool(4)
    cleared = pool.allocate(2)
    assert cleared is not None
    for number, block in enumerate(cleared):
        pool.store(block, name(number), b"")
    pool.release(cleared)
    pool.clear()
    fresh = pool.allocate(2)
    assert fresh is not None and not set(fresh) & set(cleared)
    pool.store(fresh[0], name(7), b"")
    pool.release(fresh[:1])
    taken = pool.allocate(2)
    assert taken is not None and set(taken) == set(cleared)
    assert pool.names() == [name(7)]
