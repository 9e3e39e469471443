"""The launches of a decode layer: each gives what the reference gives, and a row's bits depend on the row alone."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from triton.runtime.interpreter import interpreter_builder

from kernels import layer_cases, reference_layer, triton_layer, tuning
from kernels.product_cases import random_weight4
from kernels.reference import rotary_tables
from kernels.reference_layer import hidden_of
from kernels.triton_layer import Cache, HeadWeights, Matrix, Norm, Workspace
from kernels.verify import nan_filled_memory
from kernels.weight8 import quantised_weight8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, WIDTH = 3, 1, 16, 330, 64
KINDS = ["dense", "fp8", "four bits"]


@pytest.fixture(autouse=True)
def _memory_starts_as_nan() -> Iterator[None]:
    with nan_filled_memory():
        yield


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).half().to(DEVICE)


def matrix(kind: str, outputs: int, inputs: int, seed: int = 5) -> Matrix:
    if kind in ("dense", "fp8"):
        dense = normal(outputs, inputs, seed=seed, scale=inputs**-0.5)
        return dense if kind == "dense" else quantised_weight8(dense, torch.float8_e4m3fn, blocks=False)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return random_weight4(outputs, inputs, 64, "zeros", torch.float16, DEVICE, generator)


def workspace(rows: int = 40) -> Workspace:
    return Workspace(DEVICE, rows, 8 * 200)


class Step(NamedTuple):
    """Rows of two sequences and of none, and a cache in which nothing has been written."""

    positions: list[int]

    def cache(self) -> Cache:
        blank = torch.full((7, 4, KV_HEADS, HEAD_DIM), torch.nan, dtype=torch.float16, device=DEVICE)
        tables = torch.tensor([[4, 1, 6], [0, 5, -1]], dtype=torch.int32, device=DEVICE)
        sequences = torch.arange(len(self.positions), device=DEVICE) % 2
        return Cache(blank, blank.clone(), tables, sequences, torch.tensor(self.positions, device=DEVICE))


def head_weights(bias: bool, norm: bool, interleaved: bool) -> HeadWeights:
    cosines, sines = rotary_tables([0.7**pair for pair in range(HEAD_DIM // 2)], 12, DEVICE)
    return HeadWeights(
        bias=normal((HEADS + 2 * KV_HEADS) * HEAD_DIM, seed=3) if bias else None,
        query_norm=normal(HEAD_DIM, seed=4) if norm else None,
        key_norm=normal(HEAD_DIM, seed=5) if norm else None,
        epsilon=1e-5,
        cosines=cosines,
        sines=sines,
        interleaved=interleaved,
    )


@pytest.mark.parametrize(("inputs", "splits"), [(HIDDEN, 1), (520, 2)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("bias", "norm", "interleaved"), [(False, False, False), (True, True, True), (False, True, False)]
)
def test_heads_are_projected_normed_turned_and_written(
    kind: str, bias: bool, norm: bool, interleaved: bool, inputs: int, splits: int
) -> None:
    qkv = matrix(kind, (HEADS + 2 * KV_HEADS) * HEAD_DIM, inputs)
    assert tuning.layer_product(*triton_layer.matrix_shape(qkv))[1] == splits
    hidden, before = hidden_of(normal(5, inputs)), Norm(normal(inputs, seed=2), 1e-5)
    heads, step, work = head_weights(bias, norm, interleaved), Step([9, 0, 4, -1, 11]), workspace()
    cache, expected_cache = step.cache(), step.cache()
    got = triton_layer.project_heads(hidden, before, qkv, heads, cache, work)
    expected = reference_layer.project_heads(hidden, before, qkv, heads, expected_cache)
    assert_close(got, expected, rtol=4e-3, atol=4e-3)
    for one, other in ((cache.keys, expected_cache.keys), (cache.values, expected_cache.values)):
        assert_close(one, other, rtol=4e-3, atol=4e-3, equal_nan=True)
        assert int(one.isfinite().sum()) == 4 * KV_HEADS * HEAD_DIM
    assert not work.counters.any()


@pytest.mark.parametrize(("code", "scaled"), [(torch.int8, True), (torch.float8_e4m3fn, False)])
def test_heads_are_written_to_caches_of_eight_bits(code: torch.dtype, scaled: bool) -> None:
    qkv = matrix("dense", (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN)
    hidden, before = hidden_of(normal(3, HIDDEN)), Norm(normal(HIDDEN, seed=2), 1e-5)
    heads, caches = head_weights(False, False, False), []
    for project, more in ((triton_layer.project_heads, (workspace(),)), (reference_layer.project_heads, ())):
        cache = Step([9, 0, 4]).cache()
        cache = cache._replace(
            keys=torch.zeros_like(cache.keys).to(code), values=torch.zeros_like(cache.values).to(code)
        )
        if scaled:
            blank = torch.full(cache.keys.shape[:3], 1.0, device=DEVICE)
            cache = cache._replace(scales=(blank, blank.clone()))
        project(hidden, before, qkv, heads, cache, *more)
        scales = cache.scales or (torch.ones((), device=DEVICE),) * 2
        caches.append([part.float() * scale[..., None] for part, scale in zip(cache[:2], scales, strict=True)])
    for got, expected in zip(*caches, strict=True):
        assert_close(got, expected, rtol=2**-3, atol=expected.abs().max().item() / 100)
        assert int((got != 0).sum()) > 40


@pytest.mark.parametrize("inputs", [HIDDEN, 520])  # one split, and two
@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_is_put_on_its_output(kind: str, inputs: int) -> None:
    gate_up = matrix(kind, 2 * WIDTH, inputs)
    hidden, norm = hidden_of(normal(3, inputs)), Norm(normal(inputs, seed=2), 1e-5)
    got = triton_layer.project_gated(hidden, norm, gate_up, workspace())
    assert_close(got, reference_layer.project_gated(hidden, norm, gate_up), rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_added_to_the_residual_and_leaves_its_squares(kind: str) -> None:
    weight = matrix(kind, 130, 520)
    x, residual = normal(3, 520), hidden_of(normal(3, 130, seed=7))
    got = triton_layer.project_added(x, weight, residual, workspace())
    expected = reference_layer.project_added(x, weight, residual)
    assert_close(got.values, expected.values, rtol=2e-3, atol=2e-3)
    assert_close(got.squares, hidden_of(got.values).squares, rtol=1e-5, atol=0)


def test_tokens_become_rows_with_their_squares() -> None:
    embedding, tokens = normal(9, 130), torch.tensor([8, 0, 8], device=DEVICE)
    got, expected = (module.embed(tokens, embedding) for module in (triton_layer, reference_layer))
    assert torch.equal(got.values, expected.values)
    assert_close(got.squares, expected.squares, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_alone_and_in_every_batch(kind: str) -> None:
    columns = 520
    qkv, down = matrix(kind, (HEADS + 2 * KV_HEADS) * HEAD_DIM, columns), matrix(kind, 50, columns)
    gate_up, norm = matrix(kind, 2 * WIDTH, columns), Norm(normal(columns, seed=2), 1e-5)
    assert {tuning.layer_product(*triton_layer.matrix_shape(each))[1] for each in (qkv, gate_up, down)} == {2}
    heads, work = head_weights(True, True, False), workspace()
    rows = hidden_of(normal(18, columns))
    residual = hidden_of(normal(18, 50, seed=1))

    def results(first: int) -> list[Tensor]:
        """Everything that the last row gets, among 18 - first rows; the first six of all are padding."""
        some = triton_layer.Hidden(rows.values[first:], rows.squares[first:])
        cache = (
            Step([max(row - 6, -1) for row in range(first, 18)])
            .cache()
            ._replace(sequences=torch.zeros(18 - first, dtype=torch.int64, device=DEVICE))
        )
        queries = triton_layer.project_heads(some, norm, qkv, heads, cache, work)
        gated = triton_layer.project_gated(some, norm, gate_up, work)
        added = triton_layer.project_added(
            some.values, down, triton_layer.Hidden(residual.values[first:], residual.squares[first:]), work
        )
        slot = int(cache.tables[0, 11 // 4]), 11 % 4
        return [queries[-1], gated[-1], added.values[-1], added.squares[-1], cache.keys[slot], cache.values[slot]]

    alone = results(17)
    for rows_together in (2, 16, 18):
        for one, other in zip(results(18 - rows_together), alone, strict=True):
            assert torch.equal(one, other), rows_together


def test_a_layer_is_at_most_five_launches() -> None:
    assert layer_cases.launches_of_a_layer() == 5


def test_no_rows_are_no_work() -> None:
    nothing, norm = hidden_of(normal(0, HIDDEN)), Norm(normal(HIDDEN, seed=2), 1e-5)
    assert triton_layer.project_gated(nothing, norm, matrix("dense", 20, HIDDEN), workspace()).shape == (0, 10)


@pytest.mark.parametrize("last", [0, 2])
def test_splits_are_added_in_order_by_the_last_of_them(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    if last == 0:
        if DEVICE == "cuda":
            pytest.skip("which program comes last is the device's own affair")
        forwards = interpreter_builder.set_grid_idx
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z: forwards(x, 2 - y, z))
    outputs, part = 70, 256
    assert tuning.layer_product(outputs, 3 * part)[1] == 3
    # The first two splits cancel each other and are so large that either alone swallows the third.
    loud, quiet = normal(2, part, scale=100.0), normal(2, part, seed=1)
    x = torch.cat([loud, -loud, quiet], dim=1)
    row = normal(outputs, part, seed=5, scale=1000.0)
    weight = torch.cat([row, row, normal(outputs, part, seed=6)], dim=1)
    residual, work = hidden_of(normal(2, outputs, seed=7)), workspace()
    got = triton_layer.project_added(x, weight, residual, work)
    assert not work.counters.any()

    partial = work.partial[: 3 * 2 * outputs].view(3, 2, outputs)
    for split, (some, weights) in enumerate(zip(x.split(part, 1), weight.split(part, 1), strict=True)):
        expected = some.double() @ weights.double().T
        assert_close(partial[split].double(), expected, rtol=0, atol=1e-6 * expected.abs().max().item())
    before = residual.values.float()
    assert torch.equal(got.values, (((partial[0] + partial[1]) + partial[2]) + before).half())
    for first, second, third in ((0, 2, 1), (2, 1, 0)):
        other = (((partial[first] + partial[second]) + partial[third]) + before).half()
        assert not torch.equal(got.values, other)
    assert not torch.equal(got.values, (((before + partial[0]) + partial[1]) + partial[2]).half())


def test_a_workspace_that_is_too_small_and_heads_that_do_not_fit_are_refused() -> None:
    hidden, norm = hidden_of(normal(2, HIDDEN)), Norm(normal(HIDDEN, seed=2), 1e-5)
    with pytest.raises(ValueError, match="need more than this workspace"):
        triton_layer.project_gated(hidden, norm, matrix("dense", 128, HIDDEN), Workspace(DEVICE, 1, 8))
    cache = Step([0, 1]).cache()
    odd = head_weights(False, False, False)
    with pytest.raises(ValueError, match="heads of 16 that turn in 5 pairs have no fused product here"):
        odd = odd._replace(cosines=odd.cosines[:, :5])
        triton_layer.project_heads(hidden, norm, matrix("dense", 80, HIDDEN), odd, cache, workspace())
    with pytest.raises(ValueError, match="with scales per channel, not in blocks"):
        blocks = quantised_weight8(normal(128, HIDDEN), torch.int8, blocks=True)
        triton_layer.project_gated(hidden, norm, blocks, workspace())
    with pytest.raises(ValueError, match="a gate of 40 outputs does not fill tiles of 64"):
        triton_layer.project_gated(hidden, norm, matrix("four bits", 80, HIDDEN), workspace())
