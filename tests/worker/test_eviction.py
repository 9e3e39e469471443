"""The order in which unheld blocks go, against the rule written down plainly."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.eviction import MOST_USES, NAMELESS, Unheld


class Obvious:
    """Every block with what is known of it; the next is searched for."""

    def __init__(self) -> None:
        self.taken = 0
        self.put_at: dict[int, tuple[int, int, int]] = {}  # block -> uses, clock, turn
        self.turns = 0

    def put(self, block: int, uses: int) -> None:
        self.turns += 1
        self.put_at[block] = min(uses, MOST_USES), self.taken, self.turns

    def next(self) -> int:
        def key(block: int) -> tuple[float, int, int]:
            uses, since, turn = self.put_at[block]
            return -((self.taken - since) / uses if uses else float("inf")), uses, turn
        # only the oldest of each number of uses is looked at; older ones are never younger by the rule
        return min(self.put_at, key=key)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**32))
def test_the_block_that_goes_is_the_one_with_the_largest_age_per_use(blocks: int, seed: int) -> None:
    rng = random.Random(seed)
    unheld, obvious = Unheld(blocks), Obvious()
    outside = set(range(blocks))
    for _ in range(150):
        if outside and rng.random() < 0.55:
            block = rng.choice(sorted(outside))
            uses = rng.randint(NAMELESS, MOST_USES + 2)
            unheld.put(block, uses)
            obvious.put(block, uses)
            outside.discard(block)
        elif len(unheld):
            if rng.random() < 0.4:
                block = rng.choice(sorted(obvious.put_at))
                unheld.remove(block)
            else:
                block = unheld.pop()
                assert block == obvious.next()
                obvious.taken += 1
            del obvious.put_at[block]
            outside.add(block)
        assert len(unheld) == len(obvious.put_at) == len(list(unheld))
        assert set(unheld) == set(obvious.put_at)
        assert all((block in unheld) == (block in obvious.put_at) for block in range(blocks))


def test_blocks_seen_once_do_not_push_out_blocks_that_come_back() -> None:
    unheld = Unheld(8)
    for block in range(4):
        unheld.put(block, 3)
    for block in range(4, 8):
        unheld.put(block, 1)
    for _ in range(8):
        block = unheld.pop()
        assert block >= 4
        unheld.put(block, 1)


def test_what_was_used_often_goes_too_when_it_never_comes_back() -> None:
    unheld = Unheld(8)
    for block in range(4):
        unheld.put(block, MOST_USES)
    for block in range(4, 8):
        unheld.put(block, 1)
    gone = []
    for _ in range(64):
        block = unheld.pop()
        gone.append(block)
        unheld.put(block, 1)
    assert {0, 1, 2, 3} <= set(gone)


def test_nameless_blocks_go_before_all_others() -> None:
    unheld = Unheld(3)
    unheld.put(0, 1)
    unheld.put(1, NAMELESS)
    unheld.put(2, MOST_USES)
    assert unheld.pop() == 1


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_of_a_chain_the_tail_goes_first_whatever_was_used_in_between(seed: int) -> None:
    """Chains that share beginnings are used in turn, each use from the first block on, released tail first."""
    rng = random.Random(seed)
    chains = [[0, 1, 2, 3], [0, 1, 4], [5, 6, 7, 8, 9], [5, 10]]
    parent = {block: before for chain in chains for before, block in pairwise(chain)}
    unheld, uses = Unheld(11), dict.fromkeys(range(11), 0)
    for _ in range(60):
        chain = rng.choice(chains)
        used = chain[:rng.randint(1, len(chain))]
        for block in used:
            if block in unheld:
                unheld.remove(block)
                uses[block] += 1
            else:
                uses[block] = 1
        for block in reversed(used):
            unheld.put(block, uses[block])
        for _ in range(rng.randint(0, 3)):
            if len(unheld):
                gone = unheld.pop()
                uses[gone] = 0
                assert not any(parent.get(block) == gone for block in unheld)


def test_nothing_is_left_to_take_when_every_block_is_held() -> None:
    unheld = Unheld(2)
    unheld.put(0, 1)
    unheld.remove(0)
    with pytest.raises(IndexError, match="held"):
        unheld.pop()
    assert len(unheld) == 0 and unheld.taken == 0


def test_a_list_that_was_broken_is_built_again_in_the_order_given() -> None:
    unheld = Unheld(4)
    for block in range(4):
        unheld.put(block, 1)
    unheld._next[1] = -1
    assert list(unheld) == [0, 1]
    unheld.rebuild((block, 1) for block in (2, 0, 1))
    assert list(unheld) == [2, 0, 1] and len(unheld) == 3 and 3 not in unheld
    assert [unheld.pop() for _ in range(3)] == [2, 0, 1]
