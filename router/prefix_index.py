"""Which workers hold which blocks: block hash -> a bit set of worker slots.

Rule: a hash names a block and all that stands before it, so the longest prefix per worker falls out of AND-ing the bit
sets along a request's chain. Soft state: a wrong entry costs a cache miss, never an error, and so a full index simply
stops learning. Beside its blocks each worker has their digest, kept with every change, to be compared with its own.
Pure.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import heappop, heappush
from itertools import islice, repeat
from operator import or_

from shared.blocks import fold, join_hashes

# resident memory at 10^6 blocks (CPython 3.11): 154 bytes for the first worker that holds a block, 106 for each more
BYTES_PER_BLOCK = 48
BYTES_PER_COPY = 106
MAX_BYTES = 1 << 30
MOST_BIT_SETS = 65_536


class PrefixIndex:
    """Blocks of many workers, in `max_bytes` of memory; those past it are counted in `overflow_total`."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.overflow_total = 0
        self._copies = 0
        self._bit_sets: dict[int, int] = {}
        self._digests: dict[str, int] = {}
        self._incomplete: set[str] = set()  # workers some of whose blocks did not fit
        self._holders: dict[bytes, int] = {}
        self._slots: dict[str, int] = {}
        # dicts for sets: the garbage collector walks every set, a tenth of a second for 10^6 blocks, and no such dict
        self._held: dict[str, dict[bytes, None]] = {}
        self._free_slots: list[int] = []

    def longest_prefix(self, hashes: Sequence[bytes], expected: Mapping[bytes, int] | None = None) -> dict[str, int]:
        """How many leading blocks of the chain each worker holds; workers that hold none are left out.

        `expected` adds holders that are not certain yet (`ExpectedBlocks.bits`).
        """
        # lookups run in C, the loop only ANDs: 750 blocks at 16 workers take 60 us (Zen 3, CPython 3.11)
        holders: Iterator[int] = map(self._holders.get, hashes, repeat(0))
        if expected:
            holders = map(or_, holders, map(expected.get, hashes, repeat(0)))
        depths: dict[int, int] = {}
        alive = -1  # in front of the first block: everyone, known or not
        depth = 0
        for held in holders:
            left = alive & held
            if left != alive:
                if depth:
                    _note(depths, alive ^ left, depth)
                alive = left
                if not left:
                    break
            depth += 1
        if depth and alive:
            _note(depths, alive, depth)
        if not depths:
            return {}
        return {worker: depths[slot] for worker, slot in self._slots.items() if slot in depths}

    def store(self, worker: str, hashes: Sequence[bytes]) -> None:
        """These blocks can be reused at `worker`."""
        bit = 1 << self.slot(worker)
        holders, held = self._holders, self._held[worker]
        room = (self.max_bytes - self.bytes_estimate) // (BYTES_PER_BLOCK + BYTES_PER_COPY)
        fresh = dict.fromkeys(block for block in hashes if block not in held) if held else dict.fromkeys(hashes)
        if len(fresh) > room:
            self.overflow_total += len(fresh) - room
            self._incomplete.add(worker)
            fresh = dict.fromkeys(islice(fresh, room))
        # in C but for the first line above: a snapshot of 10^6 blocks must not hold requests up
        known = list(map(holders.get, fresh, repeat(0)))
        after = {bits: self._shared(bits | bit) for bits in set(known)}
        holders.update(zip(fresh, map(after.__getitem__, known), strict=True))
        if held:
            held.update(fresh)
        else:
            self._held[worker] = fresh
        self._copies += len(fresh)
        self._digests[worker] ^= fold(b"".join(fresh))

    def remove(self, worker: str, hashes: Iterable[bytes]) -> None:
        """These blocks are gone from `worker`. Unknown ones are passed over."""
        held = self._held.get(worker)
        if held is None:
            return
        keep = ~(1 << self._slots[worker])
        gone = []
        for block in hashes:
            if block in held:
                del held[block]
                self._unset(block, keep)
                gone.append(block)
        self._copies -= len(gone)
        self._digests[worker] ^= fold(join_hashes(gone))

    def clear(self, worker: str) -> None:
        """All blocks of `worker` are gone; its slot stays."""
        held = self._held.get(worker)
        if held is None:
            return
        keep = ~(1 << self._slots[worker])
        for block in held:
            self._unset(block, keep)
        self._copies -= len(held)
        self._held[worker] = {}
        self._digests[worker] = 0
        self._incomplete.discard(worker)

    def forget(self, worker: str) -> None:
        """Clear `worker` and give its slot to whoever comes next."""
        if worker in self._slots:
            self.clear(worker)
            del self._held[worker], self._digests[worker]
            heappush(self._free_slots, self._slots.pop(worker))

    def slot(self, worker: str) -> int:
        """The bit number of `worker`; a new one gets the lowest that is free."""
        slot = self._slots.get(worker)
        if slot is None:
            # with no slot free, those in use are 0 ... n - 1
            slot = heappop(self._free_slots) if self._free_slots else len(self._slots)
            self._slots[worker] = slot
            self._held[worker] = {}
            self._digests[worker] = 0
        return slot

    def certain(self, worker: str, hashes: Sequence[bytes]) -> int:
        """Of a chain that `worker` holds or is expected to hold, how many leading blocks end in one it does hold."""
        held = self._held.get(worker, {})
        length = len(hashes)
        while length and hashes[length - 1] not in held:
            length -= 1
        return length

    def digest(self, worker: str) -> int | None:
        """The digest of what `worker` is thought to hold; None when not all of it fitted in here."""
        return None if worker in self._incomplete else self._digests.get(worker, 0)

    def blocks(self, worker: str) -> frozenset[bytes]:
        """What `worker` is thought to hold."""
        return frozenset(self._held.get(worker, ()))

    def count(self, worker: str) -> int:
        """How many blocks `worker` is thought to hold."""
        return len(self._held.get(worker, ()))

    def __len__(self) -> int:
        """Different blocks, whoever holds them."""
        return len(self._holders)

    @property
    def bytes_estimate(self) -> int:
        """Memory, give or take a third: tables double when they are full."""
        return BYTES_PER_BLOCK * len(self._holders) + BYTES_PER_COPY * self._copies

    def _shared(self, bits: int) -> int:
        """One object for equal bit sets: 32 bytes less for most blocks."""
        if len(self._bit_sets) >= MOST_BIT_SETS:
            self._bit_sets.clear()
        return self._bit_sets.setdefault(bits, bits)

    def _unset(self, block: bytes, keep: int) -> None:
        left = self._holders[block] & keep
        if left:
            self._holders[block] = left
        else:
            del self._holders[block]


