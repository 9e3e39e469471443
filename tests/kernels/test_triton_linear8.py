"""Eight-bit products and quantisation: the reference's numbers, and a row's bits that no other row changes."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kernels import reference, triton_quantise
from kernels.launch import recording
from kernels.triton_linear8 import linear8
from kernels.verify import nan_filled_memory
from kernels.weight8 import (
    KINDS,
    LARGEST,
    Rows8,
    Weight8,
    dequantised8,
    nearest,
    quantised_rows8,
    quantised_weight8,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP8, INT8 = KINDS


@pytest.fixture(autouse=True)
def _memory_starts_as_nan() -> Iterator[None]:
    with nan_filled_memory():
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half().to(DEVICE)


def rows_of(rows: int, inputs: int, kind: torch.dtype, blocks: bool) -> Rows8:
    return reference.quantise8(normal(rows, inputs, seed=rows), kind, blocks)


def values(codes: Tensor) -> Tensor:
    """What codes stand for; zero has two of them in FP8."""
    return codes.float()


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_that_of_the_reference(kind: torch.dtype, blocks: bool) -> None:
    for rows, outputs, inputs in ((1, 130, 300), (3, 70, 128), (17, 5, 77), (0, 9, 140)):
        x = rows_of(rows, inputs, kind, blocks)
        weight = quantised_weight8(normal(outputs, inputs, seed=9), kind, blocks)
        expected = reference.linear8(x, weight, torch.float16)
        assert_close(linear8(x, weight, torch.float16), expected, rtol=2e-3, atol=2e-3)


def last(x: Rows8, rows: int) -> Rows8:
    return Rows8(x.codes[-rows:], x.scales[-rows:])


@pytest.mark.parametrize("inputs", [1030, 1040])  # the copy engine can read many rows of the second
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_alone_and_in_every_batch(kind: torch.dtype, blocks: bool, inputs: int) -> None:
    x, weight = rows_of(130, inputs, kind, blocks), quantised_weight8(normal(70, inputs, seed=9), kind, blocks)
    alone = linear8(last(x, 1), weight, torch.float16)[0]
    for rows in (2, 5, 16, 17, 33, 64, 65, 130):
        assert torch.equal(linear8(last(x, rows), weight, torch.float16)[-1], alone), rows


def test_many_rows_are_read_by_the_copy_engine_where_it_can_and_have_the_same_bits_where_not() -> None:
    wide = rows_of(66, 1056, FP8, False)
    weight = quantised_weight8(normal(70, 1040, seed=9), FP8, False)
    odd = quantised_weight8(normal(70, 1030, seed=9), FP8, False)
    even, shifted = (Rows8(wide.codes[:, at : at + 1040], wide.scales) for at in (16, 8))
    dense = Rows8(shifted.codes.contiguous(), shifted.scales)
    for x, matrix, kernel in (
        (even, weight, "_multiply8_many"),
        (dense, weight, "_multiply8_many"),
        (shifted, weight, "_multiply8"),  # its rows begin between multiples of 16 bytes
        (Rows8(wide.codes[:, :1030], wide.scales), odd, "_multiply8"),  # the matrix's do
        (last(even, 64), weight, "_multiply8"),
    ):
        launches = recording(lambda: linear8(x, matrix, torch.float16))  # noqa: B023
        assert [each.kernel.__name__ for each in launches] == [kernel]
    assert torch.equal(linear8(shifted, weight, torch.float16), linear8(dense, weight, torch.float16))


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_and_outputs_meet_each_other_once(kind: torch.dtype, blocks: bool) -> None:
    # Two tiles of rows, ten of outputs: eight that share their programs' time, and two.
    x, weight = rows_of(130, 144, kind, blocks), quantised_weight8(normal(600, 144, seed=9), kind, blocks)
    expected = reference.linear8(x, weight, torch.float16)
    assert_close(linear8(x, weight, torch.float16), expected, rtol=2e-3, atol=2e-3)


def test_whole_numbers_are_added_exactly_however_many() -> None:
    inputs = 9000
    x = Rows8(torch.full((1, inputs), 127, dtype=torch.int8, device=DEVICE), torch.full((1,), 2.0**-20, device=DEVICE))
    codes = torch.full((2, inputs), 127, dtype=torch.int8, device=DEVICE)
    codes[1, ::2] = -127
    weight = Weight8(codes, torch.ones(2, device=DEVICE))
    exact = torch.tensor([[127 * 127 * inputs * 2.0**-20, 0.0]], device=DEVICE)
    assert torch.equal(linear8(x, weight, torch.float16), exact.half())


def test_what_does_not_fit_is_refused() -> None:
    x, weight = rows_of(1, 40, INT8, False), quantised_weight8(normal(3, 40), INT8, False)
    with pytest.raises(ValueError, match="both must be one of"):
        linear8(rows_of(1, 40, FP8, False), weight, torch.float16)
    with pytest.raises(ValueError, match=r"rows \(1, 39\) do not fit a dense matrix \(3, 40\)"):
        linear8(Rows8(x.codes[:, 1:], x.scales), weight, torch.float16)
    with pytest.raises(ValueError, match="both have scales per channel, or both in blocks"):
        linear8(rows_of(1, 40, INT8, True), weight, torch.float16)


@pytest.mark.parametrize("columns", [1, 77, 300])
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_scales_are_those_of_the_reference_to_the_bit(kind: torch.dtype, blocks: bool, columns: int) -> None:
    x = normal(3, columns) * torch.tensor([[1.0], [1e-3], [300.0]], device=DEVICE).half()
    got, expected = (module.quantise8(x, kind, blocks) for module in (triton_quantise, reference))
    assert torch.equal(got.scales, expected.scales)
    assert torch.equal(values(got.codes), values(expected.codes))


def test_every_value_near_the_grid_of_fp8_gets_the_code_that_torch_gives_it() -> None:
    # Each code of E4M3, what lies halfway to the next and a little to either side; the largest sets the scale to one.
    codes = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    middle = (codes[1:] + codes[:-1]) / 2
    near = torch.cat((codes, middle, middle * (1 + 2**-12), middle * (1 - 2**-12)))
    x = torch.cat((near, -near))[None].to(DEVICE)
    got = triton_quantise.quantise8(x, FP8, False)
    assert got.scales.tolist() == [1.0]
    assert torch.equal(values(got.codes.cpu()), values(x.cpu().to(FP8)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_is_the_largest_value_over_the_largest_code_rounded_once_on_every_device(kind: torch.dtype) -> None:
    largest = normal(200, 1).float().abs() + 0.1
    expected = torch.from_numpy(largest[:, 0].cpu().numpy() / np.float32(LARGEST[kind]))
    # A product with the inverse rounds otherwise, and that is how torch divides by a number of Python on a GPU.
    assert not torch.equal(largest[:, 0].cpu() * torch.tensor(1 / LARGEST[kind]), expected)
    for found in (
        quantised_rows8(largest, kind, False),
        quantised_weight8(largest, kind, False),
        triton_quantise.quantise8(largest, kind, False),
    ):
        assert torch.equal(found.scales.cpu(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zeros_stays_zero(kind: torch.dtype) -> None:
    got = triton_quantise.quantise8(torch.zeros(2, 130, device=DEVICE), kind, True)
    assert torch.equal(dequantised8(got), torch.zeros(2, 130, device=DEVICE, dtype=torch.float64))


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_is_quantised_without_being_rounded_before(kind: torch.dtype, blocks: bool) -> None:
    x, residual, weight = normal(4, 300), normal(4, 300, seed=1), normal(300, seed=2)
    got, total = triton_quantise.add_rms_norm_quantise8(x, residual, weight, 1e-5, kind, blocks)
    expected, expected_total = reference.add_rms_norm_quantise8(x, residual, weight, 1e-5, kind, blocks)
    assert torch.equal(total, expected_total)
    assert_close(got.scales, expected.scales, rtol=1e-6, atol=0)
    # The order of the sum of squares may move a value over the middle between two codes.
    assert int((values(got.codes) != values(expected.codes)).sum()) <= 2
    alone = triton_quantise.rms_norm_quantise8(total[1:2], weight, 1e-5, kind, blocks)
    assert torch.equal(values(alone.codes[0]), values(got.codes[1])) and torch.equal(alone.scales[0], got.scales[1])


def test_what_lies_beyond_the_largest_code_becomes_the_largest() -> None:
    far = torch.tensor([-1e6, 1e6])
    for kind in KINDS:
        assert nearest(far, kind).float().tolist() == [-LARGEST[kind], LARGEST[kind]]
