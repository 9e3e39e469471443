"""How many drafts of a drafter are accepted, found out without drafting.

Rule: a draft counts only while all before it are what the target says, so every draft that counts stands behind the
target's own text. Whether a drafter says the target's token behind each piece of it therefore decides everything, and
one pass over the text tells that for all places at once.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kernels.step import Decoder
from worker.compress.writing import Document, Job, step_inputs


def agreement(decoder: Decoder, documents: Sequence[Document], jobs: Sequence[Job],
              factor: float) -> list[NDArray[np.bool_]]:
    """For each token that the target said: whether this decoder, as a drafter, would have said it in its place.

    With the noise of the job and `factor` times its temperature.
    """
    found = []
    for document, job in zip(documents, jobs, strict=True):
        tokens, first = document
        blocks = np.arange(decoder.blocks, dtype=np.int32)[:-(-len(tokens) // decoder.block_size_tokens)]
        drafts = Job((), job.temperature * factor, job.seed)
        rows = range(first - 1, len(tokens) - 1)
        chosen = decoder.step(step_inputs([(drafts, blocks, (0, tokens[:-1].tolist()))], [rows]))
        found.append(chosen == tokens[first:])
    return found


def tokens_a_step(agreed: Sequence[NDArray[np.bool_]], drafts: int) -> float:
    """What a step brings on average when so many drafts are verified in each: the right ones in a row, and one more."""
    tokens = steps = 0
    for one in agreed:
        at = 0
        while at < len(one):
            run = 0
            while run < drafts and at + run < len(one) and one[at + run]:
                run += 1
            at += run + 1
            steps += 1
        tokens += len(one)
    return tokens / max(1, steps)
