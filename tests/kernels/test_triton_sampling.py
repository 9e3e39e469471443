"""The Triton sampler against the numpy specification of the noise, and the count of accepted drafts."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference, triton_sampling, tuning
from kernels.triton_sampling import _gumbel, _small_uniform
from kernels.verify import nan_filled_memory
from shared import noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEEDS = [0, 1, 2**32 - 1, 2**63 + 12345, 2**64 - 1]
POSITIONS = [0, 7, 2**32 - 1, 2**32, 2**40 + 3]


@pytest.fixture(autouse=True)
def _memory_starts_as_nan() -> Iterator[None]:
    with nan_filled_memory():
        yield


@triton.jit
def _draw(seeds_ptr, positions_ptr, v_ptr, g_ptr, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    v = _small_uniform((FIRST + lane).to(tl.uint32), tl.load(positions_ptr + row), tl.load(seeds_ptr + row))
    tl.store(v_ptr + row * BLOCK + lane, v)
    tl.store(g_ptr + row * BLOCK + lane, _gumbel(v))


@triton.jit
def _gumbel_of(v_ptr, g_ptr, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(g_ptr + lane, _gumbel(tl.load(v_ptr + lane)))


def seeds_of(values: list[int]) -> Tensor:
    return torch.from_numpy(np.array(values, np.uint64).view(np.int64)).to(DEVICE)


def sample(logits: Tensor, temperatures: list[float], seeds: list[int], positions: list[int]) -> list[int]:
    arguments = (torch.tensor(temperatures, device=DEVICE), seeds_of(seeds), torch.tensor(positions, device=DEVICE))
    return triton_sampling.sample(logits.to(DEVICE), *arguments).tolist()


@pytest.mark.parametrize("first", [0, 128_000])
def test_v_matches_the_specification_bit_for_bit_and_g_within_rounding(first: int) -> None:
    block = 2048
    v, g = (torch.empty(len(SEEDS), block, device=DEVICE) for _ in range(2))
    _draw[(len(SEEDS),)](seeds_of(SEEDS), torch.tensor(POSITIONS, device=DEVICE), v, g, FIRST=first, BLOCK=block)
    ids = np.arange(first, first + block)
    for row, (seed, position) in enumerate(zip(SEEDS, POSITIONS, strict=True)):
        assert np.array_equal(v[row].cpu().numpy(), noise.uniform(seed, position, ids))
        expected = noise.gumbel(seed, position, ids)
        np.testing.assert_allclose(g[row].cpu().numpy(), expected, rtol=4e-7, atol=4e-7)


def test_the_large_noise_tail_keeps_its_resolution() -> None:
    # The largest noises, their neighbours, both sides of where 1 - v rounds to 1, and the smallest noise.
    v = np.array([0.5, 1.5, 2.5, 3.5, 100.5, 2**23 + 0.5, 2**24 - 1.5, 2**24 - 1], np.float32) * np.float32(2**-24)
    g = torch.empty(8, device=DEVICE)
    _gumbel_of[(1,)](torch.from_numpy(v).to(DEVICE), g, BLOCK=8)
    exact = -np.log(-np.log1p(-v.astype(np.float64)))
    np.testing.assert_allclose(g.cpu().numpy(), exact, rtol=4e-7, atol=4e-7)
    assert g[0] > 17.3
    assert g[:4].diff().lt(-0.3).all()


def test_the_choice_is_that_of_the_specification_at_every_temperature() -> None:
    logits = 4 * torch.randn(5, 3001, generator=torch.Generator().manual_seed(0))
    logits[:, ::3] = -torch.inf
    temperatures = [0.0, 0.3, 0.7, 1.0, 2.5]
    expected = [
        noise.choose(logits[row].numpy(), SEEDS[row], POSITIONS[row], temperature)
        for row, temperature in enumerate(temperatures)
    ]
    assert sample(logits, temperatures, SEEDS, POSITIONS) == expected


def test_the_lowest_id_wins_a_tie_within_and_across_tiles() -> None:
    logits = torch.zeros(2, 3000)
    logits[0, [77, 78, 2500]] = 1.0
    logits[1, [1023, 1024]] = 1.0
    assert sample(logits, [0.0, 0.0], [1, 2], [3, 4]) == [77, 1023]


def test_the_only_permitted_id_is_chosen_whatever_its_noise() -> None:
    logits = torch.full((3, 2100), -torch.inf)
    for row, permitted in enumerate([0, 1500, 2099]):
        logits[row, permitted] = -50.0
    assert sample(logits, [0.0, 0.5, 3.0], [5, 6, 7], [1, 1, 1]) == [0, 1500, 2099]


def test_neither_the_tile_nor_the_row_changes_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 700, generator=torch.Generator().manual_seed(0))
    together = sample(logits, [1.0] * 3, [1, 2, 3], [9, 9, 9])
    monkeypatch.setattr(tuning, "SAMPLING", tuning.SAMPLING._replace(block=128))
    assert sample(logits.flip(0), [1.0] * 3, [3, 2, 1], [9, 9, 9]) == together[::-1]


def test_half_precision_logits_are_widened_before_they_are_scaled() -> None:
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(0)).half()
    assert sample(logits, [0.9], [11], [12]) == [noise.choose(logits[0].float().numpy(), 11, 12, 0.9)]


def test_drafts_count_while_they_equal_the_choice_before_them() -> None:
    starts = torch.tensor([0, 4, 5, 8, 10], dtype=torch.int32, device=DEVICE)
    #      all three right | no draft | first wrong, later right | one right
    tokens = torch.tensor([1, 2, 3, 4, 9, 1, 5, 6, 7, 8], dtype=torch.int32, device=DEVICE)
    chosen = torch.tensor([2, 3, 4, 0, 9, 9, 6, 6, 8, 8], dtype=torch.int32, device=DEVICE)
    assert triton_sampling.count_accepted(chosen, tokens, starts, 4).tolist() == [3, 0, 0, 1]


def test_counts_are_those_of_the_reference_for_any_drafts() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(1, 7, (9,), generator=generator)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), rows.cumsum(0))).int().to(DEVICE)
    chosen, tokens = (torch.randint(0, 2, (int(rows.sum()),), generator=generator).int().to(DEVICE) for _ in range(2))
    expected = reference.count_accepted(chosen, tokens, starts, 6)
    assert torch.equal(triton_sampling.count_accepted(chosen, tokens, starts, 6), expected)
