"""Products with four-bit weights: the reference's result on every path, and a row's bits that no other row changes."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kernels import reference, triton_linear4, tuning
from kernels.product_cases import random_weight4
from kernels.triton_linear4 import dequantise, linear4
from kernels.verify import nan_filled_memory
from kernels.weight4 import Weight4, dequantised, packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _memory_starts_as_nan() -> Iterator[None]:
    with nan_filled_memory():
        yield


def rows_of(rows: int, inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, inputs, generator=generator).half().to(DEVICE)


def weight_of(outputs: int, inputs: int, group: int = 32, offsets: str = "minima") -> Weight4:
    generator = torch.Generator(DEVICE).manual_seed(1)
    return random_weight4(outputs, inputs, group, offsets, torch.float16, DEVICE, generator)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("offsets", ["symmetric", "zeros", "minima"])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_every_kind_and_group_gives_the_product_of_the_reference(group: int, offsets: str, exact: bool) -> None:
    x, weight = rows_of(3, 200), weight_of(70 if exact else 10, 200, group, offsets)
    assert_close(linear4(x, weight, exact), reference.linear4(x, weight), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("exact", [True, False])
def test_mxfp4_gives_the_product_of_the_reference(exact: bool) -> None:
    x, weight = rows_of(2, 200), weight_of(6, 200, 32, "mxfp4")
    assert_close(linear4(x, weight, exact), reference.linear4(x, weight), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("rows", [0, 1, 4, 5, 17])
def test_any_number_of_rows_is_served_by_both_ways(rows: int) -> None:
    x, weight = rows_of(rows, 130), weight_of(9, 130)
    for exact in (True, False):
        assert_close(linear4(x, weight, exact), reference.linear4(x, weight), rtol=2e-3, atol=2e-3)


def test_many_rows_meet_weights_that_were_dequantised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_linear4, "MANY_ROWS", 5)
    x, weight = rows_of(6, 100), weight_of(66, 100)
    assert torch.equal(linear4(x, weight, exact=False), x @ dequantise(weight, x.dtype).T)


@pytest.mark.parametrize("offsets", ["symmetric", "zeros", "minima", "mxfp4"])
def test_dequantised_weights_are_rounded_once_or_nearly(offsets: str) -> None:
    weight = weight_of(66, 140, 32, offsets)
    exact = dequantised(weight)
    got = dequantise(weight, torch.float16)
    # A minimum is added in float32, which rounds before the last rounding does.
    assert (got.double() - exact).abs().le(exact.abs() * 2**-11 * (1 + 2**-10) + 2**-24).all()
    if offsets != "minima":
        assert torch.equal(got, exact.half())


def test_a_row_has_the_same_bits_alone_and_in_every_batch() -> None:
    weight = weight_of(40, 400, 128, "zeros")
    assert tuning.linear4_split(40, 400)[1] == 2
    x = rows_of(70, 400)
    alone = {row: linear4(x[row : row + 1], weight) for row in (0, 69)}
    for rows in (2, 17, 33, 65):
        together = linear4(x[-rows:], weight)
        for row, bits in alone.items():
            if (at := row - 70 + rows) >= 0:
                assert torch.equal(together[at], bits[0]), (rows, row)


def test_up_to_four_rows_share_a_pass_without_touching_each_other() -> None:
    weight, x = weight_of(6, 150), rows_of(4, 150)
    alone = [linear4(x[row : row + 1], weight, exact=False)[0] for row in range(4)]
    for rows in (2, 3, 4):
        assert torch.equal(linear4(x[:rows], weight, exact=False), torch.stack(alone[:rows]))


def test_a_small_workspace_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = weight_of(40, 520, 128), rows_of(5, 520)
    at_once = linear4(x, weight)
    monkeypatch.setattr(tuning, "SPLIT_WORKSPACE_BYTES", 2 * 2 * 40 * 4)
    assert torch.equal(linear4(x, weight), at_once)


def test_rows_may_be_part_of_wider_ones() -> None:
    weight, part = weight_of(20, 96), rows_of(3, 120)[:, 16:112]
    for exact in (True, False):
        assert torch.equal(linear4(part, weight, exact), linear4(part.contiguous(), weight, exact))


def test_an_input_that_no_weight_looks_at_may_be_anything() -> None:
    codes = torch.full((2, 64), 8, dtype=torch.uint8)
    codes[:, 0] = 9
    weight = packed(codes.to(DEVICE), torch.ones(2, 1, dtype=torch.float16, device=DEVICE), 64)
    x = torch.full((1, 64), 60000.0, dtype=torch.float16, device=DEVICE)
    x[0, 0] = 1.0
    for exact in (True, False):
        assert linear4(x, weight, exact).tolist() == [[1.0, 1.0]]


def test_what_does_not_fit_is_refused() -> None:
    weight = weight_of(8, 64)
    with pytest.raises(ValueError, match=r"x \(1, 63\) must be dense rows of the weight's 64 inputs"):
        linear4(rows_of(1, 63), weight)
    with pytest.raises(ValueError, match="activations are float16 or bfloat16 here"):
        linear4(rows_of(1, 64).float(), weight)
