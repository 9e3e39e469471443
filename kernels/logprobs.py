"""How likely tokens were: logarithms of the softmax of raw logits, before anything shifts, masks or divides them.

With x a float32 logit: log p = (x - largest) - log(sum of exp(x - largest)). Numpy sums in float64; torch and C++ may
differ in the last places, and C++ gives the same for the same row, whatever stands beside it.
"""

import numpy as np
from numpy.typing import NDArray

from kernels.step import Logprobs

Floats = NDArray[np.float32]


def fill(logprobs: Logprobs, logits: Floats, chosen: NDArray[np.int32]) -> None:
    """Answer what was asked, from the raw logits [L, V] and the chosen tokens [L]."""
    asked = logits[logprobs.samples].astype(np.float64)  # [P, V]
    shifted = asked - asked.max(-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    targets = np.where(logprobs.targets >= 0, logprobs.targets, chosen[logprobs.samples])[:, None]
    logprobs.of_target[:] = np.take_along_axis(logs, targets, 1)[:, 0]
    own = np.take_along_axis(asked, targets, 1)
    ids = np.arange(asked.shape[1])
    logprobs.ranks[:] = 1 + ((asked > own) | ((asked == own) & (ids < targets))).sum(-1)
    most = logprobs.top_ids.shape[1]
    if most:
        logprobs.top_ids[:] = np.argsort(-asked, axis=-1, kind="stable")[:, :most]
        logprobs.top[:] = np.take_along_axis(logs, logprobs.top_ids.astype(np.int64), 1)


def check_logprobs(logprobs: Logprobs, samples: int, vocabulary_size: int) -> None:
    """Raise ValueError, which says what does not fit a step of so many sample rows."""
    rows = len(logprobs.samples)
    most = logprobs.top_ids.shape[1] if logprobs.top_ids.ndim == 2 else -1
    for name, kind, shape in (
        ("samples", np.int32, (rows,)),
        ("targets", np.int32, (rows,)),
        ("of_target", np.float32, (rows,)),
        ("ranks", np.int32, (rows,)),
        ("top_ids", np.int32, (rows, most)),
        ("top", np.float32, (rows, most)),
    ):
        array = getattr(logprobs, name)
        if array.shape != shape or array.dtype != kind or not array.flags.c_contiguous:
            raise ValueError(f"{name} must be {shape} of {np.dtype(kind)}, contiguous")
    numbers = logprobs.samples
    if (np.diff(numbers) <= 0).any() or ((numbers < 0) | (numbers >= samples)).any():
        raise ValueError(f"samples with logprobs must be ascending numbers below {samples}")
    if ((logprobs.targets < -1) | (logprobs.targets >= vocabulary_size)).any() or most > vocabulary_size:
        raise ValueError(f"targets must be ids below {vocabulary_size}, or -1; and no more are likely than there are")
