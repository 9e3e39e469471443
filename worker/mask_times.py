"""How long steps are held up by finding out what grammars permit.

Rule: the native step finds it out before its layers, so that a step waits for all of it; on a GPU the layers are under
way meanwhile, and what is longer than they are is waited for.
"""

from collections.abc import Callable

from shared.clock import stopwatch
from worker.adjust import Fills


class MaskTimes:
    """Writes the masks of steps, and tells how long that took: of each stream, and of each step."""

    def __init__(self, of_stream: Callable[[float], None], of_step: Callable[[float], None]) -> None:
        """Both are called with seconds, in the thread that computes the step."""
        self._of_stream = of_stream
        self._of_step = of_step

    def fill(self, fills: Fills) -> None:
        """Write all masks of a step."""
        began = last = stopwatch()
        for fill in fills:
            fill()
            now = stopwatch()
            self._of_stream(now - last)
            last = now
        self._of_step(last - began)
