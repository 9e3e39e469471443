"""The native step's numbers on a machine without a C++ compiler: numpy and torch, some thirty times slower.

Rule: the same recipe, bit for bit (`specification.py`), so a stream may move between a worker with a compiler and one
without, and the same memory: weights as packed as the checkpoint has them, the KV cache in fp16.

A step is vectorised over rows and outputs, never over the terms of a sum: those are `fused.chain`. Up to 64 rows go
through the layers together.
"""

import math
import threading
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.checkpoint import Checkpoint, Raw, open_checkpoint
from kernels.config import ClampedSwiglu
from kernels.native.as_blocks import AsBlocks
from kernels.native.decoder import BLOCK_SIZE_TOKENS, MOST_THREADS, RECIPE, check_sizes, usable_cpus
from kernels.native.fused import Floats, chain, exponential, in_lanes, tree_sum
from kernels.native.inputs import checked
from kernels.native.packed import FLOATS, KINDS, Activations, Matrix, Plain, quantised, stacked
from kernels.native.specification import LARGEST_HALF, routed
from kernels.reference import adjust_logits, fill_logprobs, mask_logits, race, sample, widened
from kernels.step import Hidden, Race, StepInputs, check_places

PASS_ROWS = 64
NOTHING_TO_CHOOSE = (
    "no token can be chosen: some logits are not finite, so the weights are broken, or every id of a row is masked"
)
# Scores of one head that are made at once: rows times tokens. Their terms take 9 MB for 9 heads of 64 dimensions.
TOGETHER = 2048
VALUES_TOGETHER = 64  # tokens of a chain over values whose terms are made at once

_KV_BYTES = 2
_ONE = np.float32(1)


class _Norm(NamedTuple):
    weight: Floats
    bias: Floats | None  # a layer norm's


class _Mlp(NamedTuple):
    gate_up: list[Matrix]
    down: list[Matrix]
    gate_up_bias: Floats | None = None
    down_bias: Floats | None = None


class _Mixture(NamedTuple):
    """Experts in place of an MLP."""

    router: list[Matrix]
    router_bias: Floats | None
    experts: list[_Mlp]


class _Layer(NamedTuple):
    attention_norm: _Norm
    qkv: list[Matrix]
    qkv_bias: Floats | None
    query_norm: _Norm | None
    key_norm: _Norm | None
    sinks: Floats | None  # [heads]
    output: list[Matrix]
    output_bias: Floats | None
    mlp_norm: _Norm
    mlp: _Mlp | _Mixture


class _Rows(NamedTuple):
    """Where the rows of a pass stand."""

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    tables: NDArray[np.int32]  # [R, B] the block table of each row's sequence
    cosines: Floats  # [R, 1, pairs]
    sines: Floats


