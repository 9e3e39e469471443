"""Products with four-bit weights: the reference's result on every path, and a row's bits that no other row changes."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from triton.runtime.interpreter import interpreter_builder

from kernels import reference, triton_linear4, tuning
from kernels.launch import Launch, recording
from kernels.product_cases import random_weight4
from kernels.triton_linear4 import dequantise, linear4
from kernels.triton_product import Workspace
from kernels.verify import nan_filled_memory
from kernels.weight4 import Weight4, dequantised, packed, unpacked

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = [(128, "symmetric"), (64, "zeros"), (32, "minima"), (32, "mxfp4")]  # groups and offsets


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


def launched(call: Callable[[], object]) -> list[tuple[str, tuple[int, ...]]]:
    """The kernels of a call and their grids."""
    return [(each.kernel.__name__, each.grid) for each in recording(call)]


@pytest.mark.parametrize(("inputs", "splits"), [(200, 1), (700, 3)])
@pytest.mark.parametrize(("group", "offsets"), KINDS)
def test_a_row_has_the_same_bits_alone_and_in_every_batch(group: int, offsets: str, inputs: int, splits: int) -> None:
    weight, x = weight_of(70, inputs, group, offsets), rows_of(70, inputs)
    assert tuning.linear4_split(70, inputs)[1] == splits
    alone = {row: linear4(x[row : row + 1], weight) for row in (0, 69)}
    for rows in (2, 17, 64, 65, 70):  # those of more than 64 rows in order, without splits between them
        together = linear4(x[-rows:], weight)
        for row, bits in alone.items():
            if (at := row - 70 + rows) >= 0:
                assert torch.equal(together[at], bits[0]), (rows, row)


def test_many_rows_go_through_all_splits_in_one_program_and_few_through_one_each() -> None:
    weight, work = weight_of(70, 700), Workspace(DEVICE, 64, 3 * 70)
    few, many = rows_of(64, 700), rows_of(65, 700)
    assert launched(lambda: linear4(many, weight)) == [("_multiply", (2, 1, 2))]
    assert launched(lambda: linear4(many, weight, work=work)) == [("_multiply", (2, 1, 2))]
    assert launched(lambda: linear4(few, weight, work=work)) == [("_multiply", (2, 3, 1))]
    assert launched(lambda: linear4(few, weight))[0] == ("_multiply", (2, 3, 1))
    assert [name for name, _ in launched(lambda: linear4(few, weight))] == ["_multiply", "_add_splits"]


@pytest.mark.parametrize("rows", [0, 1, 5, 17, 64, 65])
@pytest.mark.parametrize(("group", "offsets"), KINDS)
def test_a_workspace_changes_no_bit_and_its_counters_are_zero_again(group: int, offsets: str, rows: int) -> None:
    weight, x, work = weight_of(70, 700, group, offsets), rows_of(rows, 700), Workspace(DEVICE, 64, 3 * 70)
    assert torch.equal(linear4(x, weight, work=work), linear4(x, weight))
    assert not work.counters.any()


def test_splits_are_added_in_order_by_one_program_another_launch_or_whoever_comes_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The first two splits cancel each other and are so large that either alone swallows the third.
    part, weight = rows_of(2, 256), weight_of(70, 256, 128, "symmetric")
    codes, scales, _ = unpacked(weight)
    x = torch.cat([part * 100, part * -100, part], dim=1)
    weight = packed(codes.repeat(1, 3), torch.cat([scales * 100, scales * 100, scales], dim=1), 128)
    by_another, work = linear4(x, weight), Workspace(DEVICE, 2, 3 * 70)
    assert torch.equal(linear4(x.repeat(33, 1), weight)[:2], by_another)
    if DEVICE == "cpu":  # on a GPU, which program comes last is its own affair
        forwards = interpreter_builder.set_grid_idx
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z: forwards(x, 2 - y, z))
    assert torch.equal(linear4(x, weight, work=work), by_another)
    sums = work.partial[: 3 * 2 * 70].view(3, 2, 70)
    for first, second, third in ((0, 1, 2), (0, 2, 1), (2, 1, 0)):
        in_order = ((sums[first] + sums[second]) + sums[third]).half()
        assert torch.equal(in_order, by_another) == (third == 2)


@pytest.mark.parametrize("rows", [2, 65])
def test_a_split_without_inputs_adds_nothing(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    weight, x, results = weight_of(70, 512, 64, "zeros"), rows_of(rows, 512), []
    for splits in (2, 3):  # of four tiles: two and two, and none for the third
        work = Workspace(DEVICE, 64, 3 * 70)
        monkeypatch.setattr(tuning, "linear4_split", lambda *shape: (Launch(64, 4, 3), splits))  # noqa: B023
        results += [linear4(x, weight), linear4(x, weight, work=work)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_few_rows_do_not_touch_each_other_even_where_that_is_not_asked_for() -> None:
    weight, x = weight_of(6, 150), rows_of(triton_linear4.MANY_ROWS, 150)
    alone = [linear4(x[row : row + 1], weight, exact=False)[0] for row in range(len(x))]
    for rows in (2, 3, 4, len(x)):
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
    with pytest.raises(ValueError, match="5 rows of 70 outputs in 3 splits need more than this workspace"):
        linear4(rows_of(5, 700), weight_of(70, 700), work=Workspace(DEVICE, 1, 8))
