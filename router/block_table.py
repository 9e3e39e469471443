"""Block names and who holds them, in arrays: 25 to 60 bytes a block for up to 64 workers, however many hold it.

Extendible hashing. A name is the first eight bytes of a hash, which are as good as random. Its first bits are an entry
of the directory, that entry is a bucket of `SLOTS` names, and a bucket that is full is split in two by the next bit. So
the table grows by a bucket at a time, never stops to be built anew, and a name that leaves only empties its slot.

    directory   first bits of a name -> bucket; doubled when a bucket has to be split that a single entry leads to
    names       one a slot, 0 where there is none
    bits        one array for every 64 workers: a bit for each worker that holds the name in that slot

Rule: what is done to many names is done to arrays of them, a loop is ten times as slow; only what is done to few is a
loop. Two hashes with the same first eight bytes are taken for one; it would cost a miss, and does not happen.
Pure.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Names = NDArray[np.uint64]
Bits = NDArray[np.uint64]
Indices = NDArray[np.int64]

SLOTS = 16
_SLOT_BITS = 4
WORD = 64
_LEAST_DEPTH = 4
# arrays grow by an eighth when they are full
_SLACK = 8
# up to so many names a loop is quicker than arrays (1 us a name against 60 us)
FEW = 48
# entries of the directory for each bucket, above which a bucket is not split but full, and entries that are no matter;
# random names need 4
_MOST_SPREAD, _FREE_ENTRIES = 64, 1 << 16
_NOWHERE = np.int64(-1)
_ZERO, _ONE, _TOP = np.uint64(0), np.uint64(1), np.uint64(63)


def names_of(hashes: bytes) -> Names:
    """The name of each 16-byte hash in `hashes`."""
    return names_in(np.frombuffer(hashes, np.uint64).reshape(-1, 2))


def names_in(hashes: NDArray[np.uint64]) -> Names:
    """The name of each hash, given as two words; shape (n,)."""
    return np.maximum(hashes[:, 0], _ONE)


class BlockTable:
    """Which of many workers, known by number, hold which names. Takes `max_bytes` at most."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._begin()

    def _begin(self) -> None:
        self.count = 0
        self._depth = _LEAST_DEPTH
        self._buckets = self._capacity = 1 << _LEAST_DEPTH
        self._directory = np.arange(self._buckets, dtype=np.int32)
        self._depths = np.full(self._buckets, self._depth, np.uint8)
        self._prefixes = np.arange(self._buckets, dtype=np.int32)  # the first bits of all names in it
        self._names = np.zeros((self._buckets, SLOTS), np.uint64)
        self._bits: list[Bits] = [np.zeros((self._buckets, SLOTS), np.uint64)]

    @property
    def words(self) -> int:
        """How many times `WORD` workers there are bits for."""
        return len(self._bits)

    @property
    def nbytes(self) -> int:
        """Memory of all arrays."""
        return self._directory.nbytes + self._capacity * self._bucket_bytes

    def holders(self, names: Names, word: int = 0) -> Bits:
        """The bits of workers 64 x `word` and up that hold each name; shape (n,)."""
        held = np.zeros(len(names), np.uint64)
        if word < len(self._bits) and len(names):
            found, slots = self._find(names)
            held[found] = self._bits[word].take(slots)
        return held

    def leading(self, names: Names, word: int = 0) -> list[int]:
        """Name by name, the bits of those who hold all names up to there, as far as anybody does. For few names."""
        if word >= len(self._bits):
            return []
        table, directory, bits = self._names.reshape(-1).data, self._directory.data, self._bits[word].reshape(-1).data
        shift, held, found = WORD - self._depth, -1, []
        for name in names.tolist():
            first = directory[name >> shift] << _SLOT_BITS
            bucket = table[first:first + SLOTS].tolist()
            if name not in bucket or not (held := held & bits[first + bucket.index(name)]):
                break
            found.append(held)
        return found

    def add(self, names: Names, worker: int) -> tuple[Indices, int]:
        """`worker` holds these names. Which of them (indices) are new at it, and how many had no room."""
        while len(self._bits) <= worker // WORD:
            self._bits.append(np.zeros_like(self._names))
        return self._add_few(names, worker) if len(names) <= FEW else self._add_many(names, worker)

    def _add_few(self, names: Names, worker: int) -> tuple[Indices, int]:
        table, directory = self._names.reshape(-1).data, self._directory.data
        bits, bit = self._bits[worker // WORD].reshape(-1).data, 1 << worker % WORD
        fresh: list[int] = []
        full: list[int] = []
        for number, name in enumerate(names.tolist()):
            while True:
                here = directory[name >> WORD - self._depth]
                first = here << _SLOT_BITS
                bucket = table[first:first + SLOTS].tolist()
                if name in bucket or 0 in bucket or not self._split_one(here):
                    break
            if name in bucket:
                slot = first + bucket.index(name)
            elif 0 in bucket:
                slot = first + bucket.index(0)
                table[slot] = name
                self.count += 1
            else:
                full.append(number)
                continue
            if not bits[slot] & bit:
                bits[slot] |= bit
                fresh.append(number)
        refused = 0
        if full:
            del table, directory, bits  # arrays that somebody looks at cannot grow
            others, refused = self._add_many(names[full], worker)
            fresh += [full[number] for number in others.tolist()]
        return np.array(fresh, np.int64), refused

    def _add_many(self, names: Names, worker: int) -> tuple[Indices, int]:
        found, slots = self._find(names)
        if len(found) < len(names):
            missing = np.ones(len(names), np.bool_)
            missing[found] = False
            every = np.empty(len(names), np.int64)
            inserted = self._insert(names[missing])
            # a bucket that was split for them has its names elsewhere now
            every[found], every[missing] = self._find(names[found])[1], inserted
            found = np.flatnonzero(every >= 0)
            slots = every[found]
        bits, bit = self._of(worker)
        before = bits.take(slots)
        fresh = np.flatnonzero(before & bit == 0)
        fresh = fresh[_once(bits, slots[fresh], before[fresh])]
        bits[slots[fresh]] = before[fresh] | bit
        return found[fresh], len(names) - len(found)

    def remove(self, names: Names, worker: int) -> Indices:
        """`worker` holds these names no more. Which of them (indices) it held."""
        if worker // WORD >= len(self._bits) or not len(names):
            return np.empty(0, np.int64)
        found, slots = self._find(names)
        bits, bit = self._of(worker)
        before = bits.take(slots)
        held = np.flatnonzero(before & bit)
        held = held[_once(bits, slots[held], before[held])]
        bits[slots[held]] = before[held] ^ bit
        self._sweep(slots[held])
        return found[held]

    def drop(self, worker: int) -> None:
        """`worker` holds nothing any more."""
        if worker // WORD < len(self._bits):
            bits, bit = self._of(worker)
            slots = np.flatnonzero(bits & bit)
            bits[slots] ^= bit
            self._sweep(slots)

    def names(self, worker: int) -> Names:
        """All that `worker` holds, in no order."""
        if worker // WORD >= len(self._bits):
            return np.empty(0, np.uint64)
        bits, bit = self._of(worker)
        return self._names.take(np.flatnonzero(bits & bit))

    def _of(self, worker: int) -> tuple[Bits, np.uint64]:
        """The bits that are this worker's, one a slot, and which of each."""
        return self._bits[worker // WORD].reshape(-1), _ONE << np.uint64(worker % WORD)

    def _find(self, names: Names) -> tuple[Indices, Indices]:
        """Which of `names` (indices) have a slot, and which slots."""
        # take: indexing with an array copies rows one by one, four times as slow
        buckets = self._directory.take(self._entries(names))
        flat = np.flatnonzero(self._names.take(buckets, axis=0) == names[:, None])
        found = flat >> _SLOT_BITS
        return found, (buckets.take(found).astype(np.int64) << _SLOT_BITS) | (flat & SLOTS - 1)

    def _entries(self, names: Names) -> Indices:
        return (names >> np.uint64(WORD - self._depth)).view(np.int64)

    def _insert(self, names: Names) -> Indices:
        """A slot for each of these, which have none; -1 where there is no room."""
        order = np.argsort(names)
        ordered = names[order]
        first = _starts(ordered)
        distinct = ordered[first]
        while len(distinct) > max(self.count, SLOTS * self._buckets // 2):
            if not self._split(np.arange(self._buckets)):
                break
        pending = distinct
        refused = False
        while len(pending):
            # names in order have their buckets in groups: each takes as many as are free there
            buckets = self._directory.take(self._entries(pending))
            begins = np.flatnonzero(_starts(buckets))
            sizes = np.diff(begins, append=len(pending))
            rank = np.arange(len(pending)) - np.repeat(begins, sizes)
            free = self._names.take(buckets[begins], axis=0) == 0
            frees = np.count_nonzero(free, axis=1)
            fits = rank < np.repeat(frees, sizes)
            nth = (np.repeat(np.cumsum(frees) - frees, sizes) + rank)[fits]
            at = (buckets[fits].astype(np.int64) << _SLOT_BITS) | (np.flatnonzero(free)[nth] & SLOTS - 1)
            self._names.reshape(-1)[at] = pending[fits]
            self.count += len(at)
            full, pending = buckets[~fits], pending[~fits]
            if len(full) and not self._split(full[_starts(full)]):
                refused = True
                break
        if refused:
            slots = np.full(len(distinct), _NOWHERE)
            found, at = self._find(distinct)
            slots[found] = at
        else:
            slots = self._find(distinct)[1]
        result = np.empty(len(names), np.int64)
        result[order] = slots[np.cumsum(first) - 1]
        return result

    def _split(self, buckets: NDArray[Any]) -> bool:
        """Part each of these in two by the next bit of its names. False when memory does not allow it."""
        depths = self._depths[buckets].astype(np.int64)
        deeper = int(depths.max()) == self._depth
        if deeper and 2 * len(self._directory) > max(_FREE_ENTRIES, _MOST_SPREAD * self._buckets):
            return False
        if not self._make_room(len(buckets), self._directory.nbytes if deeper else 0):
            return False
        if deeper:
            self._directory = np.repeat(self._directory, 2)
            self._depth += 1
        new = np.arange(self._buckets, self._buckets + len(buckets), dtype=np.int32)
        self._buckets += len(buckets)
        rows = self._names.take(buckets, axis=0)
        moves = rows >> (_TOP - depths.astype(np.uint64))[:, None] & _ONE == 1
        for array in (self._names, *self._bits):
            rows = array.take(buckets, axis=0)
            array[new] = np.where(moves, rows, _ZERO)
            array[buckets] = np.where(moves, _ZERO, rows)
        # the upper half of the entries that led to the old bucket leads to the new one
        prefixes = self._prefixes[buckets].astype(np.int64)
        halves = np.left_shift(1, self._depth - depths - 1)
        ends = np.cumsum(halves)
        entries = np.repeat((2 * prefixes + 1) * halves - (ends - halves), halves) + np.arange(ends[-1])
        self._directory[entries] = np.repeat(new, halves)
        self._depths[buckets] = self._depths[new] = depths + 1
        self._prefixes[buckets], self._prefixes[new] = 2 * prefixes, 2 * prefixes + 1
        return True

    def _split_one(self, bucket: int) -> bool:
        """`_split` of one where no array has to grow for it, in a tenth of the time. False, and nothing, elsewhere."""
        depth, new = int(self._depths[bucket]), self._buckets
        if depth == self._depth or new == self._capacity:
            return False
        self._buckets += 1
        moves = self._names[bucket] >> np.uint64(WORD - 1 - depth) & _ONE == 1
        for array in (self._names, *self._bits):
            row = array[bucket]
            array[new] = np.where(moves, row, _ZERO)
            row[moves] = _ZERO
        prefix, half = int(self._prefixes[bucket]), 1 << self._depth - depth - 1
        self._directory[(2 * prefix + 1) * half:(2 * prefix + 2) * half] = new
        self._depths[bucket] = self._depths[new] = depth + 1
        self._prefixes[bucket], self._prefixes[new] = 2 * prefix, 2 * prefix + 1
        return True

    @property
    def _bucket_bytes(self) -> int:
        return self._depths.itemsize + self._prefixes.itemsize + 8 * SLOTS * (1 + len(self._bits))

    def _make_room(self, buckets: int, other_bytes: int) -> bool:
        """Room for so many more buckets beside `other_bytes`; False when it is more than the most."""
        needed = self._buckets + buckets
        most = (self.max_bytes - self._directory.nbytes - other_bytes) // self._bucket_bytes
        if needed > most:
            return False
        if needed > self._capacity:
            self._capacity = min(most, max(needed, self._capacity + self._capacity // _SLACK))
            arrays: list[NDArray[Any]] = [self._depths, self._prefixes, self._names, *self._bits]
            for array in arrays:
                # in place where the system can
                array.resize((self._capacity, *array.shape[1:]), refcheck=False)
        return True

    def _sweep(self, slots: Indices) -> None:
        """Empty those of these slots whose name nobody holds any more."""
        left = self._bits[0].take(slots)
        for bits in self._bits[1:]:
            left |= bits.take(slots)
        empty = slots[left == 0]
        self._names.reshape(-1)[empty] = _ZERO
        self.count -= len(empty)
        if not self.count:
            self._begin()


def _starts(ordered: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a value begins that was not the one before."""
    begins = np.ones(len(ordered), np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=begins[1:])
    return begins


def _once(bits: Bits, slots: Indices, before: Bits) -> NDArray[np.bool_]:
    """Of each slot that is named several times, one. What `bits` have `before` is left there."""
    number = np.arange(len(slots), dtype=np.uint64)
    bits[slots] = number  # of equal ones the last is left
    once: NDArray[np.bool_] = bits[slots] == number
    bits[slots] = before
    return once
