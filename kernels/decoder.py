"""A decoder in torch, over the operator table: on a GPU the fast path, on a CPU the plain one.

    embed | per layer: norm qkv (head norm) rotary write attend o, norm gate-up swiglu down | norm, head, mask, sample
    in a mixture of experts gate-up swiglu down are those of the experts that a row's router has chosen

Some families have layer norms, or no gate: the square of what is positive of up.

Rule: one path for prefill, decode and verification: a step is rows, whatever for. Only sample rows meet the head.

Weights are dequantised when loaded: 4 bytes per weight in float32 (538 MB for the default model of 135 million), shared
between embedding and a tied head. With `four_bits` and activations of 16 bits, matrices that are stored in four stay in
four; the others, and the embedding, become 16. Dense products are the library's, which rounds differently for different
numbers of rows: logits agree between batches to about 1e-5 of their size, not to the bit. The native CPU step is the
exact one.
"""

from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.adjust import check_adjustments
from kernels.checkpoint import Checkpoint, open_checkpoint
from kernels.logprobs import check_logprobs
from kernels.matrix import FOUR_BITS, Matrix, four_bits, multiply, stacked
from kernels.ops import Ops, table
from kernels.ranks import Ranks, gathered
from kernels.reference import clamped_swiglu, fill_logprobs, race, rotary_tables, routed, widened
from kernels.shards import Cut, Shard, shard_config
from kernels.step import Hidden, Race, StepInputs, check_hidden, check_places

KV_BYTES = 512 << 20


class Norm(NamedTuple):
    weight: Tensor  # [hidden]
    bias: Tensor | None  # [hidden]: a layer norm; None: root mean square


class Mlp(NamedTuple):
    gate_up: Matrix  # [2 ffn, hidden]; without a gate [ffn, hidden]
    down: Matrix  # [hidden, ffn]
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


class Mixture(NamedTuple):
    """Experts in place of an MLP."""

    router: Matrix  # [experts, hidden]
    router_bias: Tensor | None
    experts: list[Mlp]


class Layer(NamedTuple):
    """Weights of one layer; matrices that read the same input are one, rows below each other."""

    attention_norm: Norm
    qkv: Matrix  # [(heads + 2 kv_heads) * head_dim, hidden]
    qkv_bias: Tensor | None  # [(heads + 2 kv_heads) * head_dim]
    q_norm: Tensor | None  # [head_dim], as k_norm
    k_norm: Tensor | None
    sinks: Tensor | None  # [heads]
    o: Matrix  # [hidden, heads * head_dim]
    o_bias: Tensor | None  # [hidden]
    mlp_norm: Norm
    mlp: Mlp | Mixture


class StepTensors(NamedTuple):
    """The rows of a step on the device."""

    tokens: Tensor  # [R] int64
    positions: Tensor  # [R] int64
    sequences: Tensor  # [R] int64, the table row of each row
    tables: Tensor  # [S, B] int32
    sample_rows: Tensor  # [L] int64
    longest: int  # positions that the furthest row sees


