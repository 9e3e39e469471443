"""Choosing tokens on the device: keyed Gumbel noise, argmax over a large vocabulary, and the count of accepted drafts.

Rule: token = argmax over ids v of logits[v] / T + G(seed, position, v); T = 0 has no noise; ties go to the lowest id.
The noise of a token id depends on the seed, the position the new token will have and the id, never on a row or a tile.
Masks (top-k, top-p, min-p, grammar) rewrite logits to -inf before this; they do not change anybody's noise.
Reference: `reference.sample`; `shared/noise.py` is the numpy specification of the noise.

Two kernels for sampling: every (row, tile of ids) finds its best score and id, then every row finds the best of its
tiles. A maximum is exact, so the tile is free. v matches the specification bit for bit; the error of g is stated at
`_gumbel`.

L rows to sample, V vocabulary, N ids of a tile, P tiles.
"""

import torch
import triton
import triton.language as tl

from kernels import tuning
from kernels.launch import Launch, launch

GREEDY_BELOW = tl.constexpr(1e-5)
LARGEST_V = tl.constexpr(0.999999940395355224609375)  # 1 - 2^-24


def sample(
    logits: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """The token of each row of `logits` [L, V], int32 [L].

    temperatures [L] float32, below 1e-5 greedy; seeds [L] uint64 (or int64 with the same bits); positions [L] int64,
    that of the new token. Logits of minus infinity are never chosen. The caller excludes NaN and rows that are minus
    infinity throughout.
    """
    rows, vocabulary = logits.shape
    choice = tuning.SAMPLING
    tiles = -(-vocabulary // choice.block)
    scores = logits.new_empty((rows, tiles), dtype=torch.float32)
    ids = logits.new_empty((rows, tiles), dtype=torch.int32)
    chosen = logits.new_empty((rows,), dtype=torch.int32)
    launch(
        _best_of_tile,
        (rows, tiles),
        *(logits, temperatures, seeds.view(torch.int64), positions, scores, ids),
        *(vocabulary, tiles, logits.stride(0)),
        choice=choice,
        TILE=choice.block,
    )
    launch(
        _best_of_row,
        (rows,),
        *(scores, ids, chosen, tiles),
        choice=Launch(tiles, num_warps=1),
        TILES_PADDED=tuning.padded(tiles),
    )
    return chosen


def count_accepted(chosen: torch.Tensor, tokens: torch.Tensor, starts: torch.Tensor, most: int) -> torch.Tensor:
    """How many drafted tokens of each sequence the target would have chosen itself, int32 [S].

    Sequence s owns rows starts[s]..starts[s + 1] - 1, at least one and at most `most`. `tokens` [L] is what stood in
    each row: first the last known token, then the draft. `chosen` [L] is what the target chose after each. A draft is
    accepted while it equals the choice of the row before it; the choice after the last accepted one is the next token.
    """
    sequences = starts.shape[0] - 1
    counts = chosen.new_empty((sequences,), dtype=torch.int32)
    block = tuning.padded(most)
    launch(
        _count_accepted,
        (sequences,),
        *(chosen, tokens, starts, counts),
        choice=Launch(block, num_warps=1),
        BLOCK=block,
    )
    return counts


@triton.jit
def _philox_first_word(token, position_low, position_high, seed_low, seed_high):
    """Word 0 of Philox4x32-10, all uint32 (Salmon et al. 2011, section 3.3)."""
    multiplier_0 = tl.full((), 0xD2511F53, tl.uint32)
    multiplier_1 = tl.full((), 0xCD9E8D57, tl.uint32)
    step_0 = tl.full((), 0x9E3779B9, tl.uint32)
    step_1 = tl.full((), 0xBB67AE85, tl.uint32)
    word_0 = token
    word_1 = tl.zeros_like(token) + position_low
    word_2 = tl.zeros_like(token) + position_high
    word_3 = tl.zeros_like(token)
    key_0 = seed_low
    key_1 = seed_high
    for _ in tl.static_range(10):
        high_0 = tl.umulhi(word_0, multiplier_0)
        low_0 = word_0 * multiplier_0
        high_1 = tl.umulhi(word_2, multiplier_1)
        low_1 = word_2 * multiplier_1
        word_0 = high_1 ^ word_1 ^ key_0
        word_1 = low_1
        word_2 = high_0 ^ word_3 ^ key_1
        word_3 = low_0
        key_0 = key_0 + step_0
        key_1 = key_1 + step_1
    return word_0


@triton.jit
def _small_uniform(token, position, seed):
    """v in [2^-25, 1 - 2^-24] for ids `token` (uint32), at one int64 position, under one seed (64 bits as int64)."""
    word = _philox_first_word(
        token,
        position.to(tl.uint32),
        (position >> 32).to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    return tl.minimum(((word >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08, LARGEST_V)


@triton.jit
def _gumbel(v):
    """-log(-log1p(-v)) in float32, with the resolution of v kept where v is small (large noise).

    Triton has no log1p outside libdevice. With w = 1 - v rounded, log1p(-v) = log(w) v / (1 - w) up to rounding, since
    1 - w is exact and the errors of w cancel; where w rounds to 1, log1p(-v) = -v. Over all 2^24 values of v, with
    numpy's float32 logarithm: -log1p(-v) within 4.4 ulp, g within 3.3e-7 max(1, |g|).
    """
    w = 1.0 - v
    ratio = tl.div_rn(v, tl.where(w == 1.0, v, 1.0 - w))
    exponential = tl.where(w == 1.0, v, -tl.log(w) * ratio)
    return -tl.log(exponential)


@triton.jit
def _best_of_tile(
    # pointers
    logits_ptr,  # [L, V]
    temperatures_ptr,  # [L] fp32
    seeds_ptr,  # [L] int64
    positions_ptr,  # [L] int64, of the new token
    scores_ptr,  # [L, P] fp32
    ids_ptr,  # [L, P] int32
    # sizes
    vocabulary,
    tiles,
    # strides
    stride_logits,
    # constants
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)

    # 1. The scores: logits, with noise unless greedy.
    ids = tile * TILE + tl.arange(0, TILE)
    source = logits_ptr + row * stride_logits + ids
    scores = tl.load(source, mask=ids < vocabulary, other=float("-inf")).to(tl.float32)  # [N]
    temperature = tl.load(temperatures_ptr + row)
    if temperature >= GREEDY_BELOW:
        position = tl.load(positions_ptr + row)
        seed = tl.load(seeds_ptr + row)
        noise = _gumbel(_small_uniform(ids.to(tl.uint32), position, seed))  # [N]
        scores = tl.div_rn(scores, tl.zeros_like(scores) + temperature) + noise

    # 2. The best of the tile; the lowest id of a tie.
    best, index = tl.max(scores, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(scores_ptr + row * tiles + tile, best)
    tl.store(ids_ptr + row * tiles + tile, tile * TILE + index)


@triton.jit
def _best_of_row(
    # pointers
    scores_ptr,  # [L, P] fp32
    ids_ptr,  # [L, P] int32
    chosen_ptr,  # [L]
    # sizes
    tiles,
    # constants
    TILES_PADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES_PADDED)
    scores = tl.load(scores_ptr + row * tiles + tile, mask=tile < tiles, other=float("-inf"))  # [P]
    # Tiles ascend with their ids, so the leftmost best tile holds the lowest best id.
    _, best = tl.max(scores, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(chosen_ptr + row, tl.load(ids_ptr + row * tiles + best).to(chosen_ptr.dtype.element_ty))


@triton.jit
def _count_accepted(
    # pointers
    chosen_ptr,  # [L]
    tokens_ptr,  # [L]
    starts_ptr,  # [S + 1]
    counts_ptr,  # [S]
    # constants
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    start = tl.load(starts_ptr + sequence).to(tl.int64)
    drafts = tl.load(starts_ptr + sequence + 1).to(tl.int64) - start - 1
    draft = tl.arange(0, BLOCK)
    exists = draft < drafts
    chosen = tl.load(chosen_ptr + start + draft, mask=exists, other=0)  # [BLOCK]
    drafted = tl.load(tokens_ptr + start + draft + 1, mask=exists, other=0)  # [BLOCK]
    # The first draft that differs, or the first that does not exist.
    first_end = tl.min(tl.where(exists & (chosen == drafted), BLOCK, draft), axis=0)
    tl.store(counts_ptr + sequence, first_end.to(tl.int32))
