"""Text that the target itself writes, and what it thought of each token: the lessons of a drafter.

Rule: a text depends on its prompt, temperature and seed alone, so that whatever was interrupted writes the same again.
A drafter is believed only while it says what the target says, so what it is asked for is always behind the target's own
words: text written by the target is exactly what it will meet.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.step import Decoder, StepInputs

# rows of one step that lessons are taken from: each has a logit for every id
LESSON_ROWS = {"cpu": 256, "cuda": 4096}


class Job(NamedTuple):
    """A text to be written."""

    prompt: Sequence[int]
    temperature: float
    seed: int


class Document(NamedTuple):
    """A prompt and what the target said behind it, `tokens[first:]`."""

    tokens: NDArray[np.int32]
    first: int


class Lessons(NamedTuple):
    """For each token of a document from its first on: the likeliest ids in its place, and their log-probabilities."""

    ids: NDArray[np.int32]  # [N, top]
    logp: NDArray[np.float16]  # [N, top]


class _Slot(NamedTuple):
    """A text that is being written, in blocks of its own."""

    number: int
    job: Job
    blocks: NDArray[np.int32]
    said: list[int]


def write(decoder: Decoder, jobs: Sequence[Job], most_tokens: int, stops: Sequence[int]) -> list[Document]:
    """What the target says to each job: until a token of `stops`, which is kept, or `most_tokens`.

    As many at once as the cache holds. Raises ValueError when a prompt does not fit into it with its answer.
    """
    ends = frozenset(stops)
    longest = max((len(job.prompt) for job in jobs), default=0) + most_tokens
    per_slot = -(-longest // decoder.block_size_tokens)
    together = min(len(jobs), decoder.blocks // per_slot)
    if jobs and (not together or longest > decoder.context_length):
        raise ValueError(f"a prompt and {most_tokens} tokens behind it are {longest} in all, more than fit: use "
                         "shorter prompts, or fewer tokens a text")
    said: dict[int, list[int]] = {}
    waiting = list(enumerate(jobs))[::-1]
    free = [np.arange(slot * per_slot, (slot + 1) * per_slot, dtype=np.int32) for slot in range(together)]
    active: list[_Slot] = []
    while waiting or active:
        while waiting and free:
            number, job = waiting.pop()
            active.append(_Slot(number, job, free.pop(), []))
        chosen = decoder.step(step_inputs([(slot.job, slot.blocks, _next(slot)) for slot in active]))
        going = []
        for slot, token in zip(active, chosen.tolist(), strict=True):
            slot.said.append(token)
            if token in ends or len(slot.said) >= most_tokens:
                said[slot.number] = slot.said
                free.append(slot.blocks)
            else:
                going.append(slot)
        active = going
    return [Document(np.array([*job.prompt, *said[number]], np.int32), len(job.prompt))
            for number, job in enumerate(jobs)]


def lessons(decoder: Decoder, documents: Sequence[Document], top: int, device: str = "cpu") -> list[Lessons]:
    """What the target thought of each token that it said."""
    found: list[tuple[list[NDArray[np.int32]], list[NDArray[np.float16]]]] = [([], []) for _ in documents]
    rows = LESSON_ROWS[device]
    longest = max((len(document.tokens) for document in documents), default=1)
    per_slot = -(-longest // decoder.block_size_tokens)
    together = max(1, min(decoder.blocks // per_slot, rows // max(1, longest)))
    for start in range(0, len(documents), together):
        batch = range(start, min(start + together, len(documents)))
        at = dict.fromkeys(batch, 0)
        while at:
            # documents longer than a step go through it in pieces
            piece = {number: min(len(documents[number].tokens) - 1 - at[number], max(1, rows // len(at)))
                     for number in at}
            parts, wanted = [], []
            for number, count in piece.items():
                tokens, first = documents[number]
                blocks = np.arange((number - start) * per_slot, (number - start + 1) * per_slot, dtype=np.int32)
                parts.append((Job((), 0.0, 0), blocks, (at[number], tokens[at[number]:at[number] + count].tolist())))
                wanted.append([row for row in range(count) if at[number] + row >= first - 1])
            ids, logp = _top(decoder, step_inputs(parts, wanted), top)
            row = 0
            for number, own in zip(piece, wanted, strict=True):
                found[number][0].append(ids[row:row + len(own)])
                found[number][1].append(logp[row:row + len(own)])
                row += len(own)
            at = {number: at[number] + count for number, count in piece.items()
                  if at[number] + count < len(documents[number].tokens) - 1}
    return [Lessons(np.concatenate(ids), np.concatenate(logp)) for ids, logp in found]


def _top(decoder: Decoder, inputs: StepInputs, top: int) -> tuple[NDArray[np.int32], NDArray[np.float16]]:
    on_device = getattr(decoder, "device_logits", None)
    with torch.inference_mode():
        logits = on_device(inputs).float() if on_device else torch.from_numpy(decoder.logits(inputs))
        logp, ids = torch.log_softmax(logits, -1).topk(min(top, logits.shape[1]))
        return ids.int().cpu().numpy(), logp.half().cpu().numpy()


def _next(slot: _Slot) -> tuple[int, Sequence[int]]:
    """Position and tokens that this text computes next."""
    if not slot.said:
        return 0, slot.job.prompt
    return len(slot.job.prompt) + len(slot.said) - 1, slot.said[-1:]


def step_inputs(parts: Sequence[tuple[Job, NDArray[np.int32], tuple[int, Sequence[int]]]],
            wanted: Sequence[Sequence[int]] | None = None) -> StepInputs:
    """A step of these rows; `wanted`: which rows of each part to sample, by default the last."""
    counts = [len(tokens) for _, _, (_, tokens) in parts]
    starts = np.cumsum([0, *counts]).astype(np.int32)
    rows = [(job, start + row) for (job, _, _), start, own in
            zip(parts, starts[:-1].tolist(), wanted or [[count - 1] for count in counts], strict=True) for row in own]
    return StepInputs(
        tokens=np.concatenate([np.asarray(tokens, np.int32) for _, _, (_, tokens) in parts]),
        positions=np.concatenate([np.arange(at, at + len(tokens), dtype=np.int32) for _, _, (at, tokens) in parts]),
        sequence_starts=starts,
        block_tables=np.stack([blocks for _, blocks, _ in parts]),
        sample_rows=np.array([row for _, row in rows], np.int32),
        temperature=np.array([job.temperature for job, _ in rows], np.float32),
        top_k=np.zeros(len(rows), np.int32),
        top_p=np.ones(len(rows), np.float32),
        min_p=np.zeros(len(rows), np.float32),
        seeds=np.array([job.seed for job, _ in rows], np.uint64),
    )
