"""A step of the scheduler as the arrays of a decoder.

Rule: what belongs to a sequence lies in the row of its slot for as long as it runs (block table, sampling); a step is
an index into those rows. The arrays handed out are copies, so nothing in flight changes; nobody writes to them, so what
did not change since the last step (most of them, while the same streams decode) is handed out again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.step import Hidden, Logprobs, StepInputs
from worker.adjust import Builder, Fills, fill_all
from worker.sequence import Sequence
from worker.step import Step

SEED_MASK = (1 << 64) - 1


class _Rows(NamedTuple):
    """What a step took from the rows of its slots; `sampling` in the order of StepInputs."""

    slots: list[int]
    tables: NDArray[np.int32]
    sample_slots: list[int]
    sampling: tuple[NDArray[Any], ...]


_NOTHING = tuple(np.zeros(0) for _ in range(5))


class Batch:
    """The device tables of `slots` sequences with up to `blocks_per_sequence` blocks each."""

    def __init__(self, slots: int, blocks_per_sequence: int, vocabulary_size: int,
                 fill_masks: Callable[[Fills], None] = fill_all, hidden_size: int = 0) -> None:
        """`fill_masks`: called while a step is computed, to write the masks of its streams. `hidden_size`: as
        `kernels.step.Embedding` has it."""
        self._hidden_size = hidden_size
        self._fill_masks = fill_masks
        self._vocabulary_size = vocabulary_size
        self._tables = np.full((slots, blocks_per_sequence), -1, np.int32)
        self._temperature = np.zeros(slots, np.float32)
        self._top_k = np.zeros(slots, np.int32)
        self._top_p = np.ones(slots, np.float32)
        self._min_p = np.zeros(slots, np.float32)
        self._seeds = np.zeros(slots, np.uint64)
        self._leases = [0] * slots
        self._written = [0] * slots  # blocks of each row that are in the table
        self._counting = np.arange(slots + 1, dtype=np.int32)
        self._last = _Rows([], np.zeros((0, 1), np.int32), [], _NOTHING)
        self._changed = True  # a row of a slot, since `_last`

    def build(self, step: Step) -> StepInputs:
        """The inputs of one step; sequences and rows in the order of `step.works`."""
        tokens: list[int] = []
        positions: list[int] = []
        starts = [0]
        slots: list[int] = []
        sample_rows: list[int] = []
        sample_slots: list[int] = []
        longest = 1
        adjusted: Builder | None = None
        scored: list[int] = []  # sample rows of which only is told how likely the next token is
        told: list[int] = []
        targets: list[int] = []
        pooled: list[int] = []
        most = 0
        for work in step.works:
            sequence = work.sequence
            slot, blocks = sequence.slot, len(sequence.blocks)
            if self._written[slot] != blocks or self._leases[slot] != sequence.lease:
                self._write(sequence)
            longest = blocks if blocks > longest else longest
            slots.append(slot)
            if work.rows == 1:
                # of a foreseen row only the device knows the token
                tokens.append(sequence.tokens[work.start] if work.start < len(sequence.tokens) else 0)
                positions.append(work.start)
            else:
                end = work.start + work.rows
                tokens += sequence.tokens[work.start:end - len(work.drafts)]
                tokens += work.drafts
                positions += range(work.start, end)
            if work.pooled:
                first = len(tokens) - work.rows
                pooled += [first + row for row in work.pooled]
            if work.scored:
                first = len(tokens) - work.rows
                asked = range(len(sample_rows), len(sample_rows) + len(work.scored))
                scored += asked
                told += asked
                targets += [sequence.tokens[work.start + row + 1] for row in work.scored]
                most = max(most, sequence.request.prompt_logprobs)
                sample_rows += [first + row for row in work.scored]
                sample_slots += [slot] * len(work.scored)
            if work.samples:
                wanted = 1 + len(work.drafts)
                if sequence.adjuster is not None:
                    adjusted = adjusted or Builder(self._vocabulary_size)
                    adjusted.add(len(sample_rows), sequence.adjuster, sequence.tokens, work.drafts)
                if sequence.request.logprobs >= 0:
                    told += range(len(sample_rows), len(sample_rows) + wanted)
                    targets += [-1] * wanted
                    most = max(most, sequence.request.logprobs)
                if wanted == 1:
                    sample_rows.append(len(tokens) - 1)
                    sample_slots.append(slot)
                else:
                    sample_rows += range(len(tokens) - wanted, len(tokens))
                    sample_slots += [slot] * wanted
            starts.append(len(tokens))
        one_each = len(sample_rows) == len(tokens) == len(slots)
        last = self._last = self._rows(slots, longest, sample_slots)
        temperature, top_k, top_p, min_p, seeds = last.sampling
        if scored:
            temperature = temperature.copy()
            temperature[scored] = 0.0
        return StepInputs(
            tokens=np.array(tokens, np.int32),
            positions=np.array(positions, np.int32),
            sequence_starts=self._counting[:len(starts)] if one_each else np.array(starts, np.int32),
            block_tables=last.tables,
            sample_rows=self._counting[:len(slots)] if one_each else np.array(sample_rows, np.int32),
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seeds=seeds,
            adjustments=adjusted.build(self._fill_masks) if adjusted is not None else None,
            logprobs=Logprobs.asked(told, targets, most) if told else None,
            hidden=Hidden.asked(pooled, self._hidden_size) if pooled else None,
        )

    @staticmethod
    def carried(step: Step) -> NDArray[np.int32]:
        """Of each row of a foreseen step, which sample of the step before chooses its token."""
        return np.array([work.carries for work in step.works], np.int32)

    def _rows(self, slots: list[int], longest: int, sample_slots: list[int]) -> "_Rows":
        """What the step needs of the rows of its slots."""
        last = self._last
        if not self._changed and slots == last.slots and longest == last.tables.shape[1] \
                and sample_slots == last.sample_slots:
            return last
        self._changed = False
        rows = np.array(sample_slots, np.intp)
        return _Rows(
            slots, np.ascontiguousarray(self._tables[np.array(slots, np.intp), :longest]), sample_slots,
            (self._temperature[rows], self._top_k[rows], self._top_p[rows], self._min_p[rows], self._seeds[rows]))

    def _write(self, sequence: Sequence) -> None:
        """Bring the row of a sequence up to date: all of it for a new owner, else the blocks behind the known ones."""
        slot, blocks = sequence.slot, sequence.blocks
        self._changed = True
        if self._leases[slot] != sequence.lease:
            self._leases[slot] = sequence.lease
            self._tables[slot, :self._written[slot]] = -1
            self._written[slot] = 0
            sampling = sequence.request.sampling
            self._temperature[slot] = sampling.temperature
            self._top_k[slot] = sampling.top_k
            self._top_p[slot] = sampling.top_p
            self._min_p[slot] = sampling.min_p
            self._seeds[slot] = sampling.seed & SEED_MASK
        known = self._written[slot]
        self._tables[slot, known:len(blocks)] = blocks[known:]
        self._written[slot] = len(blocks)
