"""The vector of a prompt, out of what the decoder makes of its tokens.

Law: it depends on the prompt alone and not on the chunks that it was computed in: rows are added one after the other in
the order of their positions, in float64. Pure.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray


class Pooling:
    """The rows of one sequence, as they come."""

    def __init__(self, kind: Literal["mean", "last"], length: int) -> None:
        """`length`: tokens of the prompt."""
        self._kind = kind
        self._length = length
        self._taken = 0 if kind == "mean" else length - 1  # rows below this are not wanted any more
        self._total: NDArray[np.float64] | None = None

    @property
    def needs_all(self) -> bool:
        """Whether it wants rows that a cache would save computing."""
        return self._kind == "mean" and self._taken < self._length

    def wanted(self, start: int, rows: int) -> range:
        """Of `rows` rows from position `start`, those that it wants."""
        return range(max(0, self._taken - start), max(0, rows))

    def take(self, values: NDArray[np.float32]) -> None:
        """The next rows [n, hidden]."""
        total = np.zeros(values.shape[1]) if self._total is None else self._total
        for row in values:
            total += row
        self._total = total
        self._taken += len(values)

    def embedding(self) -> bytes:
        """What they come to, of length 1, as little-endian float32; all zero where that has no direction."""
        assert self._total is not None and self._taken == self._length
        length = float(np.sqrt((self._total * self._total).sum()))
        return (self._total / (length or 1.0)).astype("<f4").tobytes()
