"""Every operator of a decoder in plain torch: the specification of the Triton and native ones, and what runs on a CPU.

Rule: an operator returns new tensors and changes no argument, but for the caches of `write_kv`. Elementwise work is
done in float32 and rounded once to the type of its first argument. Cache memory that nobody wrote changes nothing.

R rows (tokens), C columns (hidden size), H query heads, K KV heads, D head size, S sequences, B longest block table,
L rows to sample, V vocabulary.

A cache is [blocks, block size, K, D] per layer, of 16 or 32 bits, or of codes in FP8 or int8. Position p of sequence s
lives in block `tables[s, p // block size]`, slot `p % block size`; table entries beyond a sequence's end are -1. A row
at position -1 is padding: nothing is written for it and its attention is 0.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kernels.step import Adjustments, Logprobs
from kernels.weight4 import Weight4, dequantised
from kernels.weight8 import KINDS, Rows8, Weight8, dequantised8, nearest, quantised_rows8

GREEDY_BELOW = 1e-5
LARGEST_V = 1 - 2**-24

# Positions that attention sums at once, from position 0 on: wide enough for a matrix product, small enough for a cache.
ATTENTION_TILE = 256


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [R, C] times the transpose of weight [outputs, C]: [R, outputs]."""
    return F.linear(x, weight)


def linear4(x: Tensor, weight: Weight4) -> Tensor:
    """x [R, C] times the transpose of a matrix [outputs, C] of four bits, in float64, rounded once: [R, outputs]."""
    return F.linear(x.double(), dequantised(weight)).to(x.dtype)


def linear8(x: Rows8, weight: Weight8, kind: torch.dtype) -> Tensor:
    """x [R, C] times the transpose of weight [outputs, C], in float64, rounded once to `kind`: [R, outputs]."""
    return F.linear(dequantised8(x), dequantised8(weight)).to(kind)


def quantise8(x: Tensor, kind: torch.dtype, blocks: bool) -> Rows8:
    """Rows of x [R, C] in codes of `kind`, with one scale for each row, or one for 128 columns of it."""
    return quantised_rows8(x, kind, blocks)


def rms_norm_quantise8(x: Tensor, weight: Tensor, epsilon: float, kind: torch.dtype, blocks: bool) -> Rows8:
    """The norm of x [R, C], quantised as it is in float32."""
    return quantised_rows8(rms_norm(x.float(), weight, epsilon), kind, blocks)


def add_rms_norm_quantise8(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, kind: torch.dtype, blocks: bool
) -> tuple[Rows8, Tensor]:
    """The sum x + residual [R, C], rounded to its type, and the norm of that, quantised: (codes, sum)."""
    total = (x.float() + residual.float()).to(residual.dtype)
    return rms_norm_quantise8(total, weight, epsilon, kind, blocks), total


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Each row of x [R, C] over its root mean square, times weight [C]."""
    wide = x.float()
    scale = 1.0 / torch.sqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * scale * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The sum x + residual [R, C], rounded to its type, and the norm of that: (normed, sum)."""
    total = (x.float() + residual.float()).to(residual.dtype)
    return rms_norm(total, weight, epsilon), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Each row of x [R, C] less its mean, over its standard deviation, times weight [C], plus bias [C]."""
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    scale = 1.0 / torch.sqrt(centred.square().mean(-1, keepdim=True) + epsilon)
    return (centred * scale * weight.float() + bias.float()).to(x.dtype)


def rotary_tables(
    frequencies: list[float], positions: int, device: torch.device | str = "cpu", magnitude: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [positions, pairs] of angles in float64, position times radians per position.

    Times `magnitude`, rounded once, to float32.
    """
    per_position = torch.tensor(frequencies, dtype=torch.float64)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), per_position)  # [positions, pairs]
    return (angles.cos() * magnitude).float().to(device), (angles.sin() * magnitude).float().to(device)


