"""How large a KV cache may be: what is left of the device's memory beside the weights and the worst step, measured.

Rule: what a step needs is measured by running it, not reckoned: workspaces of libraries and the sort of a sampler are
in nobody's formula. The measured step has as many rows as a step may have, at the end of the longest context, as many
samples as sequences may run, each with every mask and with logprobs.

Not yet run on a GPU: the tests give it a device whose memory they keep count of.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from kernels.step import Logprobs, StepInputs

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
        torch.cuda.reset_peak_memory_stats()
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
    step_bytes = memory.peak_of(worst)
    left = int(memory.total() * share) - memory.used() - step_bytes
    if left < block_bytes:
        raise ValueError(
            f"the device has {memory.total() >> 20} MiB, of which {memory.used() >> 20} are taken and a step takes "
            f"{step_bytes >> 20} more: no room for a KV block in {share:.0%} of it. Use a smaller quantisation, fewer "
            "step_tokens or max_running, or more devices (--tensor-parallel)"
        )
    return left // block_bytes


def worst_step(rows: int, sequences: int, context_length: int, block_size_tokens: int) -> StepInputs:
    """The step that needs most memory. All of it lies in KV block 0, so its tokens mean nothing."""
    sequences = max(1, min(sequences, rows))
    lengths = np.full(sequences, rows // sequences)
    lengths[: rows % sequences] += 1
    lengths = np.minimum(lengths, context_length)
    starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    positions = np.concatenate([np.arange(context_length - length, context_length) for length in lengths])
    ends = starts[1:] - 1
    return StepInputs(
        tokens=np.zeros(starts[-1], np.int32),
        positions=positions.astype(np.int32),
        sequence_starts=starts,
        block_tables=np.zeros((sequences, -(-context_length // block_size_tokens)), np.int32),
        sample_rows=ends,
        temperature=np.ones(sequences, np.float32),
        top_k=np.full(sequences, 50, np.int32),
        top_p=np.full(sequences, 0.9, np.float32),
        min_p=np.full(sequences, 0.01, np.float32),
        seeds=np.arange(sequences, dtype=np.uint64),
        logprobs=Logprobs.asked(list(range(sequences)), [-1] * sequences, MOST_LIKELY),
    )
