"""What a decoder of the Llama family looks like, read from a checkpoint. Plain numbers, no tensors."""

import math
from dataclasses import dataclass


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: damaged, or of a kind that no decoder here runs."""


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

    @property
    def heads_per_kv_head(self) -> int:
        return self.heads // self.kv_heads

    def rope_frequencies(self) -> list[float]:
        """Radians per position of each of the rotary_dim / 2 pairs."""
        factors = self.rope_factors or (1.0,) * (self.rotary_dim // 2)
        return [self.rope_base ** (-2 * pair / self.rotary_dim) / factor for pair, factor in enumerate(factors)]

    def kv_bytes_per_token(self, bytes_per_element: int) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_element


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
    for pair in range(rotary_dim // 2):
        wavelength = 2 * math.pi * base ** (2 * pair / rotary_dim)
        kept = min(1.0, max(0.0, (original_context_length / wavelength - low_frequency_factor) / span))
        factors.append(1.0 / ((1 - kept) / factor + kept))
    return tuple(factors)
