"""What is checked of a step before anything is done: the rules of model.cpp's `complaint`, in numpy.

The native step checks contents itself; this is for the decoder that has no C++.
"""

from dataclasses import fields, replace
from typing import Any

import numpy as np

from kernels.adjust import check_adjustments
from kernels.logprobs import check_logprobs
from kernels.step import Decoder, Embedding, StepInputs, check_hidden

_KINDS = {"temperature": np.float32, "top_p": np.float32, "min_p": np.float32, "seeds": np.uint64}


def checked(inputs: StepInputs, decoder: Decoder) -> StepInputs:
    """`inputs` with every array of its type. Raises ValueError, which says what does not fit."""
    inputs = _typed(inputs)
    starts, positions, tables = inputs.sequence_starts, inputs.positions, inputs.block_tables
    rows, sequences = len(inputs.tokens), len(starts) - 1
    if starts[0] != 0 or starts[-1] != rows:
        raise ValueError(f"sequence_starts must begin with 0 and end with the number of rows, {rows}")
    if (np.diff(starts) < 0).any():
        raise ValueError("sequence_starts must not decrease")
    _within(inputs.tokens, decoder.vocabulary_size, "token", "vocabulary")
    _within(positions, decoder.context_length, "position", "context")
    for sequence in range(sequences):
        own = positions[starts[sequence] : starts[sequence + 1]]
        if not own.size:
            continue
        if (np.diff(own) <= 0).any():
            raise ValueError(f"sequence {sequence}: the rows of a sequence must stand in ascending position order")
        needed = int(own[-1]) // decoder.block_size_tokens + 1
        if needed > tables.shape[1]:
            raise ValueError(f"sequence {sequence} needs {needed} blocks; its table has {tables.shape[1]}")
        table = tables[sequence, :needed]
        if (bad := table[(table < 0) | (table >= decoder.blocks)]).size:
            raise ValueError(f"sequence {sequence}: block id {bad[0]} is outside 0..{decoder.blocks - 1}")
    wanted = inputs.sample_rows
    if ((wanted < 0) | (wanted >= rows)).any() or (np.diff(wanted) <= 0).any():
        raise ValueError(f"sample_rows must be ascending row numbers below {rows}")
    for name in ("temperature", "top_k", "top_p", "min_p"):
        if (bad := np.flatnonzero(~(getattr(inputs, name) >= 0))).size:
            raise ValueError(f"sample {bad[0]}: {name} must not be negative or NaN")
    if inputs.adjustments is not None:
        check_adjustments(inputs.adjustments, len(wanted), decoder.vocabulary_size)
    if inputs.logprobs is not None:
        check_logprobs(inputs.logprobs, len(wanted), decoder.vocabulary_size)
    if inputs.hidden is not None:
        check_hidden(inputs.hidden, rows, decoder.hidden_size if isinstance(decoder, Embedding) else 0)
    return inputs


def _typed(inputs: StepInputs) -> StepInputs:
    if not len(inputs.sequence_starts):
        raise ValueError("sequence_starts needs one entry more than there are sequences")
    rows, samples = len(inputs.tokens), len(inputs.sample_rows)
    shapes: dict[str, tuple[int | None, ...]] = {field.name: (samples,) for field in fields(inputs)}
    del shapes["adjustments"], shapes["logprobs"], shapes["hidden"]
    shapes |= {"tokens": (rows,), "positions": (rows,), "sequence_starts": (None,)}
    shapes["block_tables"] = (len(inputs.sequence_starts) - 1, None)
    arrays: dict[str, Any] = {}
    for name, shape in shapes.items():
        given, kind = np.asarray(getattr(inputs, name)), _KINDS.get(name, np.int32)
        if given.ndim != len(shape) or any(w not in (None, h) for w, h in zip(shape, given.shape, strict=True)):
            raise ValueError(f"{name} must have the shape {shape}, it has {given.shape}")
        if not np.can_cast(given.dtype, kind, "same_kind"):
            raise ValueError(f"{name} must be {np.dtype(kind)}, it is {given.dtype}")
        arrays[name] = np.ascontiguousarray(given, kind)
    return replace(inputs, **arrays)


def _within(values: Any, count: int, what: str, where: str) -> None:
    if (bad := np.flatnonzero((values < 0) | (values >= count))).size:
        raise ValueError(f"row {bad[0]}: {what} {values[bad[0]]} is outside the {where} of {count}")
