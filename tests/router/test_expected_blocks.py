"""What was just sent to a worker counts as its own for a few seconds."""

from hypothesis import given
from hypothesis import strategies as st

from router.block_table import Names, names_of
from router.expected_blocks import STRIDE, ExpectedBlocks
from shared.blocks import join_hashes
from tests.router.builders import blocks


def chain(count: int, start: int = 0) -> Names:
    return names_of(join_hashes(blocks(count, start)))


def test_expected_blocks_count_until_their_time_is_over() -> None:
    expected = ExpectedBlocks(ttl_s=4.0)
    expected.expect(3, chain(6), 2, now=10.0)
    assert expected.depths(chain(6)) == {3: 6}
    expected.expire(11.9)
    assert expected.depths(chain(6)) == {3: 6}
    expected.expire(14.1)
    assert expected.depths(chain(6)) == {}


@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
def test_an_equal_prompt_is_expected_whole_and_a_shared_beginning_to_within_a_stride(
        sent: int, held: int, shared: int, own: int) -> None:
    held, shared = min(held, sent), min(shared, sent)
    expected = ExpectedBlocks()
    expected.expect(0, chain(sent), held, now=0.0)
    assert expected.depths(chain(sent)) == ({0: sent} if held < sent else {})
    asked = names_of(join_hashes(blocks(shared) + blocks(own, start=10_000_000)))
    depth = expected.depths(asked).get(0, 0)
    assert depth <= shared
    if shared >= held + STRIDE:
        assert depth > shared - STRIDE


def test_each_worker_is_expected_as_far_as_it_was_sent() -> None:
    expected = ExpectedBlocks()
    expected.expect(0, chain(40), 0, now=0.0)
    expected.expect(70, chain(24), 0, now=0.0)
    expected.expect(1, chain(40, start=7), 0, now=0.0)
    assert expected.depths(chain(40)) == {0: 40, 70: 24}
    assert expected.depths(chain(32)) == {0: 32, 70: 24}


def test_a_worker_that_is_gone_is_expected_nowhere() -> None:
    expected = ExpectedBlocks()
    expected.expect(0, chain(20), 0, now=0.0)
    expected.expect(1, chain(20), 0, now=0.0)
    expected.forget(0)
    assert expected.depths(chain(20)) == {1: 20}
    expected.expire(3.0)
    assert expected.depths(chain(20)) == {1: 20}


def test_what_is_expected_is_bounded() -> None:
    expected = ExpectedBlocks(max_marks=10)
    for burst in range(50):
        expected.expect(0, chain(16, start=burst * 1000), 0, now=0.0)
    assert len(expected) <= 12
