"""A step of the scheduler as the arrays of a decoder.

Rule: what belongs to a sequence lies in the row of its slot for as long as it runs (block table, sampling); a step is
an index into those rows. The arrays handed out are copies, so nothing in flight changes.
"""

import numpy as np

from kernels.step import Logprobs, StepInputs
from worker.adjust import Builder
from worker.scheduler import Step
from worker.sequence import Sequence

SEED_MASK = (1 << 64) - 1


class Batch:
    """The device tables of `slots` sequences with up to `blocks_per_sequence` blocks each."""

    def __init__(self, slots: int, blocks_per_sequence: int, vocabulary_size: int) -> None:
        self._vocabulary_size = vocabulary_size
        self._tables = np.full((slots, blocks_per_sequence), -1, np.int32)
        self._temperature = np.zeros(slots, np.float32)
        self._top_k = np.zeros(slots, np.int32)
        self._top_p = np.ones(slots, np.float32)
        self._min_p = np.zeros(slots, np.float32)
        self._seeds = np.zeros(slots, np.uint64)
        self._leases = [0] * slots
        self._written = [0] * slots  # blocks of each row that are in the table

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
        most = 0
        for work in step.works:
            sequence = work.sequence
            slot = sequence.slot
            if self._written[slot] != len(sequence.blocks) or self._leases[slot] != sequence.lease:
                self._write(sequence)
            longest = max(longest, len(sequence.blocks))
            slots.append(slot)
            end = work.start + work.rows
            known = end - len(work.drafts)
            if work.rows == 1:
                tokens.append(sequence.tokens[work.start])
                positions.append(work.start)
            else:
                tokens += sequence.tokens[work.start:known]
                tokens += work.drafts
                positions += range(work.start, end)
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
                sample_rows += range(len(tokens) - wanted, len(tokens))
                sample_slots += [slot] * wanted
            starts.append(len(tokens))
        rows = np.array(sample_slots, np.intp)
        temperature = self._temperature[rows]
        temperature[scored] = 0.0
        return StepInputs(
            tokens=np.array(tokens, np.int32),
            positions=np.array(positions, np.int32),
            sequence_starts=np.array(starts, np.int32),
            block_tables=np.ascontiguousarray(self._tables[np.array(slots, np.intp), :longest]),
            sample_rows=np.array(sample_rows, np.int32),
            temperature=temperature,
            top_k=self._top_k[rows],
            top_p=self._top_p[rows],
            min_p=self._min_p[rows],
            seeds=self._seeds[rows],
            adjustments=adjusted.build() if adjusted is not None else None,
            logprobs=Logprobs.asked(told, targets, most) if told else None,
        )

    def _write(self, sequence: Sequence) -> None:
        """Bring the row of a sequence up to date: all of it for a new owner, else the blocks behind the known ones."""
        slot, blocks = sequence.slot, sequence.blocks
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
