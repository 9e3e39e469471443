"""How much streams say: tokens said over streams that ended, both of late.

Rule: tokens of streams that go on count too. So a few long ones that hold most slots are not forgotten beside many
short ones, and over slots and time of a step this is how soon the next slot is free.
Pure.
"""

# ends after which what was before counts for a third
MEMORY = 64


class StreamLength:
    """`say` and `end` as it happens; read `tokens`."""

    def __init__(self) -> None:
        self._said = 0.0  # up to the last end
        self._since = 0
        self._ends = 0.0

    @property
    def tokens(self) -> float:
        """For each stream that ended; 0 while none has."""
        return (self._said + self._since) / self._ends if self._ends else 0.0

    def say(self, tokens: int) -> None:
        self._since += tokens

    def end(self) -> None:
        keep = 1.0 - 1.0 / MEMORY
        self._said = keep * self._said + self._since
        self._ends = keep * self._ends + 1.0
        self._since = 0
