"""How often each worker's cache was written over lately, while those of its fleet were written over once.

Rule: 0 for a cache with room, 1 for one of many that share the work evenly, 3 for one that takes three times its share.
Both are counted in what was placed, not in time: a quiet night changes nothing. What was written fades as the fleet
writes on (to 1/e when all its caches were filled once), so that it stands for what lies in the cache now.
Pure.
"""

import math
from typing import NamedTuple


class _Written(NamedTuple):
    times: float  # how often over
    fleet: str
    at: float  # how often the fleet was written over by then


class Turnover:
    """Of all workers. A fleet is the workers of one model."""

    def __init__(self) -> None:
        self._fleets: dict[str, float] = {}  # how often written over, since we know it
        self._workers: dict[str, _Written] = {}

    def write(self, worker: str, fleet: str, blocks: float, blocks_of_worker: int, blocks_of_fleet: int) -> None:
        """So many new blocks are about to be written at `worker`."""
        if not 0 < blocks_of_worker <= blocks_of_fleet:
            return
        self._fleets[fleet] = self._fleets.get(fleet, 0.0) + blocks / blocks_of_fleet
        times = self.of(worker, fleet) + blocks / blocks_of_worker
        self._workers[worker] = _Written(times, fleet, self._fleets[fleet])

    def of(self, worker: str, fleet: str) -> float:
        """How often over, lately; 0 for a worker unheard of."""
        written = self._workers.get(worker)
        if written is None or written.fleet != fleet:
            return 0.0
        return written.times * math.exp(written.at - self._fleets[fleet])

    def forget(self, worker: str) -> None:
        """Its cache is gone."""
        written = self._workers.pop(worker, None)
        if written is not None and all(other.fleet != written.fleet for other in self._workers.values()):
            self._fleets.pop(written.fleet, None)
