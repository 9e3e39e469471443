"""Codes as operands of a tensor core: the assembler in the compiled kernels gives every one of them exactly.

The interpreter takes another way (`numbers_of`), which the tests of the products check.
"""

import numpy as np
import pytest
import torch
import triton.language as tl

from kernels.triton_codes import _unpacking, _widening
from kernels.weight4 import MXFP4
from tests.kernels.assembly import carried_out, pairs

TYPES = [(tl.float16, torch.float16), (tl.bfloat16, torch.bfloat16)]
# Every word of four codes, beside another in the same register.
WORDS = np.arange(1 << 16, dtype=np.uint32) | np.arange(1 << 16, dtype=np.uint32)[::-1] << np.uint32(16)


def codes_of(quarter: int) -> torch.Tensor:
    """The codes of one quarter of WORDS, [registers, 2]."""
    both = np.stack([WORDS >> 4 * quarter & 15, WORDS >> 16 + 4 * quarter & 15], axis=1)
    return torch.from_numpy(both.astype(np.int64))


@pytest.mark.parametrize("quarter", range(4))
@pytest.mark.parametrize(("kind", "torch_kind"), TYPES)
def test_whole_codes_of_four_bits_become_exact_numbers(
    kind: tl.dtype, torch_kind: torch.dtype, quarter: int
) -> None:
    code = codes_of(quarter).double()
    for style, expected in ((0, code - 8), (2, code)):
        [got] = carried_out(_unpacking(quarter, style, kind), 1, WORDS)
        assert torch.equal(pairs(got, torch_kind), expected)
    for zero in range(16):
        # As `operand_of` hands it over: above the number into whose mantissa codes are put.
        counted = torch.tensor([zero + (1024.0 if torch_kind == torch.float16 else 128.0)] * 2).to(torch_kind)
        register = counted.view(torch.int16).numpy().view(np.uint32)[0]
        [got] = carried_out(_unpacking(quarter, 1, kind), 1, WORDS, WORDS * 0 + register)
        assert torch.equal(pairs(got, torch_kind), code - zero)


@pytest.mark.parametrize("quarter", range(4))
@pytest.mark.parametrize(("kind", "torch_kind"), TYPES)
def test_codes_of_mxfp4_become_their_values(kind: tl.dtype, torch_kind: torch.dtype, quarter: int) -> None:
    [got] = carried_out(_unpacking(quarter, 3, kind), 1, WORDS)
    assert torch.equal(pairs(got, torch_kind), torch.tensor(MXFP4, dtype=torch.float64)[codes_of(quarter)])


@pytest.mark.parametrize(("code", "torch_code"), [(tl.float8e4nv, torch.float8_e4m3fn), (tl.int8, torch.int8)])
@pytest.mark.parametrize(("kind", "torch_kind"), TYPES)
def test_codes_of_eight_bits_become_exact_numbers(
    kind: tl.dtype, torch_kind: torch.dtype, code: tl.dtype, torch_code: torch.dtype
) -> None:
    every = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    if torch_code == torch.float8_e4m3fn:
        every = every[every & 0x7F != 0x7F]  # not NaN
    four = torch.stack([every.roll(shift) for shift in (0, 1, 50, 99)], dim=1).contiguous()
    expected = four.view(torch_code).double()
    low, high = carried_out(_widening(code, kind), 2, four.numpy().view(np.uint32)[:, 0])
    got = torch.cat((pairs(low, torch_kind), pairs(high, torch_kind)), dim=1)
    assert torch.equal(got, expected)
    assert torch.equal(got.signbit(), expected.signbit())
