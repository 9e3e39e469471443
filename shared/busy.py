"""What share of a core a process takes, lately. Pure: the caller reads the clocks."""

import math

LATELY_S = 5.0


class Busy:
    """Follows a process's CPU time; several threads may take it above 1."""

    def __init__(self, cpu_s: float, now: float) -> None:
        self._cpu_s, self._now = cpu_s, now
        self._share: float | None = None

    def share(self, cpu_s: float, now: float) -> float:
        """Cores, averaged over about the last `LATELY_S`; `cpu_s`: taken since the process began."""
        passed_s = now - self._now
        if passed_s <= 0.0:
            return self._share or 0.0
        seen = max(0.0, cpu_s - self._cpu_s) / passed_s
        self._cpu_s, self._now = cpu_s, now
        keep = math.exp(-passed_s / LATELY_S)
        self._share = seen if self._share is None else keep * self._share + (1.0 - keep) * seen
        return self._share
