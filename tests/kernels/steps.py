"""Builders of decoder steps for tests: sequences with paged blocks, run together in any mixture."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kernels.step import Decoder, StepInputs


@dataclass
class Paged:
    """A sequence and the KV blocks it owns."""

    tokens: list[int]
    blocks: list[int]
    done: int = 0  # tokens whose keys and values are in the cache
    seed: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    chosen: list[int] = field(default_factory=list)


def step_inputs(parts: Sequence[tuple[Paged, int]], sample: Sequence[Sequence[int]] | None = None) -> StepInputs:
    """A step that runs the next `rows` tokens of each sequence.

    `sample` gives, per sequence, which of its rows to sample, counted from its first; by default its last one.
    """
    starts = np.cumsum([0, *(rows for _, rows in parts)])
    wanted = sample or [[rows - 1] for _, rows in parts]
    each = zip(parts, starts[:-1], wanted, strict=True)
    sampled = [(part, int(start) + row) for (part, _), start, own in each for row in own]
    longest = max(len(part.blocks) for part, _ in parts)
    tables = np.full((len(parts), longest), -1, np.int32)
    for table, (part, _) in zip(tables, parts, strict=True):
        table[: len(part.blocks)] = part.blocks
    owners = [part for part, _ in sampled]
    return StepInputs(
        tokens=np.array([t for part, rows in parts for t in part.tokens[part.done : part.done + rows]], np.int32),
        positions=np.concatenate([np.arange(part.done, part.done + rows, dtype=np.int32) for part, rows in parts]),
        sequence_starts=starts.astype(np.int32),
        block_tables=tables,
        sample_rows=np.array([row for _, row in sampled], np.int32),
        temperature=np.array([part.temperature for part in owners], np.float32),
        top_k=np.array([part.top_k for part in owners], np.int32),
        top_p=np.array([part.top_p for part in owners], np.float32),
        min_p=np.array([part.min_p for part in owners], np.float32),
        seeds=np.array([part.seed for part in owners], np.uint64),
    )


def lay_out(prompts: Sequence[Sequence[int]], new_tokens: int, decoder: Decoder, shuffle_seed: int = 0) -> list[Paged]:
    """Give each prompt blocks for itself and `new_tokens` more, in a shuffled order of block ids."""
    free = np.random.default_rng(shuffle_seed).permutation(decoder.blocks).tolist()
    parts = []
    for prompt in prompts:
        needed = -(-(len(prompt) + new_tokens) // decoder.block_size_tokens)
        parts.append(Paged(list(prompt), [free.pop() for _ in range(needed)]))
    return parts


def generate(decoder: Decoder, parts: Sequence[Paged], new_tokens: int, chunk: int = 512) -> None:
    """Prefill each sequence in chunks, one after the other, then decode all together; fills `chosen` and `tokens`."""
    for part in parts:
        while part.done < len(part.tokens):
            rows = min(chunk, len(part.tokens) - part.done)
            (token,) = decoder.step(step_inputs([(part, rows)]))
            part.done += rows
        _append(part, int(token))
    for _ in range(new_tokens - 1):
        for part, token in zip(parts, decoder.step(step_inputs([(part, 1) for part in parts])), strict=True):
            part.done += 1
            _append(part, int(token))


def _append(part: Paged, token: int) -> None:
    part.tokens.append(token)
    part.chosen.append(token)


def mixed_sampling(seed_step: int) -> StepInputs:
    """Forty rows of one sequence, every second sampled, each by rules of its own; in blocks 3, 1 and 0."""
    rows = 40
    return StepInputs(
        tokens=np.arange(rows, dtype=np.int32),
        positions=np.arange(rows, dtype=np.int32),
        sequence_starts=np.array([0, rows], np.int32),
        block_tables=np.array([[3, 1, 0]], np.int32),
        sample_rows=np.arange(0, rows, 2, dtype=np.int32),
        temperature=np.array([0, 0.7, 1, 1.5, 3] * 4, np.float32),
        top_k=np.array([0, 0, 0, 3] * 5, np.int32),
        top_p=np.array([1, 1, 0.8, 1, 0.9, 1, 1] * 3, np.float32)[:20],
        min_p=np.array([0, 0, 0, 0, 0, 0.1] * 4, np.float32)[:20],
        seeds=np.arange(20, dtype=np.uint64) * np.uint64(seed_step),
    )
