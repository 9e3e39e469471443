"""What the native step computes, bit for bit, in slow and plain numpy: the recipe "int8-g32/1".

One row at a time, so nothing can depend on what stands beside it. Every operation on numbers is one correctly rounded
float32 operation; `fma` is a fused multiply-add; integer dots are exact.

    embedding   scale * q, or fma(scale, q, minimum)
    norm        (x * (1 / sqrt(mean of squares + epsilon))) * weight; squares by fma into 16 lanes (element i in lane
                i % 16, ascending), lanes added in a tree
                layer norms: x less its mean, taken in such lanes; then as above, and the bias added
    activations int8 per group of 32: step = largest magnitude / 127, q = x / step rounded to even; a group whose step
                is below the smallest normal number is zero
    linear      groups ascending: acc = fma(scale * step, dot, acc), and with minima acc = fma(minimum, step * sum(q),
                acc); Q4_0 is Q4_1 with the minimum -8 * scale, Q5_0 is Q5_1 with -16 * scale; Q6_K's scales of
                halves of a group belong to its integers
                float weights: inputs ascending, acc = fma(weight, x, acc)
    bias        added to the product
    heads       some families normalise each head of q and k, as the norm above, before it turns
    rotary      (a cos - b sin, a sin + b cos), angles in float64, cosines and sines (times YaRN's
                magnitude) rounded once
    KV cache    fp16, clamped to +-65504, keys after rotation
    attention   query scaled by 1 / sqrt(head_dim); score = chain of fma over even dimensions + chain over odd ones;
                p = exponential(score - largest); total in 16 lanes (token t in lane t % 16), tree;
                out = (chain of fma over tokens) * (1 / total)
                a window hides positions: their p is 0, and they are no part of the largest score
                a head's sink is one more score: it may be the largest, and total + exponential(sink - largest) is
                the total
                int8, fp8: score and p are multiplied by the step of the token's key and value
    mlp         gate / (1 + exponential(-gate)) * up; without a gate up * (the larger of up and 0)
                clamped: gate at most the limit, up within it; gate / (1 + exponential(-(alpha * gate))) * (up + 1)
    experts     the router is a linear; its largest logits are chosen, of equal ones the lower expert;
                p = exponential(logit - largest), of those not chosen 0 where weights are normalised;
                weight = p / total, the total in 16 lanes (expert e in lane e % 16) and a tree;
                the chosen in ascending order: mixed = fma(weight, mlp of the expert, mixed), from 0
    residual    float32; hidden: final norm; logits: linear behind it

Two more recipes store a number of the KV cache in a byte, "int8-g32/1+kv-int8" and "int8-g32/1+kv-fp8":

    spread      keys, and queries behind their scale: Hadamard transform of each w numbers, w the largest power of two
                that divides head_dim, stages (a + b, a - b) of distance 1, 2, 4, ...; then
                keys * 2**-floor(log2(w) / 2) and queries * 2**-ceil(log2(w) / 2)
    int8        clamped to +-65504; step = largest magnitude / 127 of a token's key, or value, in one head; x / step
                rounded to even, and a step below the smallest normal number counts as 0
    fp8         e4m3, clamped to +-448, rounded to even; the number is taken as 1 / 256 of its value and its step as 256

Some rows' logits are shifted and masked as `kernels/adjust.py` says; then tokens are chosen as `shared/noise.py`
says.
"""

import math

import numpy as np
from numpy.typing import NDArray

from kernels.checkpoint import Checkpoint
from kernels.config import ClampedSwiglu, Experts
from kernels.native.as_blocks import AsBlocks
from kernels.native.grids import GROUP, taken_apart
from kernels.step import StepInputs

Floats = NDArray[np.float32]

LANES = 16
BLOCK_SIZE_TOKENS = 16
LARGEST_HALF = np.float32(65504)
LARGEST_FP8 = np.float32(448)

_ONE = np.float32(1)


