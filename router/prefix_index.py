"""Which workers hold which blocks, and how much of a request's chain each one holds.

Rule: a hash names a block and all that stands before it, so the longest prefix per worker falls out of AND-ing the bit
sets along a request's chain. Soft state: a wrong entry costs a cache miss, never an error, and so a full index simply
stops learning. Beside its blocks each worker has their digest, kept with every change, to be compared with its own.
Pure.
"""

from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from router.block_table import FEW, WORD, Bits, BlockTable, Indices, Names, names_in
from shared.blocks import HASH_BYTES

MAX_BYTES = 1 << 30
NAME_BYTES = 8


class PrefixIndex:
    """Blocks of many workers, in `max_bytes` of memory; those past it are counted in `overflow_total`."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.overflow_total = 0
        self._table = BlockTable(max_bytes)
        self._slots: dict[str, int] = {}
        self._workers: dict[int, str] = {}  # by slot
        self._counts: dict[str, int] = {}
        self._digests: dict[str, int] = {}
        self._incomplete: set[str] = set()  # workers some of whose blocks did not fit
        self._free_slots: list[int] = []

    def longest_prefix(self, chain: Names) -> dict[str, int]:
        """How many leading blocks of the chain each worker holds; workers that hold none are left out."""
        depths: dict[str, int] = {}
        few = chain[:FEW]
        for word in range(self._table.words) if len(chain) else ():
            # most chains are held by nobody, or not far, or are short
            leading = self._table.leading(few, word)
            whole = len(leading) == len(few) < len(chain)
            for bits, depth in _depths(self._table.holders(chain, word)) if whole else _ends(leading):
                while bits:
                    low = bits & -bits
                    depths[self._workers[word * WORD + low.bit_length() - 1]] = depth
                    bits ^= low
        return depths

    def store(self, worker: str, hashes: bytes) -> None:
        """These blocks (packed hashes) can be reused at `worker`."""
        slot, words = self.slot(worker), _words(hashes)
        fresh, refused = self._table.add(names_in(words), slot)
        self._count(worker, words, fresh, len(fresh))
        if refused:
            self.overflow_total += refused
            self._incomplete.add(worker)

    def remove(self, worker: str, hashes: bytes) -> None:
        """These blocks (packed hashes) are gone from `worker`. Unknown ones are passed over."""
        if worker in self._slots:
            words = _words(hashes)
            gone = self._table.remove(names_in(words), self._slots[worker])
            self._count(worker, words, gone, -len(gone))

    def clear(self, worker: str) -> None:
        """All blocks of `worker` are gone; its slot stays."""
        if worker in self._slots:
            if self._counts[worker]:
                self._table.drop(self._slots[worker])
            self._counts[worker] = self._digests[worker] = 0
            self._incomplete.discard(worker)

    def forget(self, worker: str) -> None:
        """Clear `worker` and give its slot to whoever comes next."""
        if worker in self._slots:
            self.clear(worker)
            slot = self._slots.pop(worker)
            del self._counts[worker], self._digests[worker], self._workers[slot]
            heappush(self._free_slots, slot)

    def slot(self, worker: str) -> int:
        """The bit number of `worker`; a new one gets the lowest that is free."""
        slot = self._slots.get(worker)
        if slot is None:
            # with no slot free, those in use are 0 ... n - 1
            slot = heappop(self._free_slots) if self._free_slots else len(self._slots)
            self._slots[worker], self._workers[slot] = slot, worker
            self._counts[worker] = self._digests[worker] = 0
        return slot

    def worker(self, slot: int) -> str | None:
        """Whose bit that is."""
        return self._workers.get(slot)

    def digest(self, worker: str) -> int | None:
        """The digest of what `worker` is thought to hold; None when not all of it fitted in here."""
        return None if worker in self._incomplete else self._digests.get(worker, 0)

    def blocks(self, worker: str) -> frozenset[bytes]:
        """What `worker` is thought to hold: of each hash the first `NAME_BYTES`."""
        if worker not in self._slots:
            return frozenset()
        return frozenset(name.to_bytes(NAME_BYTES, "little")
                         for name in self._table.names(self._slots[worker]).tolist())

    def count(self, worker: str) -> int:
        """How many blocks `worker` is thought to hold."""
        return self._counts.get(worker, 0)

    def __len__(self) -> int:
        """Different blocks, whoever holds them."""
        return self._table.count

    @property
    def nbytes(self) -> int:
        """Memory of the blocks; it does not grow with the number of their holders."""
        return self._table.nbytes

    def _count(self, worker: str, words: NDArray[np.uint64], changed: Indices, more: int) -> None:
        if more:
            self._counts[worker] += more
            low, high = np.bitwise_xor.reduce(words.take(changed, axis=0), axis=0).tolist()
            self._digests[worker] ^= low | high << 64


def _words(hashes: bytes) -> NDArray[np.uint64]:
    return np.frombuffer(hashes, "<u8").reshape(-1, HASH_BYTES // 8)


def _ends(leading: list[int]) -> list[tuple[int, int]]:
    """`_depths` of bit sets that are AND-ed already, up to where nobody holds all."""
    found = []
    for depth, held in enumerate(leading, 1):
        after = leading[depth] if depth < len(leading) else 0
        if held != after:
            found.append((held ^ after, depth))
    return found


def _depths(held: Bits) -> list[tuple[int, int]]:
    """Bit sets of a chain's blocks as sets of workers, each with the number of leading blocks that all of them hold."""
    alive = np.bitwise_and.accumulate(held)
    ends = np.flatnonzero(alive[1:] != alive[:-1])
    before, after = alive.take(ends).tolist(), alive.take(ends + 1).tolist()
    found = [(one ^ other, end + 1) for end, one, other in zip(ends.tolist(), before, after, strict=True)]
    if last := int(alive[-1]):
        found.append((last, len(held)))
    return found
