"""Why a request found less in the cache than its router had promised.

The worker is the one who knows: it has the clock by which blocks went and requests came. It remembers the last that
went, four times as many as its cache has; what went before that went before the request came.
Pure.
"""

from collections import OrderedDict
from collections.abc import Iterable

from shared.blocks import HASH_BYTES, split_hashes
from shared.messages import Cleared, KvEvent, Removed, Stored
from shared.receipts import Miss
from worker.sequence import Sequence

TURNOVERS = 4  # a request that waits while a whole cache is written over four times has met its deadline
FEWEST_REMEMBERED, MOST_REMEMBERED = 1024, 16_384


def remembered(blocks: int) -> int:
    """How many departed blocks are worth remembering beside a cache of so many."""
    return min(MOST_REMEMBERED, max(FEWEST_REMEMBERED, TURNOVERS * blocks))


class Departed:
    """Blocks that went, and when."""

    def __init__(self, most: int = MOST_REMEMBERED) -> None:
        self._most = most
        self._gone_s: OrderedDict[bytes, float] = OrderedDict()
        self._cleared_s: float | None = None

    def take_in(self, events: Iterable[KvEvent], now: float) -> None:
        """What one step changed in the cache."""
        for event in events:
            match event:
                case Removed(hashes):
                    for block in split_hashes(hashes[-HASH_BYTES * self._most:]):
                        self._gone_s[block] = now
                        self._gone_s.move_to_end(block)
                case Stored():
                    pass  # a block that came back went before that all the same
                case Cleared():
                    self._gone_s.clear()
                    self._cleared_s = now
        while len(self._gone_s) > self._most:
            self._gone_s.popitem(last=False)

    def gone_s(self, block: bytes) -> float | None:
        """When it last went; None: never, or too long ago."""
        return self._gone_s.get(block, self._cleared_s)

    def __len__(self) -> int:
        return len(self._gone_s)


def miss_of(sequence: Sequence, departed: Departed, block_size_tokens: int) -> Miss | None:
    """Why fewer of its tokens were cached than its placement says; None when they were not fewer."""
    placement = sequence.request.placement
    found = sequence.cached_tokens
    if placement is None or sequence.admitted_at is None:
        return None
    # what earlier attempts generated is not counted as cached, though it may be
    if found >= min(placement.cached_tokens, sequence.prompt_length):
        return None
    index = found // block_size_tokens
    told = sequence.request.block_hashes[HASH_BYTES * index:HASH_BYTES * (index + 1)]
    if len(told) == HASH_BYTES and told != sequence.name(index, block_size_tokens):
        return "hash_mismatch"
    if found >= placement.certain_tokens:
        return "expected"
    gone_s = departed.gone_s(told)
    return "evicted" if gone_s is not None and gone_s >= sequence.arrived_at else "event_lag"