class SpecifiedDecoder:
    """The logits of the recipe. Milliseconds per row on a tiny model, minutes on a real one."""

    def __init__(self, checkpoint: Checkpoint, *, blocks: int, kv_format: str = "fp16") -> None:
        config = self.config = checkpoint.config
        self._weights = {name: read_weights(*AsBlocks(checkpoint).raw(name)) for name in checkpoint.names()}
        self._frequencies = config.rope_frequencies()
        self._stored = {"fp16": as_half, "int8": as_int8, "fp8": as_fp8}[kv_format]
        self._spreads = kv_format != "fp16"
        shape = (config.layers, blocks, BLOCK_SIZE_TOKENS, config.kv_heads, config.head_dim + 1)
        self._keys, self._values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)

    def logits(self, inputs: StepInputs) -> Floats:
        """As `NativeDecoder.logits`; fills `hidden` too."""
        wanted = set(inputs.sample_rows.tolist())
        places = {} if inputs.hidden is None else {row: at for at, row in enumerate(inputs.hidden.rows.tolist())}
        found = []
        for sequence in range(len(inputs.sequence_starts) - 1):
            for row in range(inputs.sequence_starts[sequence], inputs.sequence_starts[sequence + 1]):
                x = self._layers(int(inputs.tokens[row]), int(inputs.positions[row]), inputs.block_tables[sequence])
                if inputs.hidden is not None and row in places:
                    inputs.hidden.values[places[row]] = self._normed(x, "norm")
                if row in wanted:
                    head = self._weights.get("head.weight", self._weights["embedding.weight"])
                    found.append(head.times(self._normed(x, "norm")))
        return np.array(found, np.float32).reshape(len(found), self.config.head_size)

    def _layers(self, token: int, position: int, table: NDArray[np.int32]) -> Floats:
        config = self.config
        x = self._weights["embedding.weight"].row(token)
        angles = [position * frequency for frequency in self._frequencies]
        magnitude = float(np.float32(config.rope_magnitude))
        cosines = np.array([math.cos(angle) * magnitude for angle in angles]).astype(np.float32)
        sines = np.array([math.sin(angle) * magnitude for angle in angles]).astype(np.float32)
        for layer in range(config.layers):

            def linear(name: str, inputs: Floats, layer: int = layer) -> Floats:
                product = self._weights[f"layers.{layer}.{name}.weight"].times(inputs)
                bias = self._weights.get(f"layers.{layer}.{name}.bias")
                return product if bias is None else product + bias.row(0)

            normed = self._normed(x, f"layers.{layer}.attention_norm")
            q, k, v = (linear(f"attention.{name}", normed).reshape(-1, config.head_dim) for name in "qkv")
            if config.qk_norm:
                q, k = (
                    np.stack([self._normed(head, f"layers.{layer}.attention.{name}_norm") for head in heads])
                    for name, heads in (("q", q), ("k", k))
                )
            q, k = (rotated(heads, cosines, sines, config.rope_interleaved) for heads in (q, k))
            place = layer, table[position // BLOCK_SIZE_TOKENS], position % BLOCK_SIZE_TOKENS
            q = q * np.float32(1 / math.sqrt(config.head_dim))
            if self._spreads:
                q, k = spread(q), spread(k, is_key=True)
            self._keys[place], self._values[place] = self._stored(k), self._stored(v)
            blocks = table[: position // BLOCK_SIZE_TOKENS + 1]
            keys, values = (
                cache[layer, blocks].reshape(-1, config.kv_heads, config.head_dim + 1)[: position + 1]
                for cache in (self._keys, self._values)
            )
            kv_heads = [head // config.heads_per_kv_head for head in range(config.heads)]
            window = config.window(layer)
            first = max(0, position - window + 1) if window else 0
            sinks = self._weights[f"layers.{layer}.attention.sinks.weight"].row(0) if config.sinks else None
            out = [
                attended(q[head], keys[:, kv], values[:, kv], first, None if sinks is None else sinks[head])
                for head, kv in enumerate(kv_heads)
            ]
            x = x + linear("attention.o", np.concatenate(out))
            normed = self._normed(x, f"layers.{layer}.mlp_norm")

            def mlp(name: str, normed: Floats = normed) -> Floats:
                up = linear(f"{name}.up", normed)
                if not config.gated:
                    return linear(f"{name}.down", up * np.maximum(up, np.float32(0)))
                clamped = config.experts.clamped if config.experts else None
                return linear(f"{name}.down", swiglu(linear(f"{name}.gate", normed), up, clamped))

            if config.experts is not None and config.is_mixture(layer):
                mixed = np.zeros(config.hidden, np.float32)
                for expert, weight in routed(linear("router", normed), config.experts):
                    mixed = fma(weight, mlp(f"experts.{expert}"), mixed)
                x = x + mixed
            else:
                x = x + mlp("mlp")
        return x

    def _normed(self, x: Floats, name: str) -> Floats:
        bias = self._weights.get(f"{name}.bias")
        if bias is not None:
            x = x - lane_sums(x, np.ones_like(x)) / np.float32(len(x))
        squares = lane_sums(x, x)
        scale = _ONE / np.sqrt(squares / np.float32(len(x)) + np.float32(self.config.norm_eps))
        normed: Floats = x * scale * self._weights[f"{name}.weight"].row(0)
        return normed if bias is None else normed + bias.row(0)


class Grid:
    """Quantised weights: scale * q + minimum per group of 32 inputs."""

    def __init__(self, q: NDArray[np.int32], scale: Floats, minimum: Floats | None) -> None:
        self.q, self.scale, self.minimum = q, scale, minimum  # [outputs, groups, 32], [outputs, groups]

    def times(self, x: Floats) -> Floats:
        acc = np.zeros(len(self.q), np.float32)
        for group, values in enumerate(x.reshape(-1, GROUP)):
            q, step = quantised(values)
            acc = fma(self.scale[:, group] * step, (self.q[:, group] @ q).astype(np.float32), acc)
            if self.minimum is not None:
                acc = fma(self.minimum[:, group], step * np.float32(q.sum()), acc)
        return acc

    def row(self, index: int) -> Floats:
        q, scale = self.q[index].astype(np.float32), self.scale[index][:, None]
        return (scale * q if self.minimum is None else fma(scale, q, self.minimum[index][:, None])).reshape(-1)


class Plain:
    """Weights in a float format."""

    def __init__(self, weights: Floats) -> None:
        self.weights = weights  # [outputs, inputs]

    def times(self, x: Floats) -> Floats:
        acc = np.zeros(len(self.weights), np.float32)
        for column, value in zip(self.weights.T, x, strict=True):
            acc = fma(column, value, acc)
        return acc

    def row(self, index: int) -> Floats:
        row: Floats = self.weights[index]
        return row


def read_weights(kind: str, rows: NDArray[np.uint8]) -> Grid | Plain:
    """A tensor's stored bytes as numbers; `kind` and the layout of a block are GGML's."""
    if kind in ("F32", "F16"):
        return Plain(np.ascontiguousarray(rows).view(np.float32 if kind == "F32" else np.float16).astype(np.float32))
    if kind == "BF16":
        return Plain((np.ascontiguousarray(rows).view(np.uint16).astype(np.uint32) << 16).view(np.float32))
    grid = taken_apart(kind, rows)
    q = grid.codes.astype(np.int32)
    if grid.halves is not None:
        q *= np.repeat(grid.halves.astype(np.int32), GROUP // 2, -1)
    return Grid(q, grid.scales, grid.minima)


def quantised(values: Floats) -> tuple[NDArray[np.int32], np.float32]:
    """One group of 32 as (q, step)."""
    step = np.abs(values).max() / np.float32(127)
    if step < np.finfo(np.float32).tiny:
        return np.zeros(GROUP, np.int32), np.float32(0)
    return np.rint(values / step).astype(np.int32), step


def swiglu(gate: Floats, up: Floats, clamped: ClampedSwiglu | None) -> Floats:
    """What an MLP with a gate hands to its down projection."""
    if clamped is None:
        return gate / (_ONE + exponential(-gate)) * up
    alpha, limit = np.float32(clamped.alpha), np.float32(clamped.limit)
    gate, up = np.minimum(gate, limit), np.maximum(np.minimum(up, limit), -limit)
    return gate / (_ONE + exponential(-(alpha * gate))) * (up + _ONE)


def routed(logits: Floats, experts: Experts) -> list[tuple[int, np.float32]]:
    """The chosen experts of a row, ascending, and their weights."""
    chosen = np.sort(np.argsort(-logits, kind="stable")[: experts.per_token])
    shares = exponential(logits - logits.max())
    if experts.normalised:
        shares[np.setdiff1d(np.arange(experts.count), chosen)] = 0
    total = lane_sums(shares, np.ones_like(shares))
    return [(int(expert), np.float32(shares[expert] / total)) for expert in chosen]


def rotated(heads: Floats, cosines: Floats, sines: Floats, interleaved: bool) -> Floats:
    """Heads [..., head_dim] turned by one position's angles."""
    pairs = len(cosines)
    first, second = (
        (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved else (slice(pairs), slice(pairs, 2 * pairs))
    )
    a, b = heads[..., first], heads[..., second]
    turned = heads.copy()
    turned[..., first], turned[..., second] = a * cosines - b * sines, a * sines + b * cosines
    return turned


def spread(heads: Floats, *, is_key: bool = False) -> Floats:
    """The Hadamard transform of heads [heads, head_dim], and this side's share of its scale."""
    head_dim = heads.shape[-1]
    width = head_dim & -head_dim
    stages = width.bit_length() - 1
    x = heads.reshape(-1, width)
    for stage in range(stages):
        pairs = x.reshape(len(x), -1, 2, 1 << stage)
        x = np.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), 2).reshape(len(x), width)
    share = stages // 2 if is_key else stages - stages // 2
    turned: Floats = (x * np.float32(2.0**-share)).reshape(heads.shape)
    return turned


def as_half(heads: Floats) -> Floats:
    """Heads [heads, head_dim] as the cache gives them back: [heads, head_dim + 1], numbers and their step."""
    return _with_steps(np.clip(heads, -LARGEST_HALF, LARGEST_HALF).astype(np.float16), np.ones(len(heads), np.float32))


def as_int8(heads: Floats) -> Floats:
    """As `as_half`, in int8."""
    heads = np.clip(heads, -LARGEST_HALF, LARGEST_HALF)
    steps = np.abs(heads).max(-1) / np.float32(127)
    steps[steps < np.finfo(np.float32).tiny] = 0
    return _with_steps(np.rint(heads / np.where(steps, steps, np.float32(np.inf))[:, None]), steps)


def as_fp8(heads: Floats) -> Floats:
    """As `as_half`, in e4m3."""
    heads = np.clip(heads, -LARGEST_FP8, LARGEST_FP8)
    exponents = np.maximum(np.frexp(heads)[1] - 1, -6)
    units = np.ldexp(_ONE, exponents - 3)  # three bits of fraction
    return _with_steps(np.rint(heads / units) * units / np.float32(256), np.full(len(heads), 256, np.float32))


def _with_steps(numbers: NDArray[np.generic], steps: Floats) -> Floats:
    return np.concatenate((numbers.astype(np.float32), steps[:, None]), -1)


def attended(
    query: Floats, keys: Floats, values: Floats, first: int = 0, sink: np.float32 | None = None
) -> Floats:
    """One query head over keys and values [tokens, head_dim + 1] of its positions from 0 on; steps come last.

    It sees those from `first` on.
    """
    chains = []
    for parity in (0, 1):
        chain = np.zeros(len(keys), np.float32)
        for dimension in range(parity, len(query), 2):
            chain = fma(query[dimension], keys[:, dimension], chain)
        chains.append(chain)
    scores = (chains[0] + chains[1]) * keys[:, -1]
    largest = scores[first:].max()
    if sink is not None:
        largest = np.maximum(largest, sink)
    weights = exponential(scores - largest)
    weights[:first] = 0
    out = np.zeros(len(query), np.float32)
    for weight, value in zip(weights * values[:, -1], values[:, :-1], strict=True):
        out = fma(weight, value, out)
    total = lane_sums(weights, np.ones_like(weights))
    if sink is not None:
        total = total + exponential(np.array([sink - largest], np.float32))[0]
    return out * (_ONE / total)


def exponential(x: Floats) -> Floats:
    """e^x with x clamped to [-87, 88]: a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2]."""
    x = np.maximum(np.minimum(x, np.float32(88)), np.float32(-87))
    n = np.rint(x * np.float32(1.44269504))
    r = fma(n, np.float32(-0.693359375), x)
    r = fma(n, np.float32(2.12194440e-4), r)
    total = np.full_like(r, np.float32(1 / 720))
    for coefficient in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        total = fma(total, r, np.float32(coefficient))
    powers: Floats = np.ldexp(_ONE, n.astype(np.int32)).astype(np.float32)
    return total * powers


def lane_sums(x: Floats, y: Floats) -> np.float32:
    """The sum of x * y: element i into lane i % 16 by fma, then lanes i and i + 8, i + 4, i + 2, i + 1."""
    padding = -len(x) % LANES
    lanes = np.zeros(LANES, np.float32)
    for a, b in zip(
        np.pad(x, (0, padding)).reshape(-1, LANES), np.pad(y, (0, padding)).reshape(-1, LANES), strict=True
    ):
        lanes = fma(a, b, lanes)
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = lanes[:half] + lanes[half:]
    return np.float32(lanes[0])


def fma(x: Floats | np.float32, y: Floats | np.float32, z: Floats | np.float32) -> Floats:
    """x * y + z rounded once.

    The product is exact in float64. The sum is rounded to odd there (if inexact, the neighbour with an odd last bit),
    so that rounding it again to float32 gives what one rounding would have given.
    """
    product = np.asarray(x, np.float64) * np.asarray(y, np.float64)
    addend = np.asarray(z, np.float64)
    total = np.asarray(product + addend)
    back = total - product
    error = (product - (total - back)) + (addend - back)
    bits = total.view(np.int64)
    inexact_even = (error != 0) & (bits & 1 == 0)
    away = (error > 0) == (total > 0)
    return (bits + np.where(inexact_even, np.where(away, 1, -1), 0)).view(np.float64).astype(np.float32)
