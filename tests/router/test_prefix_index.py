"""The index finds what workers hold, and only that."""

from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.block_table import FEW, WORD, names_of
from router.prefix_index import PrefixIndex
from shared.blocks import HASH_BYTES, fold, join_hashes
from tests.router.builders import blocks, named

WORKERS = ("a", "b", "c")
POOL = blocks(6)


def store(index: PrefixIndex, worker: str, hashes: list[bytes]) -> None:
    index.store(worker, join_hashes(hashes))


def remove(index: PrefixIndex, worker: str, hashes: list[bytes]) -> None:
    index.remove(worker, join_hashes(hashes))


def prefixes(index: PrefixIndex, chain: list[bytes]) -> dict[str, int]:
    return index.longest_prefix(names_of(join_hashes(chain)))


def test_each_worker_is_credited_with_its_own_leading_blocks() -> None:
    index = PrefixIndex()
    chain = blocks(10)
    store(index, "a", chain[:4])
    store(index, "b", chain)
    store(index, "c", chain[1:])
    assert prefixes(index, chain) == {"a": 4, "b": 10}


def test_a_hole_ends_the_prefix() -> None:
    index = PrefixIndex()
    chain = blocks(5)
    store(index, "a", chain)
    remove(index, "a", chain[2:3])
    assert prefixes(index, chain) == {"a": 2}
    store(index, "a", chain[2:3])
    assert prefixes(index, chain) == {"a": 5}


def test_nothing_known_and_nothing_asked_give_nothing() -> None:
    index = PrefixIndex()
    assert prefixes(index, blocks(3)) == {}
    store(index, "a", blocks(3))
    assert prefixes(index, []) == {}
    assert prefixes(index, blocks(3, start=999)) == {}


def test_a_slot_that_is_given_on_brings_nothing_along() -> None:
    index = PrefixIndex()
    chain = blocks(4)
    store(index, "a", chain)
    store(index, "b", chain[:1])
    freed = index.slot("a")
    index.forget("a")
    assert index.slot("new") == freed
    assert prefixes(index, chain) == {"b": 1}
    assert index.count("new") == 0


def test_a_full_index_stops_learning_and_stays_right() -> None:
    many = 1000
    chains = [[digest(number)] for number in range(many)]
    index = PrefixIndex(max_bytes=PrefixIndex().nbytes)
    for chain in chains:
        store(index, "a", chain)
    fitted = len(index)
    assert 100 < fitted < many and index.overflow_total == many - fitted
    assert index.count("a") == fitted == sum(prefixes(index, chain) == {"a": 1} for chain in chains)
    assert index.digest("a") is None
    store(index, "b", [block for chain in chains for block in chain])
    assert index.count("b") == fitted == len(index)
    assert index.nbytes <= PrefixIndex().nbytes
    index.clear("a")
    index.clear("b")
    assert len(index) == 0
    assert index.digest("a") == index.digest("b") == 0
    store(index, "b", POOL)
    assert prefixes(index, POOL) == {"b": len(POOL)}


def test_memory_is_accounted_for_and_given_back_and_a_second_holder_costs_none() -> None:
    index = PrefixIndex()
    empty = index.nbytes
    hashes = [digest(number) for number in range(5000)]
    store(index, "a", hashes)
    one = index.nbytes
    assert len(hashes) * 16 < one < len(hashes) * 60
    store(index, "b", hashes)
    assert index.nbytes == one
    index.forget("a")
    index.forget("b")
    assert index.nbytes == empty


def test_more_workers_than_a_word_has_bits_are_told_apart() -> None:
    index, chain = PrefixIndex(), blocks(30)
    workers = [f"w{number}" for number in range(2 * WORD + 3)]
    for number, worker in enumerate(workers):
        store(index, worker, chain[:1 + number % len(chain)])
    assert prefixes(index, chain) == {worker: 1 + number % len(chain) for number, worker in enumerate(workers)}
    for worker in workers[::2]:
        index.forget(worker)
    assert prefixes(index, chain) == {
        worker: 1 + number % len(chain) for number, worker in enumerate(workers) if number % 2}


def digest(number: int) -> bytes:
    return blake2b(number.to_bytes(4, "little"), digest_size=HASH_BYTES).digest()


operations = st.lists(st.tuples(
    st.sampled_from(("store", "remove", "clear", "forget")),
    st.sampled_from(WORKERS),
    st.lists(st.sampled_from(POOL), max_size=6),
), max_size=40)


@given(operations)
def test_the_index_equals_one_set_per_worker(history: list[tuple[str, str, list[bytes]]]) -> None:
    index = PrefixIndex()
    truth: dict[str, set[bytes]] = {worker: set() for worker in WORKERS}
    for operation, worker, hashes in history:
        match operation:
            case "store":
                store(index, worker, hashes)
                truth[worker] |= set(hashes)
            case "remove":
                remove(index, worker, hashes)
                truth[worker] -= set(hashes)
            case "clear":
                index.clear(worker)
                truth[worker] = set()
            case "forget":
                index.forget(worker)
                truth[worker] = set()
    expected = {}
    for worker, held in truth.items():
        depth = next((i for i, block in enumerate(POOL) if block not in held), len(POOL))
        if depth:
            expected[worker] = depth
        assert index.blocks(worker) == named(held)
        assert index.digest(worker) == fold(join_hashes(sorted(held)))
    assert prefixes(index, POOL) == expected
    assert len(index) == len(set().union(*truth.values()))


@pytest.mark.parametrize("length", [1, 3, FEW - 1, FEW, FEW + 1, 3 * FEW])
def test_long_and_short_chains_are_credited_alike(length: int) -> None:
    index = PrefixIndex()
    chain = blocks(length)
    depths = {f"w{number}": number * length // 70 for number in range(71)}  # of more workers than one word has bits
    for worker, depth in depths.items():
        store(index, worker, chain[:depth])
        store(index, worker, chain[depth + 1:])
    assert prefixes(index, chain) == {worker: depth for worker, depth in depths.items() if depth}