class ExpectedBlocks:
    """Blocks that a worker will hold soon, because it was just sent a request that computes them.

    A burst of requests with one new prefix then sticks together instead of computing that prefix everywhere. An entry
    lives between half of `ttl_s` and all of it: by then the worker's own events tell the truth. `bits` is what
    `longest_prefix` takes.
    """

    def __init__(self, ttl_s: float = 5.0, max_blocks: int = 200_000) -> None:
        self.bits: dict[bytes, int] = {}
        self._ttl_s = ttl_s
        self._max_blocks = max_blocks
        self._young: dict[bytes, int] = {}  # what of `bits` survives the next turn
        self._turn_at = 0.0

    def expect(self, slot: int, hashes: Iterable[bytes], now: float) -> None:
        """The worker in `slot` is about to compute these."""
        self.expire(now)
        blocks, bit = list(hashes), repeat(1 << slot)
        for bits in (self.bits, self._young):
            # in C: 750 blocks take 100 us
            bits.update(zip(blocks, map(or_, map(bits.get, blocks, repeat(0)), bit), strict=False))
        if len(self.bits) > self._max_blocks:
            self._turn(now)

    def expire(self, now: float) -> None:
        """Let go of what is over."""
        if now >= self._turn_at:
            if now >= self._turn_at + self._ttl_s / 2:
                self._young = {}
            self._turn(now)

    def forget(self, slot: int) -> None:
        """The worker in `slot` is gone."""
        keep = ~(1 << slot)
        self.bits = {block: left for block, bits in self.bits.items() if (left := bits & keep)}
        self._young = {block: left for block, bits in self._young.items() if (left := bits & keep)}

    def _turn(self, now: float) -> None:
        self.bits, self._young = self._young, {}
        if len(self.bits) > self._max_blocks:
            self.bits = {}
        self._turn_at = now + self._ttl_s / 2


def _note(depths: dict[int, int], bits: int, depth: int) -> None:
    """Write `depth` for every slot in `bits`."""
    while bits:
        low = bits & -bits
        depths[low.bit_length() - 1] = depth
        bits ^= low