class UncompiledDecoder:
    """A `kernels.step.Decoder` with the recipe of `NativeDecoder` and its arguments."""

    block_size_tokens = BLOCK_SIZE_TOKENS
    recipe = RECIPE

    def __init__(self, checkpoint: Checkpoint, *, blocks: int, threads: int = 0) -> None:
        """The weights are rearranged and not kept. `threads` are torch's, and change no bit; 0: as `NativeDecoder`.

        Raises ValueError when the model is of a kind that the recipe does not know.
        """
        config = self.config = checkpoint.config
        check_sizes(config, blocks, threads)
        self.vocabulary_size = config.vocabulary
        self.hidden_size = config.hidden
        self.context_length = config.context_length
        self.blocks = blocks
        self.threads = threads or min(usable_cpus(), MOST_THREADS)
        self._busy = threading.Lock()
        self._open = True
        self._place_weights(AsBlocks(checkpoint))
        frequencies, magnitude = config.rope_frequencies(), float(np.float32(config.rope_magnitude))
        self._rotation = lru_cache(1 << 16)(lambda position: _rotation(position, frequencies, magnitude))
        shape = (blocks, config.layers, config.kv_heads)  # memory is taken as blocks are first written
        self._keys = np.zeros((*shape, config.head_dim, BLOCK_SIZE_TOKENS), np.float16)
        self._values = np.zeros((*shape, BLOCK_SIZE_TOKENS, config.head_dim), np.float16)

    @classmethod
    def load(cls, model_path: Path, *, blocks: int | None = None, kv_bytes: int = 256 << 20, threads: int = 0) -> Self:
        """As `NativeDecoder.load`."""
        checkpoint = open_checkpoint(Path(model_path))
        if blocks is None:
            blocks = kv_bytes // (checkpoint.config.kv_bytes_per_token(_KV_BYTES) * BLOCK_SIZE_TOKENS)
        return cls(checkpoint, blocks=blocks, threads=threads)

    def step(self, inputs: StepInputs) -> NDArray[np.int32]:
        """As `NativeDecoder.step`."""
        with self._busy, torch.inference_mode():
            raw = self._raw(inputs)
            sampled = sample(*self._masked(inputs, raw))
            if inputs.logprobs is not None:
                fill_logprobs(inputs.logprobs, raw, sampled)
            chosen: NDArray[np.int32] = sampled.numpy()
            return chosen

    def race(self, inputs: StepInputs, places: int) -> Race:
        """As `NativeDecoder.race`."""
        check_places(places)
        with self._busy, torch.inference_mode():
            tokens, scores = race(*self._masked(inputs, self._raw(inputs)), places)
            return Race(tokens.numpy(), scores.numpy())

    def logits(self, inputs: StepInputs) -> NDArray[np.float32]:
        """As `NativeDecoder.logits`."""
        with self._busy, torch.inference_mode():
            return self._logits(inputs)

    def close(self) -> None:
        """Give the memory back. The decoder cannot be used afterwards."""
        with self._busy:
            if self._open:
                del self._layers, self._head, self._embedding, self._keys, self._values
            self._open = False

    @property
    def block_bytes(self) -> int:
        """As `kernels.step.BlockStore`."""
        size: int = self.config.kv_bytes_per_token(_KV_BYTES) * BLOCK_SIZE_TOKENS
        return size

    def read_block(self, block: int, to: NDArray[np.uint8]) -> None:
        """As `kernels.step.BlockStore`."""
        with self._busy:
            self._check_open()
            for memory, cache in zip(np.split(to, 2), (self._keys, self._values), strict=True):
                np.copyto(memory, cache[block].reshape(-1).view(np.uint8))

    def write_block(self, block: int, data: NDArray[np.uint8]) -> None:
        """As `kernels.step.BlockStore`."""
        with self._busy:
            self._check_open()
            for memory, cache in zip(np.split(data, 2), (self._keys, self._values), strict=True):
                np.copyto(cache[block].reshape(-1).view(np.uint8), memory)

    def _check_open(self) -> None:
        if not self._open:
            raise ValueError("this decoder was closed")

    def _raw(self, inputs: StepInputs) -> Tensor:
        """Logits [L, V], minus infinity for ids that a trimmed head does not know. Raises RuntimeError for NaN."""
        logits = torch.from_numpy(self._logits(inputs))
        peaks = logits.amax(-1)  # NaN where there is one
        if not torch.isfinite(peaks).all():
            raise RuntimeError(NOTHING_TO_CHOOSE)
        return widened(logits, self.config.head_ids, self.vocabulary_size)

    def _masked(self, inputs: StepInputs, wide: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a choice is made from: masked logits [L, V], temperatures, seeds and positions [L]."""
        temperature, top_k, top_p, min_p = (
            torch.from_numpy(np.ascontiguousarray(values))
            for values in (inputs.temperature, inputs.top_k, inputs.top_p, inputs.min_p)
        )
        seeds = torch.from_numpy(inputs.seeds.astype(np.uint64).view(np.int64))
        positions = torch.from_numpy(inputs.positions[inputs.sample_rows].astype(np.int64) + 1)
        if inputs.adjustments is not None:
            wide = adjust_logits(wide, inputs.adjustments)
            if (wide.amax(-1) == -torch.inf).any():
                raise RuntimeError(NOTHING_TO_CHOOSE)
        return mask_logits(wide, temperature, top_k, top_p, min_p), temperature, seeds, positions

    def _logits(self, inputs: StepInputs) -> Floats:
        self._check_open()
        inputs = checked(inputs, self)
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        sequences = np.repeat(np.arange(len(inputs.block_tables)), np.diff(inputs.sequence_starts))
        found = [np.empty((0, self.config.head_size), np.float32)]
        with np.errstate(all="ignore"):
            for first in range(0, len(inputs.tokens), PASS_ROWS):
                here = slice(first, first + PASS_ROWS)
                positions = inputs.positions[here]
                angles = np.array([self._rotation(position) for position in positions.tolist()])  # [R, 2, pairs]
                tables = inputs.block_tables[sequences[here]]
                rows = _Rows(inputs.tokens[here], positions, tables, angles[:, None, 0], angles[:, None, 1])
                x = self._run(rows)
                if inputs.hidden is not None:
                    self._tell(inputs.hidden, x, first)
                wanted = inputs.sample_rows - first
                wanted = wanted[(wanted >= 0) & (wanted < len(x))]
                if wanted.size:
                    found.append(_times(self._head, quantised(self._normed(x[wanted], self._norm))))
        return np.concatenate(found)

    def _tell(self, hidden: Hidden, x: Floats, first: int) -> None:
        """What is asked of the rows from `first` on. Raises RuntimeError for NaN."""
        here = slice(*np.searchsorted(hidden.rows, (first, first + len(x))))
        hidden.values[here] = self._normed(x[hidden.rows[here] - first], self._norm)
        if not np.isfinite(hidden.values[here]).all():
            raise RuntimeError(NOTHING_TO_CHOOSE)

    def _run(self, rows: _Rows) -> Floats:
        """The residual stream [R, hidden] behind the last layer."""
        config, count = self.config, len(rows.tokens)
        x: Floats = self._embedding[0].rows(rows.tokens)
        for number, layer in enumerate(self._layers):
            qkv = _with_bias(_times(layer.qkv, quantised(self._normed(x, layer.attention_norm))), layer.qkv_bias)
            heads = qkv.reshape(count, -1, config.head_dim)
            q, k, v = np.split(heads, (config.heads, config.heads + config.kv_heads), axis=1)
            if layer.query_norm is not None and layer.key_norm is not None:
                q, k = (self._normed_heads(q, layer.query_norm), self._normed_heads(k, layer.key_norm))
            q, k = (_rotated(each, rows.cosines, rows.sines, config.rope_interleaved) for each in (q, k))
            self._write(number, rows, k, v)
            attended = self._attended(number, rows, q * np.float32(1 / math.sqrt(config.head_dim)), layer.sinks)
            x = x + _with_bias(_times(layer.output, quantised(attended.reshape(count, -1))), layer.output_bias)
            normed = quantised(self._normed(x, layer.mlp_norm))
            x = x + (self._fed(layer.mlp, normed) if isinstance(layer.mlp, _Mlp) else self._mixed(layer.mlp, normed))
        return x

    def _fed(self, mlp: _Mlp, x: Activations) -> Floats:
        inner = self._activated(_with_bias(_times(mlp.gate_up, x), mlp.gate_up_bias))
        return _with_bias(_times(mlp.down, quantised(inner)), mlp.down_bias)

    def _mixed(self, mixture: _Mixture, x: Activations) -> Floats:
        """What experts make of their rows, added expert by expert."""
        experts = self.config.experts
        assert experts is not None
        weights = np.zeros((len(x.rows), experts.count), np.float32)
        chosen = np.zeros(weights.shape, np.bool_)
        for row, logits in enumerate(_with_bias(_times(mixture.router, x), mixture.router_bias)):
            for expert, weight in routed(logits, experts):
                weights[row, expert], chosen[row, expert] = weight, True
        mixed = np.zeros((len(x.rows), self.config.hidden), np.float32)
        for expert in np.flatnonzero(chosen.any(0)):
            rows = np.flatnonzero(chosen[:, expert])
            made = self._fed(mixture.experts[expert], x.some(rows))
            mixed[rows] = chain(np.multiply(made, weights[rows, expert, None], dtype=np.float64)[None], mixed[rows])
        return mixed

    def _activated(self, gate_up: Floats) -> Floats:
        """What down reads [R, ffn]."""
        if not self.config.gated:
            squared: Floats = gate_up * np.maximum(gate_up, np.float32(0))
            return squared
        gate, up = np.split(gate_up, 2, axis=1)
        return _swiglu(gate, up, self.config.experts.clamped if self.config.experts else None)

    def _normed(self, x: Floats, norm: _Norm) -> Floats:
        if norm.bias is not None:
            total = tree_sum(np.add.accumulate(in_lanes(x), axis=0)[-1])
            x = x - (total / np.float32(x.shape[-1]))[:, None]
        squares = tree_sum(chain(in_lanes(np.multiply(x, x, dtype=np.float64))))
        scale = _ONE / np.sqrt(squares / np.float32(x.shape[-1]) + np.float32(self.config.norm_eps))
        normed: Floats = x * scale[:, None] * norm.weight
        return normed if norm.bias is None else normed + norm.bias

    def _normed_heads(self, heads: Floats, norm: _Norm) -> Floats:
        """Each head [R, heads, head_dim] by itself."""
        return self._normed(heads.reshape(-1, heads.shape[-1]), norm).reshape(heads.shape)

    def _write(self, layer: int, rows: _Rows, k: Floats, v: Floats) -> None:
        """Keys and values [R, kv heads, head_dim] into the cache."""
        blocks = rows.tables[np.arange(len(rows.positions)), rows.positions // BLOCK_SIZE_TOKENS]
        slots = rows.positions % BLOCK_SIZE_TOKENS
        self._keys[blocks, layer, :, :, slots] = _as_half(k)
        self._values[blocks, layer, :, slots] = _as_half(v)

    def _attended(self, layer: int, rows: _Rows, q: Floats, sinks: Floats | None) -> Floats:
        """Attention of every row [R, heads, head_dim] to what its sequence has in the cache."""
        out = np.empty_like(q)
        first = 0
        while first < len(q):
            # as many rows as fit with the blocks of the furthest of them
            last, blocks = first, 0
            while last < len(q):
                needed = max(blocks, int(rows.positions[last]) // BLOCK_SIZE_TOKENS + 1)
                if last > first and (last + 1 - first) * needed * BLOCK_SIZE_TOKENS > TOGETHER:
                    break
                last, blocks = last + 1, needed
            # blocks beyond a row's end are masked; any that exists will do
            tables = np.maximum(rows.tables[first:last, :blocks], 0)
            out[first:last] = self._attended_together(layer, q[first:last], rows.positions[first:last], tables, sinks)
            first = last
        return out

    def _attended_together(
        self,
        layer: int,
        q: Floats,
        positions: NDArray[np.int32],
        tables: NDArray[np.int32],
        sinks: Floats | None,
    ) -> Floats:
        """R rows with tables of B blocks, L = 16 B tokens."""
        config = self.config
        rows, blocks = tables.shape
        length, group, dim = blocks * BLOCK_SIZE_TOKENS, config.heads_per_kv_head, config.head_dim
        written = np.arange(length) <= positions[:, None]  # [R, L]
        window = config.window(layer)
        seen = written & (np.arange(length) > positions[:, None] - window) if window else written

        # 1. scores [R, kv heads, group, L]: even and odd dimensions are two chains
        pairs = q.reshape(rows, config.kv_heads, group, dim // 2, 2).transpose(3, 4, 0, 1, 2).astype(np.float64)
        scores = np.empty((rows, config.kv_heads, group, length), np.float32)
        most = max(1, TOGETHER // rows // BLOCK_SIZE_TOKENS)  # blocks at once
        for block in range(0, blocks, most):
            k = self._keys[tables[:, block : block + most], layer].transpose(3, 0, 2, 1, 4)
            k = k.reshape(dim // 2, 2, rows, config.kv_heads, 1, -1).astype(np.float64)
            chains = chain(k * pairs[..., None], coarse=True)
            scores[..., block * BLOCK_SIZE_TOKENS :][..., : k.shape[-1]] = chains[0] + chains[1]

        # 2. weights, and their total in 16 lanes, blocks ascending
        visible = seen[:, None, None]
        peaks = np.where(visible, scores, -np.inf).max(-1, keepdims=True)
        of_heads = None if sinks is None else sinks.reshape(config.kv_heads, group, 1)
        if of_heads is not None:
            peaks = np.maximum(peaks, of_heads)
        weights = np.where(visible, exponential(scores - peaks), np.float32(0))
        total = tree_sum(np.add.accumulate(in_lanes(weights), axis=0)[-1])
        if of_heads is not None:
            total = total + exponential(of_heads - peaks)[..., 0]

        # 3. weighted values, tokens ascending
        v = self._values[tables, layer].transpose(1, 3, 0, 2, 4).reshape(length, rows, config.kv_heads, dim)
        v = np.where(written.T[:, :, None, None], v, np.float16(0))
        w = np.ascontiguousarray(weights.transpose(3, 0, 1, 2)).astype(np.float64)
        out = np.zeros((rows, config.kv_heads, group, dim), np.float32)
        for token in range(0, length, VALUES_TOGETHER):
            here = slice(token, token + VALUES_TOGETHER)
            out = chain(w[here, ..., None] * v[here, :, :, None].astype(np.float64), out, coarse=True)
        out *= (_ONE / total)[..., None]
        return out.reshape(rows, config.heads, dim)

    def _place_weights(self, checkpoint: Checkpoint) -> None:
        def matrix(*names: str) -> list[Matrix]:
            return stacked(_raw(checkpoint, f"{name}.weight") for name in names)

        config = self.config

        def vector(name: str, kind: str = "weight") -> Floats:
            return _vector(checkpoint, f"{name}.{kind}")

        def norm(name: str) -> _Norm:
            return _Norm(vector(name), vector(name, "bias") if config.layer_norm else None)

        def biases(*names: str) -> Floats:
            return np.concatenate([vector(name, "bias") for name in names])

        def mlp(at: str, biased: bool = False) -> _Mlp:
            inputs = [f"{at}.{part}" for part in (("gate", "up") if config.gated else ("up",))]
            found = _Mlp(matrix(*inputs), matrix(f"{at}.down"))
            return found._replace(gate_up_bias=biases(*inputs), down_bias=biases(f"{at}.down")) if biased else found

        def mixture(at: str) -> _Mixture:
            experts = config.experts
            assert experts is not None
            router = f"{at}.router"
            return _Mixture(
                matrix(router),
                biases(router) if experts.biased else None,
                [mlp(f"{at}.experts.{expert}", experts.biased) for expert in range(experts.count)],
            )

        self._layers = [
            _Layer(
                attention_norm=norm(f"{at}.attention_norm"),
                qkv=matrix(*(f"{at}.attention.{part}" for part in "qkv")),
                qkv_bias=biases(*(f"{at}.attention.{part}" for part in "qkv")) if config.qkv_bias else None,
                query_norm=norm(f"{at}.attention.q_norm") if config.qk_norm else None,
                key_norm=norm(f"{at}.attention.k_norm") if config.qk_norm else None,
                sinks=vector(f"{at}.attention.sinks") if config.sinks else None,
                output=matrix(f"{at}.attention.o"),
                output_bias=vector(f"{at}.attention.o", "bias") if config.output_bias else None,
                mlp_norm=norm(f"{at}.mlp_norm"),
                mlp=mixture(at) if config.is_mixture(number) else mlp(f"{at}.mlp"),
            )
            for number, at in enumerate(f"layers.{number}" for number in range(config.layers))
        ]
        self._norm = norm("norm")
        self._embedding = matrix("embedding")
        self._head = self._embedding if self.config.tied_head else matrix("head")


def _times(matrices: list[Matrix], x: Activations) -> Floats:
    found = [matrix.times(x) for matrix in matrices]
    return found[0] if len(found) == 1 else np.concatenate(found, axis=1)


def _swiglu(gate: Floats, up: Floats, clamped: ClampedSwiglu | None) -> Floats:
    """As `specification.swiglu`."""
    if clamped is None:
        return gate / (_ONE + exponential(-gate)) * up
    alpha, limit = np.float32(clamped.alpha), np.float32(clamped.limit)
    gate, up = np.minimum(gate, limit), np.maximum(np.minimum(up, limit), -limit)
    return gate / (_ONE + exponential(-(alpha * gate))) * (up + _ONE)


def _with_bias(product: Floats, bias: Floats | None) -> Floats:
    return product if bias is None else product + bias


def _rotated(heads: Floats, cosines: Floats, sines: Floats, interleaved: bool) -> Floats:
    """Heads [R, heads, head_dim] turned by the angles of their rows."""
    pairs = cosines.shape[-1]
    first = slice(0, 2 * pairs, 2) if interleaved else slice(pairs)
    second = slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs)
    a, b = heads[..., first], heads[..., second]
    turned = heads.copy()
    turned[..., first], turned[..., second] = a * cosines - b * sines, a * sines + b * cosines
    return turned


def _rotation(position: int, frequencies: list[float], magnitude: float) -> Floats:
    """Cosines and sines [2, pairs]. From the C library, as C++ has them: numpy has its own."""
    angles = [position * frequency for frequency in frequencies]
    turns = [[function(angle) * magnitude for angle in angles] for function in (math.cos, math.sin)]
    return np.array(turns).astype(np.float32)


def _as_half(x: Floats) -> NDArray[np.float16]:
    return np.clip(x, -LARGEST_HALF, LARGEST_HALF).astype(np.float16)


def _raw(checkpoint: Checkpoint, name: str) -> Raw:
    raw = checkpoint.raw(name)
    if raw.kind not in KINDS:
        raise ValueError(f"{name} is stored as {raw.kind}; this recipe serves {', '.join(KINDS)}")
    return raw


def _vector(checkpoint: Checkpoint, name: str) -> Floats:
    raw = checkpoint.raw(name)
    if raw.kind not in FLOATS:
        raise ValueError(f"{name} is stored as {raw.kind}; a vector is read from {', '.join(FLOATS)}")
    values: Floats = Plain(*raw).weights.float().numpy().reshape(-1)
    return values
