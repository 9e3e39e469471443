"""Blocks that the pool has evicted, kept in host memory: which, where, and the copies that take them there and back.

    pool full, a named block is handed out    Save(block, slot)    its name lives on in the tier
    a prompt asks for a name the pool lost    Load(slot, block)    its name lives in the pool again

Rules: a name is in the pool or in the tier, never in both; the tier never has more than its slots, the one that came
first goes first; a hit is believed only when parent and tokens agree, as in the pool. Copies are decided between steps
and done in the order in which they were decided, before the next step: each then finds in its source what the one who
decided meant, whatever block or slot was used twice.

Copying a block back takes a hundredth of the time of computing it, so nobody plans for it: a block in the tier counts
as cached, for the scheduler and for routers, who hear of it only when it leaves the tier for good.

`HostTier` is pure. `TierMemory` holds the bytes and belongs to the device's thread.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from kernels.step import BlockStore


class Save(NamedTuple):
    """Copy a block of the pool into a slot of the tier."""

    block: int
    slot: int


class Load(NamedTuple):
    """Copy a slot of the tier into a block of the pool."""

    slot: int
    block: int


Copy = Save | Load


class _Kept(NamedTuple):
    slot: int
    content: bytes


class HostTier:
    """The books of `slots` slots. A slot is free, has a name, or is lent until its last copy is decided."""

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise ValueError(f"a tier needs at least one slot, got {slots}: give it more memory or none")
        self.slots = slots
        self.saved = 0
        self.loaded = 0
        self.dropped = 0
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()  # oldest first
        self._free = list(range(slots))[::-1]

    def __len__(self) -> int:
        return len(self._kept)

    def names(self) -> list[bytes]:
        """The hashes of all blocks in the tier."""
        return list(self._kept)

    def holds(self, name: bytes, content: bytes) -> bool:
        """Whether a block of this name and content is here."""
        kept = self._kept.get(name)
        return kept is not None and kept.content == content

    def is_known(self, name: bytes) -> bool:
        """Whether a block of this name is here, whatever its content."""
        return name in self._kept

    def keep(self, name: bytes, content: bytes) -> tuple[int | None, bytes]:
        """A slot for a block whose name is not here yet, and the name that had to go for it, or b"".

        No slot when all are lent; then it is the block itself that is lost.
        """
        gone = b""
        if not self._free:
            if not self._kept:
                self.dropped += 1
                return None, name
            gone, oldest = self._kept.popitem(last=False)
            self._free.append(oldest.slot)
            self.dropped += 1
        slot = self._free.pop()
        self._kept[name] = _Kept(slot, content)
        self.saved += 1
        return slot, gone

    def lend(self, name: bytes, content: bytes) -> int | None:
        """The slot of a block that goes back to the pool, None when it is not here. Give it back with `free`."""
        if not self.holds(name, content):
            return None
        self.loaded += 1
        return self._kept.pop(name).slot

    def free(self, slot: int) -> None:
        """A lent slot may be used again."""
        self._free.append(slot)

    def forget(self, name: bytes) -> None:
        """Drop a block of this name, if there is one."""
        kept = self._kept.pop(name, None)
        if kept is not None:
            self._free.append(kept.slot)

    def clear(self) -> None:
        """Drop everything."""
        self._kept.clear()
        self._free = list(range(self.slots))[::-1]

    def audit(self, in_pool: Iterable[bytes]) -> tuple[int, list[bytes]]:
        """Mend the books: how many slots were not where they should be, and the names dropped for it.

        `in_pool`: the names that the pool has. Nothing may be lent.
        """
        wrong = 0
        for name in in_pool:
            if name in self._kept:
                self.forget(name)
                wrong += 1
        gone: list[bytes] = []
        taken: set[int] = set()
        for name, kept in list(self._kept.items()):
            if kept.slot in taken or not 0 <= kept.slot < self.slots:
                del self._kept[name]
                gone.append(name)
            taken.add(kept.slot)
        free = [slot for slot in range(self.slots) if slot not in taken]
        if sorted(self._free) != free:
            wrong += max(1, len(set(self._free) ^ set(free)))
            self._free = free[::-1]
        return wrong + len(gone), gone


class TierMemory:
    """The bytes of the tier. Memory is taken as slots are first used."""

    def __init__(self, store: BlockStore, slots: int) -> None:
        self.slots = slots
        self.bytes = slots * store.block_bytes
        self._store = store
        self._slots = np.empty((slots, store.block_bytes), np.uint8)

    def run(self, copies: Iterable[Copy]) -> None:
        """Do the copies, in order. Blocking; not during a step."""
        for copy in copies:
            match copy:
                case Save(block, slot):
                    self._store.read_block(block, self._slots[slot])
                case Load(slot, block):
                    self._store.write_block(block, self._slots[slot])
