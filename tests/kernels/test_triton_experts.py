"""A mixture of experts: routes, groups and grouped products of the reference, row by row the same in every batch."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kernels import reference_experts, triton_experts
from kernels.product_cases import random_weight4
from kernels.triton_experts import group, mixture, multiply_experts, route
from kernels.triton_layer import Matrix
from kernels.verify import nan_filled_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXPERTS, COLUMNS, WIDTH, MOST = 5, 64, 32, 2


@pytest.fixture(autouse=True)
def _memory_starts_as_nan() -> Iterator[None]:
    with nan_filled_memory():
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half().to(DEVICE)


def matrix(style: str, outputs: int, inputs: int) -> Matrix:
    if style == "dense":
        return normal(outputs, inputs, seed=outputs) * inputs**-0.5
    generator = torch.Generator(DEVICE).manual_seed(outputs)
    return random_weight4(outputs, inputs, 32, style, torch.float16, DEVICE, generator)


@pytest.mark.parametrize("normalised", [True, False])
def test_rows_go_to_their_best_experts_with_their_shares(normalised: bool) -> None:
    logits = normal(9, 33)
    logits[1] = 0.0
    logits[2, 20] = logits[2, 30] = 9.0
    got, expected = (module.route(logits, 3, normalised) for module in (triton_experts, reference_experts))
    assert torch.equal(got.experts, expected.experts)
    assert got.experts[1].tolist() == [0, 1, 2] and {20, 30} <= set(got.experts[2].tolist())
    assert_close(got.weights, expected.weights, rtol=1e-6, atol=1e-7)


def test_each_expert_gets_its_pairs_in_order() -> None:
    chosen = torch.tensor([[4, 1], [1, 0], [4, 0], [1, 4]] * 70, dtype=torch.int32, device=DEVICE)
    groups = group(chosen, EXPERTS)
    for expert in range(EXPERTS):
        mine = (chosen.flatten() == expert).nonzero().flatten().int()
        assert int(groups.counts[expert]) == len(mine)
        assert torch.equal(groups.pairs[expert, : len(mine)], mine)


@pytest.mark.parametrize("style", ["dense", "mxfp4"])
def test_a_mixture_is_that_of_the_reference(style: str) -> None:
    # Tiles of the gate's half and of up's: with four bits an expert fills whole tiles of 64 outputs.
    gate_up, down = matrix(style, EXPERTS * 2 * WIDTH, COLUMNS), matrix(style, EXPERTS * COLUMNS, WIDTH)
    x, logits = normal(6, COLUMNS), normal(6, EXPERTS, seed=1)
    expected = reference_experts.mixture(x, logits, gate_up, down, MOST)
    assert_close(mixture(x, logits, gate_up, down, MOST), expected, rtol=4e-3, atol=4e-3)


def test_a_row_has_the_same_bits_alone_and_among_rows_of_the_same_expert() -> None:
    gate_up, down = matrix("dense", EXPERTS * 2 * WIDTH, COLUMNS), matrix("dense", EXPERTS * COLUMNS, WIDTH)
    x, logits = normal(20, COLUMNS), normal(20, EXPERTS, seed=1)
    logits[:, 3] += 9.0  # one expert has two tiles of rows
    together = mixture(x, logits, gate_up, down, MOST)
    for row in (0, 19):
        own = slice(row, row + 1)
        assert torch.equal(mixture(x[own], logits[own], gate_up, down, MOST), together[own])


def test_no_rows_are_no_work() -> None:
    gate_up, down = matrix("dense", EXPERTS * 2 * WIDTH, COLUMNS), matrix("dense", EXPERTS * COLUMNS, WIDTH)
    assert mixture(normal(0, COLUMNS), normal(0, EXPERTS), gate_up, down, MOST).shape == (0, COLUMNS)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="a row goes to 1 to 5 experts, not 6"):
        route(normal(1, EXPERTS), 6, True)
    groups = group(torch.zeros(1, 1, dtype=torch.int32, device=DEVICE), 2)
    with pytest.raises(ValueError, match="experts of 32 outputs do not fill tiles of 64"):
        multiply_experts(normal(1, 32), matrix("mxfp4", 64, 32), groups, 1, shared=True)
