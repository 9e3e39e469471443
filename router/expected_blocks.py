"""Blocks that a worker will hold soon, because it was just sent a request that computes them.

A burst of requests with one new prefix then sticks together instead of computing that prefix everywhere.

Rule: a worker that computes a block computes all before it, so every eighth block of a chain and its last are
enough to remember; what is shared with another request is known to within seven blocks, and of equal prompts all of
it. An entry lives between half of `ttl_s` and all of it: by then the worker's own events tell the truth.
Pure.
"""

from itertools import repeat
from operator import or_

from router.block_table import Names

STRIDE = 8


class ExpectedBlocks:
    """Workers, known by number, and how far into a chain they will soon be. `max_marks` bounds the memory."""

    def __init__(self, ttl_s: float = 5.0, max_marks: int = 100_000) -> None:
        self._bits: dict[int, int] = {}
        self._young: dict[int, int] = {}  # what of `_bits` survives the next turn
        self._ttl_s = ttl_s
        self._max_marks = max_marks
        self._turn_at = 0.0

    def __len__(self) -> int:
        return len(self._bits)

    def expect(self, worker: int, chain: Names, held: int, now: float) -> None:
        """`worker` is about to compute what is behind the first `held` blocks of this chain."""
        self.expire(now)
        marks = _marks(chain, held)
        for bits in (self._bits, self._young):
            bits.update(zip(marks, map(or_, map(bits.get, marks, repeat(0)), repeat(1 << worker)), strict=False))
        if len(self._bits) > self._max_marks:
            self._turn(now)

    def depths(self, chain: Names) -> dict[int, int]:
        """How many leading blocks of the chain each worker will hold; those that are not expected to are left out."""
        marks = _marks(chain, 0)
        held_at = list(map(self._bits.get, marks, repeat(0)))
        found: dict[int, int] = {}
        seen = 0
        for place in range(len(marks) - 1, -1, -1):
            more = held_at[place] & ~seen
            if more:
                seen |= more
                depth = min(len(chain), (place + 1) * STRIDE)
                while more:
                    low = more & -more
                    found[low.bit_length() - 1] = depth
                    more ^= low
        return found

    def expire(self, now: float) -> None:
        """Let go of what is over."""
        if now >= self._turn_at:
            if now >= self._turn_at + self._ttl_s / 2:
                self._young = {}
            self._turn(now)

    def forget(self, worker: int) -> None:
        """The worker is gone."""
        keep = ~(1 << worker)
        self._bits = {mark: left for mark, bits in self._bits.items() if (left := bits & keep)}
        self._young = {mark: left for mark, bits in self._young.items() if (left := bits & keep)}

    def _turn(self, now: float) -> None:
        self._bits, self._young = self._young, {}
        if len(self._bits) > self._max_marks:
            self._bits = {}
        self._turn_at = now + self._ttl_s / 2


def _marks(chain: Names, held: int) -> list[int]:
    """The names to remember of what is behind the first `held` blocks, in order."""
    marks: list[int] = chain[held // STRIDE * STRIDE + STRIDE - 1::STRIDE].tolist()
    if len(chain) > held and len(chain) % STRIDE:
        marks.append(int(chain[-1]))
    return marks
