"""How many streams this gateway works on at once, and how long the next ones should stay away.

Rule: what is over the limit is refused at once, with a Retry-After estimated from how fast streams have been ending.
Pure: the caller passes `now_s`, monotonic seconds.
"""

from collections import deque

from shared.errors import Overloaded

_REMEMBERED_ENDS = 64
_LEAST_RETRY_S = 0.5
_MOST_RETRY_S = 60.0


class Admission:
    """Counts streams in and out. A request of n choices holds n places, all or none."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.active = 0
        self._ends_s: deque[float] = deque(maxlen=_REMEMBERED_ENDS)

    def enter(self, streams: int, now_s: float) -> None:
        """Take `streams` places. Raises Overloaded, and takes none, when there are not so many."""
        over = self.active + streams - self.most
        if over > 0:
            raise Overloaded(f"this gateway serves {self.active} of at most {self.most} streams: retry later",
                             retry_after_s=self.retry_after_s(over, now_s))
        self.active += streams

    def leave(self, streams: int, now_s: float) -> None:
        """Give `streams` places back."""
        self.active -= streams
        self._ends_s.extend([now_s] * min(streams, _REMEMBERED_ENDS))

    def retry_after_s(self, places: int, now_s: float) -> float:
        """Seconds until so many places should be free, at the rate at which the last streams ended."""
        if len(self._ends_s) < 2:
            return 1.0
        rate = len(self._ends_s) / max(now_s - self._ends_s[0], 1e-3)
        return min(max(places / rate, _LEAST_RETRY_S), _MOST_RETRY_S)
