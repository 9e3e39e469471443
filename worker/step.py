"""One step: which sequences, how many rows of each, and what is wanted of them."""

from typing import NamedTuple

from worker.kv_tier import Copy
from worker.sequence import Sequence


class Work:
    """One sequence's part of a step: `rows` positions from `start`, the last `len(drafts)` of them guesses."""

    __slots__ = ("carries", "drafts", "forced", "lease", "more", "pooled", "rows", "samples", "scored", "sequence",
                 "start", "stated")

    def __init__(self, sequence: Sequence, start: int, rows: int, samples: bool) -> None:
        self.sequence = sequence
        self.start = start
        self.rows = rows
        self.samples = samples  # the next token is wanted: of the last committed row and of every draft
        self.scored = range(0)  # rows that say how likely the next prompt token is
        self.pooled = range(0)  # rows that become part of the prompt's vector
        self.drafts: list[int] = []
        self.forced = False  # whether a grammar demands the drafts: nobody guessed them
        self.stated: list[int] = []  # of each of them, what its drafter says of it
        self.more = 0  # tokens that the device decodes by itself behind the one of the row
        self.carries = -1  # foreseen: the row's token is what the step before chooses for its sample of this number
        self.lease = sequence.lease  # of the slot, when it was planned

    @property
    def is_over(self) -> bool:
        """Whether its sequence has left the slot that it had."""
        return self.sequence.slot < 0 or self.sequence.lease != self.lease


class Step(NamedTuple):
    """`copies` come before everything else, in this order. `longest`: the most tokens that a row decodes."""

    works: list[Work]
    copies: tuple[Copy, ...] = ()
    longest: int = 1

    @property
    def rows(self) -> int:
        return sum([work.rows for work in self.works])

    @property
    def sampled(self) -> int:
        """Rows whose next token is wanted."""
        return sum([1 + len(work.drafts) for work in self.works if work.samples])

    @property
    def scores(self) -> bool:
        """Whether rows of prompts meet the head, which no plan has counted on."""
        return any(work.scored for work in self.works)

    @property
    def streams(self) -> int:
        """Sequences whose next token is wanted."""
        return sum(work.samples for work in self.works)

    @property
    def lengths(self) -> list[int]:
        """Of a step of plain rows: how many tokens each decodes."""
        return [1 + work.more for work in self.works]
