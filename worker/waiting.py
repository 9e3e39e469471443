"""Who is admitted next: preempted sequences, then priority, then a fair share between tenants, then arrival.

Rule: a share is counted in prompt tokens that had to be computed. The tenant that was given the fewest for its weight
goes first, and one that comes back after a pause starts level with the rest instead of with a credit (start-time fair
queueing).
Pure.
"""

from collections import deque
from collections.abc import Iterator

from shared.tiers import tenants_weight
from worker.sequence import Sequence

REMEMBERED_TENANTS = 4096


class WaitingQueue:
    """A bounded queue; the bound is the caller's to check, because a refusal is an answer."""

    def __init__(self) -> None:
        self._returning: list[Sequence] = []  # preempted, best rank first
        self._tenants: dict[int, dict[str, deque[Sequence]]] = {}  # priority -> tenant -> arrivals
        self._share: dict[str, float] = {}
        self._level = 0.0
        self._length = 0

    def __len__(self) -> int:
        return self._length + len(self._returning)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._returning
        for tenants in self._tenants.values():
            for arrivals in tenants.values():
                yield from arrivals

    def push(self, sequence: Sequence) -> None:
        tenant = sequence.request.tenant
        if all(tenant not in tenants for tenants in self._tenants.values()):
            self._share[tenant] = max(self._share.get(tenant, 0.0), self._level)
        self._tenants.setdefault(sequence.request.priority, {}).setdefault(tenant, deque()).append(sequence)
        self._length += 1

    def push_back(self, sequence: Sequence) -> None:
        """Return a preempted sequence: it stands before all others of its priority."""
        self._returning.append(sequence)
        self._returning.sort(key=lambda other: other.rank)

    def peek(self) -> Sequence | None:
        """The next in turn, still in the queue."""
        priority = max(self._tenants, default=None)
        if self._returning and (priority is None or self._returning[0].request.priority >= priority):
            return self._returning[0]
        if priority is None:
            return None
        tenants = self._tenants[priority]
        tenant = min(tenants, key=lambda name: (self._share[name], tenants[name][0].order))
        return tenants[tenant][0]

    def admit(self, sequence: Sequence, computed_tokens: int) -> None:
        """Take `sequence` out and charge its tenant."""
        returning = sequence in self._returning
        self.remove(sequence)
        if returning:
            return
        tenant = sequence.request.tenant
        self._level = max(self._level, self._share[tenant])
        self._share[tenant] += computed_tokens / tenants_weight(sequence.request.weight)
        if len(self._share) > REMEMBERED_TENANTS:
            self._forget_idle()

    def remove(self, sequence: Sequence) -> None:
        """Take `sequence` out without a charge."""
        if sequence in self._returning:
            self._returning.remove(sequence)
            return
        priority, tenant = sequence.request.priority, sequence.request.tenant
        tenants = self._tenants[priority]
        tenants[tenant].remove(sequence)
        self._length -= 1
        if not tenants[tenant]:
            del tenants[tenant]
        if not tenants:
            del self._tenants[priority]

    def _forget_idle(self) -> None:
        present = {tenant for tenants in self._tenants.values() for tenant in tenants}
        self._share = {tenant: share for tenant, share in self._share.items()
                       if tenant in present or share > self._level}
