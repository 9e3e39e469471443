"""A model of random weights on a GPU, and its steps: fused and unfused, of 16, 8 and 4 bits, and the naive way.

Rule: every way computes the same model; they differ in launches and in the bits of a weight. Nothing here is loaded or
served: what a step costs does not depend on what the weights say.

    fused     five launches a layer (`kernels.triton_layer`), and the end of a step in one; activations of 16 bits
    unfused   an operator a launch, products by the library, in FP8 with activations of 8 bits: prefill, large batches
    naive     torch operators as a script would call them, one by one, over a cache that lies in one piece
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import triton_choice, triton_layer
from kernels.layer_cases import matrix_of
from kernels.ops import triton as triton_table
from kernels.reference import rotary_tables
from kernels.triton_choice import Samples
from kernels.triton_layer import Cache, HeadWeights, LayerWeights, Matrix, Norm
from kernels.triton_linear4 import linear4
from kernels.triton_product import Workspace
from kernels.weight4 import Weight4
from kernels.weight8 import Weight8

BLOCK_SIZE = 16
EPSILON = 1e-5
FP8 = torch.float8_e4m3fn


class Shape(NamedTuple):
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    width: int
    vocabulary: int


SHAPES = {
    "Llama-3.1-8B": Shape(32, 32, 8, 128, 4096, 14336, 128256),
    "SmolLM2-135M": Shape(30, 9, 3, 64, 576, 1536, 49152),
}
PRECISIONS = ("bf16", "fp8", "int4")


@dataclass(frozen=True)
class Model:
    """Weights of one precision. Embedding and head have 16 bits in each."""

    shape: Shape
    embedding: Tensor
    layers: list[LayerWeights]
    norm: Norm

    @property
    def bytes_per_step(self) -> int:
        """Weights that a decode step reads: all but the embedding, whose memory here is the head's."""
        matrices = [matrix for layer in self.layers for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        moved: int = self.embedding.nbytes + sum(triton_layer.matrix_bytes(matrix) for matrix in matrices)
        return moved

    @property
    def flops_per_row(self) -> int:
        """Of a row without its attention and head."""
        s = self.shape
        qkv = (s.heads + 2 * s.kv_heads) * s.head_dim
        return 2 * s.layers * s.hidden * (qkv + s.heads * s.head_dim + 3 * s.width)


@dataclass(frozen=True)
class Batch:
    """Rows of a step with their caches: `rows_each` rows at the end of each sequence of `context` positions."""

    tokens: Tensor  # [R]
    caches: list[Cache]  # one for each layer
    samples: Samples
    context: int
    work: Workspace


def random_model(shape: Shape, precision: str, device: str, kind: torch.dtype = torch.bfloat16) -> Model:
    pairs = shape.head_dim // 2
    tables = rotary_tables([10000.0 ** (-pair / pairs) for pair in range(pairs)], 8192, device)
    heads = HeadWeights(None, None, None, EPSILON, *tables, interleaved=False)
    norm = Norm(torch.ones(shape.hidden, dtype=kind, device=device), EPSILON)

    styles = {"bf16": "dense", "fp8": "fp8", "int4": "4 bits"}

    def matrix(outputs: int, inputs: int) -> Matrix:
        return matrix_of(outputs, inputs, styles[precision], kind, device)

    qkv = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    layers = [
        LayerWeights(
            attention_norm=norm,
            qkv=matrix(qkv, shape.hidden),
            heads=heads,
            o=matrix(shape.hidden, shape.heads * shape.head_dim),
            mlp_norm=norm,
            gate_up=matrix(2 * shape.width, shape.hidden),
            down=matrix(shape.hidden, shape.width),
        )
        for _ in range(shape.layers)
    ]
    return Model(shape, matrix_of(shape.vocabulary, shape.hidden, "dense", kind, device), layers, norm)


def random_batch(
    shape: Shape, sequences: int, context: int, rows_each: int, device: str, kind: torch.dtype = torch.bfloat16
) -> Batch:
    """`context` positions of each sequence, the last `rows_each` of them the rows of this step."""
    blocks = -(-context // BLOCK_SIZE)
    rows = sequences * rows_each
    tables = torch.randperm(sequences * blocks).int().view(sequences, blocks).to(device)
    owners = torch.arange(sequences).repeat_interleave(rows_each).to(device)
    positions = torch.arange(context - rows_each, context).repeat(sequences).to(device)
    cache = (sequences * blocks, BLOCK_SIZE, shape.kv_heads, shape.head_dim)
    caches = [
        Cache(*(torch.randn(cache, dtype=kind, device=device) for _ in range(2)), tables, owners, positions)
        for _ in range(shape.layers)
    ]
    last = torch.arange(1, sequences + 1) * rows_each - 1
    samples = Samples(
        rows=last.to(device),
        temperatures=torch.zeros(sequences, device=device),
        seeds=torch.zeros(sequences, dtype=torch.int64, device=device),
        positions=torch.full((sequences,), context, device=device),
        masks=torch.zeros(1, 1, dtype=torch.int32, device=device),
        mask_of=torch.full((sequences,), -1, dtype=torch.int32, device=device),
        tokens=last.to(device),
        starts=torch.arange(sequences + 1).int().to(device),
        most=1,
    )
    tokens = torch.randint(0, shape.vocabulary, (rows,)).to(device)
    qkv = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    matrices = [(qkv, shape.hidden), (shape.hidden, shape.heads * shape.head_dim), (2 * shape.width, shape.hidden)]
    needed = triton_layer.splits_times_outputs([*matrices, (shape.hidden, shape.width)])
    return Batch(tokens, caches, samples, context, Workspace(device, rows if rows_each == 1 else 1, needed))


def fused_step(model: Model, batch: Batch) -> Tensor:
    """The token of each sequence, int32."""
    norms = [*(layer.attention_norm for layer in model.layers), model.norm]
    hidden = triton_layer.embed(batch.tokens, model.embedding, norms[0])
    for layer, cache, next_norm in zip(model.layers, batch.caches, norms[1:], strict=True):
        hidden = triton_layer.decode_layer(hidden, layer, next_norm, cache, batch.work, batch.context)
    return triton_choice.choose(hidden, model.norm.epsilon, model.embedding, batch.samples, batch.work)[0]


def unfused_step(model: Model, batch: Batch) -> Tensor:
    """As `fused_step`, an operator a launch."""
    ops, shape = triton_table(), model.shape
    residual = model.embedding[batch.tokens]
    hidden, normed = residual, ops.rms_norm(residual, model.norm.weight, EPSILON)
    for number, (layer, cache) in enumerate(zip(model.layers, batch.caches, strict=True)):
        if number:
            normed, residual = ops.add_rms_norm(hidden, residual, layer.attention_norm.weight, EPSILON)
        qkv = _linear(normed, layer.qkv).view(len(normed), -1, shape.head_dim)
        q, k, v = qkv.split((shape.heads, shape.kv_heads, shape.kv_heads), dim=1)
        q, k = ops.rotary(q, k, cache.positions, layer.heads.cosines, layer.heads.sines, False)
        ops.write_kv(k, v, *cache)
        attended = ops.paged_attention(q, *cache[:5], shape.head_dim**-0.5, batch.context, 0)
        hidden = _linear(attended.flatten(1), layer.o)
        normed, residual = ops.add_rms_norm(hidden, residual, layer.mlp_norm.weight, EPSILON)
        gate, up = _linear(normed, layer.gate_up).chunk(2, dim=1)
        hidden = _linear(ops.swiglu(gate, up), layer.down)
    rows = batch.samples.rows
    last, _ = ops.add_rms_norm(hidden[rows], residual[rows], model.norm.weight, EPSILON)
    logits = F.linear(last, model.embedding)
    return ops.sample(logits, batch.samples.temperatures, batch.samples.seeds, batch.samples.positions)


def naive_step(model: Model, batch: Batch) -> Tensor:
    """As `fused_step` for one row of each sequence, by torch alone. Sequences are as long as each other."""
    shape = model.shape
    x = model.embedding[batch.tokens]
    for layer, cache in zip(model.layers, batch.caches, strict=True):
        qkv = F.linear(_naive_norm(x, layer.attention_norm), _dense(layer.qkv)).view(len(x), -1, shape.head_dim)
        q, k, v = qkv.split((shape.heads, shape.kv_heads, shape.kv_heads), dim=1)
        q, k = (_naive_rotary(part, layer.heads, cache.positions) for part in (q, k))
        at = cache.positions
        blocks, slots = cache.tables[cache.sequences, at // BLOCK_SIZE].long(), at % BLOCK_SIZE
        cache.keys[blocks, slots], cache.values[blocks, slots] = k, v
        keys, values = (
            part[cache.tables.long()].flatten(1, 2)[:, : batch.context].transpose(1, 2)
            for part in (cache.keys, cache.values)
        )  # [S, K, context, D]
        group = shape.heads // shape.kv_heads
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        attended = F.scaled_dot_product_attention(q[:, :, None], keys, values)  # [S, H, 1, D]
        x = x + F.linear(attended.flatten(1), _dense(layer.o))
        gate, up = F.linear(_naive_norm(x, layer.mlp_norm), _dense(layer.gate_up)).chunk(2, dim=1)
        x = x + F.linear(F.silu(gate) * up, _dense(layer.down))
    return F.linear(_naive_norm(x, model.norm), model.embedding).float().argmax(-1).int()


def _linear(x: Tensor, matrix: Matrix) -> Tensor:
    if isinstance(matrix, Weight4):
        return linear4(x, matrix, exact=False)
    if isinstance(matrix, Weight8):
        ops = triton_table()
        return ops.linear8(ops.quantise8(x, FP8, False), matrix, x.dtype)
    return F.linear(x, matrix)


def _dense(matrix: Matrix) -> Tensor:
    if not isinstance(matrix, Tensor):
        raise ValueError("the naive way knows matrices of 16 bits only")
    return matrix


def _naive_norm(x: Tensor, norm: Norm) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.epsilon)).to(x.dtype) * norm.weight


def _naive_rotary(heads: Tensor, weights: HeadWeights, positions: Tensor) -> Tensor:
    cosine, sine = (table[positions][:, None].to(heads.dtype) for table in (weights.cosines, weights.sines))
    a, b = heads.chunk(2, dim=-1)
    return torch.cat((a * cosine - b * sine, b * cosine + a * sine), -1)
