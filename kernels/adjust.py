"""Shifting and masking logits before a token is chosen, in plain numpy: the specification of `Adjustments`.

Rule: every operation is one correctly rounded float32 operation, so torch on any device and C++ give the same bits.
Noise is added afterwards and belongs to the token id: nothing here can change it.
"""

import numpy as np
from numpy.typing import NDArray

from kernels.step import Adjustments

Floats = NDArray[np.float32]


def adjusted(logits: Floats, adjustments: Adjustments) -> Floats:
    """Logits [L, V] with those of the adjusted rows shifted and masked."""
    if adjustments.fill is not None:
        adjustments.fill()
    result = logits.copy()
    for at, sample in enumerate(adjustments.samples):
        row = result[sample]
        here = slice(adjustments.count_starts[at], adjustments.count_starts[at + 1])
        ids, counts = adjustments.counted[here], adjustments.counts[here]
        x, repetition = row[ids], adjustments.repetition[at]
        x = np.where(x > 0, x / repetition, x * repetition)
        punished = x - adjustments.frequency[at] * counts.astype(np.float32) - adjustments.presence[at]
        row[ids] = np.where(counts > 0, punished, x)
        here = slice(adjustments.shift_starts[at], adjustments.shift_starts[at + 1])
        row[adjustments.shifted[here]] += adjustments.shifts[here]
        if adjustments.mask_of[at] >= 0:
            row[~allowed_ids(adjustments.masks[adjustments.mask_of[at]], len(row))] = -np.inf
    return result


def allowed_ids(mask: NDArray[np.uint32], vocabulary_size: int) -> NDArray[np.bool_]:
    """Which ids a mask of 32-bit words allows; ids without a bit are not allowed."""
    bits = np.unpackbits(mask.astype("<u4").view(np.uint8), bitorder="little")[:vocabulary_size].astype(np.bool_)
    return np.pad(bits, (0, vocabulary_size - len(bits)))


def mask_of(ids: NDArray[np.integer], vocabulary_size: int) -> NDArray[np.uint32]:
    """The mask that allows these ids and no others."""
    bits = np.zeros(-(-vocabulary_size // 32) * 32, np.uint8)
    bits[ids] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def check_adjustments(adjustments: Adjustments, samples: int, vocabulary_size: int) -> None:
    """Raise ValueError, which says what does not fit a step of so many sample rows. Contents too: no decoder looks."""
    rows = len(adjustments.samples)
    shapes = {"samples": (rows,), "repetition": (rows,), "frequency": (rows,), "presence": (rows,), "mask_of": (rows,)}
    shapes |= {"count_starts": (rows + 1,), "shift_starts": (rows + 1,)}
    shapes |= {"counts": adjustments.counted.shape, "shifts": adjustments.shifted.shape}
    for name, shape in shapes.items():
        if getattr(adjustments, name).shape != shape:
            raise ValueError(f"{name} must have the shape {shape}, it has {getattr(adjustments, name).shape}")
    for name in ("samples", "count_starts", "counted", "counts", "shift_starts", "shifted", "mask_of"):
        if getattr(adjustments, name).dtype != np.int32:
            raise ValueError(f"{name} must be int32, it is {getattr(adjustments, name).dtype}")
    for name in ("repetition", "frequency", "presence", "shifts"):
        if getattr(adjustments, name).dtype != np.float32:
            raise ValueError(f"{name} must be float32, it is {getattr(adjustments, name).dtype}")
    if adjustments.masks.ndim != 2 or adjustments.masks.dtype != np.uint32:
        raise ValueError("masks must be rows of uint32 words")
    numbers = adjustments.samples
    if (np.diff(numbers) <= 0).any() or ((numbers < 0) | (numbers >= samples)).any():
        raise ValueError(f"adjusted samples must be ascending numbers below {samples}")
    for starts, ids in (
        (adjustments.count_starts, adjustments.counted),
        (adjustments.shift_starts, adjustments.shifted),
    ):
        if starts[0] != 0 or starts[-1] != len(ids) or (np.diff(starts) < 0).any():
            raise ValueError("the starts of an adjustment's ids must rise from 0 to their number")
        if ((ids < 0) | (ids >= vocabulary_size)).any():
            raise ValueError(f"an adjusted id lies outside the vocabulary of {vocabulary_size}")
    if (adjustments.counts < 0).any() or not (adjustments.repetition > 0).all():
        raise ValueError("counts must not be negative, and a repetition penalty must be above 0")
    finite = (adjustments.repetition, adjustments.frequency, adjustments.presence)
    if not all(np.isfinite(values).all() for values in finite) or not (adjustments.shifts < np.inf).all():
        raise ValueError("penalties must be finite, and shifts neither NaN nor plus infinity")
    if ((adjustments.mask_of < -1) | (adjustments.mask_of >= len(adjustments.masks))).any():
        raise ValueError(f"mask_of must name one of {len(adjustments.masks)} masks, or -1")
