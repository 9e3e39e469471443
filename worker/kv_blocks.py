"""The KV cache as numbered blocks: who holds which, which can be reused, which goes next.

    FREE    nobody holds it and it says nothing        next to be handed out
    CACHED  nobody holds it, its contents have a name  handed out when no FREE block is left (`worker.eviction`)
    HELD    one sequence or more read or write it      never handed out; it may have a name as well

Rules: free + cached + held = all blocks; a name belongs to one block, and is given only when every token of the block
is computed; a hit is believed only when the parent's name and the tokens agree too, so that no collision of hashes can
mix two prompts. With a tier behind the pool (`kv_tier.py`) an evicted block keeps its name there, and routers hear that
it is gone only when it leaves both. Everything is O(1) per block: the list of blocks nobody holds runs through two
arrays.
Pure.
"""

from array import array
from collections.abc import Iterable, Sequence
from enum import IntEnum
from operator import ne
from typing import NamedTuple

from shared.blocks import join_hashes
from shared.messages import Cleared, KvEvent, Removed, Stored
from worker.eviction import MOST_USES, NAMELESS, Unheld
from worker.kv_tier import Copy, HostTier, Load, Save


class Ownership(IntEnum):
    FREE = 0
    CACHED = 1
    HELD = 2


class Audit(NamedTuple):
    """What an audit found and has mended."""

    wrong_counts: int  # blocks whose number of holders was not what the block tables say
    wrong_list: int  # blocks that were in the list of unheld blocks and should not be, or the other way round
    wrong_names: int  # names that led to another block
    wrong_slots: int = 0  # slots of the tier whose owner was wrong, and names both here and there

    @property
    def repairs(self) -> int:
        return sum(self)


