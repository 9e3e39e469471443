"""What a decoder looks like, dense or a mixture of experts, read from a checkpoint. Plain numbers, no tensors."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: damaged, or of a kind that no decoder here runs."""


class ClampedSwiglu(NamedTuple):
    """gate * sigmoid(alpha * gate) * (up + 1), of a gate of at most `limit` and an up within -limit..limit."""

    alpha: float
    limit: float


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts in place of an MLP: of `count` MLPs, `per_token` work for a token, as its router chooses."""

    count: int
    per_token: int
    ffn: int  # width of each
    # True: weights are a softmax over the chosen experts. False: over all, so that those of the chosen miss 1.
    normalised: bool
    every: int = 1  # layers every - 1, 2 every - 1, ... have a mixture ...
    dense_layers: tuple[int, ...] = ()  # ... but for these
    biased: bool = False  # the router and all of an expert's matrices have a bias
    clamped: ClampedSwiglu | None = None  # instead of silu(gate) * up

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.count:
            raise CheckpointError(f"{self.per_token} of {self.count} experts cannot work for a token")

    def has(self, layer: int) -> bool:
        return (layer + 1) % self.every == 0 and layer not in self.dense_layers


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Sizes and constants of one model. Query head h reads KV head h // (heads // kv_heads)."""

    layers: int
    hidden: int
    heads: int  # query heads
    kv_heads: int
    head_dim: int
    ffn: int  # width between gate/up and down
    vocabulary: int  # token ids 0..vocabulary-1
    context_length: int  # positions the model was trained for
    norm_eps: float
    rope_base: float
    rotary_dim: int  # elements of a head that turn, from the first; even
    # True: element 2i turns with 2i + 1 (GGUF's Llama, whose q and k rows are permuted for it).
    # False: i turns with i + rotary_dim / 2.
    rope_interleaved: bool
    tied_head: bool  # the head is the embedding
    # One divisor per pair for its frequency: every kind of rope scaling in one form. None: all 1.
    rope_factors: tuple[float, ...] | None = None
    rope_magnitude: float = 1.0  # cosines and sines are multiplied by it (YaRN)
    qkv_bias: bool = False  # queries, keys and values have a bias each
    output_bias: bool = False  # attention's output projection has one
    qk_norm: bool = False  # each head of queries and keys is normalised before it turns
    layer_norm: bool = False  # norms take the mean away, and have a bias; False: root mean square alone
    gated: bool = True  # down(silu(gate) * up); False: there is no gate, and down reads the square of max(up, 0)
    # Of each layer: a token sees itself and the window - 1 before it; 0: all before it. None: all layers see all.
    windows: tuple[int, ...] | None = None
    # A trimmed head: the token id of each of its rows, ascending. None: row i is id i.
    head_ids: tuple[int, ...] | None = None
    sinks: bool = False  # each query head has a logit in its softmax that belongs to no token
    experts: Experts | None = None  # of the layers that `is_mixture` names

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocabulary", "context_length"):
            if getattr(self, name) < 1:
                raise CheckpointError(f"{name} must be at least 1, the checkpoint says {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise CheckpointError(f"{self.heads} query heads cannot share {self.kv_heads} KV heads evenly")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise CheckpointError(f"rotary_dim must be even, 2..{self.head_dim}; the checkpoint says {self.rotary_dim}")
        pairs = self.rotary_dim // 2
        if self.rope_factors is not None and len(self.rope_factors) != pairs:
            raise CheckpointError(f"{pairs} rope factors are needed, the checkpoint has {len(self.rope_factors)}")
        if self.windows is not None and (len(self.windows) != self.layers or min(self.windows) < 0):
            raise CheckpointError(f"{self.layers} windows of 0 or more tokens are needed, got {self.windows}")

        if self.head_ids is not None:
            _check_head_ids(self.head_ids, self.vocabulary, self.tied_head)

    @property
    def head_size(self) -> int:
        """Rows of the head."""
        return self.vocabulary if self.head_ids is None else len(self.head_ids)

    @property
    def heads_per_kv_head(self) -> int:
        return self.heads // self.kv_heads

    def is_mixture(self, layer: int) -> bool:
        """Whether experts stand in place of this layer's MLP."""
        return self.experts is not None and self.experts.has(layer)

    def window(self, layer: int) -> int:
        """Tokens that a token of this layer sees, itself included; 0: all before it."""
        return self.windows[layer] if self.windows is not None else 0

    def rope_frequencies(self) -> list[float]:
        """Radians per position of each of the rotary_dim / 2 pairs."""
        factors = self.rope_factors or (1.0,) * (self.rotary_dim // 2)
        return [self.rope_base ** (-2 * pair / self.rotary_dim) / factor for pair, factor in enumerate(factors)]

    def kv_bytes_per_token(self, bytes_per_element: int) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_element


def _check_head_ids(ids: tuple[int, ...], vocabulary: int, tied: bool) -> None:
    if tied:
        raise CheckpointError("a trimmed head cannot be the embedding: it needs rows of its own (untied)")
    if not ids or ids[0] < 0 or ids[-1] >= vocabulary or any(a >= b for a, b in pairwise(ids)):
        raise CheckpointError(f"the ids of a trimmed head must ascend within 0..{vocabulary - 1}")


def llama3_rope_factors(
    base: float,
    rotary_dim: int,
    *,
    factor: float,
    low_frequency_factor: float,
    high_frequency_factor: float,
    original_context_length: int,
) -> tuple[float, ...]:
    """Llama 3's scaling, as divisors.

    Wavelengths beyond original / low are stretched by `factor`, those below original / high are kept, between smoothly.
    """
    factors = []
    span = high_frequency_factor - low_frequency_factor
    if span <= 0:
        raise CheckpointError(f"the rope's high_freq_factor must exceed its low_freq_factor, it does by {span:g}")
    for pair in range(rotary_dim // 2):
        wavelength = 2 * math.pi * base ** (2 * pair / rotary_dim)
        kept = min(1.0, max(0.0, (original_context_length / wavelength - low_frequency_factor) / span))
        factors.append(1.0 / ((1 - kept) / factor + kept))
    return tuple(factors)


class Yarn(NamedTuple):
    """YaRN's scaling: what each frequency is divided by, and what cosines and sines are multiplied by."""

    factors: tuple[float, ...]
    magnitude: float


def yarn_rope(
    base: float,
    rotary_dim: int,
    *,
    factor: float,
    original_context_length: int,
    fast: float = 32.0,
    slow: float = 1.0,
    whole_pairs: bool = True,
    magnitude: float | None = None,
) -> Yarn:
    """YaRN (Peng et al., 2023), as divisors.

    Pairs that turn more than `fast` times in the original context are kept, those that turn less than `slow` times are
    stretched by `factor`, between in a straight line; `whole_pairs`: its ends are rounded to pairs. `magnitude` None:
    the paper's 0.1 ln(factor) + 1.
    """
    if base <= 1.0:
        raise CheckpointError(f"YaRN needs a rope base above 1, the checkpoint says {base:g}")

    def pair_turning(times: float) -> float:
        return rotary_dim * math.log(original_context_length / (times * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair_turning(fast), pair_turning(slow)
    if whole_pairs:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    span = last - first or 0.001
    factors = []
    for pair in range(rotary_dim // 2):
        stretched = min(1.0, max(0.0, (pair - first) / span))
        factors.append(1.0 / (stretched / factor + 1.0 - stretched))
    if magnitude is None:
        magnitude = 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0
    return Yarn(tuple(factors), magnitude)
