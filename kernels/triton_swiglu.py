"""The gated activation of a Llama MLP: silu(gate) * up.

Rule: elementwise in float32, rounded once. Reference: `reference.swiglu`.

R rows, I columns (the intermediate size).
"""

import torch
import triton
import triton.language as tl

from kernels import tuning
from kernels.launch import launch


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, [R, I] in the type of `gate`; both may be halves of one wider tensor."""
    if gate.shape != up.shape or gate.dim() != 2 or gate.stride(1) != 1 or up.stride(1) != 1:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} must be equal matrices with dense rows")
    rows, columns = gate.shape
    choice = tuning.elementwise(columns)
    output = torch.empty_like(gate, memory_format=torch.contiguous_format)
    launch(
        _swiglu,
        (rows, -(-columns // choice.block)),
        *(gate, up, output, columns, gate.stride(0), up.stride(0), output.stride(0)),
        choice=choice,
        BLOCK=choice.block,
    )
    return output


@triton.jit
def _swiglu(
    # pointers
    gate_ptr,  # [R, I]
    up_ptr,  # [R, I]
    output_ptr,  # [R, I]
    # sizes
    columns,
    # strides
    stride_gate,
    stride_up,
    stride_output,
    # constants
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    gate = tl.load(gate_ptr + row * stride_gate + column, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    up = tl.load(up_ptr + row * stride_up + column, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    gated = tl.div_rn(gate, 1.0 + tl.exp(-gate)) * up
    tl.store(output_ptr + row * stride_output + column, gated.to(output_ptr.dtype.element_ty), mask=mask)
