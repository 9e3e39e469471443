"""The launches of a decode layer: each gives what the reference gives, and a row's bits depend on the row alone."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from triton.runtime.interpreter import interpreter_builder

from kernels import layer_cases, reference_layer, triton_layer, tuning
from kernels.launch import Launch
from kernels.product_cases import random_weight4
from kernels.reference import rotary_tables
from kernels.reference_layer import hidden_of
from kernels.triton_layer import Cache, HeadWeights, Hidden, Matrix, Norm
from kernels.triton_product import Workspace
from kernels.verify import nan_filled_memory
from kernels.weight4 import Weight4
from kernels.weight8 import quantised_weight8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, WIDTH = 3, 1, 16, 330, 64
KINDS = ["dense", "fp8", "four bits"]
EPSILON = 1e-5
SPLITS = [(HIDDEN, 1), (700, 3)]  # of products with that many inputs


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


def norm_of(columns: int) -> Norm:
    return Norm(normal(columns, seed=2), EPSILON)


def workspace(rows: int = 40) -> Workspace:
    return Workspace(DEVICE, rows, 8 * 200)


def splits_of(weight: Matrix) -> int:
    return tuning.layer_product(*triton_layer.matrix_shape(weight), isinstance(weight, Weight4))[1]


class Step(NamedTuple):
    """Rows of two sequences and of none, and a cache in which nothing has been written."""

    positions: list[int]

    def cache(self, head_dim: int = HEAD_DIM) -> Cache:
        blank = torch.full((7, 4, KV_HEADS, head_dim), torch.nan, dtype=torch.float16, device=DEVICE)
        tables = torch.tensor([[4, 1, 6], [0, 5, -1]], dtype=torch.int32, device=DEVICE)
        sequences = torch.arange(len(self.positions), device=DEVICE) % 2
        return Cache(blank, blank.clone(), tables, sequences, torch.tensor(self.positions, device=DEVICE))


def head_weights(
    bias: bool, norm: bool, interleaved: bool, head_dim: int = HEAD_DIM, heads: int = HEADS
) -> HeadWeights:
    cosines, sines = rotary_tables([0.7**pair for pair in range(head_dim // 2)], 12, DEVICE)
    return HeadWeights(
        bias=normal((heads + 2 * KV_HEADS) * head_dim, seed=3) if bias else None,
        query_norm=normal(head_dim, seed=4) if norm else None,
        key_norm=normal(head_dim, seed=5) if norm else None,
        epsilon=1e-5,
        cosines=cosines,
        sines=sines,
        interleaved=interleaved,
    )


@pytest.mark.parametrize(("inputs", "splits"), SPLITS)
@pytest.mark.parametrize(("heads", "head_dim"), [(HEADS, HEAD_DIM), (1, 128)])  # of one program, and of two
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("bias", "norm", "interleaved"), [(False, False, False), (True, True, True), (False, True, False)]
)
def test_heads_are_projected_normed_turned_and_written(
    kind: str, bias: bool, norm: bool, interleaved: bool, heads: int, head_dim: int, inputs: int, splits: int
) -> None:
    qkv = matrix(kind, (heads + 2 * KV_HEADS) * head_dim, inputs)
    choice, found = tuning.layer_heads(head_dim, *triton_layer.matrix_shape(qkv), kind == "four bits")
    assert (found, head_dim // choice.block) == (splits, 2 if head_dim == 128 else 1)
    hidden = hidden_of(normal(5, inputs), norm_of(inputs))
    weights, step, work = head_weights(bias, norm, interleaved, head_dim, heads), Step([9, 0, 4, -1, 11]), workspace()
    cache, expected_cache = step.cache(head_dim), step.cache(head_dim)
    got = triton_layer.project_heads(hidden, EPSILON, qkv, weights, cache, work)
    expected = reference_layer.project_heads(hidden, EPSILON, qkv, weights, expected_cache)
    assert_close(got, expected, rtol=4e-3, atol=4e-3)
    for one, other in ((cache.keys, expected_cache.keys), (cache.values, expected_cache.values)):
        assert_close(one, other, rtol=4e-3, atol=4e-3, equal_nan=True)
        assert int(one.isfinite().sum()) == 4 * KV_HEADS * head_dim
    assert not work.counters.any()


@pytest.mark.parametrize(("code", "scaled"), [(torch.int8, True), (torch.float8_e4m3fn, False)])
def test_heads_are_written_to_caches_of_eight_bits(code: torch.dtype, scaled: bool) -> None:
    qkv = matrix("dense", (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN)
    hidden = hidden_of(normal(3, HIDDEN), norm_of(HIDDEN))
    heads, caches = head_weights(False, False, False), []
    for project, more in ((triton_layer.project_heads, (workspace(),)), (reference_layer.project_heads, ())):
        cache = Step([9, 0, 4]).cache()
        cache = cache._replace(
            keys=torch.zeros_like(cache.keys).to(code), values=torch.zeros_like(cache.values).to(code)
        )
        if scaled:
            blank = torch.full(cache.keys.shape[:3], 1.0, device=DEVICE)
            cache = cache._replace(scales=(blank, blank.clone()))
        project(hidden, EPSILON, qkv, heads, cache, *more)
        scales = cache.scales or (torch.ones((), device=DEVICE),) * 2
        caches.append([part.float() * scale[..., None] for part, scale in zip(cache[:2], scales, strict=True)])
    for got, expected in zip(*caches, strict=True):
        assert_close(got, expected, rtol=2**-3, atol=expected.abs().max().item() / 100)
        assert int((got != 0).sum()) > 40


@pytest.mark.parametrize(("inputs", "splits"), SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_is_put_on_its_output(kind: str, inputs: int, splits: int) -> None:
    gate_up, work = matrix(kind, 2 * WIDTH, inputs), workspace()
    assert splits_of(gate_up) == splits
    hidden = hidden_of(normal(3, inputs), norm_of(inputs))
    got = triton_layer.project_gated(hidden, EPSILON, gate_up, work)
    assert_close(got, reference_layer.project_gated(hidden, EPSILON, gate_up), rtol=4e-3, atol=4e-3)
    assert not work.counters.any()


def test_a_gate_may_end_in_the_middle_of_a_tile() -> None:
    hidden, gate_up = hidden_of(normal(3, HIDDEN), norm_of(HIDDEN)), matrix("dense", 2 * 50, HIDDEN)
    got = triton_layer.project_gated(hidden, EPSILON, gate_up, workspace())
    assert_close(got, reference_layer.project_gated(hidden, EPSILON, gate_up), rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize(("inputs", "splits"), SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_added_to_the_residual_and_leaves_what_the_next_norm_needs(
    kind: str, inputs: int, splits: int
) -> None:
    weight, work = matrix(kind, 130, inputs), workspace()
    assert splits_of(weight) == splits
    x, residual, norm = normal(3, inputs), hidden_of(normal(3, 130, seed=7)), norm_of(130)
    got = triton_layer.project_added(x, weight, residual, norm, work)
    expected = reference_layer.project_added(x, weight, residual, norm)
    assert_close(got.values, expected.values, rtol=2e-3, atol=2e-3)
    # The rest is made of what was stored, and the weighted values are rounded once.
    left = hidden_of(got.values, norm)
    assert torch.equal(got.weighted, left.weighted)
    assert_close(got.squares, left.squares, rtol=1e-5, atol=0)
    assert not work.counters.any()


def test_tokens_become_rows_with_what_the_next_norm_needs() -> None:
    embedding, tokens = normal(9, 130), torch.tensor([8, 0, 8], device=DEVICE)
    got, expected = (module.embed(tokens, embedding, norm_of(130)) for module in (triton_layer, reference_layer))
    assert torch.equal(got.values, expected.values)
    assert torch.equal(got.weighted, expected.weighted)
    assert_close(got.squares, expected.squares, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("columns", "splits"), SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_alone_and_in_every_batch(kind: str, columns: int, splits: int) -> None:
    qkv, down = matrix(kind, (HEADS + 2 * KV_HEADS) * HEAD_DIM, columns), matrix(kind, 50, columns)
    gate_up = matrix(kind, 2 * WIDTH, columns)
    assert {splits_of(each) for each in (qkv, gate_up, down)} == {splits}
    heads, work = head_weights(True, True, False), workspace()
    rows = hidden_of(normal(18, columns), norm_of(columns))
    residual = hidden_of(normal(18, 50, seed=1))

    def results(first: int) -> list[Tensor]:
        """Everything that the last row gets, among 18 - first rows; the first six of all are padding."""
        some, before = (Hidden(*(part[first:] for part in hidden)) for hidden in (rows, residual))
        cache = (
            Step([max(row - 6, -1) for row in range(first, 18)])
            .cache()
            ._replace(sequences=torch.zeros(18 - first, dtype=torch.int64, device=DEVICE))
        )
        queries = triton_layer.project_heads(some, EPSILON, qkv, heads, cache, work)
        gated = triton_layer.project_gated(some, EPSILON, gate_up, work)
        added = triton_layer.project_added(some.values, down, before, norm_of(50), work)
        slot = int(cache.tables[0, 11 // 4]), 11 % 4
        return [queries[-1], gated[-1], *(part[-1] for part in added), cache.keys[slot], cache.values[slot]]

    alone = results(17)
    for rows_together in (2, 16, 18):
        for one, other in zip(results(18 - rows_together), alone, strict=True):
            assert torch.equal(one, other), rows_together


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_without_inputs_adds_nothing(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    columns = 512  # four tiles: two and two, and none for a third split
    qkv, down = matrix(kind, (HEADS + 2 * KV_HEADS) * HEAD_DIM, columns), matrix(kind, 50, columns)
    gate_up, heads = matrix(kind, 2 * WIDTH, columns), head_weights(True, True, False)
    rows, residual = hidden_of(normal(3, columns), norm_of(columns)), hidden_of(normal(3, 50, seed=1))

    def results(splits: int) -> list[Tensor]:
        monkeypatch.setattr(tuning, "layer_product", lambda *shape: (Launch(64, 4, 5), splits))
        cache, work = Step([9, 0, 4]).cache(), workspace()
        queries = triton_layer.project_heads(rows, EPSILON, qkv, heads, cache, work)
        gated = triton_layer.project_gated(rows, EPSILON, gate_up, work)
        added = triton_layer.project_added(rows.values, down, residual, norm_of(50), work)
        assert not work.counters.any()
        return [queries, gated, *added, cache.keys.nan_to_num(), cache.values.nan_to_num()]

    for one, other in zip(results(3), results(2), strict=True):
        assert torch.equal(one, other)


def test_a_layer_is_at_most_five_launches() -> None:
    assert layer_cases.launches_of_a_layer() == 5


def test_no_rows_are_no_work() -> None:
    nothing = hidden_of(normal(0, HIDDEN), norm_of(HIDDEN))
    assert triton_layer.project_gated(nothing, EPSILON, matrix("dense", 20, HIDDEN), workspace()).shape == (0, 10)


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
    got = triton_layer.project_added(x, weight, residual, norm_of(outputs), work)
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
    hidden = hidden_of(normal(2, HIDDEN), norm_of(HIDDEN))
    with pytest.raises(ValueError, match="need more than this workspace"):
        triton_layer.project_gated(hidden, EPSILON, matrix("dense", 128, HIDDEN), Workspace(DEVICE, 1, 8))
    cache = Step([0, 1]).cache()
    odd = head_weights(False, False, False)
    with pytest.raises(ValueError, match="heads of 16 that turn in 5 pairs have no fused product here"):
        odd = odd._replace(cosines=odd.cosines[:, :5])
        triton_layer.project_heads(hidden, EPSILON, matrix("dense", 80, HIDDEN), odd, cache, workspace())
    with pytest.raises(ValueError, match="with scales per channel, not in blocks"):
        blocks = quantised_weight8(normal(128, HIDDEN), torch.int8, blocks=True)
        triton_layer.project_gated(hidden, EPSILON, blocks, workspace())
    with pytest.raises(ValueError, match="a gate of 40 outputs does not fill tiles of 64"):
        triton_layer.project_gated(hidden, EPSILON, matrix("four bits", 80, HIDDEN), workspace())
