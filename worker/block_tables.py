"""Which blocks hold a sequence: what it can reuse, what it still wants, and the names of those that became full.

Rule: a block is named when all its tokens are committed and computed. At least one token of a prompt is always
computed.
Pure.
"""

from worker.kv_blocks import BlockPool
from worker.sequence import Sequence


class BlockTables:
    """The tables of all sequences over one pool. Whom blocks are taken from is the scheduler's affair."""

    def __init__(self, pool: BlockPool, block_size_tokens: int) -> None:
        self._pool = pool
        self._size = block_size_tokens

    def blocks_for(self, length: int) -> int:
        return -(-length // self._size)

    def wanted(self, sequence: Sequence, length: int) -> int:
        """Blocks that are missing for `length` tokens; none or less when all are there."""
        return self.blocks_for(length) - len(sequence.blocks)

    def reuse(self, sequence: Sequence, restore: bool = True) -> None:
        """Continue a block table with named blocks as far as they go; `restore`: also with those in the tier.

        Not while rows of the prompt are still wanted for what they say of it.
        """
        if sequence.wants_rows:
            return
        size = self._size
        most = (len(sequence.tokens) - 1) // size
        while (index := len(sequence.blocks)) < most and sequence.computed == index * size:
            name, content = sequence.name(index, size), sequence.content(index, size)
            if (block := self._pool.find(name, content)) is not None:
                self._pool.hold(block)
            elif not restore or (block := self._pool.restore(name, content)) is None:
                return
            sequence.blocks.append(block)
            sequence.stored = index + 1
            sequence.computed += size

    def reusable(self, sequence: Sequence) -> int:
        """How many tokens `reuse` would find now, room provided."""
        size = self._size
        most = 0 if sequence.wants_rows else (len(sequence.tokens) - 1) // size
        index = 0
        while index < most and self._pool.knows(sequence.name(index, size), sequence.content(index, size)):
            index += 1
        return index * size

    def room_for_drafts(self, sequence: Sequence, drafts: int) -> int:
        """How many of `drafts` rows have a block. Drafts take only blocks that nobody holds."""
        length = len(sequence.tokens) + drafts
        wanted = self.wanted(sequence, length)
        if drafts and wanted > 0:
            if (blocks := self._pool.allocate(min(wanted, self._pool.available))) is not None:
                sequence.blocks += blocks
            length = min(length, len(sequence.blocks) * self._size)
        return length - len(sequence.tokens)

    def store(self, sequence: Sequence) -> None:
        """Name the blocks that became full."""
        size = self._size
        while (sequence.stored + 1) * size <= sequence.computed:
            index = sequence.stored
            self._pool.store(sequence.blocks[index], sequence.name(index, size), sequence.content(index, size))
            sequence.stored = index + 1

    def give_up(self, sequence: Sequence) -> None:
        """Free all its blocks; their names stay."""
        self._pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = sequence.stored = 0
