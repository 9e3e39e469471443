"""What a step of so many rows costs, as a table: rows come in blocks, so no straight line fits.

    seconds = level * shape(rows)

Rules: the shape is measured at the start and learned slowly; the level is learned from every step, quickly. So a
machine that is slower for a while is slower for all numbers of rows, and does not make those seem dear that happened to
run just then. Between two rows of the table, and past its end, the way is straight. More rows never cost less.
Pure.
"""

from bisect import bisect_left, bisect_right

LEVEL_MEMORY = 0.05
SHAPE_MEMORY = 0.02
# a step that took longer than this many times what was expected is a pause of the machine, not a cost
OUTLIER = 2.0


class RowCost:
    """`measure` at the start, `observe` each step without prompts; `seconds` of any number of rows."""

    def __init__(self) -> None:
        self._level_s = 0.0
        self._rows: list[int] = []
        self._shape: list[float] = []  # relative to the first that was measured; never falls

    @property
    def known(self) -> bool:
        """Whether enough was measured to say anything."""
        return len(self._rows) > 1

    def measure(self, rows: int, seconds: float) -> None:
        """The quickest of several steps of `rows`."""
        if seconds <= 0.0:
            return
        self._level_s = self._level_s or seconds
        place = bisect_left(self._rows, rows)
        if place == len(self._rows) or self._rows[place] != rows:
            self._rows.insert(place, rows)
            self._shape.insert(place, 0.0)
        self._shape[place] = seconds / self._level_s
        self._straighten()

    def observe(self, rows: int, seconds: float) -> None:
        """A step of `rows`, none of them of a prompt."""
        if not self.known or seconds <= 0.0:
            return
        expected = self._shape_of(rows)
        off = min(seconds / (self._level_s * expected), OUTLIER)
        place = bisect_right(self._rows, rows) - 1
        # the first is what the level means
        for end in {max(place, 0), min(place + (rows > self._rows[place]), len(self._rows) - 1)} - {0}:
            self._shape[end] *= 1.0 + SHAPE_MEMORY * (off - 1.0)
        self._straighten()
        self._level_s *= 1.0 + LEVEL_MEMORY * (off - 1.0)

    def seconds(self, rows: int) -> float:
        """What a step of `rows` takes. Only where something is `known`."""
        return self._level_s * self._shape_of(rows)

    def _straighten(self) -> None:
        highest = 0.0
        for place, shape in enumerate(self._shape):
            highest = self._shape[place] = max(highest, shape)

    def _shape_of(self, rows: int) -> float:
        counts, shape = self._rows, self._shape
        right = min(max(bisect_left(counts, rows), 1), len(counts) - 1)
        count, low = counts[right - 1], shape[right - 1]
        return max(low + (shape[right] - low) * (rows - count) / (counts[right] - count), 0.05)
