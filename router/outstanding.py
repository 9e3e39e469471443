"""What was sent to a worker since it last spoke.

Rule: a placement counts until a status of its worker arrives that must have seen it, and never longer than `expiry_s`.
For `settle_s` after a placement a status may not know of it yet (both are under way): counting it twice for that long
spreads a burst, forgetting it would pile the burst up. Placements of other routers count like our own.
Pure.
"""

from collections import deque
from typing import NamedTuple

# a request's way to a worker and its status's way back, with room for a step in between
SETTLE_S = 0.05
EXPIRY_S = 2.0


class Sent(NamedTuple):
    """Totals of one worker."""

    requests: int = 0
    tokens: int = 0  # of their prompts, to be computed
    output_tokens: int = 0  # that they are expected to say


class _Placed(NamedTuple):
    request_id: str
    attempt: int
    tokens: int
    output_tokens: int
    at: float


NOTHING = Sent()


class Outstanding:
    """Placements that no status accounts for."""

    def __init__(self, settle_s: float = SETTLE_S, expiry_s: float = EXPIRY_S) -> None:
        self._settle_s = settle_s
        self._expiry_s = expiry_s
        self._placed: dict[str, deque[_Placed]] = {}  # per worker, oldest first
        self._totals: dict[str, Sent] = {}

    def add(self, worker: str, request_id: str, attempt: int, tokens: int, output_tokens: int, now: float) -> None:
        """A request with `tokens` to compute, expected to say `output_tokens`, was sent to `worker`."""
        placed = _Placed(request_id, attempt, tokens, output_tokens, now)
        self._placed.setdefault(worker, deque()).append(placed)
        self._count(worker, placed, 1)

    def settle(self, worker: str, now: float) -> None:
        """A status of `worker` arrived: it accounts for what had time to arrive."""
        self._drop_older(worker, now - self._settle_s)

    def undo(self, worker: str, request_id: str, attempt: int) -> None:
        """The request did not arrive there."""
        for placed in self._placed.get(worker, ()):
            if (placed.request_id, placed.attempt) == (request_id, attempt):
                self._placed[worker].remove(placed)
                self._count(worker, placed, -1)
                return

    def forget(self, worker: str) -> None:
        """The worker is gone."""
        self._placed.pop(worker, None)
        self._totals.pop(worker, None)

    def sent(self, worker: str, now: float) -> Sent:
        """What counts for `worker` now."""
        placed = self._placed.get(worker)
        if not placed:
            return NOTHING
        if placed[0].at <= now - self._expiry_s:
            self._drop_older(worker, now - self._expiry_s)
        return self._totals[worker]

    def _drop_older(self, worker: str, until: float) -> None:
        placed = self._placed.get(worker)
        while placed and placed[0].at <= until:
            self._count(worker, placed.popleft(), -1)

    def _count(self, worker: str, placed: _Placed, times: int) -> None:
        total = self._totals.get(worker, NOTHING)
        self._totals[worker] = Sent(total.requests + times, total.tokens + times * placed.tokens,
                                    total.output_tokens + times * placed.output_tokens)
