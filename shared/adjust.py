"""What penalties, bias and masks do to logits: the specification, from the text of a stream up to the token to choose.

Rule: everything follows from the request and the tokens before the position, accepted drafts included, so it is the
same whatever the batch, the chunks, the drafter or the worker. Noise comes afterwards and belongs to the token id.

In this order, each operation rounded once to float32:

    1.  repetition_penalty r on every id of prompt and answer:  x / r where x > 0, else x * r.
    2.  frequency_penalty f and presence_penalty p on every id of the answer that stands there n times:
        x - f * n, then that - p.
    3.  bias b:  x + b.
    4.  Minus infinity for every id outside the walls (`allowed` ids, what a grammar permits).
    5.  Minus infinity for what is not wanted: stop tokens while the answer has fewer than `min_tokens`, and the last id
        of a bad word whose other ids the answer ends with. If walls are there and nothing would be left within them,
        this step is left out.

Pure numpy.
"""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from shared.messages import Adjust
from shared.tokens import unpack

LONGEST_BAD_WORD = 64  # tokens

Floats = NDArray[np.float32]


def adjusted(logits: Floats, adjust: Adjust, prompt: Sequence[int], answer: Sequence[int],
             stop_token_ids: Collection[int] = (), permitted: Collection[int] | None = None) -> Floats:
    """The logits of the token behind `prompt` and `answer`. `permitted`: ids that a grammar permits there."""
    x = logits.astype(np.float32)
    seen = sorted({*prompt, *answer})
    x[seen] = np.where(x[seen] > 0, x[seen] / np.float32(adjust.repetition_penalty),
                       x[seen] * np.float32(adjust.repetition_penalty))
    for id in set(answer):
        x[id] -= np.float32(adjust.frequency_penalty) * np.float32(list(answer).count(id))
        x[id] -= np.float32(adjust.presence_penalty)
    x[unpack(adjust.biased)] += biases(adjust)
    walls = [set(ids) for ids in (unpack(adjust.allowed) or None, permitted) if ids is not None]
    inside = set(range(len(x))).intersection(*walls)
    left = inside - unwanted(adjust, answer, stop_token_ids)
    if walls and not left:
        left = inside
    x[sorted(set(range(len(x))) - left)] = -np.inf
    return x


def unwanted(adjust: Adjust, answer: Sequence[int], stop_token_ids: Collection[int]) -> set[int]:
    """The ids of step 5."""
    found = set(stop_token_ids) if len(answer) < adjust.min_tokens else set()
    for word in map(unpack, adjust.bad_words):
        before = len(word) - 1
        if len(answer) >= before and list(answer[len(answer) - before:]) == word[:-1]:
            found.add(word[-1])
    return found


def biases(adjust: Adjust) -> Floats:
    """One for each of the `biased` ids. Raises ValueError when the bytes are damaged."""
    return np.frombuffer(adjust.biases, "<f4").astype(np.float32)