def rotary(
    queries: Tensor, keys: Tensor, positions: Tensor, cosines: Tensor, sines: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Queries [R, H, D] and keys [R, K, D] turned by the angles of their positions [R].

    The tables [positions, pairs] say how many pairs turn; elements of a head beyond 2 * pairs pass. `interleaved` pairs
    element 2i with 2i + 1, otherwise i goes with i + pairs.
    """
    rows = positions.clamp(min=0).long()
    cosine, sine = cosines[rows].unsqueeze(1), sines[rows].unsqueeze(1)  # [R, 1, pairs]
    return _turned(queries, cosine, sine, interleaved), _turned(keys, cosine, sine, interleaved)


def _turned(heads: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool) -> Tensor:
    pairs = cosine.shape[-1]
    turning = heads[..., : 2 * pairs].float()
    if interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
    else:
        a, b = turning[..., :pairs], turning[..., pairs:]
    first, second = a * cosine - b * sine, b * cosine + a * sine
    turned = torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), -1)
    return torch.cat((turned.to(heads.dtype), heads[..., 2 * pairs :]), -1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all [R, width]."""
    wide = gate.float()
    return (wide / (1.0 + torch.exp(-wide)) * up.float()).to(gate.dtype)


def clamped_swiglu(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    """gate * sigmoid(alpha * gate) * (up + 1), all [R, width]; gate is at most `limit` and up within -limit..limit."""
    wide, rest = gate.float().clamp(max=limit), up.float().clamp(-limit, limit)
    return (wide / (1.0 + torch.exp(-alpha * wide)) * (rest + 1.0)).to(gate.dtype)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0) squared, [R, width]."""
    return x.float().clamp(min=0.0).square().to(x.dtype)


def routed(logits: Tensor, per_token: int, normalised: bool) -> tuple[Tensor, Tensor]:
    """The experts of each row and their weights, both [R, per_token], from a router's logits [R, experts].

    The largest logits are chosen, of equal ones the lowest id; they come out in ascending order. A weight is a softmax,
    over the chosen where it is `normalised`, else over all experts.
    """
    wide = logits.float()
    chosen = wide.sort(dim=-1, descending=True, stable=True).indices[:, :per_token].sort(dim=-1).values
    if normalised:
        return torch.softmax(wide.gather(1, chosen), -1), chosen
    return torch.softmax(wide, -1).gather(1, chosen), chosen


def write_kv(
    keys: Tensor,
    values: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    tables: Tensor,
    sequences: Tensor,
    positions: Tensor,
    scales: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Store keys and values [R, K, D] of each row at its position [R] of its sequence [R], in one layer's caches.

    With `scales` of keys and of values [blocks, block size, K] each is stored as codes of the caches' 8-bit type, the
    largest magnitude as the largest code. FP8 without scales bounds what lies beyond its range.
    """
    block_size = key_cache.shape[1]
    rows = (positions >= 0).nonzero().squeeze(1)
    at = positions[rows].long()
    blocks = tables[sequences[rows].long(), at // block_size].long()
    slots = at % block_size
    for side, (source, cache) in enumerate(((keys[rows], key_cache), (values[rows], value_cache))):
        if scales is not None:
            codes = quantised_rows8(source.flatten(0, 1), cache.dtype, blocks=False)
            scales[side][blocks, slots] = codes.scales.view(source.shape[:2])
            _bits(cache)[blocks, slots] = _bits(codes.codes).view(source.shape)
        elif cache.dtype in KINDS:
            _bits(cache)[blocks, slots] = _bits(nearest(source.float(), cache.dtype))
        else:
            cache[blocks, slots] = source.to(cache.dtype)


def _bits(codes: Tensor) -> Tensor:
    """Codes of eight bits as whole numbers, which torch can index on any device."""
    return codes.view(torch.int8)


def paged_attention(
    queries: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    tables: Tensor,
    sequences: Tensor,
    positions: Tensor,
    scale: float,
    longest: int | None = None,
    window: int = 0,
    sinks: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal attention of queries [R, H, D] over one layer's caches: row r sees 0..positions[r] of its sequence.

    With a window, only the last `window` of those positions. `sinks` [H], float32: a logit of each head that takes its
    share of the softmax and has no value. `scales` of keys and of values as `write_kv` leaves them.

    Softmax of scale * q.k in float32, summed over tiles of ATTENTION_TILE positions in position order, aligned to 0, so
    that the order of a row's sum does not depend on whether it came alone or in a prompt. Runs of rows of one sequence
    with the same number of rows and tiles are computed together. `longest`, the most positions that a row sees, is a
    hint for devices that cannot look.
    """
    output = torch.zeros_like(queries)
    for rows, tiles in _runs_of_equal_shape(sequences, positions, _tile(key_cache.shape[1])):
        owners = tables[sequences[rows[:, 0]].long()]
        output[rows] = _attend(
            queries[rows], key_cache, value_cache, owners, positions[rows], scale, tiles, window, sinks, scales
        )
    return output


def _tile(block_size: int) -> int:
    """Positions of a tile: whole blocks, whatever the block size."""
    return max(1, ATTENTION_TILE // block_size) * block_size


def _runs_of_equal_shape(sequences: Tensor, positions: Tensor, tile: int) -> list[tuple[Tensor, int]]:
    """Row numbers [runs, rows of a run] and tiles, per shape of run. A run: neighbouring rows of one sequence."""
    owners, ends = sequences.tolist(), positions.tolist()
    shapes: dict[tuple[int, int], list[range]] = {}
    start = 0
    for row in range(1, len(owners) + 1):
        if row == len(owners) or owners[row] != owners[start]:
            last = max(ends[start:row])
            if last >= 0:
                shapes.setdefault((row - start, last // tile + 1), []).append(range(start, row))
            start = row
    device = sequences.device
    return [(torch.tensor([*map(list, runs)], device=device), tiles) for (_, tiles), runs in shapes.items()]


def _attend(
    queries: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    tables: Tensor,
    positions: Tensor,
    scale: float,
    tiles: int,
    window: int,
    sinks: Tensor | None,
    scales: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Attention of N runs of n rows each: queries [N, n, H, D], tables [N, B], positions [N, n].

    The G = H / K query heads of a KV head stand below each other: every run has n G rows per KV head.
    """
    runs, count, heads, head_dim = queries.shape
    block_size, kv_heads = key_cache.shape[1:3]
    group = heads // kv_heads
    tile = _tile(block_size)
    furthest = positions.amax(0)  # [n]
    last = int(furthest.max())
    wide = (queries.float() * scale).view(runs, count, kv_heads, group, head_dim)
    wide = wide.permute(2, 0, 1, 3, 4).reshape(kv_heads, runs, count * group, head_dim)  # [K, N, n G, D]
    output = torch.zeros_like(wide)
    maximum = wide.new_full(wide.shape[:-1], torch.finfo(torch.float32).min)  # [K, N, n G]
    total = torch.zeros_like(maximum)
    if sinks is not None:
        maximum[:] = sinks.float().view(kv_heads, 1, group).repeat(1, 1, count)
        total[:] = 1.0

    for start in range(0, tiles * tile, tile):
        # 1. Keys and values of the tile; what lies beyond a run's last position may never have been written.
        end = min(start + tile, last + 1)
        blocks = tables[:, start // block_size : -(-end // block_size)].clamp(min=0).flatten()
        keys, values = (
            _read(cache, None if scales is None else scales[side], blocks).view(runs, -1, kv_heads, head_dim)
            for side, cache in enumerate((key_cache, value_cache))
        )  # [N, T, K, D]
        at = torch.arange(start, start + keys.shape[1], device=queries.device)  # [T]
        unwritten = at > positions.amax(1, keepdim=True)  # [N, T]
        values.masked_fill_(unwritten[:, :, None, None], 0.0)

        # 2. Scores of the rows that reach the tile; the rows before them end in an earlier one.
        first = int((furthest >= start).int().argmax())
        reached = slice(first * group, None)
        ends = positions[:, first:, None]
        unseen = at > ends  # [N, n, T]
        if window:
            unseen |= at <= ends - window
        unseen = unseen.repeat_interleave(group, 1)  # [N, n G, T]
        scores = wide.new_empty(kv_heads, *unseen.shape)  # [K, N, n G, T]
        for head in range(kv_heads):
            torch.bmm(wide[head, :, reached], keys[:, :, head].transpose(1, 2), out=scores[head])
        scores.masked_fill_(unseen, -torch.inf)

        # 3. Added to what the tiles before gave. The maximum is finite, so a row that sees nothing gets weights of 0.
        before = maximum[:, :, reached]
        new = torch.maximum(before, scores.amax(-1))
        weights = scores.sub_(new.unsqueeze(-1)).exp_()
        decay = torch.exp(before - new)
        total[:, :, reached] = total[:, :, reached] * decay + weights.sum(-1)
        added = torch.empty_like(wide[:, :, reached], memory_format=torch.contiguous_format)
        for head in range(kv_heads):
            torch.bmm(weights[head], values[:, :, head], out=added[head])
        output[:, :, reached] = output[:, :, reached] * decay.unsqueeze(-1) + added
        maximum[:, :, reached] = new

    output = torch.where(total.unsqueeze(-1) > 0.0, output / total.unsqueeze(-1), 0.0)
    output = output.view(kv_heads, runs, count, group, head_dim).permute(1, 2, 0, 3, 4)
    return output.reshape(runs, count, heads, head_dim).to(queries.dtype)


def _read(cache: Tensor, scales: Tensor | None, blocks: Tensor) -> Tensor:
    """Blocks [N] of a cache in float32 [N, block size, K, D]."""
    if cache.dtype not in KINDS:
        return cache.index_select(0, blocks).float()
    codes = _bits(cache).index_select(0, blocks).view(cache.dtype).float()
    return codes if scales is None else codes * scales.index_select(0, blocks).unsqueeze(-1)


def adjust_logits(logits: Tensor, adjustments: Adjustments) -> Tensor:
    """Logits [L, V] in float32 with some rows shifted and masked as `kernels.step.Adjustments` says."""
    if adjustments.fill is not None:
        adjustments.fill()
    result = logits.float().clone()
    device, vocabulary = result.device, result.shape[1]
    count_rows, shift_rows = (
        torch.from_numpy(np.repeat(adjustments.samples, np.diff(starts)).astype(np.int64)).to(device)
        for starts in (adjustments.count_starts, adjustments.shift_starts)
    )

    def of_row(values: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(np.repeat(values, np.diff(adjustments.count_starts))).to(device)

    # 1. penalties
    if len(count_rows):
        ids, counts = (
            torch.from_numpy(values.astype(np.int64)).to(device) for values in (adjustments.counted, adjustments.counts)
        )
        x, repetition = result[count_rows, ids], of_row(adjustments.repetition)
        x = torch.where(x > 0, x / repetition, x * repetition)
        x = torch.where(counts > 0, x - of_row(adjustments.frequency) * counts.float(), x)
        result[count_rows, ids] = torch.where(counts > 0, x - of_row(adjustments.presence), x)

    # 2. shifts
    if len(shift_rows):
        ids = torch.from_numpy(adjustments.shifted.astype(np.int64)).to(device)
        result[shift_rows, ids] += torch.from_numpy(adjustments.shifts).to(device)

    # 3. masks
    masked = np.flatnonzero(adjustments.mask_of >= 0)
    if masked.size:
        words = torch.from_numpy(adjustments.masks[adjustments.mask_of[masked]].view(np.int32)).to(device)  # [K, W]
        bits = (words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=device)) & 1
        allowed = bits.flatten(1)[:, :vocabulary].bool()
        if allowed.shape[1] < vocabulary:
            allowed = torch.nn.functional.pad(allowed, (0, vocabulary - allowed.shape[1]))
        rows = torch.from_numpy(adjustments.samples[masked].astype(np.int64)).to(device)
        result[rows] = result[rows].masked_fill(~allowed, -torch.inf)
    return result


def fill_logprobs(logprobs: Logprobs, logits: Tensor, chosen: Tensor) -> None:
    """`kernels.logprobs.fill` on a device: raw logits [L, V], chosen tokens [L]."""
    device = logits.device
    samples, targets = (torch.from_numpy(values).to(device).long() for values in (logprobs.samples, logprobs.targets))
    asked = logits[samples].float()  # [P, V]
    logs = torch.log_softmax(asked.double(), -1)
    targets = torch.where(targets >= 0, targets, chosen[samples].long())[:, None]
    own = asked.gather(1, targets)
    ids = torch.arange(asked.shape[1], device=device)
    before = (asked > own) | ((asked == own) & (ids < targets))
    logprobs.of_target[:] = logs.gather(1, targets)[:, 0].float().cpu().numpy()
    logprobs.ranks[:] = (1 + before.sum(-1)).int().cpu().numpy()
    if most := logprobs.top_ids.shape[1]:
        ranked = asked.sort(dim=-1, descending=True, stable=True).indices[:, :most]
        logprobs.top_ids[:] = ranked.int().cpu().numpy()
        logprobs.top[:] = logs.gather(1, ranked).float().cpu().numpy()


def mask_logits(logits: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Logits [L, V] in float32 with minus infinity at every id that a row's masks drop; all parameters [L].

    Ids are ranked by logits / T, largest first, equal ones by id; each mask works on what the one before has left.
    top_k (0: off) keeps the first k ranks. top_p (1: off) keeps the ranks before which less than top_p of the
    probability lies. min_p (0: off) keeps ids at least min_p times as likely as the first. The first rank always stays.
    Rows with a temperature below GREEDY_BELOW pass: their masks would keep the largest anyway.
    """
    logits = logits.float()
    masked = (temperatures >= GREEDY_BELOW) & ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0))
    rows = masked.nonzero().squeeze(1)
    if rows.numel() == 0:
        return logits
    scaled = logits[rows] / temperatures[rows, None]  # [M, V]
    ranked, ids = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    limit = torch.where(top_k[rows] > 0, top_k[rows].long(), logits.shape[1])
    keep = rank < limit[:, None]
    relative = torch.exp(ranked.double() - ranked[:, :1].double()).masked_fill(~keep, 0.0)
    cumulative = relative.cumsum(-1)
    share = top_p[rows, None].double()
    keep &= (share >= 1.0) | (cumulative - relative < share * cumulative[:, -1:])
    keep &= relative >= min_p[rows, None].double()
    keep[:, 0] = True
    result = logits.clone()
    result[rows] = result[rows].masked_fill(~torch.zeros_like(keep).scatter(1, ids, keep), -torch.inf)
    return result


def sample(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """The chosen token [L], int32, of masked logits [L, V]: the largest logits / T + noise, the lowest id of a tie.

    Seeds [L] are uint64, or int64 with the same bits; positions [L] are those the new tokens will have. Below
    GREEDY_BELOW there is neither division nor noise. The caller excludes NaN and rows of nothing but minus infinity.
    """
    scores = _scores(logits, temperatures, seeds, positions)
    # torch.argmax may return any of several equal maxima.
    best = scores.amax(-1, keepdim=True)
    ids = torch.arange(scores.shape[1], device=scores.device)
    return torch.where(scores == best, ids, scores.shape[1]).amin(-1).clamp(max=scores.shape[1] - 1).int()


def race(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """As `sample`, the best `places` in order [L, places]: ids, int32, and scores. -1 for what may not be chosen."""
    scores, ids = _scores(logits, temperatures, seeds, positions).sort(stable=True, dim=-1, descending=True)
    scores, ids = F.pad(scores, (0, places), value=-torch.inf), F.pad(ids, (0, places), value=-1)
    scores, ids = scores[:, :places], ids[:, :places].int()
    return torch.where(scores > -torch.inf, ids, -1), scores


def widened(logits: Tensor, ids: tuple[int, ...] | None, vocabulary: int) -> Tensor:
    """Logits [L, H] of a trimmed head as logits [L, V]: ids it does not know cannot be chosen."""
    if ids is None:
        return logits
    wide = logits.new_full((len(logits), vocabulary), -torch.inf)
    wide[:, torch.tensor(ids, device=logits.device)] = logits
    return wide


def _scores(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """What a choice compares [L, V], in float32."""
    scores = logits.float()
    rows = (temperatures >= GREEDY_BELOW).nonzero().squeeze(1)
    if rows.numel():
        scores = scores.clone()
        noise = gumbel(seeds[rows], positions[rows], scores.shape[1])
        scores[rows] = scores[rows] / temperatures[rows, None] + noise
    return scores


def gumbel(seeds: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """g = -log(-log1p(-v)) [L, V] in float32 of every token id: logarithms in float64, rounded once."""
    v = uniform(seeds, positions, vocabulary).double()
    return (-torch.log(-torch.log1p(-v))).float()


def uniform(seeds: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """v = min((float32(x >> 8) + 0.5) * 2^-24, 1 - 2^-24) [L, V], with x the first word of Philox.

    Small v is large noise.
    """
    x = philox(seeds, positions, vocabulary)
    return (((x >> 8).float() + 0.5) * 2.0**-24).clamp(max=LARGEST_V)


def philox(seeds: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """Word 0 of Philox4x32-10 [L, V], 32 bits in an int64: counter (id, position low, position high, 0), key seed."""
    low = 0xFFFFFFFF
    seeds, positions = seeds.view(torch.int64)[:, None], positions.long()[:, None]
    k0, k1 = seeds & low, (seeds >> 32) & low
    a = torch.arange(vocabulary, device=seeds.device)[None, :]
    b, c, d = positions & low, (positions >> 32) & low, torch.zeros_like(positions)
    for _ in range(10):
        # The products wrap in 64 bits; a shift that drags the sign along is masked.
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = ((second >> 32) & low) ^ b ^ k0, second & low, ((first >> 32) & low) ^ d ^ k1, first & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return a.expand(seeds.shape[0], vocabulary)


def count_accepted(chosen: Tensor, tokens: Tensor, starts: Tensor, most: int) -> Tensor:
    """How many drafted tokens of each sequence the target would have chosen itself, int32 [S].

    Sequence s owns rows starts[s]..starts[s + 1] - 1, at least one and at most `most`. `tokens` [L] is what stood in
    each row: first the last known token, then the draft. `chosen` [L] is what the target chose after each. A draft is
    accepted while it equals the choice of the row before it; the choice after the last accepted is the next token.
    """
    first, rows = starts[:-1].long(), starts[1:].long() - starts[:-1].long()
    draft = torch.arange(max(0, most - 1), device=chosen.device)  # [n]
    exists = draft < rows[:, None] - 1  # [S, n]
    before = torch.where(exists, first[:, None] + draft, 0)
    equal = exists & (chosen[before] == tokens[torch.where(exists, before + 1, 0)])
    return equal.int().cumprod(-1).sum(-1).int()
