"""Ranks as threads of one process, for tests of what ranks compute."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

from kernels.ranks import RankLost

WITHIN_S = 60.0
Result = TypeVar("Result")


class Meeting:
    """Where the threads exchange what they have."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.parts: list[Tensor | None] = [None] * size
        self.exchanges = 0


class ThreadRank:
    """As `kernels.ranks.Ranks`. The one whose exchange has the number `dies_at` goes away instead."""

    def __init__(self, meeting: Meeting, rank: int, size: int, dies_at: int | None = None) -> None:
        self.rank, self.size = rank, size
        self._meeting = meeting
        self._dies_at = dies_at
        self._done = 0

    def exchange(self, own: Tensor, everyone: Tensor) -> None:
        meeting = self._meeting
        if self._done == self._dies_at:
            meeting.barrier.abort()
        self._done += 1
        try:
            meeting.parts[self.rank] = own.clone()
            meeting.barrier.wait(WITHIN_S)
            for rank, part in enumerate(meeting.parts):
                assert part is not None
                everyone[rank] = part
            meeting.barrier.wait(WITHIN_S)
        except threading.BrokenBarrierError:
            raise RankLost("a thread has gone") from None


def together(size: int, work: Callable[[ThreadRank], Result], dies_at: int | None = None) -> list[Result]:
    """What each of `size` threads makes of its rank. `dies_at`: of the last one, as `ThreadRank`."""
    meeting = Meeting(size)
    ranks = [ThreadRank(meeting, rank, size, dies_at if rank == size - 1 else None) for rank in range(size)]
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(work, ranks))
