"""The one table of operators that a decoder runs on, and the only switch between Triton and plain torch.

Rule: every operator is specified by its namesake in `kernels.reference`; an entry may be faster, never different.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import reference
from kernels.step import Adjustments
from kernels.weight4 import Weight4
from kernels.weight8 import Rows8, Weight8


class Ops(NamedTuple):
    """One implementation of each operator; signatures as in `kernels.reference`."""

    name: str  # goes into a decoder's recipe
    linear: Callable[[Tensor, Tensor], Tensor]
    linear4: Callable[[Tensor, Weight4], Tensor]
    linear8: Callable[[Rows8, Weight8, torch.dtype], Tensor]
    quantise8: Callable[[Tensor, torch.dtype, bool], Rows8]
    rms_norm_quantise8: Callable[[Tensor, Tensor, float, torch.dtype, bool], Rows8]
    add_rms_norm_quantise8: Callable[[Tensor, Tensor, Tensor, float, torch.dtype, bool], tuple[Rows8, Tensor]]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    rotary: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    squared_relu: Callable[[Tensor], Tensor]
    write_kv: Callable[..., None]
    paged_attention: Callable[..., Tensor]
    adjust_logits: Callable[[Tensor, Adjustments], Tensor]
    mask_logits: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    sample: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    count_accepted: Callable[[Tensor, Tensor, Tensor, int], Tensor]


REFERENCE = Ops(
    name="torch",
    linear=reference.linear,
    linear4=reference.linear4,
    linear8=reference.linear8,
    quantise8=reference.quantise8,
    rms_norm_quantise8=reference.rms_norm_quantise8,
    add_rms_norm_quantise8=reference.add_rms_norm_quantise8,
    rms_norm=reference.rms_norm,
    add_rms_norm=reference.add_rms_norm,
    layer_norm=reference.layer_norm,
    rotary=reference.rotary,
    swiglu=reference.swiglu,
    squared_relu=reference.squared_relu,
    write_kv=reference.write_kv,
    paged_attention=reference.paged_attention,
    adjust_logits=reference.adjust_logits,
    mask_logits=reference.mask_logits,
    sample=reference.sample,
    count_accepted=reference.count_accepted,
)


@cache
def table(device_type: str) -> Ops:
    """The operators for "cuda" or "cpu", the same ones for the life of the process."""
    return triton() if device_type == "cuda" and torch.cuda.is_available() else REFERENCE


@cache
def triton() -> Ops:
    """The Triton kernels, and the reference where there is none: matrix products are cuBLAS's, masks sort by torch."""
    from kernels import (
        triton_attention,
        triton_kv,
        triton_linear4,
        triton_linear8,
        triton_norm,
        triton_quantise,
        triton_rotary,
        triton_sampling,
        triton_swiglu,
    )

    return REFERENCE._replace(
        name="triton",
        linear4=triton_linear4.linear4,
        linear8=triton_linear8.linear8,
        quantise8=triton_quantise.quantise8,
        rms_norm_quantise8=triton_quantise.rms_norm_quantise8,
        add_rms_norm_quantise8=triton_quantise.add_rms_norm_quantise8,
        rms_norm=triton_norm.rms_norm,
        add_rms_norm=triton_norm.add_rms_norm,
        rotary=triton_rotary.rotary,
        swiglu=triton_swiglu.swiglu,
        write_kv=triton_kv.write_kv,
        paged_attention=triton_attention.paged_attention,
        sample=triton_sampling.sample,
        count_accepted=triton_sampling.count_accepted,
    )
