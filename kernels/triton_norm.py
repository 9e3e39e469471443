"""Root mean square normalisation, alone or with the residual addition before it.

Rule: one program sums one row, so a row's result depends on nothing but the row.
Reference: `reference.rms_norm`, `reference.add_rms_norm`.

Reading x and the residual once, adding, normalising and writing both results once is all the memory traffic there is; a
separate addition would read and write the hidden state once more.

R rows, C columns (the hidden size, or a head size when queries and keys are normalised).
"""

import torch
import triton
import triton.language as tl

from kernels import tuning
from kernels.launch import launch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension, in the type of x."""
    rows = x.reshape(-1, x.shape[-1])
    normed = torch.empty_like(rows, memory_format=torch.contiguous_format)
    _launch(rows, None, weight, normed, None, epsilon)
    return normed.view(x.shape)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x + residual, and x + residual itself, rounded to the type of `residual` before it is normed."""
    rows = x.reshape(-1, x.shape[-1])
    residual_rows = residual.reshape(rows.shape)
    normed = torch.empty_like(residual_rows, memory_format=torch.contiguous_format)
    total = torch.empty_like(residual_rows, memory_format=torch.contiguous_format)
    _launch(rows, residual_rows, weight, normed, total, epsilon)
    return normed.view(x.shape), total.view(x.shape)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    normed: torch.Tensor,
    total: torch.Tensor | None,
    epsilon: float,
) -> None:
    if weight.shape != x.shape[1:] or x.stride(-1) != 1:
        raise ValueError(f"rows of {x.shape[1]} dense elements need a weight of that size, not {tuple(weight.shape)}")
    columns = x.shape[1]
    choice = tuning.row_sum(columns)
    # Without a residual the kernel touches neither of its pointers.
    residual = x if residual is None else residual
    fused = total is not None
    total = normed if total is None else total
    launch(
        _rms_norm,
        (x.shape[0],),
        *(x, residual, weight, normed, total, columns, epsilon),
        *(x.stride(0), residual.stride(0), normed.stride(0), total.stride(0)),
        choice=choice,
        BLOCK=choice.block,
        RESIDUAL=fused,
    )


@triton.jit
def _rms_norm(
    # pointers
    x_ptr,  # [R, C]
    residual_ptr,  # [R, C], read when RESIDUAL
    weight_ptr,  # [C]
    normed_ptr,  # [R, C]
    sum_ptr,  # [R, C], written when RESIDUAL
    # sizes
    columns,
    epsilon,
    # strides
    stride_x,
    stride_residual,
    stride_normed,
    stride_sum,
    # constants
    BLOCK: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < columns

    # 1. The row, with the residual added and rounded to what is stored.
    x = tl.load(x_ptr + row * stride_x + column, mask=mask, other=0.0).to(tl.float32)  # [C]
    if RESIDUAL:
        residual = tl.load(residual_ptr + row * stride_residual + column, mask=mask, other=0.0).to(tl.float32)  # [C]
        stored = (x + residual).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * stride_sum + column, stored, mask=mask)
        x = stored.to(tl.float32)

    # 2. Its scale, in float32.
    mean_square = tl.div_rn(tl.sum(x * x, axis=0), columns.to(tl.float32))
    scale = tl.div_rn(1.0, tl.sqrt_rn(mean_square + epsilon))

    # 3. Scaled by the weight.
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)  # [C]
    tl.store(normed_ptr + row * stride_normed + column, (x * scale * weight).to(normed_ptr.dtype.element_ty), mask=mask)
