"""Operators whose work depends on shapes alone, in plain torch: what Triton's kernels are on a GPU."""

import torch
from torch import Tensor

from kernels.ops import REFERENCE, Ops
from kernels.reference import GREEDY_BELOW, gumbel


def write_kv(
    keys: Tensor, values: Tensor, key_cache: Tensor, value_cache: Tensor, tables: Tensor, sequences: Tensor,
    positions: Tensor,
) -> None:  # fmt: skip
    """As the reference. A padded row writes what is there already, at the place of row 0."""
    size = key_cache.shape[1]
    there = positions >= 0
    at = torch.where(there, positions, positions[0])
    rows = torch.where(there, torch.arange(len(positions)), 0)
    blocks = tables[sequences[rows], at // size].long()
    key_cache[blocks, at % size] = keys[rows]
    value_cache[blocks, at % size] = values[rows]


def paged_attention(
    queries: Tensor, key_cache: Tensor, value_cache: Tensor, tables: Tensor, sequences: Tensor, positions: Tensor,
    scale: float, longest: int | None = None, window: int = 0, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As the reference, over `longest` positions of every row, whether it sees them or not."""
    size, kv_heads = key_cache.shape[1:3]
    blocks = -(-(longest or tables.shape[1] * size) // size)
    owners = tables[sequences, :blocks].clamp(min=0).long()  # [R, B]
    keys, values = (cache[owners].flatten(1, 2) for cache in (key_cache, value_cache))  # [R, T, K, D]
    group = queries.shape[1] // kv_heads
    keys, values = (each.repeat_interleave(group, 2) for each in (keys, values))
    at, ends = torch.arange(keys.shape[1]), positions[:, None]
    unseen = (at > ends) | ((at <= ends - window) if window else False)
    scores = torch.einsum("rhd,rthd->rht", queries * scale, keys).masked_fill(unseen[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[None, :, None].expand(len(scores), -1, 1)), -1)
    weights = torch.softmax(scores, -1)[..., : len(at)]
    weights = torch.where(positions[:, None, None] >= 0, weights, 0.0)
    return torch.einsum("rht,rthd->rhd", weights, torch.where(unseen[:, :, None, None], 0.0, values))


def sample(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """As the reference, with noise for every row, whether it wants it or not."""
    greedy = temperatures < GREEDY_BELOW
    noisy = logits / torch.where(greedy, 1.0, temperatures)[:, None] + gumbel(seeds, positions, logits.shape[1])
    scores = torch.where(greedy[:, None], logits, noisy)
    best = scores.amax(-1, keepdim=True)
    ids = torch.arange(scores.shape[1])
    return torch.where(scores == best, ids, scores.shape[1]).amin(-1).int()


STATIC: Ops = REFERENCE._replace(write_kv=write_kv, paged_attention=paged_attention, sample=sample)