class BlockPool:
    """All blocks of one decoder. Not one tensor: only numbers and names."""

    def __init__(self, blocks: int, tier: HostTier | None = None) -> None:
        if blocks < 1:
            raise ValueError(f"a block pool needs at least one block, got {blocks}: give the worker more KV memory")
        self.blocks = blocks
        self.tier = tier
        self._holders = array("i", [0]) * blocks
        self._names: list[bytes] = [b""] * blocks
        self._contents: list[bytes] = [b""] * blocks
        self._by_name: dict[bytes, int] = {}
        self._copies: list[Copy] = []
        self._events: list[tuple[type[Stored] | type[Removed] | type[Cleared], bytes]] = []
        self._uses = array("B", [0]) * blocks  # how often each was used under its name, and not counted further
        self._unheld = Unheld(blocks)
        for block in range(blocks):
            self._unheld.put(block, NAMELESS)

    @property
    def available(self) -> int:
        """How many are FREE or CACHED."""
        return len(self._unheld)

    def ownership(self, block: int) -> Ownership:
        if self._holders[block]:
            return Ownership.HELD
        return Ownership.CACHED if self._names[block] else Ownership.FREE

    @property
    def named(self) -> int:
        """How many blocks can be reused as they are; those in the tier are not counted."""
        return len(self._by_name)

    def names(self) -> list[bytes]:
        """The hashes of all blocks that can be reused, held ones and those in the tier too."""
        return list(self._by_name) + (self.tier.names() if self.tier else [])

    def find(self, name: bytes, content: bytes) -> int | None:
        """The block of this name if it also has this content (parent's name and packed tokens)."""
        block = self._by_name.get(name)
        if block is None or self._contents[block] != content:
            return None
        return block

    def knows(self, name: bytes, content: bytes) -> bool:
        """Whether a block of this name and content can be reused, here or from the tier."""
        return self.find(name, content) is not None or (self.tier is not None and self.tier.holds(name, content))

    def restore(self, name: bytes, content: bytes) -> int | None:
        """A block with one holder that `take_copies` will fill from the tier; None when it is not there, or no room."""
        tier = self.tier
        if tier is None or not self.available or (slot := tier.lend(name, content)) is None:
            return None
        blocks = self.allocate(1)
        assert blocks is not None
        self._copies.append(Load(slot, blocks[0]))
        tier.free(slot)
        self._names[blocks[0]], self._contents[blocks[0]] = name, content
        self._by_name[name] = blocks[0]
        self._uses[blocks[0]] = 2
        return blocks[0]

    def take_copies(self) -> tuple[Copy, ...]:
        """What must be copied, in this order, before the next step runs."""
        copies, self._copies = tuple(self._copies), []
        return copies

    def is_held(self, block: int) -> bool:
        return self._holders[block] > 0

    def hold(self, block: int) -> None:
        """One more holder and one more use, so that the block stays what it is."""
        if not self._holders[block]:
            self._unheld.remove(block)
        self._holders[block] += 1
        self._uses[block] = min(self._uses[block] + 1, MOST_USES)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one holder each and no name, or None when there are not so many. All or nothing."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            block = self._unheld.pop()
            self._holders[block] = 1
            if self._names[block]:
                self._forget(block)
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each block of a sequence. The tail goes before the head: prefixes live longest."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._unheld.put(block, self._uses[block] if self._names[block] else NAMELESS)

    def store(self, block: int, name: bytes, content: bytes) -> bool:
        """Name a held block whose tokens are all computed. False when the name is taken or the block has one."""
        if name in self._by_name or self._names[block]:
            return False
        if self.tier is not None and self.tier.is_known(name):
            if not self.tier.holds(name, content):
                return False
            # computed once more: routers know it already
            self.tier.forget(name)
        else:
            self._events.append((Stored, name))
        self._names[block] = name
        self._contents[block] = content
        self._by_name[name] = block
        self._uses[block] = 1
        return True

    def clear(self) -> None:
        """Forget all names, those in the tier too. Held blocks stay held."""
        if self.tier is not None:
            self.tier.clear()
        for block in self._by_name.values():
            self._names[block] = self._contents[block] = b""
            if not self._holders[block]:
                self._unheld.remove(block)
                self._unheld.put(block, NAMELESS)
        self._by_name.clear()
        self._events = [(Cleared, b"")]

    def take_events(self) -> tuple[KvEvent, ...]:
        """What changed since the last call, in order, neighbours of a kind put together."""
        if not self._events:
            return ()
        merged: list[KvEvent] = []
        kind = self._events[0][0]
        run: list[bytes] = []
        for next_kind, name in [*self._events, (None, b"")]:
            if next_kind is not kind:
                merged.append(Cleared() if kind is Cleared else kind(join_hashes(run)))
                kind, run = next_kind or kind, []
            run.append(name)
        self._events.clear()
        return tuple(merged)

    def audit(self, tables: Iterable[Sequence[int]]) -> Audit:
        """Compare with the block tables of all sequences that hold blocks, and mend what differs."""
        true_holders = array("i", [0]) * self.blocks
        for table in tables:
            for block in table:
                true_holders[block] += 1
        wrong_counts = 0 if self._holders == true_holders else sum(map(ne, self._holders, true_holders))
        wrong_names = self._audit_names()
        listed = list(self._unheld)
        unheld = [block for block, holders in enumerate(true_holders) if not holders]
        distinct = set(listed)
        wrong_list = len(distinct.symmetric_difference(unheld)) + len(listed) - len(distinct)
        if wrong_counts or wrong_list or self.available != len(unheld):
            self._holders = true_holders
            order = dict.fromkeys(block for block in listed if not true_holders[block])
            self._unheld.rebuild((block, self._uses[block] if self._names[block] else NAMELESS) for block in
                                 [*order, *(block for block in unheld if block not in order)])
        return Audit(wrong_counts, wrong_list, wrong_names, self._audit_tier())

    def _audit_names(self) -> int:
        wrong = [name for name, block in self._by_name.items() if self._names[block] != name]
        for name in wrong:
            del self._by_name[name]
            self._events.append((Removed, name))
        if self.blocks - self._names.count(b"") == len(self._by_name):
            return len(wrong)
        for block, name in enumerate(self._names):
            if name and self._by_name.get(name) != block:
                self._names[block] = self._contents[block] = b""
                wrong.append(name)
        return len(wrong)

    def _audit_tier(self) -> int:
        if self.tier is None:
            return 0
        wrong, gone = self.tier.audit(self._by_name)
        self._events += [(Removed, name) for name in gone]
        return wrong

    def _forget(self, block: int) -> None:
        """A block that is handed out loses its name; the tier keeps it if there is one."""
        name, content = self._names[block], self._contents[block]
        del self._by_name[name]
        self._names[block] = self._contents[block] = b""
        gone = name
        if self.tier is not None:
            slot, gone = self.tier.keep(name, content)
            if slot is not None:
                self._copies.append(Save(block, slot))
        if gone:
            self._events.append((Removed, gone))
