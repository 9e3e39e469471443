"""The end of a step in one launch: the tokens and accepted drafts that the reference finds from logits it writes."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels import reference_layer, triton_choice, tuning
from kernels.product_cases import random_weight4
from kernels.reference_layer import hidden_of
from kernels.triton_choice import Samples
from kernels.triton_layer import Hidden, Matrix, Norm
from kernels.triton_product import Workspace
from kernels.verify import nan_filled_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COLUMNS, VOCABULARY = 150, 300
SEED = -7046029254386353131
EPSILON = 1e-5


@pytest.fixture(autouse=True)
def _memory_starts_as_nan() -> Iterator[None]:
    with nan_filled_memory():
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half().to(DEVICE)


def whole(*values: int, kind: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=kind, device=DEVICE)


def hidden_rows(rows: int) -> Hidden:
    return hidden_of(normal(rows, COLUMNS), Norm(normal(COLUMNS, seed=2), EPSILON))


def head_of(kind: str) -> Matrix:
    if kind == "dense":
        return normal(VOCABULARY, COLUMNS, seed=1)
    return random_weight4(
        VOCABULARY, COLUMNS, 32, "minima", torch.float16, DEVICE, torch.Generator(DEVICE).manual_seed(1)
    )


def samples_of(rows: list[int], lengths: list[int], mask_of: list[int] | None = None) -> Samples:
    """Every third sample is greedy. Mask 0 permits ids 5, 64 and 299; mask 1 none above 63, for want of a word."""
    count = len(rows)
    masks = torch.zeros(2, 10, dtype=torch.int64)
    for id_ in (5, 64, 299):
        masks[0, id_ // 32] |= 1 << (id_ % 32)
    masks[1, :2] = 0xFFFFFFFF
    return Samples(
        rows=whole(*rows),
        temperatures=torch.arange(count, device=DEVICE) % 3 / 2.0,
        seeds=torch.arange(count, device=DEVICE) * SEED,
        positions=torch.arange(count, device=DEVICE) * 1234567891,
        masks=masks.int().to(DEVICE),
        mask_of=whole(*(mask_of or [-1] * count)),
        tokens=whole(*range(count), kind=torch.int64),
        starts=torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int(),
        most=max(lengths),
    )


def work() -> Workspace:
    return Workspace(DEVICE, 16, 1)


@pytest.mark.parametrize("kind", ["dense", "four bits"])
def test_tokens_are_those_that_written_logits_would_give(kind: str) -> None:
    hidden, head = hidden_rows(9), head_of(kind)
    samples = samples_of([8, 0, 3, 3, 5, 1], [2, 1, 3])
    scratch = work()
    got, expected = (
        triton_choice.choose(hidden, EPSILON, head, samples, scratch),
        reference_layer.choose(hidden, EPSILON, head, samples),
    )
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    assert not scratch.counters.any()


def test_masks_permit_what_their_bits_say() -> None:
    hidden, head = hidden_rows(6), head_of("dense")
    samples = samples_of(list(range(6)), [6], [0, -1, 1, 0, 1, 0])
    got, _ = triton_choice.choose(hidden, EPSILON, head, samples, work())
    assert torch.equal(got, reference_layer.choose(hidden, EPSILON, head, samples)[0])
    chosen = got.tolist()
    assert {chosen[0], chosen[3], chosen[5]} <= {5, 64, 299}
    assert max(chosen[2], chosen[4]) < 64 <= max(chosen)


def test_drafts_are_accepted_while_they_equal_the_choice_before_them() -> None:
    hidden, head = hidden_rows(9), head_of("dense")
    samples = samples_of(list(range(9)), [4, 1, 4])
    chosen = reference_layer.choose(hidden, EPSILON, head, samples)[0].long()
    tokens = torch.cat((chosen[:1] * 0, chosen[:-1]))  # all drafts right
    tokens[7] += 1  # but the second of the last sequence
    samples = samples._replace(tokens=tokens)
    assert triton_choice.choose(hidden, EPSILON, head, samples, work())[1].tolist() == [3, 0, 1]


def test_the_lowest_id_wins_a_tie_within_and_across_tiles() -> None:
    weight = torch.zeros(VOCABULARY, COLUMNS, dtype=torch.float16, device=DEVICE)
    weight[[70, 71, 290]] = 1.0
    hidden = hidden_of(torch.ones(2, COLUMNS, dtype=torch.float16, device=DEVICE), Norm(normal(COLUMNS).abs(), 1e-5))
    samples = samples_of([0, 1], [1, 1])._replace(temperatures=torch.zeros(2, device=DEVICE))
    assert triton_choice.choose(hidden, EPSILON, weight, samples, work())[0].tolist() == [70, 70]


def test_neither_neighbours_nor_tiles_change_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head = hidden_rows(20), head_of("four bits")
    samples = samples_of(list(range(20)), [1] * 20)
    together, _ = triton_choice.choose(hidden, EPSILON, head, samples, work())
    monkeypatch.setattr(tuning, "head", lambda vocabulary: tuning.Launch(128, num_warps=4))
    for sample in (0, 19):
        own = slice(sample, sample + 1)
        alone = samples._replace(
            starts=whole(0, 1),
            **{
                name: getattr(samples, name)[own]
                for name in ("rows", "temperatures", "seeds", "positions", "mask_of", "tokens")
            },
        )
        assert torch.equal(triton_choice.choose(hidden, EPSILON, head, alone, work())[0], together[own])


def test_no_samples_are_no_work() -> None:
    hidden = hidden_rows(1)
    samples = samples_of([0], [1])
    nothing = Samples(
        *(value[:0] if name not in ("masks", "starts", "most") else value for name, value in samples._asdict().items())
    )
    nothing = nothing._replace(starts=whole(0))
    chosen, accepted = triton_choice.choose(hidden, EPSILON, head_of("dense"), nothing, work())
    assert chosen.shape == accepted.shape == (0,)
    nothing = nothing._replace(starts=whole(0, 0))
    chosen, accepted = triton_choice.choose(hidden, EPSILON, head_of("dense"), nothing, work())
    assert chosen.shape == (0,)
    assert accepted.tolist() == [0]
