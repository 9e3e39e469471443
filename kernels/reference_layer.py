"""The fused operators of a decoder layer in plain torch: the specification of `kernels.triton_layer`.

Rule: what is between two results is computed in float64 and not rounded. Letters as in `kernels.triton_layer`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference import count_accepted, write_kv
from kernels.reference import sample as sample_tokens
from kernels.triton_choice import Samples
from kernels.triton_layer import SQUARES, Cache, HeadWeights, Hidden, Matrix, Norm
from kernels.weight4 import Weight4, dequantised
from kernels.weight8 import Weight8, dequantised8


def hidden_of(values: Tensor, next_norm: Norm | None = None) -> Hidden:
    """Values [R, C], also times the weights of a norm, if there is one, and the sums of squares of their tiles."""
    weighted = values if next_norm is None else (values.double() * next_norm.weight.double()).to(values.dtype)
    rows, columns = values.shape
    wide = F.pad(values.float(), (0, -columns % SQUARES))
    return Hidden(values, weighted, wide.view(rows, wide.shape[1] // SQUARES, SQUARES).square().sum(-1))


def embed(tokens: Tensor, embedding: Tensor, next_norm: Norm) -> Hidden:
    return hidden_of(embedding[tokens.long()], next_norm)


def project_heads(hidden: Hidden, epsilon: float, qkv: Matrix, heads: HeadWeights, cache: Cache) -> Tensor:
    """Queries [R, H, D]; keys and values of rows with a position are written to the cache."""
    head_dim, kv_heads = cache.keys.shape[3], cache.keys.shape[2]
    product = _product(_normed(hidden, epsilon), qkv)
    if heads.bias is not None:
        product = product + heads.bias.double()
    parts = product.view(len(product), -1, head_dim)
    q, k, v = parts.split((parts.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    if heads.query_norm is not None and heads.key_norm is not None:
        q, k = _head_norm(q, heads.query_norm, heads.epsilon), _head_norm(k, heads.key_norm, heads.epsilon)
    kind = hidden.values.dtype
    q, k = _turned(q, heads, cache.positions), _turned(k, heads, cache.positions)
    write_kv(k, v, *cache)
    return q.to(kind)


def project_gated(hidden: Hidden, epsilon: float, gate_up: Matrix) -> Tensor:
    gate, up = _product(_normed(hidden, epsilon), gate_up).chunk(2, dim=1)
    return (gate / (1.0 + torch.exp(-gate)) * up).to(hidden.values.dtype)


def project_added(x: Tensor, weight: Matrix, residual: Hidden, next_norm: Norm) -> Hidden:
    return hidden_of((residual.values.double() + _product(x, weight)).to(residual.values.dtype), next_norm)


def choose(hidden: Hidden, epsilon: float, head: Matrix, samples: Samples) -> tuple[Tensor, Tensor]:
    """Chosen tokens [L] and accepted drafts [S]; logits are computed in float64 and rounded once, to float32."""
    rows = samples.rows.long()
    some = Hidden(hidden.values[rows], hidden.weighted[rows], hidden.squares[rows])
    logits = _product(_normed(some, epsilon), head).float()
    for sample, mask in enumerate(samples.mask_of.tolist()):
        if mask >= 0:
            bits = (samples.masks[mask, :, None] >> torch.arange(32, device=logits.device)) & 1
            allowed = F.pad(bits.flatten().bool(), (0, max(0, logits.shape[1] - bits.numel())))[: logits.shape[1]]
            logits[sample].masked_fill_(~allowed, -torch.inf)
    chosen = sample_tokens(logits, samples.temperatures, samples.seeds, samples.positions)
    return chosen, count_accepted(chosen, samples.tokens, samples.starts, samples.most)


def _normed(hidden: Hidden, epsilon: float) -> Tensor:
    """The normed state in float64, from the weighted one."""
    scale = 1.0 / torch.sqrt(hidden.values.double().square().mean(-1, keepdim=True) + epsilon)
    return hidden.weighted.double() * scale


def _product(x: Tensor, matrix: Matrix) -> Tensor:
    if isinstance(matrix, Weight4):
        return F.linear(x.double(), dequantised(matrix))
    return F.linear(x.double(), dequantised8(matrix) if isinstance(matrix, Weight8) else matrix.double())


def _head_norm(heads: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return heads / torch.sqrt(heads.square().mean(-1, keepdim=True) + epsilon) * weight.double()


def _turned(heads: Tensor, weights: HeadWeights, positions: Tensor) -> Tensor:
    at = positions.clamp(min=0).long()
    cosine, sine = weights.cosines[at].double()[:, None], weights.sines[at].double()[:, None]  # [R, 1, D / 2]
    pairs = cosine.shape[-1]
    if weights.interleaved:
        a, b = heads[..., 0::2], heads[..., 1::2]
        return torch.stack((a * cosine - b * sine, b * cosine + a * sine), -1).flatten(-2)
    a, b = heads[..., :pairs], heads[..., pairs:]
    return torch.cat((a * cosine - b * sine, b * cosine + a * sine), -1)
