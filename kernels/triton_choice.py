"""The end of a step in one launch: last norm, head, grammar masks, keyed noise, the choice, the count of accepted
drafts.

Rule: as in `kernels.triton_sampling`, token = argmax over permitted ids v of logit[v] / T + G(seed, position, v), the
lowest id of a tie. Logits are float32 sums that no memory ever holds.
Reference: `reference_layer.choose`.
Called by `deploy.bench.gpu`, `kernels.verify` and tests; no decoder takes it yet.

Every program has a tile of ids and M rows, and leaves the best of its ids for each row. The last one at M rows finds
the best of their tiles; the last of those counts for each sequence how many drafted tokens equal the choice before
them. A maximum is exact, so neither tiles nor order matter; the sums behind it are those of `kernels.triton_product`,
undivided.

Rows with penalties, biases, top-k, top-p or min-p need their logits and go through `kernels.triton_sampling`.

L rows to sample, C columns, V vocabulary, N ids of a tile, P tiles, M rows of a program, W words of a mask, S
sequences.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels import tuning
from kernels.launch import launch
from kernels.triton_layer import (
    Hidden,
    Matrix,
    matrix_constants,
    matrix_shape,
    parts,
    row_scales,
)
from kernels.triton_overlap import after_previous, let_next_begin
from kernels.triton_product import ROWS, Workspace, last_to_arrive, prefetch_split, split_sums
from kernels.triton_sampling import GREEDY_BELOW, _gumbel, _small_uniform
from kernels.weight4 import TILE_INPUTS

BEST_AT_ONCE = tl.constexpr(128)  # tiles whose best are compared at once
SEQUENCES_AT_ONCE = tl.constexpr(64)


class Samples(NamedTuple):
    """The rows of a step that want a token."""

    rows: torch.Tensor  # [L] rows of the hidden state
    temperatures: torch.Tensor  # [L] fp32, below 1e-5 greedy
    seeds: torch.Tensor  # [L] int64, the bits of a uint64
    positions: torch.Tensor  # [L] int64, of the new token
    masks: torch.Tensor  # [*, W] int32: bit i % 32 of word i // 32 permits id i
    mask_of: torch.Tensor  # [L] int32, row of `masks`; -1: all ids
    tokens: torch.Tensor  # [L] what stands in each row: the last known token, then the draft
    starts: torch.Tensor  # [S + 1] first sample of each sequence
    most: int  # samples of a sequence


def choose(
    hidden: Hidden, epsilon: float, head: Matrix, samples: Samples, work: Workspace
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token of each sample, int32 [L], and how many drafts of each sequence were right, int32 [S]."""
    count, sequences = samples.rows.shape[0], samples.starts.shape[0] - 1
    vocabulary, inputs = matrix_shape(head)
    choice = tuning.head(vocabulary)
    tiles = -(-vocabulary // choice.block)
    row_tiles = -(-count // ROWS)
    work.check(0, 0, 0, row_tiles + 1)
    scores = hidden.squares.new_empty((count, tiles))
    ids = samples.tokens.new_empty((count, tiles), dtype=torch.int32)
    chosen = samples.tokens.new_empty((count,), dtype=torch.int32)
    # without a sample no program says that nothing was accepted
    accepted = (samples.tokens.new_empty if count else samples.tokens.new_zeros)((sequences,), dtype=torch.int32)
    launch(
        _choose,
        (tiles, row_tiles),
        *(
            hidden.weighted,
            hidden.squares,
            *parts(head),
            samples.rows,
            samples.temperatures,
            samples.seeds,
            samples.positions,
        ),
        *(samples.masks, samples.mask_of, samples.tokens, samples.starts, scores, ids, chosen, accepted, work.counters),
        *(count, vocabulary, inputs, -(-inputs // TILE_INPUTS), epsilon, samples.masks.shape[1], sequences),
        samples.most,
        choice=choice,
        BLOCK=choice.block,
        BLOCK_ROWS=ROWS,
        TILES=-(-inputs // TILE_INPUTS),
        SQUARES_PADDED=tuning.padded(hidden.squares.shape[1]),
        PREFETCH=tuning.PREFETCH,
        **matrix_constants(head, hidden.values),
    )
    return chosen, accepted


@triton.jit(do_not_specialize=["count", "mask_words", "sequences", "most"])
def _choose(
    # pointers
    weighted_ptr,  # [R, C]
    squares_ptr,  # [R, Q]
    weight_ptr,  # [V, C] or parts of a Weight4
    scales_ptr,
    offsets_ptr,
    rows_ptr,  # [L]
    temperatures_ptr,  # [L] fp32
    seeds_ptr,  # [L] int64
    positions_ptr,  # [L] int64
    masks_ptr,  # [*, W] int32
    mask_of_ptr,  # [L] int32
    tokens_ptr,  # [L]
    starts_ptr,  # [S + 1]
    scores_ptr,  # [L, P] fp32
    ids_ptr,  # [L, P] int32
    chosen_ptr,  # [L] int32
    accepted_ptr,  # [S] int32
    counters_ptr,  # [1 + row tiles]
    # sizes
    count,
    vocabulary,
    inputs,
    tiles,
    epsilon,
    mask_words,
    sequences,
    most,
    # constants
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILES: tl.constexpr,
    SQUARES_PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    RAGGED: tl.constexpr,
    WIDE: tl.constexpr,
    PREFETCH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # 1. The logits of N ids for M samples.
    best_tiles = tl.num_programs(0)
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample = (tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    real = sample < count
    prefetch_split(weight_ptr, ids, ids < vocabulary, 0, inputs, tiles, TILES, KIND, PREFETCH, OVERLAP)
    after_previous(OVERLAP)
    row = tl.load(rows_ptr + sample, mask=real, other=0).to(tl.int64)  # [M]
    scores = split_sums(
        *(weighted_ptr, row, real, inputs),
        *(weight_ptr, scales_ptr, offsets_ptr, ids, ids < vocabulary, 0, inputs, tiles),
        *(BLOCK, BLOCK_ROWS, TILES, GROUP, KIND, RAGGED, WIDE),
    )  # [N, M]
    scores = scores * row_scales(squares_ptr, row, real, inputs, epsilon, SQUARES_PADDED)[None, :]

    # 2. Scores: over the temperature, with noise, unless greedy; minus infinity where a mask does not permit the id.
    temperature = tl.load(temperatures_ptr + sample, mask=real, other=0.0)[None, :]
    noisy = temperature >= GREEDY_BELOW
    if tl.max(noisy.to(tl.int32)) > 0:
        seed = tl.load(seeds_ptr + sample, mask=real, other=0)[None, :]
        position = tl.load(positions_ptr + sample, mask=real, other=0)[None, :]
        tokens = (ids[:, None] + tl.zeros((BLOCK, BLOCK_ROWS), tl.int32)).to(tl.uint32)
        noise = _gumbel(_small_uniform(tokens, position, seed))  # [N, M]
        divisor = tl.where(noisy, temperature, 1.0) + tl.zeros_like(scores)
        scores = tl.where(noisy, tl.div_rn(scores, divisor) + noise, scores)
    mask_of = tl.load(mask_of_ptr + sample, mask=real, other=-1).to(tl.int64)[None, :]
    if tl.max(mask_of) >= 0:
        word = (ids // 32)[:, None]
        has_word = (mask_of >= 0) & (word < mask_words)
        words = tl.load(masks_ptr + mask_of * mask_words + word, mask=has_word, other=0)  # [N, M]
        permitted = ((words >> (ids % 32)[:, None]) & 1) > 0
        scores = tl.where((mask_of < 0) | permitted, scores, float("-inf"))
    scores = tl.where((ids < vocabulary)[:, None], scores, float("-inf"))

    # 3. The best of the tile; the lowest id of a tie.
    best, index = tl.max(scores, axis=0, return_indices=True, return_indices_tie_break_left=True)  # [M]
    let_next_begin(OVERLAP)
    at = sample * best_tiles + tl.program_id(0)
    tl.store(scores_ptr + at, best, mask=real)
    tl.store(ids_ptr + at, tl.program_id(0) * BLOCK + index, mask=real)
    if not last_to_arrive(counters_ptr + 1 + tl.program_id(1), best_tiles):
        return

    # 4. The best of the tiles: they ascend with their ids, and a later one has to be better.
    top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    best_tile = tl.zeros((BLOCK_ROWS,), tl.int32)
    for first in range(0, best_tiles, BEST_AT_ONCE):
        tile = first + tl.arange(0, BEST_AT_ONCE)
        mask = real[:, None] & (tile < best_tiles)[None, :]
        of_tiles = sample[:, None] * best_tiles + tile[None, :]
        some = tl.load(scores_ptr + of_tiles, mask=mask, other=float("-inf"), cache_modifier=".cg")  # [M, tiles]
        best, index = tl.max(some, axis=1, return_indices=True, return_indices_tie_break_left=True)  # [M]
        better = best > top
        best_tile = tl.where(better, first + index, best_tile)
        top = tl.where(better, best, top)
    token = tl.load(ids_ptr + sample * best_tiles + best_tile, mask=real, other=0, cache_modifier=".cg")
    tl.store(chosen_ptr + sample, token, mask=real)
    if not last_to_arrive(counters_ptr, tl.num_programs(1)):
        return

    # 5. Accepted drafts of each sequence: up to the first that differs from the choice before it.
    for first in range(0, sequences, SEQUENCES_AT_ONCE):
        sequence = first + tl.arange(0, SEQUENCES_AT_ONCE)
        there = sequence < sequences
        start = tl.load(starts_ptr + sequence, mask=there, other=0).to(tl.int64)
        drafts = tl.load(starts_ptr + sequence + 1, mask=there, other=0).to(tl.int64) - start - 1  # [64]
        right = tl.zeros((SEQUENCES_AT_ONCE,), tl.int32)
        for draft in range(0, most - 1):
            # A sequence goes on while all of its drafts so far were right.
            goes_on = there & (right == draft) & (drafts > draft)
            own = tl.load(chosen_ptr + start + draft, mask=goes_on, other=-1, cache_modifier=".cg")
            drafted = tl.load(tokens_ptr + start + draft + 1, mask=goes_on, other=-2).to(tl.int32)
            right += (own == drafted).to(tl.int32)
        tl.store(accepted_ptr + sequence, right, mask=there)
