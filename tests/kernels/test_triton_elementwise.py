"""Norm, rotary, SwiGLU and the KV write against their references, on odd shapes, with memory that starts as NaN."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kernels import reference, triton_kv, triton_norm, triton_rotary, triton_swiglu
from kernels.verify import nan_filled_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def _memory_starts_as_nan() -> Iterator[None]:
    with nan_filled_memory():
        yield


def normal(*shape: int, kind: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(kind).to(DEVICE)


def whole(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def test_new_memory_in_these_tests_is_nan() -> None:
    like = normal(2, 3)
    assert torch.empty(4, device=DEVICE).isnan().all()
    assert torch.empty_like(like).isnan().all()
    assert like.new_empty((2,)).isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 77, 576])
def test_the_norm_is_that_of_the_reference(columns: int, kind: torch.dtype) -> None:
    x, weight = normal(3, columns, kind=kind), normal(columns, kind=kind, seed=1)
    assert_close(triton_norm.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_of_a_sum_rounds_the_sum_once_before_it_norms(kind: torch.dtype) -> None:
    x, residual, weight = normal(3, 77, kind=kind), normal(3, 77, kind=kind, seed=1), normal(77, kind=kind, seed=2)
    normed, total = triton_norm.add_rms_norm(x, residual, weight, 1e-6)
    expected, expected_total = reference.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, expected_total)
    assert_close(normed, expected)
    if kind == torch.float16:
        # Norming the sum before its rounding would change every fourth element by one step.
        assert int((normed != expected).sum()) <= 2


def test_a_sum_and_its_norm_have_the_type_of_the_residual() -> None:
    x, residual, weight = normal(2, 33), normal(2, 33, kind=torch.float16, seed=1), normal(33, seed=2)
    got, expected = (module.add_rms_norm(x, residual, weight, 1e-6) for module in (triton_norm, reference))
    assert torch.equal(got[1], expected[1])
    assert_close(got[0], expected[0])


def test_a_norm_reads_rows_of_a_wider_tensor() -> None:
    wide, weight = normal(3, 50), normal(20, seed=1)
    assert_close(triton_norm.rms_norm(wide[:, 7:27], weight, 1e-5), reference.rms_norm(wide[:, 7:27], weight, 1e-5))


def test_a_row_is_normed_alike_alone_and_among_others() -> None:
    x, weight = normal(4, 300), normal(300, seed=1)
    together = triton_norm.rms_norm(x, weight, 1e-5)
    for row in range(4):
        assert torch.equal(triton_norm.rms_norm(x[row : row + 1], weight, 1e-5)[0], together[row])


def test_a_weight_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="need a weight of that size"):
        triton_norm.rms_norm(normal(2, 8), normal(9), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [10, 6])
def test_heads_turn_like_the_reference_in_both_pair_styles(pairs: int, interleaved: bool, kind: torch.dtype) -> None:
    # Queries and keys as views of one fused projection, the last row padding.
    fused = normal(4, 9, 20, kind=kind)
    queries, keys = fused[:, :5], fused[:, 5:7]
    positions = whole(0, 9, 3, -1)
    cosines, sines = reference.rotary_tables([0.7**pair for pair in range(pairs)], 10, DEVICE)
    got = triton_rotary.rotary(queries, keys, positions, cosines, sines, interleaved)
    expected = reference.rotary(queries, keys, positions, cosines, sines, interleaved)
    assert_close(got[0], expected[0])
    assert_close(got[1], expected[1])
    assert torch.equal(got[0][0], queries[0])
    assert torch.equal(got[1][..., 2 * pairs :], keys[..., 2 * pairs :])


def test_tables_wider_than_a_head_are_refused() -> None:
    cosines, sines = reference.rotary_tables([1.0] * 5, 3, DEVICE)
    with pytest.raises(ValueError, match="do not fit a head size of 8"):
        triton_rotary.rotary(normal(1, 2, 8), normal(1, 1, 8), whole(0), cosines, sines, False)


@pytest.mark.parametrize("kind", KINDS)
def test_swiglu_takes_the_halves_of_one_product(kind: torch.dtype) -> None:
    gate, up = (normal(2, 2 * 1030, kind=kind) * 6).chunk(2, dim=1)
    got = triton_swiglu.swiglu(gate, up)
    assert got.is_contiguous()
    assert_close(got, reference.swiglu(gate, up))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_an_extreme_gate_neither_overflows_nor_turns_to_nan() -> None:
    gate = torch.tensor([[-1e4, -200.0, 0.0, 200.0, 1e4]], device=DEVICE)
    assert triton_swiglu.swiglu(gate, torch.ones_like(gate)).tolist() == [[0.0, 0.0, 0.0, 200.0, 1e4]]


def test_no_rows_are_no_work() -> None:
    nothing = normal(0, 12)
    assert triton_swiglu.swiglu(nothing, nothing).shape == (0, 12)
    assert triton_norm.rms_norm(nothing, normal(12), 1e-5).shape == (0, 12)


@pytest.mark.parametrize("cache_kind", KINDS)
def test_keys_and_values_land_in_their_slots_and_nowhere_else(cache_kind: torch.dtype) -> None:
    fused = normal(5, 9, 20)
    keys, values = fused[:, 3:6], fused[:, 6:]
    tables = torch.tensor([[4, 1], [0, -1], [6, 3]], dtype=torch.int32, device=DEVICE)
    sequences, positions = whole(0, 0, 1, 2, 2), whole(3, 4, 0, 7, -1)
    got, expected = (
        tuple(torch.full((7, 4, 3, 20), torch.nan, dtype=cache_kind, device=DEVICE) for _ in range(2)) for _ in range(2)
    )
    triton_kv.write_kv(keys, values, *got, tables, sequences, positions)
    reference.write_kv(keys, values, *expected, tables, sequences, positions)
    for cache, exact in zip(got, expected, strict=True):
        assert_close(cache, exact, rtol=0, atol=0, equal_nan=True)
        assert int(cache.isfinite().sum()) == 4 * 3 * 20
