"""How likely tokens were, as it travels: one record for each token, little-endian.

    float32  log of the token's probability       uint32  its rank, 1 for the likeliest
    then for each of the likeliest:               uint32  id        float32  log of its probability

Pure.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Likely(NamedTuple):
    """One token: natural logarithms, and the likeliest ids with theirs, largest first."""

    logprob: float
    rank: int
    top: list[tuple[int, float]]


def pack_likely(logprobs: NDArray[np.float32], ranks: NDArray[np.int32], top_ids: NDArray[np.int32],
                top: NDArray[np.float32]) -> bytes:
    """Records of n tokens: arrays [n], [n], [n, K] and [n, K]."""
    words = np.empty((len(logprobs), 2 + 2 * top_ids.shape[1]), "<u4")
    words[:, 0] = logprobs.astype("<f4").view("<u4")
    words[:, 1] = ranks
    words[:, 2::2] = top_ids
    words[:, 3::2] = np.ascontiguousarray(top, "<f4").view("<u4")
    return words.tobytes()


def record_bytes(most: int) -> int:
    """The size of a record that has the `most` likeliest."""
    return 8 + 8 * most


def unpack_likely(record: bytes) -> Likely:
    """One record. Raises ValueError when it is damaged."""
    if len(record) < 8 or len(record) % 8:
        raise ValueError(f"a record of {len(record)} bytes is none")
    words = np.frombuffer(record, "<u4")
    values = np.frombuffer(record, "<f4").tolist()
    return Likely(values[0], int(words[1]), list(zip(words[2::2].tolist(), values[3::2], strict=True)))
