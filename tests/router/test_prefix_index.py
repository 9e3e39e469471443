"""The index finds what workers hold, and only that."""

from hypothesis import given
from hypothesis import strategies as st

from router.prefix_index import BYTES_PER_BLOCK, BYTES_PER_COPY, ExpectedBlocks, PrefixIndex
from shared.blocks import fold, join_hashes
from tests.router.builders import blocks

WORKERS = ("a", "b", "c")
POOL = blocks(6)


def test_each_worker_is_credited_with_its_own_leading_blocks() -> None:
    index = PrefixIndex()
    chain = blocks(10)
    index.store("a", chain[:4])
    index.store("b", chain)
    index.store("c", chain[1:])
    assert index.longest_prefix(chain) == {"a": 4, "b": 10}


def test_a_hole_ends_the_prefix() -> None:
    index = PrefixIndex()
    chain = blocks(5)
    index.store("a", chain)
    index.remove("a", chain[2:3])
    assert index.longest_prefix(chain) == {"a": 2}
    index.store("a", chain[2:3])
    assert index.longest_prefix(chain) == {"a": 5}


def test_nothing_known_and_nothing_asked_give_nothing() -> None:
    index = PrefixIndex()
    assert index.longest_prefix(blocks(3)) == {}
    index.store("a", blocks(3))
    assert index.longest_prefix([]) == {}
    assert index.longest_prefix(blocks(3, start=999)) == {}


def test_a_slot_that_is_given_on_brings_nothing_along() -> None:
    index = PrefixIndex()
    chain = blocks(4)
    index.store("a", chain)
    index.store("b", chain[:1])
    freed = index.slot("a")
    index.forget("a")
    assert index.slot("new") == freed
    assert index.longest_prefix(chain) == {"b": 1}
    assert index.count("new") == 0


def test_a_full_index_stops_learning_and_stays_right() -> None:
    index = PrefixIndex(max_bytes=3 * (BYTES_PER_BLOCK + BYTES_PER_COPY))
    chain = blocks(5)
    index.store("a", chain)
    assert index.longest_prefix(chain) == {"a": 3}
    assert index.overflow_total == 2
    assert index.digest("a") is None
    index.store("b", chain)
    assert index.longest_prefix(chain) == {"a": 3}
    assert index.bytes_estimate <= index.max_bytes
    index.clear("a")
    assert len(index) == 0
    assert index.digest("a") == 0
    index.store("b", chain[:3])
    assert index.longest_prefix(chain) == {"b": 3}


def test_memory_is_accounted_for_and_given_back() -> None:
    index = PrefixIndex()
    empty = index.bytes_estimate
    index.store("a", blocks(100))
    one = index.bytes_estimate
    index.store("b", blocks(100))
    assert empty < one < index.bytes_estimate < 2 * one
    index.forget("a")
    index.forget("b")
    assert index.bytes_estimate == empty


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
                index.store(worker, hashes)
                truth[worker] |= set(hashes)
            case "remove":
                index.remove(worker, hashes)
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
        assert index.blocks(worker) == held
        assert index.digest(worker) == fold(join_hashes(sorted(held)))
    assert index.longest_prefix(POOL) == expected
    assert len(index) == len(set().union(*truth.values()))


def test_expected_blocks_count_until_their_time_is_over() -> None:
    index, expected = PrefixIndex(), ExpectedBlocks(ttl_s=4.0)
    chain = blocks(6)
    index.store("a", chain[:2])
    expected.expect(index.slot("a"), chain[2:], now=10.0)
    assert index.longest_prefix(chain, expected.bits) == {"a": 6}
    assert index.longest_prefix(chain) == {"a": 2}
    expected.expire(11.9)
    assert index.longest_prefix(chain, expected.bits) == {"a": 6}
    expected.expire(14.1)
    assert index.longest_prefix(chain, expected.bits) == {"a": 2}


def test_expected_blocks_of_a_worker_that_died_are_not_inherited() -> None:
    index, expected = PrefixIndex(), ExpectedBlocks()
    chain = blocks(3)
    expected.expect(index.slot("a"), chain, now=0.0)
    expected.forget(index.slot("a"))
    index.forget("a")
    index.store("b", blocks(1, start=50))
    assert index.longest_prefix(chain, expected.bits) == {}


def test_expected_blocks_are_bounded() -> None:
    expected = ExpectedBlocks(max_blocks=10)
    for burst in range(20):
        expected.expect(0, blocks(4, start=burst * 1000), now=0.0)
    assert len(expected.bits) <= 14
