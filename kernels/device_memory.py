"""How large a KV cache may be: what is left of the device's memory beside the weights and the worst step, measured.

Rule: what a step needs is measured by running it, not reckoned: workspaces of libraries and the sort of a sampler are
in nobody's formula. The measured step has as many rows as a step may have, at the end of the longest context. Each of
them is sampled, as scored prompts and drafts are, with a mask of its own, every restriction and logprobs.

Not measured, so that it has to fit in what the share leaves out: recordings (`kernels.replay`), made later, when a size
of step is first needed. Each runs once on a stream of its own, with up to 128 rows, and no other stream uses the memory
of that run again; all of them share a pool for what lies between their operators; and each has launches that the driver
keeps.

Not yet run on a GPU: the tests give it a device whose memory they keep count of.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from kernels.step import Adjustments, Logprobs, StepInputs

MOST_LIKELY = 20  # what the API lets a client ask for


class DeviceMemory(Protocol):
    """Bytes of one device."""

    def total(self) -> int: ...

    def used(self) -> int:
        """By everybody, now."""

    def peak_of(self, run: Callable[[], None]) -> int:
        """How far `run` raises what is used, while it runs."""


class CudaMemory:
    """The current CUDA device."""

    def total(self) -> int:
        import torch

        return int(torch.cuda.mem_get_info()[1])

    def used(self) -> int:
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return int(total - free)

    def peak_of(self, run: Callable[[], None]) -> int:
        import torch

        before = self.used()
        run()
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        # without emptying: what the allocator keeps of the step, and what libraries took beside it
        return int(total - free) - before


def blocks_that_fit(memory: DeviceMemory, share: float, block_bytes: int, worst: Callable[[], None]) -> int:
    """KV blocks in `share` of the memory, beside what is there and what the worst step takes.

    Raises ValueError when there is room for none.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"the share of the device's memory is {share:g}: say more than 0 and at most 1")
    used = memory.used()  # before the step, whose peak counts what stays of it
    step_bytes = memory.peak_of(worst)
    left = int(memory.total() * share) - used - step_bytes
    if left < block_bytes:
        raise ValueError(
            f"the device has {memory.total() >> 20} MiB, of which {used >> 20} are taken and a step takes "
            f"{step_bytes >> 20} more: no room for a KV block in {share:.0%} of it. Use a smaller quantisation, fewer "
            "step_tokens or max_running, or more devices (--tensor-parallel)"
        )
    return left // block_bytes


def worst_step(
    rows: int, sequences: int, context_length: int, block_size_tokens: int, vocabulary_size: int
) -> StepInputs:
    """The step that needs most memory. All of it lies in KV block 0, so its tokens mean nothing."""
    sequences = max(1, min(sequences, rows))
    lengths = np.full(sequences, rows // sequences)
    lengths[: rows % sequences] += 1
    lengths = np.minimum(lengths, context_length)
    starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    positions = np.concatenate([np.arange(context_length - length, context_length) for length in lengths])
    samples = np.arange(starts[-1], dtype=np.int32)
    count = len(samples)
    nobodys = np.zeros(count + 1, np.int32)
    adjustments = Adjustments(
        samples=samples,
        repetition=np.ones(count, np.float32),
        frequency=np.zeros(count, np.float32),
        presence=np.zeros(count, np.float32),
        count_starts=nobodys,
        counted=np.zeros(0, np.int32),
        counts=np.zeros(0, np.int32),
        shift_starts=nobodys,
        shifted=np.zeros(0, np.int32),
        shifts=np.zeros(0, np.float32),
        mask_of=samples,
        masks=np.full((count, -(-vocabulary_size // 32)), 0xFFFFFFFF, np.uint32),
    )
    return StepInputs(
        tokens=np.zeros(count, np.int32),
        positions=positions.astype(np.int32),
        sequence_starts=starts,
        block_tables=np.zeros((sequences, -(-context_length // block_size_tokens)), np.int32),
        sample_rows=samples,
        temperature=np.ones(count, np.float32),
        top_k=np.full(count, 50, np.int32),
        top_p=np.full(count, 0.9, np.float32),
        min_p=np.full(count, 0.01, np.float32),
        seeds=np.arange(count, dtype=np.uint64),
        adjustments=adjustments,
        logprobs=Logprobs.asked(list(range(count)), [-1] * count, min(MOST_LIKELY, vocabulary_size)),
    )