class TorchDecoder:
    """A `kernels.step.Decoder`. Not thread-safe: one call at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        blocks: int | None = None,
        kv_bytes: int = KV_BYTES,
        block_size_tokens: int = 16,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        four_bits: bool = False,
        ops: Ops | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Load all weights. The KV cache has `blocks`, or as many as fit in `kv_bytes`; its memory fills with use.

        `four_bits` leaves matrices in the four bits in which they are stored; activations then have 16, and there are
        no ranks. Raises ValueError where it is not so.

        With `ranks` the decoder is one of several that run every step together, each with its part of the weights and
        of the cache; `kv_bytes` are those of all. A step then also raises RankLost.
        """
        size = 1 if ranks is None else ranks.size
        every = [shard_config(checkpoint.config, rank, size) for rank in range(size)]
        self.shard = None if ranks is None else Shard(checkpoint, ranks.rank, size)
        self.ranks = ranks
        checkpoint = self.shard or checkpoint
        self.config = config = checkpoint.config
        self.device = torch.device(device)
        self.dtype = dtype
        if four_bits and (dtype not in (torch.float16, torch.bfloat16) or size > 1):
            raise ValueError(f"weights of four bits meet activations of 16 bits on one rank, not {dtype} on {size}")
        self.four_bits = four_bits
        self.ops = ops or table(self.device.type)
        self.recipe = str(dtype).removeprefix("torch.") + ("" if self.ops.name == "torch" else f"-{self.ops.name}")
        # the library rounds products of other widths differently
        self.recipe += "" if size == 1 else f"-tp{size}"
        self.recipe += "-w4" if four_bits else ""
        self.vocabulary_size = config.vocabulary
        self.hidden_size = config.hidden
        self.context_length = config.context_length
        self.block_size_tokens = block_size_tokens
        needed = sum(each.kv_bytes_per_token(dtype.itemsize) for each in every) * block_size_tokens
        self.blocks = blocks or kv_bytes // needed
        if self.blocks < 1:
            raise ValueError(f"{kv_bytes} bytes hold no KV block; one of {block_size_tokens} tokens takes {needed}")

        self.embedding = self._dense(checkpoint, "embedding")  # [vocabulary, hidden]
        self.head = self.embedding if config.tied_head else self._matrix(checkpoint, "head")
        self.norm = self._norm(checkpoint, "norm")
        self.layers = [self._layer(checkpoint, layer) for layer in range(config.layers)]
        self.make_cache(self.blocks)
        self.cosines, self.sines = rotary_tables(
            config.rope_frequencies(), config.context_length, self.device, config.rope_magnitude
        )

    def make_cache(self, blocks: int) -> None:
        """A cache of so many blocks, instead of the one that is there. What that held is gone."""
        config = self.config
        self.keys = self.values = torch.empty(0)  # its memory goes before the new one's is taken
        self.blocks = blocks
        shape = (config.layers, blocks, self.block_size_tokens, config.kv_heads, config.head_dim)
        self.keys = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.values = torch.empty(shape, dtype=self.dtype, device=self.device)

    @classmethod
    def load(
        cls,
        model_path: Path,
        *,
        blocks: int | None = None,
        kv_bytes: int = KV_BYTES,
        block_size_tokens: int = 16,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        four_bits: bool = False,
        ops: Ops | None = None,
        ranks: Ranks | None = None,
    ) -> Self:
        """Open and load a GGUF file or a Hugging Face folder. Raises CheckpointError where it cannot be used."""
        checkpoint = open_checkpoint(model_path)
        return cls(
            checkpoint,
            blocks=blocks,
            kv_bytes=kv_bytes,
            block_size_tokens=block_size_tokens,
            device=device,
            dtype=dtype,
            four_bits=four_bits,
            ops=ops,
            ranks=ranks,
        )

    def step(self, inputs: StepInputs) -> NDArray[np.int32]:
        """Run one step; the chosen token of each of the L sample rows. Raises ValueError for a malformed step."""
        with torch.inference_mode():
            raw = self._raw(inputs)
            sampled = self.ops.sample(*self._masked(inputs, raw))
            if inputs.logprobs is not None:
                fill_logprobs(inputs.logprobs, raw, sampled)
            chosen: NDArray[np.int32] = sampled.cpu().numpy()
        return chosen

    def race(self, inputs: StepInputs, places: int) -> Race:
        """As `kernels.step.Racing`."""
        check_places(places)
        with torch.inference_mode():
            tokens, scores = race(*self._masked(inputs, self._raw(inputs)), places)
            return Race(tokens.cpu().numpy(), scores.cpu().numpy())

    def logits(self, inputs: StepInputs) -> NDArray[np.float32]:
        """Run one step; the raw logits [L, H] instead of tokens."""
        with torch.inference_mode():
            logits: NDArray[np.float32] = self._logits(inputs).float().cpu().numpy()
        return logits

    def device_logits(self, inputs: StepInputs) -> Tensor:
        """As `logits`, left on the device."""
        with torch.inference_mode():
            return self._logits(inputs)

    @property
    def block_bytes(self) -> int:
        """As `kernels.step.BlockStore`."""
        return self.config.kv_bytes_per_token(self.dtype.itemsize) * self.block_size_tokens

    def read_block(self, block: int, to: NDArray[np.uint8]) -> None:
        """As `kernels.step.BlockStore`."""
        for memory, cache in zip(self._sides(to), (self.keys, self.values), strict=True):
            memory.copy_(cache[:, block])

    def write_block(self, block: int, data: NDArray[np.uint8]) -> None:
        """As `kernels.step.BlockStore`."""
        for memory, cache in zip(self._sides(data), (self.keys, self.values), strict=True):
            cache[:, block] = memory.to(self.device)

    def _sides(self, memory: NDArray[np.uint8]) -> Tensor:
        """Keys and values of one block in host memory: [2, layers, block size, KV heads, head_dim]."""
        layers, _, *rest = self.keys.shape
        return torch.from_numpy(memory).view(self.dtype).view(2, layers, *rest)

    def _raw(self, inputs: StepInputs) -> Tensor:
        """Logits [L, V], minus infinity for ids that a trimmed head does not know."""
        return widened(self._logits(inputs), self.config.head_ids, self.vocabulary_size)

    def _masked(self, inputs: StepInputs, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a choice is made from: masked logits [L, V], temperatures, seeds and positions [L]."""
        temperatures, top_k, top_p, min_p = (
            torch.from_numpy(values).to(self.device)
            for values in (inputs.temperature, inputs.top_k, inputs.top_p, inputs.min_p)
        )
        seeds = torch.from_numpy(inputs.seeds.view(np.int64)).to(self.device)
        new_positions = torch.from_numpy(inputs.positions[inputs.sample_rows].astype(np.int64) + 1).to(self.device)
        if inputs.adjustments is not None:
            logits = self.ops.adjust_logits(logits, inputs.adjustments)
        return self.ops.mask_logits(logits, temperatures, top_k, top_p, min_p), temperatures, seeds, new_positions

    def _logits(self, inputs: StepInputs) -> Tensor:
        return self._head_of(self._rows(inputs), inputs.hidden)

    def _head_of(self, rows: StepTensors, told: Hidden | None = None) -> Tensor:
        """The logits [L, H] of the sample rows. Fills `told`."""
        hidden, residual = self._forward(rows)
        if told is not None:
            asked = torch.from_numpy(told.rows).to(self.device).long()
            last, _ = self._add_norm(hidden[asked], residual[asked], self.norm)
            told.values[:] = last.float().cpu().numpy()
        sampled = rows.sample_rows
        normed, _ = self._add_norm(hidden[sampled], residual[sampled], self.norm)
        return self._whole(multiply(self.ops, normed, self.head), self.shard and self.shard.cuts.head)

    def _forward(self, rows: StepTensors) -> tuple[Tensor, Tensor]:
        """The last layer's output and the residual it is to be added to, both [R, hidden]."""
        config, ops = self.config, self.ops
        cuts = self.shard and self.shard.cuts
        heads, kv_heads, head_dim = config.heads, config.kv_heads, config.head_dim
        scale = head_dim**-0.5
        residual = self.embedding[rows.tokens]
        normed = self._normed(residual, self.layers[0].attention_norm)
        hidden = residual
        for number, layer in enumerate(self.layers):
            keys, values = self.keys[number], self.values[number]
            if number > 0:
                normed, residual = self._add_norm(hidden, residual, layer.attention_norm)
            qkv = self._linear(normed, layer.qkv, layer.qkv_bias).view(-1, heads + 2 * kv_heads, head_dim)
            q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = self._head_norm(q, layer.q_norm), self._head_norm(k, layer.k_norm)
            q, k = ops.rotary(q, k, rows.positions, self.cosines, self.sines, config.rope_interleaved)
            ops.write_kv(k, v, keys, values, rows.tables, rows.sequences, rows.positions)
            where = rows.tables, rows.sequences, rows.positions
            attended = ops.paged_attention(
                q, keys, values, *where, scale, rows.longest, config.window(number), layer.sinks
            )
            attended = self._whole(attended.flatten(1), cuts and cuts.attention)
            hidden = self._whole(self._linear(attended, layer.o, layer.o_bias), cuts and cuts.hidden)
            normed, residual = self._add_norm(hidden, residual, layer.mlp_norm)
            hidden = self._mlp(normed, layer.mlp) if isinstance(layer.mlp, Mlp) else self._mixture(normed, layer.mlp)
        return hidden, residual

    def _mlp(self, x: Tensor, mlp: Mlp) -> Tensor:
        cuts = self.shard and self.shard.cuts
        inner = self._whole(self._activated(self._linear(x, mlp.gate_up, mlp.gate_up_bias)), cuts and cuts.ffn)
        return self._whole(self._linear(inner, mlp.down, mlp.down_bias), cuts and cuts.hidden)

    def _mixture(self, x: Tensor, mixture: Mixture) -> Tensor:
        """Each expert works for all rows that chose it; what a row gets is added in the experts' order."""
        experts = self.config.experts
        assert experts is not None
        logits = self._linear(x, mixture.router, mixture.router_bias)
        weights, chosen = routed(logits, experts.per_token, experts.normalised)
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in chosen.unique().tolist():
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            total[rows] += weights[rows, places, None] * self._mlp(x[rows], mixture.experts[expert]).float()
        return total.to(x.dtype)

    def _linear(self, x: Tensor, weight: Matrix, bias: Tensor | None) -> Tensor:
        product = multiply(self.ops, x, weight)
        return product if bias is None else (product.float() + bias.float()).to(product.dtype)

    def _whole(self, own: Tensor, cut: Cut | None) -> Tensor:
        """Rows of which this rank has its columns; alone they are whole."""
        return own if cut is None or self.ranks is None else gathered(own, cut, self.ranks)

    def _activated(self, gate_up: Tensor) -> Tensor:
        """What down reads [R, ffn]."""
        if not self.config.gated:
            return self.ops.squared_relu(gate_up)
        gate, up = gate_up.chunk(2, dim=1)
        clamped = self.config.experts.clamped if self.config.experts else None
        return self.ops.swiglu(gate, up) if clamped is None else clamped_swiglu(gate, up, *clamped)

    def _normed(self, x: Tensor, norm: Norm) -> Tensor:
        epsilon = self.config.norm_eps
        if norm.bias is None:
            return self.ops.rms_norm(x, norm.weight, epsilon)
        return self.ops.layer_norm(x, norm.weight, norm.bias, epsilon)

    def _add_norm(self, hidden: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """The norm of the sum, and the sum."""
        if norm.bias is None:
            return self.ops.add_rms_norm(hidden, residual, norm.weight, self.config.norm_eps)
        total = (hidden.float() + residual.float()).to(residual.dtype)
        return self._normed(total, norm), total

    def _head_norm(self, heads: Tensor, weight: Tensor) -> Tensor:
        """Each head [R, heads, head_dim] by itself."""
        flat = heads.reshape(-1, heads.shape[-1])
        return self.ops.rms_norm(flat, weight, self.config.norm_eps).view(heads.shape)

    def _rows(self, inputs: StepInputs) -> StepTensors:
        check_step(inputs, self)
        counts = np.diff(inputs.sequence_starts)
        sequences = np.repeat(np.arange(len(counts)), counts)
        tokens, positions, tables, sample_rows = (
            torch.from_numpy(np.ascontiguousarray(values)).to(self.device)
            for values in (inputs.tokens, inputs.positions, inputs.block_tables, inputs.sample_rows)
        )
        return StepTensors(
            tokens=tokens.long(),
            positions=positions.long(),
            sequences=torch.from_numpy(sequences).to(self.device),
            tables=tables,
            sample_rows=sample_rows.long(),
            longest=int(inputs.positions.max(initial=0)) + 1,
        )

    def _layer(self, checkpoint: Checkpoint, number: int) -> Layer:
        config, prefix = self.config, f"layers.{number}."
        return Layer(
            attention_norm=self._norm(checkpoint, prefix + "attention_norm"),
            qkv=self._matrix(checkpoint, *(f"{prefix}attention.{part}" for part in "qkv")),
            qkv_bias=(
                torch.cat([self._vector(checkpoint, f"{prefix}attention.{part}", "bias") for part in "qkv"])
                if config.qkv_bias
                else None
            ),
            q_norm=self._vector(checkpoint, prefix + "attention.q_norm") if config.qk_norm else None,
            k_norm=self._vector(checkpoint, prefix + "attention.k_norm") if config.qk_norm else None,
            sinks=self._vector(checkpoint, prefix + "attention.sinks") if config.sinks else None,
            o=self._matrix(checkpoint, prefix + "attention.o"),
            o_bias=self._vector(checkpoint, prefix + "attention.o", "bias") if config.output_bias else None,
            mlp_norm=self._norm(checkpoint, prefix + "mlp_norm"),
            mlp=self._mlp_weights(checkpoint, prefix, number),
        )

    def _mlp_weights(self, checkpoint: Checkpoint, prefix: str, number: int) -> Mlp | Mixture:
        def biases(*names: str) -> Tensor:
            return torch.cat([self._vector(checkpoint, prefix + name, "bias") for name in names])

        def mlp(name: str, biased: bool = False) -> Mlp:
            inputs = [f"{name}.{part}" for part in (("gate", "up") if self.config.gated else ("up",))]
            return Mlp(
                self._matrix(checkpoint, *(prefix + part for part in inputs)),
                self._matrix(checkpoint, f"{prefix}{name}.down"),
                biases(*inputs) if biased else None,
                biases(f"{name}.down") if biased else None,
            )

        experts = self.config.experts
        if experts is None or not self.config.is_mixture(number):
            return mlp("mlp")
        return Mixture(
            self._matrix(checkpoint, prefix + "router"),
            biases("router") if experts.biased else None,
            [mlp(f"experts.{expert}", experts.biased) for expert in range(experts.count)],
        )

    def _norm(self, checkpoint: Checkpoint, name: str) -> Norm:
        bias = self._vector(checkpoint, name, "bias") if self.config.layer_norm else None
        return Norm(self._vector(checkpoint, name), bias)

    def _matrix(self, checkpoint: Checkpoint, *names: str) -> Matrix:
        kinds = [checkpoint.kind(f"{name}.weight") if self.four_bits else "" for name in names]
        return stacked(
            four_bits(checkpoint.raw(f"{name}.weight"), self.device)
            if kind in FOUR_BITS
            else self._dense(checkpoint, name)
            for name, kind in zip(names, kinds, strict=True)
        )

    def _dense(self, checkpoint: Checkpoint, name: str) -> Tensor:
        return checkpoint.tensor(f"{name}.weight").to(self.dtype).to(self.device)

    def _vector(self, checkpoint: Checkpoint, name: str, kind: str = "weight") -> Tensor:
        return checkpoint.tensor(f"{name}.{kind}").reshape(-1).to(self.device)


def check_step(inputs: StepInputs, decoder: TorchDecoder) -> None:
    """Raise ValueError where a step would read or write what is not there: a scheduler's mistake, caught early."""
    starts, tables = inputs.sequence_starts, inputs.block_tables
    rows, sequences = len(inputs.tokens), len(starts) - 1
    if starts[0] != 0 or starts[-1] != rows or (np.diff(starts) < 1).any() or len(tables) != sequences:
        raise ValueError(f"sequence starts {starts.tolist()} do not divide {rows} rows among {len(tables)} sequences")
    if rows == 0:
        raise ValueError("a step has at least one row")
    wanted = inputs.sample_rows
    if ((wanted < 0) | (wanted >= rows)).any() or len(inputs.temperature) != len(wanted):
        raise ValueError(f"sample rows {wanted.tolist()} are not rows of the step, each with its sampling parameters")
    if inputs.adjustments is not None:
        check_adjustments(inputs.adjustments, len(wanted), decoder.vocabulary_size)
    if inputs.logprobs is not None:
        check_logprobs(inputs.logprobs, len(wanted), decoder.vocabulary_size)
    if inputs.hidden is not None:
        check_hidden(inputs.hidden, rows, decoder.hidden_size)
    if ((inputs.tokens < 0) | (inputs.tokens >= decoder.vocabulary_size)).any():
        raise ValueError(f"a token id lies outside 0..{decoder.vocabulary_size - 1}")
    if ((inputs.positions < 0) | (inputs.positions >= decoder.context_length)).any():
        raise ValueError(f"a position lies outside the context of {decoder.context_length} tokens")
    needed = np.maximum.reduceat(inputs.positions, starts[:-1]) // decoder.block_size_tokens  # [S]
    if needed.max() >= tables.shape[1]:
        raise ValueError(f"a block table of {tables.shape[1]} blocks is too short: {needed.max() + 1} are needed")
    used = np.arange(tables.shape[1]) <= needed[:, None]
    if (used & ((tables < 0) | (tables >= decoder.blocks))).any():
        raise ValueError(f"a block that is needed lies outside 0..{decoder.blocks - 1}")
